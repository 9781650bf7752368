"""The generalised IoU of turned boxes as 3DETR's code computes it, for comparison with its numbers."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vrdistill_jax.geometry.boxes import corners_from_boxes
from vrdistill_jax.geometry.iou import box_giou, box_volume, enclosing_size

VARIANTS = ("torch", "cython")
CYTHON_BOXES = 4


def pairwise_reference_giou(
    a: Float[Array, "*#b n 7"], b: Float[Array, "*#b m 7"], variant: str
) -> Float[Array, "*b n m"]:
    """GIoU of every box of `a` with every box of `b`, often too small; `geometry.iou.pairwise_giou` is right.

    A pair only overlaps if the aligned boxes between two opposite corners of each do, which the corners of boxes turned by more
    than some 45 degrees often do not.

    Args:
      a: [..., n, 7] metres and radians.
      b: [..., m, 7] metres and radians.
      variant: "torch"; or "cython", in which moreover only the first four rows of `b` overlap anything (what the reference uses
        where GIoU is no loss term and its extension is compiled).

    Returns:
      f32[..., n, m].

    Raises:
      ValueError: for an unknown variant.

    Source: 3DETR, utils/box_util.py and utils/box_intersection.pyx.
    """
    if variant not in VARIANTS:
        raise ValueError(f"reference GIoU {variant!r} is unknown; there are: {', '.join(VARIANTS)}")
    a, b = a[..., :, None, :], b[..., None, :, :]
    corners_a, corners_b = (corners_from_boxes(boxes)[..., :2] for boxes in (a, b))
    low = jnp.maximum(corners_a[..., 2, :], corners_b[..., 2, :])
    high = jnp.minimum(corners_a[..., 0, :], corners_b[..., 0, :])
    overlaps = jnp.all(high > low, axis=-1)
    if variant == "cython":
        overlaps &= jnp.arange(b.shape[-2]) < CYTHON_BOXES
    separate = (box_volume(a) + box_volume(b)) / jnp.prod(enclosing_size(a, b), axis=-1) - 1
    return jnp.where(overlaps, box_giou(a, b), separate)
