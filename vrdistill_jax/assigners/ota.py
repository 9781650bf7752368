"""OTA: optimal transport assignment, solved by Sinkhorn iterations.

Source: Ge et al., "OTA: Optimal Transport Assignment for Object Detection" (2021) and its repository, carried over to 3D:
IoU is that of 3D boxes, and a window around a box's centre is a cube of `center_radius` strides.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from vrdistill_jax.assigners.assignment import (
    Anchors,
    Assignment,
    Task,
    assign_scenes,
    dynamic_counts,
    pair_mask,
)
from vrdistill_jax.assigners.costs import box_ious, class_costs, in_boxes, in_centers
from vrdistill_jax.assigners.transport import select_from_plan, solve_transport
from vrdistill_jax.structs import Boxes


def default_config() -> ConfigDict:
    """The assigner's entry of config.detector.assigners.

    Entries:
      regression_weight: of -log IoU beside the classification cost (focal, sum over classes).
      center_radius: strides; anchors outside the box or farther from its centre than this cost `outside_cost` more.
      outside_cost: in units of the cost.
      dynamic_top: a box supplies the sum of so many highest IoUs, at least 1 label.
      epsilon: of the Sinkhorn solver, in units of the cost.
      iterations: of the Sinkhorn solver.
    """
    return ConfigDict(
        dict(
            regression_weight=1.5,
            center_radius=2.5,
            outside_cost=1e3,
            dynamic_top=20,
            epsilon=0.1,
            iterations=50,
        )
    )


def assign(anchors: Anchors, boxes: Boxes, config: Any, task: Task) -> Assignment:
    """Assigns by the transport plan.

    Args:
      anchors: of the batch, with predictions.
      boxes: ground truth.
      config: as `default_config`.
      task: whether boxes are turned.

    Returns:
      The assignment.

    Differs: pairs outside cost 1e3 more instead of 1e6, at which float32 could not rank them.
    """

    def assign_scene(anchors: Anchors, boxes: Boxes) -> Int[Array, " a"]:
        inside = in_boxes(anchors, boxes) & in_centers(anchors, boxes, config.center_radius)
        inside &= pair_mask(anchors, boxes)
        iou = box_ious(anchors, boxes, task.rotated)
        positive, negative = (
            optax.sigmoid_focal_loss(anchors.class_logits, target, alpha=0.25)
            for target in (jnp.ones(()), jnp.zeros(()))
        )
        cost = class_costs(positive, negative, boxes)
        cost = cost - config.regression_weight * jnp.log(jnp.maximum(iou, jnp.finfo(iou.dtype).eps))
        plan = solve_transport(
            jnp.where(inside, cost, cost + config.outside_cost),
            jnp.sum(negative, -1),
            dynamic_counts(iou, inside, config.dynamic_top),
            boxes.mask,
            anchors.mask,
            config.epsilon,
            config.iterations,
        )
        return select_from_plan(plan)

    return assign_scenes(assign_scene, anchors, boxes, task.rotated)
