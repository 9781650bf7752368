"""The point pyramid on the host: all neighbourhoods of a PointNet++ network, once per cloud."""

import numpy as np
from jaxtyping import Bool, Float

from vrdistill_jax import structs
from vrdistill_jax.geometry.host.interpolation import build_interpolation
from vrdistill_jax.geometry.host.neighbors import query_ball
from vrdistill_jax.geometry.host.sampling import check_cloud, sample_farthest_points


def build_point_pyramid(
    xyz: Float[np.ndarray, "n 3"], mask: Bool[np.ndarray, "n"], config: structs.PyramidConfig
) -> structs.PointPyramid:
    """Builds the pyramid of one cloud; the loader stacks those of a batch.

    Each level samples the centres of the level above it anew: with exact ties a prefix of the first order is
    not what the references compute. Masked points change nothing. A cloud with fewer valid points than
    centres repeats its first one.

    Args:
      xyz: f32[n, 3] metres; only valid rows need to be finite.
      mask: bool[n].
      config: levels, fine to coarse, and interpolations.

    Returns:
      PointPyramid of NumPy arrays without a batch axis. A level's mask is False throughout if the cloud has
      no valid point, and True throughout otherwise.

    Raises:
      ValueError: if shapes disagree or the config names a level that it does not have.

    Source: VoteNet `Pointnet2Backbone` (sampling, grouping and feature propagation).
    """
    xyz = check_cloud(xyz, mask)
    check_config(config)
    occupied = bool(mask.any())
    above, above_mask, above_source = xyz, mask, np.arange(len(xyz), dtype=np.int32)
    levels: list[structs.PyramidLevel] = []
    for level in config.levels:
        index = sample_farthest_points(above, level.num_centers, above_mask)
        centers = above[index] if occupied else np.zeros((level.num_centers, 3), np.float32)
        center_mask = np.full(level.num_centers, occupied)
        neighbor_index = query_ball(centers, above, level.radius, level.num_neighbors, above_mask)
        above_source = above_source[index]
        levels.append(structs.PyramidLevel(centers, center_mask, index, above_source, neighbor_index))
        above, above_mask = centers, center_mask
    interpolations = tuple(
        build_interpolation(levels[fine].xyz, levels[coarse].xyz, levels[coarse].mask)
        for coarse, fine in config.interpolations
    )
    return structs.PointPyramid(tuple(levels), interpolations)


def check_config(config: structs.PyramidConfig) -> None:
    """Raises a ValueError that names the first impossible entry of a pyramid's config."""
    if not config.levels:
        raise ValueError("PyramidConfig.levels is empty; a pyramid needs at least one level")
    for row, level in enumerate(config.levels):
        if level.num_centers < 1 or level.num_neighbors < 1 or not level.radius > 0:
            raise ValueError(f"PyramidConfig.levels[{row}] is {level}; all of its fields must be positive")
    for pair in config.interpolations:
        if not 0 <= pair[1] < pair[0] < len(config.levels):
            raise ValueError(
                f"PyramidConfig.interpolations holds {pair}; expected (coarse, fine) rows of the"
                f" {len(config.levels)} levels with fine < coarse"
            )
