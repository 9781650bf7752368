"""Means over valid entries, also across devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def masked_mean(
    values: Float[Array, "*n"], mask: Shaped[Array, "*n"], axis_name: str | None = None, epsilon: float = 1e-6
) -> Float[Array, ""]:
    """Weighted mean, sum(values * mask) / (sum(mask) + epsilon).

    Across devices the denominator is the one of all devices and the result is this device's share times their number:
    the mean of the results (and of their gradients) over the devices equals the mean over the whole batch. No
    collective lies on the differentiated path.

    Args:
      values: f32[...]; where the mask is 0 they are ignored, even NaN.
      mask: bool or non-negative weights, the same shape.
      axis_name: mapped device axis, or None for one device.
      epsilon: keeps an empty mask finite (the result is then 0).

    Returns:
      Scalar.
    """
    weight = mask.astype(values.dtype)
    total = jnp.sum(jnp.where(weight > 0, values, 0.0) * weight)
    count = jnp.sum(weight)
    if axis_name is None:
        return total / (count + epsilon)
    devices = jax.lax.psum(1, axis_name)
    return total * devices / (jax.lax.psum(count, axis_name) + epsilon)
