import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrdistill_jax.nn import pointnet2
from vrdistill_jax.nn.pointnet2 import FeaturePropagation, SetAbstraction, pool_extremes
from vrdistill_jax.structs import Interpolation, PyramidLevel


@pytest.fixture
def level():
    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(2, 40, 3)).astype(np.float32)
    index = rng.integers(0, 40, (2, 11))
    neighbors = rng.integers(0, 40, (2, 11, 5))
    neighbors[:, :, 3:] = neighbors[:, :, :1]  # padding by the first hit, as a ball query does
    centers = np.take_along_axis(xyz, index[..., None], 1)
    return xyz, PyramidLevel(centers, np.ones((2, 11), bool), index, index, neighbors)


def randomize(variables, seed=1):
    """Running statistics and scales of both signs, so that nothing hides behind their initial values."""
    rng = np.random.default_rng(seed)

    def draw(path, value):
        name = path[-1].key
        low = {"var": 0.5, "scale": -1.0}.get(name, -0.5)
        return jnp.asarray(rng.uniform(low, 1.5, value.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, variables)


def naive_abstraction(variables, xyz, features, level, radius, train):
    """Groups first, then every layer on every pair, then the maximum."""
    out = []
    x = np.stack(
        [
            np.concatenate([(xyz[b][level.neighbor_index[b]] - level.xyz[b][:, None]) / radius,
                            features[b][level.neighbor_index[b]]], -1)
            for b in range(len(xyz))
        ]
    )  # fmt: skip
    for name, layer in sorted(variables["params"]["mlp"].items()):
        x = x @ np.asarray(layer["dense"]["kernel"], np.float64)
        stats = variables["batch_stats"]["mlp"][name]["norm"]
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
        x = (x - mean) / np.sqrt(np.asarray(var) + 1e-5) * layer["norm"]["scale"] + layer["norm"]["bias"]
        x = np.maximum(x, 0)
        out.append((mean, var))
    return x.max(2), out


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("block", [4, 128])
def test_set_abstraction_equals_the_naive_form(level, train, block, monkeypatch):
    monkeypatch.setattr(
        pointnet2, "CENTERS_PER_BLOCK", block
    )  # 11 centres: two blocks and a remainder, or one block
    xyz, pyramid_level = level
    features = np.random.default_rng(2).normal(size=(2, 40, 6)).astype(np.float32)
    module = SetAbstraction(6, (8, 7, 9), 0.4)
    variables = randomize(module.init(jax.random.key(0), xyz, features, pyramid_level, train=False))
    y, updates = module.apply(variables, xyz, features, pyramid_level, train=train, mutable=["batch_stats"])
    expected, moments = naive_abstraction(variables, xyz, features, pyramid_level, 0.4, train)
    np.testing.assert_allclose(y, expected, atol=2e-4)
    if train:
        written = updates["batch_stats"]["mlp"]["layer2"]["norm"]
        np.testing.assert_allclose(written["mean"], moments[2][0], atol=1e-4)
        np.testing.assert_allclose(written["var"], moments[2][1] * 110 / 109, rtol=1e-4)


def test_pool_extremes_matches_max_and_min_with_gradients():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (2, 3, 6, 5)).astype(np.float32)  # small integers: many ties
    rising = np.array([True, False, True, False, True])
    weight = rng.normal(size=(2, 3, 5)).astype(np.float32)

    def reference(x):
        return jnp.sum(jnp.where(rising, jnp.max(x, 2), jnp.min(x, 2)) * weight)

    def ours(x):
        return jnp.sum(pool_extremes(x, jnp.asarray(rising)) * weight)

    assert ours(x) == reference(x)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(reference)(x), atol=1e-6)


def test_empty_features_are_allowed(level):
    xyz, pyramid_level = level
    module = SetAbstraction(0, (4,), 0.4)
    features = np.zeros((2, 40, 0), np.float32)
    variables = module.init(jax.random.key(0), xyz, features, pyramid_level, train=False)
    assert module.apply(variables, xyz, features, pyramid_level, train=False).shape == (2, 11, 4)


def test_feature_propagation_puts_coarse_before_fine():
    coarse = np.array([[[1.0], [3.0]]], np.float32)
    fine = np.array([[[10.0]]], np.float32)
    interpolation = Interpolation(np.array([[[0, 1, 0]]]), np.array([[[0.25, 0.75, 0.0]]], np.float32))
    module = FeaturePropagation(1, 1, (2,))
    mask = np.ones((1, 1), bool)
    variables = module.init(jax.random.key(0), coarse, fine, interpolation, mask, train=False)
    variables["params"]["mlp"]["layer0"]["dense"]["kernel"] = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    y = module.apply(variables, coarse, fine, interpolation, mask, train=False)
    np.testing.assert_allclose(y, [[[2.5, 10.0]]], rtol=1e-4)
