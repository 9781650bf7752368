"""The voxel pyramid in pure JAX, for pipelines that live on the device and for exported models."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry import voxels
from vrdistill_jax.geometry.host.voxel_pyramid import check_config, level_strides
from vrdistill_jax.structs import KernelMap, VoxelLevel, VoxelPyramid, VoxelPyramidConfig


def build_voxel_pyramid(
    xyz: Float[Array, "b n 3"],
    mask: Bool[Array, "b n"],
    config: VoxelPyramidConfig,
    capacities: Sequence[int],
) -> tuple[VoxelPyramid, Int[Array, "b l"]]:
    """Builds the pyramids of a batch of clouds, entry for entry what the host version gives after padding.

    Call it inside `jax.jit`; `config` and `capacities` are static.

    Args:
      xyz: f32[b, n, 3] metres; only valid rows need to be finite.
      mask: bool[b, n].
      config: voxel size, levels and maps.
      capacities: rows of each level.

    Returns:
      VoxelPyramid with batch axes, and i32[b, levels], how many rows each level needs. A pyramid is complete only if no
      level needs more than its capacity: the caller compares, and calls again with larger capacities (the counts of
      levels built from an incomplete one are lower bounds). The largest int32 says that a point lies too far out.

    Raises:
      ValueError: if shapes disagree or the config is impossible.
    """
    if xyz.ndim != 3 or xyz.shape[2] != 3 or mask.shape != xyz.shape[:2]:
        raise ValueError(f"clouds {xyz.shape} and masks {mask.shape} disagree; expected (b, n, 3) and (b, n)")
    check_config(config._replace(capacities=(tuple(capacities),)))
    return jax.vmap(lambda cloud, valid: _build_one(cloud, valid, config, capacities))(
        jax.lax.stop_gradient(xyz), mask
    )


def _build_one(xyz, mask, config, capacities):
    coords, inside = voxels.quantize(xyz, mask, config.voxel_size)
    keys, point_index, voxel_index, count = voxels.unique_voxels(
        voxels.keys_from_coords(coords, mask), capacities[0]
    )
    sets, needed, levels = [keys], [jnp.where(inside, count, voxels.PAD)], []
    for row, wanted in enumerate(config.levels):
        if row:
            keys, count = voxels.coarsen(sets[-1], capacities[row])
            sets.append(keys)
            needed.append(count)
        down2 = _strided_map(sets[row], sets[row - 1], 2) if wanted.down2 else None
        down3 = _strided_map(sets[row], sets[row - 1], 3, wanted.tiles) if wanted.down3 else None
        same3 = _submanifold_map(sets[row], wanted.tiles) if wanted.same3 else None
        levels.append(_level(sets[row], 2**row, same3, down2=down2, down3=down3))
    strides = level_strides(config)
    for row, made in enumerate(config.generated, len(levels)):
        keys, count = voxels.generate(sets[made.source], made.kernel_size, capacities[row])
        sets.append(keys)
        needed.append(count)
        up = _strided_map(sets[made.source], keys, made.kernel_size)
        same3 = _submanifold_map(keys) if made.same3 else None
        skip = _skip_map(keys, sets[strides.index(strides[row])]) if made.skip else None
        levels.append(_level(keys, strides[row], same3, up=up, skip=skip))
    return VoxelPyramid(tuple(levels), point_index, voxel_index), jnp.stack(needed)


def _level(keys, stride: int, same3, **maps) -> VoxelLevel:
    coords, mask = voxels.coords_from_keys(keys)
    empty = dict(down2=None, down3=None, up=None, skip=None)
    return VoxelLevel(coords * stride, mask, same3, **(empty | maps))


def _submanifold_map(keys, tiles: bool = False) -> KernelMap:
    index = voxels.match_taps(keys, keys, 3, 1)
    return KernelMap(index, None, voxels.tile_pairs(index) if tiles else None)


def _strided_map(keys, fine, kernel_size: int, tiles: bool = False) -> KernelMap:
    index = voxels.match_taps(keys, fine, kernel_size, 2)
    reverse = voxels.reverse_taps(index, fine.shape[1])
    return KernelMap(index, reverse, voxels.tile_pairs(index) if tiles else None)


def _skip_map(keys, encoder) -> KernelMap:
    return KernelMap(voxels.match_rows(keys, encoder)[:, None], voxels.match_rows(encoder, keys)[:, None])
