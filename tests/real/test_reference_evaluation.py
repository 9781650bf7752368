"""Our evaluator against a stored evaluation of the reference, and against the reference's algorithm written out.

The stored files are the ground truth and the predictions of four of the 5,050 validation scans. The mAPs of the log
(0.590821 at 0.25, 0.340474 at 0.5) are those of all scans and cannot be computed from four; what can be compared is the
AP of these four, and that our suppression and filters agree that the stored boxes are a finished result.
"""

import re

import jax
import numpy as np
import pytest
from oracles.boxes import clip_polygon, shoelace

from vrdistill_jax.data.class_tables import SUNRGBD_CLASSES
from vrdistill_jax.data.point_files import read_points
from vrdistill_jax.evaluation.average_precision import AveragePrecision
from vrdistill_jax.geometry.frames import depth_from_camera
from vrdistill_jax.geometry.host.boxes import corners_from_boxes, points_in_boxes
from vrdistill_jax.geometry.nms import nms

pytestmark = pytest.mark.data

SCANS = ("000000", "000001", "000002", "000003")


def read_boxes(path):
    """Returns classes i64[n], corners f64[n, 8, 3] in the camera frame, and scores f64[n] (none: empty)."""
    rows = [line.split() for line in path.read_text().splitlines()]
    corners = np.array([[float(value) for value in row[1].split(",")] for row in rows]).reshape(-1, 8, 3)
    return (
        np.array([int(row[0]) for row in rows]),
        corners,
        np.array([float(row[2]) for row in rows if row[2:]]),
    )


def boxes_from_corners(corners):
    """Boxes of the contract's frame. Corners 0 to 3 go around the top: (+l, +w), (+l, -w), (-l, -w), (-l, +w)."""
    upright = np.asarray(depth_from_camera(corners))
    along, across, up = (upright[:, 0] - upright[:, other] for other in (3, 1, 4))
    size = np.stack([np.linalg.norm(edge, axis=1) for edge in (along, across, up)], 1)
    yaw = np.arctan2(along[:, 1], along[:, 0])
    return np.concatenate([upright.mean(1), size, yaw[:, None]], 1)


def footprint(corners):
    """The outline seen from above, counter-clockwise."""
    outline = [(x, z) for x, _, z in corners[:4]]
    return outline if shoelace(outline) > 0 else outline[::-1]


def iou_of_corners(first, second):
    """3D IoU of two boxes given as camera-frame corners, whose y is vertical."""
    shared = clip_polygon(footprint(first), footprint(second))
    area = shoelace(shared) if len(shared) >= 3 else 0.0
    height = min(first[:, 1].max(), second[:, 1].max()) - max(first[:, 1].min(), second[:, 1].min())
    both = area * max(height, 0.0)
    volumes = [shoelace(footprint(box)) * np.ptp(box[:, 1]) for box in (first, second)]
    return both / (sum(volumes) - both)


def reference_average_precision(scans, label, threshold):
    """AP and recall as VoteNet's eval_det.py has them, on corners; scans: (truth labels, corners), (labels, ...)."""
    detections, truth = [], {}
    for number, ((gt_label, gt_corners, _), (labels, corners, scores)) in enumerate(scans):
        truth[number] = [[box, False] for box in gt_corners[gt_label == label]]
        detections += [
            (s, number, c) for c, s in zip(corners[labels == label], scores[labels == label], strict=True)
        ]
    hits = []
    for _, number, corners in sorted(detections, key=lambda detection: -detection[0]):
        best, best_entry = -np.inf, None
        for entry in truth[number]:
            iou = iou_of_corners(corners, entry[0])
            if iou > best:
                best, best_entry = iou, entry
        hit = best > threshold and not best_entry[1]
        if hit:
            best_entry[1] = True
        hits.append(hit)
    found = np.cumsum(hits)
    recall, precision = found / sum(map(len, truth.values())), found / np.arange(1, len(hits) + 1)
    recall, precision = np.r_[0.0, recall, 1.0], np.r_[0.0, precision, 0.0]
    for row in range(len(precision) - 1, 0, -1):
        precision[row - 1] = max(precision[row - 1], precision[row])
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return np.sum((recall[steps + 1] - recall[steps]) * precision[steps + 1]), recall[-2]


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "real" / "sunrgbd" / "reference_evaluation"


@pytest.fixture(scope="module")
def scans(folder):
    return [
        (read_boxes(folder / f"{scan}_gt_map_cls.txt"), read_boxes(folder / f"{scan}_pred_map_cls.txt"))
        for scan in SCANS
    ]


def test_corners_become_boxes_and_back(scans):
    for truth, predicted in scans:
        for _, corners, _ in (truth, predicted):
            boxes = boxes_from_corners(corners)
            upright = np.asarray(depth_from_camera(corners))
            rebuilt = corners_from_boxes(boxes)
            apart = np.linalg.norm(rebuilt[:, :, None] - upright[:, None], axis=-1).min(-1)
            assert apart.max() < 1e-6


def test_average_precision_equals_the_references(scans):
    meter = AveragePrecision(SUNRGBD_CLASSES)
    for (gt_label, gt_corners, _), (label, corners, score) in scans:
        meter.add(boxes_from_corners(corners), score, label, boxes_from_corners(gt_corners), gt_label)
    result = meter.compute()
    present = sorted({int(label) for truth, _ in scans for label in truth[0]})
    assert [SUNRGBD_CLASSES[label] for label in present] == list(result["classes"])
    assert result["num_scenes"] == 4
    assert sum(entry["num_gt"] for entry in result["classes"].values()) == 10
    assert sum(result["absent_classes"].values()) + sum(
        entry["num_detections"] for entry in result["classes"].values()
    ) == sum(len(predicted[0]) for _, predicted in scans)
    for threshold in (0.25, 0.5):
        expected = []
        for label in present:
            ap, recall = reference_average_precision(scans, label, threshold)
            entry = result["classes"][SUNRGBD_CLASSES[label]]
            print(f"{SUNRGBD_CLASSES[label]:12s} @{threshold}: AP {ap:.6f} recall {recall:.6f}")
            assert entry[f"AP@{threshold:g}"] == pytest.approx(ap, abs=1e-12)
            assert entry[f"recall@{threshold:g}"] == pytest.approx(recall, abs=1e-12)
            expected.append(ap)
        assert 0 < np.mean(expected) < 1  # a trivial 0 or 1 would compare nothing
        assert result[f"mAP@{threshold:g}"] == pytest.approx(np.mean(expected), abs=1e-12)


def _suppress(boxes, objectness, group, capacity=16):
    """Padded, so that all scans share one compilation."""
    count = len(boxes)
    padded = np.tile(np.float32([0, 0, 0, 1, 1, 1, 0]), (capacity, 1))
    padded[:count] = boxes
    rank, label = np.zeros(capacity, np.float32), np.zeros(capacity, np.int32)
    rank[:count], label[:count] = objectness, group
    kept = jax.jit(nms, static_argnames="threshold")(
        padded, rank, np.arange(capacity) < count, label, threshold=0.25
    )
    return np.asarray(kept.mask)[:count]


def test_stored_predictions_are_a_finished_result_by_our_protocol(folder, scans):
    for scan, (_, (label, corners, score)) in zip(SCANS, scans, strict=True):
        _, first, box_of_row = np.unique(
            corners.reshape(-1, 24), axis=0, return_index=True, return_inverse=True
        )
        boxes = boxes_from_corners(corners[first])
        by_class = np.zeros((len(first), len(SUNRGBD_CLASSES)))
        by_class[box_of_row.reshape(-1), label] = score
        # Every box is emitted once per class, scored objectness x class probability.
        assert np.bincount(box_of_row.reshape(-1)).tolist() == [len(SUNRGBD_CLASSES)] * len(first)
        objectness = by_class.sum(1)
        assert objectness.min() > 0.05
        assert objectness.max() <= 1 + 1e-5
        xyz = read_points(folder / f"{scan}_pc.ply").xyz  # already in the depth frame
        held = points_in_boxes(xyz, boxes).sum(0)
        assert held.min() >= 5
        assert _suppress(boxes, objectness, by_class.argmax(1)).all()
        agnostic = _suppress(boxes, objectness, np.zeros(len(boxes)))
        print(
            scan,
            len(boxes),
            "boxes,",
            int(agnostic.sum()),
            "if classes suppressed each other",
        )


def test_the_logs_means_are_means_over_its_classes(folder):
    figures = re.findall(
        r"^eval (\w+) Average Precision: ([\d.]+)", (folder / "log_eval.txt").read_text(), re.M
    )
    means = re.findall(r"^eval mAP: ([\d.]+)", (folder / "log_eval.txt").read_text(), re.M)
    assert means == ["0.590821", "0.340474"]
    for number, mean in enumerate(means):
        part = figures[10 * number : 10 * number + 10]
        assert [name for name, _ in part] == list(SUNRGBD_CLASSES)
        assert np.mean([float(value) for _, value in part]) == pytest.approx(float(mean), abs=1e-6)
