import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from data_prep.conversion import Failure, check_scene_id, convert_dataset, hash_sample, print_report
from vrdistill_jax.data.builders import open_split

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("a", "b", "c")


def make_scene(scene, split, log=None, broken=()):
    """A scene that depends on its id only; writes down each call and fails where it is told to."""
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{scene} {split}\n")
    if scene in broken:
        kind = broken[scene] if isinstance(broken, dict) else "value"
        if kind == "die":
            os._exit(9)
        if kind == "bug":
            raise AssertionError("a bug in the reader")
        if kind == "io":
            raise OSError(f"{scene}.ply: disk error")
        raise ValueError(f"{scene}.ply: is truncated")
    rng = np.random.default_rng(int(scene.removeprefix("s")))
    count, boxes = int(rng.integers(5, 20)), int(scene.removeprefix("s")) % 3
    sample = {
        "xyz": rng.normal(size=(count, 3)).astype(np.float32),
        "color": rng.random((count, 3)).astype(np.float32),
        "instance": rng.integers(-1, boxes, count).astype(np.int32),
        "boxes_center": rng.normal(size=(boxes, 3)).astype(np.float32),
        "boxes_size": rng.uniform(0.1, 2, (boxes, 3)).astype(np.float32),
        "boxes_yaw": rng.random(boxes).astype(np.float32),
        "boxes_label": rng.integers(0, 3, boxes).astype(np.int32),
        "vote_center": rng.normal(size=(boxes, 3)).astype(np.float32),
    }
    if scene == "s2":
        sample["notes"] = ["no alignment"]
    return sample


def slow_scene(scene, split, log):
    sample = make_scene(scene, split, log)
    if scene == "s4":
        time.sleep(60)
    return sample


def convert(output, splits, convert=make_scene, workers=0, **options):
    source = {"kind": "made", "folder": "x"}
    return convert_dataset(
        "rooms",
        splits,
        convert,
        NAMES,
        "hand-made",
        source,
        output,
        workers=workers,
        progress=False,
        **options,
    )


SPLITS = {"train": ["s3", "s1", "s2", "s0"], "val": ["s5", "s4"]}


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_scenes_in_order_and_the_manifest_lists_them(tmp_path, workers):
    report = convert(tmp_path, SPLITS, workers=workers, expected_counts={"train": 4, "val": 2})
    assert report.directory == tmp_path / "rooms"
    assert report.counts == {"train": 4, "val": 2}
    assert report.notes == ("s2: no alignment",)
    manifest = json.loads((report.directory / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["class_names"] == list(NAMES)
    assert manifest["source"] == {"kind": "made", "folder": "x"}
    for split, scenes in SPLITS.items():
        source = open_split(report.directory, split)
        assert source.class_names == NAMES
        assert [sample["name"] for sample in source] == scenes
        for sample, scene, entry in zip(source, scenes, manifest["scenes"][split], strict=True):
            made = make_scene(scene, split)
            for field in (
                "xyz",
                "instance",
                "boxes_center",
                "boxes_size",
                "boxes_yaw",
                "boxes_label",
                "vote_center",
            ):
                np.testing.assert_array_equal(sample[field], made[field])
            np.testing.assert_allclose(sample["color"], made["color"], atol=0.5 / 255 + 1e-6)
            assert entry["scene"] == scene
            assert entry["sha256"] == hash_sample(sample) == hash_sample(made)
            assert (entry["points"], entry["boxes"]) == (len(made["xyz"]), len(made["boxes_label"]))
    assert not (tmp_path / ".scenes").exists()


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first = convert(tmp_path / "a", SPLITS)
    second = convert(tmp_path / "b", SPLITS, workers=2)
    assert files_of(first.directory) == files_of(second.directory)


def test_a_sample_hash_sees_every_array():
    sample = make_scene("s2", "train")
    for field in (
        "xyz",
        "color",
        "instance",
        "boxes_center",
        "boxes_size",
        "boxes_yaw",
        "boxes_label",
        "vote_center",
    ):
        changed = {**sample, field: sample[field].copy()}
        changed[field].reshape(-1)[0] += 1
        assert hash_sample(changed) != hash_sample(sample) or field == "color"
    darker = {**sample, "color": np.zeros_like(sample["color"])}
    assert hash_sample(darker) != hash_sample(sample)


def test_an_unreadable_scene_is_named_and_the_others_are_kept(tmp_path, capsys):
    log = tmp_path / "log"
    broken = {"s1": "value", "s5": "io"}
    report = convert(tmp_path, SPLITS, functools.partial(make_scene, log=log, broken=broken))
    assert report.directory is None
    assert report.failures == (
        Failure("train", "s1", "s1.ply: is truncated"),
        Failure("val", "s5", "s5.ply: disk error"),
    )
    assert not (tmp_path / "rooms").exists()
    assert print_report(report) == 1
    assert "failed: s1 (train): s1.ply: is truncated" in capsys.readouterr().err
    log.unlink()
    report = convert(
        tmp_path, SPLITS, functools.partial(make_scene, log=log)
    )  # repaired: only these are read
    assert log.read_text().split("\n")[:-1] == ["s1 train", "s5 val"]
    assert print_report(report) == 0
    assert files_of(report.directory) == files_of(convert(tmp_path / "b", SPLITS).directory)


def test_skip_failed_leaves_scenes_out_and_says_so(tmp_path, capsys):
    broken = functools.partial(make_scene, broken=("s1",))
    report = convert(tmp_path, SPLITS, broken, skip_failed=True, expected_counts={"train": 4, "val": 2})
    assert [sample["name"] for sample in open_split(report.directory, "train")] == ["s3", "s2", "s0"]
    manifest = json.loads((report.directory / "manifest.json").read_text())
    assert manifest["complete"] is False
    assert manifest["failed"] == [{"split": "train", "scene": "s1", "reason": "s1.ply: is truncated"}]
    assert print_report(report) == 0
    assert "1 scenes were left out" in capsys.readouterr().out
    assert convert(tmp_path, SPLITS, broken, skip_failed=True).reused
    with pytest.raises(ValueError, match="made without 1 scenes"):
        convert(tmp_path, SPLITS, broken)


def test_no_dataset_is_written_when_every_scene_fails(tmp_path):
    report = convert(
        tmp_path, {"train": ["s1"]}, functools.partial(make_scene, broken=("s1",)), skip_failed=True
    )
    assert report.directory is None
    assert not (tmp_path / "rooms").exists()


def test_a_dying_worker_costs_its_own_scene_only(tmp_path, capfd):
    broken = functools.partial(make_scene, broken={"s1": "die", "s5": "bug"})
    report = convert(tmp_path, SPLITS, broken, workers=2)
    assert [failure.scene for failure in report.failures] == ["s1", "s5"]
    assert all("worker process ended" in failure.reason for failure in report.failures)
    assert report.counts == {"train": 3, "val": 1}
    assert "a bug in the reader" in capfd.readouterr().err


def test_a_killed_run_continues(tmp_path):
    log = tmp_path / "log"
    script = f"""
import functools, pathlib, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_conversion as t
t.convert(pathlib.Path({str(tmp_path)!r}), t.SPLITS, functools.partial(t.slow_scene, log={str(log)!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while not log.exists() or "s4" not in log.read_text():
                assert process.poll() is None, "the conversion ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.kill()
    kept = sorted((tmp_path / ".scenes").glob("*/*.scene"))
    assert [path.stem for path in kept] == ["s0", "s1", "s2", "s3", "s5"]
    kept[1].write_bytes(kept[1].read_bytes()[:-1])  # truncated
    damaged = bytearray(kept[2].read_bytes())
    damaged[-200] ^= 1
    kept[2].write_bytes(damaged)
    content = bytearray(kept[3].read_bytes())
    content[0] ^= 1  # the checksum itself: the archive behind it is intact
    kept[3].write_bytes(content)
    log.unlink()
    report = convert(tmp_path, SPLITS, functools.partial(make_scene, log=log))
    assert log.read_text().split("\n")[:-1] == ["s3 train", "s1 train", "s2 train", "s4 val"]
    assert files_of(report.directory) == files_of(convert(tmp_path / "b", SPLITS).directory)


def test_wrong_counts_are_an_error_unless_partial(tmp_path):
    with pytest.raises(
        ValueError, match="train has 4 scenes, not 1201; val has 2 scenes, not 312.*--allow_partial"
    ):
        convert(tmp_path, SPLITS, expected_counts={"train": 1201, "val": 312})
    assert not (tmp_path / "rooms").exists()
    report = convert(tmp_path, SPLITS, expected_counts={"train": 1201, "val": 312}, allow_partial=True)
    assert json.loads((report.directory / "manifest.json").read_text())["complete"] is False


def test_a_dataset_of_another_source_is_not_touched(tmp_path):
    folder = convert(tmp_path, SPLITS).directory
    before = files_of(folder)
    assert convert(tmp_path, SPLITS).reused
    with pytest.raises(ValueError, match="another source or version"):
        convert(tmp_path, {"train": ["s3"]})
    (folder / "manifest.json").write_text("[1")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        convert(tmp_path, SPLITS)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"without a manifest\.json"):
        convert(tmp_path, SPLITS)
    del before["manifest.json"]
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "scene", ["../x", "a/b", "a\\b", ".", "..", "", "a\n", "a" * 101, "C:x", "é", "-x", 7]
)
def test_ids_that_could_leave_the_folder_are_refused(tmp_path, scene):
    with pytest.raises(ValueError, match="is no scene id"):
        check_scene_id(scene)
    with pytest.raises(ValueError, match="is no scene id"):
        convert(tmp_path, {"train": ["s0", scene]})


def test_ids_must_match_their_pattern_and_be_unique(tmp_path):
    assert check_scene_id("scene0000_00", r"scene\d{4}_\d{2}") == "scene0000_00"
    with pytest.raises(ValueError, match="ids look like"):
        check_scene_id("scene0000_00_x", r"scene\d{4}_\d{2}")
    with pytest.raises(ValueError, match="s0 is listed twice"):
        convert(tmp_path, {"train": ["s0"], "val": ["s0"]})
    with pytest.raises(ValueError, match="no scenes to convert"):
        convert(tmp_path, {"train": []})


def spoilt_scene(scene, split, field, value):
    sample = make_scene(scene, split)
    if value is None:
        del sample[field]
        return sample
    return {**sample, field: value(sample[field])}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("xyz", None, "xyz"),
        ("xyz", lambda a: a * np.nan, "xyz holds NaN"),
        ("color", lambda a: a[:-1], "color of shape"),
        ("instance", lambda a: a + 2, "instance must lie in"),
        ("boxes_label", lambda a: a + 3, "boxes_label must lie in"),
        ("boxes_size", lambda a: a * 0, "boxes_size holds"),
        ("boxes_yaw", lambda a: a[:, None], "boxes_yaw of shape"),
    ],
)
def test_a_bad_sample_is_a_failure_of_its_scene(tmp_path, field, value, message):
    spoilt = functools.partial(spoilt_scene, field=field, value=value)
    report = convert(tmp_path, {"train": ["s2"]}, spoilt)
    assert len(report.failures) == 1
    assert message in report.failures[0].reason


def test_the_package_imports_no_jax():
    script = (
        "import sys, data_prep.conversion; print(sorted({'jax', 'flax', 'tensorflow'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
