import jax
import jax.numpy as jnp
import numpy as np

from vrdistill_jax.losses.reduction import masked_mean


def test_ignores_masked_entries_even_nan():
    values = jnp.asarray([1.0, jnp.nan, 3.0])
    mask = jnp.asarray([True, False, True])
    np.testing.assert_allclose(masked_mean(values, mask), 2.0, rtol=1e-5)
    gradient = jax.grad(lambda v: masked_mean(v, mask))(values)
    np.testing.assert_allclose(gradient, [0.5, 0.0, 0.5], rtol=1e-5)


def test_empty_mask_gives_zero():
    assert masked_mean(jnp.ones(3), jnp.zeros(3, bool)) == 0.0


def test_mean_over_devices_equals_the_whole_batch():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(4, 5)).astype(np.float32), rng.random((4, 5)) < 0.5
    mask[1] = False  # a device without any valid entry

    def share(v, m):
        value, gradient = jax.value_and_grad(lambda v: masked_mean(v, m, "devices"))(v)
        return jax.lax.pmean(value, "devices"), gradient / 4

    mapped, gradient = jax.vmap(share, axis_name="devices")(values, mask)
    whole, whole_gradient = jax.value_and_grad(lambda v: masked_mean(v, jnp.asarray(mask)))(
        jnp.asarray(values)
    )
    np.testing.assert_allclose(mapped, whole, rtol=1e-5)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-5, atol=1e-7)
