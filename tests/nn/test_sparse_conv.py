import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sparse

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.geometry.host.voxel_pyramid import (
    build_voxel_pyramid,
    pad_voxel_pyramid,
)
from vrdistill_jax.geometry.voxels import find_corners
from vrdistill_jax.nn import sparse_conv, sparse_products
from vrdistill_jax.nn.mlp import Dense
from vrdistill_jax.nn.norm import MaskedBatchNorm, update_running
from vrdistill_jax.structs import (
    GeneratedLevelConfig,
    KernelMap,
    PairTiles,
    VoxelLevelConfig,
    VoxelPyramidConfig,
)

# Levels: 0-2 of the encoder (strides 1, 2, 4); 3 and 4 generated from 1 (to stride 1), 5 from 2 (to stride 2).
CONFIG = VoxelPyramidConfig(
    1.0,
    (VoxelLevelConfig(True), VoxelLevelConfig(True, True, True), VoxelLevelConfig(True, True, True)),
    (GeneratedLevelConfig(1, 3), GeneratedLevelConfig(1, 2), GeneratedLevelConfig(2, 3)),
)


CAPACITIES = (45, 40, 12, 900, 320, 160)  # of the random clouds below: always the same shapes, compiled once


def pyramid_of(coords, capacities=CAPACITIES, config=CONFIG):
    """The pyramid of integer coordinates (scene, x, y, z), padded; capacities None for five pads a level."""
    scenes = [coords[coords[:, 0] == b, 1:] + np.float32(0.5) for b in range(coords[:, 0].max() + 1)]
    built = [build_voxel_pyramid(xyz.astype(np.float32), np.ones(len(xyz), bool), config) for xyz in scenes]
    if capacities is None:
        capacities = [max(len(p.levels[i].mask) for p in built) + 5 for i in range(len(built[0].levels))]
    built = [pad_voxel_pyramid(p._replace(voxel_index=None), capacities, config) for p in built]
    return stack_trees(built)


def rows_of(level, array):
    """Padded [B, V, C] -> valid rows, scene after scene."""
    return np.asarray(array)[np.asarray(level.mask)]


def padded_rows(level, rows):
    """Valid rows -> padded, with garbage in the pads."""
    out = np.full((*level.mask.shape, rows.shape[-1]), 1e3, np.float32)
    out[level.mask] = rows
    return jnp.asarray(out)


def random_coords(seed, count=60, extent=4):
    random = np.random.default_rng(seed)
    coords = np.concatenate(
        [random.integers(0, 2, (count, 1)), random.integers(-extent, extent, (count, 3))], 1
    )
    return np.unique(coords, axis=0)


MAPS = {  # name: (level read, level written, the map, of the level written unless transposed, kernel size)
    "same3": (0, 0, lambda lv: lv[0].same3, 3),
    "down2": (0, 1, lambda lv: lv[1].down2, 2),
    "down3": (0, 1, lambda lv: lv[1].down3, 3),
    "down3_next": (1, 2, lambda lv: lv[2].down3, 3),
    "center_of_3": (0, 1, lambda lv: sparse_conv.center_tap(lv[1].down3), 1),
    "center_of_2": (0, 1, lambda lv: sparse_conv.center_tap(lv[1].down2), 1),
}
TRANSPOSED = {
    "up3": (1, 3, lambda lv: lv[3].up, 3),
    "up2": (1, 4, lambda lv: lv[4].up, 2),
    "up3_next": (2, 5, lambda lv: lv[5].up, 3),
    "back3": (1, 0, lambda lv: lv[1].down3, 3),
    "back2": (1, 0, lambda lv: lv[1].down2, 2),
}
STRIDES = (1, 2, 4, 1, 1, 2)


def tensors_of(level, rows):
    """One dictionary per scene."""
    mask, first, out = np.asarray(level.mask), 0, []
    for coords, valid in zip(np.asarray(level.coords), mask, strict=True):
        at = [tuple(c) for c in coords[valid].tolist()]
        out.append(dict(zip(at, rows[first : first + len(at)].astype(np.float64), strict=True)))
        first += len(at)
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows with a remainder, even for tiny levels."""
    monkeypatch.setattr(sparse_products, "BLOCK_VALUES", {"cpu": 27 * 3 * 17})


@pytest.mark.parametrize("name", [*MAPS, *TRANSPOSED])
def test_convolutions_equal_the_dictionary(name, small_blocks):
    transposed = name in TRANSPOSED
    source, target, find_map, size = (TRANSPOSED if transposed else MAPS)[name]
    random = np.random.default_rng(1)
    kernel = random.normal(size=(size**3, 3, 4))
    for seed in range(2):
        levels = pyramid_of(random_coords(seed)).levels
        rows = random.normal(size=(int(levels[source].mask.sum()), 3))
        apply = sparse_conv.convolve_transposed if transposed else sparse_conv.convolve
        x = padded_rows(levels[source], rows)
        y = apply(x, jnp.asarray(kernel, jnp.float32), find_map(levels))
        assert (np.asarray(y)[~levels[target].mask] == 0).all(), "pads stay zero"
        naive = sparse.convolve_transposed if transposed else sparse.convolve
        stride = STRIDES[target if transposed else source]
        want = [
            sparse.rows_of(naive(tensor, kernel, targets, stride), 4)
            for tensor, targets in zip(
                tensors_of(levels[source], rows),
                tensors_of(levels[target], rows_of(levels[target], y)),
                strict=True,
            )
        ]
        np.testing.assert_allclose(rows_of(levels[target], y), np.concatenate(want), atol=1e-4)


@pytest.mark.parametrize("name", [*MAPS, *TRANSPOSED])
def test_gradients_are_summed_pair_by_pair(name, small_blocks):
    transposed = name in TRANSPOSED
    source, target, find_map, size = (TRANSPOSED if transposed else MAPS)[name]
    levels = pyramid_of(random_coords(3)).levels
    random = np.random.default_rng(2)
    kernel = random.normal(size=(size**3, 3, 4)).astype(np.float32)
    x = random.normal(size=(*levels[source].mask.shape, 3)).astype(np.float32)
    weight = random.normal(size=(*levels[target].mask.shape, 4)).astype(np.float32)
    kernel_map = find_map(levels)

    want_x, want_kernel = np.zeros(x.shape), np.zeros(kernel.shape)
    for b, row, tap in zip(*np.nonzero(np.asarray(kernel_map.index) >= 0), strict=True):
        other = int(kernel_map.index[b, row, tap])
        u, v = (row, other) if transposed else (other, row)
        want_x[b, u] += kernel[tap] @ weight[b, v]
        want_kernel[tap] += np.outer(x[b, u], weight[b, v])

    @jax.jit
    def gradients(x, kernel):
        apply = sparse_conv.convolve_transposed if transposed else sparse_conv.convolve
        return jax.grad(lambda x, kernel: jnp.sum(apply(x, kernel, kernel_map) * weight), (0, 1))(x, kernel)

    dx, dkernel = gradients(x, kernel)
    np.testing.assert_allclose(dx, want_x, atol=1e-4)
    np.testing.assert_allclose(dkernel, want_kernel, atol=1e-4)


@pytest.mark.parametrize("name", ["same3", "down2", "down3"])
def test_max_pool_equals_the_dictionary(name):
    source, target, find_map, size = MAPS[name]
    levels = pyramid_of(random_coords(4)).levels
    random = np.random.default_rng(5)
    rows = random.integers(-5, 0, (int(levels[source].mask.sum()), 3)).astype(
        np.float32
    )  # negative, many ties
    x, kernel_map = padded_rows(levels[source], rows), find_map(levels)
    y = sparse_conv.max_pool(x, kernel_map)
    assert (np.asarray(y)[~levels[target].mask] == 0).all()
    targets = tensors_of(levels[target], rows_of(levels[target], y))
    want = [
        sparse.rows_of(sparse.max_pool(tensor, size, at, STRIDES[source]))
        for tensor, at in zip(tensors_of(levels[source], rows), targets, strict=True)
    ]
    np.testing.assert_array_equal(rows_of(levels[target], y), np.concatenate(want))

    weight = random.normal(size=y.shape).astype(np.float32)
    dx = np.asarray(jax.grad(lambda x: jnp.sum(sparse_conv.max_pool(x, kernel_map) * weight))(x))
    expected = np.zeros_like(x)
    for b, v in zip(*np.nonzero(levels[target].mask), strict=True):
        taps = kernel_map.index[b, v][kernel_map.index[b, v] >= 0]
        for c in range(3):
            expected[b, taps[np.argmax(np.asarray(x)[b, taps, c])], c] += weight[
                b, v, c
            ]  # the first of equals
    np.testing.assert_allclose(dx, expected, atol=1e-5)


def test_skip_adds_over_the_union():
    levels = pyramid_of(random_coords(6)).levels
    random = np.random.default_rng(7)
    encoder, generated = levels[1], levels[5]
    a = random.normal(size=(int(encoder.mask.sum()), 2)).astype(np.float32)
    b = random.normal(size=(int(generated.mask.sum()), 2)).astype(np.float32)
    x = padded_rows(encoder, a)
    y = padded_rows(generated, b) + sparse_conv.take_skip(x, generated.skip)
    pairs = zip(tensors_of(encoder, a), tensors_of(generated, b), strict=True)
    want = np.concatenate([sparse.rows_of(sparse.add(p, q)) for p, q in pairs])
    np.testing.assert_allclose(rows_of(generated, y), want, atol=1e-6)
    weight = random.normal(size=y.shape).astype(np.float32)
    dx = jax.grad(lambda x: jnp.sum(sparse_conv.take_skip(x, generated.skip) * weight))(x)
    row = generated.skip.index[..., 0]
    dense = np.zeros(x.shape, np.float32)
    for b, v in zip(*np.nonzero(row >= 0), strict=True):
        dense[b, row[b, v]] += weight[b, v]
    np.testing.assert_allclose(dx, dense, atol=1e-6)
    assert np.abs(dx).sum() > 0


def test_more_padding_changes_nothing(small_blocks):
    coords = random_coords(8)
    random = np.random.default_rng(9)
    kernel = jnp.asarray(random.normal(size=(27, 3, 4)), jnp.float32)
    results = []
    for extra in (0, 40):
        exact = [level.mask.sum(1).max() + extra for level in pyramid_of(coords, None).levels]
        levels = pyramid_of(coords, exact).levels
        x = padded_rows(levels[0], np.random.default_rng(10).normal(size=(len(coords), 3)))
        y = sparse_conv.convolve(x, kernel, levels[0].same3)
        y = sparse_conv.convolve(y, jnp.swapaxes(kernel, 1, 2), levels[1].down3)
        z = sparse_conv.convolve_transposed(y, kernel, levels[3].up)
        results.append((rows_of(levels[1], y), rows_of(levels[3], z)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


def test_an_empty_scene_is_all_padding(small_blocks):
    empty = build_voxel_pyramid(np.zeros((3, 3), np.float32), np.zeros(3, bool), CONFIG)
    levels = stack_trees([pad_voxel_pyramid(empty, (70, 20, 9, 90, 80, 70), CONFIG)]).levels
    x, kernel = jnp.full((1, 70, 3), jnp.nan), jnp.ones((27, 3, 4))

    def total(x, kernel):
        return jnp.sum(sparse_conv.convolve(x, kernel, levels[0].same3))

    assert total(x, kernel) == 0
    dx, dkernel = jax.grad(total, (0, 1))(x, kernel)
    assert (np.asarray(dx) == 0).all()
    assert (np.asarray(dkernel) == 0).all()


@pytest.mark.parametrize("name", ["same3", "down3", "back3", "too_many"])
def test_the_form_by_pairs_equals_the_dense_form(name, monkeypatch):
    tiled = VoxelPyramidConfig(
        1.0, (VoxelLevelConfig(True, tiles=True), VoxelLevelConfig(False, False, True, True))
    )
    random = np.random.default_rng(20)
    if name == "too_many":  # a full block: no tiles, since the dense form is faster
        coords = np.stack(np.meshgrid([0], *[np.arange(15)] * 3, indexing="ij"), -1).reshape(-1, 4)
    else:  # more than a tile of pairs under some taps
        coords = np.unique(
            np.concatenate([random.integers(0, 2, (3000, 1)), random.integers(-12, 12, (3000, 3))], 1), axis=0
        )
    levels = pyramid_of(coords, None, tiled).levels
    kernel_map = levels[0].same3 if name in ("same3", "too_many") else levels[1].down3
    assert (kernel_map.tiles.tap == -2).all() == (name == "too_many")
    source, target = (1, 0) if name == "back3" else (0, 1 if name == "down3" else 0)
    transposed = name == "back3"
    x = random.normal(size=(*levels[source].mask.shape, 3)).astype(np.float32)
    kernel = random.normal(size=(27, 3, 4)).astype(np.float32)
    weight = random.normal(size=(*levels[target].mask.shape, 4)).astype(np.float32)

    def total(x, kernel, kernel_map):
        apply = sparse_conv.convolve_transposed if transposed else sparse_conv.convolve
        y = apply(x, kernel, kernel_map)
        return jnp.sum(y * weight), y

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    if name != "too_many":
        monkeypatch.setattr(sparse_products, "_choose", lambda _, by_pairs, dense: by_pairs())
    (_, y), gradients = run(x, kernel, kernel_map)
    monkeypatch.undo()
    (_, want), expected = run(x, kernel, kernel_map._replace(tiles=None))
    np.testing.assert_allclose(y, want, atol=1e-4)
    np.testing.assert_allclose(gradients[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(gradients[1], expected[1], atol=2e-3)


def test_tiles_choose_the_form_by_pairs(monkeypatch):
    index = jnp.asarray(np.arange(4, dtype=np.int32)[None, :, None])
    rows = np.full((1, 2, 3), -1, np.int32)
    rows[0, 0, :2] = [0, 2]  # two of the four pairs: the results tell the forms apart
    tiles = PairTiles(np.array([[0, -1]], np.int32), rows, rows)
    x, kernel = jnp.arange(1.0, 5)[None, :, None], jnp.ones((1, 1, 1))

    def run(tiles):
        return sparse_conv.convolve(x, kernel, KernelMap(index, None, tiles))[0, :, 0].tolist()

    assert run(tiles) == [1, 0, 3, 0]
    assert run(None) == [1, 2, 3, 4]
    assert run(tiles._replace(tap=np.full((1, 2), -2, np.int32))) == [1, 2, 3, 4]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert run(tiles) == [1, 2, 3, 4]


def test_maps_of_other_levels_are_refused():
    levels = pyramid_of(random_coords(12)).levels
    x, kernel = jnp.zeros((2, levels[0].mask.shape[1], 3)), jnp.zeros((27, 3, 4))
    with pytest.raises(ValueError, match="is it the map of this level"):
        sparse_conv.convolve(x, kernel, levels[1].same3)
    with pytest.raises(ValueError, match="kernel of 27 taps"):
        sparse_conv.convolve(x, kernel, levels[1].down2)
    with pytest.raises(ValueError, match="is it the map of this level"):
        sparse_conv.convolve_transposed(x, kernel, levels[1].down3)
    with pytest.raises(ValueError, match="has no such map"):
        sparse_conv.convolve(x, kernel, levels[0].down3)
    with pytest.raises(ValueError, match="needs a map of stride 2"):
        sparse_conv.convolve_transposed(x, kernel, levels[0].same3)


def test_voxel_features_take_the_first_point_or_the_mean():
    xyz = np.array([[0.2, 0, 0], [5, 5, 5], [0.4, 0, 0], [-0.1, 0, 0], [9, 9, 9]], np.float32)
    mask = np.array([True, True, True, True, False])
    built = build_voxel_pyramid(xyz, mask, VoxelPyramidConfig(1.0, (VoxelLevelConfig(),)))
    pyramid = stack_trees([pad_voxel_pyramid(built, (4,), VoxelPyramidConfig(1.0, (VoxelLevelConfig(),)))])
    features = jnp.asarray([[[1.0], [2.0], [5.0], [7.0], [np.nan]]])
    first = sparse_conv.voxel_features(features, pyramid)
    np.testing.assert_array_equal(first[0, :, 0], [7, 1, 2, 0])
    mean = sparse_conv.voxel_features(features, pyramid, "mean")
    np.testing.assert_array_equal(mean[0, :, 0], [7, 3, 2, 0])
    np.testing.assert_array_equal(sparse_conv.point_features(mean, pyramid)[0, :, 0], [3, 2, 3, 7, 0])
    with pytest.raises(ValueError, match="'max'"):
        sparse_conv.voxel_features(features, pyramid, "max")


def test_children_are_interpolated_as_the_dictionary():
    config = VoxelPyramidConfig(
        1.0, (VoxelLevelConfig(), VoxelLevelConfig(True)), (GeneratedLevelConfig(1, 2, False, False),)
    )
    levels = pyramid_of(random_coords(13), None, config).levels
    rows = np.random.default_rng(14).normal(size=(int(levels[1].mask.sum()), 2)).astype(np.float32)
    y = sparse_conv.interpolate_to_children(padded_rows(levels[1], rows), levels[2].up, levels[1].same3)
    tensors = tensors_of(levels[1], rows)
    for b, v in zip(*np.nonzero(levels[2].mask), strict=True):
        want = sparse.interpolate(tensors[b], 2, levels[2].coords[b, v])
        np.testing.assert_allclose(y[b, v], want, atol=1e-5)


def test_the_highest_are_kept():
    score = jnp.asarray([[1.0, 3.0, 2.0, 3.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0, 0.0]])
    mask = jnp.asarray([[True, True, True, True, False], [True] * 5, [True, False, False, False, False]])
    kept = sparse_conv.keep_highest(score, mask, 2)
    np.testing.assert_array_equal(kept, [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    assert sparse_conv.keep_highest(score, mask, 5) is mask


def test_initialisers_have_the_references_spread():
    key, shape = jax.random.key(0), (27, 40, 60)
    assert np.std(sparse_conv.kaiming_fan_out(key, shape)) == pytest.approx((2 / (27 * 60)) ** 0.5, rel=0.02)
    for init, fan in ((sparse_conv.minkowski_default, 40), (sparse_conv.minkowski_transposed, 60)):
        drawn = np.asarray(init(key, shape))
        assert np.abs(drawn).max() == pytest.approx((27 * fan) ** -0.5, rel=0.01)
        assert np.std(drawn) == pytest.approx((3 * 27 * fan) ** -0.5, rel=0.02)


GOLDEN_MAPS = {
    "conv_k3_s1": (0, 0, lambda lv: lv[0].same3),
    "conv_k1_s2": (0, 1, lambda lv: sparse_conv.center_tap(lv[1].down3)),
    "conv_k2_s2": (0, 1, lambda lv: lv[1].down2),
    "conv_k3_s2": (0, 1, lambda lv: lv[1].down3),
    "conv_k3_s2_from2": (1, 2, lambda lv: lv[2].down3),
    "conv_k3_s1_at4": (2, 2, lambda lv: lv[2].same3),
    "convtr_k3_s2_existing": (1, 0, lambda lv: lv[1].down3),
    "convtr_k2_s2_existing": (1, 0, lambda lv: lv[1].down2),
    "gconvtr_k3_s2": (1, 3, lambda lv: lv[3].up),
    "gconvtr_k2_s2": (1, 4, lambda lv: lv[4].up),
    "gconvtr_k3_s2_4to2": (2, 5, lambda lv: lv[5].up),
}


@pytest.fixture(scope="module", params=["random", "real"])
def golden(shared, request):
    """Recorded operations of MinkowskiEngine, and the pyramid of their input."""
    path = shared / f"golden/sparse_ops/{request.param}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    arrays = dict(np.load(path))
    return arrays, pyramid_of(arrays["in_coords"].astype(np.int32), None).levels


def assert_coords(level, coords):
    scene = np.repeat(np.arange(len(level.mask)), level.mask.sum(1))
    got = np.concatenate([scene[:, None], np.asarray(level.coords)[level.mask]], 1)
    np.testing.assert_array_equal(got, coords)


@pytest.mark.data
@pytest.mark.parametrize("name", list(GOLDEN_MAPS))
def test_convolutions_equal_minkowski(golden, name):
    arrays, levels = golden
    source, target, find_map = GOLDEN_MAPS[name]
    op = {key.split("/")[1]: value for key, value in arrays.items() if key.startswith(f"{name}/")}
    assert_coords(levels[source], op["in_coords"])
    assert_coords(levels[target], op["out_coords"])
    apply = sparse_conv.convolve_transposed if "convtr" in name else sparse_conv.convolve
    x = padded_rows(levels[source], op["in_feats"])
    y, pull = jax.vjp(lambda x, w: apply(x, w, find_map(levels)), x, jnp.asarray(op["weight"]))
    np.testing.assert_allclose(rows_of(levels[target], y), op["out_feats"], atol=1e-4)
    gradient = jnp.where(levels[target].mask[..., None], padded_rows(levels[target], op["grad_out"]), 0.0)
    dx, dkernel = pull(gradient)
    np.testing.assert_allclose(rows_of(levels[source], dx), op["grad_in"], atol=1e-4)
    scale = np.abs(op["grad_weight"]).max()
    np.testing.assert_allclose(dkernel / scale, op["grad_weight"] / scale, atol=1e-5)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "find_map"),
    [("k2_s2", lambda lv: lv[1].down2), ("k3_s2", lambda lv: lv[1].down3), ("k3_s1", lambda lv: lv[0].same3)],
)
def test_max_pool_equals_minkowski(golden, name, find_map):
    arrays, levels = golden
    target = levels[0 if name == "k3_s1" else 1]
    op = {key: arrays[f"maxpool_{name}/{key}"] for key in ("out_coords", "out_feats", "grad_out", "grad_in")}
    assert_coords(target, op["out_coords"])
    x = padded_rows(levels[0], arrays["in_feats"])
    y, pull = jax.vjp(lambda x: sparse_conv.max_pool(x, find_map(levels)), x)
    np.testing.assert_array_equal(rows_of(target, y), op["out_feats"])
    (dx,) = pull(padded_rows(target, op["grad_out"]))
    np.testing.assert_allclose(rows_of(levels[0], dx), op["grad_in"], atol=1e-5)


@pytest.mark.data
def test_sums_and_interpolation_equal_minkowski(golden):
    arrays, levels = golden
    a, b, out = (arrays[f"union_add/{k}_feats"] for k in ("a", "b", "out"))
    assert_coords(levels[5], arrays["union_add/out_coords"])
    y = padded_rows(levels[5], b) + sparse_conv.take_skip(padded_rows(levels[1], a), levels[5].skip)
    np.testing.assert_allclose(rows_of(levels[5], y), out, atol=1e-6)

    assert_coords(levels[2], arrays["interp/src_coords"])
    x = padded_rows(levels[2], arrays["interp/src_feats"])
    find = jax.jit(find_corners, static_argnums=2)
    for kind in ("lattice", "float"):
        query, want = arrays[f"interp/query_{kind}"], arrays[f"interp/out_{kind}"]
        for scene in range(len(x)):
            at = query[:, 0] == scene
            corners = find(levels[2].coords[scene], levels[2].mask[scene], 4, query[at, 1:])
            got = sparse_conv.interpolate_corners(x[scene][None], *(c[None] for c in corners))[0]
            np.testing.assert_allclose(got, want[at], atol=1e-4)


@pytest.mark.data
def test_norms_and_pointwise_convolution_equal_minkowski(golden):
    arrays, levels = golden
    mask, rows = jnp.asarray(levels[0].mask), arrays["in_feats"]
    x = padded_rows(levels[0], rows)
    norm = sparse_conv.MaskedInstanceNorm(rows.shape[1])
    params = {"scale": arrays["instnorm/weight"][0], "bias": arrays["instnorm/bias"][0]}
    y, pull = jax.vjp(lambda x, p: norm.apply({"params": p}, x, mask, train=True), x, params)
    np.testing.assert_allclose(rows_of(levels[0], y), arrays["instnorm/out"], atol=1e-4)
    gradient = jnp.where(mask[..., None], padded_rows(levels[0], arrays["instnorm/grad_out"]), 0.0)
    dx, dparams = pull(gradient)
    np.testing.assert_allclose(rows_of(levels[0], dx), arrays["instnorm/grad_in"], atol=1e-4)
    np.testing.assert_allclose(dparams["scale"], arrays["instnorm/grad_weight"][0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dparams["bias"], arrays["instnorm/grad_bias"][0], rtol=1e-3, atol=1e-3)

    batch_norm = MaskedBatchNorm(rows.shape[1])
    before = {"mean": arrays["bn/running_mean"], "var": arrays["bn/running_var"]}
    variables = {"params": {"scale": arrays["bn/weight"], "bias": arrays["bn/bias"]}, "batch_stats": before}
    for train, name in ((False, "out_eval"), (True, "out_train")):
        y, updates = batch_norm.apply(variables, x, mask, train=train, mutable=["batch_stats"])
        np.testing.assert_allclose(rows_of(levels[0], y), arrays[f"bn/{name}"], atol=1e-4)
    after = update_running(before, updates["batch_stats"], 0.1)
    np.testing.assert_allclose(after["mean"], arrays["bn/running_mean_after"], atol=1e-5)
    np.testing.assert_allclose(after["var"], arrays["bn/running_var_after"], rtol=1e-5)

    op = {k: arrays[f"conv_k1_s1_bias/{k}"] for k in ("weight", "bias", "out_feats")}
    dense = Dense(*op["weight"].shape)
    y = dense.apply({"params": {"kernel": op["weight"], "bias": op["bias"][0]}}, x)
    np.testing.assert_allclose(rows_of(levels[0], y), op["out_feats"], atol=1e-4)


def test_instance_norm_ignores_pads():
    random = np.random.default_rng(15)
    x, mask = random.normal(2, 3, (3, 9, 4)).astype(np.float32), random.random((3, 9)) < 0.7
    mask[2] = False
    norm = sparse_conv.MaskedInstanceNorm(4)
    params = {"scale": np.arange(1.0, 5, dtype=np.float32), "bias": np.full(4, 0.5, np.float32)}
    for junk in (0.0, np.nan):
        dirty = jnp.asarray(np.where(mask[..., None], x, np.float32(junk)))
        y = norm.apply({"params": params}, dirty, jnp.asarray(mask), train=False)
        for scene in range(2):
            rows = x[scene][mask[scene]]
            want = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-8) * params["scale"] + 0.5
            np.testing.assert_allclose(np.asarray(y)[scene][mask[scene]], want, atol=1e-5)


def test_kernel_maps_are_pytrees_without_gradients():
    index = jnp.zeros((1, 2, 27), jnp.int32)
    dx, dmap = jax.grad(
        lambda x, m: jnp.sum(sparse_conv.convolve(x, jnp.ones((27, 1, 1)), m)), (0, 1), allow_int=True
    )(jnp.ones((1, 2, 1)), KernelMap(index, None))
    assert dx.shape == (1, 2, 1)
    assert dmap.index.dtype == jax.dtypes.float0
