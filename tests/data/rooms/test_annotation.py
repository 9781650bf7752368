import numpy as np

from vrdistill_jax.data.rooms.annotation import smear_labels


def block_on_a_floor():
    grid = np.arange(0, 2, 0.02)
    floor = np.stack(np.meshgrid(grid, grid, [0.0]), -1).reshape(-1, 3)
    xyz = np.concatenate([floor, floor[:, [0, 2, 1]] * [1, 1, 0.5] + [0, 1, 0]]).astype(np.float32)
    return xyz, np.repeat(np.array([-1, 0], np.int32), len(floor))


def test_without_reach_and_gaps_only_cells_shared_by_two_objects_change():
    xyz, owner = block_on_a_floor()
    label = smear_labels(xyz, owner, np.random.default_rng(0), 0.0, 0.0)
    changed = label != owner
    assert (np.abs(xyz[changed, 1] - 1) < 0.05).all()
    assert (xyz[changed, 2] < 0.05).all()


def test_borders_move_by_no_more_than_the_reach_allows():
    xyz, owner = block_on_a_floor()
    label = smear_labels(xyz, owner, np.random.default_rng(0), 0.04, 0.0)
    changed = label != owner
    assert 0.005 < changed.mean() < 0.15
    low, high = xyz[owner == 0].min(0), xyz[owner == 0].max(0)
    wide = 2 * 0.04 + 0.041  # two standard deviations and a cell
    labelled = xyz[label == 0]
    assert (labelled >= low - wide).all()
    assert (labelled <= high + wide).all()
    floor = (owner == -1) & (label == 0)
    assert floor.any(), "labels run onto the floor"
    assert ((owner == 0) & (label == -1)).any(), "and the floor's onto the block"


def test_gaps_take_about_their_share_in_patches():
    xyz, owner = block_on_a_floor()
    lost = [
        (smear_labels(xyz, owner, np.random.default_rng(seed), 0.0, 0.2)[owner == 0] == -1).mean()
        for seed in range(20)
    ]
    assert abs(np.mean(lost) - 0.2) < 0.05
    assert np.std(lost) > 0.01, "whole patches, not single points"


def test_same_seed_same_labels():
    xyz, owner = block_on_a_floor()
    first, again, other = (smear_labels(xyz, owner, np.random.default_rng(s), 0.04, 0.1) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
