import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrdistill_jax.nn.mlp import Dense, PointMLP, linear, scale_size


def test_folded_layer_equals_inference():
    mlp = PointMLP(3, (4, 5), use_bias=True)
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    variables = mlp.init(jax.random.key(0), x, train=False)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), jnp.float32), variables)
    expected = mlp.apply(variables, x, train=False)

    def through_folded(bound):
        y = x
        for layer in bound.layers:
            kernel, bias = layer.folded()
            y = jax.nn.relu(y @ kernel + bias)
        return y

    folded = mlp.apply(variables, method=lambda bound: through_folded(bound))
    np.testing.assert_allclose(folded, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 5, 4, 3), (0, 3), (2, 4, 0)])
def test_linear_has_the_gradients_of_the_product(shape):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(shape[-1], 2)).astype(np.float32)
    (y, pull), (expected, expected_pull) = (jax.vjp(f, x, kernel) for f in (linear, jnp.matmul))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    gradient = rng.normal(size=y.shape).astype(np.float32)
    for ours, reference in zip(pull(gradient), expected_pull(gradient), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)


def test_initial_ranges_follow_pytorch():
    wide = Dense(400, 300)
    params = wide.init(jax.random.key(0), np.zeros((1, 400), np.float32))["params"]
    bound = 1 / 20  # 1 / sqrt(400)
    for value in params.values():
        assert np.abs(value).max() <= bound
        assert np.std(value) == pytest.approx(bound / np.sqrt(3), rel=0.1)
    kernel = PointMLP(400, (300,)).init(jax.random.key(0), np.zeros((1, 400), np.float32), train=False)
    kernel = kernel["params"]["layer0"]["dense"]["kernel"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / 400), rel=0.05)


def test_scale_size():
    assert scale_size(128, 0.25) == 32
    with pytest.raises(ValueError, match=r"0\.3 turns 64 channels into 19\.2"):
        scale_size(64, 0.3)
