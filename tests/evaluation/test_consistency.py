import json

import numpy as np
import pytest
from oracles import boxes as oracle

from vrdistill_jax.evaluation.consistency import (
    PredictionConsistency,
    average_inconsistency,
    training_curve,
)
from vrdistill_jax.structs import Detections, pad_boxes

CLASSES = ("a", "b", "c")


def make_scene(rng, count=20, num_gt=4):
    gt = oracle.random_boxes(rng, num_gt)
    boxes = gt[rng.integers(0, num_gt, count)] + rng.normal(0, 0.1, (count, 7))
    return boxes, rng.random(count), rng.integers(0, 2, count), gt, rng.integers(0, 3, num_gt)


def naive(scenes, top):
    rows = []
    for boxes, score, label, gt, gt_label in scenes:
        for box, s, k in zip(boxes, score, label, strict=True):
            overlaps = [oracle.iou(box, g) for g, own in zip(gt, gt_label, strict=True) if own == k]
            rows.append((k, -s, max(overlaps, default=0.0)))
    kept = []
    for k in range(3):
        kept += sorted(row for row in rows if row[0] == k)[:top]
    return np.array([(k, -s, iou) for k, s, iou in kept])


@pytest.mark.parametrize("top", [1, 7, 30, 1000])
def test_against_loops(top):
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng) for _ in range(4)]
    gathered = PredictionConsistency(CLASSES, top)
    for scene in scenes:
        gathered.add(*scene)
    expected = naive(scenes, top)
    kept = gathered.detections()
    np.testing.assert_array_equal(kept.label, expected[:, 0])
    np.testing.assert_allclose(kept.score, expected[:, 1])
    np.testing.assert_allclose(kept.iou, expected[:, 2], atol=1e-9)
    result = gathered.compute()
    error = np.abs(expected[:, 1] - expected[:, 2])
    assert result["PCE"] == pytest.approx(error.mean())
    assert result["PCE_median"] == pytest.approx(np.median(error))
    assert sum(result["histogram"]) == len(error) == result["num_detections"]
    assert result["histogram"][3] == np.sum((error >= 0.06) & (error < 0.08))
    assert set(result["classes"]) == {"a", "b"}
    assert result["classes"]["b"] == pytest.approx(error[expected[:, 0] == 1].mean())
    json.dumps(result)


def test_perfect_scores_have_no_error():
    gathered = PredictionConsistency(CLASSES)
    box = np.array([[0, 0, 0, 1, 1, 1, 0.0], [5, 0, 0, 1, 1, 1, 0.0]])
    gathered.add(box, [1.0, 0.0], [0, 1], box[:1], [0])
    assert gathered.compute()["PCE"] == pytest.approx(0, abs=1e-9)


def test_empty_scenes():
    gathered = PredictionConsistency(CLASSES)
    none = np.zeros((0, 7))
    gathered.add(none, np.zeros(0), np.zeros(0), none, np.zeros(0))
    assert np.isnan(gathered.compute()["PCE"])
    gathered.add(np.ones((1, 7)), [0.25], [2], none, np.zeros(0))
    assert gathered.compute()["classes"] == {"c": 0.25}


def test_padded_batches_equal_single_scenes():
    rng = np.random.default_rng(1)
    scenes = [make_scene(rng) for _ in range(2)]
    single, batched = PredictionConsistency(CLASSES), PredictionConsistency(CLASSES)
    single.add(*scenes[0])
    pads = 3
    detections = Detections(
        *(np.stack([np.pad(s[n], [(0, pads)] + [(0, 0)] * (np.ndim(s[n]) - 1), constant_values=1) for s in scenes])
          for n in range(3)),
        np.tile(np.arange(20 + pads) < 20, (2, 1)),
    )  # fmt: skip
    gts = [pad_boxes(g[:, :3], g[:, 3:6], g[:, 6], k, 6) for _, _, _, g, k in scenes]
    gts = type(gts[0])(*(np.stack(x) for x in zip(*gts, strict=True)))
    batched.add_batch(detections, gts, np.array([True, False]))
    np.testing.assert_allclose(batched.detections().iou, single.detections().iou, atol=1e-5)
    np.testing.assert_array_equal(batched.detections().label, single.detections().label)


def test_average_inconsistency():
    assert average_inconsistency([0.5, 1.0], [0.25, 0.5]) == pytest.approx(0.375)
    assert np.isnan(average_inconsistency([], []))


def test_curve_averages_spans_of_steps():
    rows = [{"step": step, "aic": step / 100} for step in range(1, 101)] + [{"step": 100, "mAP": 1.0}]
    curve = training_curve(rows, every=50)
    np.testing.assert_allclose(curve, [[50, 0.255], [100, 0.755]])
    assert training_curve([]).shape == (0, 2)


def test_impossible_top_is_refused():
    with pytest.raises(ValueError, match="top is 0"):
        PredictionConsistency(CLASSES, 0)
