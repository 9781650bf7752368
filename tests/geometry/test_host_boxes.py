import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import boxes as oracle

from vrdistill_jax.geometry import boxes as device
from vrdistill_jax.geometry import iou as device_iou
from vrdistill_jax.geometry.host import boxes as host


@pytest.fixture
def boxes():
    return oracle.random_boxes(np.random.default_rng(0), 40)


def test_host_results_are_float64_and_match_the_oracle(boxes):
    corners = host.corners_from_boxes(boxes.astype(np.float32))
    assert corners.dtype == np.float64
    np.testing.assert_allclose(corners, [oracle.corners(box) for box in boxes.astype(np.float32)], atol=1e-12)
    low, high = host.axis_aligned_bounds(boxes)
    np.testing.assert_allclose(low, [oracle.corners(box).min(0) for box in boxes], atol=1e-12)
    np.testing.assert_allclose(high, [oracle.corners(box).max(0) for box in boxes], atol=1e-12)


@pytest.mark.parametrize("rotated", [True, False])
def test_pairwise_iou_matches_the_oracle(boxes, rotated):
    expected = [[oracle.iou(a, b, rotated) for b in boxes[20:]] for a in boxes[:20]]
    assert np.max(expected) > 0.3
    np.testing.assert_allclose(
        host.pairwise_iou(boxes[:20], boxes[20:], rotated=rotated), expected, atol=1e-12
    )
    expected = [oracle.bev_iou(a, b, rotated) for a, b in zip(boxes[:20], boxes[20:], strict=True)]
    np.testing.assert_allclose(host.bev_iou(boxes[:20], boxes[20:], rotated=rotated), expected, atol=1e-12)


def test_no_boxes_and_no_points():
    none = np.zeros((0, 7))
    assert host.pairwise_iou(none, np.ones((3, 7))).shape == (0, 3)
    assert host.points_in_boxes(np.zeros((0, 3)), np.ones((3, 7))).shape == (0, 3)
    assert host.points_in_boxes(np.zeros((4, 3)), none).shape == (4, 0)
    assert host.corners_from_boxes(none).shape == (0, 8, 3)


def test_points_in_boxes_match_the_oracle(boxes):
    points = np.random.default_rng(1).uniform(-1, 1, (300, 3))
    depth = np.array([[oracle.signed_depth(point, box) for box in boxes] for point in points])
    np.testing.assert_array_equal(host.points_in_boxes(points, boxes), depth >= -host.FACE_MARGIN)


def test_empty_boxes():
    empty = np.array([[0.0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, -1, 1, 0.3], [0, 0, 0, -1, -1, 1, 0]])
    full = np.array([[0.0, 0, 0, 1, 1, 1, 0.3]])
    assert not host.points_in_boxes(np.zeros((1, 3)), empty).any()
    for rotated in (True, False):
        assert (host.pairwise_iou(empty, full, rotated=rotated) == 0).all()
        assert (host.pairwise_iou(full, empty, rotated=rotated) == 0).all()
        assert (host.box_iou(empty, empty, rotated=rotated) == 0).all()


@st.composite
def box_rows(draw):
    """Boxes with many coincidences: grid centres, few sizes (some empty), quarter turns and small angles."""
    center = [draw(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])) for _ in range(3)]
    size = [draw(st.sampled_from([-1.0, 0.0, 0.01, 0.5, 1.0, 2.0])) for _ in range(3)]
    yaw = draw(st.sampled_from([0.0, 1e-4, 0.3, np.pi / 4, np.pi / 2, np.pi, -np.pi, -2.5]))
    far = draw(st.sampled_from([0.0, 1000.0]))
    return np.float32([*(np.array(center) + far), *size, yaw])


pairwise_iou = jax.jit(device_iou.pairwise_iou, static_argnames="rotated")
bev_iou = jax.jit(device_iou.bev_iou, static_argnames="rotated")
points_in_boxes = jax.jit(device.points_in_boxes)


@settings(max_examples=200, deadline=None)
@given(st.lists(box_rows(), min_size=4, max_size=4))
def test_host_and_device_agree(rows):
    a, b = np.stack(rows[:2]), np.stack(rows[2:])
    on_device = jnp.asarray(a), jnp.asarray(b)
    for rotated in (True, False):
        expected = host.pairwise_iou(a, b, rotated=rotated)
        assert ((expected >= 0) & (expected <= 1)).all()
        np.testing.assert_allclose(pairwise_iou(*on_device, rotated=rotated), expected, atol=2e-6)
        bev = bev_iou(*on_device, rotated=rotated)
        np.testing.assert_allclose(bev, host.bev_iou(a, b, rotated=rotated), atol=2e-6)
    points = np.concatenate(
        [a[:, :3], b[:, :3], host.corners_from_boxes(a).reshape(-1, 3) * 0.9], dtype=np.float32
    )
    inside = points_in_boxes(jnp.asarray(points), on_device[1])
    depth = np.array([[oracle.signed_depth(point, box) for box in b] for point in points])
    # Rounding decides next to the tolerated face only; far from the origin it is coarser.
    clear = np.abs(depth + host.FACE_MARGIN) > 1e-6 * (1 + np.abs(points).max())
    np.testing.assert_array_equal(np.asarray(inside)[clear], host.points_in_boxes(points, b)[clear])
    np.testing.assert_allclose(device.axis_aligned_boxes(on_device[0]), host.axis_aligned_boxes(a), rtol=1e-5)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["rotated", "aligned"])
def test_stored_pairs(shared, kind):
    from vrdistill_jax.geometry import frames

    stored = np.load(shared / "golden/eval/eval.npz")
    a, b = (frames.boxes_from_votenet(stored[f"pairs_{kind}_boxes_{side}"], "full") for side in "ab")
    np.testing.assert_allclose(host.box_iou(a, b), stored[f"pairs_{kind}_iou3d"], atol=1e-12)
    np.testing.assert_allclose(host.bev_iou(a, b), stored[f"pairs_{kind}_iou2d"], atol=1e-12)
    if kind == "aligned":
        expected = stored[f"pairs_{kind}_calc_iou_axis_aligned"]
        np.testing.assert_allclose(host.box_iou(a, b, rotated=False), expected, atol=1e-12)
    else:
        gt, det = stored["rotated_gt"][:25, 1:8], stored["rotated_det"][:20, 1:8]
        matrix = host.pairwise_iou(*(frames.boxes_from_votenet(rows, "full") for rows in (gt, det)))
        np.testing.assert_allclose(matrix, stored["matrix_iou3d"], atol=1e-12)
