"""simOTA: the anchors of least cost per box, their number from the IoUs.

Source: Ge et al., "YOLOX: Exceeding YOLO Series in 2021" and its repository, carried over to 3D as in `assigners.ota`; there
is no objectness branch, so class probabilities stand alone.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.assigners.assignment import (
    Anchors,
    Assignment,
    Task,
    assign_scenes,
    dynamic_counts,
    pair_mask,
    select_lowest,
)
from vrdistill_jax.assigners.costs import box_ious, class_costs, in_boxes, in_centers
from vrdistill_jax.structs import Boxes


def default_config() -> ConfigDict:
    """The assigner's entry of config.detector.assigners.

    Entries:
      class_weight: of the classification cost (binary cross entropy, sum over classes).
      regression_weight: of -log IoU.
      center_radius: strides; candidates are the anchors inside any box or near any centre, and a pair that is not both
        inside its own box and near its centre costs `outside_cost` more.
      outside_cost: in units of the cost.
      dynamic_top: a box takes the sum of so many highest IoUs, at least 1 anchor.
    """
    return ConfigDict(
        dict(class_weight=1.0, regression_weight=3.0, center_radius=2.5, outside_cost=1e3, dynamic_top=10)
    )


def assign(anchors: Anchors, boxes: Boxes, config: Any, task: Task) -> Assignment:
    """Assigns each box the anchors of least classification and regression cost.

    Args:
      anchors: of the batch, with predictions.
      boxes: ground truth.
      config: as `default_config`.
      task: whether boxes are turned.

    Returns:
      The assignment. A contested anchor goes to the box, of all, for which it costs least.

    Differs: pairs outside cost 1e3 more instead of 1e5, at which float32 ranks them coarsely.
    """

    def class_cost(anchors: Anchors, boxes: Boxes, iou: Float[Array, "g a"]) -> Float[Array, "g a"]:
        del iou
        positive, negative = (
            optax.sigmoid_binary_cross_entropy(anchors.class_logits, target)
            for target in (jnp.ones(()), jnp.zeros(()))
        )
        return class_costs(positive, negative, boxes)

    return assign_by_cost(anchors, boxes, config, task, class_cost, 1e-8)


def assign_by_cost(
    anchors: Anchors, boxes: Boxes, config: Any, task: Task, class_cost: Any, iou_epsilon: float
) -> Assignment:
    """The scheme of simOTA for any classification cost.

    Args:
      anchors: of the batch.
      boxes: ground truth.
      config: as `default_config`.
      task: whether boxes are turned.
      class_cost: (anchors, boxes, iou) of one scene -> f32[G, A].
      iou_epsilon: added to the IoU inside the logarithm.

    Returns:
      The assignment.
    """

    def assign_scene(anchors: Anchors, boxes: Boxes) -> Int[Array, " a"]:
        real = pair_mask(anchors, boxes)
        within = in_boxes(anchors, boxes) & real
        central = in_centers(anchors, boxes, config.center_radius) & real
        candidate = real & jnp.any(within | central, axis=0)[None]
        iou = box_ious(anchors, boxes, task.rotated)
        cost = config.class_weight * class_cost(anchors, boxes, iou)
        cost = cost - config.regression_weight * jnp.log(iou + iou_epsilon)
        cost = jnp.where(within & central, cost, cost + config.outside_cost)
        count = dynamic_counts(iou, candidate, config.dynamic_top)
        return select_lowest(jnp.where(candidate, cost, jnp.inf), count, config.dynamic_top, conflict="all")

    return assign_scenes(assign_scene, anchors, boxes, task.rotated)
