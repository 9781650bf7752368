"""Compares single operations of TR3D with the authors': units.npz of a golden folder.

It holds groups GROUP/NAME. SUN RGB-D's: rot (turned boxes), decode, nms_rot, nms_normal. ScanNet's: aa (axis-aligned boxes),
focal, assign. Arrays that a group has besides those compared here are listed as skipped.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vrdistill_jax.assigners import find_assigner
from vrdistill_jax.assigners.assignment import Anchors, Task
from vrdistill_jax.detectors.tr3d import boxes_from_head
from vrdistill_jax.geometry.iou import bev_intersection, box_iou
from vrdistill_jax.geometry.nms import nms
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.losses.box import diou_loss, iou_loss
from vrdistill_jax.losses.classification import focal_loss
from vrdistill_jax.structs import pad_boxes

# Theirs is float64. Overlaps of turned boxes are sums of products of some metres; their gradients divide by box sizes.
VALUES, GRADIENTS = 1e-5, 2e-4
Group = dict[str, np.ndarray]


def check_units(table: ParityTable, stored: dict[str, np.ndarray], config: Any) -> None:
    """Compares every group that is there.

    Args:
      table: gets the rows.
      stored: arrays of units.npz.
      config: config.detector.
    """
    groups: dict[str, Group] = {}
    for name, value in stored.items():
        group, _, entry = name.partition("/")
        groups.setdefault(group, {})[entry] = value
    for label, arrays in groups.items():
        compared = CHECKS[label](table, arrays, config) if label in CHECKS else set()
        table.skipped += [f"units:{label}/{entry} (unknown)" for entry in arrays if entry not in compared]


def check_turned_boxes(table: ParityTable, group: Group, config: Any) -> set[str]:
    """Overlaps and DIoU losses of pairs of turned boxes."""
    del config
    if not {"pred", "target"} <= set(group):
        return set()  # all are then listed as unknown
    pred, target = jnp.asarray(group["pred"]), jnp.asarray(group["target"])
    sum_of_losses = jax.grad(lambda p: jnp.sum(diou_loss(p, target, reference=True)))
    ours = {
        "bev_intersection": (jax.jit(bev_intersection)(pred, target), VALUES),
        "iou3d": (jax.jit(box_iou)(pred, target), VALUES),
        "diou_loss_official_formula": (jax.jit(lambda p: diou_loss(p, target, reference=True))(pred), VALUES),
        "diou_loss_true_centre": (jax.jit(lambda p: diou_loss(p, target))(pred), VALUES),
        "grad_pred_of_sum": (jax.jit(sum_of_losses)(pred), GRADIENTS),
    }
    return {"pred", "target"} | add_known(table, "rot", group, ours)


def check_aligned_boxes(table: ParityTable, group: Group, config: Any) -> set[str]:
    """IoU, DIoU loss and gradients of pairs of axis-aligned boxes (centre, size)."""
    del config

    def loss(function: Callable) -> Callable[[Array], Array]:
        target = _upright(group["target"])
        return lambda pred: function(_upright(pred), target, rotated=False)

    if not {"pred", "target"} <= set(group):
        return set()  # all are then listed as unknown
    losses, ours = {"iou_loss": loss(iou_loss), "diou_loss": loss(diou_loss), "iou": loss(box_iou)}, {}
    for name, theirs in group.items():
        # A loss may be called after the overlap that it is 1 minus; a gradient without a name is that of the DIoU loss.
        readings = ["diou_loss"]
        if "iou" in name and "diou" not in name:
            readings = ["iou_loss"] if "loss" in name else ["iou", "iou_loss"]
        if "grad" in name:  # of the sum
            values = [
                jax.jit(jax.grad(lambda p, f=losses[r]: jnp.sum(f(p))))(group["pred"]) for r in readings
            ]
            ours[name] = _nearest(values, theirs), GRADIENTS
        elif "iou" in name:
            ours[name] = _nearest([jax.jit(losses[r])(group["pred"]) for r in readings], theirs), VALUES
    return {"pred", "target"} | add_known(table, "aa", group, ours)


def _nearest(values: list[Array], theirs: np.ndarray) -> Array:
    """The one that comes nearest; the first where the shapes do not fit."""
    fitting = [value for value in values if value.shape == theirs.shape] or values[:1]
    return min(
        fitting,
        key=lambda value: float(np.max(np.abs(value - theirs), initial=0.0)) if len(fitting) > 1 else 0.0,
    )


def check_focal_loss(table: ParityTable, group: Group, config: Any) -> set[str]:
    """Focal loss per entry and its gradient; the background is the class behind the last."""
    del config
    if not {"logits", "target"} <= set(group):
        return set()  # all are then listed as unknown
    logits, target = group["logits"], group["target"].astype(np.int32)
    label = jnp.asarray(np.where(target < logits.shape[-1], target, -1))
    ours = {}
    for name in group:
        if "grad" in name:
            gradient = jax.jit(jax.grad(lambda z: jnp.sum(focal_loss(z, label))))
            ours[name] = gradient(logits.astype(np.float32)), VALUES
        elif "loss" in name:
            value = jax.jit(lambda z: focal_loss(z, label))(logits.astype(np.float32))
            for _ in range(value.ndim - group[name].ndim):  # summed over classes, or over all
                value = jnp.sum(value, axis=-1)
            ours[name] = value, VALUES
    return {"logits", "target"} | add_known(table, "focal", group, ours)


def check_decoding(table: ParityTable, group: Group, config: Any) -> set[str]:
    """Boxes of turned channels."""
    del config
    boxes = jax.jit(boxes_from_head)(group["points"], group["pred8"])
    return {"points", "pred8"} | add_known(table, "decode", group, {"box7": (boxes, VALUES)})


def check_turned_suppression(table: ParityTable, group: Group, config: Any) -> set[str]:
    """Rows kept by suppression on turned outlines, best first."""
    del config
    return _check_suppression(table, "nms_rot", group, "bev_rotated")


def check_aligned_suppression(table: ParityTable, group: Group, config: Any) -> set[str]:
    """Rows kept by suppression on outlines without their yaw, best first."""
    del config
    return _check_suppression(table, "nms_normal", group, "bev_aligned")


def _check_suppression(table: ParityTable, name: str, group: Group, overlap: str) -> set[str]:
    boxes, scores = group["boxes"], group["scores"]
    found = jax.jit(lambda b, s: nms(b, s, threshold=0.5, overlap=overlap))(boxes, scores)
    order = np.asarray(found.order)
    kept = order[np.asarray(found.mask)[order]]
    table.add_exact(f"units:{name}/keep", kept, group["keep"])
    return {"boxes", "scores", "keep", "min_margin"}


def check_assignment(table: ParityTable, group: Group, config: Any) -> set[str]:
    """Both official assignments of anchors on two lattices."""

    def find(*words: str) -> list[str]:
        return sorted(name for name in group if any(word in name for word in words))

    lattices, boxes, labels = find("points", "coords", "lattice"), find("boxes"), find("labels")
    variants = {"samsung": find("samsung"), "mmdet3d": find("mmdet3d")}
    if len(lattices) != 2 or len(boxes) != 1 or len(labels) != 1 or not all(variants.values()):
        return set()  # all are then listed as unknown
    xyz = np.concatenate([group[name] for name in lattices]).astype(np.float32)[None]
    level = np.repeat([0, 1], [len(group[name]) for name in lattices])
    count = xyz.shape[1]
    rows = group[boxes[0]].astype(np.float32)
    yaw = rows[:, 6] if rows.shape[1] > 6 else np.zeros(len(rows), np.float32)
    truth = pad_boxes(rows[:, :3], rows[:, 3:6], yaw, group[labels[0]], len(rows))
    truth = jax.tree.map(lambda array: array[None], truth)
    anchors = Anchors(
        xyz=xyz,
        mask=np.ones((1, count), bool),
        boxes=np.concatenate([xyz, np.ones((1, count, 3)), np.zeros((1, count, 1))], -1).astype(np.float32),
        class_logits=np.zeros((1, count, len(config.class_names)), np.float32),
        level=level.astype(np.int32),
        stride=np.ones(count, np.float32),
    )
    task, compared = Task(config.oriented, tuple(config.label_levels)), {*lattices, *boxes, *labels}
    for variant, (name, *_) in variants.items():
        knobs = ConfigDict(config.assigners.top_k.to_dict() | {"nearest_of_all": variant == "samsung"})
        assigned = jax.jit(
            lambda a, b, knobs=knobs: find_assigner("top_k").assign(a, b, knobs, task).gt_index
        )
        table.add_exact(f"units:assign/{name}", np.asarray(assigned(anchors, truth))[0], group[name])
        compared.add(name)
    return compared


def add_known(table: ParityTable, label: str, group: Group, ours: dict[str, tuple[Any, float]]) -> set[str]:
    """Compares the entries that the group has; returns their names."""
    known = {name for name in ours if name in group}
    for name in sorted(known):
        value, tolerance = ours[name]
        table.add(f"units:{label}/{name}", value, group[name], tolerance)
    return known


def _upright(boxes: Any) -> Array:
    """f32[n, 6] as boxes of yaw 0."""
    boxes = jnp.asarray(boxes, jnp.float32)
    return jnp.concatenate([boxes[:, :6], jnp.zeros_like(boxes[:, :1])], -1)


CHECKS: dict[str, Callable[[ParityTable, Group, Any], set[str]]] = {
    "rot": check_turned_boxes,
    "aa": check_aligned_boxes,
    "focal": check_focal_loss,
    "decode": check_decoding,
    "nms_rot": check_turned_suppression,
    "nms_normal": check_aligned_suppression,
    "assign": check_assignment,
}
