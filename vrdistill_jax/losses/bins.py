"""Angles as a bin and a residual, as VoteNet and its family predict headings."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def bin_from_angle(angle: Float[Array, "*n"], num_bins: int) -> tuple[Int[Array, "*n"], Float[Array, "*n"]]:
    """Splits an angle into the nearest of `num_bins` bin centres 0, 2 pi / H, ... and a residual.

    Args:
      angle: f32[...] radians, any range.
      num_bins: H.

    Returns:
      (i32[...] in [0, H), f32[...] residual in [-pi / H, pi / H] radians).

    Source: VoteNet, model_util_*.py angle2class.
    """
    period = 2 * jnp.pi
    width = period / num_bins
    shifted = jnp.mod(jnp.mod(angle, period) + width / 2, period)
    index = jnp.clip(jnp.floor(shifted / width).astype(jnp.int32), 0, num_bins - 1)
    return index, shifted - (index * width + width / 2)


def angle_from_bin(
    index: Int[Array, "*n"], residual: Float[Array, "*n"], num_bins: int
) -> Float[Array, "*n"]:
    """Joins a bin and a residual (radians) to an angle in (-pi, pi]."""
    angle = index * (2 * jnp.pi / num_bins) + residual
    return jnp.where(angle > jnp.pi, angle - 2 * jnp.pi, angle)
