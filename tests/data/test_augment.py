import numpy as np
import pytest
from ml_collections import ConfigDict
from oracles.augmentation import flip_turn_scale_shift
from scenes import make_sample
from scipy.spatial import cKDTree

from vrdistill_jax.data.augment import (
    AUGMENTATIONS,
    Augmentation,
    augment,
    change_color,
    read_augmentation,
    transform_sample,
)
from vrdistill_jax.geometry.host.boxes import corners_from_boxes, points_in_boxes
from vrdistill_jax.recipes import SCANNET, SUNRGBD, augmentation


def rotation(angle: float, scale: float = 1.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return np.diag([scale, scale, scale, 1.0]) @ matrix


def boxes_of(sample: dict) -> np.ndarray:
    return np.concatenate([sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"][:, None]], 1)


@pytest.mark.parametrize(
    "matrix",
    [rotation(0.7), rotation(-2.0, 1.1), np.diag([-1.0, 1, 1, 1]) @ rotation(0.4), np.diag([1.0, -1, 1, 1])],
)
def test_oriented_boxes_move_with_their_points(matrix):
    sample = make_sample(0)
    sample["boxes_yaw"] = np.array([0.3, -1.0, 2.5], np.float32)
    before = points_in_boxes(sample["xyz"], boxes_of(sample))
    after = transform_sample(sample, matrix, refit_boxes=False)
    grown = boxes_of(after)
    grown[:, 3:6] *= 1.001
    shrunk = boxes_of(after)
    shrunk[:, 3:6] *= 0.999
    assert (before <= points_in_boxes(after["xyz"], grown)).all()
    assert (before >= points_in_boxes(after["xyz"], shrunk)).all()
    assert before.any()


def test_refitted_boxes_are_the_bounds_of_the_turned_ones():
    sample = make_sample(0)
    matrix = rotation(0.4, 1.2)
    refitted = transform_sample(sample, matrix, refit_boxes=True)
    turned = corners_from_boxes(boxes_of(sample)) @ matrix[:3, :3].T
    np.testing.assert_allclose(refitted["boxes_size"], np.ptp(turned, axis=1), rtol=1e-5)
    np.testing.assert_allclose(refitted["boxes_center"], turned.mean(1), atol=1e-5)
    np.testing.assert_array_equal(refitted["boxes_yaw"], 0)


def test_flip_x_is_votenets():
    sample = make_sample(0)
    sample["boxes_yaw"] = np.array([0.3, -1.0, 2.5], np.float32)
    flipped = transform_sample(sample, np.diag([-1.0, 1, 1, 1]), refit_boxes=False)
    np.testing.assert_allclose(flipped["xyz"], sample["xyz"] * [-1, 1, 1])
    heading = np.pi - (-sample["boxes_yaw"])  # the reference: heading -> pi - heading, heading = -yaw
    difference = -flipped["boxes_yaw"] - heading
    np.testing.assert_allclose(np.cos(difference), 1, atol=1e-6)


def test_random_changes_stay_in_range_and_return_their_matrix():
    config = ConfigDict(
        {"flip_x": 0.5, "flip_y": 0.0, "max_turn": 0.2, "max_scale": 0.15, "refit_boxes": False}
    )
    sample, flips, scales, turns = make_sample(0), [], [], []
    for seed in range(200):
        changed, matrix = augment(sample, config, np.random.default_rng(seed))
        expected = sample["xyz"] @ matrix[:3, :3].T
        np.testing.assert_allclose(changed["xyz"], expected, atol=1e-5)
        scale = np.cbrt(abs(np.linalg.det(matrix)))
        linear = matrix[:2, :2] / scale
        flip = np.linalg.det(linear) < 0
        if flip:
            linear = linear @ np.diag([-1, 1])
        flips.append(flip)
        scales.append(scale)
        turns.append(np.arctan2(linear[1, 0], linear[0, 0]))
    assert 0.4 < np.mean(flips) < 0.6
    assert 0.85 <= min(scales) < 0.87
    assert 1.13 < max(scales) <= 1.15
    assert -0.2 <= min(turns) < -0.18
    assert 0.18 < max(turns) <= 0.2


def test_no_change_when_everything_is_off():
    config = ConfigDict(
        {"flip_x": 0.0, "flip_y": 0.0, "max_turn": 0.0, "max_scale": 0.0, "refit_boxes": True}
    )
    sample = make_sample(3)
    changed, matrix = augment(sample, config, np.random.default_rng(0))
    np.testing.assert_array_equal(matrix, np.eye(4))
    for name, value in sample.items():
        np.testing.assert_array_equal(changed[name], value)


def turned_sample(seed: int) -> dict:
    """Boxes at any yaw, and stored vote centres off the box centres."""
    sample, rng = make_sample(seed), np.random.default_rng(seed)
    yaw = rng.uniform(-np.pi, np.pi, 3).astype(np.float32)
    return sample | {"boxes_yaw": yaw, "vote_center": sample["boxes_center"] + np.float32(0.1)}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_change_is_flip_turn_scale_shift_one_after_the_other(seed, refit):
    steps = Augmentation(
        flip_x=0.5, flip_y=0.5, max_turn=0.5, max_scale=0.4, shift_std=0.1, refit_boxes=refit
    )
    sample = make_sample(seed) if refit else turned_sample(seed)
    changed, matrix = augment(sample, steps, np.random.default_rng(seed))
    scale = np.cbrt(abs(np.linalg.det(matrix)))
    first = matrix[:2, 0] / scale  # where the x axis goes
    expected = [
        flip_turn_scale_shift(
            sample, fx, fy, np.arctan2(first[1], first[0]) - np.pi * fx, scale, matrix[:3, 3]
        )
        for fx in (False, True)
        for fy in (False, True)
        if fx ^ fy == (np.linalg.det(matrix) < 0)
    ]
    # A flip of both axes is a half turn, so two readings of one matrix exist; they give the same scene.
    for want in expected:
        np.testing.assert_allclose(changed["xyz"], want["xyz"], atol=1e-5)
        np.testing.assert_allclose(changed["boxes_center"], want["boxes_center"], atol=1e-5)
        if refit:
            np.testing.assert_allclose(changed["boxes_size"], want["bounds_size"], rtol=1e-5)
            np.testing.assert_array_equal(changed["boxes_yaw"], 0)
        else:
            np.testing.assert_allclose(changed["boxes_size"], want["boxes_size"], rtol=1e-5)
            np.testing.assert_allclose(changed["vote_center"], want["vote_center"], atol=1e-5)
            np.testing.assert_allclose(np.cos(changed["boxes_yaw"] - want["boxes_yaw"]), 1, atol=1e-6)


def test_both_flips_and_the_range_of_the_turn_are_drawn():
    steps = Augmentation(flip_x=0.5, flip_y=0.5, max_turn=0.1)
    kinds = set()
    for seed in range(40):
        _, matrix = augment(make_sample(0, num_points=4), steps, np.random.default_rng(seed))
        kinds.add(tuple(np.sign(np.diag(matrix)[:2]).astype(int)))
        assert abs(matrix[0, 1]) <= np.sin(0.1)
    assert kinds == {(1, 1), (-1, 1), (1, -1), (-1, -1)}


def test_shifts_are_normal_and_in_the_matrix():
    steps, sample = Augmentation(shift_std=0.1), make_sample(0, num_points=4)
    shifts = []
    for seed in range(400):
        changed, matrix = augment(sample, steps, np.random.default_rng(seed))
        np.testing.assert_allclose(changed["xyz"], sample["xyz"] + matrix[:3, 3], atol=1e-6)
        np.testing.assert_allclose(changed["boxes_center"], sample["boxes_center"] + matrix[:3, 3], atol=1e-6)
        shifts.append(matrix[:3, 3])
    assert np.std(shifts, axis=0) == pytest.approx([0.1] * 3, rel=0.15)
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.02


def test_yaw_stays_below_pi():
    sample = make_sample(0) | {"boxes_yaw": np.array([0.0, -np.pi, 1.0], np.float32)}
    for matrix in (np.diag([-1.0, 1, 1, 1]), np.diag([-1.0, -1, 1, 1]), np.eye(4)):
        yaw = transform_sample(sample, matrix, refit_boxes=False)["boxes_yaw"]
        assert (yaw < np.float32(np.pi)).all()
        assert (yaw >= -np.float32(np.pi)).all()


def test_share_of_the_points():
    sample, steps, counts = make_sample(0), Augmentation(points_share=(0.33, 0.66)), []
    by_point = {
        tuple(p): (tuple(c), i)
        for p, c, i in zip(sample["xyz"], sample["color"], sample["instance"], strict=True)
    }
    for seed in range(60):
        part, matrix = augment(sample, steps, np.random.default_rng(seed))
        np.testing.assert_array_equal(matrix, np.eye(4))
        counts.append(len(part["xyz"]))
        for p, c, i in zip(part["xyz"], part["color"], part["instance"], strict=True):
            assert by_point[tuple(p)] == (tuple(c), i)
        assert len({tuple(p) for p in part["xyz"]}) == len(part["xyz"])
    assert 198 <= min(counts) < 215
    assert 380 < max(counts) <= 396


def test_colours_change_within_their_ranges():
    color = np.random.default_rng(0).uniform(0.35, 0.6, (5000, 3)).astype(np.float32)
    for seed in range(5):
        steps = Augmentation(color_gain=0.2)
        gain = change_color(color, steps, np.random.default_rng(seed)) / color
        np.testing.assert_allclose(gain, np.broadcast_to(gain[0], gain.shape), rtol=1e-5)
        assert (np.abs(gain[0] - 1) <= 0.2).all()
        assert len(set(gain[0].tolist())) == 3
        shift = change_color(color, Augmentation(color_shift=0.05), np.random.default_rng(seed)) - color
        np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-6)
        assert (np.abs(shift[0]) <= 0.05).all()
        jitter = change_color(color, Augmentation(color_jitter=0.025), np.random.default_rng(seed)) - color
        np.testing.assert_allclose(jitter, np.repeat(jitter[:, :1], 3, axis=1), atol=1e-6)
        assert 0.024 < np.abs(jitter).max() < 0.0251
        dropped = change_color(color, Augmentation(color_drop=0.3), np.random.default_rng(seed))
        black = (dropped == 0).all(axis=1)
        np.testing.assert_array_equal(dropped[~black], color[~black])
        assert black.mean() == pytest.approx(0.3, abs=0.03)
    extreme = change_color(
        np.ones((10, 3), np.float32), Augmentation(color_gain=1.0), np.random.default_rng(1)
    )
    assert extreme.max() <= 1


@pytest.mark.parametrize("crop", ["first", "last"])
def test_a_crop_is_a_cuboid_of_the_stored_or_of_the_turned_scene(crop):
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-3, 3, (2000, 3)).astype(np.float32)
    sample = make_sample(0, num_points=2000) | {"xyz": xyz}
    steps = Augmentation(max_turn=1.0, shift_std=1.0, crop=crop, crop_min_points=500)
    fits = {"first": [], "last": []}
    for seed in range(12):
        part, matrix = augment(sample, steps, np.random.default_rng(seed))
        moved = xyz.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        kept = cKDTree(part["xyz"]).query(moved)[0] < 1e-5
        assert kept.sum() == len(part["xyz"])
        for order, cloud in (("first", xyz), ("last", moved)):
            low, high = cloud[kept].min(axis=0), cloud[kept].max(axis=0)
            inside = ((cloud >= low) & (cloud <= high)).all(axis=1)
            fits[order].append((inside == kept).all())
    other = "last" if crop == "first" else "first"
    assert all(fits[crop])
    assert not all(fits[other])


@pytest.mark.parametrize("task", [SCANNET, SUNRGBD])
@pytest.mark.parametrize("detector", ["votenet", "3detr", "tr3d"])
def test_scenes_without_boxes(task, detector):
    changed, _ = augment(make_sample(0, num_boxes=0), augmentation(task, detector), np.random.default_rng(0))
    assert changed["boxes_center"].shape == changed["boxes_size"].shape == (0, 3)
    assert changed["boxes_yaw"].shape == (0,)
    assert len(changed["xyz"]) > 100


def test_steps_have_streams_of_their_own():
    sample = make_sample(0)
    plain = Augmentation(flip_x=0.5, max_turn=0.5, max_scale=0.1)
    everything = plain._replace(shift_std=0.1, crop="last", color_gain=0.2, color_drop=0.3)
    for seed in range(5):
        _, alone = augment(sample, plain, np.random.default_rng(seed))
        _, among = augment(sample, everything, np.random.default_rng(seed))
        np.testing.assert_array_equal(alone[:3, :3], among[:3, :3])


def test_a_stored_scene_is_never_changed_in_place():
    sample = turned_sample(0)
    before = {k: np.copy(v) for k, v in sample.items()}
    for task in (SCANNET, SUNRGBD):
        for detector in AUGMENTATIONS:
            augment(sample, augmentation(task, detector), np.random.default_rng(0))
    for name, value in before.items():
        np.testing.assert_array_equal(sample[name], value)


@pytest.mark.parametrize("detector", AUGMENTATIONS)
@pytest.mark.parametrize("task", [SCANNET, SUNRGBD])
def test_recipes_keep_the_scene_consistent(detector, task):
    """Points that lay in a box lie in it after the change, and carry its row."""
    config = augmentation(task, detector)
    assert read_augmentation(config) == AUGMENTATIONS[detector][task.oriented]
    sample = make_sample(4, num_points=3000)
    for seed in range(5):
        changed, matrix = augment(sample, config, np.random.default_rng(seed))
        count = len(changed["boxes_center"])
        assert 1 <= count <= 3
        assert changed["instance"].max() < count
        boxes = boxes_of(changed)
        boxes[:, 3:6] *= 1.001
        inside = points_in_boxes(changed["xyz"], boxes)
        owned = changed["instance"] >= 0
        assert owned.any()
        assert inside[owned, changed["instance"][owned]].all()
        everything = sample["xyz"] @ matrix[:3, :3].T + matrix[:3, 3]
        distance, _ = cKDTree(everything).query(changed["xyz"])
        assert distance.max() < 1e-5


def test_published_numbers():
    degree = np.pi / 180
    scannet, sunrgbd = augmentation(SCANNET), augmentation(SUNRGBD)
    assert (scannet.flip_x, scannet.flip_y, scannet.max_scale, scannet.refit_boxes) == (0.5, 0.5, 0, True)
    assert scannet.max_turn == pytest.approx(5 * degree)
    assert (sunrgbd.flip_x, sunrgbd.flip_y, sunrgbd.max_scale, sunrgbd.refit_boxes) == (0.5, 0, 0.15, False)
    assert sunrgbd.max_turn == pytest.approx(30 * degree)
    assert (augmentation(SCANNET, "3detr").crop, augmentation(SUNRGBD, "3detr").crop) == ("first", "last")
    assert augmentation(SCANNET, "tr3d").max_turn == 0.02
    assert augmentation(SCANNET, "fcaf3d").max_turn == pytest.approx(5 * degree)
    with pytest.raises(ValueError, match="no augmentation for detector 'yolo'; known: votenet, "):
        augmentation(SCANNET, "yolo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip_z": 0.5}, "unknown entry 'flip_z'; known: points_share, flip_x"),
        ({"flip_x": 1.5}, r"flip_x is 1.5; it must lie in \[0, 1\]"),
        ({"max_scale": 1.0}, "max_scale is 1.0; it must lie in"),
        ({"crop": "always"}, "crop is 'always'; known: never, first, last"),
        ({"points_share": (0.5, 0.3)}, "0 < low <= high <= 1"),
        ({"color_drop": float("nan")}, "color_drop is nan"),
    ],
)
def test_impossible_entries_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_augmentation(ConfigDict(change))
