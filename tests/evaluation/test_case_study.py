"""Scores corrected by the ground truth, against loops over anchors and boxes."""

import numpy as np
import pytest
from oracles import boxes as oracle

from vrdistill_jax.evaluation.case_study import correct_scores
from vrdistill_jax.structs import Boxes, Predictions

A, G, K = 40, 3, 4


def make_case(oriented=False):
    """Predictions near two of three true boxes of one scene (the third is padding), and their anchors."""
    rng = np.random.default_rng(3)
    true = np.array(
        [[0, 0, 0, 2, 1, 1, 0.4], [1.2, 0.3, 0, 1, 1, 1, -0.3], [0, 0, 0, 9, 9, 9, 0]], np.float32
    )
    true[:, 6] *= oriented
    predicted = true[rng.integers(0, 2, A)] + rng.normal(0, 0.2, (A, 7)).astype(np.float32)
    predicted[:, 6] *= oriented
    xyz = rng.uniform(-0.8, 1.6, (A, 3)) * [1, 0.5, 0.4]
    logits = rng.normal(-2, 1, (A, K)).astype(np.float32)
    mask = np.arange(A) < A - 4
    parts = predicted[:, :3], predicted[:, 3:6], predicted[:, 6], logits, np.ones(A, np.float32), mask
    predictions = Predictions(*(part[None] for part in parts))
    label = np.array([[2, 0, -1]], np.int32)
    boxes = Boxes(
        true[None, :, :3], true[None, :, 3:6], true[None, :, 6], label, np.array([[True, True, False]]), true[None, :, :3]
    )  # fmt: skip
    return predictions, xyz.astype(np.float32)[None], boxes, predicted, true


def naive(kind, predictions, xyz, boxes, predicted, true):
    score = 1 / (1 + np.exp(-predictions.class_logits[0].astype(np.float64)))
    changed = np.zeros(A, bool)
    for a in range(A):
        best, iou = None, -1.0
        for g in range(2):
            offset = xyz[0, a] - true[g, :3]
            cos, sin = np.cos(true[g, 6]), np.sin(true[g, 6])
            local = np.array(
                [cos * offset[0] + sin * offset[1], cos * offset[1] - sin * offset[0], offset[2]]
            )
            half = true[g, 3:6] / 2
            if predictions.mask[0, a] and (np.abs(local) <= half).all():
                overlap = oracle.iou(predicted[a], true[g])
                if overlap > iou:
                    best, iou, near, far = g, overlap, half - np.abs(local), half + np.abs(local)
        if best is None:
            continue
        changed[a] = True
        if kind == "gt_iou":
            score[a, boxes.label[0, best]] = iou
        else:
            score[a] *= np.sqrt(np.prod(near / far))
    return score, changed


@pytest.mark.parametrize("oriented", [False, True])
@pytest.mark.parametrize("kind", ["gt_ctr", "gt_iou"])
def test_against_loops(kind, oriented):
    case = make_case(oriented)
    corrected = correct_scores(*case[:3], kind, oriented)
    score, changed = naive(kind, *case)
    assert 5 < changed.sum() < A - 5
    got = 1 / (1 + np.exp(-np.asarray(corrected.class_logits[0], np.float64)))
    np.testing.assert_allclose(got, score, atol=2e-5)
    untouched = np.asarray(corrected.class_logits[0])[~changed]
    np.testing.assert_array_equal(untouched, case[0].class_logits[0][~changed])
    np.testing.assert_array_equal(corrected.center, case[0].center)


def test_perfect_boxes_get_the_highest_score_and_unknown_kinds_are_named():
    predictions, xyz, boxes, _, true = make_case()
    first = np.tile(true[:1], (1, A, 1))
    perfect = predictions._replace(center=first[..., :3], size=first[..., 3:6])
    at_center = np.broadcast_to(true[0, :3], xyz.shape)
    logits = np.asarray(correct_scores(perfect, at_center, boxes, "gt_iou", False).class_logits)
    assert (logits[0, : A - 4, 2] > 10).all()
    same = correct_scores(perfect, at_center, boxes, "gt_ctr", False).class_logits
    np.testing.assert_allclose(same, predictions.class_logits, atol=1e-4)
    with pytest.raises(ValueError, match="unknown correction 'gt'; known: gt_ctr, gt_iou"):
        correct_scores(predictions, xyz, boxes, "gt", False)
