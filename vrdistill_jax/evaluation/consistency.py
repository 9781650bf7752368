"""How well scores agree with overlaps: the average inconsistency coefficient and the prediction consistency error.

Source: "Real-Time 3D Object Detection with Inference-Aligned Learning" (SR3D, 2026), "Analysis of Inference Alignment".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vrdistill_jax.geometry.host.boxes import pairwise_iou
from vrdistill_jax.structs import Array, Boxes, Detections

TOP = 30  # detections per class
BIN = 0.02  # of the histogram of errors


def average_inconsistency(score: Array, quality: Array) -> float:
    """Average inconsistency coefficient: the mean |score - IoU| of the positives of a batch.

    Args:
      score: f[n] class probabilities at the class of each positive's box.
      quality: f[n] IoU of each positive's box with its ground truth.

    Returns:
      In [0, 1]; NaN without any positive.
    """
    gap = np.abs(np.asarray(score, np.float64) - np.asarray(quality, np.float64))
    return float(gap.mean()) if gap.size else float("nan")


def training_curve(rows: Iterable[Mapping[str, Any]], every: int = 50, key: str = "aic") -> np.ndarray:
    """A logged mean, such as the coefficient, over training, from the rows of a run's metrics.

    Args:
      rows: with "step" and `key`; others are passed over.
      every: steps that are averaged into one point.
      key: its name in the log.

    Returns:
      f64[n, 2] last step of each span, mean.
    """
    spans: dict[int, list[float]] = {}
    for row in rows:
        if key in row and "step" in row:
            spans.setdefault((int(row["step"]) - 1) // every, []).append(float(row[key]))
    return np.array([[(span + 1) * every, np.mean(v)] for span, v in sorted(spans.items())]).reshape(-1, 2)


class Consistency(NamedTuple):
    """The most certain detections of every class."""

    label: np.ndarray  # i64[n]
    score: np.ndarray  # f64[n]
    iou: np.ndarray  # f64[n] highest IoU with a ground truth of the class

    @property
    def error(self) -> np.ndarray:
        """f64[n] |score - IoU|, the prediction consistency error."""
        return np.abs(self.score - self.iou)


class PredictionConsistency:
    """Gathers detections scene by scene and compares the scores of the most certain ones with their overlaps."""

    def __init__(self, class_names: Sequence[str], top: int = TOP):
        """Starts empty.

        Args:
          class_names: names by label.
          top: detections per class, those of highest score over all scenes.

        Raises:
          ValueError: if top is not positive.
        """
        if top < 1:
            raise ValueError(f"top is {top}; expected at least 1 detection per class (the paper uses {TOP})")
        self.class_names, self.top = tuple(class_names), top
        self._kept = Consistency(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))

    def add(self, boxes: Array, score: Array, label: Array, gt_boxes: Array, gt_label: Array) -> None:
        """Adds one scene; either side may be empty.

        Args:
          boxes: f[d, 7] detections after suppression.
          score: f[d].
          label: i[d].
          gt_boxes: f[g, 7].
          gt_label: i[g].
        """
        label, score = np.asarray(label, np.int64), np.asarray(score, np.float64)
        # Only the scene's best of each class can be among the best of all.
        rows = _best_of_each_class(label, score, self.top)
        label, score = label[rows], score[rows]
        iou = np.zeros(len(rows))
        if len(rows) and len(gt_boxes):
            table = pairwise_iou(np.asarray(boxes, np.float64)[rows], np.asarray(gt_boxes, np.float64))
            iou = np.where(label[:, None] == np.asarray(gt_label)[None], table, 0.0).max(1)
        joined = Consistency(*map(np.concatenate, zip(self._kept, (label, score, iou), strict=True)))
        rows = _best_of_each_class(joined.label, joined.score, self.top)
        self._kept = Consistency(*(column[rows] for column in joined))

    def add_batch(self, detections: Detections, boxes: Boxes, scene_mask: Array | None = None) -> None:
        """Adds a batch of padded scenes; arguments as in `AveragePrecision.add_batch`."""
        detections, boxes = Detections(*map(np.asarray, detections)), Boxes(*map(np.asarray, boxes))
        for row in range(len(boxes.mask)):
            if scene_mask is not None and not scene_mask[row]:
                continue
            kept, real = detections.mask[row], boxes.mask[row]
            gt_boxes = np.concatenate([boxes.center[row], boxes.size[row], boxes.yaw[row][:, None]], axis=-1)
            self.add(
                detections.boxes[row][kept],
                detections.score[row][kept],
                detections.label[row][kept],
                gt_boxes[real],
                boxes.label[row][real],
            )

    def detections(self) -> Consistency:
        """The most certain detections of every class so far: the points of the scatter plot."""
        return self._kept

    def compute(self) -> dict[str, Any]:
        """Computes the figures of all scenes added so far.

        Returns:
          A dictionary ready for JSON: "PCE" mean and "PCE_median" of the error over the kept detections (NaN without any),
          "histogram": counts of errors in bins of 0.02 from 0 to 1, "bin": their width, "classes": mean error of each class
          that has detections, "num_detections", "top".
        """
        error, label = self._kept.error, self._kept.label
        edges = np.linspace(0.0, 1.0, round(1 / BIN) + 1)
        return {
            "PCE": float(error.mean()) if error.size else float("nan"),
            "PCE_median": float(np.median(error)) if error.size else float("nan"),
            "histogram": np.histogram(error, edges)[0].tolist(),
            "bin": BIN,
            "classes": {
                name: float(error[label == row].mean())
                for row, name in enumerate(self.class_names)
                if (label == row).any()
            },
            "num_detections": len(error),
            "top": self.top,
        }


def _best_of_each_class(label: np.ndarray, score: np.ndarray, top: int) -> np.ndarray:
    """Rows of the `top` highest scores of each class; equal scores keep their order."""
    order = np.lexsort((-score, label))
    ranked = label[order]
    place = np.arange(len(order)) - np.searchsorted(ranked, ranked, side="left")
    return order[place < top]
