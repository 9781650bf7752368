"""Losses on box parameters."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.iou import box_diou, box_iou, enclosing_size


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


def iou_loss(
    predicted: Float[Array, "*#n 7"], target: Float[Array, "*#n 7"], *, rotated: bool = True
) -> Float[Array, "*n"]:
    """1 - IoU of box pairs, unreduced.

    Args:
      predicted: f32[..., 7] centre, full size, yaw; metres and radians.
      target: f32[..., 7].
      rotated: False ignores yaws.

    Returns:
      f32[...] in [0, 1].
    """
    return 1 - box_iou(predicted, target, rotated=rotated)


def diou_loss(
    predicted: Float[Array, "*#n 7"],
    target: Float[Array, "*#n 7"],
    *,
    rotated: bool = True,
    reference: bool = False,
) -> Float[Array, "*n"]:
    """1 - DIoU of box pairs (1 - IoU + squared centre distance / squared enclosing diagonal), unreduced.

    Args:
      predicted: f32[..., 7] centre, full size, yaw; metres and radians.
      target: f32[..., 7].
      rotated: False ignores yaws.
      reference: for turned boxes, takes the difference of the lengths along the box axis (the fourth number) for that of
        the heights of the centres, as the references do; axis-aligned boxes are not concerned.

    Returns:
      f32[...] in [0, 2] (a little more with `reference`).

    Source: TR3D's losses in tr3d and mmdetection3d.
    Differs: the centre distance is right unless `reference` is set.
    """
    loss = 1 - box_diou(predicted, target, rotated=rotated)
    if not (reference and rotated):
        return loss
    difference = jnp.square(predicted - target)
    diagonal = jnp.sum(jnp.square(enclosing_size(predicted, target, rotated=True)), -1)
    positive = diagonal > 0
    return loss + jnp.where(
        positive, (difference[..., 3] - difference[..., 2]) / jnp.where(positive, diagonal, 1.0), 0.0
    )
