import jax
import numpy as np
import pytest
from oracles import point_ops

from vrdistill_jax.geometry import sampling
from vrdistill_jax.geometry.host import sampling as host

CASES = (
    "rand37",
    "lattice37",
    "rand700",
    "lattice700",
    "rand1500",
    "lattice1500",
    "rand512",
    "lattice512",
    "dup400",
)
CASES = (*CASES, "nearorigin600")

on_device = jax.jit(sampling.sample_farthest_points, static_argnums=1, static_argnames="skip_near_origin")


@pytest.mark.parametrize("sample", [host.sample_farthest_points, on_device])
def test_hand_made_cases(sample):
    # Seven equally far points: of k = 1..7 the smallest bit-reversed number has 4 (001); then all distances
    # are 0 and the first point is the preferred one.
    tied = np.float32([[5, 0, 0]] + 7 * [[6, 0, 0]])
    np.testing.assert_array_equal(sample(tied, 4), [0, 4, 0, 0])
    # The start may be near the origin, no other; then of 2 and 3, both at distance 0, 2 has the smaller
    # reversed number.
    near = np.float32([[0, 0, 0], [0.03, 0, 0], [1, 0, 0], [0.5, 0, 0]])
    np.testing.assert_array_equal(sample(near, 4), [0, 2, 3, 2])
    np.testing.assert_array_equal(sample(near, 4, skip_near_origin=False), [0, 2, 3, 1])
    np.testing.assert_array_equal(sample(near[:2], 3), [0, 0, 0])
    np.testing.assert_array_equal(sample(near, 3, np.array([False, True, True, True])), [1, 2, 3])
    np.testing.assert_array_equal(sample(near, 3, np.zeros(4, bool)), [0, 0, 0])


@pytest.mark.parametrize("skip", [True, False])
def test_host_matches_the_thread_by_thread_transcription(skip):
    for name, xyz in point_ops.example_clouds():
        want = point_ops.sample_farthest_points(xyz, 60, skip_near_origin=skip)
        got = host.sample_farthest_points(xyz, 60, skip_near_origin=skip)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_host_matches_on_more_points_than_threads():
    for name, xyz in point_ops.example_clouds(1, sizes=(512, 1500, 3000)):
        want = point_ops.sample_farthest_points(xyz, 120)
        np.testing.assert_array_equal(host.sample_farthest_points(xyz, 120), want, err_msg=name)


def test_device_matches_host():
    for name, xyz in point_ops.example_clouds(2, sizes=(1, 50, 700)):
        for skip in (True, False):
            got = on_device(xyz, 60, skip_near_origin=skip)
            want = host.sample_farthest_points(xyz, 60, skip_near_origin=skip)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, want, err_msg=f"{name}, skip_near_origin={skip}")


def test_masked_points_are_as_if_absent():
    for name, xyz in point_ops.example_clouds(3, sizes=(1, 5, 50, 600)):
        padded, mask, rows = point_ops.hide_in_garbage(xyz, capacity=1300)
        want = rows[point_ops.sample_farthest_points(xyz, 40)]
        np.testing.assert_array_equal(host.sample_farthest_points(padded, 40, mask), want, err_msg=name)
        np.testing.assert_array_equal(on_device(padded, 40, mask), want, err_msg=name)


def test_near_origin_limit_is_the_double_one():
    # Sums around 1e-3, one float32 apart, the float just above the double 1e-3 among them. Each candidate is
    # alone with a start at the origin, so that it is picked if and only if it counts as far enough.
    limit = np.float32(1e-3)
    root = np.sqrt(limit)
    x = root + np.arange(-20, 21, dtype=np.float32)[:, None] * np.spacing(root)
    y = np.arange(0, 400, 4, dtype=np.float32)[None] * np.float32(1e-7)
    total = x * x + y * y
    assert (total == limit).any()
    assert (total == np.nextafter(limit, np.float32(0))).any()
    candidates = np.stack([*np.broadcast_arrays(x, y), np.zeros_like(total)], -1).reshape(-1, 3)
    clouds = np.stack([np.zeros_like(candidates), candidates], 1)
    want = (total.ravel().astype(np.float64) > 1e-3).astype(np.int32)
    assert 0 < want.mean() < 1
    got = jax.jit(jax.vmap(lambda cloud: sampling.sample_farthest_points(cloud, 2)[1]))(clouds)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal([host.sample_farthest_points(cloud, 2)[1] for cloud in clouds], want)


def test_squares_are_not_fused_with_sums():
    difference = np.random.default_rng(0).normal(size=(3, 1_000_000)).astype(np.float32)
    x, y, z = difference
    want = (x * x + y * y) + z * z
    exact = (difference.astype(np.float64) ** 2).sum(0).astype(np.float32)
    assert (exact != want).mean() > 0.1  # another order of rounding would show
    np.testing.assert_array_equal(jax.jit(sampling.sum_of_squares)(x, y, z), want)
    batched = jax.jit(jax.vmap(sampling.sum_of_squares))(*difference.reshape(3, 100, -1))
    np.testing.assert_array_equal(np.ravel(batched), want)


def test_invalid_arguments_are_named():
    xyz = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match="num_samples is 0"):
        host.sample_farthest_points(xyz, 0)
    with pytest.raises(ValueError, match="num_samples is 0"):
        sampling.sample_farthest_points(xyz, 0)
    with pytest.raises(ValueError, match=r"shape \(4, 2\)"):
        host.sample_farthest_points(xyz[:, :2], 2)
    with pytest.raises(ValueError, match=r"bool\[3\]"):
        host.sample_farthest_points(xyz, 2, np.ones(3, bool))


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_matches_official_kernel(shared, case):
    golden = np.load(shared / "golden/ops/ops.npz")
    xyz, want = golden[f"fps_{case}_xyz"], golden[f"fps_{case}_inds"]
    np.testing.assert_array_equal(point_ops.sample_farthest_points(xyz, len(want)), want)
    np.testing.assert_array_equal(host.sample_farthest_points(xyz, len(want)), want)
    np.testing.assert_array_equal(on_device(xyz, len(want)), want)
