"""Average precision of 3D detections, in the protocol of VoteNet's evaluation (docs/evaluation.md).

Everything runs in float64 NumPy on the host. Overlaps are computed scene by scene as results arrive;
`compute` only sorts and sums, so that it can be called at any time and at any number of thresholds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vrdistill_jax.geometry.host.boxes import box_iou
from vrdistill_jax.structs import Array, Boxes, Detections


class AveragePrecision:
    """Gathers detections and ground truth scene by scene and computes AP, recall and their means.

    A detection looks only at the ground truth of its class and scene that it overlaps most. It is a true
    positive if that IoU exceeds the threshold (strictly) and no detection with a higher score has claimed the
    same box; otherwise it is a false positive. Equal scores keep the order in which they were added.

    Source: VoteNet, utils/eval_det.py (after the PASCAL VOC devkit).
    Differs: IoU is right for every pair of boxes; classes without ground truth are listed and left out of the
      means (the reference gives NaN for those that were predicted).
    """

    def __init__(
        self,
        class_names: Sequence[str],
        thresholds: Sequence[float] = (0.25, 0.5),
        *,
        eleven_point: bool = False,
    ):
        """Starts empty.

        Args:
          class_names: names by label.
          thresholds: IoU thresholds, each in [0, 1).
          eleven_point: the older VOC 2007 average of 11 precisions instead of the area under the envelope.

        Raises:
          ValueError: if a threshold is outside [0, 1) or a class name occurs twice.
        """
        if len(set(class_names)) != len(class_names):
            raise ValueError(
                f"class_names holds a name twice: {list(class_names)}; give each label its own name"
            )
        for threshold in thresholds:
            if not 0 <= threshold < 1:
                raise ValueError(f"threshold {threshold} is outside [0, 1); no IoU can exceed 1")
        self.class_names = tuple(class_names)
        self.thresholds = tuple(thresholds)
        self.eleven_point = eleven_point
        self._num_scenes = 0
        self._num_gt = np.zeros(len(self.class_names), np.int64)
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._ious: list[np.ndarray] = []  # with the ground truth overlapped most
        self._gt_rows: list[np.ndarray] = []  # number of that ground truth, counted over all scenes

    def add(
        self,
        boxes: Array,
        score: Array,
        label: Array,
        gt_boxes: Array,
        gt_label: Array,
    ) -> None:
        """Adds one scene; either side may be empty.

        Args:
          boxes: [d, 7] detections: centre, full size, yaw; metres and radians.
          score: [d] finite, higher is more certain.
          label: [d] in [0, number of classes).
          gt_boxes: [g, 7] ground truth.
          gt_label: [g] in [0, number of classes).

        Raises:
          ValueError: if lengths disagree, a label is out of range, or a box or score is not finite.
        """
        boxes, label = self._check("detections", boxes, label)
        gt_boxes, gt_label = self._check("ground truth", gt_boxes, gt_label)
        score = np.asarray(score, np.float64).reshape(-1)
        if len(score) != len(boxes):
            raise ValueError(f"{len(score)} scores for {len(boxes)} detections; give one for each")
        if not np.isfinite(score).all():
            raise ValueError("a score is NaN or infinite; the ranking would be arbitrary")

        iou, gt_row = _best_overlap(boxes, label, gt_boxes, gt_label)
        self._scores.append(score)
        self._labels.append(label)
        self._ious.append(iou)
        self._gt_rows.append(gt_row + int(self._num_gt.sum()))
        self._num_gt += np.bincount(gt_label, minlength=len(self.class_names))
        self._num_scenes += 1

    def add_batch(self, detections: Detections, boxes: Boxes, scene_mask: Array | None = None) -> None:
        """Adds a batch of padded scenes.

        Args:
          detections: batched, NumPy or JAX.
          boxes: the batch's ground truth.
          scene_mask: bool[b] False for the padding scenes of a last batch, or None for all.
        """
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

    def curve(self, class_name: str, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Gives recall and precision after each detection of a class, by falling score.

        Args:
          class_name: one of `class_names`.
          threshold: IoU threshold.

        Returns:
          f64[d] recall (NaN if the class has no ground truth) and f64[d] precision.

        Raises:
          ValueError: if the class is unknown.
        """
        if class_name not in self.class_names:
            raise ValueError(f"unknown class {class_name!r}; the classes are {', '.join(self.class_names)}")
        row = self.class_names.index(class_name)
        score, iou, gt_row = (column[self._joined(self._labels) == row] for column in self._columns())
        return _recall_and_precision(score, iou, gt_row, int(self._num_gt[row]), threshold)

    def compute(self) -> dict[str, Any]:
        """Computes the figures of all scenes added so far.

        Returns:
          A dictionary ready for JSON, T being each threshold as text ("0.25"):
            "mAP@T", "mAR@T": means over the classes that have ground truth (NaN if there is none at all);
            "classes": {name: {"AP@T", "recall@T", "num_gt", "num_detections"}} of those classes; a class that
            was never
              detected counts 0;
            "absent_classes": {name: num_detections} of the classes without ground truth;
            "thresholds", "num_scenes", "eleven_point": what was measured.
        """
        score, iou, gt_row = self._columns()
        label = self._joined(self._labels)
        result: dict[str, Any] = {}
        classes: dict[str, dict[str, float]] = {}
        absent: dict[str, int] = {}
        for row, name in enumerate(self.class_names):
            of_class = label == row
            num_gt, num_detections = int(self._num_gt[row]), int(of_class.sum())
            if num_gt == 0:
                absent[name] = num_detections
                continue
            classes[name] = {"num_gt": num_gt, "num_detections": num_detections}
            columns = score[of_class], iou[of_class], gt_row[of_class]
            for threshold in self.thresholds:
                recall, precision = _recall_and_precision(*columns, num_gt, threshold)
                average = _eleven_point_average if self.eleven_point else _area_under_envelope
                classes[name][f"AP@{threshold:g}"] = average(recall, precision)
                classes[name][f"recall@{threshold:g}"] = float(recall[-1]) if len(recall) else 0.0
        for threshold in self.thresholds:
            for mean, term in (("mAP", "AP"), ("mAR", "recall")):
                values = [entry[f"{term}@{threshold:g}"] for entry in classes.values()]
                result[f"{mean}@{threshold:g}"] = float(np.mean(values)) if values else float("nan")
        return result | {
            "classes": classes,
            "absent_classes": absent,
            "thresholds": list(self.thresholds),
            "num_scenes": self._num_scenes,
            "eleven_point": self.eleven_point,
        }

    def _check(self, what: str, boxes: Array, label: Array) -> tuple[np.ndarray, np.ndarray]:
        label = np.asarray(label, np.int64).reshape(-1)
        boxes = np.asarray(boxes, np.float64)
        if boxes.shape != (len(label), 7) and not boxes.size == len(label) == 0:
            raise ValueError(
                f"{what}: boxes have shape {boxes.shape}, expected ({len(label)}, 7) for {len(label)} labels"
            )
        if not np.isfinite(boxes).all():
            raise ValueError(f"{what}: a box holds NaN or infinity; drop or mask it before evaluation")
        wrong = (label < 0) | (label >= len(self.class_names))
        if wrong.any():
            raise ValueError(
                f"{what}: label {label[wrong][0]} is outside [0, {len(self.class_names)}); "
                "remove pads and check that the class names belong to this data set"
            )
        return boxes.reshape(-1, 7), label

    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._joined(self._scores), self._joined(self._ious), self._joined(self._gt_rows)

    @staticmethod
    def _joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros(0)


def render_table(result: dict[str, Any]) -> str:
    """Renders the result of `AveragePrecision.compute` as a table, a class per line and the means last.

    Args:
      result: of `compute`.

    Returns:
      Text of several lines; recall is that at the first threshold, classes without ground truth show "-".
    """
    thresholds = [f"{threshold:g}" for threshold in result["thresholds"]]
    columns = [f"AP@{threshold}" for threshold in thresholds] + [
        f"recall@{threshold}" for threshold in thresholds[:1]
    ]
    rows = [["class", *columns, "gt", "detections"]]
    for name, entry in result["classes"].items():
        rows.append(
            [name, *(_percent(entry[c]) for c in columns), str(entry["num_gt"]), str(entry["num_detections"])]
        )
    for name, num_detections in result["absent_classes"].items():
        rows.append([name, *("-" for _ in columns), "0", str(num_detections)])
    means = [_percent(result["m" + c.replace("recall", "AR")]) for c in columns]
    num_gt = sum(entry["num_gt"] for entry in result["classes"].values())
    num_detections = sum(int(row[-1]) for row in rows[1:])
    rows.append(["mAP", *means, str(num_gt), str(num_detections)])

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _best_overlap(
    boxes: np.ndarray, label: np.ndarray, gt_boxes: np.ndarray, gt_label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU of each detection with a ground truth of its class, and whose it is (row 0 if none)."""
    iou = np.zeros((len(boxes), len(gt_boxes)))
    if iou.size == 0:
        return np.zeros(len(boxes)), np.zeros(len(boxes), np.int64)
    # Most pairs are of different classes or far apart; the polygon work is done for the rest only. Distances
    # are compared with the boxes' circumscribed circles, a little enlarged so that rounding cannot lose a
    # pair.
    reach = np.linalg.norm(boxes[:, 3:5], axis=-1)[:, None] + np.linalg.norm(gt_boxes[:, 3:5], axis=-1)[None]
    distance = np.hypot(*(boxes[:, None, axis] - gt_boxes[None, :, axis] for axis in range(2)))
    row, column = np.nonzero((label[:, None] == gt_label[None]) & (distance <= reach / 2 * 1.001 + 1e-6))
    rotated = bool((boxes[:, 6] != 0).any() or (gt_boxes[:, 6] != 0).any())
    iou[row, column] = box_iou(boxes[row], gt_boxes[column], rotated=rotated)
    best = iou.argmax(1)
    return iou[np.arange(len(boxes)), best], best


def _recall_and_precision(
    score: np.ndarray, iou: np.ndarray, gt_row: np.ndarray, num_gt: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision of one class after each detection, by falling score."""
    order = np.argsort(-score, kind="stable")
    hits = np.flatnonzero(iou[order] > threshold)
    _, first = np.unique(
        gt_row[order][hits], return_index=True
    )  # the best-scored hit claims the ground truth
    true_positive = np.zeros(len(order))
    true_positive[hits[first]] = 1
    found = np.cumsum(true_positive)
    recall = found / num_gt if num_gt else np.full(len(order), np.nan)
    return recall, found / np.arange(1, len(order) + 1)


def _area_under_envelope(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the precision made non-increasing from the right (VOC 2010 and later)."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _eleven_point_average(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of the best precision at recall >= 0, 0.1, ..., 1 (VOC 2007)."""
    # As in the common Python port of the devkit: np.arange gives 0.30000000000000004 and the like, so that a
    # recall of exactly 0.3 does not reach its level. Exact levels would move classes by up to 0.02.
    levels = np.arange(0.0, 1.1, 0.1)
    return float(np.mean([precision[recall >= level].max(initial=0.0) for level in levels]))
