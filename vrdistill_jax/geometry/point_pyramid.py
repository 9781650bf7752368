"""The point pyramid in pure JAX, for pipelines that live on the device and for exported models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax import structs
from vrdistill_jax.geometry.host.point_pyramid import check_config
from vrdistill_jax.geometry.interpolation import build_interpolation
from vrdistill_jax.geometry.neighbors import query_ball
from vrdistill_jax.geometry.sampling import sample_farthest_points


def build_point_pyramid(
    xyz: Float[Array, "b n 3"], mask: Bool[Array, "b n"], config: structs.PyramidConfig
) -> structs.PointPyramid:
    """Builds the pyramids of a batch of clouds, entry for entry what the host version gives.

    Each level samples the centres of the level above it anew: with exact ties a prefix of the first order is
    not what the references compute. Masked points change nothing. A cloud with fewer valid points than
    centres repeats its first one. Call it inside `jax.jit`; `config` is static.

    Args:
      xyz: f32[b, n, 3] metres; only valid rows need to be finite.
      mask: bool[b, n].
      config: levels, fine to coarse, and interpolations.

    Returns:
      PointPyramid with batch axes and without gradients. A level's mask is False throughout for a cloud
      without valid points, and True throughout otherwise.

    Raises:
      ValueError: if shapes disagree or the config names a level that it does not have.

    Source: VoteNet `Pointnet2Backbone` (sampling, grouping and feature propagation).
    """
    if xyz.ndim != 3 or xyz.shape[2] != 3 or mask.shape != xyz.shape[:2]:
        raise ValueError(f"clouds {xyz.shape} and masks {mask.shape} disagree; expected (b, n, 3) and (b, n)")
    check_config(config)
    return jax.vmap(lambda cloud, valid: _build_one(cloud, valid, config))(jax.lax.stop_gradient(xyz), mask)


def _build_one(xyz, mask, config):
    occupied = mask.any()
    above, above_mask = jnp.where(mask[:, None], xyz, 0.0), mask
    above_source = jnp.arange(len(xyz), dtype=jnp.int32)
    levels: list[structs.PyramidLevel] = []
    for level in config.levels:
        index = sample_farthest_points(above, level.num_centers, above_mask)
        centers = above[index]
        center_mask = jnp.full(level.num_centers, occupied)
        neighbor_index = query_ball(centers, above, level.radius, level.num_neighbors, above_mask)
        above_source = above_source[index]
        levels.append(structs.PyramidLevel(centers, center_mask, index, above_source, neighbor_index))
        above, above_mask = centers, center_mask
    interpolations = tuple(
        build_interpolation(levels[fine].xyz, levels[coarse].xyz, levels[coarse].mask)
        for coarse, fine in config.interpolations
    )
    return structs.PointPyramid(tuple(levels), interpolations)
