"""Comparing sets of boxes scene by scene: how far two detectors agree, and which sizes of object are found."""

import numpy as np

from vrdistill_jax.geometry.host.boxes import pairwise_iou
from vrdistill_jax.structs import Array

# Cubic metres: up to 0.1 (bins, sinks, chairs seen in part), up to 0.5 (chairs, desks), and larger.
VOLUME_LIMITS = (0.1, 0.5)


def match_boxes(
    boxes: Array, label: Array, other_boxes: Array, other_label: Array, threshold: float
) -> np.ndarray:
    """Pairs boxes of two sets one to one, the largest overlaps first.

    Args:
      boxes: f[n, 7] centre, full size, yaw.
      label: i[n]; only boxes of one class are paired.
      other_boxes: f[m, 7].
      other_label: i[m].
      threshold: IoU that a pair must exceed.

    Returns:
      i[n] rows of the other set, -1 where there is no partner.
    """
    partner = np.full(len(boxes), -1)
    if not len(boxes) or not len(other_boxes):
        return partner
    iou = pairwise_iou(np.asarray(boxes, np.float64), np.asarray(other_boxes, np.float64))
    iou = np.where(np.asarray(label)[:, None] == np.asarray(other_label)[None], iou, 0.0)
    while iou.max() > threshold:
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        partner[row] = column
        iou[row], iou[:, column] = 0.0, 0.0
    return partner


class Agreement:
    """Counts over scenes how many boxes of two detectors are the same."""

    def __init__(self, threshold: float = 0.5):
        """`threshold`: IoU from which two boxes of one class are the same object."""
        self.threshold = threshold
        self.same = self.total = 0

    def add(self, boxes: Array, label: Array, other_boxes: Array, other_label: Array) -> None:
        """Adds a scene; arguments as in `match_boxes`."""
        self.same += int((match_boxes(boxes, label, other_boxes, other_label, self.threshold) >= 0).sum())
        self.total += len(boxes) + len(other_boxes)

    def compute(self) -> float:
        """Share of all boxes that have a partner (F1, the Dice coefficient); NaN if there are no boxes."""
        return 2 * self.same / self.total if self.total else float("nan")


class RecallByVolume:
    """Share of the true boxes that are found, by their volume."""

    def __init__(self, threshold: float = 0.25, limits: tuple[float, ...] = VOLUME_LIMITS):
        """Starts empty.

        Args:
          threshold: IoU that a detection of the same class must exceed.
          limits: rising volumes in cubic metres between the groups.
        """
        self.threshold, self.limits = threshold, limits
        self.found = np.zeros(len(limits) + 1, np.int64)
        self.total = np.zeros(len(limits) + 1, np.int64)

    def add(self, boxes: Array, label: Array, gt_boxes: Array, gt_label: Array) -> None:
        """Adds a scene: detections and ground truth, as in `match_boxes`."""
        group = np.searchsorted(self.limits, np.prod(np.asarray(gt_boxes)[:, 3:6], axis=-1), side="left")
        hit = match_boxes(gt_boxes, gt_label, boxes, label, self.threshold) >= 0
        self.total += np.bincount(group, minlength=len(self.total))
        self.found += np.bincount(group[hit], minlength=len(self.total))

    def compute(self) -> dict[str, dict[str, float]]:
        """{"<=0.1": {"recall", "num_gt"}, "<=0.5": ..., ">0.5": ...}; recall is NaN for a group without boxes."""
        names = [f"<={limit:g}" for limit in self.limits] + [f">{self.limits[-1]:g}"]
        return {
            name: {"recall": float(found / total) if total else float("nan"), "num_gt": int(total)}
            for name, found, total in zip(names, self.found, self.total, strict=True)
        }
