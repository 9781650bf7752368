import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrdistill_jax.nn.norm import MaskedBatchNorm, update_running


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(3.0, 2.0, (5, 7, 4)).astype(np.float32), rng.random((5, 7)) < 0.6


def run(x, mask, train, variables=None, **kwargs):
    layer = MaskedBatchNorm(size=4)
    variables = variables or layer.init(jax.random.key(0), x, train=False)
    return layer.apply(variables, x, mask, train=train, mutable=["batch_stats"], **kwargs)


def test_training_matches_numpy_over_valid_rows(rows):
    x, mask = rows
    y, updates = run(x, jnp.asarray(mask), True)
    valid = x[mask]
    expected = (x - valid.mean(0)) / np.sqrt(valid.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], valid.mean(0), atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], valid.var(0, ddof=1), rtol=1e-5)


def test_mask_constant_along_an_axis_counts_every_row(rows):
    x, mask = rows
    _, per_row = run(x, jnp.broadcast_to(mask[:, :1], (5, 7)), True)
    _, constant = run(x, jnp.asarray(mask[:, :1]), True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), per_row, constant)


def test_garbage_in_pads_changes_nothing(rows):
    x, mask = rows
    garbage = np.where(mask[..., None], x, np.nan)
    clean, stats = run(x, jnp.asarray(mask), True)
    dirty, dirty_stats = run(garbage, jnp.asarray(mask), True)
    np.testing.assert_array_equal(clean[mask], dirty[mask])
    jax.tree.map(np.testing.assert_array_equal, stats, dirty_stats)


def test_all_masked_keeps_running_statistics_and_finite_gradients(rows):
    x, _ = rows
    none = jnp.zeros((5, 7), bool)
    variables = {
        "params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "batch_stats": {"mean": jnp.full(4, 2.0), "var": jnp.full(4, 3.0)},
    }
    y, updates = run(x, none, True, variables)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(updates["batch_stats"]["mean"], 2.0)
    np.testing.assert_array_equal(updates["batch_stats"]["var"], 3.0)
    gradient = jax.grad(lambda x: run(x, none, True, variables)[0].sum())(jnp.asarray(x))
    assert np.isfinite(gradient).all()


def test_inference_uses_running_statistics(rows):
    x, mask = rows
    variables = {
        "params": {"scale": jnp.full(4, 0.5), "bias": jnp.ones(4)},
        "batch_stats": {"mean": jnp.full(4, 2.0), "var": jnp.full(4, 4.0)},
    }
    y, updates = run(x, jnp.asarray(mask), False, variables)
    np.testing.assert_allclose(y, 0.5 * (x - 2.0) / np.sqrt(4.0 + 1e-5) + 1.0, atol=1e-5)
    np.testing.assert_array_equal(updates["batch_stats"]["mean"], 2.0)


def test_statistics_of_another_array(rows):
    x, mask = rows
    pooled, _ = run(x.max(1), jnp.asarray(mask), True, statistics_of=jnp.asarray(x))
    everything, _ = run(x, jnp.asarray(mask), True)
    np.testing.assert_allclose(pooled, np.asarray(everything).max(1), atol=1e-6)


def test_update_running_is_pytorchs_momentum():
    running, batch = {"a": jnp.asarray([1.0])}, {"a": jnp.asarray([3.0])}
    np.testing.assert_allclose(update_running(running, batch, 0.25)["a"], [1.5])
