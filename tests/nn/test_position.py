import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrdistill_jax.nn.position import (
    MIN_EXTENT,
    FourierPosition,
    LearnedPosition,
    find_bounds,
    normalize_coordinates,
)


def test_fourier_code_is_sines_then_cosines_of_its_projections():
    x = np.random.default_rng(0).random((2, 5, 3)).astype(np.float32)
    code = FourierPosition(8)
    variables = code.init(jax.random.key(0), x)
    assert set(variables) == {"batch_stats"}  # nothing to learn
    phase = 2 * np.pi * x @ np.asarray(variables["batch_stats"]["frequencies"])
    np.testing.assert_allclose(
        code.apply(variables, x), np.concatenate([np.sin(phase), np.cos(phase)], -1), atol=1e-5
    )
    assert variables["batch_stats"]["frequencies"].shape == (3, 4)
    again = code.init(jax.random.key(1), x)["batch_stats"]["frequencies"]
    assert np.abs(again - variables["batch_stats"]["frequencies"]).max() > 0.1
    assert not np.asarray(jax.grad(lambda x: jnp.sum(code.apply(variables, x)))(x)).any()


def test_frequencies_are_normally_distributed():
    frequencies = FourierPosition(4000).init(jax.random.key(0), jnp.zeros((1, 1, 3)))["batch_stats"][
        "frequencies"
    ]
    assert abs(float(frequencies.mean())) < 0.05
    assert abs(float(frequencies.std()) - 1) < 0.05


def test_an_odd_fourier_code_is_refused():
    with pytest.raises(ValueError, match="7 channels are odd"):
        FourierPosition(7).init(jax.random.key(0), jnp.zeros((1, 1, 3)))


def test_learned_position_ignores_pads():
    x = np.random.default_rng(0).normal(size=(1, 6, 6)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 0, 0]], bool)
    layer = LearnedPosition(6, 8)
    variables = jax.jit(lambda key: layer.init(key, x, mask, train=False))(jax.random.key(0))
    apply = jax.jit(lambda rows: layer.apply(variables, rows, mask, train=True, mutable=["batch_stats"]))
    dirty = np.where(mask[..., None], x, 99.0)
    (clean, stats), (other, other_stats) = (apply(rows) for rows in (x, dirty))
    np.testing.assert_allclose(clean[:, :4], other[:, :4], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stats, other_stats)
    hidden = variables["params"]["hidden"]["dense"]
    values = x[0, :4] @ np.asarray(hidden["kernel"]) + np.asarray(hidden["bias"])
    values = np.maximum((values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5), 0)
    out = variables["params"]["out"]
    np.testing.assert_allclose(
        clean[0, :4], values @ np.asarray(out["kernel"]) + np.asarray(out["bias"]), atol=1e-5
    )


def test_bounds_are_those_of_valid_points():
    xyz = np.array([[[0, 1, 5], [2, -1, 5], [9, 9, 9]], [[1, 1, 1], [2, 2, 2], [3, 3, 3]]], np.float32)
    low, high = find_bounds(xyz, np.array([[1, 1, 0], [0, 0, 0]], bool))
    np.testing.assert_array_equal(low, [[0, -1, 5], [0, 0, 0]])
    np.testing.assert_allclose(high, [[2, 1, 5 + MIN_EXTENT], [MIN_EXTENT] * 3], rtol=1e-6)
    at = normalize_coordinates(xyz[:1], low[:1], high[:1])
    np.testing.assert_allclose(at[0, :2], [[0, 1, 0], [1, 0, 0]], atol=1e-6)
