"""A ReLU taken on the other side, against the gradient of the same network with that one decision reversed."""

import jax
import jax.numpy as jnp
import numpy as np

from vrdistill_jax.interop.parity_gradients import Layer, undo_flips

ROWS, INPUTS, OUTPUTS = 40, 12, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, INPUTS))
KERNEL, BIAS = RNG.normal(size=(INPUTS, OUTPUTS)), RNG.normal(size=OUTPUTS)
SCALE = RNG.uniform(0.5, 1.5, OUTPUTS)
UPSTREAM = RNG.normal(size=(ROWS, OUTPUTS)) * (np.arange(ROWS) % 8 == 3)[:, None]  # few rows matter


def values(kernel, shift):
    linear = X @ kernel + BIAS
    normed = (linear - linear.mean(0)) / jnp.sqrt(linear.var(0) + 1e-5)
    return SCALE * normed + shift


def shift_to_zero(row, column):
    """A shift that puts the ReLU's input of one row and column almost at 0."""
    shift = 0.1 * RNG.normal(size=OUTPUTS)
    shift[column] -= float(values(KERNEL, shift)[row, column]) - 1e-7
    return shift


def gradient(shift, reversed_at=()):
    """d(sum of UPSTREAM * relu)/d kernel, with the decisions at some places reversed."""
    with jax.enable_x64(True):
        passes = np.array(values(jnp.asarray(KERNEL), shift) > 0)
        for place in reversed_at:
            passes[place] = not passes[place]
        return np.asarray(
            jax.grad(lambda k: jnp.sum(UPSTREAM * passes * values(k, shift)))(jnp.asarray(KERNEL))
        )


def test_one_decision_explains_the_difference():
    shift = shift_to_zero(3, 2)
    ours, theirs = gradient(shift), gradient(shift, [(3, 2)])
    layer = Layer(X, KERNEL, BIAS, SCALE, shift, 1e-5)
    apart = np.abs(ours - theirs).max(0) / np.abs(theirs).max()
    assert apart[2] > 0.02
    assert apart[[0, 1, 3, 4, 5]].max() == 0
    changed, flips = undo_flips(ours, theirs, layer, 1e-5, 1e-4)
    np.testing.assert_allclose(changed, theirs, atol=1e-6 * np.abs(theirs).max())
    assert [(flip.row, flip.column) for flip in flips] == [(3, 2)]
    assert flips[0].value < 1e-6


def test_other_differences_stay():
    shift = shift_to_zero(3, 2)
    ours = gradient(shift)
    layer = Layer(X, KERNEL, BIAS, SCALE, shift, 1e-5)
    # A decision far from 0, and an error in the column of an undecided one.
    far = gradient(shift, [(11, 4)])
    changed, flips = undo_flips(ours, far, layer, 1e-5, 1e-4)
    np.testing.assert_array_equal(changed, ours)
    assert not flips
    wrong = ours.copy()
    wrong[:, 2] *= 1.05
    changed, _ = undo_flips(ours, wrong, layer, 1e-5, 1e-4)
    assert np.abs(changed - wrong).max() > 0.01 * np.abs(wrong).max()


def test_columns_that_agree_are_left_alone():
    shift = shift_to_zero(3, 2)
    ours = gradient(shift)
    changed, flips = undo_flips(ours, ours + 1e-9, Layer(X, KERNEL, BIAS, SCALE, shift, 1e-5), 1e-5, 1e-4)
    np.testing.assert_array_equal(changed, ours)
    assert not flips
