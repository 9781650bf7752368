from types import SimpleNamespace

import numpy as np
import pytest

from vrdistill_jax.data.primitives import find_primitives

SCANS = SimpleNamespace(
    face_distance=0.2,
    face_points=100,
    face_variance=1e-2,
    edge_distance=0.2,
    edge_points=10,
    edge_of_box=False,
)
VIEWS = SimpleNamespace(
    face_distance=0.1, face_points=50, face_variance=5e-3, edge_distance=0.1, edge_points=10, edge_of_box=True
)


def table_top(count=400, yaw=0.0, seed=0):
    """Points of a horizontal 2 x 1 m plate at z = 0.7 that belong to a 2 x 1 x 0.7 m box around (3, 4)."""
    rng = np.random.default_rng(seed)
    local = rng.uniform(-0.5, 0.5, (count, 2)) * (2, 1)
    cos, sin = np.cos(yaw), np.sin(yaw)
    turned = local @ [[cos, sin], [-sin, cos]] + (3, 4)
    xyz = np.concatenate([turned, np.full((count, 1), 0.7)], 1).astype(np.float32)
    box = np.array([[3, 4, 0.35, 2, 1, 0.7, yaw]], np.float32)
    return xyz, np.zeros((count, 1), np.int32), box, np.array([5]), local


def test_a_plate_is_the_upper_face_of_its_box():
    xyz, instance, boxes, label, local = table_top()
    found = find_primitives(xyz, instance, boxes, label, SCANS)
    z = found["z"]
    assert z.mask.all()
    np.testing.assert_allclose(z.center, np.tile([3, 4, 0.7], (400, 1)), atol=1e-6)
    np.testing.assert_allclose(z.size, np.tile([2, 1], (400, 1)), atol=1e-6)
    assert (z.label == 5).all()
    # A fifth of the plate lies near enough to each of two opposite ends: too few points for a face, enough for edges.
    xy = found["xy"]
    ends = np.abs(np.abs(local[:, 1]) - 0.5) < 0.2
    assert ends.sum() > 100  # the long sides hold two fifths of the points
    np.testing.assert_allclose(xy.center[xy.mask][:, 2], 0.35, atol=1e-6)
    assert (xy.size[xy.mask] == np.float32(0.7)).all()
    line = found["line"]
    middle = np.hypot(*(np.abs(local) / (1, 0.5)).T) < 0.3
    assert not line.mask[middle].any()
    assert line.mask[np.abs(local[:, 0] - 1) < 0.15].all()


def test_an_edge_is_where_its_points_are_but_midway_along_the_box():
    xyz, instance, boxes, label, local = table_top()
    line = find_primitives(xyz, instance, boxes, label, SCANS)["line"]
    # Points near the +x end, away from the corners (which other edges claim later).
    near = (np.abs(local[:, 0] - 1) < 0.2) & (np.abs(local[:, 1]) < 0.25)
    strip = xyz[np.abs(local[:, 0] - 1) < 0.2]
    np.testing.assert_allclose(
        line.center[near], np.tile([strip[:, 0].mean(), 4, 0.7], (near.sum(), 1)), atol=1e-5
    )


@pytest.mark.parametrize("yaw", [0.0, 0.8, -2.9])
def test_views_take_edges_from_the_box_and_turn_with_it(yaw):
    xyz, instance, boxes, label, local = table_top(yaw=yaw)
    found = find_primitives(xyz, instance, boxes, label, VIEWS)
    near = (np.abs(local[:, 0] - 1) < 0.09) & (np.abs(local[:, 1]) < 0.35)
    assert near.sum() > 5
    end = [3 + np.cos(yaw), 4 + np.sin(yaw), 0.7]
    np.testing.assert_allclose(found["line"].center[near], np.tile(end, (near.sum(), 1)), atol=1e-5)
    np.testing.assert_allclose(found["z"].center, np.tile([3, 4, 0.7], (400, 1)), atol=1e-6)


def test_thresholds_are_exclusive():
    for count, there in ((100, False), (101, True)):
        xyz, instance, boxes, label, _ = table_top(count)
        assert find_primitives(xyz, instance, boxes, label, SCANS)["z"].mask.any() == there
    xyz, instance, boxes, label, local = table_top()
    few = np.flatnonzero(np.abs(local[:, 0] - 1) < 0.2)
    for count, there in ((10, False), (11, True)):
        # Only `count` points near the +x end, none near the long sides.
        kept = np.concatenate(
            [few[np.abs(local[few, 1]) < 0.25][:count], np.flatnonzero(np.abs(local[:, 0]) < 0.5)]
        )
        line = find_primitives(xyz[kept], instance[kept], boxes, label, SCANS)["line"]
        assert line.mask[:count].all() == there
        assert line.mask[:count].any() == there


def test_scattered_points_are_no_face():
    xyz, instance, boxes, label, _ = table_top()
    rules = SimpleNamespace(**{**vars(SCANS), "face_distance": 0.5})
    tilted = xyz.copy()
    tilted[:, 2] = np.random.default_rng(1).uniform(0.35, 0.7, len(xyz))  # variance 0.0102
    assert not find_primitives(tilted, instance, boxes, label, rules)["z"].mask.any()
    tilted[:, 2] = np.random.default_rng(1).uniform(0.4, 0.7, len(xyz))  # variance 0.0075
    assert find_primitives(tilted, instance, boxes, label, rules)["z"].mask.all()


def test_the_last_box_wins_and_points_of_none_have_nothing():
    xyz, _, boxes, _, _ = table_top()
    two = np.concatenate([boxes, boxes + np.array([[0, 0, 0, 1, 1, 0, 0]])]).astype(np.float32)
    instance = np.full((len(xyz), 3), -1, np.int32)
    instance[:300] = (0, 1, 0)
    found = find_primitives(xyz, instance, two, np.array([5, 7]), SCANS)
    assert (found["z"].label[:300] == 7).all()
    assert (found["z"].size[:300] == (3, 2)).all()
    for kind in found.values():
        assert not kind.mask[300:].any()
        assert (kind.label[300:] == -1).all()
        assert not kind.center[300:].any()


def test_a_point_of_no_box_is_a_clear_error():
    xyz, instance, boxes, label, _ = table_top()
    with pytest.raises(ValueError, match="a point belongs to box 1 but there are 1"):
        find_primitives(xyz, instance + 1, boxes, label, SCANS)
