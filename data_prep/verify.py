"""Looks a prepared dataset over: statistics, checks, and pages to look at.

    python -m data_prep.verify datasets/my_rooms
    python -m data_prep.verify datasets/my_rooms --html=pages --json=statistics.json
    python -m data_prep.verify datasets/synthrooms_scan_0123456789 --against=datasets/scannet

Exit code 0 if all checks pass (warnings included), 1 if one fails, 2 for bad input.
"""

import html
import json
import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from data_prep.checks import Check, check_dataset
from data_prep.statistics import (
    SceneStatistics,
    measure_split,
    reference_sizes,
    scene_rows,
    split_names,
    summarize,
)
from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.builders import default_data_dir, open_split
from vrdistill_jax.visualization.html_viewer import write_viewer

_LINES = {  # key of the summary -> text, unit
    "scenes": ("scenes", ""),
    "points_per_scene": ("points per scene", ""),
    "boxes_per_scene": ("boxes per scene", ""),
    "scenes_without_boxes": ("scenes without boxes", "%"),
    "turned_boxes": ("boxes with yaw", "%"),
    "points_per_box": ("points per box", ""),
    "boxes_below_5_points": ("boxes with < 5 points", "%"),
    "boxes_below_20_points": ("boxes with < 20 points", "%"),
    "visible_surface": ("visible share of box surface", "%"),
    "points_with_instance": ("points with an instance", "%"),
    "neighbour_distance": ("nearest neighbour, median (m)", ""),
    "length": ("length of a scan, median (m)", ""),
    "width": ("width of a scan, median (m)", ""),
    "height": ("height of a scan, median (m)", ""),
    "lowest_z": ("lowest z, median (m)", ""),
    "highest_z": ("highest z, median (m)", ""),
}


class DatasetReport(NamedTuple):
    """All that was found out about a dataset."""

    directory: pathlib.Path
    class_names: tuple[str, ...]
    splits: dict[str, list[SceneStatistics]]
    summaries: dict[str, dict[str, Any]]  # per split, and "all"
    checks: list[Check]
    config_sizes: dict[str, list]  # class -> mean size that a config trains with
    config_sizes_source: str


def inspect_dataset(
    dataset: str | os.PathLike, max_scenes: int = 0, workers: int | None = None, progress: bool = True
) -> DatasetReport:
    """Measures and checks a prepared dataset.

    Args:
      dataset: its folder, or its name in `default_data_dir()`.
      max_scenes: per split, evenly spaced; 0 for all.
      workers: processes; None for one per core, 0 for none.
      progress: whether to show progress bars.

    Returns:
      The report.

    Raises:
      ValueError: if there is no such dataset.
    """
    directory = find_dataset(dataset)
    names = split_names(directory)
    if not names:
        raise ValueError(f"{directory} has no splits")
    class_names = open_split(directory, names[0]).class_names
    splits = {split: measure_split(directory, split, max_scenes, workers, progress) for split in names}
    summaries = {split: summarize(scenes, class_names) for split, scenes in splits.items()}
    everything = [scene for scenes in splits.values() for scene in scenes]
    sizes, where = reference_sizes(directory, class_names)
    return DatasetReport(
        directory,
        class_names,
        splits,
        {**summaries, "all": summarize(everything, class_names)},
        check_dataset(splits, class_names, directory),
        sizes,
        where,
    )


def find_dataset(dataset: str | os.PathLike) -> pathlib.Path:
    """Finds a prepared dataset by folder or by name.

    Raises:
      ValueError: saying where it was looked for.
    """
    places = [pathlib.Path(dataset).expanduser(), default_data_dir() / dataset]
    for place in places:
        if (place / "dataset_info.json").is_file():
            return place
    raise ValueError(f"no prepared dataset at {places[0]} or {places[1]}; data_prep's verbs make one")


def render_report(report: DatasetReport) -> str:
    """Gives the text that the verb prints."""
    names = [*report.splits, "all"] if len(report.splits) > 1 else list(report.splits)
    rows = [["", *names]]
    for key, (text, unit) in _LINES.items():
        rows.append([text, *(_value(report.summaries[name][key], unit) for name in names)])
    parts = [f"{report.directory}", _table(rows), "", _class_table(report), "", _check_lines(report.checks)]
    return "\n".join(parts)


def render_comparison(report: DatasetReport, other: DatasetReport) -> str:
    """Gives both datasets side by side, with the first one's share of the second."""
    mine, theirs = report.summaries["all"], other.summaries["all"]
    rows = [["", report.directory.name, other.directory.name, "ratio"]]
    for key, (text, unit) in _LINES.items():
        rows.append(
            [text, _value(mine[key], unit), _value(theirs[key], unit), _ratio(mine[key], theirs[key])]
        )
    lines = [_table(rows), ""]
    table = [
        ["class", "boxes / scene", "", "ratio", "mean size (m)", "", "ratio", "points / box", "", "ratio"]
    ]
    names = [*report.class_names, *(name for name in other.class_names if name not in report.class_names)]
    for name in names:
        a, b = mine["classes"].get(name), theirs["classes"].get(name)
        rate_a = a["boxes"] / max(mine["scenes"], 1) if a else None
        rate_b = b["boxes"] / max(theirs["scenes"], 1) if b else None
        size_a, size_b = a and a["mean_size"], b and b["mean_size"]
        points_a, points_b = a and a["median_points"], b and b["median_points"]
        table.append(
            [
                name,
                *(_value(rate_a), _value(rate_b), _ratio(rate_a, rate_b)),
                *(_size(size_a), _size(size_b), _size_ratio(size_a, size_b)),
                *(_value(points_a), _value(points_b), _ratio(points_a, points_b)),
            ]
        )
    return "\n".join([*lines, _table(table)])


def write_pages(report: DatasetReport, folder: str | os.PathLike, num_pages: int = 8) -> pathlib.Path:
    """Writes a page per sampled scene, with its boxes, and an index.

    Args:
      report: of the dataset.
      folder: where the pages go.
      num_pages: scenes per split, evenly spaced.

    Returns:
      The index page.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for split in report.splits:
        source = open_split(report.directory, split)
        for row in scene_rows(len(source), num_pages):
            sample = source[int(row)]
            file = f"{split}_{row:05d}.html"
            title = f"{split} / {sample['name']}"
            counts = f"{len(sample['xyz']):,} points, {len(sample['boxes_label'])} boxes"
            try:
                _write_page(folder / file, sample, report.class_names, title)
            except ValueError as error:
                items.append(f"<li>{html.escape(title)}: cannot be drawn ({html.escape(str(error))})</li>")
                continue
            items.append(f'<li><a href="{urllib.parse.quote(file)}">{html.escape(title)}</a> ({counts})</li>')
    text = html.escape(render_report(report))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Dataset</title>'
        "<style>body{font-family:sans-serif;margin:2em}pre{overflow-x:auto}</style>"
        f"<h1>{html.escape(report.directory.name)}</h1><ul>{''.join(items)}</ul><pre>{text}</pre></html>\n"
    )
    index = folder / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


def report_as_json(report: DatasetReport, other: DatasetReport | None = None) -> dict[str, Any]:
    """Gives the report as plain data."""
    content: dict[str, Any] = {
        "dataset": str(report.directory),
        "class_names": list(report.class_names),
        "statistics": report.summaries,
        "config_mean_sizes": report.config_sizes,
        "config_mean_sizes_source": report.config_sizes_source,
        "checks": [check._asdict() for check in report.checks],
        "passed": not has_failed(report.checks),
    }
    if other is not None:
        content["against"] = {"dataset": str(other.directory), "statistics": other.summaries}
    return content


def has_failed(checks: Sequence[Check]) -> bool:
    """Whether any check failed; warnings do not count."""
    return any(check.verdict == "failed" for check in checks)


def _write_page(path: pathlib.Path, sample: dict, class_names: Sequence[str], title: str) -> None:
    boxes = np.concatenate(
        [sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"][:, None]], axis=1
    )
    nothing, no_labels = np.zeros((0, 7), np.float32), np.zeros(0, np.int32)
    truth = (boxes, sample["boxes_label"])
    write_viewer(path, sample["xyz"], sample["color"], nothing, no_labels, None, class_names, truth, title)


def _class_table(report: DatasetReport) -> str:
    table = report.summaries["all"]["classes"]
    per_split = list(report.splits)
    head = ["class", *(f"boxes {split}" for split in per_split), "points / box", "visible", "mean size (m)"]
    if report.config_sizes:
        head += [f"config ({report.config_sizes_source})", "ratio"]
    rows = [head]
    for name in report.class_names:
        entry = table[name]
        row = [name, *(str(report.summaries[split]["classes"][name]["boxes"]) for split in per_split)]
        row += [_value(entry["median_points"]), _value(entry["visible_surface"], "%")]
        row.append(_size(entry["mean_size"]))
        if report.config_sizes:
            config = report.config_sizes.get(name)
            row += [_size(config), _size_ratio(entry["mean_size"], config)]
        rows.append(row)
    return _table(rows)


def _check_lines(checks: Sequence[Check]) -> str:
    width = max(len(check.name) for check in checks)
    lines = [f"{check.verdict:8}{check.name:{width}}  {check.detail}".rstrip() for check in checks]
    failed = sum(check.verdict == "failed" for check in checks)
    warned = sum(check.verdict == "warning" for check in checks)
    last = f"FAILED: {failed} of {len(checks)} checks" if failed else f"passed: all {len(checks)} checks"
    return "\n".join([*lines, last + (f", {warned} with a warning" if warned else "")])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def _value(value: Any, unit: str = "") -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return f"{value['median']:.5g} ({value['p5']:.4g}..{value['p95']:.4g})"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.4g}"


def _ratio(a: Any, b: Any) -> str:
    a, b = (value["median"] if isinstance(value, Mapping) else value for value in (a, b))
    return f"{a / b:.2f}" if a is not None and b else "-"


def _size(size: Sequence[float] | None) -> str:
    return "-" if size is None else " x ".join(f"{value:.2f}" for value in size)


def _size_ratio(a: Sequence[float] | None, b: Sequence[float] | None) -> str:
    return "-" if not a or not b else " ".join(f"{x / y:.2f}" for x, y in zip(a, b, strict=True))


def define_flags() -> None:
    """Declares the verb's flags."""
    flags.DEFINE_string("dataset", None, "Prepared dataset: a folder, or a name in VRDISTILL_DATA.")
    flags.DEFINE_string("against", None, "Another prepared dataset to compare with.")
    flags.DEFINE_string("json", None, "Also write everything to this file.")
    flags.DEFINE_string("html", None, "Also write pages of some scenes to this folder.")
    flags.DEFINE_integer("num_pages", 8, "Scenes per split with a page.", 1)
    flags.DEFINE_integer("max_scenes", 0, "Scenes per split to look at, evenly spaced; 0 for all.", 0)
    flags.DEFINE_integer("workers", None, "Worker processes; one per core by default, 0 for none.", 0)


def main() -> int:
    """Prints the report and writes the files asked for."""
    options = flags.FLAGS
    if not options.dataset:
        raise ValueError("name the dataset: python -m data_prep.verify FOLDER")
    report = inspect_dataset(options.dataset, options.max_scenes, options.workers)
    other = None
    print(render_report(report))
    if options.against:
        other = inspect_dataset(options.against, options.max_scenes, options.workers)
        print("\n" + render_comparison(report, other))
    if options.json:
        path = pathlib.Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report_as_json(report, other), indent=1) + "\n")
    if options.html:
        print(f"\nPages: {write_pages(report, options.html, options.num_pages)}")
    return int(has_failed(report.checks))


if __name__ == "__main__":
    define_flags()
    run_verb(main, uses_jax=False, positional="dataset")
