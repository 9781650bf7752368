import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import point_ops

from vrdistill_jax.geometry import interpolation
from vrdistill_jax.geometry.host import interpolation as host

CASES = ("rand37", "lattice37", "rand700", "lattice700", "dup400", "nearorigin600")
BACKENDS = (host, interpolation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_by_hand(backend):
    squared = np.float32([[1, 4, 16], [0, 1, 1], [0, 0, 1], [4, np.inf, np.inf], [np.inf, np.inf, np.inf]])
    want = [[4 / 7, 2 / 7, 1 / 7], [1, 0, 0], [0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]
    got = np.asarray(backend.weigh_by_inverse_distance(squared))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("build", [host.build_interpolation, jax.jit(interpolation.build_interpolation)])
def test_matches_brute_force(build):
    for name, xyz in point_ops.example_clouds(10, sizes=(1, 2, 50)):
        fine = np.concatenate([xyz[:20], np.float32([[1, 2, 3]])])
        index, squared = point_ops.find_three_nearest(fine, xyz)
        got = build(fine, xyz)
        np.testing.assert_array_equal(got.index, index, err_msg=name)
        np.testing.assert_allclose(
            got.weight, point_ops.three_nearest_weight(squared), atol=1e-6, err_msg=name
        )
        np.testing.assert_allclose(np.sum(got.weight, -1), 1, atol=1e-6)


def test_interpolate_sums_weighted_rows():
    random = np.random.default_rng(11)
    features = random.normal(size=(2, 7, 4)).astype(np.float32)
    index = random.integers(0, 7, (2, 9, 3)).astype(np.int32)
    weight = random.random((2, 9, 3)).astype(np.float32)
    want = np.stack([np.einsum("mkc,mk->mc", features[b][index[b]], weight[b]) for b in range(2)])
    got = interpolation.interpolate(jnp.asarray(features), jnp.asarray(index), jnp.asarray(weight))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    single = interpolation.interpolate(
        jnp.asarray(features[1]), jnp.asarray(index[1]), jnp.asarray(weight[1])
    )
    np.testing.assert_array_equal(single, got[1])
    half = interpolation.interpolate(
        jnp.asarray(features, jnp.bfloat16), jnp.asarray(index), jnp.asarray(weight)
    )
    assert half.dtype == jnp.bfloat16


def test_gradient_reaches_the_features_only():
    random = np.random.default_rng(12)
    features = jnp.asarray(random.normal(size=(1, 5, 2)), jnp.float32)
    index = jnp.asarray([[[0, 1, 1], [4, 0, 2]]], jnp.int32)
    weight = jnp.asarray([[[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]]], jnp.float32)
    to_features, to_weight = jax.grad(
        lambda features, weight: interpolation.interpolate(features, index, weight).sum(), argnums=(0, 1)
    )(features, weight)
    np.testing.assert_allclose(to_features[0, :, 0], [1.0, 0.5, 0.375, 0, 0.125])
    np.testing.assert_array_equal(to_weight, 0)
    fine = jnp.zeros((1, 3), jnp.float32)  # coincides with a coarse point: no NaN through the root

    def total(fine):
        built = interpolation.build_interpolation(fine, jnp.eye(4, 3, -1))
        return interpolation.interpolate(jnp.ones((4, 1)), *built).sum()

    np.testing.assert_array_equal(jax.grad(total)(fine), 0)


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_matches_official_kernel(shared, case):
    golden = np.load(shared / "golden/ops/ops.npz")
    for backend in BACKENDS:
        built = backend.build_interpolation(golden[f"nn_{case}_unknown"], golden[f"fps_{case}_xyz"])
        np.testing.assert_allclose(built.weight, golden[f"interp_{case}_weight"], atol=1e-6)
        got = interpolation.interpolate(
            jnp.asarray(golden[f"interp_{case}_features"].T), *map(jnp.asarray, built)
        )
        np.testing.assert_allclose(got, golden[f"interp_{case}_out"].T, atol=2e-6)
