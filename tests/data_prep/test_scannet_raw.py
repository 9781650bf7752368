import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from oracles.votenet_scannet import IDS, export_scan

from data_prep import scannet
from data_prep.scannet_raw import (
    convert_scan,
    read_annotation,
    read_axis_alignment,
    read_label_map,
    read_segments,
    read_split_list,
)
from vrdistill_jax.data.builders import open_split
from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SCANNET_NYU40_IDS

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCENE = "scene0007_01"
FILES = ("_vh_clean_2.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json", ".txt")
QUARTER_TURN = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def turned(angle, shift):
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = shift
    return np.round(matrix, 6)  # as many digits as the files have


def write_label_map(path):
    """Two raw categories for each class, among other columns."""
    lines = ["id\traw_category\tcategory\tcount\tnyu40id\tnyuClass"]
    for nyu40 in range(1, 41):
        lines += [f"{nyu40}\tthing {nyu40}{k}\tthing\t1\t{nyu40}\tx" for k in "ab"]
    path.write_text("\n".join(lines) + "\n")


def write_scan(folder, vertices, segment, groups, matrix):
    """Writes the files of a scan in the official formats; vertices f32[n, 6] with colours of 0 to 255."""
    folder.mkdir(parents=True, exist_ok=True)
    start = folder / folder.name
    header = (
        "ply\nformat binary_little_endian 1.0\ncomment VCGLIB generated\n"
        f"element vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\nproperty uchar alpha\n"
        "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    )
    body = io.BytesIO()
    for row in vertices.tolist():
        body.write(struct.pack("<fffBBBB", *row[:3], *map(int, row[3:6]), 255))
    body.write(struct.pack("<BiiiBiii", 3, 0, 1, 2, 3, 1, 2, 0))
    pathlib.Path(f"{start}_vh_clean_2.ply").write_bytes(header.encode() + body.getvalue())
    segs = {
        "params": {"kThresh": "0.0001"},
        "sceneId": folder.name,
        "segIndices": np.asarray(segment).tolist(),
    }
    pathlib.Path(f"{start}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segs))
    content = {"sceneId": f"scannet.{folder.name}", "appId": "x", "segGroups": groups, "segmentsFile": "x"}
    pathlib.Path(f"{start}.aggregation.json").write_text(json.dumps(content))
    lines = (
        ["axisAlignment = " + " ".join(f"{value:.6f}" for value in matrix.ravel()) + " "]
        if matrix is not None
        else []
    )
    pathlib.Path(f"{start}.txt").write_text(
        "\n".join([*lines, "colorHeight = 968", "sceneType = Office"]) + "\n"
    )


def group(object_id, label, segments):
    return {"id": object_id, "objectId": object_id, "segments": segments, "label": label}


def made_scan(folder, matrix=None, seed=0):
    """A scan whose objects overlap, are listed out of order, vanish, are flat, and are of many classes."""
    rng = np.random.default_rng(seed)
    segment = np.repeat(1000 + 7 * rng.permutation(30), 8)
    rng.shuffle(segment)
    vertices = np.concatenate(
        [rng.normal(size=(240, 3)) + segment[:, None] / 40, rng.integers(0, 256, (240, 3))], axis=1
    ).astype(np.float32)
    ids = sorted(set(segment.tolist()))
    vertices[segment == ids[20], 2] = 1.5  # a picture on the ceiling
    groups = [
        group(2, "thing 5a", ids[0:3]),
        group(0, "thing 7b", [*ids[3:5], ids[0]]),  # takes a segment of object 2
        group(1, "thing 1a", ids[5:7]),  # a wall, but object 6 makes a chair of its first segment
        group(5, "thing 5a", ids[7:9]),
        group(3, "thing 39a", [ids[9]]),  # loses all to object 4
        group(4, "thing 4a", [ids[9], ids[10]]),
        group(6, "thing 5b", [ids[5], ids[11]]),
        group(8, "thing 2a", ids[12:15]),  # a floor: no box
        group(7, "thing 11a", [ids[20]]),
        group(9, "thing 36b", ids[21:24]),
    ]
    write_scan(folder, vertices, segment, groups, turned(0.7, (1, -2, 0.5)) if matrix is None else matrix)
    return vertices


@pytest.fixture
def raw(tmp_path):
    write_label_map(tmp_path / "scannetv2-labels.combined.tsv")
    made_scan(tmp_path / "scans" / SCENE)
    return tmp_path


def convert(raw, scene=SCENE):
    return convert_scan(raw / "scans", read_label_map(raw / "scannetv2-labels.combined.tsv"), scene, "train")


def test_a_scan_is_what_votenet_makes_of_it(raw):
    sample = convert(raw)
    vertices, label, instance, boxes = export_scan(
        raw / "scans" / SCENE, SCENE, raw / "scannetv2-labels.combined.tsv"
    )
    np.testing.assert_allclose(sample["xyz"], vertices[:, :3], rtol=0, atol=1e-6)
    np.testing.assert_allclose(sample["color"] * 255, vertices[:, 3:], atol=1e-4)
    names = [SCANNET_CLASSES[row] for row in sample["boxes_label"]]
    assert names == ["table", "chair", "table", "bed", "chair", "chair", "picture", "bathtub"]
    np.testing.assert_allclose(sample["boxes_center"], boxes[:, :3], rtol=0, atol=2e-6)
    np.testing.assert_allclose(sample["boxes_size"], np.maximum(boxes[:, 3:6], 1e-3), rtol=0, atol=4e-6)
    assert [IDS[row] for row in sample["boxes_label"]] == boxes[:, 6].tolist()
    assert not sample["boxes_yaw"].any()
    owners = [1, 2, 3, 5, 6, 7, 8, 10]  # objectId + 1 of the boxes
    want = [owners.index(number) if number in owners else -1 for number in instance]
    np.testing.assert_array_equal(sample["instance"], want)
    np.testing.assert_allclose(sample["vote_center"], sample["boxes_center"], atol=1e-6)
    notes = " ".join(sample["notes"])
    assert "bed of object 3 has no vertices of its own" in notes
    assert "picture of object 7 is 0 m thin" in notes
    assert sample["boxes_size"].min() == np.float32(1e-3)
    assert len(sample["notes"]) == 2
    assert set(label) == {0, 2, 4, 5, 7, 1, 11, 36}


def test_class_ids_are_votenets():
    assert SCANNET_NYU40_IDS == IDS


def test_a_later_class_takes_shared_segments(raw, tmp_path):
    start = raw / "scans" / SCENE / SCENE
    segment = read_segments(pathlib.Path(f"{start}_vh_clean_2.0.010000.segs.json"), 240)
    annotation = read_annotation(
        pathlib.Path(f"{start}.aggregation.json"),
        segment,
        read_label_map(raw / "scannetv2-labels.combined.tsv"),
    )
    _, label, instance, _ = export_scan(raw / "scans" / SCENE, SCENE, raw / "scannetv2-labels.combined.tsv")
    np.testing.assert_array_equal(annotation.nyu40, label)
    np.testing.assert_array_equal(annotation.object_id + 1, instance)
    # The table takes the first segment of chair 2, which is therefore a table for VoteNet; so do chair 6 and wall 1.
    assert annotation.object_nyu40 == {0: 7, 1: 5, 2: 7, 3: 4, 4: 4, 5: 5, 6: 5, 7: 11, 8: 2, 9: 36}


def test_an_object_listed_twice_has_its_later_segments_only(tmp_path):
    groups = [
        group(1, "thing 4a", [3]),
        group(0, "thing 5a", [1]),
        group(1, "thing 5a", [2]),  # of the class of object 0, which must not take its segments over
        group(2, "thing 5a", []),
    ]
    path = tmp_path / "a.aggregation.json"
    path.write_text(json.dumps({"segGroups": groups}))
    segment = np.array([1, 2, 2, 3, 4])
    annotation = read_annotation(path, segment, {"thing 4a": 4, "thing 5a": 5})
    np.testing.assert_array_equal(annotation.object_id, [0, 1, 1, -1, -1])
    np.testing.assert_array_equal(annotation.nyu40, [5, 5, 5, 4, 0])
    assert annotation.object_nyu40 == {0: 5, 1: 5}
    assert annotation.notes == [
        "object 1 is listed again as entry 2; the later list counts",
        "object 2 (thing 5a) has no segments and was left out",
    ]


def test_without_alignment_the_scan_is_kept_as_it_lies(raw):
    path = raw / "scans" / SCENE / f"{SCENE}.txt"
    path.write_text("colorHeight = 968\n")
    sample = convert(raw)
    vertices = made_scan(raw / "scans" / "scene0000_00", np.eye(4))
    np.testing.assert_array_equal(sample["xyz"], vertices[:, :3])
    assert f"{SCENE}.txt has no axisAlignment" in sample["notes"][0]


@pytest.mark.data
def test_the_real_scene_comes_back_from_raw_files(shared, tmp_path):
    start = shared / "real/scannet/full_resolution/scene0000_02"
    read = {
        name: np.load(f"{start}_{name}.npy")
        for name in ("vert_all", "ins_label_all", "sem_label_all", "bbox")
    }
    vert, ins, sem, bbox = read.values()
    cell = np.floor(vert[:, :3] / 0.3).astype(np.int64) @ [10007, 101, 1]
    _, segment = np.unique(np.stack([ins.astype(np.int64), cell], axis=1), axis=0, return_inverse=True)
    groups = []
    for number in np.unique(ins[ins > 0]):
        mine = np.unique(segment[ins == number]).tolist()
        groups.append(group(int(number) - 1, f"thing {sem[ins == number][0]}{'ab'[number % 2]}", mine))
    order = np.random.default_rng(0).permutation(len(groups))
    write_label_map(tmp_path / "scannetv2-labels.combined.tsv")
    for matrix, tolerance in ((QUARTER_TURN, 0), (turned(0.4, (-3.1, 2.2, 0.05)), 2e-6)):
        unaligned = np.concatenate([vert[:, :3], np.ones((len(vert), 1))], axis=1) @ np.linalg.inv(matrix).T
        folder = tmp_path / "scans" / "scene0000_02"
        vertices = np.concatenate([unaligned[:, :3], vert[:, 3:]], axis=1).astype(np.float32)
        write_scan(folder, vertices, segment, [groups[i] for i in order], matrix)
        sample = convert(tmp_path, "scene0000_02")
        np.testing.assert_allclose(sample["xyz"], vert[:, :3], rtol=0, atol=tolerance)
        np.testing.assert_array_equal(np.rint(sample["color"] * 255), vert[:, 3:])
        np.testing.assert_allclose(
            sample["boxes_center"], bbox[:, :3].astype(np.float32), rtol=0, atol=tolerance
        )
        np.testing.assert_allclose(
            sample["boxes_size"], bbox[:, 3:6].astype(np.float32), rtol=0, atol=2 * tolerance
        )
        assert [IDS[row] for row in sample["boxes_label"]] == bbox[:, 6].tolist()
        owner = [number for number in np.unique(ins[ins > 0]) if sem[ins == number][0] in IDS]
        want = np.full(len(ins), -1)
        for row, number in enumerate(owner):
            want[ins == number] = row
        np.testing.assert_array_equal(sample["instance"], want)
        assert sample["notes"] == []


def spoil_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        (FILES[1], lambda c: c["segIndices"].pop(), "labels 239 vertices but the mesh has 240"),
        (FILES[1], lambda c: c.update(segIndices="x"), "segIndices is not a list of integers"),
        (FILES[1], lambda c: c["segIndices"].__setitem__(3, True), "segIndices is not a list of integers"),
        (FILES[1], lambda c: c["segIndices"].__setitem__(3, 1.5), "segIndices is not a list of integers"),
        (FILES[1], lambda c: c["segIndices"].__setitem__(3, -1), "segIndices is not a list of integers"),
        (FILES[1], lambda c: c["segIndices"].__setitem__(3, 10**30), "segIndices is not a list of integers"),
        (FILES[2], lambda c: c.pop("segGroups"), "no list segGroups"),
        (FILES[2], lambda c: c["segGroups"][1].pop("objectId"), "entry 1 of segGroups"),
        (FILES[2], lambda c: c["segGroups"][1].update(label=None), "entry 1 of segGroups"),
        (FILES[2], lambda c: c["segGroups"][1].update(label="dragon"), "object 0 is a 'dragon', which"),
        (FILES[2], lambda c: c["segGroups"][1].update(segments=[1]), "segment 1, which no vertex belongs to"),
    ],
)
def test_malformed_json_names_the_file_and_the_reason(raw, ending, change, message):
    path = raw / "scans" / SCENE / f"{SCENE}{ending}"
    spoil_json(path, change)
    with pytest.raises(ValueError, match=message) as error:
        convert(raw)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"[" * 100000, b"null"])
def test_missing_and_foreign_files_are_named(raw, ending, content):
    path = raw / "scans" / SCENE / f"{SCENE}{ending}"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="scene0007_01") as error:
        convert(raw)
    assert str(path) in str(error.value)


def test_a_mesh_with_bad_vertices_or_without_colours_is_refused(raw):
    path = raw / "scans" / SCENE / f"{SCENE}_vh_clean_2.ply"
    intact = path.read_bytes()
    start = intact.index(b"end_header\n") + len(b"end_header\n")
    path.write_bytes(intact[:start] + struct.pack("<f", np.nan) + intact[start + 4 :])
    with pytest.raises(ValueError, match="1 vertices are not finite"):
        convert(raw)
    path.write_bytes(intact.replace(b"uchar red", b"uchar rad"))
    with pytest.raises(ValueError, match="no colours"):
        convert(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axisAlignment = 1 0 0", "has 3 values, not 16"),
        ("axisAlignment = " + "x " * 16, "not made of numbers"),
        ("axisAlignment = " + "nan " * 16, "not 16 finite ones"),
        ("axisAlignment = 2 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", "no rotation with a shift"),
        ("axisAlignment = -1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", "no rotation with a shift"),
        ("axisAlignment = 1 0 0 0 0 1 0 0 0 0 1 0 0 0 1 1", "no rotation with a shift"),
    ],
)
def test_a_damaged_alignment_is_refused(tmp_path, text, message):
    path = tmp_path / "scene0000_00.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_axis_alignment(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no categories"),
        ("raw_category\tnyu40id\nwall\tx", "line 2 has raw_category 'wall' and nyu40id 'x'"),
        ("raw_category\tnyu40id\nwall\t41", "ids of 0 to 40"),
        ("raw_category\tnyu40\nwall\t1", "nyu40id None"),
        ("raw_category\tnyu40id\nwall\t1\nwall\t2", "two classes"),
    ],
)
def test_a_damaged_label_map_is_refused(tmp_path, text, message):
    path = tmp_path / "labels.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_label_map(path)


@pytest.mark.parametrize(
    "scene", ["../scene0000_00", "scene0000_00/..", "scene0000_0", "/etc/passwd", "scene0000_00\n"]
)
def test_scene_ids_cannot_leave_the_folder(raw, scene):
    with pytest.raises(ValueError, match="is no scene id"):
        convert(raw, scene)
    (raw / "list.txt").write_text(f"scene0000_01\n{scene}x\n")
    with pytest.raises(ValueError, match="is no scene id"):
        read_split_list(raw / "list.txt")


def corrupted(data, rng):
    """Truncates, flips bits, cuts out, repeats or overwrites a part."""
    data = bytearray(data)
    match int(rng.integers(5)):
        case 0:
            return bytes(data[: rng.integers(len(data))])
        case 1:
            for _ in range(int(rng.integers(1, 4))):
                data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        case 2:
            start = int(rng.integers(len(data)))
            del data[start : start + int(rng.integers(1, 50))]
        case 3:
            start = int(rng.integers(len(data)))
            data[start:start] = data[start : start + int(rng.integers(1, 50))]
        case 4:
            data[: min(len(data), 400)][int(rng.integers(min(len(data), 400)))] = 0
            data[int(rng.integers(min(len(data), 400)))] = int(rng.integers(256))
    return bytes(data)


def retyped(content, rng):
    """Replaces one random value inside parsed JSON by one of another kind."""
    strange = [None, True, -1, 2**63, 10**40, 1.5, float("nan"), "x", "", [], {}, [[]], "../../x", [1, "a"]]
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[int(rng.integers(len(keys)))]
        child = node[key]
        if isinstance(child, list | dict) and len(child) and rng.random() < 0.8:
            node = child
            continue
        node[key] = strange[int(rng.integers(len(strange)))]
        return content


def attempt(function, *arguments):
    """Gives (message, None) of a ValueError, or (None, result); anything else is raised."""
    try:
        return None, function(*arguments)
    except ValueError as error:
        return str(error), None


def test_damaged_files_give_a_value_error_that_names_them(raw):
    rng = np.random.default_rng(0)
    folder = raw / "scans" / SCENE
    tsv = raw / "scannetv2-labels.combined.tsv"
    paths = [*(folder / f"{SCENE}{ending}" for ending in FILES), tsv]
    intact = {path: path.read_bytes() for path in paths}
    refused = 0
    began = time.monotonic()
    tracemalloc.start()
    for case in range(200):
        path = paths[int(rng.integers(len(paths)))]
        if path.suffix == ".json" and rng.random() < 0.6:
            path.write_text(json.dumps(retyped(json.loads(intact[path]), rng)))
        else:
            path.write_bytes(corrupted(intact[path], rng))
        problem, sample = attempt(convert, raw)
        if problem is not None:
            refused += 1
            assert problem.split(": ")[0] in map(str, paths), f"case {case}: {problem}"
        else:
            assert np.isfinite(sample["xyz"]).all()
            assert len(sample["xyz"]) == len(sample["instance"])
            assert sample["instance"].max() < len(sample["boxes_label"])
        path.write_bytes(intact[path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 80
    assert peak < 8 << 20
    assert time.monotonic() - began < 60


def run_verb(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "data_prep.scannet", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_verb_converts_a_download(raw):
    for scene in ("scene0000_00", "scene0000_01"):
        made_scan(raw / "scans" / scene, seed=int(scene[-1]) + 5)
    (raw / "tasks").mkdir()
    (raw / "tasks" / "scannetv2_train.txt").write_text(f"{SCENE}\nscene0000_00\nscene0404_00\n")
    (raw / "tasks" / "scannetv2_val.txt").write_text("scene0000_01\n")
    broken = raw / "scans" / "scene0000_00" / "scene0000_00.aggregation.json"
    intact = broken.read_bytes()
    broken.write_bytes(intact[:-9])
    arguments = (f"--raw={raw}", f"--output={raw / 'out'}", "--allow_partial", "--workers=2")
    failed = run_verb(*arguments)
    assert failed.returncode == 1, failed.stderr
    assert "failed: scene0000_00 (train): " in failed.stderr
    assert "aggregation.json: is not intact JSON" in failed.stderr
    broken.write_bytes(intact)
    done = run_verb(*arguments)
    assert done.returncode == 0, done.stderr
    assert "2 train, 1 val scenes" in done.stdout
    train = open_split(raw / "out" / "scannet", "train")
    assert train.class_names == SCANNET_CLASSES
    assert [sample["name"] for sample in train] == [SCENE, "scene0000_00"]
    np.testing.assert_array_equal(train[0]["xyz"], convert(raw)["xyz"])
    manifest = json.loads((raw / "out" / "scannet" / "manifest.json").read_text())
    assert manifest["source"]["kind"] == "scannet_raw"
    assert manifest["complete"] is False
    assert manifest["expected_counts"] == {"train": 1201, "val": 312}
    assert manifest["command"].endswith("--allow_partial --workers=2")


def test_the_verb_says_what_is_missing(raw, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"scannetv2_train.txt, is not in .*github.com/ScanNet"):
        scannet.convert_raw(raw, output=out)
    lists = raw / "lists"
    lists.mkdir()
    (lists / "scannetv2_train.txt").write_text(f"{SCENE}\nscene0404_00\n")
    (lists / "scannetv2_val.txt").write_text("scene0405_00\n")
    with pytest.raises(ValueError, match=r"2 of the 3 listed scenes are not in .*scene0404_00, scene0405_00"):
        scannet.convert_raw(raw, str(lists), output=out)
    (lists / "scannetv2_train.txt").write_text(f"{SCENE}\n")
    made_scan(raw / "scans" / "scene0405_00")
    with pytest.raises(ValueError, match="train has 1 scenes, not 1201; val has 1 scenes, not 312"):
        scannet.convert_raw(raw, str(lists), output=out)
    (raw / "scannetv2-labels.combined.tsv").unlink()
    with pytest.raises(ValueError, match="labels.combined.tsv is not in"):
        scannet.convert_raw(raw, str(lists), output=out)
    with pytest.raises(ValueError, match="--raw=.*nowhere is no folder"):
        scannet.convert_raw(str(raw / "nowhere"), output=out)
    assert not (tmp_path / "out").exists()


def test_the_verb_wants_one_source():
    for arguments in ((), ("--raw=a", "--prepared=b")):
        done = run_verb(*arguments)
        assert done.returncode == 2
        assert "one of --raw, --prepared and --mmdet3d" in done.stderr
