"""Three-nearest-neighbour interpolation in pure JAX: weights from coordinates, features by weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax import structs
from vrdistill_jax.geometry.neighbors import find_three_nearest


def build_interpolation(
    fine: Float[Array, "m 3"],
    coarse: Float[Array, "n 3"],
    mask: Bool[Array, "n"] | None = None,
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


def weigh_by_inverse_distance(squared: Float[Array, "*m 3"]) -> Float[Array, "*m 3"]:
    """Weighs neighbours by 1 / (distance + 1e-8), so that the weights of a row sum to 1.

    Args:
      squared: f32[..., 3] squared distances, square metres; infinity where there is no neighbour.

    Returns:
      f32[..., 3] in [0, 1]; 0 where there is no neighbour.

    Source: VoteNet `PointnetFPModule.forward`.
    """
    inverse = 1 / (jnp.sqrt(jax.lax.stop_gradient(squared)) + 1e-8)
    total = inverse.sum(-1, keepdims=True)
    return inverse / jnp.where(total > 0, total, 1.0)


def interpolate(
    features: Float[Array, "*b n c"], index: Int[Array, "*b m 3"], weight: Float[Array, "*b m 3"]
) -> Float[Array, "*b m c"]:
    """Carries features from a coarse level to a finer one; gradients reach the features only.

    Args:
      features: [..., n, c] of the coarse points.
      index: i32[..., m, 3] rows of the coarse level.
      weight: f32[..., m, 3].

    Returns:
      [..., m, c] in the dtype of `features`.

    Source: pointnet2 `three_interpolate_kernel`.
    """
    weight = jax.lax.stop_gradient(weight).astype(features.dtype)

    def take(features, index):
        return features[index]

    for _ in range(features.ndim - 2):
        take = jax.vmap(take)
    # One neighbour at a time, so that no [m, 3, c] array is held.
    parts = [take(features, index[..., k]) * weight[..., k, None] for k in range(3)]
    return parts[0] + parts[1] + parts[2]
