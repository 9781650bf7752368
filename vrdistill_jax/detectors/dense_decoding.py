"""From the predictions of a dense head to final detections: the protocol that TR3D and its relatives share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax.detectors.decoding import DecodeConfig
from vrdistill_jax.geometry.boxes import axis_aligned_boxes, count_points_in_boxes, join_boxes
from vrdistill_jax.geometry.iou import pairwise_bev_iou, pairwise_iou
from vrdistill_jax.geometry.nms import nms
from vrdistill_jax.structs import Detections, Points, Predictions

NUM_CANDIDATES = 1000


def evaluation_protocol(rotated: bool) -> DecodeConfig:
    """The thresholds that published numbers use: class by class, on outlines seen from above.

    Source: tr3d and mmdetection3d, whose 3D suppression compares outlines only.
    """
    overlap = "bev_rotated" if rotated else "bev_aligned"
    return DecodeConfig(nms_iou=0.5, class_aware=True, score_threshold=0.01, min_points=0, overlap=overlap)


def select_dense_detections(
    predictions: Predictions,
    points: Points,
    config: DecodeConfig,
    num_candidates: int = NUM_CANDIDATES,
    scores: Float[Array, "b q k"] | None = None,
) -> Detections:
    """Ranks anchors, suppresses, thresholds.

    Args:
      predictions: of all anchors.
      points: the clouds that they were made from (read only if config.min_points is set).
      config: thresholds. With per_class, an anchor gives a detection for every class whose score exceeds the threshold, and
        boxes of one class suppress each other; without, one for its likeliest class.
      num_candidates: anchors that go on to suppression, those with the highest score of any class.
      scores: f32[B, Q, K] in [0, 1] of each class; None for the sigmoids of the logits.

    Returns:
      Detections sorted by falling score; D = num_candidates * K with config.per_class, else num_candidates (fewer where
      there are fewer anchors).
    """
    rank = (
        predictions.class_logits if scores is None else scores
    )  # logits differ where scores have come close to 1
    num_candidates = min(num_candidates, rank.shape[1])
    large = (
        num_candidates > NUM_CANDIDATES
    )  # tables of all pairs then exist for one class of one scene at a time

    def select_one(p: Predictions, rank: Array, xyz: Array, real: Array) -> Detections:
        rows = jax.lax.top_k(jnp.where(p.mask, jnp.max(rank, -1), -jnp.inf), num_candidates)[1]
        boxes = join_boxes(p.center, p.size, p.yaw)[rows]
        score, mask = (jax.nn.sigmoid(rank[rows]) if scores is None else rank[rows]), p.mask[rows]
        if config.min_points > 0:
            mask &= count_points_in_boxes(xyz, boxes, real) >= config.min_points
        classes = jnp.arange(score.shape[1])
        if config.per_class:
            valid = mask[:, None] & (score > config.score_threshold)
            suppresses = _box_iou(boxes, config.overlap) > config.nms_iou
            if large:
                kept = jax.lax.map(lambda column: suppress(suppresses, *column), (score.T, valid.T)).T
            else:
                kept = jax.vmap(suppress, (None, 1, 1), 1)(suppresses, score, valid)
            label = jnp.broadcast_to(classes, score.shape)
        else:
            label, score = classes[jnp.argmax(score, -1)], jnp.max(score, -1)
            valid = mask & (score > config.score_threshold)
            groups = label if config.class_aware else None
            kept = nms(boxes, score, valid, groups, threshold=config.nms_iou, overlap=config.overlap).mask
        order = jnp.argsort(-jnp.where(kept, score, -1.0), axis=None, stable=True)
        row = order // label.shape[1] if config.per_class else order
        kept, score, label = (x.reshape(-1)[order] for x in (kept, score, label))
        return Detections(boxes[row], jnp.where(kept, score, 0.0), label.astype(jnp.int32), kept)

    batch = predictions, rank, points.xyz, points.mask
    return jax.lax.map(lambda one: select_one(*one), batch) if large else jax.vmap(select_one)(*batch)


def suppress(
    overlaps: Bool[Array, "n n"], score: Float[Array, " n"], mask: Bool[Array, " n"]
) -> Bool[Array, " n"]:
    """Greedy suppression in the order of the scores, from a table of who overlaps whom.

    Unlike `geometry.nms.nms` it does not sort, so that the classes of an anchor can share one table.

    Args:
      overlaps: bool[n, n], symmetric.
      score: f32[n]; of equal scores the lower row goes first.
      mask: bool[n]; masked rows are not kept and suppress nothing.

    Returns:
      bool[n] kept rows.
    """
    row = jnp.arange(score.shape[0])
    better = (score[:, None] > score) | ((score[:, None] == score) & (row[:, None] < row))
    suppresses = overlaps & better & mask[:, None]

    # Each round decides from the last round's answer; after k rounds the k best rows are final (see geometry.nms).
    def next_round(state):
        keep, _ = state
        updated = mask & ~jnp.any(suppresses & keep[:, None], axis=0)
        return updated, jnp.any(updated != keep)

    return jax.lax.while_loop(lambda state: state[1], next_round, (mask, jnp.any(mask)))[0]


def _box_iou(boxes: Float[Array, "n 7"], overlap: str) -> Float[Array, "n n"]:
    """IoU of all pairs in the sense of `geometry.nms.nms`."""
    if overlap not in ("aligned", "rotated", "bev_aligned", "bev_rotated"):
        raise ValueError(f"overlap={overlap!r}; choose 'aligned', 'rotated', 'bev_aligned' or 'bev_rotated'")
    rotated = overlap.endswith("rotated")
    boxes = boxes if rotated else axis_aligned_boxes(boxes)
    pairwise = pairwise_bev_iou if overlap.startswith("bev") else pairwise_iou
    return pairwise(boxes, boxes, rotated=rotated)
