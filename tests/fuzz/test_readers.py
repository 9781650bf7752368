"""Damaged, hostile and absurd files for every reader: one clear error or a sound result, and nothing else.

`worker.py` runs the cases in a process of its own and says what a case must not do; `readers.py` lists the readers
and the hand-made cases; `mutations.py` makes the random ones. A case is repeated by its reader and number.
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from fuzz import readers

pytest.importorskip("h5py")
pytest.importorskip("PIL")
pytest.importorskip("resource")  # limits of processes: Linux and macOS

WORKER = pathlib.Path(__file__).with_name("worker.py")
CASES_PER_READER = 640  # of the slow test
NUM_READERS = 42


def run(folder: pathlib.Path, groups: list[str], count: int, **options) -> list[dict]:
    """Runs the cases and gives their outcomes; a case that ended the process has that as its problem."""
    log, plan = folder / "log.jsonl", folder / "plan.json"
    log.touch()
    outcomes: dict[tuple[str, int], dict] = {}
    first: dict[str, int] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    for _ in range(40):  # processes that may die
        content = {"groups": groups, "folder": str(folder), "log": str(log), "count": count, "first": first}
        plan.write_text(json.dumps({**content, **options}))
        command = [sys.executable, str(WORKER), str(plan)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
        begun = None
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            key = (entry["reader"], entry["case"])
            first[entry["reader"]] = max(first.get(entry["reader"], 0), entry["case"] + 1)
            begun = None if "kind" in entry else key
            if "kind" in entry:
                outcomes[key] = entry
        if begun is None:
            assert done.returncode == 0, done.stderr[-3000:]
            break
        problem = f"ended the process (exit code {done.returncode}): {done.stderr[-600:]}"
        outcomes[begun] = {
            "reader": begun[0],
            "case": begun[1],
            "kind": "?",
            "message": "",
            "problem": problem,
        }
        with log.open("a") as stream:  # so that it is not begun again
            stream.write(json.dumps({**outcomes[begun], "seconds": 0.0, "peak": 0}) + "\n")
    else:
        pytest.fail("the process died 40 times")
    return list(outcomes.values())


def check(
    outcomes: list[dict], folder: pathlib.Path, count: int, all_hostile: bool = False
) -> dict[str, int]:
    """Every reader ran all its cases, takes its intact files, refuses many others, and broke no rule.

    Returns:
      The readers, each with the number of its hand-made cases.
    """
    names = json.loads((folder / "readers.json").read_text())
    problems = [
        f"{o['reader']} case {o['case']} ({o['kind']}): {o['problem']}" for o in outcomes if o["problem"]
    ]
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems[:40])
    ran = collections.Counter(o["reader"] for o in outcomes)
    extra = {name: max(hostile - count // 2, 0) if all_hostile else 0 for name, hostile in names.items()}
    assert ran == {name: count + extra[name] for name in names}
    for outcome in outcomes:
        assert outcome["case"] or not outcome["message"], f"the intact files are refused: {outcome}"
    for name in names:
        refused = sum(bool(o["message"]) for o in outcomes if o["reader"] == name)
        assert refused > 0.2 * ran[name], f"{name} refused only {refused} of {ran[name]}"
    return names


def report(outcomes: list[dict]) -> str:
    """A line per reader: cases, refusals, processor seconds, peak memory."""
    lines = []
    for name in dict.fromkeys(o["reader"] for o in outcomes):
        mine = [o for o in outcomes if o["reader"] == name]
        refused, seconds = sum(bool(o["message"]) for o in mine), sum(o["seconds"] for o in mine)
        slowest, peak = max(o["seconds"] for o in mine), max(o["peak"] for o in mine) >> 20
        lines.append(
            f"{name:24}{len(mine):6} cases{refused:6} refused{seconds:8.1f} s, slowest {slowest:5.2f} s, {peak:4} MiB"
        )
    return "\n".join(lines)


def test_hand_made_and_some_random_cases_of_every_reader(tmp_path):
    outcomes = run(tmp_path, list(readers.GROUPS), 8, all_hostile=True)
    names = check(outcomes, tmp_path, 8, all_hostile=True)
    assert len(names) == NUM_READERS
    assert len(outcomes) >= 300


@pytest.mark.slow
@pytest.mark.parametrize("group", readers.GROUPS)
def test_many_cases(tmp_path, group):
    outcomes = run(tmp_path, [group], CASES_PER_READER)
    print(report(outcomes))
    for name, hostile in check(outcomes, tmp_path, CASES_PER_READER).items():
        assert 2 * hostile + 1 <= CASES_PER_READER, f"{name}: hand-made cases are left out"


def test_the_many_cases_are_ten_thousand():
    assert CASES_PER_READER * NUM_READERS >= 10_000


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("unpickle", "no reader may.*(find_class|os.system)|ran code"),
        ("evaluate", "no reader may.*os.system"),
        ("loop", "took more than"),
        ("hoard", r"took \d+ MiB"),
        ("ask_for_everything", "more memory than there is"),
        ("stumble", "raised KeyError"),
        ("crash", "ended the process .exit code -11"),
        ("leave", "ended the process .exit code 0"),
        ("stay_vague", "names no file"),
        ("paint", "holds"),
        ("warn", "raised RuntimeWarning"),
        ("write", "no reader may.*open"),
        ("wander", "no reader may.*passwd"),
        ("inflate", "gave 10485760 bytes"),
        ("accept", "was accepted"),
    ],
)
def test_the_rules_are_watched(broken_outcomes, name, problem):
    found = {o["case"]: o["problem"] for o in broken_outcomes if o["reader"] == name}
    assert set(found) == {0, 1}
    assert re.search(problem, found[1], re.S), found


@pytest.fixture(scope="module")
def broken_outcomes(tmp_path_factory):
    return run(tmp_path_factory.mktemp("broken"), ["broken"], 2, cpu_seconds=1.0)
