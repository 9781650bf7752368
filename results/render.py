"""Writes the tables of README.md and of some pages of docs from the JSON files beside this script.

python results/render.py          rewrites the pages
python results/render.py --check  exit code 1 if a page does not show what the JSON files hold
"""

import json
import pathlib
import re
import sys
from functools import partial

from vrdistill_jax.experiments.grid import Study
from vrdistill_jax.experiments.rendering import as_markdown
from vrdistill_jax.reproduce import PAPERS

HERE = pathlib.Path(__file__).parent
PAGES = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
SEEDS = 3


def read(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def recall(result: dict, threshold: float) -> float:
    """Share of all boxes that are found."""
    classes = [entry for entry in result["classes"].values() if entry["num_gt"]]
    return sum(e["num_gt"] * e[f"recall@{threshold}"] for e in classes) / sum(e["num_gt"] for e in classes)


def provenance(record: dict) -> str:
    environment, config = record["environment"], record["config"]
    return (
        f"`{record['command']}`; VoteNet at width {config['detector']['width']}, {config['dataset']['num_points']:,} points, "
        f"{config['train']['num_steps']:,} steps of {config['train']['batch_size']} rooms, seed {config['seed']}, one run; "
        f"{environment['platform']}, jax {environment['jax']}."
    )


def synthrooms() -> str:
    record = read("synthrooms_votenet_half")
    result = record["result"]
    rows = "\n".join(
        f"| {name} | {percent(entry['AP@0.25'])} | {percent(entry['AP@0.5'])} | {entry['num_gt']} |"
        for name, entry in result["classes"].items()
    )
    return (
        f"`make train` ends with this table (AP in %, {result['num_scenes']} held-out rooms):\n\n"
        "| class | AP@0.25 | AP@0.5 | boxes |\n|---|---|---|---|\n"
        f"{rows}\n| **mean** | **{percent(result['mAP@0.25'])}** | **{percent(result['mAP@0.5'])}** | |\n\n"
        "The checkpoint is the better of two evaluations on these same rooms (the last one, as it happens). "
        f"Made by {provenance(record)}"
    )


def sim_to_real() -> str:
    lines = [
        "A detector that has seen SynthRooms only, on 8 real ScanNet scenes with 150 boxes of the 18 classes. Nothing was "
        "trained on them, but statistics of these scenes guided version 3 of the rooms, so they are no held-out test. "
        "Recall counts all boxes, mAP averages classes; in %. One training run each.",
        "",
        "| rooms | read as densely as | recall@0.25 | recall@0.5 | mAP@0.25 | mAP@0.5 |",
        "|---|---|---|---|---|---|",
    ]
    commands = []
    for path in sorted((HERE / "sim_to_real").glob("*.json")):
        record = json.loads(path.read_text())
        result, command = record["result"], record["command"]
        values = (recall(result, 0.25), recall(result, 0.5), result["mAP@0.25"], result["mAP@0.5"])
        rooms = "version 2" if path.stem.startswith("rooms2") else "version 3 (nearer to real scans)"
        dense = "twice" if "--density=2" in command else "in training"
        lines.append(f"| {rooms} | {dense} | " + " | ".join(percent(value) for value in values) + " |")
        commands.append(command)
    return "\n".join(
        [
            *lines,
            "",
            f"Made by `{commands[-1]}` and the like; docs/synthrooms.md says what changed in version 3. "
            "Version 2's detector was trained with an earlier revision of this repository, before rooms and "
            "loader changed; there is one detector per version, so part of a difference may be chance.",
        ]
    )


def table_of_runs(paper: str, number: int | str) -> str:
    study = Study("synthrooms", "small", pathlib.Path("runs/reproduce"), HERE / paper)
    return as_markdown(PAPERS[paper].make_table(number, study, SEEDS)).rstrip()


def measured_table(paper: str, name: str) -> str:
    """Of a file that was measured as a whole, such as times."""
    return (HERE / paper / "synthrooms_small" / f"{name}.md").read_text().rstrip()


def vote_distances() -> str:
    """Mean distance of votes on objects to the object's centre, of one run."""
    lines = ["| measured on | teacher's votes | refined | student's | votes |", "|---|---|---|---|---|"]
    rooms = json.loads((HERE / "vrdistill/synthrooms_small/quarter_vrdistill_seed0.json").read_text())
    scans = json.loads((HERE / "vrdistill/scannet_votes.json").read_text())
    for name, record, analysis in (
        ("held-out rooms", rooms, rooms["analysis"]),
        ("real ScanNet scenes", scans, scans["result"]["analysis"]),
    ):
        distances = analysis["vote_distance"]
        values = " | ".join(f"{distances[w]['mean_m']:.3f} m" for w in ("teacher", "refined", "student"))
        scenes = record["result"]["num_scenes"]
        lines.append(f"| {scenes} {name} | {values} | {distances['refined']['num_votes']:,} |")
    return "\n".join([*lines, "", f"Made by `{rooms['command']}` and `{scans['command']}`; one run."])


SECTIONS = {
    "vrdistill_votes": vote_distances,
    "synthrooms": synthrooms,
    "sim_to_real": sim_to_real,
    "vrdistill_table8": partial(measured_table, "vrdistill", "table8"),
    "sr3d_table7": partial(measured_table, "sr3d", "table7"),
    **{f"vrdistill_table{n}": partial(table_of_runs, "vrdistill", n) for n in (1, 3, 4, 6, 7, 9)},
    **{
        f"vrdistill_{name}": partial(table_of_runs, "vrdistill", name)
        for name in ("readings", "cross_family", "slow_refinement")
    },
    **{f"sr3d_table{n}": partial(table_of_runs, "sr3d", n) for n in range(1, 7)},
}


def render(text: str) -> str:
    for name, make in SECTIONS.items():
        if f"<!-- results: {name} -->" not in text:
            continue
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- results: end -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    stale = [page for page in PAGES if page.read_text() != render(page.read_text())]
    if "--check" in sys.argv:
        sys.exit(bool(stale))
    for page in stale:
        page.write_text(render(page.read_text()))
