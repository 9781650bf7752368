"""Three-nearest-neighbour interpolation on the host: which coarse points, and how much of each."""

import numpy as np
from jaxtyping import Bool, Float

from vrdistill_jax import structs
from vrdistill_jax.geometry.host.neighbors import find_three_nearest


def build_interpolation(
    fine: Float[np.ndarray, "m 3"],
    coarse: Float[np.ndarray, "n 3"],
    mask: Bool[np.ndarray, "n"] | None = None,
) -> structs.Interpolation:
    """Finds for each fine point its three nearest coarse points and their weights.

    Args:
      fine: f32[m, 3] metres.
      coarse: f32[n, 3] metres.
      mask: bool[n] of the coarse points, None if all are valid.

    Returns:
      Interpolation without a batch axis, as `weigh_by_inverse_distance` weighs it.
    """
    index, squared = find_three_nearest(fine, coarse, mask)
    return structs.Interpolation(index, weigh_by_inverse_distance(squared))


def weigh_by_inverse_distance(squared: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
    """Weighs neighbours by 1 / (distance + 1e-8), so that the weights of a row sum to 1.

    Args:
      squared: f32[m, 3] squared distances, square metres; infinity where there is no neighbour.

    Returns:
      f32[m, 3] in [0, 1]; 0 where there is no neighbour.

    Source: VoteNet `PointnetFPModule.forward`.
    """
    inverse = np.float32(1) / (np.sqrt(squared) + np.float32(1e-8))
    total = inverse.sum(-1, keepdims=True)
    return inverse / np.where(total > 0, total, np.float32(1))
