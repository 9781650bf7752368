"""SparseKD: logit distillation at pivotal positions.

Where the teacher is confident and an object is near, the student's class scores are drawn to the teacher's; at the
objects, so are its boxes. The recipe's other two parts, teacher boxes as additional labels and an initialisation from
the teacher's weights, change what is trained, not the loss: they are in `training.teacher_guided`.

Source: Yang et al., "Towards Efficient 3D Object Detection with Knowledge Distillation" (2022); formula and start values
as the released code (CVMI-Lab/SparseKD) computes them, carried over from heat-map cells to proposals. Its feature term is
off in the released configs and absent here.
Differs: a proposal's class heat is objectness times class probability; the ground truth's heat is a Gaussian of the
position in the object's box, half a side being one standard deviation; both heats are clipped before they are compared
(there the student's alone), so that equal networks have no loss.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.geometry.nms import nms
from vrdistill_jax.losses.box import nearest, squared_distances
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.structs import Boxes, DetectorOutput, Predictions, Scene


def default_config() -> ConfigDict:
    """The start values, as one entry of `config.distiller.methods`.

    Returns:
      A ConfigDict with
        weight: multiplies everything,
        heat: weight of the score term; the original's 10, to be swept up to 100 beside VoteNet's factor,
        box: weight of the box term,
        threshold: the teacher's heat must exceed it,
        top_k: only that many of the teacher's best proposals after suppression count; -1 for all,
        nms_iou: of that suppression,
        max_distance: metres; an object whose nearest cluster is farther away has no box term (VoteNet's positives),
        clip: heats are clipped to [clip, 1 - clip] before they are compared.
    """
    return ConfigDict(
        dict(
            name="sparsekd",
            weight=1.0,
            heat=10.0,
            box=0.2,
            threshold=0.0,
            top_k=-1,
            nms_iou=0.25,
            max_distance=0.3,
            clip=1e-4,
        )
    )


def build(config: Any, student: Any, teacher: Any, axis_name: str | None = None) -> "SparseKD":
    """The module that `config` describes; it has no parameters.

    Raises:
      ValueError: if the detectors do not find the same classes.
    """
    if tuple(student.class_names) != tuple(teacher.class_names):
        raise ValueError(
            f"sparsekd compares class scores, but the student finds {tuple(student.class_names)} and the teacher "
            f"{tuple(teacher.class_names)}; train the student on the teacher's classes"
        )
    return SparseKD(**{key: config[key] for key in default_config() if key != "name"}, axis_name=axis_name)


class SparseKD(nn.Module):
    """The distiller; attributes as in `default_config`, and `axis_name`, the mapped device axis or None."""

    weight: float = 1.0
    heat: float = 10.0
    box: float = 0.2
    threshold: float = 0.0
    top_k: int = -1
    nms_iou: float = 0.25
    max_distance: float = 0.3
    clip: float = 0.0001
    axis_name: str | None = None
    needs_aligned = True  # compares proposals one by one

    def __call__(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        scene: Scene,
        *,
        aligned: DetectorOutput | None = None,
        train: bool = True,
    ) -> tuple[Array, dict[str, Array]]:
        """Compares predictions, proposal by proposal.

        Args:
          student: not used, `aligned` is.
          teacher: output of the same clouds.
          scene: with boxes.
          aligned: the student's output at the teacher's clusters.
          train: not used.

        Returns:
          (scalar total, terms: the heat and box shares of it, and "pivotal", the mean weight of a proposal).

        Raises:
          ValueError: if `aligned` or the boxes are missing.
        """
        del student, train
        if aligned is None or scene.boxes is None:
            raise ValueError("sparsekd needs scene.boxes and the student's output at the teacher's clusters")
        teacher = jax.lax.stop_gradient(teacher)
        valid = teacher.predictions.mask & scene.mask[:, None]

        heat_t, heat_s = class_heat(teacher.predictions), class_heat(aligned.predictions)
        pivotal = jnp.where(valid, self._pivotal_weight(teacher, heat_t, scene.boxes), 0.0)
        low, high = self.clip, 1 - self.clip
        gap = jnp.clip(heat_s, low, high) - jnp.clip(heat_t, low, high)
        heat = masked_mean(jnp.sum(jnp.square(gap), -1), pivotal, self.axis_name)

        distance, row = nearest(
            squared_distances(scene.boxes.center, teacher.taps["clusters"].xyz), teacher.predictions.mask
        )
        found = scene.boxes.mask & scene.mask[:, None] & (distance < self.max_distance**2)
        box = masked_mean(gather_rows(box_gap(aligned, teacher), row), found, self.axis_name)

        terms = {"heat": self.weight * self.heat * heat, "box": self.weight * self.box * box}
        total = terms["heat"] + terms["box"]
        return total, terms | {"pivotal": masked_mean(pivotal, valid, self.axis_name)}

    def _pivotal_weight(self, teacher: DetectorOutput, heat: Float[Array, "b q k"], boxes: Boxes):
        """f32[B, Q]: teacher's confidence times nearness to an object, where the teacher exceeds the threshold."""
        confidence = jnp.max(heat, -1)
        weight = confidence * (confidence > self.threshold)
        weight *= jax.vmap(object_heat)(teacher.taps["clusters"].xyz, boxes)
        if self.top_k < 0:
            return weight
        best = jax.vmap(lambda p, score: best_after_nms(p, score, self.top_k, self.nms_iou))
        return jnp.where(best(teacher.predictions, confidence), weight, 0.0)


def class_heat(predictions: Predictions) -> Float[Array, "b q k"]:
    """Objectness times class probability of each proposal, in [0, 1]."""
    return predictions.objectness[..., None] * jax.nn.softmax(predictions.class_logits, -1)


def object_heat(xyz: Float[Array, "q 3"], boxes: Boxes) -> Float[Array, " q"]:
    """How central positions are in the objects of a scene.

    Args:
      xyz: f32[Q, 3] metres.
      boxes: of one scene, padded.

    Returns:
      f32[Q] in [0, 1]: exp(-d^2 / 2) for the most central object, d in half sizes along the box's own axes; 1 at a
      centre, exp(-1/2) in the middle of a face, 0 without any object.
    """
    offset = xyz[:, None] - boxes.center
    cos, sin = jnp.cos(boxes.yaw), jnp.sin(boxes.yaw)
    along = jnp.stack(
        [
            cos * offset[..., 0] + sin * offset[..., 1],
            cos * offset[..., 1] - sin * offset[..., 0],
            offset[..., 2],
        ],
        -1,
    )
    half = jnp.where(boxes.mask[:, None], boxes.size, 1.0) / 2
    heat = jnp.exp(-0.5 * jnp.sum(jnp.square(along / half), -1))
    return jnp.max(jnp.where(boxes.mask, heat, 0.0), -1, initial=0.0)


def best_after_nms(
    predictions: Predictions, score: Float[Array, " q"], count: int, nms_iou: float
) -> Bool[Array, " q"]:
    """The `count` best proposals of one scene that suppression keeps, whatever their class."""
    boxes = join_boxes(predictions.center, predictions.size, predictions.yaw)
    kept = nms(boxes, score, predictions.mask, threshold=nms_iou)
    rank = jnp.cumsum(kept.mask[kept.order]) - 1  # among the kept, by falling score
    chosen = kept.mask[kept.order] & (rank < count)
    return jnp.zeros_like(kept.mask).at[kept.order].set(chosen)


def box_gap(student: DetectorOutput, teacher: DetectorOutput) -> Float[Array, "b q"]:
    """L1 distance of decoded boxes: centre and size in metres, and the heading's residual in radians.

    The residual is read in the teacher's heading bin on both sides: residuals of different bins cannot be compared. Of a
    head without bins it is the difference of the yaws, where half a turn makes none.
    """
    if student.head is None or teacher.head is None:
        raise ValueError("sparsekd compares headings bin by bin; a detector without output.head has none")
    s, t = student.predictions, teacher.predictions
    boxes = jnp.sum(jnp.abs(s.center - t.center) + jnp.abs(s.size - t.size), -1)
    if "heading" not in teacher.head:
        turn = s.yaw - t.yaw
        return boxes + jnp.abs(turn - jnp.pi * jax.lax.stop_gradient(jnp.round(turn / jnp.pi)))
    logits, teacher_residual = jnp.split(teacher.head["heading"], 2, -1)
    _, student_residual = jnp.split(student.head["heading"], 2, -1)
    heading_bin, num_bins = jnp.argmax(logits, -1), logits.shape[-1]
    residual = _pick(student_residual, heading_bin) - _pick(teacher_residual, heading_bin)
    return boxes + jnp.abs(residual) * (jnp.pi / num_bins)


def _pick(values: Float[Array, "b q h"], index: Int[Array, "b q"]) -> Float[Array, "b q"]:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
