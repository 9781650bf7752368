import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import boxes as oracle

from vrdistill_jax.geometry import boxes as device
from vrdistill_jax.geometry.host import boxes as host


@pytest.fixture
def boxes():
    return oracle.random_boxes(np.random.default_rng(0), 40, spread=2.0)


def test_corners_of_a_turned_box_by_hand():
    # Length 4 along +y after a quarter turn counter-clockwise, width 2 along -x.
    corners = device.corners_from_boxes(jnp.array([10.0, 20, 30, 4, 2, 6, np.pi / 2]))
    expected = [
        [9, 22, 27],
        [11, 22, 27],
        [11, 18, 27],
        [9, 18, 27],
        [9, 22, 33],
        [11, 22, 33],
        [11, 18, 33],
        [9, 18, 33],
    ]
    np.testing.assert_allclose(corners, expected, atol=1e-5)


def test_corners_match_the_oracle(boxes):
    expected = np.stack([oracle.corners(box) for box in boxes])
    np.testing.assert_allclose(
        device.corners_from_boxes(jnp.asarray(boxes, jnp.float32)), expected, atol=1e-5
    )


def test_axis_aligned_bounds_are_those_of_the_corners(boxes):
    low, high = device.axis_aligned_bounds(jnp.asarray(boxes, jnp.float32))
    corners = np.stack([oracle.corners(box) for box in boxes])
    np.testing.assert_allclose(low, corners.min(1), atol=1e-5)
    np.testing.assert_allclose(high, corners.max(1), atol=1e-5)
    aligned = device.axis_aligned_boxes(jnp.asarray(boxes, jnp.float32))
    np.testing.assert_allclose(aligned, np.stack([oracle.axis_aligned(box) for box in boxes]), atol=1e-5)


def test_join_boxes(boxes):
    joined = device.join_boxes(
        jnp.asarray(boxes[:, :3]), jnp.asarray(boxes[:, 3:6]), jnp.asarray(boxes[:, 6])
    )
    np.testing.assert_allclose(joined, boxes, rtol=1e-6)


def test_points_in_boxes_match_the_oracle(boxes):
    points = np.random.default_rng(1).uniform(-2, 2, (500, 3))
    depth = np.array([[oracle.signed_depth(point, box) for box in boxes] for point in points])
    inside = np.asarray(
        device.points_in_boxes(jnp.asarray(points, jnp.float32), jnp.asarray(boxes, jnp.float32))
    )
    clear = np.abs(depth) > 1e-4  # float32 may go either way closer to a face
    assert clear.mean() > 0.99
    assert inside.sum() > 50
    np.testing.assert_array_equal(inside[clear], (depth > 0)[clear])


@pytest.mark.parametrize("yaw", [0.0, 0.4, np.pi / 2, -3.0])
def test_faces_edges_and_corners_belong_to_the_box(yaw):
    box = np.array([3.3, -1.7, 0.9, 1.1, 0.7, 0.3, yaw])
    steps = np.array([-1, 0, 1])
    signs = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    for scale, expected in ((1.0, True), (1.001, False)):
        local = signs * box[3:6] / 2 * scale
        x, y = np.array([oracle.rotate(p[:2], yaw) for p in local]).T
        points = np.stack([x, y, local[:, 2]], axis=-1) + box[:3]
        touching = np.abs(signs).sum(-1) > 0
        inside = device.points_in_boxes(jnp.asarray(points, jnp.float32), jnp.asarray(box[None], jnp.float32))
        assert (np.asarray(inside)[touching, 0] == expected).all()


def test_a_box_around_float32_points_holds_all_of_them():
    points = np.random.default_rng(2).uniform(-8, 8, (300, 3)).astype(np.float32)
    low, high = points.min(0), points.max(0)
    box = np.concatenate([(low + high) / 2, high - low, [0]]).astype(np.float32)[None]
    assert np.asarray(device.points_in_boxes(jnp.asarray(points), jnp.asarray(box))).all()


def test_empty_boxes_hold_nothing():
    boxes = jnp.array([[0.0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, -1, 1, 0], [0, 0, 0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(device.points_in_boxes(jnp.zeros((1, 3)), boxes), [[False, False, True]])


@pytest.mark.parametrize("count", [1, 1024, 2500])
def test_counts_are_the_sums_of_the_mask(boxes, count):
    rng = np.random.default_rng(3)
    points = jnp.asarray(rng.uniform(-2, 2, (count, 3)), jnp.float32)
    mask = jnp.asarray(rng.random(count) < 0.7)
    rows = jnp.asarray(boxes, jnp.float32)
    inside = np.asarray(device.points_in_boxes(points, rows))
    count_points = jax.jit(device.count_points_in_boxes)
    np.testing.assert_array_equal(count_points(points, rows), inside.sum(0))
    np.testing.assert_array_equal(count_points(points, rows, mask), inside[np.asarray(mask)].sum(0))


def test_padding_of_the_last_block_is_not_counted():
    # The pads of a block lie at the origin.
    around_origin = jnp.array([[0.0, 0, 0, 1, 1, 1, 0]])
    assert device.count_points_in_boxes(jnp.full((10, 3), 5.0), around_origin)[0] == 0


def test_host_and_device_share_the_corner_order(boxes):
    np.testing.assert_allclose(
        host.corners_from_boxes(boxes), device.corners_from_boxes(jnp.asarray(boxes, jnp.float32)), atol=1e-5
    )
