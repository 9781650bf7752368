import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sparse

from vrdistill_jax.geometry import voxels
from vrdistill_jax.geometry.host import voxels as host

SIZE = 0.1
CAPACITY = 320  # rows of every set on the device: one shape, compiled once
GENERATED = 8200

coarsen = jax.jit(voxels.coarsen, static_argnums=1)
generate = jax.jit(voxels.generate, static_argnums=(1, 2))
match_taps = jax.jit(voxels.match_taps, static_argnums=(2, 3))
reverse_taps = jax.jit(voxels.reverse_taps, static_argnums=1)
unique_voxels = jax.jit(voxels.unique_voxels, static_argnums=1)


def device_keys(coords):
    """Sorted key words of distinct coordinates, padded."""
    coords = np.asarray(sorted(map(tuple, coords)), np.int32).reshape(-1, 3)
    padded = np.zeros((CAPACITY, 3), np.int32)
    padded[: len(coords)] = coords
    return voxels.keys_from_coords(jnp.asarray(padded), jnp.arange(CAPACITY) < len(coords))


def host_keys(coords):
    return np.sort(host.keys_from_coords(np.asarray(list(coords), np.int32).reshape(-1, 3)))


@pytest.fixture(scope="module")
def sets():
    """Voxel sets as Python sets, with their coarser twins."""
    found = []
    for _, xyz in sparse.example_clouds(1):
        fine = set(sparse.voxelize(xyz, np.ones(len(xyz), bool), SIZE))
        found.append((fine, {tuple(c // 2 for c in at) for at in fine}))
    return [*found, (set(), set())]


def test_quantize_divides_in_float32():
    xyz = (np.arange(-3000, 3000, dtype=np.float32) * np.float32(0.01))[:, None].repeat(3, 1)
    mask = np.arange(6000) % 7 > 0
    expected = np.where(mask[:, None], np.floor(xyz / np.float32(0.03)), 0).astype(np.int32)
    assert (expected != np.floor(xyz * np.float32(1 / 0.03))).any(), "the inputs must tell the two apart"
    xyz[~mask] = np.nan
    np.testing.assert_array_equal(host.quantize(xyz, mask, 0.03), expected)
    got, inside = jax.jit(voxels.quantize, static_argnums=2)(xyz, mask, 0.03)
    np.testing.assert_array_equal(got, expected)
    assert inside


def test_far_points_are_told():
    xyz = np.array([[0, 0, 0], [0, -host.LIMIT * 0.5, 0]], np.float32)
    assert not voxels.quantize(xyz, np.ones(2, bool), 0.5)[1]
    with pytest.raises(ValueError, match="262144 voxels of 0.5 m"):
        host.quantize(xyz, np.ones(2, bool), 0.5)
    with pytest.raises(ValueError, match="nan"):
        host.quantize(np.full((1, 3), np.nan, np.float32), np.ones(1, bool), 0.5)
    assert voxels.quantize(xyz * 0.99, np.ones(2, bool), 0.5)[1]
    host.quantize(xyz * np.float32(0.99), np.ones(2, bool), 0.5)


def test_keys_sort_as_coordinates():
    random = np.random.default_rng(0)
    coords = random.integers(-5, 5, (200, 3)) * 10 ** random.integers(0, 5, (200, 3))
    coords = np.unique(coords, axis=0).astype(np.int32)  # sorted lexicographically
    assert np.abs(coords).max() < host.LIMIT
    keys = host.keys_from_coords(coords)
    assert (np.diff(keys) > 0).all()
    np.testing.assert_array_equal(host.coords_from_keys(keys), coords)
    high, low = np.asarray(
        voxels.keys_from_coords(jnp.asarray(coords), jnp.ones(len(coords), bool)), np.int64
    )
    assert (np.diff(high << 30 | low) > 0).all()
    words = np.stack([high, low]).astype(np.int32)
    np.testing.assert_array_equal(voxels.coords_from_keys(jnp.asarray(words))[0], coords)


@pytest.mark.parametrize("rows", [CAPACITY, 3])
def test_unique_voxels_keep_the_lowest_row(rows):
    for _, xyz in sparse.example_clouds(2):
        mask = np.random.default_rng(3).random(len(xyz)) < 0.8
        found = sparse.voxelize(xyz, mask, SIZE)
        coords = host.quantize(xyz, mask, SIZE)
        order = sorted(found)
        point_index = [min(found[at]) for at in order]
        voxel_index = np.full(len(xyz), -1)
        for row, at in enumerate(order):
            voxel_index[found[at]] = row
        keys, lowest, member = host.unique_voxels(coords, mask)
        np.testing.assert_array_equal(host.coords_from_keys(keys), np.reshape(order, (-1, 3)))
        np.testing.assert_array_equal(lowest, point_index)
        np.testing.assert_array_equal(member, voxel_index)

        padded, padded_mask = np.zeros((CAPACITY, 3), np.int32), np.zeros(CAPACITY, bool)
        padded[: len(xyz)], padded_mask[: len(xyz)] = coords, mask
        keys, lowest, member, needed = unique_voxels(
            voxels.keys_from_coords(jnp.asarray(padded), padded_mask), rows
        )
        kept = min(rows, len(order))
        assert needed == len(order), "an overflow is told"
        got, valid = voxels.coords_from_keys(keys)
        np.testing.assert_array_equal(valid, np.arange(rows) < kept)
        np.testing.assert_array_equal(got[:kept], np.reshape(order, (-1, 3))[:kept])
        np.testing.assert_array_equal(lowest, [*point_index[:kept], *[-1] * (rows - kept)])
        np.testing.assert_array_equal(member[: len(xyz)], np.where(voxel_index < kept, voxel_index, -1))


def test_coarser_sets(sets):
    for fine, coarse in sets:
        want = np.reshape(sorted(coarse), (-1, 3))
        np.testing.assert_array_equal(host.coords_from_keys(host.coarsen(host_keys(fine))), want)
        keys, needed = coarsen(device_keys(fine), CAPACITY)
        assert needed == len(coarse)
        np.testing.assert_array_equal(voxels.coords_from_keys(keys)[0][: len(want)], want)


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_generated_sets(sets, kernel_size):
    for fine, coarse in sets:
        made = sparse.generate({tuple(2 * c for c in at) for at in coarse}, kernel_size, 1)
        assert fine <= made, "what is added from the encoder lies inside"
        want = np.reshape(sorted(made), (-1, 3))
        np.testing.assert_array_equal(
            host.coords_from_keys(host.generate(host_keys(coarse), kernel_size)), want
        )
        keys, needed = generate(device_keys(coarse), kernel_size, GENERATED)
        assert needed == len(made)
        np.testing.assert_array_equal(voxels.coords_from_keys(keys)[0][: len(made)], want)


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_taps_match_the_dictionary(sets, kernel_size, stride):
    for fine, coarse in sets:
        targets = fine if stride == 1 else coarse
        want = sparse.kernel_map({tuple(stride * c for c in at) for at in targets}, fine, kernel_size, 1)
        got = host.match_taps(host_keys(targets), host_keys(fine), kernel_size, stride)
        np.testing.assert_array_equal(got, want)
        on_device = match_taps(device_keys(targets), device_keys(fine), kernel_size, stride)
        np.testing.assert_array_equal(on_device[: len(want)], want)
        assert (np.asarray(on_device[len(want) :]) == -1).all()


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_reverse_holds_the_same_pairs(sets, kernel_size):
    for fine, coarse in sets:
        index = host.match_taps(host_keys(coarse), host_keys(fine), kernel_size, 2)
        reverse = host.reverse_taps(index, len(fine))
        row, tap = np.nonzero(index >= 0)
        want = {(int(index[r, t]), int(r * index.shape[1] + t)) for r, t in zip(row, tap, strict=True)}
        got = {(int(u), int(reverse[u, s])) for u, s in zip(*np.nonzero(reverse >= 0), strict=True)}
        assert got == want
        padded = np.full((CAPACITY, index.shape[1]), -1, np.int32)
        padded[: len(index)] = index
        np.testing.assert_array_equal(reverse_taps(padded, CAPACITY)[: len(fine)], reverse)


def test_tiles_list_the_pairs_tap_by_tap():
    random = np.random.default_rng(5)
    tile_pairs = jax.jit(voxels.tile_pairs)
    for share in (0.0, 0.2, 0.3, 1.0):
        index = np.where(random.random((3000, 27)) < share, random.integers(0, 9000, (3000, 27)), -1).astype(
            np.int32
        )
        tiles = host.tile_pairs(index)
        row, tap = np.nonzero(index.T >= 0)[::-1]  # tap by tap
        listed = tiles.coarse >= 0
        np.testing.assert_array_equal(tiles.coarse[listed], row)
        np.testing.assert_array_equal(tiles.fine[listed], index[row, tap])
        np.testing.assert_array_equal(np.broadcast_to(tiles.tap[:, None], listed.shape)[listed], tap)
        np.testing.assert_array_equal(tiles.fine >= 0, listed)
        assert listed.any(axis=1).all(), "no empty tile"
        on_device, room = tile_pairs(index), host.tile_capacity(3000, 27)
        if share == 1.0:
            assert len(tiles.tap) > room
            assert (on_device.tap == host.TOO_MANY_PAIRS).all()
            continue
        for got, want in zip(on_device, tiles, strict=True):
            np.testing.assert_array_equal(got[: len(want)], want)
            assert (np.asarray(got[len(want) :]) == -1).all()


def test_corners_interpolate_as_the_dictionary():
    random = np.random.default_rng(4)
    stride, features = 4, random.normal(size=(200, 3))
    coords = np.unique(random.integers(-5, 5, (200, 3)), axis=0).astype(np.int32) * stride
    tensor = {tuple(at): f for at, f in zip(coords.tolist(), features, strict=False)}
    queries = random.uniform(-26, 26, (60, 3)).astype(np.float32)
    queries[:20] = np.round(queries[:20] / 2) * 2  # on the lattice or half way
    padded = np.concatenate([coords, np.zeros((5, 3), np.int32)])
    find_corners = jax.jit(voxels.find_corners, static_argnums=2)
    index, weight = find_corners(padded, np.arange(len(padded)) < len(coords), stride, queries)
    np.testing.assert_allclose(weight.sum(-1), 1.0, rtol=1e-6)
    taken = np.where(np.asarray(index)[..., None] >= 0, features[index], 0.0)
    got = (taken * np.asarray(weight)[..., None]).sum(1)
    want = np.array([np.broadcast_to(sparse.interpolate(tensor, stride, q), 3) for q in queries])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.data
def test_quantisation_equals_minkowski(shared):
    golden = np.load(shared / "golden/sparse_ops/quantize.npz")
    xyz, mask = golden["points"], np.ones(len(golden["points"]), bool)
    coords = host.quantize(xyz, mask, float(golden["voxel_size"]))
    np.testing.assert_array_equal(coords, golden["floor_coords"])
    keys, lowest, _ = host.unique_voxels(coords, mask)
    np.testing.assert_array_equal(host.coords_from_keys(keys), golden["unique_coords"][:, 1:])
    np.testing.assert_array_equal(lowest, golden["unique_index"])
