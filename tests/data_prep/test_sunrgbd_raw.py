"""SUN RGB-D's published files and VoteNet's Matlab extraction of them, from single values to the whole verb."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
from oracles.sunrgbd_raw import INTRINSICS, PublishedTree, encode, slow_points, tilt_down
from PIL import Image

from data_prep.sunrgbd import convert_prepared, convert_raw, convert_trainval
from data_prep.sunrgbd_annotations import Annotation, boxes_from_annotations, read_label_file
from data_prep.sunrgbd_metadata import Frame, read_frames, read_split, relative_path
from data_prep.sunrgbd_raw import (
    points_from_depth,
    read_color_image,
    read_depth_image,
    read_frame_folder,
    tilt_from_extrinsics,
)
from data_prep.sunrgbd_trainval import list_scenes
from vrdistill_jax.data.builders import open_split
from vrdistill_jax.data.class_tables import SUNRGBD_CLASSES
from vrdistill_jax.data.samples import vote_slots

ROOT = pathlib.Path(__file__).resolve().parents[2]
V1_FILE = "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat"
V2_FILE = "SUNRGBDMeta3DBB_v2.mat"
FLAT_FILE = "SUNRGBDMeta2DBB_v2.mat"
SPLIT_FILE = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"


def read_v1(tree, **options):
    return read_frames(tree.root / V2_FILE, labels_v1_path=tree.root / V1_FILE, **options)


def read_v2(tree, **options):
    return read_frames(tree.root / V2_FILE, boxes2d_path=tree.root / FLAT_FILE, **options)


def names_of(frame):
    return [SUNRGBD_CLASSES[row] for row in frame.boxes.label]


# ---------------------------------------------------------------- points


def test_points_of_a_hand_made_depth_image():
    # 2 x 3 pixels: 1 m, nothing, 2 m / 8.191 m (clipped to 8), code 1 (8192 mm, clipped), 0.5 m
    encoded = np.array([[8000, 0, 16000], [8191 * 8, 1, 4000]], np.uint16)
    intrinsics = np.array([[10.0, 0, 2.0], [0, 20.0, 1.0], [0, 0, 1]])
    xyz, pixel = points_from_depth(encoded, intrinsics, np.eye(3))
    want = [
        [-0.1, 1.0, 0.0],  # u = 1, v = 1: counted from 1
        [-0.8, 8.0, -0.4],  # u = 1, v = 2: below the first, so z falls
        [0.0, 8.0, -0.4],  # u = 2, v = 2
        [0.2, 2.0, 0.0],  # u = 3, v = 1
        [0.05, 0.5, -0.025],
    ]
    np.testing.assert_allclose(xyz, want, atol=1e-6)
    assert pixel.tolist() == [0, 3, 4, 2, 5]
    assert xyz.dtype == np.float32


@pytest.mark.parametrize("seed", range(5))
def test_points_equal_the_pixel_by_pixel_ones(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 30, 2))
    encoded = rng.integers(0, 65536, shape).astype(np.uint16) * (rng.random(shape) < 0.7)
    encoded[rng.random(shape) < 0.3] = encode(rng.integers(1, 9000))
    tilt = tilt_down(rng.uniform(-40, 40))
    xyz, pixel = points_from_depth(encoded.astype(np.uint16), INTRINSICS, tilt)
    want, pixels = slow_points(encoded, INTRINSICS, tilt)
    np.testing.assert_allclose(xyz, want, atol=2e-5)
    assert [(p // shape[1], p % shape[1]) for p in pixel] == pixels


def test_tilt_of_an_extrinsics_file_is_the_rotation_between_upright_frames():
    # Looking down: in camera axes (y down, z forward), straight ahead gets a part along +y.
    c, s = np.cos(0.3), np.sin(0.3)
    camera = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    np.testing.assert_allclose(camera @ [0, 0, 1], [0, s, c])
    np.testing.assert_allclose(tilt_from_extrinsics(camera) @ [0, 1, 0], [0, c, -s], atol=1e-12)
    turned = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ camera  # then about the vertical
    np.testing.assert_allclose(tilt_from_extrinsics(turned) @ [1, 0, 0], [c, -s, 0], atol=1e-12)


def test_a_frame_folder_is_read_by_its_own_text_files(tmp_path):
    tree = PublishedTree(tmp_path, train=1, val=0)
    folder = tree.depth_path(1).parents[1]
    (folder / "intrinsics.txt").write_text(" ".join(map(str, INTRINSICS.ravel())))
    (folder / "extrinsics").mkdir()
    to_camera = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    rotation = to_camera @ tree.tilts[0] @ to_camera.T
    np.savetxt(folder / "extrinsics" / "2.txt", np.hstack([rotation, np.zeros((3, 1))]), fmt="%.9f")
    np.savetxt(folder / "extrinsics" / "1.txt", np.eye(3, 4))
    xyz, color = read_frame_folder(folder)
    want, pixels = slow_points(tree.depths[0], INTRINSICS, tree.tilts[0])
    np.testing.assert_allclose(xyz, want, atol=2e-5)
    want_color = np.array([tree.colors[0][row, column] for row, column in pixels]) / 255
    assert np.abs(color - want_color).mean() < 0.03  # JPEG
    (folder / "intrinsics.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"intrinsics\.txt holds 3 values, expected 9"):
        read_frame_folder(folder)


def test_images_of_other_kinds_are_refused(tmp_path):
    depth = np.arange(6, dtype=np.uint16).reshape(2, 3) * 9999
    Image.fromarray(depth).save(tmp_path / "d.png")
    np.testing.assert_array_equal(read_depth_image(tmp_path / "d.png"), depth)
    Image.fromarray(depth.astype(np.uint8)).save(tmp_path / "grey8.png")
    with pytest.raises(ValueError, match=r"grey8\.png is no 16-bit"):
        read_depth_image(tmp_path / "grey8.png")
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "c.jpg")
    assert read_color_image(tmp_path / "c.jpg").shape == (2, 3, 3)
    with pytest.raises(ValueError, match=r"c\.jpg is no PNG image"):
        read_depth_image(tmp_path / "c.jpg")
    with pytest.raises(ValueError, match=r"none\.png cannot be read \(No such file"):
        read_depth_image(tmp_path / "none.png")
    data = bytearray((tmp_path / "d.png").read_bytes())
    (tmp_path / "cut.png").write_bytes(data[:-20])
    data[data.index(b"IDAT") + 8] ^= 1
    (tmp_path / "flipped.png").write_bytes(data)
    for name in ("cut", "flipped"):
        with pytest.raises(ValueError, match=rf"{name}\.png cannot be read as an image"):
            read_depth_image(tmp_path / f"{name}.png")


# ---------------------------------------------------------------- boxes


def test_box_of_an_annotation():
    # half width 0.3, half length 1.0, half height 0.5; the front points along +y
    found = boxes_from_annotations([Annotation("bed", [1, 2, 3], [-0.3, 1.0, -0.5], [0.0, 2.0, 0.0])])
    np.testing.assert_allclose(found.boxes, [[1, 2, 3, 2.0, 0.6, 1.0, np.pi / 2]], rtol=1e-6)
    assert found.label.tolist() == [0]
    assert found.notes == ()


def test_unusable_boxes_are_named_and_other_classes_counted():
    found = boxes_from_annotations(
        [
            Annotation("lamp", None, None, None),
            Annotation("chair", [0, 0, np.nan], [1, 1, 1], [1, 0]),
            Annotation("chair", [0, 0, 0], [1, 0, 1], [1, 0]),
            Annotation("lamp", [0, 0, 0], [1, 1, 1], [1, 0]),
            Annotation("toilet", [0, 0, 0], [1, 1, 1], [0, 0]),
            Annotation("toilet", [0, 0], [1, 1, 1], [0, 1]),
            Annotation("bathtub", [0, 0, 0], [1, 1, 1], [-1, 0.0]),
        ]
    )
    assert found.label.tolist() == [3, 9]
    np.testing.assert_allclose(found.boxes[0, 3:6], [1e-3, 2, 2])
    assert found.boxes[1, 6] == pytest.approx(-np.pi)  # pi wraps to the other end of [-pi, pi)
    assert dict(found.other_classes) == {"lamp": 2}
    text = " | ".join(found.notes)
    for words in (
        "object 2 (chair)",
        "object 3 (chair) is flat",
        "orientation is (0, 0)",
        "centroid has 2 values",
    ):
        assert words in text


def test_label_files(tmp_path):
    path = tmp_path / "000001.txt"
    path.write_text("coffee table 1 2 3 4 0.5 1 -1 0.2 0.4 0.6 0 1\n\nbed 1 2 3 4 1 2 3 .1 .2 .3 -1 0\n")
    table, bed = read_label_file(path)
    assert table == Annotation("coffee table", [0.5, 1, -1], [0.2, 0.4, 0.6], [0, 1])
    assert bed.name == "bed"
    for line, reason in (("bed 1 2 3", "line 2: could not convert"), ("0 " * 12, "line 2 has 12 words")):
        path.write_text(f"bed 1 2 3 4 1 2 3 .1 .2 .3 -1 0\n{line}\n")
        with pytest.raises(ValueError, match=rf"000001\.txt.*{reason}"):
            read_label_file(path)


# ---------------------------------------------------------------- metadata


def test_frames_and_both_label_versions(tmp_path):
    tree = PublishedTree(tmp_path)
    v1, v2 = read_v1(tree), read_v2(tree)
    assert [names_of(frame) for frame in v1] == [["chair"], ["chair"], ["chair", "bed"], []]
    assert [frame.boxes.other_classes["lamp"] for frame in v2] == [0, 1, 1, 0]
    np.testing.assert_allclose(v2[2].boxes.boxes[1], [0, 3, -1, 1.5, 2.0, 1.0, -np.pi / 2], rtol=1e-6)
    np.testing.assert_allclose(v1[2].boxes.boxes[:, :3], v2[2].boxes.boxes[:, :3] + 0.25, rtol=1e-5)
    np.testing.assert_array_equal(v1[1].tilt, tree.tilts[1])
    np.testing.assert_array_equal(v1[1].intrinsics, INTRINSICS)
    assert v1[0].depth_path == "SUNRGBD/kv2/kinect2data/000001_scan-resize/depth_bfx/d.png"
    assert read_split(tmp_path / SPLIT_FILE) == {
        frame.folder: "val" if row < 2 else "train" for row, frame in enumerate(v1)
    }


def test_one_frame_and_one_box_are_squeezed_the_same(tmp_path):
    tree = PublishedTree(tmp_path, train=1, val=0)
    (frame,) = read_v1(tree)
    assert names_of(frame) == ["chair"]
    assert list(read_split(tmp_path / SPLIT_FILE).values()) == ["train"]


def test_version_1_labels_are_found_by_folder_where_the_order_differs(tmp_path):
    tree = PublishedTree(tmp_path)
    want = read_v1(tree)
    entries, split = list(tree.entries), scipy.io.loadmat(tmp_path / V1_FILE)
    split["SUNRGBDMeta"] = split["SUNRGBDMeta"][:, [1, 0, 3, 2]]
    scipy.io.savemat(tmp_path / V1_FILE, {"SUNRGBDMeta": split["SUNRGBDMeta"]})
    got = read_v1(tree)
    assert len(entries) == len(got)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a.boxes.boxes, b.boxes.boxes)
    scipy.io.savemat(tmp_path / V1_FILE, {"SUNRGBDMeta": split["SUNRGBDMeta"][:, :3]})
    assert "have no frame SUNRGBD/kv2/kinect2data/000003" in read_v1(tree)[2]


def test_boxes_after_one_without_a_2d_box_are_lost_as_in_the_extraction(tmp_path):
    tree = PublishedTree(tmp_path)
    tree.flat[2] = tree.flat[2][:1]  # frame 3: chair, lamp, bed
    tree.write_metadata()
    for read in (read_v1, read_v2):
        frame = read(tree)[2]
        assert names_of(frame) == ["chair"]
        assert frame.unlisted == 1  # the bed; the lamp would not have counted
        assert names_of(read(tree, all_boxes=True)[2]) == ["chair", "bed"]
        assert read(tree, all_boxes=True)[2].unlisted == 0
    tree.flat[2] = [{"classname": "chair"}, {"classname": "vase"}, {"classname": "bed"}]
    tree.write_metadata()
    assert names_of(read_v1(tree)[2]) == ["chair", "bed"]  # version 1's script does not compare the classes
    assert names_of(read_v2(tree)[2]) == ["chair"]
    with pytest.raises(ValueError, match=r"need SUNRGBDMeta2DBB_v2\.mat"):
        read_frames(tmp_path / V2_FILE)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("K", np.zeros((3, 3)), "K has focal lengths"),
        ("K", np.eye(2), "K is no 3x3"),
        ("Rtilt", np.diag([1.0, 1.0, -1.0]), "Rtilt is no rotation"),
        ("Rtilt", np.full((3, 3), np.nan), "Rtilt is no 3x3"),
        ("depthpath", "/n/fs/sun3d/data/SUNRGBD/../../secret/depth/d.png", "no path below SUNRGBD"),
        ("depthpath", "/etc/passwd", "no path below SUNRGBD"),
        ("rgbpath", "/n/fs/sun3d/data/SUNRGBD/kv2\\..\\x", "no path below SUNRGBD"),
        ("rgbpath", [], "a path is missing"),
        ("groundtruth3DBB", [3.0], "expected structs"),
    ],
)
def test_a_broken_entry_is_named_and_the_others_stay(tmp_path, field, value, reason):
    tree = PublishedTree(tmp_path)
    if field == "groundtruth3DBB":
        meta = scipy.io.loadmat(tmp_path / V2_FILE)["SUNRGBDMeta"]
        meta[0, 1][field] = np.array([[3.0]])
        scipy.io.savemat(tmp_path / V2_FILE, {"SUNRGBDMeta": meta})
    else:
        tree.entries[1][field] = value
        tree.write_metadata()
    frames = read_v2(tree)
    assert [type(frame) for frame in frames] == [Frame, str, Frame, Frame]
    assert "entry 2 of SUNRGBDMeta3DBB_v2.mat cannot be used" in frames[1]
    assert reason in frames[1]


def test_paths_of_the_metadata():
    assert relative_path("/n/fs/sun3d/data/SUNRGBD//kv1/a/./b/") == "SUNRGBD/kv1/a/b"
    assert relative_path("/SUNRGBD/kv1") == relative_path("SUNRGBD/kv1") == "SUNRGBD/kv1"
    for text in (
        "",
        "SUNRGBD",
        "/n/fs/sun3d/data/../SUNRGBD/x",
        "SUNRGBD/a\0b",
        "SUNRGBD/C:/x",
        "x/SUNRGBD/a",
        None,
    ):
        with pytest.raises(ValueError, match="path"):
            relative_path(text)


def test_split_lists_that_repeat_a_folder_are_refused(tmp_path):
    tree = PublishedTree(tmp_path)
    tree.splits["alltrain"].append(tree.splits["alltest"][0] + "/")
    tree.write_metadata()
    with pytest.raises(
        ValueError, match=r"allsplit\.mat lists SUNRGBD/kv2/kinect2data/000001_scan-resize twice"
    ):
        read_split(tmp_path / SPLIT_FILE)


# ---------------------------------------------------------------- the verb


def run_verb(*arguments):
    command = [sys.executable, "-m", "data_prep.sunrgbd", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_verb_names_a_broken_scene_continues_and_is_then_done(tmp_path):
    tree = PublishedTree(tmp_path / "raw")
    good = tree.depth_path(2).read_bytes()
    tree.depth_path(2).write_bytes(good[:-30])
    arguments = (f"--raw={tree.root}", f"--output={tmp_path / 'out'}", "--workers=2", "--allow_partial")
    first = run_verb(*arguments)
    assert first.returncode == 1, first.stderr
    assert "failed: 000002 (val): " in first.stderr
    assert "depth_bfx/d.png cannot be read as an image" in first.stderr
    assert "2 train, 1 val could" in first.stderr
    assert not (tmp_path / "out" / "sunrgbd_v1").exists()

    tree.depth_path(2).write_bytes(good)
    tree.depth_path(3).write_bytes(b"spoilt")  # converted already, so that it is not opened again
    second = run_verb(*arguments)
    assert second.returncode == 0, second.stderr
    assert "2 boxes of 1 classes outside the benchmark are left out: 2 lamp" in second.stdout
    manifest = json.loads((tmp_path / "out" / "sunrgbd_v1" / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 2, "val": 2}
    assert not manifest["complete"]
    third = convert_raw(tree.root, output=tmp_path / "out", workers=0, allow_partial=True, progress=False)
    assert third.reused

    frames = read_v1(tree)
    for split, numbers in (("val", (1, 2)), ("train", (3, 4))):
        source = open_split(tmp_path / "out" / "sunrgbd_v1", split)
        assert [source[row]["name"] for row in range(len(source))] == [f"{n:06d}" for n in numbers]
        for row, number in enumerate(numbers):
            sample, boxes = source[row], frames[number - 1].boxes
            want, pixels = slow_points(tree.depths[number - 1], INTRINSICS, tree.tilts[number - 1])
            np.testing.assert_allclose(sample["xyz"], want, atol=2e-5)
            color = np.array([tree.colors[number - 1][pixel] for pixel in pixels]) / 255
            assert np.abs(sample["color"] - color).mean() < 0.03
            stored = (sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"][:, None])
            np.testing.assert_array_equal(np.hstack(stored), boxes.boxes)
            np.testing.assert_array_equal(sample["boxes_label"], boxes.label)
            np.testing.assert_array_equal(sample["vote_center"], sample["boxes_center"])
            np.testing.assert_array_equal(sample["instance"], vote_slots(sample["xyz"], boxes.boxes)[:, 0])


def test_counts_are_asserted_and_missing_images_reported_at_once(tmp_path):
    tree = PublishedTree(tmp_path / "raw")
    options = {"output": tmp_path / "out", "workers": 0, "progress": False}
    with pytest.raises(ValueError, match="train has 2 scenes, not 5285"):
        convert_raw(tree.root, **options)
    tree.depth_path(4).unlink()
    report = convert_raw(tree.root, labels="v2", num_points=50, allow_partial=True, **options)
    assert report.counts == {"train": 1, "val": 2}
    kept = open_split(report.directory, "train")[0]["xyz"]
    assert kept.shape == (50, 3)
    want, _ = slow_points(tree.depths[2], INTRINSICS, tree.tilts[2])
    rows = np.abs(kept[:, None] - want[None]).max(axis=2).argmin(axis=1)
    np.testing.assert_allclose(kept, want[rows], atol=2e-5)
    assert (np.diff(rows) > 0).all()  # drawn without replacement, in order
    (tmp_path / "other").mkdir()
    for path, reason in (("other", "holds no SUNRGBD/kv1"), ("none", "is no folder")):
        with pytest.raises(ValueError, match=reason):
            convert_raw(tmp_path / path, **options)
    (tmp_path / "raw" / V1_FILE).unlink()
    with pytest.raises(ValueError, match=r"Metadata/SUNRGBDMeta\.mat is neither in"):
        convert_raw(tree.root, **options)


def test_a_missing_pillow_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ValueError, match=r"needs Pillow: pip install 'vrdistill-jax\[data\]'"):
        convert_raw(tmp_path)


def test_many_missing_images_are_one_message(tmp_path):
    tree = PublishedTree(tmp_path, train=15, val=10, shape=(3, 4))
    for number in range(2, 24):
        tree.depth_path(number).unlink()
    options = {"output": tmp_path / "out", "workers": 0, "progress": False}
    with pytest.raises(ValueError, match=r"images of 22 of 25 frames .*000002_scan.*--allow_partial"):
        convert_raw(tree.root, **options)


def test_a_frame_in_no_list_is_refused(tmp_path):
    tree = PublishedTree(tmp_path)
    tree.splits["alltest"].pop()
    tree.write_metadata()
    with pytest.raises(ValueError, match="000002_scan-resize .* is in neither list"):
        convert_raw(tmp_path, output=tmp_path / "out", workers=0, allow_partial=True, progress=False)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "name the data with one of --raw"),
        (("--raw=a", "--prepared=b"), "name the data with one of --raw"),
        (("--mmdet3d=a",), "do not say which boxes"),
        (("--prepared=a", "--all_boxes"), "--all_boxes goes with --raw only"),
        (("--mmdet3d=a", "--labels=v2", "--num_points=9"), "--num_points goes with"),
        (("--raw=a", "--labels=v3"), "v1|v2"),
    ],
)
def test_bad_flags_are_one_message(arguments, reason):
    done = run_verb(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extracted_folder(tmp_path):
    points = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    for folder in ("depth", "label", "label_v1"):
        (tmp_path / folder).mkdir()
    for number in (1, 5051):
        scipy.io.savemat(tmp_path / "depth" / f"{number:06d}.mat", {"instance": points})
        (tmp_path / "label_v1" / f"{number:06d}.txt").write_text(
            "desk 1 1 9 9 0.5 0.5 0.5 0.2 0.3 0.4 0 -1\nlamp 1 1 9 9 0.5 0.5 0.5 0.2 0.3 0.4 0 -1\n"
        )
    assert list_scenes(tmp_path) == {"train": ["005051"], "val": ["000001"]}
    options = {"output": tmp_path / "out", "workers": 0, "progress": False, "allow_partial": True}
    report = convert_trainval(tmp_path, num_points=30, **options)
    assert report.notes[0].endswith("left out: 2 lamp")
    sample = open_split(report.directory, "val")[0]
    assert {tuple(row) for row in sample["xyz"]} < {tuple(row) for row in points[:, :3]}
    assert sample["xyz"].shape == (30, 3)
    np.testing.assert_allclose(sample["boxes_size"], [[0.6, 0.4, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(sample["boxes_yaw"], [-np.pi / 2], rtol=1e-6)
    failed = convert_trainval(tmp_path, labels="v2", **options)  # its label files are missing
    assert [failure.scene for failure in failed.failures] == ["005051", "000001"]
    assert "label/000001.txt cannot be read" in failed.failures[1].reason
    (tmp_path / "depth" / "005051.mat").unlink()
    only_val = convert_trainval(tmp_path, **{**options, "output": tmp_path / "only_val"})
    assert only_val.counts == {"val": 1}
    scipy.io.savemat(tmp_path / "depth" / "005051.mat", {"instance": points})
    (tmp_path / "train_data_idx.txt").write_text("1\n")
    (tmp_path / "val_data_idx.txt").write_text("5051\n5052\n")
    assert list_scenes(tmp_path) == {"train": ["000001"], "val": ["005051"]}
    (tmp_path / "val_data_idx.txt").write_text("../1\n")
    with pytest.raises(ValueError, match=r"val_data_idx\.txt: '\.\./1' is no scene number"):
        list_scenes(tmp_path)


def test_prepared_arrays_give_the_same_boxes_as_the_extraction(tmp_path):
    points = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    for split, scene in (("train", "005051"), ("val", "000001")):
        folder = tmp_path / f"sunrgbd_pc_bbox_votes_50k_v1_{split}"
        folder.mkdir()
        np.savez(folder / f"{scene}_pc.npz", pc=points)
        row = [0.5, 0.5, 0.5, 0.3, 0.2, 0.4, -np.arctan2(-1.0, 0.5), 5]  # halves of length, width, height
        np.save(folder / f"{scene}_bbox.npy", np.array([row]))
    options = {"output": tmp_path / "out", "workers": 0, "progress": False, "allow_partial": True}
    report = convert_prepared(tmp_path, **options)
    assert report.counts == {"train": 1, "val": 1}
    sample = open_split(report.directory, "train")[0]
    want = boxes_from_annotations([Annotation("desk", [0.5, 0.5, 0.5], [0.2, 0.3, 0.4], [0.5, -1.0])])
    stored = (sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"][:, None])
    np.testing.assert_allclose(np.hstack(stored), want.boxes, rtol=1e-6)
    assert sample["boxes_label"].tolist() == want.label.tolist() == [5]
    with pytest.raises(ValueError, match="hold v1 labels by their names"):
        convert_prepared(tmp_path, labels="v2", **options)
