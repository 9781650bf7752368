import jax
import numpy as np
import pytest
from oracles import point_ops

from vrdistill_jax.geometry import neighbors
from vrdistill_jax.geometry.host import neighbors as host

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

ball_on_device = jax.jit(neighbors.query_ball, static_argnums=(2, 3))
three_on_device = jax.jit(neighbors.find_three_nearest)


def centers_for(xyz, count=60):
    """Points of the cloud, others between them, and some far outside of its bounding box."""
    random = np.random.default_rng(len(xyz))
    rows = random.integers(0, len(xyz), count - 20)
    far = [[-50, 0, 0], [0, 1e9, 0], [0, 0, -3e18], [7, 7, 7]]
    return np.concatenate([xyz[rows], random.normal(size=(16, 3)), far]).astype(np.float32)


@pytest.mark.parametrize("query", [host.query_ball, ball_on_device])
def test_ball_by_hand(query):
    xyz = np.float32([[9, 9, 9], [1, 0, 0], [0.5, 0, 0], [0, 0, 0], [0.25, 0, 0]])
    centers = np.float32([[0, 0, 0], [1, 0, 0], [-5, 0, 0]])
    # Index order, not nearest; 1 m away is not inside a ball of 1 m; short balls repeat their first hit.
    np.testing.assert_array_equal(query(centers, xyz, 1.0, 4), [[2, 3, 4, 2], [1, 2, 4, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(query(centers, xyz, 1.0, 2), [[2, 3], [1, 2], [0, 0]])
    mask = np.array([False, True, False, True, True])
    np.testing.assert_array_equal(query(centers, xyz, 1.0, 2, mask), [[3, 4], [1, 4], [1, 1]])
    np.testing.assert_array_equal(query(centers, xyz, 1.0, 2, np.zeros(5, bool)), np.zeros((3, 2)))


@pytest.mark.parametrize(("radius", "size"), [(0.25, 8), (0.75, 33), (3.0, 64)])
def test_ball_matches_brute_force(radius, size):
    for name, xyz in point_ops.example_clouds(4, sizes=(1, 3, 50, 700)):
        centers = centers_for(xyz)
        want = point_ops.query_ball(centers, xyz, radius, size)
        got = host.query_ball(centers, xyz, radius, size)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want, err_msg=name)
        got = ball_on_device(centers, xyz, radius, size)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_ball_on_a_larger_cloud():
    for name, xyz in point_ops.example_clouds(5, sizes=(5000,)):
        centers = np.concatenate([centers_for(xyz), xyz[:300]])
        want = point_ops.query_ball(centers, xyz, 0.25, 16)
        np.testing.assert_array_equal(host.query_ball(centers, xyz, 0.25, 16), want, err_msg=name)
        np.testing.assert_array_equal(ball_on_device(centers, xyz, 0.25, 16), want, err_msg=name)


def test_ball_distances_are_rounded_as_the_kernel_does():
    # Half a million pairs within a few roundings of the radius: a fused product would put some on the other
    # side.
    random = np.random.default_rng(6)
    direction = random.normal(size=(700, 3))
    xyz = (0.4 * direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)
    centers = random.normal(size=(700, 3)).astype(np.float32) * np.float32(1e-7)
    distance = point_ops.squared_distance(centers, xyz)
    limit = np.float32(0.4) * np.float32(0.4)
    exact = ((xyz[None].astype(np.float64) - centers[:, None]) ** 2).sum(-1).astype(np.float32)
    assert ((exact < limit) != (distance < limit)).mean() > 0.01
    want = point_ops.query_ball(centers, xyz, 0.4, 700)
    np.testing.assert_array_equal(host.query_ball(centers, xyz, 0.4, 700), want)
    np.testing.assert_array_equal(ball_on_device(centers, xyz, 0.4, 700), want)


def test_masked_points_are_as_if_absent():
    for name, xyz in point_ops.example_clouds(7, sizes=(1, 5, 50, 600)):
        padded, mask, rows = point_ops.hide_in_garbage(xyz, capacity=1300)
        centers = centers_for(xyz)
        want = rows[point_ops.query_ball(centers, xyz, 0.5, 16)]
        np.testing.assert_array_equal(host.query_ball(centers, padded, 0.5, 16, mask), want, err_msg=name)
        np.testing.assert_array_equal(ball_on_device(centers, padded, 0.5, 16, mask), want, err_msg=name)
        index, squared = point_ops.find_three_nearest(centers, xyz)
        for find in (host.find_three_nearest, three_on_device):
            got_index, got_squared = find(centers, padded, mask)
            np.testing.assert_array_equal(got_index, rows[index], err_msg=name)
            np.testing.assert_array_equal(got_squared, squared, err_msg=name)


@pytest.mark.parametrize("find", [host.find_three_nearest, three_on_device])
def test_three_nearest_by_hand(find):
    sources = np.float32([[2, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, 1]])
    index, squared = find(np.float32([[0, 0, 0], [2, 0, 0]]), sources)
    np.testing.assert_array_equal(index, [[1, 2, 3], [0, 1, 3]])  # the lower row first among equals
    np.testing.assert_array_equal(squared, [[1, 1, 1], [0, 1, 5]])
    index, squared = find(np.float32([[0, 0, 0]]), sources, np.array([False, False, True, True, False]))
    np.testing.assert_array_equal(index, [[2, 3, 2]])
    np.testing.assert_array_equal(squared, [[1, 1, np.inf]])
    index, squared = find(np.float32([[0, 0, 0]]), sources, np.zeros(5, bool))
    np.testing.assert_array_equal(index, [[0, 0, 0]])
    np.testing.assert_array_equal(squared, np.full((1, 3), np.inf))


def test_three_nearest_matches_brute_force():
    for name, xyz in point_ops.example_clouds(8, sizes=(1, 2, 3, 50, 700)):
        queries = np.concatenate([xyz[:300], np.float32([[5, 5, 5]])])
        index, squared = point_ops.find_three_nearest(queries, xyz)
        for find in (host.find_three_nearest, three_on_device):
            got_index, got_squared = find(queries, xyz)
            assert got_index.dtype == np.int32
            assert got_squared.dtype == np.float32
            np.testing.assert_array_equal(got_index, index, err_msg=name)
            np.testing.assert_array_equal(got_squared, squared, err_msg=name)


def test_a_million_host_distances_are_not_fused():
    random = np.random.default_rng(9)
    queries, sources = random.normal(size=(340_000, 3)), random.normal(size=(3, 3))
    queries, sources = queries.astype(np.float32), sources.astype(np.float32)
    want = np.sort(point_ops.squared_distance(queries, sources), axis=1)
    np.testing.assert_array_equal(host.find_three_nearest(queries, sources)[1], want)


def test_invalid_arguments_are_named():
    xyz = np.zeros((4, 3), np.float32)
    for module in (host, neighbors):
        with pytest.raises(ValueError, match="radius is 0"):
            module.query_ball(xyz, xyz, 0.0, 2)
        with pytest.raises(ValueError, match="num_neighbors 0"):
            module.query_ball(xyz, xyz, 1.0, 0)


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_matches_official_kernels(shared, case):
    golden = np.load(shared / "golden/ops/ops.npz")
    xyz = golden[f"fps_{case}_xyz"]
    centers, want = golden[f"ball_{case}_centers"], golden[f"ball_{case}_idx"]
    radius, size = golden[f"ball_{case}_radius_nsample"]
    np.testing.assert_array_equal(host.query_ball(centers, xyz, float(radius), int(size)), want)
    np.testing.assert_array_equal(ball_on_device(centers, xyz, float(radius), int(size)), want)
    unknown, index, squared = (golden[f"nn_{case}_{name}"] for name in ("unknown", "idx", "dist2"))
    for find in (host.find_three_nearest, three_on_device):
        got_index, got_squared = find(unknown, xyz)
        np.testing.assert_array_equal(got_index, index)
        np.testing.assert_array_equal(got_squared, squared)
