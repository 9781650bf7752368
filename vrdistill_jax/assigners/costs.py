"""Costs and conditions of (box, anchor) pairs of one scene: f32[G, A] or bool[G, A]."""

import functools
from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax.assigners.assignment import Anchors
from vrdistill_jax.geometry.boxes import join_boxes, points_in_boxes
from vrdistill_jax.geometry.iou import enclosing_size, pairwise_diou, pairwise_iou
from vrdistill_jax.structs import Boxes

# The corners of a box seen from above, counter-clockwise, in units of half a size.
_BEV_SIGNS = ((1, 1), (-1, 1), (-1, -1), (1, -1))
_EPSILON = 1e-7  # metres; keeps the distance of two empty boxes finite


def center_distances(anchors: Anchors, boxes: Boxes, in_strides: bool = False) -> Float[Array, "g a"]:
    """Squared distance from each anchor to each box's centre.

    Args:
      anchors: A.
      boxes: G.
      in_strides: measures in units of the anchor's stride instead of metres.

    Returns:
      f32[G, A] square metres, or square strides.
    """
    scale = anchors.stride if in_strides else 1.0
    return sum_of_squares((anchors.xyz[:, n] - boxes.center[:, n, None]) / scale for n in range(3))


def sum_of_squares(terms: Iterable[Array]) -> Array:
    """Axis by axis: XLA on a CPU makes several times slower code of a sum over an axis of 3."""
    return functools.reduce(jnp.add, map(jnp.square, terms))


def box_ious(anchors: Anchors, boxes: Boxes, rotated: bool, kind: str = "iou") -> Float[Array, "g a"]:
    """3D IoU (or "diou") of each box with the box predicted at each anchor."""
    rows = join_boxes(boxes.center, boxes.size, boxes.yaw)
    pairwise = pairwise_diou if kind == "diou" else pairwise_iou
    return pairwise(rows, anchors.boxes, rotated=rotated)


def in_boxes(anchors: Anchors, boxes: Boxes) -> Bool[Array, "g a"]:
    """Whether the anchor lies inside the box."""
    return points_in_boxes(anchors.xyz, join_boxes(boxes.center, boxes.size, boxes.yaw)).T


def in_centers(anchors: Anchors, boxes: Boxes, radius: float) -> Bool[Array, "g a"]:
    """Whether the anchor lies in the cube of half side `radius` strides of its level around the box's centre."""
    offset = jnp.max(jnp.abs(anchors.xyz[None] - boxes.center[:, None]), -1)
    return offset < radius * anchors.stride[None]


def class_costs(
    positive: Float[Array, "a k"], negative: Float[Array, "a k"], boxes: Boxes
) -> Float[Array, "g a"]:
    """Sum over classes of a binary loss against the one-hot label of each box.

    Args:
      positive: f32[A, K] loss of each logit if its class is there.
      negative: f32[A, K] loss of each logit if its class is not.
      boxes: G.

    Returns:
      f32[G, A].
    """
    label = jnp.maximum(boxes.label, 0)
    return jnp.sum(negative, -1)[None] + (positive - negative)[:, label].T


def vertex_distances(
    anchors: Anchors,
    boxes: Boxes,
    rotated: bool,
    vertices: str = "opposite",
    frame: str = "world",
    match: str = "fixed",
) -> Float[Array, "g a"]:
    """Normalised vertex distance: how far vertices of the predicted box are from the same ones of the true box.

    Args:
      anchors: with the predicted boxes.
      boxes: the true ones.
      rotated: False ignores yaws.
      vertices: "opposite": the lowest and the highest corner (in the box's own axes); "all": all eight.
      frame: of the enclosing box whose diagonal normalises: "world" axes, or those of the true box, "box"; "canonical"
        ignores the headings altogether.
      match: "fixed" compares a vertex with the one of the same name; "min" takes the least distance over the four
        namings that describe the same predicted box (quarter turns that swap length and width).

    Returns:
      f32[G, A] in [0, 1], 0 for equal boxes.

    Source: SR3D, equation 3. Which two vertices, and how turned boxes are compared, is not said; see `assigners.spota`.
    """
    if frame == "canonical":
        rotated = False
    true = join_boxes(boxes.center, boxes.size, boxes.yaw)[:, None]
    predicted = anchors.boxes[None]
    offset = predicted[..., :3] - true[..., :3]
    corners, other = _bev_corners(predicted, rotated), _bev_corners(true, rotated)
    rise = (predicted[..., 5] - true[..., 5]) / 2
    pairs = ((2, -1), (0, 1)) if vertices == "opposite" else [(n, z) for n in range(4) for z in (-1, 1)]

    def mean_distance(turns: int) -> Array:
        total = jnp.zeros(())
        for n, z in pairs:
            x, y = (corners[(n + turns) % 4][axis] - other[n][axis] for axis in range(2))
            squares = (offset[..., 0] + x) ** 2 + (offset[..., 1] + y) ** 2 + (offset[..., 2] + z * rise) ** 2
            total = total + jnp.sqrt(squares)
        return total / len(pairs)

    distance = mean_distance(0)
    if match == "min" and rotated:
        for turns in range(1, 4):
            distance = jnp.minimum(distance, mean_distance(turns))
    if frame == "box" and rotated:
        predicted, true = _in_frame_of(predicted, true)
    diagonal = jnp.sqrt(sum_of_squares(jnp.moveaxis(enclosing_size(predicted, true, rotated=rotated), -1, 0)))
    return distance / (diagonal + _EPSILON)


def _bev_corners(boxes: Float[Array, "*b 7"], rotated: bool) -> list[tuple[Array, Array]]:
    """The four corners (x, y) relative to the box's centre."""
    half_l, half_w = boxes[..., 3] / 2, boxes[..., 4] / 2
    yaw = boxes[..., 6] if rotated else jnp.zeros_like(half_l)
    cos, sin = jnp.cos(yaw), jnp.sin(yaw)
    return [(i * cos * half_l - j * sin * half_w, i * sin * half_l + j * cos * half_w) for i, j in _BEV_SIGNS]


def _in_frame_of(boxes: Float[Array, "*#b 7"], frame: Float[Array, "*#b 7"]) -> tuple[Array, Array]:
    """Both sets of boxes in the frame whose origin and axes are those of `frame`."""
    boxes, frame = jnp.broadcast_arrays(boxes, frame)
    offset = boxes[..., :3] - frame[..., :3]
    cos, sin = jnp.cos(frame[..., 6]), jnp.sin(frame[..., 6])
    x, y = cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0]
    center = jnp.stack([x, y, offset[..., 2]], -1)
    turned = join_boxes(center, boxes[..., 3:6], boxes[..., 6] - frame[..., 6])
    return turned, join_boxes(jnp.zeros_like(center), frame[..., 3:6], jnp.zeros_like(x))
