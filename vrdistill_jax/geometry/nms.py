"""Greedy non-maximum suppression with static shapes.

Boxes are visited by falling score (equal scores: lower row first); a box is kept if no kept box before it
overlaps it by more than the threshold (strictly).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.boxes import axis_aligned_boxes
from vrdistill_jax.geometry.iou import bev_area, bev_intersection, box_intersection, box_volume


class Kept(NamedTuple):
    """What suppression leaves. The boxes in picking order are `order[mask[order]]`."""

    mask: Bool[Array, "n"]  # in the order of the input
    order: Int[Array, "n"]  # rows of the input by falling score, masked ones last


def nms(
    boxes: Float[Array, "n 7"],
    score: Float[Array, "n"],
    mask: Bool[Array, "n"] | None = None,
    label: Int[Array, "n"] | None = None,
    *,
    threshold: float,
    overlap: str = "aligned",
    denominator: str = "union",
) -> Kept:
    """Keeps the best of every group of overlapping boxes.

    Args:
      boxes: [n, 7] metres and radians.
      score: [n] finite; higher is better.
      mask: [n] True where a row is real, or None for all. Masked rows are not kept and suppress nothing.
      label: [n] to let only boxes of one class suppress each other, or None for class-agnostic suppression.
      threshold: in [0, 1]; a box goes if its overlap with a kept one is greater.
      overlap: "aligned" compares the axis-aligned boxes around the boxes (VoteNet), "rotated" the boxes
        themselves; the "bev_" variants compare their outlines seen from above.
      denominator: "union" for the IoU, "candidate" for intersection / size of the lower-scored box (VoteNet's
        "old type").

    Returns:
      A mask in the input's order and the ranking.

    Raises:
      ValueError: if `overlap` or `denominator` is unknown.

    Source: VoteNet, utils/nms.py.
    Differs: equal scores, whose order the reference leaves open, go by row; a box with a negative size is
      empty: it neither suppresses nor is suppressed.
    """
    if mask is None:
        mask = jnp.ones(boxes.shape[0], bool)
    order = jnp.lexsort((-score, ~mask))  # stable; the last key is the main one
    boxes, ranked_mask = boxes[order], mask[order]
    suppresses = _pairwise_overlap(boxes, overlap, denominator) > threshold
    suppresses &= jnp.tri(boxes.shape[0], k=-1, dtype=bool).T
    if label is not None:
        suppresses &= label[order][:, None] == label[order][None, :]

    # Keeping depends on better rows only. Each round decides from the last round's answer; after k rounds the
    # first k rows are final, so a round that changes nothing has found the greedy answer. Real scenes need a
    # handful of rounds.
    def next_round(state):
        keep, _ = state
        updated = ranked_mask & ~(suppresses & keep[:, None]).any(0)
        return updated, (updated != keep).any()

    keep, _ = jax.lax.while_loop(lambda state: state[1], next_round, (ranked_mask, ranked_mask.any()))
    return Kept(jnp.zeros_like(mask).at[order].set(keep), order)


def _pairwise_overlap(boxes: Float[Array, "n 7"], overlap: str, denominator: str) -> Float[Array, "n n"]:
    """Overlap of the row's box (first axis, the better one) with the column's (the candidate)."""
    if overlap not in ("aligned", "rotated", "bev_aligned", "bev_rotated"):
        raise ValueError(f"overlap={overlap!r}; choose 'aligned', 'rotated', 'bev_aligned' or 'bev_rotated'")
    if denominator not in ("union", "candidate"):
        raise ValueError(f"denominator={denominator!r}; choose 'union' or 'candidate'")
    rotated = overlap.endswith("rotated")
    if not rotated:
        empty = (boxes[:, 3:6] <= 0).any(-1, keepdims=True)
        boxes = jnp.where(empty, 0.0, axis_aligned_boxes(boxes))
    intersect, measure = (
        (bev_intersection, bev_area) if overlap.startswith("bev") else (box_intersection, box_volume)
    )
    intersection = intersect(boxes[:, None], boxes[None, :], rotated=rotated)
    size = measure(boxes)
    total = jnp.broadcast_to(size, intersection.shape)
    if denominator == "union":
        total = size[:, None] + size[None, :] - intersection
    return jnp.where(total > 0, intersection / jnp.where(total > 0, total, 1.0), 0.0)
