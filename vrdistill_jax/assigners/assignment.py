"""What assigners read and return, and the selection that several of them share.

An anchor is a voxel location of a dense head; assignment decides which anchors a ground-truth box trains. Nothing here
has gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.geometry.iou import box_iou
from vrdistill_jax.structs import Array, Boxes


class Anchors(NamedTuple):
    """The anchors of all levels, one after the other, with what the network predicts there.

    Batched as below; `assign_scenes` hands single scenes, without the axis B, to an assigner.
    """

    xyz: Array  # f32[B, A, 3] metres
    mask: Array  # bool[B, A]
    boxes: Array  # f32[B, A, 7] decoded: centre, full size, yaw
    class_logits: Array  # f32[B, A, K] one sigmoid per class
    level: Array  # i32[A] 0 is the finest
    stride: Array  # f32[A] metres between neighbouring anchors of the level


class Assignment(NamedTuple):
    """Which box each anchor is trained to find."""

    gt_index: Array  # i32[B, A] row of the ground truth, -1 none
    quality: Array  # f32[B, A] 3D IoU of the anchor's box with that row, 0 where there is none


class Task(NamedTuple):
    """What the data, and not the method, decides.

    Attributes:
      rotated: whether boxes are turned.
      label_levels: level of each class, for methods that restrict classes to levels; empty if unknown.
    """

    rotated: bool
    label_levels: tuple[int, ...] = ()


# Of one scene: (anchors, boxes) -> i32[A].
AssignScene = Callable[[Anchors, Boxes], Int[Array, " a"]]
_SCENE_AXES = (Anchors(0, 0, 0, 0, None, None), 0)


def assign_scenes(assign_scene: AssignScene, anchors: Anchors, boxes: Boxes, rotated: bool) -> Assignment:
    """Assigns scene by scene and adds the quality.

    Args:
      assign_scene: of one scene.
      anchors: of the batch.
      boxes: ground truth of the batch.
      rotated: False ignores yaws in the quality.

    Returns:
      The assignment, without gradients. Masked anchors and masked boxes take no part, whatever `assign_scene` says.
    """
    anchors, boxes = jax.lax.stop_gradient((anchors, Boxes(*map(jnp.asarray, boxes))))
    index = jax.vmap(assign_scene, in_axes=_SCENE_AXES)(anchors, boxes)
    real = (index >= 0) & anchors.mask & gather_rows(boxes.mask, jnp.maximum(index, 0))
    index = jnp.where(real, index, -1)
    target = gather_rows(join_boxes(boxes.center, boxes.size, boxes.yaw), jnp.maximum(index, 0))
    quality = jnp.where(real, box_iou(anchors.boxes, target, rotated=rotated), 0.0)
    return Assignment(index, quality)


def select_lowest(
    cost: Float[Array, "g a"], count: Int[Array, " g"], max_count: int, conflict: str = "claimants"
) -> Int[Array, " a"]:
    """Gives every box the anchors of lowest cost; an anchor that several boxes claim goes to the one of lowest cost.

    Args:
      cost: f32[G, A]; infinite where a pair is impossible. Equal costs: lower anchor, then lower box.
      count: i32[G] how many anchors each box claims.
      max_count: static upper bound of `count`.
      conflict: among whom a contested anchor is given: "claimants" (the boxes that claim it) or "all" boxes, so that a box
        that did not claim it may get it (simOTA's code).

    Returns:
      i32[A] box of each anchor, -1 none.
    """
    num_boxes, num_anchors = cost.shape
    max_count = min(max_count, num_anchors)
    negated, rows = jax.lax.top_k(-cost, max_count)
    wanted = (jnp.arange(max_count) < count[:, None]) & (negated > -jnp.inf)
    claims = jnp.zeros(cost.shape, bool).at[jnp.arange(num_boxes)[:, None], rows].max(wanted)
    owner = argmin_of_boxes(jnp.where(claims, cost, jnp.inf))
    if conflict == "all":
        owner = jnp.where(jnp.sum(claims, 0) > 1, argmin_of_boxes(cost), owner)
    return jnp.where(jnp.any(claims, 0), owner, -1)


def argmin_of_boxes(cost: Float[Array, "g a"]) -> Int[Array, " a"]:
    """The first box of lowest cost of each anchor, without NaN.

    jnp.argmin by two plain reductions, which XLA turns into vector instructions on a CPU.
    """
    row = jnp.arange(cost.shape[0], dtype=jnp.int32)[:, None]
    lowest = cost == jnp.min(cost, axis=0)
    return jnp.min(jnp.where(lowest, row, cost.shape[0]), axis=0)


def dynamic_counts(iou: Float[Array, "g a"], candidates: Bool[Array, "g a"], top: int) -> Int[Array, " g"]:
    """How many anchors each box deserves: the sum of its `top` highest IoUs, rounded down, at least 1.

    Source: OTA (Ge et al., 2021), "dynamic k estimation".
    """
    best = jax.lax.top_k(jnp.where(candidates, iou, 0.0), min(top, iou.shape[1]))[0]
    return jnp.maximum(jnp.sum(best, -1).astype(jnp.int32), 1)


def pair_mask(anchors: Anchors, boxes: Boxes) -> Bool[Array, "g a"]:
    """Pairs of a real box and a real anchor of one scene."""
    return boxes.mask[:, None] & anchors.mask[None, :]


def on_label_level(anchors: Anchors, boxes: Boxes, label_levels: tuple[int, ...]) -> Bool[Array, "g a"]:
    """Pairs whose anchor lies on the level of the box's class, of one scene.

    Raises:
      ValueError: if the levels of the classes are unknown.
    """
    if not label_levels:
        raise ValueError(
            "this assigner restricts classes to levels; give config.detector.label_levels, one level per class"
        )
    level = jnp.asarray(label_levels, jnp.int32)[jnp.maximum(boxes.label, 0)]
    return level[:, None] == anchors.level[None, :]


def check_choice(config: Any, name: str, choices: tuple) -> None:
    """Refuses an entry of an assigner's config that is none of `choices`.

    Raises:
      ValueError: naming the entry, its value and the choices.
    """
    if config[name] not in choices:
        raise ValueError(f"{name} is {config[name]!r}; expected one of {', '.join(map(str, choices))}")
