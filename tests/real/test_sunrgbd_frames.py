"""SUN RGB-D's readers on real frames: raw ones, VoteNet's extraction of others, and the prepared clouds made of it."""

import numpy as np
import pytest
from oracles.sunrgbd_raw import encode
from PIL import Image

from data_prep.sunrgbd_annotations import boxes_from_annotations, read_label_file
from data_prep.sunrgbd_raw import points_from_depth, read_depth_image, read_frame_folder
from data_prep.sunrgbd_trainval import read_calibration, read_extracted_points
from vrdistill_jax.data.samples import vote_slots

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def real(shared):
    path = shared / "real" / "sunrgbd"
    if not path.is_dir():
        pytest.skip(f"no real scans at {path}")
    return path


def test_extracted_points_come_back_from_a_depth_image(real, tmp_path):
    """No published frame here is one of the extracted ones, so the depth image is made from the points."""
    points = read_extracted_points(real / "raw/trainval/depth/000001.mat")[:, :3].astype(np.float64)
    tilt, intrinsics = read_calibration(real / "raw/trainval/calib/000001.txt")
    camera = points @ tilt  # the inverse rotation
    u = camera[:, 0] * intrinsics[0, 0] / camera[:, 1] + intrinsics[0, 2]
    v = -camera[:, 2] * intrinsics[1, 1] / camera[:, 1] + intrinsics[1, 2]
    pixel = np.stack([u, v], 1)
    assert np.abs(pixel - pixel.round()).max() < 0.01  # they lie on a grid of whole pixels ...
    column, row = pixel.round().astype(int).T - 1
    assert (column.min(), row.min(), column.max(), row.max()) == (0, 0, 729, 529)  # ... that counts from 1
    assert (np.diff(column * 530 + row) > 0).all()  # column by column
    encoded = np.zeros((530, 730), np.uint16)
    encoded[row, column] = encode((camera[:, 1] * 1000).round())
    Image.fromarray(encoded).save(tmp_path / "d.png")
    xyz, order = points_from_depth(read_depth_image(tmp_path / "d.png"), intrinsics, tilt)
    assert (order == row * 730 + column).all()
    assert np.abs(xyz - points).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "floor"), [("img_0063", -1.11), ("2014-12-18_11-31-54_260595134347", -1.31)]
)
def test_frames_stand_upright(real, name, floor):
    folder = real / "raw" / name
    xyz, color = read_frame_folder(folder)
    assert xyz[:, 1].min() > 0.3
    near_floor = np.abs(xyz[:, 2] - floor) < 0.03
    assert near_floor.mean() > 0.03
    a, b, c = np.linalg.lstsq(
        np.c_[xyz[near_floor, :2], np.ones(near_floor.sum())], xyz[near_floor, 2], rcond=None
    )[0]
    assert max(abs(a), abs(b)) < 0.03  # level within 2 degrees
    assert (xyz[:, 2] > floor - 0.1).mean() > 0.99
    assert 0.2 < color.mean() < 0.8
    assert len(xyz) == np.count_nonzero(read_depth_image(next((folder / "depth_bfx").glob("*.png"))))


def test_prepared_cloud_is_drawn_from_the_extracted_one(real):
    from scipy.spatial import cKDTree

    points = read_extracted_points(real / "raw/trainval/depth/000001.mat")
    prepared = np.load(real / "prepared_val/000001_pc.npz")["pc"]
    distance, row = cKDTree(points[:, :3]).query(prepared[:, :3])
    assert distance.max() < 1e-5
    assert len(np.unique(row)) == len(prepared)
    np.testing.assert_allclose(prepared[:, 3:], points[row, 3:], atol=1e-6)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_labels_give_the_prepared_boxes(real, number):
    want = np.load(real / f"prepared_val/{number:06d}_bbox.npy")
    found = boxes_from_annotations(read_label_file(real / f"raw/trainval/label_v1/{number:06d}.txt"))
    assert len(want)
    np.testing.assert_array_equal(found.label, want[:, 7])
    np.testing.assert_allclose(found.boxes[:, :3], want[:, :3], atol=1e-6)
    np.testing.assert_allclose(found.boxes[:, 3:6], 2 * want[:, 3:6], atol=1e-6)
    np.testing.assert_allclose(np.exp(1j * found.boxes[:, 6]), np.exp(-1j * want[:, 6]), atol=1e-6)
    second = boxes_from_annotations(read_label_file(real / f"raw/trainval/label/{number:06d}.txt"))
    assert len(second.boxes) >= len(found.boxes)
    assert found.other_classes.total() + len(want) == len(
        read_label_file(real / f"raw/trainval/label_v1/{number:06d}.txt")
    )


@pytest.mark.parametrize("folder", ["prepared_val", "prepared_train"])
def test_vote_slots_give_the_prepared_votes(real, folder):
    """Each point's three votes lead to the centres of the boxes in its slots, but for points on a face."""
    total = wrong = 0
    for path in sorted((real / folder).glob("*_votes.npz")):
        votes = np.load(path)["point_votes"]
        stem = str(path).removesuffix("_votes.npz")
        xyz, rows = np.load(stem + "_pc.npz")["pc"][:, :3], np.load(stem + "_bbox.npy")
        boxes = np.c_[rows[:, :3], 2 * rows[:, 3:6], -rows[:, 6]].astype(np.float32)
        slots = vote_slots(xyz, boxes)
        total, wrong = total + len(xyz), wrong + ((slots[:, 0] >= 0) != (votes[:, 0] > 0)).sum()
        both = (slots[:, 0] >= 0) & (votes[:, 0] > 0)
        if not len(boxes):
            assert not votes.any()
            continue
        want = votes[:, 1:].reshape(-1, 3, 3)
        got = boxes[slots, :3] - xyz[:, None]
        wrong += (np.abs(got - want)[both].max(axis=(1, 2)) > 1e-4).sum()
    assert total >= 200_000
    assert wrong < 1e-4 * total
