"""SPOTA: spatial-prioritised optimal transport assignment. The cost of a pair is geometry only.

Source: "Real-Time 3D Object Detection with Inference-Aligned Learning" (SR3D, 2026), equations 3 to 5. No code was released;
what the text leaves open is an entry of `default_config`, with the reading that the published hyperparameters suggest.
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
    check_choice,
    dynamic_counts,
    on_label_level,
    pair_mask,
    select_lowest,
)
from vrdistill_jax.assigners.costs import (
    box_ious,
    center_distances,
    class_costs,
    in_boxes,
    in_centers,
    vertex_distances,
)
from vrdistill_jax.assigners.transport import select_from_plan, solve_transport
from vrdistill_jax.structs import Boxes


def default_config() -> ConfigDict:
    """The assigner's entry of config.detector.assigners.

    Entries:
      k: anchors per box.
      regression_cost: C_reg of equation 5: "iou" (1 - IoU) or "diou" (1 - DIoU, the loss that boxes are trained with).
      vertex_distance: whether R_VD (equation 3) is part of the cost.
      vertices: "opposite" (two corners determine an axis-aligned box) or "all" eight.
      vertex_frame: axes of the enclosing box for turned boxes: "world", "box" (those of the true box) or "canonical"
        (headings are ignored).
      vertex_match: "fixed" as printed; "min" does not tell apart the four ways to describe one turned box.
      center_prior: form of gamma_c for a centre distance d: "printed" 1 - exp(-mu d^2), a factor; "growing" exp(mu d^2), a
        factor with which a larger mu does mean more weight of the centre, as the text says (under the printed form a
        larger mu means less); "additive" mu (1 - exp(-d^2)), added; "none".
      mu: of the centre prior.
      distance_unit: of d, "metre" or the anchor's "stride".
      class_weight: lambda of a classification cost (focal, sum over classes) added to equation 5; 0 as published, the
        ablation "with C_cls" gives no value (1).
      restrict_levels: whether a class may only use its level, as in TR3D.
      candidates: anchors that a box may take: "all", those "in_box", or those "in_center", within `center_radius` strides.
      center_radius: of "in_center".
      dynamic_k: replaces k by the sum of the 10 highest IoUs, at least 1, as simOTA does.
      conflict: who gets an anchor of several claimants, "claimants" (the one of lowest cost) or "all" (the box of lowest
        cost, claimant or not).
      refill_rounds: how often boxes that lost anchors to others claim again among the free ones.
      transport: "top_k" is the published selection; "sinkhorn" solves equation 1 with a constant background cost.
      epsilon: of the Sinkhorn solver, in units of the cost.
      iterations: of the Sinkhorn solver.
    """
    return ConfigDict(
        dict(
            k=6,
            regression_cost="iou",
            vertex_distance=True,
            vertices="opposite",
            vertex_frame="world",
            vertex_match="fixed",
            center_prior="printed",
            mu=1.0,
            distance_unit="metre",
            class_weight=0.0,
            restrict_levels=False,
            candidates="all",
            center_radius=2.5,
            dynamic_k=False,
            conflict="claimants",
            refill_rounds=0,
            transport="top_k",
            epsilon=0.1,
            iterations=50,
        )
    )


DYNAMIC_TOP = 10  # IoUs that a dynamic k sums
# Keeps impossible pairs out of a transport plan; far above every cost, small enough for float32 to rank what it is added to.
_FORBIDDEN = 1e3
_CHOICES = {
    "regression_cost": ("iou", "diou"),
    "vertices": ("opposite", "all"),
    "vertex_frame": ("world", "box", "canonical"),
    "vertex_match": ("fixed", "min"),
    "center_prior": ("printed", "growing", "additive", "none"),
    "distance_unit": ("metre", "stride"),
    "candidates": ("all", "in_box", "in_center"),
    "conflict": ("claimants", "all"),
    "transport": ("top_k", "sinkhorn"),
}


def assign(anchors: Anchors, boxes: Boxes, config: Any, task: Task) -> Assignment:
    """Assigns to each box the anchors whose predictions and places fit it best.

    Args:
      anchors: of the batch, with predictions.
      boxes: ground truth.
      config: as `default_config`.
      task: whether boxes are turned; label_levels only if config.restrict_levels.

    Returns:
      The assignment.

    Raises:
      ValueError: for an unknown choice in the config.
    """
    for name, choices in _CHOICES.items():
        check_choice(config, name, choices)

    def assign_scene(anchors: Anchors, boxes: Boxes) -> Int[Array, " a"]:
        allowed = pair_mask(anchors, boxes)
        if config.restrict_levels:
            allowed &= on_label_level(anchors, boxes, task.label_levels)
        if config.candidates == "in_box":
            allowed &= in_boxes(anchors, boxes)
        if config.candidates == "in_center":
            allowed &= in_centers(anchors, boxes, config.center_radius)
        cost = pair_costs(anchors, boxes, config, task.rotated)
        count, max_count = jnp.full(len(boxes.mask), config.k), config.k
        if config.dynamic_k:
            max_count = DYNAMIC_TOP
            count = dynamic_counts(box_ious(anchors, boxes, task.rotated), allowed, DYNAMIC_TOP)
        if config.transport == "sinkhorn":
            count = jnp.minimum(count, jnp.sum(allowed, 1))
            cost = jnp.where(allowed, cost, cost + _FORBIDDEN)
            plan = solve_transport(
                cost,
                jnp.zeros(cost.shape[1]),
                count,
                boxes.mask,
                anchors.mask,
                config.epsilon,
                config.iterations,
            )
            index = select_from_plan(plan)
            # Anchors that several boxes need may push some of their labels to forbidden ones.
            reached = jnp.take_along_axis(allowed, jnp.maximum(index, 0)[None], 0)[0]
            return jnp.where(reached, index, -1)
        return _select_and_refill(jnp.where(allowed, cost, jnp.inf), count, max_count, config)

    return assign_scenes(assign_scene, anchors, boxes, task.rotated)


def pair_costs(anchors: Anchors, boxes: Boxes, config: Any, rotated: bool) -> Float[Array, "g a"]:
    """The cost of every pair of one scene.

    Source: SR3D, equation 5: gamma_c (C_reg + R_VD).
    """
    cost = 1 - box_ious(anchors, boxes, rotated, config.regression_cost)
    if config.vertex_distance:
        cost = cost + vertex_distances(
            anchors, boxes, rotated, config.vertices, config.vertex_frame, config.vertex_match
        )
    squared = center_distances(anchors, boxes, in_strides=config.distance_unit == "stride")
    if config.center_prior == "printed":
        cost = cost * -jnp.expm1(-config.mu * squared)
    elif config.center_prior == "growing":
        cost = cost * jnp.exp(jnp.minimum(config.mu * squared, 60.0))  # stays finite far away
    elif config.center_prior == "additive":
        cost = cost - config.mu * jnp.expm1(-squared)
    if config.class_weight:
        positive, negative = (
            optax.sigmoid_focal_loss(anchors.class_logits, target, alpha=0.25)
            for target in (jnp.ones(()), jnp.zeros(()))
        )
        cost = cost + config.class_weight * class_costs(positive, negative, boxes)
    return cost


def _select_and_refill(
    cost: Float[Array, "g a"], count: Int[Array, " g"], max_count: int, config: Any
) -> Int[Array, " a"]:
    index = select_lowest(cost, count, max_count, config.conflict)
    for _ in range(config.refill_rounds):
        taken = index >= 0
        have = jnp.sum(index[None] == jnp.arange(len(count))[:, None], axis=1)
        more = select_lowest(jnp.where(taken[None], jnp.inf, cost), count - have, max_count, config.conflict)
        index = jnp.where(taken, index, more)
    return index
