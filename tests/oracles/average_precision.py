"""Naive average precision, one detection at a time: the oracle of the evaluation tests."""

import numpy as np
from oracles import boxes as box_oracle


def average_precision(scenes, label, threshold, eleven_point=False):
    """AP and final recall of one class.

    Args:
      scenes: list of (boxes, score, label, gt_boxes, gt_label).
      label: the class.
      threshold: IoU above which a detection may count.
      eleven_point: the VOC 2007 average.

    Returns:
      (AP, recall, number of ground truths).
    """
    detections, num_gt, used = [], 0, {}
    for number, (boxes, score, labels, gt_boxes, gt_labels) in enumerate(scenes):
        num_gt += sum(1 for other in gt_labels if other == label)
        gt = [box for box, other in zip(gt_boxes, gt_labels, strict=True) if other == label]
        used[number] = [False] * len(gt)
        for row in range(len(boxes)):
            if labels[row] == label:
                detections.append((score[row], len(detections), number, boxes[row], gt))
    detections.sort(key=lambda detection: (-detection[0], detection[1]))
    hits, recalls, precisions = 0, [], []
    for seen, (_, _, number, box, gt) in enumerate(detections, start=1):
        ious = [box_oracle.iou(box, other) for other in gt]
        best = int(np.argmax(ious)) if ious else -1
        if ious and ious[best] > threshold and not used[number][best]:
            used[number][best] = True
            hits += 1
        recalls.append(hits / num_gt if num_gt else float("nan"))
        precisions.append(hits / seen)
    if not detections:
        return 0.0, 0.0, num_gt
    if eleven_point:
        levels = [n * 0.1 for n in range(11)]
        best_at = [
            max([p for r, p in zip(recalls, precisions, strict=True) if r >= level], default=0.0)
            for level in levels
        ]
        return sum(best_at) / 11, recalls[-1], num_gt
    # The area under "best precision at this recall or a higher one", a step at a time.
    area, last = 0.0, 0.0
    for row, recall in enumerate(recalls):
        area += (recall - last) * max(precisions[row:])
        last = recall
    return area, recalls[-1], num_gt
