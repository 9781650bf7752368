"""The voxel pyramid on the host: all voxel sets and kernel maps of a sparse network, once per cloud."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from vrdistill_jax.geometry.host import voxels
from vrdistill_jax.geometry.host.sampling import check_cloud
from vrdistill_jax.structs import KernelMap, PairTiles, VoxelLevel, VoxelPyramid, VoxelPyramidConfig


def build_voxel_pyramid(
    xyz: Float[np.ndarray, "n 3"], mask: Bool[np.ndarray, "n"], config: VoxelPyramidConfig
) -> VoxelPyramid:
    """Builds the pyramid of one cloud; `pad_voxel_pyramids` makes those of a batch stackable.

    Args:
      xyz: f32[n, 3] metres; only valid rows need to be finite.
      mask: bool[n].
      config: voxel size, levels and maps; its capacities are not looked at.

    Returns:
      VoxelPyramid of NumPy arrays without a batch axis and without padding.

    Raises:
      ValueError: if shapes disagree, the config is impossible, or a point lies too far out.

    Source: MinkowskiEngine's coordinate manager (strided and generative coordinates, order of the taps).
    Differs: of several points in a voxel the lowest row is kept, as MinkowskiEngine's CPU build does; its GPU build
    keeps any of them.
    """
    xyz = check_cloud(xyz, mask)
    check_config(config)
    keys, point_index, voxel_index = voxels.unique_voxels(voxels.quantize(xyz, mask, config.voxel_size), mask)
    sets, levels = [keys], []
    for row, wanted in enumerate(config.levels):
        if row:
            sets.append(voxels.coarsen(sets[-1]))
        down2 = _strided_map(sets[row], sets[row - 1], 2) if wanted.down2 else None
        down3 = _strided_map(sets[row], sets[row - 1], 3, wanted.tiles) if wanted.down3 else None
        same3 = _submanifold_map(sets[row], wanted.tiles) if wanted.same3 else None
        levels.append(_level(sets[row], 2**row, same3, down2=down2, down3=down3))
    strides = level_strides(config)
    for row, made in enumerate(config.generated, len(levels)):
        keys = voxels.generate(sets[made.source], made.kernel_size)
        sets.append(keys)
        up = _strided_map(sets[made.source], keys, made.kernel_size)
        same3 = _submanifold_map(keys) if made.same3 else None
        skip = _skip_map(keys, sets[strides.index(strides[row])]) if made.skip else None
        levels.append(_level(keys, strides[row], same3, up=up, skip=skip))
    return VoxelPyramid(tuple(levels), point_index, voxel_index)


def pad_voxel_pyramids(pyramids: Sequence[VoxelPyramid], config: VoxelPyramidConfig) -> list[VoxelPyramid]:
    """Pads the pyramids of a batch to the smallest rung of capacities that holds all of them, ready to be stacked.

    All levels share one rung, so that a network is compiled at most once per rung.

    Args:
      pyramids: of `build_voxel_pyramid`, without batch axes, of clouds with the same number of rows.
      config: the config that they were built with.

    Returns:
      VoxelPyramids of equal shapes.

    Raises:
      ValueError: if the last rung is too small, with the rows that are needed.
    """
    capacities = find_capacities(pyramids, config)
    return [pad_voxel_pyramid(pyramid, capacities, config) for pyramid in pyramids]


def find_capacities(pyramids: Sequence[VoxelPyramid], config: VoxelPyramidConfig) -> tuple[int, ...]:
    """The smallest rung of `config.capacities` that holds every level of every pyramid.

    Raises:
      ValueError: if there is none, with the rows that are needed.
    """
    needed = tuple(
        max(len(level.mask) for level in same) for same in zip(*(p.levels for p in pyramids), strict=True)
    )
    for rung in config.capacities:
        if all(want <= have for want, have in zip(needed, rung, strict=True)):
            return tuple(rung)
    largest = config.capacities[-1] if config.capacities else None
    raise ValueError(
        f"a batch needs {needed} voxels on its {len(needed)} levels but the last rung of VoxelPyramidConfig.capacities is"
        f" {largest}; append a rung that holds them, or use larger voxels"
    )


def pad_voxel_pyramid(
    pyramid: VoxelPyramid, capacities: Sequence[int], config: VoxelPyramidConfig
) -> VoxelPyramid:
    """Pads the levels of one pyramid (without a batch axis) to given numbers of rows.

    Args:
      pyramid: of `build_voxel_pyramid`.
      capacities: rows of each level.
      config: the config that it was built with.

    Returns:
      VoxelPyramid whose pads have mask False, coordinates 0 and indices -1.
    """
    rows = len(config.levels)
    sources = [*range(-1, rows - 1), *[made.source for made in config.generated]]
    strides = level_strides(config)

    def pad(array, count, value=-1):
        return np.concatenate([array, np.full((count - len(array), *array.shape[1:]), value, array.dtype)])

    def pad_map(kernel_map, coarse, fine):
        if kernel_map is None:
            return None
        reverse = None if kernel_map.reverse is None else pad(kernel_map.reverse, capacities[fine])
        index = pad(kernel_map.index, capacities[coarse])
        return KernelMap(index, reverse, pad_tiles(kernel_map.tiles, *index.shape))

    def pad_tiles(tiles, num_rows, num_taps):
        if tiles is None:
            return None
        room = voxels.tile_capacity(num_rows, num_taps)
        if len(tiles.tap) > room:
            rows = np.full((room, voxels.TILE_SIZE), -1, np.int32)
            return PairTiles(np.full(room, voxels.TOO_MANY_PAIRS, np.int32), rows, rows)
        return PairTiles(*(pad(array, room) for array in tiles))

    levels = []
    for row, level in enumerate(pyramid.levels):
        source, twin = sources[row], strides.index(strides[row])
        levels.append(
            VoxelLevel(
                coords=pad(level.coords, capacities[row], 0),
                mask=pad(level.mask, capacities[row], False),
                same3=pad_map(level.same3, row, row),
                down2=pad_map(level.down2, row, source),
                down3=pad_map(level.down3, row, source),
                up=pad_map(level.up, source, row),
                skip=pad_map(level.skip, row, twin),
            )
        )
    return VoxelPyramid(tuple(levels), pad(pyramid.point_index, capacities[0]), pyramid.voxel_index)


def make_capacities(
    largest: Sequence[int], num_rungs: int, ratio: float = 1.5
) -> tuple[tuple[int, ...], ...]:
    """A ladder of capacities.

    Args:
      largest: rows of each level in the last rung.
      num_rungs: how many rungs.
      ratio: between a rung and the one before.

    Returns:
      Rungs from small to large, rounded up to multiples of 64.
    """
    scales = [ratio ** (rung - num_rungs + 1) for rung in range(num_rungs)]
    return tuple(tuple(-(-int(size * scale + 0.5) // 64) * 64 for size in largest) for scale in scales)


def level_strides(config: VoxelPyramidConfig) -> list[int]:
    """Stride of every level in input voxels, the encoder's first."""
    strides = [2**row for row in range(len(config.levels))]
    for made in config.generated:
        strides.append(strides[made.source] // 2)
    return strides


def check_config(config: VoxelPyramidConfig) -> None:
    """Raises a ValueError that names the first impossible entry of a pyramid's config."""
    if not config.voxel_size > 0:
        raise ValueError(f"VoxelPyramidConfig.voxel_size is {config.voxel_size}, must be positive")
    if not 1 <= len(config.levels) <= 12:
        raise ValueError(f"VoxelPyramidConfig.levels has {len(config.levels)} entries, expected 1 to 12")
    if config.levels[0].down2 or config.levels[0].down3:
        raise ValueError("VoxelPyramidConfig.levels[0] asks for a map from the level before; there is none")
    strides = [2**row for row in range(len(config.levels))]
    for row, made in enumerate(config.generated):
        if not 0 <= made.source < len(strides) or strides[made.source] == 1 or made.kernel_size not in (2, 3):
            raise ValueError(
                f"VoxelPyramidConfig.generated[{row}] is {made}; expected an earlier level of stride 2 or more"
                " and a kernel of size 2 or 3"
            )
        strides.append(strides[made.source] // 2)
    for row, rung in enumerate(config.capacities):
        if len(rung) != len(strides) or min(rung) < 1:
            raise ValueError(
                f"VoxelPyramidConfig.capacities[{row}] is {rung}; expected {len(strides)} positive numbers"
            )


def _level(keys, stride: int, same3, **maps) -> VoxelLevel:
    coords = voxels.coords_from_keys(keys) * np.int32(stride)
    empty = dict(down2=None, down3=None, up=None, skip=None)
    return VoxelLevel(coords, np.ones(len(keys), bool), same3, **(empty | maps))


def _submanifold_map(keys, tiles: bool = False) -> KernelMap:
    index = voxels.match_taps(keys, keys, 3, 1)
    return KernelMap(index, None, voxels.tile_pairs(index) if tiles else None)


def _strided_map(keys, fine, kernel_size: int, tiles: bool = False) -> KernelMap:
    index = voxels.match_taps(keys, fine, kernel_size, 2)
    reverse = voxels.reverse_taps(index, len(fine))
    return KernelMap(index, reverse, voxels.tile_pairs(index) if tiles else None)


def _skip_map(keys, encoder) -> KernelMap:
    return KernelMap(voxels.match_rows(keys, encoder)[:, None], voxels.match_rows(encoder, keys)[:, None])
