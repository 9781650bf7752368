import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from data_prep.checks import check_dataset
from data_prep.statistics import measure_scene, median_spacing, scene_rows, visible_share
from data_prep.verify import inspect_dataset, render_comparison, render_report, report_as_json, write_pages
from vrdistill_jax.data.builders import prepare_scenes

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("chair", "table")
SIZES = np.array([[0.5, 0.5, 1.0], [1.5, 0.8, 0.7]], np.float32)


def make_sample(seed, name, scale=1.0):
    """A room of 6 x 5 m with a chair and two tables whose surfaces are sampled."""
    rng = np.random.default_rng(seed)
    floor = np.column_stack([rng.uniform(0, 6, 3000), rng.uniform(0, 5, 3000), rng.normal(0, 0.004, 3000)])
    wall = np.column_stack([rng.uniform(0, 6, 1500), rng.normal(5, 0.004, 1500), rng.uniform(0, 2.5, 1500)])
    label = np.array([0, 1, 1])
    size = SIZES[label] * rng.uniform(0.9, 1.1, (3, 3))
    center = np.column_stack([[1.0, 2.8, 5.0], rng.uniform(1, 4, 3), size[:, 2] / 2])
    parts, instance = [floor, wall], [np.full(4500, -1)]
    for row in range(3):
        local = rng.uniform(-0.5, 0.5, (400, 3))
        local[np.arange(400), rng.integers(0, 3, 400)] = rng.choice([-0.5, 0.5], 400)
        parts.append(center[row] + local * size[row])
        instance.append(np.full(400, row))
    xyz = np.concatenate(parts).astype(np.float32)
    return {
        "xyz": xyz * np.float32(scale),
        "color": rng.random(xyz.shape).astype(np.float32),
        "instance": np.concatenate(instance).astype(np.int32),
        "boxes_center": (center * scale).astype(np.float32),
        "boxes_size": (size * scale).astype(np.float32),
        "boxes_yaw": np.zeros(3, np.float32),
        "boxes_label": label.astype(np.int32),
        "vote_center": (center * scale).astype(np.float32),
        "name": name,
    }


def write_dataset(folder, train, val, names=NAMES, name="rooms"):
    return prepare_scenes(name, {"train": lambda: train, "val": lambda: val}, names, "made up", folder)


def good_splits():
    return [make_sample(i, f"a{i}") for i in range(3)], [make_sample(10 + i, f"b{i}") for i in range(2)]


def inspect(folder):
    return inspect_dataset(folder, workers=0, progress=False)


def verdicts(splits, names=NAMES):
    measured = {split: [measure_scene(sample) for sample in samples] for split, samples in splits.items()}
    return {check.name: check for check in check_dataset(measured, names)}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), *good_splits())


def test_statistics_against_plain_counts(rooms):
    report = inspect(rooms)
    train, val = good_splits()
    both = report.summaries["all"]
    assert both["scenes"] == 5
    assert report.summaries["val"]["scenes"] == 2
    assert both["boxes"] == 15
    assert both["boxes_per_scene"] == {"mean": 3, "p5": 3, "median": 3, "p95": 3}
    assert both["points_per_scene"]["median"] == 5700
    assert both["points_with_instance"] == pytest.approx(1200 / 5700, rel=1e-3)
    tables = np.concatenate([sample["boxes_size"][1:] for sample in train + val])
    np.testing.assert_allclose(both["classes"]["table"]["mean_size"], tables.mean(0), rtol=1e-3)
    assert both["classes"]["table"]["boxes"] == 10
    assert report.summaries["train"]["classes"]["chair"]["boxes"] == 3
    counts = []
    for sample in train + val:
        for center, size in zip(sample["boxes_center"], sample["boxes_size"], strict=True):
            counts.append((np.abs(sample["xyz"] - center) <= size / 2 + 1e-5).all(1).sum())
    assert both["points_per_box"]["median"] == pytest.approx(np.median(counts), rel=1e-3)
    assert both["boxes_below_5_points"] == both["boxes_below_20_points"] == 0
    assert both["length"] == pytest.approx(6, abs=0.1)
    assert both["height"] == pytest.approx(2.5, abs=0.1)
    assert both["turned_boxes"] == 0
    assert all(check.verdict == "ok" for check in report.checks)


def test_the_spacing_of_a_lattice_is_its_step():
    grid = np.stack(np.meshgrid(*[np.arange(9) * 0.05] * 3), -1).reshape(-1, 3)
    assert median_spacing(grid) == pytest.approx(0.05, rel=1e-4)
    assert median_spacing(grid[:1]) == 0


@pytest.mark.parametrize("yaw", [0.0, 0.7])
def test_the_visible_share_counts_the_faces_that_have_points(yaw):
    cells = (np.arange(10) + 0.5) / 10 - 0.5
    u, v = (axis.ravel() for axis in np.meshgrid(cells, cells))
    size = np.array([2.0, 1.0, 3.0])
    top = np.column_stack([u, v, np.full(100, 0.5)]) * size
    front = np.column_stack([np.full(100, 0.5), u, v]) * size
    box = np.array([[5.0, -2.0, 1.0, *size, yaw]])
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])

    def share(local):
        return visible_share(local @ turn.T + box[0, :3], box)[0]

    # A cell row of a neighbouring face also has points near, hence the slack of its 10 cells.
    assert share(top) == pytest.approx(100 / 600, abs=45 / 600)
    assert share(top) >= 100 / 600
    assert share(np.concatenate([top, front])) >= 200 / 600
    assert share(top[:50]) == pytest.approx(share(top) / 2, abs=0.05)
    assert share(top * [1, 1, 1.5]) == 0  # far above the face
    assert share(np.zeros((5, 3))) == 0  # in the middle
    assert visible_share(np.zeros((0, 3)), box).tolist() == [0]


def test_some_turned_scans_among_right_ones_warn():
    samples = [make_sample(i, f"a{i}") for i in range(6)]
    to_y_up(samples[2])
    found = verdicts({"train": samples})["up axis"]
    assert (found.verdict, "1 of 6" in found.detail) == ("warning", True)


def change(field, row, value):
    def apply(sample):
        array = sample[field].copy()
        array[row] = value
        sample[field] = array

    return apply


def to_y_up(sample):
    for name in ("xyz", "boxes_center", "vote_center"):
        sample[name] = sample[name][:, [0, 2, 1]] * np.array([1, 1, -1], np.float32)
    sample["boxes_size"] = sample["boxes_size"][:, [0, 2, 1]]


def shift_boxes(sample):
    sample["boxes_center"] = sample["boxes_center"] + np.array([0, 0, 1.0], np.float32)


@pytest.mark.parametrize(
    ("check", "fault", "detail"),
    [
        ("labels", change("boxes_label", 0, 2), r"label 2"),
        ("labels", change("boxes_label", 0, -1), r"label -1"),
        ("finite numbers", change("xyz", (5, 1), np.nan), "xyz"),
        ("finite numbers", change("boxes_yaw", 0, np.inf), "boxes_yaw"),
        ("box sizes", change("boxes_size", (1, 2), 0), "sizes"),
        ("box sizes", change("boxes_size", (1, 2), 40), "sizes"),
        ("yaw", change("boxes_yaw", 1, 90), "degrees"),
        ("instance rows", change("instance", 7, 3), r"-1\.\.3"),
        ("instance rows", change("instance", 7, -2), r"-2\.\.2"),
        ("up axis", to_y_up, "along y, not"),
        ("points in boxes", change("boxes_center", slice(None), 2.2), "fewer than 5"),
        ("boxes in the cloud", change("boxes_center", 0, 30), "1 of 15"),
        ("instances in their boxes", shift_boxes, "outside"),
        ("names", lambda sample: sample.update(name="same"), "same"),
    ],
)
def test_each_fault_is_found(check, fault, detail):
    train, val = good_splits()
    everywhere = check in ("up axis", "names", "points in boxes", "instances in their boxes")
    for sample in [*train, *val] if everywhere else train[:1]:
        fault(sample)
    found = verdicts({"train": train, "val": val})[check]
    assert found.verdict == "failed"
    assert re.search(detail, found.detail)


def test_other_units_fail_and_say_so():
    for scale in (1000, 100, 0.1):
        samples = [make_sample(i, f"s{i}", scale) for i in range(3)]
        found = verdicts({"train": samples})["units"]
        assert found.verdict == "failed"
        assert "no metres" in found.detail


def test_copies_across_splits_fail_and_within_one_warn():
    train, val = good_splits()
    twin = {**train[0], "name": "twin"}
    found = verdicts({"train": train, "val": [*val, twin]})["copies"]
    assert (found.verdict, "val/twin = train/a0" in found.detail) == ("failed", True)
    assert verdicts({"train": [*train, twin], "val": val})["copies"].verdict == "warning"


def test_classes_without_training_boxes_and_empty_scenes_warn():
    train, val = good_splits()
    found = verdicts({"train": train, "val": val}, (*NAMES, "sofa"))["classes"]
    assert (found.verdict, "sofa" in found.detail) == ("warning", True)
    empty = {**train[0], "instance": np.full(5700, -1, np.int32), "boxes_label": np.zeros(0, np.int32)}
    empty |= {k: np.zeros((0, 3), np.float32) for k in ("boxes_center", "boxes_size", "vote_center")}
    empty |= {"boxes_yaw": np.zeros(0, np.float32)}
    found = verdicts({"train": [empty], "val": val})
    assert "train has no boxes" in found["classes"].detail
    assert verdicts({"train": [empty]})["points in boxes"].verdict == "failed"


def test_a_dataset_that_was_changed_after_its_manifest_fails(tmp_path):
    directory = write_dataset(tmp_path, *good_splits())
    report = inspect(directory)
    scenes = {
        split: [{"scene": scene.name, "sha256": scene.stored} for scene in group]
        for split, group in report.splits.items()
    }
    (directory / "manifest.json").write_text(json.dumps({"scenes": scenes}))
    assert {check.name: check.verdict for check in inspect(directory).checks}["manifest"] == "ok"
    scenes["train"][1]["sha256"] = "0" * 64
    (directory / "manifest.json").write_text(json.dumps({"scenes": scenes}))
    found = {check.name: check for check in inspect(directory).checks}["manifest"]
    assert (found.verdict, "a1" in found.detail) == ("failed", True)


def test_report_pages_and_json(rooms, tmp_path):
    report = inspect(rooms)
    text = render_report(report)
    assert "passed: all 14 checks" in text
    index = write_pages(report, tmp_path / "pages", 2)
    page = index.read_text()
    for name in ("train_00000", "train_00002", "val_00000", "val_00001"):
        assert f'href="{name}.html"' in page
        assert '"truth":[{' in (index.parent / f"{name}.html").read_text()
    content = json.loads(json.dumps(report_as_json(report), allow_nan=False))
    assert content["passed"] is True
    assert content["statistics"]["train"]["classes"]["chair"]["boxes"] == 3


def test_scenes_that_cannot_be_drawn_are_listed_not_fatal(tmp_path):
    train, val = good_splits()
    train[0]["boxes_label"][0] = 9
    report = inspect(write_dataset(tmp_path, train, val))
    page = write_pages(report, tmp_path / "pages").read_text()
    assert "train / a0: cannot be drawn" in page


def test_two_datasets_side_by_side(rooms, tmp_path):
    larger = [make_sample(i, f"c{i}", 2.0) for i in range(2)]
    other = inspect(write_dataset(tmp_path, larger, larger[:1], ("chair", "table"), "large"))
    text = render_comparison(inspect(rooms), other)
    lines = {line.split("  ")[0]: line for line in text.splitlines() if line}
    assert lines["length of a scan, median (m)"].split()[-1] == "0.50"
    assert lines["boxes per scene"].split()[-1] == "1.00"
    np.testing.assert_allclose([float(v) for v in lines["table"].split()[-6:-3]], 0.5, atol=0.06)


def test_rows_are_evenly_spaced():
    assert scene_rows(5, 0).tolist() == [0, 1, 2, 3, 4]
    assert scene_rows(100, 3).tolist() == [0, 50, 99]
    assert scene_rows(2, 8).tolist() == [0, 1]
    assert scene_rows(0, 8).tolist() == []


def run_verb(*arguments):
    command = [sys.executable, "-m", "data_prep.verify", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_exit_codes(rooms, tmp_path):
    done = run_verb(rooms, "--workers=1", f"--json={tmp_path / 'out/report.json'}", f"--against={rooms}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/report.json").read_text())["passed"] is True
    train, val = good_splits()
    train[0]["boxes_label"][0] = 9
    done = run_verb(f"--dataset={write_dataset(tmp_path, train, val)}", "--workers=0")
    assert done.returncode == 1, done.stderr
    assert "FAILED: 1 of 14 checks" in done.stdout
    done = run_verb("/nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no prepared dataset at /nowhere")
    assert run_verb("a", "b").returncode == 2
