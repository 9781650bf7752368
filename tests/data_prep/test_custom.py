import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from data_prep.annotations import AnnotationError, read_annotation
from data_prep.custom import find_scans, prepare_custom, split_scans, summarize_boxes
from data_prep.own_scans import read_scan
from vrdistill_jax.data.builders import open_split
from vrdistill_jax.data.sources import open_source

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"chair": (0.5, 0.6, 0.9), "lamp": (0.3, 0.3, 1.4), "sofa": (0.9, 1.9, 0.8)}


def make_room(seed, yaw=0.0):
    """A floor, two walls and one box of each kind: cloud f32[n, 6] (colours 0..255) and annotation."""
    rng = np.random.default_rng(seed)
    floor = np.column_stack([rng.uniform(0, 5, (2500, 2)), rng.normal(0, 0.005, 2500)])
    walls = [
        np.column_stack([rng.uniform(0, 5, 700), np.full(700, y), rng.uniform(0, 2.4, 700)])
        for y in (0.0, 5.0)
    ]
    parts, boxes = [floor, *walls], []
    for row, (label, size) in enumerate(SIZES.items()):
        size = np.array(size) * rng.uniform(0.9, 1.1, 3)
        center = np.array([1 + 1.5 * row, rng.uniform(1.2, 3.8), size[2] / 2])
        turn = yaw * (row + 1)
        local = rng.uniform(-0.5, 0.5, (300, 3))
        local[np.arange(300), rng.integers(0, 3, 300)] = rng.choice([-0.49, 0.49], 300)
        local = local * size
        c, s = np.cos(turn), np.sin(turn)
        turned = np.column_stack(
            [c * local[:, 0] - s * local[:, 1], s * local[:, 0] + c * local[:, 1], local[:, 2]]
        )
        parts.append(center + turned)
        box = {"label": label, "center": center.round(4).tolist(), "size": size.round(4).tolist()}
        boxes.append({**box, "yaw": turn} if yaw else box)
    xyz = np.concatenate(parts)
    return np.column_stack([xyz, rng.integers(0, 256, xyz.shape)]).astype(np.float32), {"boxes": boxes}


def write_ply(path, cloud):
    kinds = [
        ("x", "float"),
        ("y", "float"),
        ("z", "float"),
        ("red", "uchar"),
        ("green", "uchar"),
        ("blue", "uchar"),
    ]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(cloud)}"]
    head += [f"property {kind} {name}" for name, kind in kinds] + ["end_header", ""]
    table = np.zeros(len(cloud), [(name, "<f4" if kind == "float" else "u1") for name, kind in kinds])
    for i, (name, _) in enumerate(kinds):
        table[name] = cloud[:, i]
    path.write_bytes("\n".join(head).encode() + table.tobytes())


def write_rooms(folder, count=4, yaw=0.0, names=None):
    folder.mkdir(parents=True)
    for row in range(count):
        cloud, annotation = make_room(row, yaw)
        name = names[row] if names else f"room_{row}"
        if row % 2:
            np.save(folder / f"{name}.npy", cloud)
        else:
            write_ply(folder / f"{name}.ply", cloud)
        (folder / f"{name}.json").write_text(json.dumps(annotation))
    return folder


def prepare(source, output, **options):
    return prepare_custom(source, output, workers=0, progress=False, **options)


def test_a_folder_becomes_a_dataset_with_its_own_classes(tmp_path):
    source = write_rooms(tmp_path / "scans")
    report = prepare(source, tmp_path / "out/rooms", val_fraction=0.25)
    assert report.directory == tmp_path / "out/rooms"
    assert report.counts == {"train": 3, "val": 1}
    train, val = (open_split(report.directory, split) for split in ("train", "val"))
    assert train.class_names == ("chair", "lamp", "sofa")
    seen = {}
    for sample in [*(train[i] for i in range(3)), val[0]]:
        row = int(sample["name"].removeprefix("room_"))
        cloud, annotation = make_room(row)
        np.testing.assert_allclose(sample["xyz"], cloud[:, :3], atol=1e-6)
        np.testing.assert_allclose(sample["color"], cloud[:, 3:] / 255, atol=1e-6)
        for i, box in enumerate(annotation["boxes"]):
            np.testing.assert_allclose(sample["boxes_center"][i], box["center"], atol=1e-6)
            np.testing.assert_allclose(sample["boxes_size"][i], box["size"], atol=1e-6)
            assert train.class_names[sample["boxes_label"][i]] == box["label"]
            half = np.array(box["size"]) / 2
            inside = (np.abs(cloud[:, :3] - box["center"]) <= half).all(1)
            assert inside.sum() >= 250
            np.testing.assert_array_equal(sample["instance"] == i, inside)
        seen[sample["name"]] = annotation
    assert len(seen) == 4

    summary = json.loads((report.directory / "mean_sizes.json").read_text())
    assert summary["class_names"] == ["chair", "lamp", "sofa"]
    assert summary["oriented"] is False
    chosen = [seen[train[i]["name"]]["boxes"] for i in range(3)]
    expected = np.mean([[box["size"] for box in boxes] for boxes in chosen], axis=0)
    np.testing.assert_allclose(summary["mean_sizes"], expected, atol=1e-5)
    assert summary["scenes"] == {"train": 3, "val": 1}
    assert summary["boxes"]["val"] == {"chair": 1, "lamp": 1, "sofa": 1}


def test_the_same_command_again_changes_nothing_and_other_data_is_refused(tmp_path):
    source = write_rooms(tmp_path / "scans", 2)
    prepare(source, tmp_path / "out")
    assert prepare(source, tmp_path / "out").reused
    path = source / "room_0.json"
    content = json.loads(path.read_text())
    content["boxes"][0]["center"][0] += 0.01
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another source"):
        prepare(source, tmp_path / "out")


def load_config(name, argument):
    spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def test_turned_boxes_make_an_oriented_dataset_and_config(tmp_path):
    source = write_rooms(tmp_path / "scans", 3, yaw=0.4)
    report = prepare(source, tmp_path / "turned")
    config = load_config("custom", str(report.directory))
    assert (config.detector.num_heading_bins, config.dataset.oriented) == (12, True)
    assert not config.dataset.augment.refit_boxes
    sample = open_source(config.dataset, "train")[0]
    np.testing.assert_allclose(sample["boxes_yaw"], [0.4, 0.8, 1.2], atol=1e-6)
    for row in range(3):
        assert 295 <= (sample["instance"] == row).sum() <= 450
    plain = prepare(write_rooms(tmp_path / "more", 2), tmp_path / "plain")
    config = load_config("custom", str(plain.directory))
    assert (config.detector.num_heading_bins, config.dataset.oriented) == (1, False)
    assert config.dataset.augment.refit_boxes
    assert config.detector.class_names == ("chair", "lamp", "sofa")
    with pytest.raises(ValueError, match=r"data_prep\.custom"):
        load_config("custom", str(tmp_path / "nowhere"))


def test_units_scale_scans_boxes_and_mean_sizes(tmp_path):
    source = write_rooms(tmp_path / "scans", 2)
    for path in source.iterdir():
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            for box in content["boxes"]:
                box["center"] = [1000 * v for v in box["center"]]
                box["size"] = [1000 * v for v in box["size"]]
            path.write_text(json.dumps(content))
        else:
            cloud, _ = make_room(int(path.stem[-1]))
            cloud[:, :3] *= 1000
            path.unlink()
            np.save(path.with_suffix(".npy"), cloud)
    report = prepare(source, tmp_path / "mm", unit="mm")
    assert not any("does not look like metres" in note for note in report.notes)
    sample = open_split(report.directory, "train")[0]
    cloud, annotation = make_room(int(sample["name"][-1]))
    np.testing.assert_allclose(sample["xyz"], cloud[:, :3], atol=1e-5)
    np.testing.assert_allclose(sample["boxes_size"], [b["size"] for b in annotation["boxes"]], atol=1e-5)
    assert json.loads((report.directory / "mean_sizes.json").read_text())["mean_sizes"][2][1] < 3
    wrong = prepare(source, tmp_path / "m")
    assert sum("does not look like metres" in note for note in wrong.notes) == 2


def test_points_of_instances_come_from_list_or_file_and_follow_removed_points(tmp_path):
    source = write_rooms(tmp_path / "scans", 2)
    cloud, annotation = make_room(1)
    rows = np.full(len(cloud), -1)
    rows[100:200], rows[300:350] = 2, 0
    cloud[::7, 0] = np.nan
    np.save(source / "room_1.npy", cloud)
    keep = np.isfinite(cloud[:, 0])
    path = source / "room_1.json"
    np.save(source / "room_1_instance.npy", rows.astype(np.int16))
    for instance in (rows.tolist(), "room_1_instance.npy"):
        path.write_text(json.dumps({**annotation, "instance": instance}))
        sample = read_scan(source / "room_1.npy", ["chair", "lamp", "sofa"])
        np.testing.assert_array_equal(sample["instance"], rows[keep])
        np.testing.assert_allclose(sample["xyz"], cloud[keep, :3])
        mine = cloud[keep][rows[keep] == 2, :3]
        np.testing.assert_allclose(sample["vote_center"][2], (mine.min(0) + mine.max(0)) / 2, atol=1e-6)
        assert any("removed" in note for note in sample["notes"])
    assert set(find_scans(source)) == {"room_0", "room_1"}  # the instance file is no scan
    for bad, reason in (
        (rows[:-1].tolist(), "points"),
        ((rows + 3).tolist(), "rows of 3 boxes"),
        ("../room.npy", "instance"),
        ("missing.npy", "missing"),
        (["a"], "instance"),
    ):
        path.write_text(json.dumps({**annotation, "instance": bad}))
        with pytest.raises(ValueError, match=f"room_1.json.*{reason}"):
            read_scan(source / "room_1.npy", ["chair", "lamp", "sofa"])


def test_the_smallest_box_gets_the_point(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    cloud = np.random.default_rng(0).uniform(0, 2, (500, 3)).astype(np.float32)
    np.save(folder / "a.npy", cloud)
    boxes = [{"label": "x", "center": [1, 1, 1], "size": [s, s, s]} for s in (0.8, 2.0, 1.4)]
    (folder / "a.json").write_text(json.dumps({"boxes": boxes}))
    sample = read_scan(folder / "a.npy", ["x"])
    reach = np.abs(cloud - 1).max(1)
    np.testing.assert_array_equal(
        sample["instance"], np.select([reach <= 0.4, reach <= 0.7, reach <= 1], [0, 2, 1], -1)
    )


def test_one_bad_scan_is_named_and_can_be_left_out(tmp_path):
    source = write_rooms(tmp_path / "scans", 4)
    (source / "room_2.json").write_text('{"boxes": [{"label": "chair", "center": [0, 0]}]}')
    (source / "room_3.npy").write_bytes(b"\x93NUMPY nothing")
    report = prepare(source, tmp_path / "out")
    assert report.directory is None
    assert {failure.scene for failure in report.failures} == {"room_2", "room_3"}
    assert all(f"{failure.scene}." in failure.reason for failure in report.failures)
    split = tmp_path / "split.json"
    split.write_text('{"train": ["room_0", "room_2"], "val": ["room_1", "room_3"]}')
    report = prepare(source, tmp_path / "out", skip_failed=True, split_file=split)
    assert report.counts == {"train": 1, "val": 1}
    summary = json.loads((report.directory / "mean_sizes.json").read_text())
    np.testing.assert_allclose(summary["mean_sizes"][0], make_room(0)[1]["boxes"][0]["size"], atol=1e-5)


def test_splits_are_stable_complete_and_from_a_file(tmp_path):
    names = [f"s{i}" for i in range(50)]
    splits = split_scans(names, 0.2)
    assert sorted(splits["train"] + splits["val"]) == sorted(names)
    assert len(splits["val"]) == 10
    more = split_scans([*names, "another"], 0.2)
    assert len(set(more["val"]) ^ set(splits["val"])) <= 2
    assert len(split_scans(["a", "b"], 0.0)["val"]) == 1
    with pytest.raises(ValueError, match="at least 2"):
        split_scans(["a"])
    path = tmp_path / "split.json"
    path.write_text('{"train": ["s1", "s0"], "val": ["s2"]}')
    assert split_scans(names, split_file=path) == {"train": ["s0", "s1"], "val": ["s2"]}
    for bad, reason in (
        ('{"train": ["s1"], "val": ["nowhere"]}', "nowhere"),
        ('{"train": ["s1"], "val": ["s1"]}', "twice"),
        ('{"train": ["s1"], "val": []}', "empty"),
        ('{"train": [1], "val": []}', "form"),
        ("[1]", "form"),
        ("{", "form"),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=f"split.json.*{reason}"):
            split_scans(names, split_file=path)


def test_folders_that_are_wrong_are_explained(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        find_scans(tmp_path / "none")
    with pytest.raises(ValueError, match="no scan"):
        find_scans(tmp_path)
    source = write_rooms(tmp_path / "scans", 2)
    (source / "extra.json").write_text('{"boxes": []}')
    with pytest.raises(ValueError, match=r"extra\.json"):
        find_scans(source)
    (source / "extra.json").unlink()
    np.save(source / "room_0.npy", make_room(0)[0])
    with pytest.raises(ValueError, match="both called room_0"):
        find_scans(source)
    (source / "room_0.npy").unlink()
    (source / "room_1.json").unlink()
    report = prepare(source, tmp_path / "out")
    assert "room_1.json" in report.failures[0].reason
    assert "missing" in report.failures[0].reason


def test_names_of_files_may_be_anything(tmp_path):
    source = write_rooms(tmp_path / "scans", 2, names=["Küche (1)", ".. b"])
    report = prepare(source, tmp_path / "out")
    found = {open_split(report.directory, split)[0]["name"] for split in ("train", "val")}
    assert found == {"K_che__1_", "b"}


def test_classes_may_be_given_and_must_suffice(tmp_path):
    source = write_rooms(tmp_path / "scans", 2)
    report = prepare(source, tmp_path / "out", class_names=["sofa", "bed", "chair", "lamp"])
    sample = open_split(report.directory, "val")[0]
    assert sample["boxes_label"].tolist() == [2, 3, 0]
    assert any("'bed' has no box" in note for note in report.notes)
    report = prepare(source, tmp_path / "few", class_names=["sofa", "chair"])
    assert "'lamp' is not among the classes" in report.failures[0].reason


def test_a_class_only_in_val_takes_its_mean_size_from_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"boxes": [{"label": "a", "center": [0, 0, 0], "size": [1, 2, 3]}]}))
    first = read_annotation(path)
    second = first._replace(labels=("b",), size=first.size * 2, yaw=np.array([0.5]))
    summary, notes = summarize_boxes({"train": [first], "val": [second]}, ["a", "b"])
    assert summary["mean_sizes"] == [[1, 2, 3], [2, 4, 6]]
    assert summary["oriented"]
    assert "'b'" in notes[0]


GOOD = {"label": "chair", "center": [1, 2, 0.5], "size": [0.5, 0.5, 1], "yaw": 0.25}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no JSON"),
        ("[]", "boxes"),
        ("[" * 100_000, "JSON"),
        ('{"boxes": {}}', "boxes"),
        ({"boxes": [], "box": 1}, "unknown field 'box'"),
        ({"boxes": [3]}, r"boxes\[0\]"),
        ({"boxes": [GOOD, {**GOOD, "label": 3}]}, r"boxes\[1\].label"),
        ({"boxes": [{**GOOD, "label": "  "}]}, "label"),
        ({"boxes": [{**GOOD, "center": [1, 2]}]}, "center"),
        ({"boxes": [{**GOOD, "center": [1, 2, True]}]}, "center"),
        ({"boxes": [{**GOOD, "size": [1, 2, 0]}]}, "size"),
        ({"boxes": [{**GOOD, "size": "big"}]}, "size"),
        ({"boxes": [{**GOOD, "yaw": 90}]}, "radians"),
        ({"boxes": [{**GOOD, "yaw": None}]}, "yaw"),
        ({"boxes": [{**GOOD, "heading": 1}]}, "unknown field 'heading'"),
        ('{"boxes": [{"label": "a", "center": [NaN, 0, 0], "size": [1, 1, 1]}]}', "NaN"),
        ('{"boxes": [{"label": "a", "center": [1e999, 0, 0], "size": [1, 1, 1]}]}', "center"),
        ('{"boxes": [{"label": "a", "center": [%s, 0, 0], "size": [1, 1, 1]}]}' % ("9" * 5000), "JSON"),
    ],
)
def test_annotations_are_checked(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(AnnotationError, match=f"{re.escape(str(path))}.*{reason}"):
        read_annotation(path)


def test_a_yaw_is_wrapped(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"boxes": [{**GOOD, "yaw": 2 * np.pi - 0.5}, {**GOOD, "yaw": -0.5}]}))
    np.testing.assert_allclose(read_annotation(path).yaw, [-0.5, -0.5], atol=1e-12)


def problem_of(read, *arguments):
    try:
        read(*arguments)
    except ValueError as error:
        return str(error)
    return None


def test_damaged_annotations_give_one_clear_error(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.json"
    good = json.dumps({"boxes": [GOOD, GOOD], "instance": [0, 1, -1]})
    tokens = ["{", "]", '"', "null", "true", "-1e400", "[[", ":", ",", "\x00", "é", "NaN", "9" * 30]
    refused = 0
    for _ in range(120):
        at, length = rng.integers(0, len(good)), rng.integers(0, 12)
        path.write_text(good[:at] + tokens[rng.integers(len(tokens))] + good[at + length :])
        problem = problem_of(read_annotation, path)
        assert problem is None or str(path) in problem
        refused += problem is not None
    assert refused > 90


def guide_commands():
    text = (ROOT / "docs/custom_dataset.md").read_text()
    return re.search(r"```bash\n(.*?)```", text, re.S).group(1).strip().splitlines()


def test_the_guide_works_as_written(tmp_path):
    """Runs the page's commands, with a smaller network and 2 steps, on four made-up rooms."""
    write_rooms(tmp_path / "my_scans", 4, yaw=0.3, names=["kitchen", "office", "hall", "attic"])
    small = ["train.num_steps=2", "train.batch_size=2", "train.eval_batch_size=1", "train.log_every=1"]
    small += ["dataset.num_points=512", "detector.width=0.25", "detector.num_proposals=16"]
    small += ["detector.levels=((64,0.4,8),(32,0.6,8),(16,0.8,8),(8,1.2,8))"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VRDISTILL_CACHE": str(tmp_path / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    commands = guide_commands()
    assert [re.search(r"-m (\S+)", line).group(1).split(".")[-1] for line in commands] == [
        *("custom", "verify", "train", "predict")
    ]
    os.symlink(ROOT / "configs", tmp_path / "configs")
    for line in commands:
        words = line.split()
        assert words[0] == "python"
        if "vrdistill_jax.train" in words:
            words += [f"--config.{setting}" for setting in small]
        if "vrdistill_jax.predict" in words:
            words += ["--min_score=0.0"]
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "pages/index.html").is_file()
    assert (tmp_path / "runs/my_rooms/report.txt").read_text()
    assert (tmp_path / "predictions/kitchen/detections.json").is_file()


def test_the_verb_says_what_is_wrong():
    command = [sys.executable, "-m", "data_prep.custom", "--input=/nowhere/at/all", "--output=/tmp/x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: /nowhere/at/all is no folder")


def test_data_prep_imports_no_jax():
    code = (
        "import sys; import data_prep.custom, data_prep.verify, data_prep.mmdet3d; "
        "assert not {'jax', 'flax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
