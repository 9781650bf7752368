import pickle
import re

import numpy as np
import pytest

from data_prep.mmdet3d import read_scannet_infos, read_sunrgbd_infos
from data_prep.safe_pickle import read_info_pickle
from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SUNRGBD_CLASSES
from vrdistill_jax.geometry.host.boxes import points_in_boxes

TURN = np.radians(30)
ALIGN = np.array(
    [
        [np.cos(TURN), -np.sin(TURN), 0, 1.5],
        [np.sin(TURN), np.cos(TURN), 0, -0.5],
        [0, 0, 1, 0.2],
        [0, 0, 0, 1],
    ]
)
# Axis-aligned boxes of two chairs and a bed; instances 7, 3 and 5 of the scan, 9 is a wall.
SCANNET_BOXES = np.array([[1, 1, 0.5, 0.5, 0.6, 1.0], [3, 1, 0.5, 0.5, 0.6, 1.0], [2, 3, 0.4, 2.0, 1.5, 0.8]])
SCANNET_NAMES = ["chair", "chair", "bed"]
INSTANCES, NYU40 = [7, 3, 5, 9], [5, 5, 4, 1]
CAMERA = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
SUN_BOXES = np.array([[0.5, 3.0, -0.5, 2.0, 0.5, 0.8, 0.6], [-1.0, 4.0, -0.4, 1.6, 0.4, 1.0, -0.9]])


def scannet_cloud(boxes=SCANNET_BOXES):
    """Points on a grid in each box (its corners included) and a wall, in the scan's own frame; their ids, classes."""
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 5)] * 3), -1).reshape(-1, 3)
    parts = [box[:3] + grid * box[3:6] for box in boxes] + [[0, -3, 1] + grid * [6, 0.1, 2.4]]
    aligned = np.concatenate(parts)
    inverse = np.linalg.inv(ALIGN)
    xyz = aligned @ inverse[:3, :3].T + inverse[:3, 3]
    color = np.tile([255.0, 128.0, 0.0], (len(xyz), 1))
    return (
        np.concatenate([xyz, color], 1).astype(np.float32),
        aligned,
        np.repeat(INSTANCES, len(grid)),
        len(grid),
    )


def scannet_info(version, name="scene0001_00", boxes=SCANNET_BOXES, names=SCANNET_NAMES):
    paths = {key: f"{key}/{name}.bin" for key in ("points", "instance_mask", "semantic_mask")}
    if version == "list":
        notes = {"gt_num": len(boxes), "axis_align_matrix": ALIGN}
        if len(boxes):
            notes |= {"name": np.array(names), "gt_boxes_upright_depth": boxes, "location": boxes[:, :3]}
            notes |= {
                "class": np.array([SCANNET_CLASSES.index(n) for n in names]),
                "index": np.arange(9, dtype=np.int32),
            }
        return {
            "point_cloud": {"num_features": 6, "lidar_idx": name},
            "pts_path": paths["points"],
            "pts_instance_mask_path": paths["instance_mask"],
            "pts_semantic_mask_path": paths["semantic_mask"],
            "annos": notes,
        }
    return {
        "lidar_points": {"num_pts_feats": 6, "lidar_path": f"{name}.bin"},
        "pts_instance_mask_path": f"{name}.bin",
        "pts_semantic_mask_path": f"{name}.bin",
        "axis_align_matrix": ALIGN.tolist(),
        "instances": [
            {"bbox_3d": box.tolist(), "bbox_label_3d": SCANNET_CLASSES.index(n)}
            for box, n in zip(boxes, names, strict=True)
        ],
    }


def as_file(version, entries, classes):
    if version == "list":
        return entries
    table = {"showercurtrain" if name == "shower_curtain" else name: row for row, name in enumerate(classes)}
    return {"metainfo": {"categories": table, "dataset": "x", "info_version": "1.1"}, "data_list": entries}


def write_scannet(folder, version, **changes):
    points, _, ids, each = scannet_cloud()
    for name, array in (
        ("points", points),
        ("instance_mask", ids),
        ("semantic_mask", np.repeat(NYU40, each)),
    ):
        (folder / name).mkdir(exist_ok=True)
        kind = np.float32 if name == "points" else np.int64
        array.astype(kind).tofile(folder / name / "scene0001_00.bin")
    infos = as_file(version, [scannet_info(version, **changes)], SCANNET_CLASSES)
    (folder / "scannet_infos_train.pkl").write_bytes(pickle.dumps(infos))


@pytest.mark.parametrize("version", ["list", "1.1"])
def test_scannet_clouds_are_aligned_and_instances_find_their_boxes(tmp_path, version):
    write_scannet(tmp_path, version)
    split = pickle.loads(pickle.dumps(read_scannet_infos(tmp_path, "train")))  # as a worker process gets it
    assert split.names == ("scene0001_00",)
    sample = split.convert("scene0001_00")
    _, aligned, ids, _ = scannet_cloud()
    np.testing.assert_allclose(sample["xyz"], aligned, atol=1e-5)
    np.testing.assert_allclose(sample["color"][0], [1, 128 / 255, 0], atol=1e-6)
    expected = np.select([ids == 7, ids == 3, ids == 5], [0, 1, 2], -1)
    np.testing.assert_array_equal(sample["instance"], expected)
    np.testing.assert_allclose(sample["boxes_center"], SCANNET_BOXES[:, :3], atol=1e-6)
    np.testing.assert_allclose(sample["boxes_size"], SCANNET_BOXES[:, 3:], atol=1e-6)
    np.testing.assert_array_equal(sample["boxes_yaw"], 0)
    assert [SCANNET_CLASSES[label] for label in sample["boxes_label"]] == SCANNET_NAMES
    np.testing.assert_allclose(sample["vote_center"], SCANNET_BOXES[:, :3], atol=1e-5)


@pytest.mark.parametrize("version", ["list", "1.1"])
def test_a_scene_without_boxes_needs_no_masks(tmp_path, version):
    write_scannet(tmp_path, version, boxes=np.zeros((0, 6)), names=[])
    (tmp_path / "instance_mask/scene0001_00.bin").unlink()
    sample = read_scannet_infos(tmp_path, "train").convert("scene0001_00")
    assert len(sample["boxes_label"]) == 0
    assert (sample["instance"] == -1).all()


def test_categories_of_the_file_decide_over_their_order(tmp_path):
    write_scannet(tmp_path, "1.1")
    path = tmp_path / "scannet_infos_train.pkl"
    infos = pickle.loads(path.read_bytes())
    infos["metainfo"]["categories"] = {"showercurtrain": 0, "bed": 1, "armchair": 2}
    for thing, row in zip(infos["data_list"][0]["instances"], (0, 1, 2), strict=True):
        thing["bbox_label_3d"] = row
    infos["data_list"][0]["instances"].append({"bbox_3d": [0, 0, 0, 1, 1, 1], "bbox_label_3d": -1})
    path.write_bytes(pickle.dumps(infos))
    split = read_scannet_infos(tmp_path, "train")
    labels = split.convert("scene0001_00")["boxes_label"]
    assert [SCANNET_CLASSES[label] for label in labels] == ["shower_curtain", "bed"]
    assert "armchair" in split.notes[0]


def sun_flat(boxes):
    """2D boxes by hand: every corner through x = X, y = -Z, depth = Y."""
    rows = []
    for x, y, z, length, width, height, yaw in boxes:
        pixels = []
        for a in (-length / 2, length / 2):
            for b in (-width / 2, width / 2):
                for c in (-height / 2, height / 2):
                    px, py = x + a * np.cos(yaw) - b * np.sin(yaw), y + a * np.sin(yaw) + b * np.cos(yaw)
                    pixels.append([500 * px / py + 320, 500 * -(z + c) / py + 240])
        rows.append([*np.min(pixels, 0), *np.max(pixels, 0)])
    return np.array(rows)


def write_sunrgbd(folder, version, sign=1, flat=True, boxes=SUN_BOXES, names=("bed", "table")):
    stored = boxes * [1, 1, 1, 1, 1, 1, sign]
    boxes_2d = sun_flat(boxes) if flat else None
    rng = np.random.default_rng(0)
    (folder / "points").mkdir(exist_ok=True)
    cloud = np.concatenate([rng.uniform([-3, 2, -1], [3, 6, 1], (4000, 3)), rng.random((4000, 3))], 1)
    cloud.astype(np.float32).tofile(folder / "points/000017.bin")
    if version == "list":
        notes = {
            "gt_num": len(boxes),
            "name": np.array(names),
            "gt_boxes_upright_depth": stored,
            "bbox": boxes_2d,
        }
        entry = {
            "point_cloud": {"num_features": 6, "lidar_idx": 17},
            "pts_path": "points/000017.bin",
            "annos": notes,
            "calib": {"K": CAMERA.astype(np.float32), "Rt": np.eye(3, dtype=np.float32)},
        }
    else:
        depth2img = CAMERA @ [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
        things = [
            {"bbox_3d": box.tolist(), "bbox_label_3d": SUNRGBD_CLASSES.index(name)}
            for box, name in zip(stored, names, strict=True)
        ]
        for row, thing in enumerate(things):
            if flat:
                thing["bbox"] = boxes_2d[row].tolist()
        entry = {
            "lidar_points": {"num_pts_feats": 6, "lidar_path": "000017.bin"},
            "images": {"CAM0": {"depth2img": depth2img.tolist()}},
            "instances": things,
        }
    infos = as_file(version, [entry], SUNRGBD_CLASSES)
    (folder / "sunrgbd_infos_val.pkl").write_bytes(pickle.dumps(infos, protocol=2))
    return cloud.astype(np.float32)


@pytest.mark.parametrize("version", ["list", "1.1"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_direction_of_the_yaw_is_found_from_the_2d_boxes(tmp_path, version, sign):
    cloud = write_sunrgbd(tmp_path, version, sign)
    split = read_sunrgbd_infos(tmp_path, "val")
    sample = split.convert("000017")
    np.testing.assert_allclose(sample["boxes_yaw"], SUN_BOXES[:, 6], atol=1e-6)
    np.testing.assert_allclose(sample["boxes_size"], SUN_BOXES[:, 3:6], atol=1e-6)
    np.testing.assert_allclose(sample["xyz"], cloud[:, :3])
    np.testing.assert_allclose(sample["color"], cloud[:, 3:], atol=1e-6)
    assert f"turns {'counter-clockwise' if sign == 1 else 'clockwise'}" in split.notes[0]
    inside = points_in_boxes(cloud[:, :3], SUN_BOXES)
    np.testing.assert_array_equal(sample["instance"], np.where(inside.any(1), inside.argmax(1), -1))
    assert inside.any(0).all()


def test_without_evidence_the_yaw_is_taken_as_the_caller_says(tmp_path):
    write_sunrgbd(tmp_path, "1.1", flat=False)
    assert read_sunrgbd_infos(tmp_path, "val").convert("000017")["boxes_yaw"][0] == pytest.approx(0.6)
    turned = read_sunrgbd_infos(tmp_path, "val", "clockwise").convert("000017")
    np.testing.assert_allclose(turned["boxes_yaw"], -SUN_BOXES[:, 6], atol=1e-6)
    with pytest.raises(ValueError, match="yaw_direction"):
        read_sunrgbd_infos(tmp_path, "val", "left")


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_runs_nothing(tmp_path):
    import os

    mark = tmp_path / "ran"
    path = tmp_path / "scannet_infos_train.pkl"
    for call in (
        (os.system, (f"touch {mark}",)),
        (eval, (f"open({str(mark)!r}, 'w')",)),
        (bytearray, (10**12,)),
    ):
        path.write_bytes(pickle.dumps([Evil(*call)]))
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_scannet_infos(tmp_path, "train")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e["lidar_points"].update(lidar_path="../../etc/passwd"), "leads out"),
        (lambda e: e["lidar_points"].update(lidar_path="/etc/passwd"), "leads out"),
        (lambda e: e["lidar_points"].update(lidar_path="a\\..\\b.bin"), "leads out"),
        (lambda e: e.update(pts_instance_mask_path="../x.bin"), "leads out"),
        (lambda e: e["lidar_points"].update(lidar_path=7), "path"),
        (lambda e: e["lidar_points"].update(num_pts_feats="6"), "per point"),
        (lambda e: e.pop("lidar_points"), "lidar_points"),
        (lambda e: e.pop("axis_align_matrix"), "axis_align_matrix"),
        (lambda e: e.update(axis_align_matrix=np.diag([2, 2, 2, 1.0])), "no turn"),
        (lambda e: e.update(axis_align_matrix="x"), "numbers"),
        (lambda e: e["instances"][0].update(bbox_3d=[0, 0, 0, 1, 1]), "boxes"),
        (lambda e: e["instances"][0].update(bbox_3d=[0, 0, 0, 1, 1, float("nan")]), "finite"),
        (lambda e: e["instances"][0].update(bbox_3d=[0, 0, 0, 1, 1, -1]), "size"),
        (lambda e: e["instances"][0].update(bbox_label_3d=[1]), "wrong type"),
        (lambda e: e.update(instances={"a": 1}), "wrong type"),
    ],
)
def test_bad_entries_are_named(tmp_path, change, reason):
    write_scannet(tmp_path, "1.1")
    path = tmp_path / "scannet_infos_train.pkl"
    infos = pickle.loads(path.read_bytes())
    change(infos["data_list"][0])
    path.write_bytes(pickle.dumps(infos))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*entry 0.*{reason}"):
        read_scannet_infos(tmp_path, "train")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "scannet_infos_train.pkl"
    for content in (3, [], [3], {"data_list": 1}, {"metainfo": {"categories": {1: 2}}, "data_list": [{}]}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_scannet_infos(tmp_path, "train")
    with pytest.raises(ValueError, match="split"):
        read_scannet_infos(tmp_path, "trian")
    write_scannet(tmp_path, "list")
    path.write_bytes(pickle.dumps([scannet_info("list"), scannet_info("list")]))
    with pytest.raises(ValueError, match="twice"):
        read_scannet_infos(tmp_path, "train")


def test_masks_of_another_length_are_refused(tmp_path):
    write_scannet(tmp_path, "list")
    mask = tmp_path / "instance_mask/scene0001_00.bin"
    mask.write_bytes(mask.read_bytes()[:-8])
    with pytest.raises(ValueError, match="instance_mask.*bytes"):
        read_scannet_infos(tmp_path, "train").convert("scene0001_00")


def problem_of(read, *arguments):
    try:
        read(*arguments)
    except ValueError as error:
        return str(error)
    return None


def test_damaged_info_files_give_one_clear_error(tmp_path):
    rng = np.random.default_rng(0)
    write_scannet(tmp_path, "1.1")
    write_sunrgbd(tmp_path, "list")
    cases = [
        ("scannet_infos_train.pkl", read_scannet_infos, "train"),
        ("sunrgbd_infos_val.pkl", read_sunrgbd_infos, "val"),
    ]
    refused = 0
    for name, read, split in cases:
        path = tmp_path / name
        good = path.read_bytes()
        for _ in range(60):
            data = bytearray(good)
            match rng.integers(3):
                case 0:
                    data = data[: rng.integers(len(data))]
                case 1:
                    for at in rng.integers(0, len(data), rng.integers(1, 6)):
                        data[at] = rng.integers(256)
                case 2:
                    at, length = rng.integers(0, len(data)), rng.integers(1, 40)
                    data[at : at + length] = b""
            path.write_bytes(bytes(data))
            problem = problem_of(read, tmp_path, split)
            assert problem is None or str(path) in problem
            refused += problem is not None
    assert refused > 80


@pytest.mark.data
def test_the_real_scannet_example(shared, tmp_path):
    """The released cloud and boxes with masks carried over from VoteNet's preparation of the same scan."""
    from scipy.spatial import cKDTree

    real = shared / "real"
    for name in ("points", "instance_mask", "semantic_mask"):
        (tmp_path / name).mkdir()
    (tmp_path / "scannet_infos_train.pkl").symlink_to(real / "clouds/scannet_infos_example.pkl")
    (tmp_path / "points/scene0000_00.bin").symlink_to(real / "clouds/scene0000_00_unaligned.bin")
    prepared = [
        np.load(real / f"scannet/prepared/scene0000_00_{name}.npy")
        for name in ("vert", "ins_label", "sem_label", "bbox")
    ]
    vertices, ids, classes, votenet_boxes = prepared
    entry = read_info_pickle(tmp_path / "scannet_infos_train.pkl")[0]
    cloud = np.fromfile(real / "clouds/scene0000_00_unaligned.bin", np.float32).reshape(-1, 6)
    matrix = entry["annos"]["axis_align_matrix"]
    distance, nearest = cKDTree(vertices[:, :3]).query(cloud[:, :3] @ matrix[:3, :3].T + matrix[:3, 3])
    ids[nearest].astype(np.int64).tofile(tmp_path / "instance_mask/scene0000_00.bin")
    classes[nearest].astype(np.int64).tofile(tmp_path / "semantic_mask/scene0000_00.bin")
    split = read_scannet_infos(tmp_path, "train")
    sample = split.convert("scene0000_00")
    assert np.median(distance) < 1e-3  # the alignment is right: VoteNet's vertices lie on the turned cloud
    assert len(sample["xyz"]) == 81369
    np.testing.assert_allclose(
        np.sort(sample["boxes_center"], 0), np.sort(votenet_boxes[:, :3], 0), atol=0.05
    )
    filled = [(sample["instance"] == row).sum() for row in range(27)]
    assert min(filled) > 50
    for row in range(27):
        points = sample["xyz"][sample["instance"] == row]
        middle, extent = (points.min(0) + points.max(0)) / 2, np.ptp(points, axis=0)
        np.testing.assert_allclose(middle, sample["boxes_center"][row], atol=0.06)
        np.testing.assert_allclose(extent, sample["boxes_size"][row], atol=0.12)


@pytest.mark.data
def test_the_real_sunrgbd_example(shared, tmp_path):
    real = shared / "real/clouds"
    (tmp_path / "points").mkdir()
    (tmp_path / "sunrgbd_infos_train.pkl").symlink_to(real / "sunrgbd_000017_infos.pkl")
    (tmp_path / "points/000017.bin").symlink_to(real / "000017.bin")
    split = read_sunrgbd_infos(tmp_path, "train")
    assert "turns clockwise" in split.notes[0]  # the file is of before version 1.0
    sample = split.convert("000017")
    assert [SUNRGBD_CLASSES[label] for label in sample["boxes_label"]] == ["night_stand", "bed"]
    count = np.bincount(sample["instance"] + 1, minlength=3)
    assert count[2] > 17000  # the bed holds twice as many points with the right sign
    np.testing.assert_allclose(sample["boxes_size"][1], [2.293, 1.58, 1.277], atol=1e-3)
