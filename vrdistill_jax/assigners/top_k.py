"""TR3D's assigner: the anchors nearest to a box's centre, on the level of the box's class.

Source: Rukhovich et al., "TR3D: Towards Real-Time Indoor 3D Object Detection" (2023), and the repository tr3d.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vrdistill_jax.assigners.assignment import (
    Anchors,
    Assignment,
    Task,
    argmin_of_boxes,
    assign_scenes,
    on_label_level,
    pair_mask,
)
from vrdistill_jax.assigners.costs import center_distances
from vrdistill_jax.structs import Boxes


def default_config() -> ConfigDict:
    """The assigner's entry of config.detector.assigners.

    Entries:
      k: anchors per box at most (those strictly nearer than the next one: ties at the border drop out).
      nearest_of_all: drops an anchor unless its box is also the nearest of all boxes, whatever their levels (the authors'
        repository); False keeps it (mmdetection3d's version). Published numbers are the same.
    """
    return ConfigDict(dict(k=6, nearest_of_all=True))


def assign(anchors: Anchors, boxes: Boxes, config: Any, task: Task) -> Assignment:
    """Assigns by distance alone.

    Args:
      anchors: of the batch.
      boxes: ground truth.
      config: as `default_config`.
      task: its label_levels must be given.

    Returns:
      The assignment. An anchor that is among the nearest of several boxes goes to the nearest of them.

    Differs: in a scene with no more than k anchors in all, the reference drops the farthest; here all are taken.
    """

    def assign_scene(anchors: Anchors, boxes: Boxes) -> Int[Array, " a"]:
        real = pair_mask(anchors, boxes)
        distance = jnp.where(real, center_distances(anchors, boxes), jnp.inf)
        on_level = jnp.where(on_label_level(anchors, boxes, task.label_levels), distance, jnp.inf)
        limit = jnp.full(len(boxes.mask), jnp.inf)
        if on_level.shape[1] > config.k:
            limit = -jax.lax.top_k(-on_level, config.k + 1)[0][:, -1]
        near = on_level < limit[:, None]
        owner = argmin_of_boxes(jnp.where(near, distance, jnp.inf))
        found = jnp.any(near, axis=0)
        if config.nearest_of_all:
            found &= owner == argmin_of_boxes(distance)
        return jnp.where(found, owner, -1)

    return assign_scenes(assign_scene, anchors, boxes, task.rotated)
