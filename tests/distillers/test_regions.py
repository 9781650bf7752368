import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import fgd as oracle
from oracles.boxes import random_boxes, signed_depth

from vrdistill_jax.distillers.regions import (
    background_weight,
    foreground_weight,
    points_inside_boxes,
    points_on_foreground,
    points_on_instances,
)
from vrdistill_jax.structs import Boxes, Points, Scene


def make_boxes(rows, num_pads=2):
    """One scene's boxes from rows [g, 7]; the pads would hold every point near the origin if they counted."""
    rows = np.concatenate([np.reshape(rows, (-1, 7)), np.tile([0, 0, 0, 9, 9, 9, 0.0], (num_pads, 1))])
    mask = np.arange(len(rows)) < len(rows) - num_pads
    rows = rows.astype(np.float32)[None]
    label = np.where(mask, 0, -1).astype(np.int32)[None]
    return Boxes(rows[..., :3], rows[..., 3:6], rows[..., 6], label, mask[None], rows[..., :3])


def make_scene(boxes, instance=None, mask=(True,)):
    batch = len(mask)
    points = Points(
        np.zeros((batch, 1, 3), np.float32), np.zeros((batch, 1, 0), np.float32), np.ones((batch, 1))
    )
    return Scene(points, boxes, instance, None, None, np.array(mask))


@pytest.mark.parametrize("margin", [0.0, 0.1, -0.05])
def test_oriented_box_test_matches_the_oracle(margin):
    rng = np.random.default_rng(0)
    rows = random_boxes(rng, 5)
    xyz = rng.uniform(-2, 2, (60, 3)).astype(np.float32)
    mask = rng.random(60) < 0.8
    got = points_inside_boxes(xyz[None], mask[None], make_boxes(rows), margin)[0]
    depth = np.array([[signed_depth(p, box) for box in rows] for p in xyz]) + margin
    assert np.abs(depth).min() > 1e-4  # no point so close to a face that rounding decides
    np.testing.assert_array_equal(got[:, :5], (depth > 0) & mask[:, None])
    assert not np.asarray(got[:, 5:]).any()
    assert np.asarray(got).any()
    assert not np.asarray(got).all(0).any()


def test_turned_box_holds_its_corner_and_not_that_of_its_aligned_twin():
    box = make_boxes([[0, 0, 0, 2, 0.2, 1, np.pi / 4]], num_pads=0)
    xyz = np.array([[[0.6, 0.6, 0], [0.6, -0.6, 0], [0.9, 0, 0]]], np.float32)
    got = points_inside_boxes(xyz, np.ones((1, 3), bool), box)
    np.testing.assert_array_equal(got[0, :, 0], [True, False, False])


def test_margin_moves_every_face_by_its_full_length():
    box = make_boxes([[0, 0, 0, 1, 1, 1, 0.0]], num_pads=0)
    xyz = np.array([[[0.55, 0, 0], [0, -0.55, 0], [0, 0, 0.65], [0.45, 0, 0]]], np.float32)
    mask = np.ones((1, 4), bool)
    np.testing.assert_array_equal(
        points_inside_boxes(xyz, mask, box, 0.06)[0, :, 0], [True, True, False, True]
    )
    np.testing.assert_array_equal(points_inside_boxes(xyz, mask, box, 0.04)[0, :, 0], [False] * 3 + [True])
    assert not points_inside_boxes(xyz, mask, box, -0.06).any()


def test_instances_follow_every_slot():
    instance = np.array([[[1, -1], [-1, -1], [2, 0], [3, -1]]], np.int32)  # box 3 is a pad
    seed_index, mask = np.array([[2, 0, 1, 3, 0]]), np.array([[True, True, True, True, False]])
    got = points_on_instances(instance, seed_index, mask, np.array([[True, True, True, False]]))
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(got[0], np.array(expected, bool))


def test_weights_match_the_oracle_and_sum_to_one_per_object():
    rng = np.random.default_rng(1)
    inside = rng.random((3, 20, 4)) < 0.3
    inside[2] = False
    for scene, foreground, background in zip(
        inside, foreground_weight(inside), background_weight(inside, np.ones((3, 20), bool)), strict=True
    ):
        expected = oracle.region_weights(scene)
        np.testing.assert_allclose(foreground, expected[0], rtol=1e-6)
        np.testing.assert_allclose(background, expected[1], rtol=1e-6)
    disjoint = np.eye(5, dtype=bool)[rng.integers(0, 5, 40)][:, :4][None]
    weight = np.asarray(foreground_weight(disjoint))[0]
    for j in range(4):
        np.testing.assert_allclose(weight[disjoint[0, :, j]].sum(), 1, rtol=1e-6)


def test_smaller_object_wins_where_two_overlap():
    inside = np.array([[[True, True], [True, False], [True, False], [False, False]]])
    np.testing.assert_allclose(foreground_weight(inside), [[1, 1 / 3, 1 / 3, 0]], rtol=1e-6)


def test_no_boxes_no_background_no_points():
    nothing = np.zeros((1, 6, 3), bool)
    mask = np.array([[True] * 4 + [False] * 2])
    np.testing.assert_array_equal(foreground_weight(nothing), 0)
    np.testing.assert_allclose(background_weight(nothing, mask), [[0.25] * 4 + [0] * 2])
    np.testing.assert_array_equal(background_weight(~nothing, mask), 0)
    np.testing.assert_array_equal(background_weight(nothing, np.zeros((1, 6), bool)), 0)
    np.testing.assert_array_equal(foreground_weight(nothing[:, :, :0]), 0)  # no box rows at all


def test_foreground_of_a_scene_ignores_padded_scenes_and_says_what_it_lacks():
    boxes = jax.tree.map(lambda x: np.concatenate([x, x]), make_boxes([[0, 0, 0, 1, 1, 1, 0.0]]))
    instance = np.array([[[0], [-1]]] * 2, np.int32)
    scene = make_scene(boxes, instance, mask=(True, False))
    points = jnp.zeros((2, 2, 3)), np.array([[0, 1]] * 2), np.ones((2, 2), bool)
    by_box = points_on_foreground(*points, scene)
    np.testing.assert_array_equal(by_box[..., 0], [[True, True], [False, False]])
    by_label = points_on_foreground(*points, scene, region="instances")
    np.testing.assert_array_equal(by_label[..., 0], [[True, False], [False, False]])
    with pytest.raises(ValueError, match="boxes or instances"):
        points_on_foreground(*points, scene, region="balls")
    with pytest.raises(ValueError, match=r"scene\.boxes"):
        points_on_foreground(*points, scene._replace(boxes=None))
    with pytest.raises(ValueError, match=r"scene\.point_instance"):
        points_on_foreground(*points, scene._replace(point_instance=None), region="instances")


def test_voxels_have_no_instances():
    scene = make_scene(make_boxes(np.zeros((1, 1, 7), np.float32) + 1), np.zeros((1, 3, 1), np.int32))
    xyz, mask = np.zeros((1, 2, 3), np.float32), np.ones((1, 2), bool)
    with pytest.raises(ValueError, match='offers voxels, use region "boxes"'):
        points_on_foreground(xyz, None, mask, scene, "instances")
