import subprocess
import sys
import textwrap
from functools import partial

import jax
import numpy as np
import pytest
from oracles import sparse
from oracles.point_ops import hide_in_garbage

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.geometry import voxel_pyramid
from vrdistill_jax.geometry.host import voxel_pyramid as host
from vrdistill_jax.structs import GeneratedLevelConfig, KernelMap, VoxelLevelConfig, VoxelPyramidConfig

Level = VoxelLevelConfig
CAPACITIES = (320, 320, 320, 320, 4200, 8200)
# Every kind of map: windows of both sizes, both generated sets, one made from an encoder level, one from a generated one.
EVERYTHING = VoxelPyramidConfig(
    0.1,
    (
        Level(same3=True),
        Level(down3=True),
        Level(True, True, True, tiles=True),
        Level(same3=True, down3=True),
    ),
    (GeneratedLevelConfig(3, 2), GeneratedLevelConfig(2, 3)),
    (tuple(c // 8 for c in CAPACITIES), CAPACITIES),
)
STRIDES = (1, 2, 4, 8, 4, 2)
on_device = jax.jit(voxel_pyramid.build_voxel_pyramid, static_argnums=(2, 3))


def build_on_host(xyz, mask, config=EVERYTHING, capacities=None):
    """The batch as a loader stacks it."""
    pyramids = [host.build_voxel_pyramid(*cloud, config) for cloud in zip(xyz, mask, strict=True)]
    if capacities is None:
        return stack_trees(host.pad_voxel_pyramids(pyramids, config))
    return stack_trees([host.pad_voxel_pyramid(p, capacities, config) for p in pyramids])


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in leaves:
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def padded_clouds(seed, capacity=700):
    clouds = [xyz for _, xyz in sparse.example_clouds(seed)]
    hidden = [hide_in_garbage(xyz, row, capacity)[:2] for row, xyz in enumerate(clouds)]
    hidden.append((np.full((capacity, 3), np.nan, np.float32), np.zeros(capacity, bool)))
    return np.stack([xyz for xyz, _ in hidden]), np.stack([mask for _, mask in hidden])


def test_host_matches_dictionaries():
    for _, xyz in sparse.example_clouds(5):
        padded, mask, _ = hide_in_garbage(xyz, 1)
        pyramid = host.build_voxel_pyramid(padded, mask, EVERYTHING)
        found = sparse.voxelize(padded, mask, EVERYTHING.voxel_size)
        sets = [set(found)]
        for stride in (2, 4, 8):
            sets.append(sparse.coarsen(sets[0], stride))
        sets += [sparse.generate(sets[3], 2, 4), sparse.generate(sets[2], 3, 2)]
        assert [sorted(s) for s in sets] == [[tuple(c) for c in lv.coords.tolist()] for lv in pyramid.levels]
        assert all(level.mask.all() for level in pyramid.levels)
        assert pyramid.point_index.tolist() == [found[at][0] for at in sorted(sets[0])]
        for row, at in enumerate(sorted(sets[0])):
            assert (pyramid.voxel_index[found[at]] == row).all()
        assert (pyramid.voxel_index[~mask] == -1).all()

        expect, levels = partial(assert_map, sets), pyramid.levels
        expect(levels[0].same3.index, 0, 0, 3)
        expect(levels[5].same3.index, 5, 5, 3)
        expect(levels[1].down3.index, 1, 0, 3)
        expect(levels[2].down3.index, 2, 1, 3)
        expect(levels[2].down2.index, 2, 1, 2)
        expect(levels[4].up.index, 3, 4, 2)
        expect(levels[5].up.index, 2, 5, 3)
        expect(levels[4].skip.index, 4, 2, 1)
        expect(levels[4].skip.reverse, 2, 4, 1)
        expect(levels[5].skip.index, 5, 1, 1)
        for kernel_map in (levels[2].same3, levels[2].down3):
            listed = kernel_map.tiles.coarse >= 0
            tap = np.broadcast_to(kernel_map.tiles.tap[:, None], listed.shape)[listed]
            fine = kernel_map.index[kernel_map.tiles.coarse[listed], tap]
            np.testing.assert_array_equal(kernel_map.tiles.fine[listed], fine)
            assert listed.sum() == (kernel_map.index >= 0).sum()
        assert levels[2].down2.tiles is levels[3].same3.tiles is None
        assert levels[0].down3 is None
        assert levels[1].same3 is None
        for kernel_map in (levels[2].down3, levels[2].down2, levels[4].up, levels[5].up):
            assert_reverse(kernel_map)


def assert_map(sets, got, targets, sources, size):
    want = sparse.kernel_map(sets[targets], sets[sources], size, STRIDES[sources])
    np.testing.assert_array_equal(got, want)


def assert_reverse(kernel_map: KernelMap):
    """`reverse` lists each pair of `index` once, under its fine row."""
    fine, slot = np.nonzero(kernel_map.reverse >= 0)
    pair = kernel_map.reverse[fine, slot]
    np.testing.assert_array_equal(kernel_map.index.reshape(-1)[pair], fine)
    assert len(np.unique(pair)) == len(pair) == (kernel_map.index >= 0).sum()


def test_device_matches_host():
    xyz, mask = padded_clouds(6)
    pyramid, needed = on_device(xyz, mask, EVERYTHING, CAPACITIES)
    assert_same(pyramid, build_on_host(xyz, mask, capacities=CAPACITIES))
    counts = np.stack([level.mask.sum(1) for level in pyramid.levels], 1)
    np.testing.assert_array_equal(needed, counts)
    assert (counts[-1] == 0).all()


def test_device_tells_what_it_lacks():
    config = VoxelPyramidConfig(0.1, (Level(), Level()), (GeneratedLevelConfig(1, 2, False, False),))
    xyz, mask = padded_clouds(7)
    wanted = np.stack(
        [level.mask.sum(1) for level in build_on_host(xyz, mask, config, (320, 320, 3000)).levels], 1
    )
    xyz[0] = np.where(np.isfinite(xyz[0]), 1e9, xyz[0])
    pyramid, needed = on_device(xyz, mask, config, (320, 320, 16))
    np.testing.assert_array_equal(needed[1:], wanted[1:])
    assert needed[0, 0] == np.iinfo(np.int32).max, "a point lies too far out"
    assert pyramid.levels[2].mask.sum(1).max() == 16
    _, needed = on_device(xyz, mask, config, (8, 320, 16))
    np.testing.assert_array_equal(needed[1:, 0], wanted[1:, 0])


def test_batches_share_the_smallest_rung_that_fits():
    xyz, mask = padded_clouds(8)
    small = build_on_host(xyz[:2], mask[:2])
    assert [level.mask.shape for level in small.levels] == [(2, c) for c in EVERYTHING.capacities[0]]
    everything = build_on_host(xyz, mask)
    assert [level.mask.shape[1] for level in everything.levels] == list(CAPACITIES)
    assert_same(everything, build_on_host(xyz, mask, capacities=CAPACITIES))


def test_a_rung_that_is_too_small_is_an_error():
    xyz, mask = padded_clouds(8)
    config = EVERYTHING._replace(capacities=((320, 320, 320, 320, 4200, 100),))
    with pytest.raises(ValueError, match=r"needs \(3.*the last rung .* is \(320, 320, 320, 320, 4200, 100\)"):
        build_on_host(xyz, mask, config)
    with pytest.raises(ValueError, match="is None; append a rung"):
        build_on_host(xyz, mask, EVERYTHING._replace(capacities=()))


def test_ladders_rise_by_their_ratio():
    ladder = host.make_capacities((9000, 100), 3)
    assert ladder == ((4032, 64), (6016, 128), (9024, 128))


@pytest.mark.parametrize("build", [host.build_voxel_pyramid, None])
def test_impossible_configs_are_named(build):
    xyz, mask = np.zeros((4, 3), np.float32), np.ones(4, bool)
    if build is None:
        xyz, mask = xyz[None], mask[None]

        def build(xyz, mask, config):
            return voxel_pyramid.build_voxel_pyramid(
                xyz, mask, config, (4,) * (len(config.levels) + len(config.generated))
            )

    one = VoxelPyramidConfig(0.1, (Level(),))
    with pytest.raises(ValueError, match="voxel_size is 0"):
        build(xyz, mask, one._replace(voxel_size=0))
    with pytest.raises(ValueError, match="levels has 0 entries"):
        build(xyz, mask, one._replace(levels=()))
    with pytest.raises(ValueError, match=r"levels\[0\] asks for a map"):
        build(xyz, mask, one._replace(levels=(Level(down3=True),)))
    with pytest.raises(ValueError, match=r"generated\[0\] is GeneratedLevelConfig\(source=0"):
        build(xyz, mask, one._replace(generated=(GeneratedLevelConfig(0, 3),)))
    with pytest.raises(ValueError, match=r"generated\[0\].*kernel_size=4"):
        build(xyz, mask, VoxelPyramidConfig(0.1, (Level(), Level()), (GeneratedLevelConfig(1, 4),)))
    with pytest.raises(ValueError, match="expected"):
        build(xyz[..., :2], mask, one)


def test_capacities_must_fit_the_levels():
    with pytest.raises(ValueError, match=r"capacities\[0\] is \(4, 4\); expected 1 positive"):
        host.check_config(VoxelPyramidConfig(0.1, (Level(),), (), ((4, 4),)))


def test_host_imports_no_jax():
    code = """
    import sys
    import vrdistill_jax.geometry.host.voxel_pyramid
    sys.exit("jax" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
