"""IoU, GIoU and DIoU of axis-aligned and of rotated (yaw) boxes, paired and pairwise.

A box row is (x, y, z, l, w, h, yaw). Paired functions broadcast their leading axes; `pairwise_*` compare
every row of one set with every row of another. All are float32, work under jit, vmap and reverse-mode
grad, and give finite values and gradients for every finite box. A box with any size <= 0 is empty: it
overlaps nothing.

How two rotated rectangles are intersected: in the frame of the second one, the shared area is the integral
over x in [-l/2, l/2] of (top - bottom) of the first, with both clamped to [-w/2, w/2]. Walking around the
first rectangle, that is a sum of four terms, one for each edge: the mean of a clamped straight line times the
edge's (clipped) run in x. No decision "inside or outside" is taken anywhere, so the sum is continuous in its
inputs: identical, touching and edge-sharing boxes need no special case, and for equal yaws it reduces to the
axis-aligned formula.

Differs: the references clip polygons (Sutherland-Hodgman) and lose or double shared edges; see
docs/evaluation.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vrdistill_jax.geometry.boxes import axis_aligned_boxes
from vrdistill_jax.geometry.host.boxes import FLAT, SMALLEST

# The BEV corners of a box, counter-clockwise.
_BEV_SIGNS = ((1, 1), (-1, 1), (-1, -1), (1, -1))


def box_iou(
    a: Float[Array, "*#b 7"], b: Float[Array, "*#b 7"], *, rotated: bool = True
) -> Float[Array, "*b"]:
    """Gives the 3D IoU of box pairs.

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw, as for axis-aligned data sets (cheaper).

    Returns:
      f32[...] in [0, 1].
    """
    intersection, union = _intersection_and_union(a, b, rotated)
    return _ratio(intersection, union)


def bev_iou(
    a: Float[Array, "*#b 7"], b: Float[Array, "*#b 7"], *, rotated: bool = True
) -> Float[Array, "*b"]:
    """Gives the IoU of the boxes' outlines seen from above.

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f32[...] in [0, 1].
    """
    overlap = bev_intersection(a, b, rotated=rotated)
    return _ratio(overlap, bev_area(a) + bev_area(b) - overlap)


def box_giou(
    a: Float[Array, "*#b 7"],
    b: Float[Array, "*#b 7"],
    *,
    rotated: bool = True,
    enclosing: str = "aligned",
) -> Float[Array, "*b"]:
    """Gives the generalised IoU of box pairs: IoU - 1 + union / enclosing volume.

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw.
      enclosing: "aligned" takes the axis-aligned box around both, so that a rotated box has a GIoU < 1 with
        itself; "oriented" the smaller of the boxes around both that are aligned with `a` or with `b`: 1 for
        identical boxes.

    Returns:
      f32[...] in [-1, 1]; -1 where the box around both is empty.

    Raises:
      ValueError: if `enclosing` is unknown.

    Source: Rezatofighi et al., CVPR 2019; "aligned" as in 3DETR.
    Differs: 3DETR's intersection is 0 for headings beyond about 90 degrees; this one is right for all.
    """
    intersection, union = _intersection_and_union(a, b, rotated)
    return _ratio(intersection, union) - 1 + _ratio(union, _enclosing_volume(a, b, rotated, enclosing))


def box_diou(
    a: Float[Array, "*#b 7"], b: Float[Array, "*#b 7"], *, rotated: bool = True
) -> Float[Array, "*b"]:
    """Gives the distance IoU of box pairs: IoU - squared centre distance / squared enclosing diagonal.

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f32[...] in [-1, 1].

    Source: Zheng et al., AAAI 2020; the enclosing box is axis-aligned as in mmdetection3d's TR3D.
    Differs: the rotated variant there takes the difference of the widths for that of the heights' centres.
    """
    offset = a[..., :3] - b[..., :3]
    diagonal = enclosing_size(a, b, rotated=rotated)
    penalty = _ratio((offset**2).sum(-1), (diagonal**2).sum(-1))
    return box_iou(a, b, rotated=rotated) - penalty


def pairwise_iou(
    a: Float[Array, "*b n 7"], b: Float[Array, "*b m 7"], *, rotated: bool = True
) -> Float[Array, "*b n m"]:
    """Gives the 3D IoU of every box of `a` with every box of `b`, see `box_iou`.

    Args:
      a: [..., n, 7] metres and radians.
      b: [..., m, 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f32[..., n, m] in [0, 1].
    """
    return box_iou(a[..., :, None, :], b[..., None, :, :], rotated=rotated)


def pairwise_bev_iou(
    a: Float[Array, "*b n 7"], b: Float[Array, "*b m 7"], *, rotated: bool = True
) -> Float[Array, "*b n m"]:
    """Gives the BEV IoU of every box of `a` with every box of `b`, see `bev_iou`.

    Args:
      a: [..., n, 7] metres and radians.
      b: [..., m, 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f32[..., n, m] in [0, 1].
    """
    return bev_iou(a[..., :, None, :], b[..., None, :, :], rotated=rotated)


def pairwise_giou(
    a: Float[Array, "*b n 7"],
    b: Float[Array, "*b m 7"],
    *,
    rotated: bool = True,
    enclosing: str = "aligned",
) -> Float[Array, "*b n m"]:
    """Gives the generalised IoU of every box of `a` with every box of `b`, see `box_giou`.

    Args:
      a: [..., n, 7] metres and radians.
      b: [..., m, 7] metres and radians.
      rotated: False ignores the yaw.
      enclosing: "aligned" or "oriented".

    Returns:
      f32[..., n, m] in [-1, 1].
    """
    return box_giou(a[..., :, None, :], b[..., None, :, :], rotated=rotated, enclosing=enclosing)


def pairwise_diou(
    a: Float[Array, "*b n 7"], b: Float[Array, "*b m 7"], *, rotated: bool = True
) -> Float[Array, "*b n m"]:
    """Gives the distance IoU of every box of `a` with every box of `b`, see `box_diou`.

    Args:
      a: [..., n, 7] metres and radians.
      b: [..., m, 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f32[..., n, m] in [-1, 1].
    """
    return box_diou(a[..., :, None, :], b[..., None, :, :], rotated=rotated)


def box_volume(boxes: Float[Array, "*b 7"]) -> Float[Array, "*b"]:
    """Gives the volume of boxes, 0 for empty ones.

    Args:
      boxes: [..., 7] metres and radians.

    Returns:
      f32[...] cubic metres, >= 0.
    """
    area, height = bev_area(boxes), boxes[..., 5]
    return jnp.where(height > 0, area * height, 0.0)


def bev_area(boxes: Float[Array, "*b 7"]) -> Float[Array, "*b"]:
    """Gives the area of the boxes' outlines seen from above, 0 for empty ones.

    Args:
      boxes: [..., 7] metres and radians.

    Returns:
      f32[...] square metres, >= 0.
    """
    length, width = boxes[..., 3], boxes[..., 4]
    return jnp.where((length > 0) & (width > 0), length * width, 0.0)


def box_intersection(
    a: Float[Array, "*#b 7"], b: Float[Array, "*#b 7"], *, rotated: bool = True
) -> Float[Array, "*b"]:
    """Gives the volume shared by box pairs.

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f32[...] cubic metres, from 0 to the smaller volume.
    """
    return bev_intersection(a, b, rotated=rotated) * _interval_overlap(a, b, 2)


def bev_intersection(
    a: Float[Array, "*#b 7"], b: Float[Array, "*#b 7"], *, rotated: bool = True
) -> Float[Array, "*b"]:
    """Gives the area shared by the boxes' outlines seen from above; the module's docstring says how.

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f32[...] square metres, from 0 to the smaller area.
    """
    if not rotated:
        return _interval_overlap(a, b, 0) * _interval_overlap(a, b, 1)
    return jnp.clip(_rectangle_overlap(a, b), 0.0, jnp.minimum(bev_area(a), bev_area(b)))


@jax.custom_vjp
def _rectangle_overlap(a, b) -> Array:
    """Sum over the edges of `a`, which is the shared area up to rounding."""
    corners = _bev_corners_in_frame_of(a, b)
    edges = zip(corners, corners[1:] + corners[:1], strict=True)
    return -sum((_integral_of_clamped_edge(start, end, b) for start, end in edges), start=jnp.zeros(()))


def _rectangle_overlap_in_steps(a, b) -> Array:
    """The same sum with an axis of four edges and with the corners kept in memory.

    XLA on CPU fuses the separate edges above into one fast loop, but their gradient into loops that redo one
    another's work (50 times slower); this form is the other way round.
    """
    corners = jnp.stack([jnp.stack(corner) for corner in _bev_corners_in_frame_of(a, b)])
    corners = jax.lax.optimization_barrier(corners)
    start, end = corners.swapaxes(0, 1), jnp.roll(corners, -1, axis=0).swapaxes(0, 1)
    return -_integral_of_clamped_edge(start, end, b).sum(0)


_rectangle_overlap.defvjp(
    lambda a, b: (_rectangle_overlap(a, b), (a, b)),
    lambda boxes, cotangent: jax.vjp(_rectangle_overlap_in_steps, *boxes)[1](cotangent),
)


def _integral_of_clamped_edge(start, end, b) -> Array:
    """Integrates y, clamped to b's width, over the part of an edge that lies within b's length."""
    (x_start, y_start), (x_end, y_end) = start, end
    limit_x, limit_y = jnp.maximum(b[..., 3], 0) / 2, jnp.maximum(b[..., 4], 0) / 2
    x_0, x_1 = jnp.clip(x_start, -limit_x, limit_x), jnp.clip(x_end, -limit_x, limit_x)
    # y where x is clipped, computed from the nearer end so that an end that stays keeps its y exactly.
    run = x_end - x_start
    upright = jnp.abs(run) <= FLAT
    slope = jnp.where(upright, 0.0, (y_end - y_start) / jnp.where(upright, 1.0, run))
    y_0, y_1 = y_start + (x_0 - x_start) * slope, y_end + (x_1 - x_end) * slope
    # Mean of the clamped line from y_0 to y_1: it stays at c_0 before it enters the band and at c_1 after it
    # leaves; `share` is the weight of c_1. Where c_0 = c_1 the weight does not matter, so its rounding is
    # harmless.
    c_0, c_1 = jnp.clip(y_0, -limit_y, limit_y), jnp.clip(y_1, -limit_y, limit_y)
    rise = y_1 - y_0
    flat = jnp.abs(rise) <= FLAT
    share = jnp.where(flat, 0.5, (y_1 - (c_0 + c_1) / 2) / jnp.where(flat, 1.0, rise))
    return (x_1 - x_0) * (c_0 + (c_1 - c_0) * jnp.clip(share, 0.0, 1.0))


def _bev_corners_in_frame_of(a, b) -> list[tuple[Array, Array]]:
    """The four corners (x, y) of `a` seen from above, counter-clockwise, in the frame of box `b`.

    Differences of centres and of yaws come first: far from the origin no digits are lost, and equal boxes
    give exactly the corners +-size/2.
    """
    delta_x, delta_y = a[..., 0] - b[..., 0], a[..., 1] - b[..., 1]
    cos_b, sin_b = jnp.cos(b[..., 6]), jnp.sin(b[..., 6])
    center_x, center_y = cos_b * delta_x + sin_b * delta_y, cos_b * delta_y - sin_b * delta_x
    turn = a[..., 6] - b[..., 6]
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    half_l, half_w = jnp.maximum(a[..., 3], 0) / 2, jnp.maximum(a[..., 4], 0) / 2
    along, across = (cos * half_l, sin * half_l), (-sin * half_w, cos * half_w)
    return [
        (center_x + i * along[0] + j * across[0], center_y + i * along[1] + j * across[1])
        for i, j in _BEV_SIGNS
    ]


def _interval_overlap(a, b, axis: int) -> Array:
    """Length two boxes share along an axis, measured from b's centre: far-away boxes lose no digits."""
    offset = a[..., axis] - b[..., axis]
    half_a, half_b = a[..., 3 + axis] / 2, b[..., 3 + axis] / 2
    length = jnp.minimum(offset + half_a, half_b) - jnp.maximum(offset - half_a, -half_b)
    return jnp.where((length > 0) & (half_a > 0) & (half_b > 0), length, 0.0)


def _intersection_and_union(a, b, rotated: bool) -> tuple[Array, Array]:
    volume_a, volume_b = box_volume(a), box_volume(b)
    intersection = jnp.minimum(box_intersection(a, b, rotated=rotated), jnp.minimum(volume_a, volume_b))
    return intersection, volume_a + volume_b - intersection


def enclosing_size(
    a: Float[Array, "*#b 7"], b: Float[Array, "*#b 7"], *, rotated: bool = True
) -> Float[Array, "*b 3"]:
    """Gives the size of the smallest axis-aligned box around both boxes of each pair.

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f32[..., 3] metres, >= 0.
    """
    if rotated:
        a, b = axis_aligned_boxes(a), axis_aligned_boxes(b)
    offset = a[..., :3] - b[..., :3]
    half_a, half_b = jnp.maximum(a[..., 3:6], 0) / 2, jnp.maximum(b[..., 3:6], 0) / 2
    return jnp.maximum(offset + half_a, half_b) - jnp.minimum(offset - half_a, -half_b)


def _enclosing_volume(a, b, rotated: bool, enclosing: str) -> Array:
    if enclosing not in ("aligned", "oriented"):
        raise ValueError(f"enclosing={enclosing!r}; say 'aligned' or 'oriented'")
    size = enclosing_size(a, b, rotated=rotated)
    if enclosing == "aligned" or not rotated:
        return size.prod(-1)
    return jnp.minimum(_area_around(a, b), _area_around(b, a)) * size[..., 2]


def _area_around(a, b) -> Array:
    """Area of the rectangle around both outlines that is aligned with `b`."""
    corners = _bev_corners_in_frame_of(a, b)
    sides = []
    for axis in range(2):
        half = jnp.maximum(b[..., 3 + axis], 0) / 2
        low, high = -half, half
        for corner in corners:
            low, high = jnp.minimum(low, corner[axis]), jnp.maximum(high, corner[axis])
        sides.append(high - low)
    return sides[0] * sides[1]


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Numerator / denominator, 0 where the denominator is not positive (with finite gradients)."""
    positive = denominator > SMALLEST
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)
