"""What a teacher gives a student besides a loss: its weights to start from, and its detections as labels.

Source: Yang et al., "Towards Efficient 3D Object Detection with Knowledge Distillation" (2022) and the repository
CVMI-Lab/SparseKD: teacher-guided initialisation (the way it names FNAV2) and label distillation. The step from
voxel networks to point networks is ours.
"""

import fnmatch
from collections.abc import Mapping
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.detectors.decoding import DecodeConfig, keep_predictions
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.geometry.iou import pairwise_iou
from vrdistill_jax.structs import Boxes, Detections, Points, Predictions, Scene

# Suppression before detections become labels: one place gets one label, whatever the score.
LABEL_DECODE = DecodeConfig(class_aware=False, score_threshold=0.0, per_class=False)


class WeightLayout(NamedTuple):
    """What must be known of a network to cut a narrower one out of it.

    Attributes:
      concatenated: kernels (patterns of their path) whose input is that many equal parts in a row: each part is cut by
        itself. An input [xyz | features] needs no entry, its leading rows are the coordinates already.
      fixed: (pattern, axis) of arrays that both networks must have in the same size along that axis: inputs, outputs.
    """

    concatenated: Mapping[str, int]
    fixed: tuple[tuple[str, int], ...]


LAYOUTS = {
    "votenet": WeightLayout(
        concatenated={"params/backbone/fp*/mlp/layer0/dense/kernel": 2},  # [interpolated | skipped]
        fixed=(("params/backbone/sa1/mlp/layer0/dense/kernel", 0), ("params/proposal_out/*", -1)),
    )
}


def default_config() -> ConfigDict:
    """Start values, as `config.distiller.teacher_guided`.

    Returns:
      A ConfigDict with
        initialize: whether the student starts from a slice of the teacher's weights,
        label: whether the teacher's confident detections are added to the ground truth of the detection loss,
        label_threshold: a detection's score (objectness times class probability) must exceed it,
        label_max_iou: a detection that overlaps an object by this or more is left out; above 1 keeps all (the
          original's way; VoteNet assigns proposals to the nearest centre, where a copy of an object competes with it).
    """
    return ConfigDict(dict(initialize=False, label=False, label_threshold=0.6, label_max_iou=0.25))


def slice_teacher(teacher: dict, student: dict, layout: WeightLayout) -> dict:
    """Initial variables of a student: the leading channels of the teacher's.

    Args:
      teacher: {"params", "batch_stats"}.
      student: the same tree with the student's shapes; its values are not read (jax.eval_shape gives enough).
      layout: of the network, see LAYOUTS.

    Returns:
      A tree as the student's, NumPy arrays. The channels that are kept are the same in every layer, so that residual
      sums (seed + vote) stay sums of corresponding channels. Of a student as wide as the teacher it is the teacher.

    Raises:
      ValueError: if the two are not the same network at different widths, naming the array.
    """
    have = flax.traverse_util.flatten_dict(teacher, sep="/")
    want = flax.traverse_util.flatten_dict(student, sep="/")
    if have.keys() != want.keys():
        odd = sorted(have.keys() ^ want.keys())
        raise ValueError(
            f"teacher and student are different networks: {odd[0]} and {len(odd) - 1} more arrays are in one of them "
            "only; set teacher_guided.initialize=False"
        )
    sliced = {path: _leading(path, np.asarray(have[path]), want[path].shape, layout) for path in have}
    return flax.traverse_util.unflatten_dict(sliced, sep="/")


def _leading(path: str, array: np.ndarray, shape: tuple[int, ...], layout: WeightLayout) -> np.ndarray:
    """The leading part of one array, along every axis."""
    fits = array.ndim == len(shape) and all(s <= t for s, t in zip(shape, array.shape, strict=False))
    fixed = [axis for pattern, axis in layout.fixed if fnmatch.fnmatchcase(path, pattern)]
    if not fits or any(array.shape[axis] != shape[axis] for axis in fixed):
        raise ValueError(
            f"{path} is {array.shape} in the teacher and {shape} in the student: a student is initialised from a teacher "
            "that is at least as wide, with the same classes, mean sizes, heading bins and input features"
        )
    parts = [n for pattern, n in layout.concatenated.items() if fnmatch.fnmatchcase(path, pattern)]
    if parts:
        block = tuple(map(slice, (shape[0] // parts[0], *shape[1:])))
        return np.concatenate([part[block] for part in np.split(array, parts[0])])
    return array[tuple(map(slice, shape))].copy()


class LabelCount(NamedTuple):
    """What became of the detections that were confident enough, per scene."""

    added: Array  # i32[B]
    overlapping: Array  # i32[B] left out: an object is there already
    left_over: Array  # i32[B] left out: no slot was free; raise config.dataset.max_boxes


def label_detections(
    predictions: Predictions, points: Points, decode_config: DecodeConfig = LABEL_DECODE
) -> Detections:
    """The teacher's boxes after suppression, each with its likeliest class.

    Args:
      predictions: of the teacher.
      points: the clouds that it read.
      decode_config: thresholds of the suppression.

    Returns:
      Detections, D = Q, sorted by falling score = objectness times the probability of the likeliest class.
    """
    kept = keep_predictions(predictions, points, decode_config)
    probability = jax.nn.softmax(predictions.class_logits, -1)
    score = jnp.where(kept, predictions.objectness * jnp.max(probability, -1), 0.0)
    order = jnp.argsort(jnp.where(kept, -score, 1.0), axis=1, stable=True)
    boxes = join_boxes(predictions.center, predictions.size, predictions.yaw)
    label = jnp.argmax(probability, -1).astype(jnp.int32)
    return jax.lax.stop_gradient(
        Detections(
            jnp.take_along_axis(boxes, order[..., None], 1),
            *(jnp.take_along_axis(x, order, 1) for x in (score, label, kept)),
        )
    )


def append_detections(
    scene: Scene, detections: Detections, *, threshold: float = 0.6, max_iou: float = 0.25
) -> tuple[Scene, LabelCount]:
    """Fills free slots of a scene's boxes with detections, best first.

    Args:
      scene: with boxes. Its point_instance stays: votes are learnt from the ground truth alone.
      detections: sorted by falling score, as `label_detections` gives them.
      threshold: the score must exceed it.
      max_iou: detections that overlap an object of the ground truth by this or more are left out; above 1 keeps all.

    Returns:
      (the scene with more boxes; how many were added and left out). Slots that were taken, and slots that stay free, are
      bit for bit as they were.

    Raises:
      ValueError: if the scene has no boxes.
    """
    if scene.boxes is None:
        raise ValueError("label distillation adds to scene.boxes; this scene has no labels")
    boxes, count = jax.vmap(lambda b, d: _append(b, d, threshold, max_iou))(
        jax.tree.map(jnp.asarray, scene.boxes), jax.tree.map(jnp.asarray, detections)
    )
    return scene._replace(boxes=boxes), count


def _append(boxes: Boxes, detections: Detections, threshold: float, max_iou: float):
    """One scene."""
    confident = detections.mask & (detections.score > threshold)
    truth = join_boxes(boxes.center, boxes.size, boxes.yaw)
    iou = pairwise_iou(detections.boxes, truth)
    overlaps = jnp.any((iou >= max_iou) & boxes.mask, -1)
    # A box needs a positive size to be one.
    new = confident & ~overlaps & jnp.all(detections.boxes[:, 3:6] > 0, -1)
    slot, taken = _free_slots(boxes.mask, new)

    def put(old: Float[Array, "g *c"], value: Float[Array, "d *c"]) -> Float[Array, "g *c"]:
        return old.at[slot].set(value.astype(old.dtype), mode="drop")

    center = detections.boxes[:, :3]
    filled = Boxes(
        center=put(boxes.center, center),
        size=put(boxes.size, detections.boxes[:, 3:6]),
        yaw=put(boxes.yaw, detections.boxes[:, 6]),
        label=put(boxes.label, detections.label),
        mask=put(boxes.mask, jnp.ones_like(new)),
        vote_center=put(boxes.vote_center, center),
    )
    number = [jnp.sum(x, dtype=jnp.int32) for x in (taken, confident & overlaps, new & ~taken)]
    return filled, LabelCount(*number)


def _free_slots(
    used: Bool[Array, " g"], new: Bool[Array, " d"]
) -> tuple[Int[Array, " d"], Bool[Array, " d"]]:
    """The slot of each new row: the n-th new row gets the n-th free slot; G (out of range) without one."""
    free = jnp.argsort(used, stable=True)  # free slots first
    rank = jnp.cumsum(new) - 1
    taken = new & (rank < jnp.sum(~used))
    slot = free[jnp.clip(rank, 0, len(used) - 1)]
    return jnp.where(taken, slot, len(used)), taken


def guided_variables(teacher: dict, student: dict, name: str) -> dict:
    """`slice_teacher` for a detector by its name.

    Raises:
      ValueError: for a detector whose layout is not known, listing the known ones.
    """
    if name not in LAYOUTS:
        raise ValueError(
            f"no weight layout for detector {name!r}; known: {', '.join(LAYOUTS)}. Set teacher_guided.initialize=False"
        )
    return slice_teacher(teacher, student, LAYOUTS[name])
