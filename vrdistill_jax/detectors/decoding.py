"""From candidate boxes to final detections: the protocol that the VoteNet family shares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vrdistill_jax.geometry.boxes import count_points_in_boxes
from vrdistill_jax.geometry.nms import nms
from vrdistill_jax.structs import Detections, Points, Predictions


class DecodeConfig(NamedTuple):
    """Thresholds of the protocol; the defaults are the ones that published numbers use.

    Attributes:
      nms_iou: a box is suppressed by a better one that overlaps it by more than this.
      class_aware: whether only boxes of the same class suppress each other.
      score_threshold: objectness must exceed it.
      min_points: boxes that hold fewer points of the cloud are dropped; 0 keeps all.
      overlap: what overlap means, as in geometry.nms: "aligned" bounds in 3D, as published numbers use, ....
      per_class: True emits every kept box once per class, scored objectness x class probability (evaluation);
        False emits it once, with its likeliest class, scored by objectness (prediction).
      keep_surest: whether a scene of which every box is dropped for want of points keeps the one of highest objectness, as
        3DETR does.
    """

    nms_iou: float = 0.25
    class_aware: bool = True
    score_threshold: float = 0.05
    min_points: int = 5
    overlap: str = "aligned"
    per_class: bool = True
    keep_surest: bool = False


PREDICT = DecodeConfig(class_aware=False, score_threshold=0.5, per_class=False)


def keep_predictions(predictions: Predictions, points: Points, config: DecodeConfig):
    """Which candidates survive: bool[B, Q].

    Source: VoteNet, models/ap_helper.py parse_predictions. Suppression works on the axis-aligned bounds of the boxes.
    """

    def keep_one(p: Predictions, xyz, mask):
        boxes = jnp.concatenate([p.center, p.size, p.yaw[:, None]], axis=-1)
        label = jnp.argmax(p.class_logits, -1)
        valid = p.mask
        if config.min_points > 0:
            valid &= count_points_in_boxes(xyz, boxes, mask) >= config.min_points
        if config.keep_surest:
            objectness = jnp.where(p.mask, p.objectness, -1.0)
            surest = p.mask & (jnp.arange(len(objectness)) == jnp.argmax(objectness))
            valid = jnp.where(jnp.any(valid), valid, surest)
        groups = label if config.class_aware else None
        kept = nms(boxes, p.objectness, valid, groups, threshold=config.nms_iou, overlap=config.overlap)
        return kept.mask & (p.objectness > config.score_threshold)

    return jax.vmap(keep_one)(predictions, points.xyz, points.mask)


def select_detections(predictions: Predictions, points: Points, config: DecodeConfig) -> Detections:
    """Suppresses, thresholds and scores.

    Args:
      predictions: Q candidates per scene.
      points: the clouds that they were made from.
      config: thresholds.

    Returns:
      Detections sorted by falling score; D = Q * K when config.per_class, else Q.
    """
    kept = keep_predictions(predictions, points, config)
    boxes = jnp.concatenate([predictions.center, predictions.size, predictions.yaw[..., None]], axis=-1)
    batch, count, classes = predictions.class_logits.shape
    if config.per_class:
        score = predictions.objectness[..., None] * jax.nn.softmax(predictions.class_logits, -1)
        label = jnp.broadcast_to(jnp.arange(classes), score.shape)
        boxes = jnp.broadcast_to(boxes[:, :, None], (batch, count, classes, 7)).reshape(batch, -1, 7)
        mask = jnp.broadcast_to(kept[..., None], score.shape)
    else:
        score, label, mask = predictions.objectness, jnp.argmax(predictions.class_logits, -1), kept
    score, label, mask = (x.reshape(batch, -1) for x in (score, label, mask))
    score = jnp.where(mask, score, 0.0)
    order = jnp.argsort(-jnp.where(mask, score, -1.0), axis=1, stable=True)

    def pick(x):
        return jax.vmap(lambda rows, i: rows[i])(x, order)

    return Detections(pick(boxes), pick(score), pick(label).astype(jnp.int32), pick(mask))
