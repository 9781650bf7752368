"""What perfect scores would be worth: a dense detector's class scores are corrected by the ground truth before suppression.

Source: "Real-Time 3D Object Detection with Inference-Aligned Learning" (SR3D, 2026), appendix B and table 6. The text leaves
open which anchors are foreground and what a centerness replaces; `correct_scores` says how it is read here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vrdistill_jax.assigners.fcaf3d import centerness, face_distances
from vrdistill_jax.geometry.boxes import join_boxes, points_in_boxes
from vrdistill_jax.geometry.iou import box_iou
from vrdistill_jax.structs import Boxes, Predictions

CORRECTIONS = ("gt_ctr", "gt_iou")
SMALLEST = 1e-6  # scores are kept this far from 0 and 1, so that their logits are finite


def correct_scores(
    predictions: Predictions, anchor_xyz: Float[Array, "b a 3"], boxes: Boxes, kind: str, rotated: bool
) -> Predictions:
    """Corrects the class scores of foreground anchors, those inside a true box.

    Args:
      predictions: of all anchors; a class's score is the sigmoid of its logit.
      anchor_xyz: f32[B, A, 3] metres.
      boxes: ground truth. An anchor in several boxes belongs to the one that its predicted box overlaps most.
      kind: "gt_ctr": all scores of the anchor are multiplied by its centerness in the true box (a replacement of the true
        class's score would give away the class); "gt_iou": the score of the true class becomes the IoU of the predicted
        with the true box, other classes keep theirs.
      rotated: False ignores yaws in the IoU.

    Returns:
      Predictions with other class logits.

    Raises:
      ValueError: for an unknown kind.
    """
    if kind not in CORRECTIONS:
        raise ValueError(f"unknown correction {kind!r}; known: {', '.join(CORRECTIONS)}")

    def correct_scene(p: Predictions, xyz, truth: Boxes) -> Array:
        rows = join_boxes(truth.center, truth.size, truth.yaw)
        predicted = join_boxes(p.center, p.size, p.yaw)
        inside = points_in_boxes(xyz, rows) & truth.mask & p.mask[:, None]
        # Box by box: a table of all pairs of turned boxes would take too much memory.
        iou = jax.lax.map(lambda row: box_iou(predicted, row[None], rotated=rotated), rows).T
        iou = jnp.where(inside, iou, -1.0)
        foreground, own = jnp.any(inside, -1), jnp.argmax(iou, -1)
        score = jax.nn.sigmoid(p.class_logits)
        if kind == "gt_ctr":
            corrected = score * centerness(face_distances(xyz, rows[own]))[:, None]
        else:
            of_class = jnp.arange(score.shape[1]) == truth.label[own][:, None]
            corrected = jnp.where(of_class, jnp.max(iou, -1, keepdims=True), score)
        corrected = jnp.clip(corrected, SMALLEST, 1 - SMALLEST)
        return jnp.where(foreground[:, None], jnp.log(corrected) - jnp.log1p(-corrected), p.class_logits)

    return predictions._replace(class_logits=jax.vmap(correct_scene)(predictions, anchor_xyz, boxes))
