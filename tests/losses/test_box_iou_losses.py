import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import boxes as oracle

from vrdistill_jax.losses.box import diou_loss, iou_loss


def naive(name, a, b, rotated, reference=False):
    if name == "iou":
        return 1 - oracle.iou(a, b, rotated)
    loss = 1 - oracle.diou(a, b, rotated)
    if reference and rotated:
        loss += ((a[3] - b[3]) ** 2 - (a[2] - b[2]) ** 2) / (oracle.enclosing_size(a, b) ** 2).sum()
    return loss


@functools.cache
def compiled_gradient(name, rotated, reference):
    return jax.jit(jax.grad(lambda a, b: jnp.sum(compute(name, a, b, rotated, reference))))


def compute(name, a, b, rotated, reference=False):
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    if name == "iou":
        return iou_loss(a, b, rotated=rotated)
    return diou_loss(a, b, rotated=rotated, reference=reference)


CASES = [
    ("iou", True, False),
    ("iou", False, False),
    ("diou", True, False),
    ("diou", False, False),
    ("diou", True, True),
]


@pytest.mark.parametrize(("name", "rotated", "reference"), CASES)
def test_values_and_gradients_against_polygons(name, rotated, reference):
    rng = np.random.default_rng(0)
    a, b = (oracle.random_boxes(rng, 12, spread=0.4) for _ in range(2))
    expected = [naive(name, x, y, rotated, reference) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(compute(name, a, b, rotated, reference), expected, atol=3e-6)
    gradient = compiled_gradient(name, rotated, reference)(
        jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    )
    step = 1e-6
    for x, y, got in zip(a, b, gradient, strict=True):
        differences = [
            (naive(name, x + d, y, rotated, reference) - naive(name, x - d, y, rotated, reference))
            / (2 * step)
            for d in step * np.eye(7)
        ]
        np.testing.assert_allclose(got, differences, atol=3e-5)


def test_the_slip_concerns_turned_boxes_only():
    rng = np.random.default_rng(1)
    a, b = (oracle.random_boxes(rng, 5, spread=0.4, yaw=False) for _ in range(2))
    aligned = [compute("diou", a, b, False, reference) for reference in (True, False)]
    np.testing.assert_array_equal(*aligned)
    assert np.abs(compute("diou", a, b, True, True) - aligned[1]).max() > 1e-3


def test_equal_and_degenerate_boxes_have_finite_gradients():
    boxes = jnp.array([[0.0, 0, 0, 1, 1, 1, 0.3], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1e-9, 1, 1, 0]])
    for reference in (True, False):
        assert np.isfinite(compiled_gradient("diou", True, reference)(boxes, boxes)).all()
    assert diou_loss(boxes[0], boxes[0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.data
def test_golden_rotated_boxes(shared):
    stored = np.load(shared / "golden/tr3d_sunrgbd/units.npz")
    predicted, target = stored["rot/pred"], stored["rot/target"]
    np.testing.assert_allclose(iou_loss(predicted, target), 1 - stored["rot/iou3d"], atol=1e-5)
    np.testing.assert_allclose(diou_loss(predicted, target), stored["rot/diou_loss_true_centre"], atol=1e-5)
    reference = diou_loss(predicted, target, reference=True)
    np.testing.assert_allclose(reference, stored["rot/diou_loss_official_formula"], atol=1e-5)
    gradient = compiled_gradient("diou", True, True)(jnp.asarray(predicted), jnp.asarray(target))
    np.testing.assert_allclose(gradient, stored["rot/grad_pred_of_sum"], atol=2e-4)
