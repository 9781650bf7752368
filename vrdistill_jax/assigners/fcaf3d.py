"""FCAF3D's assigner: the most central anchors inside a box, on the coarsest level that still has enough of them.

Source: Rukhovich et al., "FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection" (2022), and the repositories fcaf3d and
mmdetection3d.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.assigners.assignment import Anchors, Assignment, Task, assign_scenes
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.structs import Boxes

MAX_LEVELS = 4  # of a head; levels that a head lacks hold no anchors and are never chosen


def default_config() -> ConfigDict:
    """The assigner's entry of config.detector.assigners.

    Entries:
      k: anchors per box at most (those strictly more central than the next one: ties at the border drop out).
      min_inside: a level is fine enough for a box if that many of its anchors lie inside.
    """
    return ConfigDict(dict(k=18, min_inside=27))


def assign(anchors: Anchors, boxes: Boxes, config: Any, task: Task) -> Assignment:
    """Assigns by where anchors lie inside the boxes.

    Args:
      anchors: of the batch, on at most MAX_LEVELS levels.
      boxes: ground truth.
      config: as `default_config`.
      task: says whether boxes are turned.

    Returns:
      The assignment. A box's level is the coarsest one such that it and all finer ones hold `min_inside` anchors inside, or
      the finest. An anchor that several boxes claim goes to the smallest.
    """

    def assign_scene(anchors: Anchors, boxes: Boxes) -> Int[Array, " a"]:
        rows = join_boxes(boxes.center, boxes.size, boxes.yaw)
        shape = anchors.mask.shape

        # Box by box: a table of all pairs would be large, since the finest level has some 100,000 anchors.
        def claim(best, box):
            number, row, real = box
            distances = face_distances(anchors.xyz, row)
            inside = (jnp.min(distances, -1) > 0) & anchors.mask & real
            level = _find_level(inside, anchors.level, config.min_inside)
            central = jnp.where(inside & (anchors.level == level), centerness(distances), -1.0)
            limit = jnp.float32(-1.0)
            if central.shape[0] > config.k:
                limit = jax.lax.top_k(central, config.k + 1)[0][-1]
            volume, owner = best
            won = (central > limit) & (jnp.prod(row[3:6]) < volume)
            return (jnp.where(won, jnp.prod(row[3:6]), volume), jnp.where(won, number, owner)), None

        nobody = jnp.full(shape, jnp.inf), jnp.full(shape, -1, jnp.int32)
        numbers = jnp.arange(len(boxes.mask), dtype=jnp.int32)
        return jax.lax.scan(claim, nobody, (numbers, rows, boxes.mask))[0][1]

    return assign_scenes(assign_scene, anchors, boxes, task.rotated)


def _find_level(inside, level, min_inside: int):
    """The coarsest level such that it and all finer ones have enough anchors inside a box; at least the finest."""
    counts = jnp.stack([jnp.sum(inside & (level == number)) for number in range(MAX_LEVELS)])
    return jnp.maximum(jnp.sum(jnp.cumprod(counts >= min_inside)) - 1, 0)


def face_distances(points: Float[Array, "*#n 3"], boxes: Float[Array, "*#n 7"]) -> Float[Array, "*n 6"]:
    """How far points lie from the six faces of their boxes.

    Args:
      points: f32[..., 3] metres.
      boxes: f32[..., 7] centre, full size, yaw.

    Returns:
      f32[..., 6] metres along the box's axes: from the lower and from the upper face in x, in y, in z. All are positive
      inside.
    """
    offset = points - boxes[..., :3]
    cos, sin = jnp.cos(boxes[..., 6]), jnp.sin(boxes[..., 6])
    x, y = cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0]
    # Anchors form a lattice, so that many are equally central but for rounding: the sums are in the reference's order.
    turned = boxes[..., :3] + jnp.stack([x, y, jnp.broadcast_to(offset[..., 2], x.shape)], -1)
    half = boxes[..., 3:6] / 2
    low, high = turned - boxes[..., :3] + half, boxes[..., :3] + half - turned
    return jnp.stack([low, high], -1).reshape(*low.shape[:-1], 6)


def centerness(distances: Float[Array, "*n 6"]) -> Float[Array, "*n"]:
    """How central a point is in a box.

    Args:
      distances: f32[..., 6] of `face_distances`.

    Returns:
      f32[...] from 1 at the centre to 0 at the faces: the root of the product, over the axes, of the smaller distance over
      the larger; 0 outside.
    """
    low, high = distances[..., ::2], distances[..., 1::2]
    inside = jnp.min(distances, -1) > 0
    small, large = jnp.minimum(low, high), jnp.where(inside[..., None], jnp.maximum(low, high), 1.0)
    product = small[..., 0] / large[..., 0]
    for axis in (1, 2):
        product = product * small[..., axis] / large[..., axis]
    return jnp.where(inside, jnp.sqrt(jnp.where(inside, product, 1.0)), 0.0)
