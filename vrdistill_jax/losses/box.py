"""Losses on box parameters."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def huber(error: Float[Array, "*n"], delta: float = 1.0) -> Float[Array, "*n"]:
    """0.5 e^2 inside |e| <= delta, delta (|e| - delta / 2) outside, unreduced."""
    magnitude = jnp.abs(error)
    inner = jnp.minimum(magnitude, delta)
    return 0.5 * inner**2 + delta * (magnitude - inner)


def squared_distances(a: Float[Array, "*b n 3"], b: Float[Array, "*b m 3"]) -> Float[Array, "*b n m"]:
    """Squared Euclidean distances between two point sets, by differences (no cancellation)."""
    return jnp.sum(jnp.square(a[..., :, None, :] - b[..., None, :, :]), axis=-1)


def nearest(
    distance: Float[Array, "*b n m"], mask: Bool[Array, "*b m"]
) -> tuple[Float[Array, "*b n"], Int[Array, "*b n"]]:
    """Distance to and row of the nearest valid column.

    Args:
      distance: f32[..., N, M] (squared or not).
      mask: bool[..., M] valid columns.

    Returns:
      (f32[..., N], i32[..., N]); without any valid column the distance is a large finite number and the row 0.
    """
    masked = jnp.where(mask[..., None, :], distance, 1e10)
    return jnp.min(masked, axis=-1), jnp.argmin(masked, axis=-1)
