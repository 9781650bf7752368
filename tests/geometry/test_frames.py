import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import boxes as oracle

from vrdistill_jax.geometry import frames
from vrdistill_jax.geometry.host import boxes as host

PI32 = np.float32(np.pi)


def test_wrap_yaw_stays_in_range_and_keeps_the_direction():
    yaw = np.random.default_rng(0).uniform(-50, 50, 10000)
    for values, tolerance in (
        (yaw, 1e-12),
        (yaw.astype(np.float32), 2e-5),
        (jnp.asarray(yaw, jnp.float32), 2e-5),
    ):
        wrapped = np.asarray(frames.wrap_yaw(values))
        assert wrapped.dtype == values.dtype
        assert ((wrapped >= -np.pi - 1e-6) & (wrapped < np.pi + 1e-6)).all()
        np.testing.assert_allclose(np.cos(wrapped), np.cos(yaw), atol=tolerance)
        np.testing.assert_allclose(np.sin(wrapped), np.sin(yaw), atol=tolerance)


def test_wrap_yaw_at_and_next_to_the_ends():
    below = np.nextafter(PI32, np.float32(0))
    ends = np.array([PI32, -PI32, below, -below, np.nextafter(PI32, np.float32(4)), 3 * PI32, 0], np.float32)
    for wrapped in (frames.wrap_yaw(ends), np.asarray(frames.wrap_yaw(jnp.asarray(ends)))):
        assert ((wrapped >= -PI32) & (wrapped < PI32)).all()
        assert wrapped[0] == -PI32
        np.testing.assert_array_equal(wrapped[[1, 2, 3, 6]], ends[[1, 2, 3, 6]])


def test_wrap_yaw_next_to_odd_multiples_of_pi():
    # The quotient and the difference round differently, so either end may be overshot by a step.
    yaw = np.float32(np.pi) * np.arange(-41, 42, 2, dtype=np.float32)
    for _ in range(6):
        yaw = np.unique([yaw, np.nextafter(yaw, np.float32(-999)), np.nextafter(yaw, np.float32(999))])
    for wrapped in (frames.wrap_yaw(yaw), np.asarray(frames.wrap_yaw(jnp.asarray(yaw)))):
        assert ((wrapped >= -PI32) & (wrapped < PI32)).all()
        np.testing.assert_allclose(np.cos(wrapped), -1, atol=1e-6)


def test_votenet_heading_runs_clockwise():
    # Heading 90 degrees points along -y.
    yaw = frames.yaw_from_votenet_heading(np.array([np.pi / 2]))
    np.testing.assert_allclose(yaw, [-np.pi / 2])
    np.testing.assert_allclose(frames.votenet_heading_from_yaw(yaw), [np.pi / 2])


@pytest.mark.parametrize("kind", ["full", "half"])
def test_votenet_round_trip(kind):
    boxes = oracle.random_boxes(np.random.default_rng(1), 50)
    there = frames.votenet_from_boxes(boxes, kind)
    np.testing.assert_allclose(frames.boxes_from_votenet(there, kind), boxes, atol=1e-12)
    np.testing.assert_allclose(there[:, 3:6], boxes[:, 3:6] / (2 if kind == "half" else 1))
    np.testing.assert_allclose(there[:, 6], -boxes[:, 6], atol=1e-12)
    on_device = frames.boxes_from_votenet(jnp.asarray(there, jnp.float32), kind)
    assert isinstance(on_device, jax.Array)
    np.testing.assert_allclose(on_device, boxes, atol=1e-5)


@pytest.mark.parametrize("origin", ["bottom", "gravity"])
def test_mmdet3d_round_trip(origin):
    boxes = oracle.random_boxes(np.random.default_rng(2), 50)
    there = frames.mmdet3d_from_boxes(boxes, origin)
    np.testing.assert_allclose(frames.boxes_from_mmdet3d(there, origin), boxes, atol=1e-12)
    np.testing.assert_allclose(there[:, 6], boxes[:, 6], atol=1e-12)
    lift = boxes[:, 5] / 2 if origin == "bottom" else 0
    np.testing.assert_allclose(there[:, 2] + lift, boxes[:, 2])


def test_camera_frame():
    xyz = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(frames.camera_from_depth(xyz), [[1, -3, 2]])
    np.testing.assert_array_equal(frames.depth_from_camera(frames.camera_from_depth(xyz)), xyz)


def test_conversions_run_under_jit_and_grad():
    boxes = jnp.asarray(oracle.random_boxes(np.random.default_rng(3), 4), jnp.float32)
    gradient = jax.jit(jax.grad(lambda b: frames.boxes_from_votenet(b, "half").sum()))(boxes)
    np.testing.assert_allclose(gradient, np.tile([1, 1, 1, 2, 2, 2, -1], (4, 1)))


def test_unknown_kinds_are_refused():
    boxes = np.zeros((1, 7))
    with pytest.raises(ValueError, match="'full' or 'half'"):
        frames.boxes_from_votenet(boxes, "double")
    with pytest.raises(ValueError, match="'bottom' or 'gravity'"):
        frames.mmdet3d_from_boxes(boxes, "top")


def test_frames_and_host_import_no_jax():
    code = (
        "import sys; import vrdistill_jax.geometry.frames, vrdistill_jax.geometry.host.boxes;"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["rotated", "aligned"])
def test_official_corners(shared, kind):
    stored = np.load(shared / "golden/eval/eval.npz")
    boxes = frames.boxes_from_votenet(stored[f"{kind}_gt"][:, 1:8], "full")
    ours = frames.camera_from_depth(host.corners_from_boxes(boxes))
    np.testing.assert_allclose(ours, stored[f"{kind}_gt_corners"], atol=1e-12)
