"""Focal, quality focal and varifocal loss: formulas, gradients, and the divisor that they share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrdistill_jax.losses import classification


def inputs(seed=0, count=30, classes=4):
    rng = np.random.default_rng(seed)
    label = rng.integers(-1, classes, count).astype(np.int32)
    quality = np.where(label >= 0, rng.uniform(0.05, 1, count), 0).astype(np.float32)
    return rng.normal(0, 3, (count, classes)).astype(np.float32), label, quality


def naive(name, logits, label, quality):
    """The papers' formulas in float64, entry by entry."""
    result = np.zeros(logits.shape)
    for row, k in np.ndindex(*logits.shape):
        p = 1 / (1 + np.exp(-float(logits[row, k])))
        is_class, q = k == label[row], float(quality[row]) if k == label[row] else 0.0
        if name == "focal":
            p_t, alpha = (p, 0.25) if is_class else (1 - p, 0.75)
            result[row, k] = -alpha * (1 - p_t) ** 2 * np.log(p_t)
        elif name == "qfl":
            result[row, k] = -(abs(q - p) ** 2) * ((1 - q) * np.log(1 - p) + q * np.log(p))
        elif q > 0:
            result[row, k] = -q * (q * np.log(p) + (1 - q) * np.log(1 - p))
        else:
            result[row, k] = -0.75 * p**2 * np.log(1 - p)
    return result


LOSSES = {
    "focal": lambda z, label, quality: classification.focal_loss(z, label),
    "qfl": classification.quality_focal_loss,
    "vfl": classification.varifocal_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_matches_the_formula(name):
    logits, label, quality = inputs()
    got = LOSSES[name](logits, label, quality)
    assert got.shape == logits.shape
    np.testing.assert_allclose(got, naive(name, logits, label, quality), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_against_finite_differences(name):
    logits, label, quality = inputs(1, 5, 3)
    gradient = jax.grad(lambda z: jnp.sum(LOSSES[name](z, label, quality)))(logits)
    step = 1e-5
    for row, k in np.ndindex(*logits.shape):
        move = np.zeros(logits.shape)
        move[row, k] = step
        up, down = (naive(name, logits.astype(float) + s * move, label, quality).sum() for s in (1, -1))
        assert gradient[row, k] == pytest.approx((up - down) / (2 * step), abs=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_finite_at_extreme_scores(name):
    logits, label, quality = inputs()
    for scale in (0.0, 1e3):
        value, gradient = jax.value_and_grad(lambda z: jnp.sum(LOSSES[name](z, label, quality)))(
            logits * scale
        )
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_a_perfect_score_costs_nothing():
    logits = np.array([[20.0, -20.0]], np.float32)
    for loss in LOSSES.values():
        assert np.abs(loss(logits, np.array([0]), np.array([1.0], np.float32))).max() < 1e-6


def test_sum_per_positive():
    values = jnp.asarray([[1.0, 2.0, jnp.nan], [4.0, 8.0, 16.0]])
    mask = jnp.asarray([[True, True, False], [True, True, True]])
    positive = jnp.asarray([[True, False, True], [False, True, False]])
    assert classification.sum_per_positive(values, mask, positive) == pytest.approx(31 / 2)
    assert classification.sum_per_positive(values, mask, jnp.zeros_like(mask)) == pytest.approx(31.0)
    gradient = jax.grad(lambda v: classification.sum_per_positive(v, mask, positive))(values)
    np.testing.assert_allclose(gradient, np.where(mask, 0.5, 0.0))


def test_sum_per_positive_over_devices_equals_the_whole_batch():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(4, 6)).astype(np.float32)
    mask, positive = rng.random((4, 6)) < 0.8, rng.random((4, 6)) < 0.3
    positive[2] = False  # a device without any

    def share(v, m, p):
        return jax.lax.pmean(classification.sum_per_positive(v, m, p, "devices"), "devices")

    mapped = jax.vmap(share, axis_name="devices")(values, mask, positive)
    np.testing.assert_allclose(mapped, classification.sum_per_positive(values, mask, positive), rtol=1e-5)
