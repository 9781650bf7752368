import numpy as np
import pytest
from ml_collections import ConfigDict
from scenes import make_sample

from vrdistill_jax.data.augment import augment, transform_sample
from vrdistill_jax.geometry.host.boxes import corners_from_boxes, points_in_boxes


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
