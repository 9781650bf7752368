import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from oracles import point_ops

from vrdistill_jax import structs
from vrdistill_jax.geometry import point_pyramid
from vrdistill_jax.geometry.host import point_pyramid as host

Level = structs.LevelConfig
SMALL = structs.PyramidConfig((Level(40, 0.5, 12), Level(20, 1.0, 8), Level(10, 2.0, 40)), ((2, 1), (1, 0)))
VOTENET = structs.PyramidConfig(
    (Level(2048, 0.2, 64), Level(1024, 0.4, 32), Level(512, 0.8, 16), Level(256, 1.2, 16)), ((3, 2), (2, 1))
)

on_device = jax.jit(point_pyramid.build_point_pyramid, static_argnums=2)


def build_on_host(xyz, mask, config):
    """The batch as a loader stacks it."""
    pyramids = [host.build_point_pyramid(*cloud, config) for cloud in zip(xyz, mask, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *pyramids)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in leaves:
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        if name.endswith("weight"):
            np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def build_naively(xyz, mask, config):
    """One cloud, from the naive operations alone."""
    above, above_mask, source = xyz, mask, np.arange(len(xyz))
    levels = []
    for level in config.levels:
        index = point_ops.sample_farthest_points(above, level.num_centers, above_mask)
        centers = above[index]
        neighbor = point_ops.query_ball(centers, above, level.radius, level.num_neighbors, above_mask)
        source = source[index].astype(np.int32)
        above, above_mask = centers, np.ones(len(centers), bool)
        levels.append(structs.PyramidLevel(centers, above_mask, index, source, neighbor))
    interpolations = []
    for coarse, fine in config.interpolations:
        index, squared = point_ops.find_three_nearest(levels[fine].xyz, levels[coarse].xyz)
        interpolations.append(structs.Interpolation(index, point_ops.three_nearest_weight(squared)))
    return structs.PointPyramid(tuple(levels), tuple(interpolations))


def test_host_matches_naive_operations():
    for _, xyz in point_ops.example_clouds(13, sizes=(1, 2, 17, 50, 300)):
        padded, mask, _ = point_ops.hide_in_garbage(xyz)
        assert_same(host.build_point_pyramid(padded, mask, SMALL), build_naively(padded, mask, SMALL))
        full = np.ones(len(xyz), bool)
        assert_same(host.build_point_pyramid(xyz, full, SMALL), build_naively(xyz, full, SMALL))


def test_device_matches_host_on_padded_clouds():
    clouds = [xyz for _, xyz in point_ops.example_clouds(14)]
    hidden = [point_ops.hide_in_garbage(xyz, seed, capacity=720) for seed, xyz in enumerate(clouds)]
    hidden.append((np.full((720, 3), np.nan, np.float32), np.zeros(720, bool), None))  # a scene of padding
    xyz, mask = (np.stack([cloud[i] for cloud in hidden]) for i in range(2))
    assert_same(on_device(xyz, mask, SMALL), build_on_host(xyz, mask, SMALL))


@pytest.mark.parametrize("size", [2, 600])
def test_device_matches_host_on_full_clouds(size):
    xyz = np.stack([xyz for _, xyz in point_ops.example_clouds(15, sizes=(size,))])
    mask = np.ones(xyz.shape[:2], bool)
    assert_same(on_device(xyz, mask, SMALL), build_on_host(xyz, mask, SMALL))


def test_more_padding_only_renumbers_rows():
    _, xyz = next(point_ops.example_clouds(16, sizes=(100,)))
    plain = host.build_point_pyramid(xyz, np.ones(100, bool), SMALL)
    padded, mask, rows = point_ops.hide_in_garbage(xyz, seed=3)
    hidden = host.build_point_pyramid(padded, mask, SMALL)
    first = plain.levels[0]._replace(
        **{name: rows[getattr(plain.levels[0], name)] for name in ("index", "source_index", "neighbor_index")}
    )
    rest = tuple(level._replace(source_index=rows[level.source_index]) for level in plain.levels[1:])
    for got, want in zip(hidden.levels, (first, *rest), strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    for got, want in zip(hidden.interpolations, plain.interpolations, strict=True):
        np.testing.assert_array_equal(got.index, want.index)


def test_indices_compose():
    xyz = np.random.default_rng(17).normal(size=(300, 3)).astype(np.float32)
    above = xyz
    for level in host.build_point_pyramid(xyz, np.ones(300, bool), SMALL).levels:
        np.testing.assert_array_equal(level.xyz, above[level.index])
        np.testing.assert_array_equal(level.xyz, xyz[level.source_index])
        above = level.xyz


def test_later_levels_are_no_prefix_under_ties():
    random = np.random.default_rng(18)
    xyz = (random.integers(0, 20, (3000, 3)) * 0.05 + 1).astype(np.float32)
    config = structs.PyramidConfig((Level(512, 0.2, 16), Level(256, 0.4, 16)))
    levels = host.build_point_pyramid(xyz, np.ones(3000, bool), config).levels
    assert (levels[1].index != np.arange(256)).any()


@pytest.mark.parametrize("build", [host.build_point_pyramid, None])
def test_impossible_configs_are_named(build):
    xyz, mask = np.zeros((4, 3), np.float32), np.ones(4, bool)
    if build is None:
        xyz, mask, build = xyz[None], mask[None], point_pyramid.build_point_pyramid
    with pytest.raises(ValueError, match="levels is empty"):
        build(xyz, mask, structs.PyramidConfig(()))
    with pytest.raises(ValueError, match=r"levels\[1\]"):
        build(xyz, mask, structs.PyramidConfig((Level(4, 1.0, 4), Level(0, 1.0, 4))))
    with pytest.raises(ValueError, match=r"interpolations holds \(1, 0\)"):
        build(xyz, mask, structs.PyramidConfig((Level(4, 1.0, 4),), ((1, 0),)))
    with pytest.raises(ValueError, match="expected"):
        build(xyz[..., :2], mask, SMALL)


def test_host_imports_no_jax():
    code = """
    import sys
    import vrdistill_jax.geometry.host.point_pyramid
    sys.exit("jax" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.data
@pytest.mark.parametrize("folder", ["votenet_sunrgbd", "groupfree_sunrgbd", "h3dnet_scannet"])
def test_matches_official_backbones(shared, folder):
    xyz = np.load(shared / f"golden/{folder}/inputs.npz")["point_clouds"][:, :, :3]
    golden = np.load(shared / f"golden/{folder}/outputs.npz")
    mask = np.ones(xyz.shape[:2], bool)
    pyramid = build_on_host(xyz, mask, VOTENET)
    for row, level in enumerate(pyramid.levels, 1):
        np.testing.assert_array_equal(level.index, golden[f"sa{row}_inds"])
        np.testing.assert_array_equal(level.xyz, golden[f"sa{row}_xyz"])
    np.testing.assert_array_equal(pyramid.levels[1].source_index, golden["seed_inds"])
    if folder == "votenet_sunrgbd":
        assert_same(on_device(xyz, mask, VOTENET), pyramid)
