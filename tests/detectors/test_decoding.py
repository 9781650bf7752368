import numpy as np

from vrdistill_jax.detectors.decoding import PREDICT, DecodeConfig, select_detections
from vrdistill_jax.structs import Points, Predictions

CENTER = np.array([[[0.0, 0, 0], [0.1, 0, 0], [5.0, 0, 0], [9.0, 0, 0]]], np.float32)
LOGITS = np.array([[[3.0, 0, 0], [2.0, 0, 0], [0, 0, 1.0], [0, 0, 0]]], np.float32)


def candidates(**changes) -> Predictions:
    base = Predictions(
        CENTER,
        np.ones((1, 4, 3), np.float32),
        np.zeros((1, 4), np.float32),
        LOGITS,
        np.array([[0.9, 0.8, 0.6, 0.95]], np.float32),
        np.ones((1, 4), bool),
    )
    return base._replace(**changes)


def cloud(count: int = 40) -> Points:
    """Points inside the boxes at x = 0 and x = 5, none at x = 9."""
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-0.4, 0.4, (1, count, 3)).astype(np.float32)
    xyz[:, count // 2 :, 0] += 5.0
    return Points(xyz, np.zeros((1, count, 0), np.float32), np.ones((1, count), bool))


def rows(detections):
    keep = np.asarray(detections.mask[0])
    return (
        np.asarray(detections.boxes[0])[keep],
        np.asarray(detections.score[0])[keep],
        np.asarray(detections.label[0])[keep],
    )


def test_prediction_keeps_one_box_per_object():
    boxes, score, label = rows(select_detections(candidates(), cloud(), PREDICT))
    np.testing.assert_allclose(boxes[:, 0], [0.0, 5.0])  # the second overlaps the first, the fourth is empty
    np.testing.assert_allclose(score, [0.9, 0.6])
    np.testing.assert_array_equal(label, [0, 2])


def test_evaluation_emits_every_class_sorted_by_score():
    boxes, score, label = rows(select_detections(candidates(), cloud(), DecodeConfig()))
    assert len(boxes) == 6
    assert (np.diff(score) <= 0).all()
    probability = np.exp(LOGITS[0, 0]) / np.exp(LOGITS[0, 0]).sum()
    first = boxes[:, 0] == 0
    np.testing.assert_allclose(np.sort(score[first]), np.sort(0.9 * probability), rtol=1e-5)
    assert sorted(label[first]) == [0, 1, 2]


def test_class_aware_suppression_spares_other_classes():
    other = LOGITS.copy()
    other[0, 1] = [0, 2.0, 0]
    kept = rows(select_detections(candidates(class_logits=other), cloud(), DecodeConfig(per_class=False)))[0]
    np.testing.assert_allclose(kept[:, 0], [0.0, 0.1, 5.0], atol=1e-6)


def test_masked_points_do_not_fill_boxes_and_masked_candidates_do_not_suppress():
    points = cloud()
    points = points._replace(mask=np.arange(40)[None] < 20)
    assert len(rows(select_detections(candidates(), points, PREDICT))[0]) == 1
    masked = candidates(mask=np.array([[False, True, True, True]]))
    np.testing.assert_allclose(
        rows(select_detections(masked, cloud(), PREDICT))[0][:, 0], [0.1, 5.0], atol=1e-6
    )


def test_threshold_is_strict():
    config = PREDICT._replace(score_threshold=float(np.float32(0.6)))
    assert len(rows(select_detections(candidates(), cloud(), config))[0]) == 1


def test_a_scene_of_empty_boxes_keeps_the_surest_if_asked_to():
    away = Points(cloud().xyz + 50.0, *cloud()[1:])
    assert len(rows(select_detections(candidates(), away, PREDICT))[0]) == 0
    config = PREDICT._replace(keep_surest=True)
    np.testing.assert_allclose(rows(select_detections(candidates(), away, config))[0][:, 0], [9.0])
    masked = candidates(mask=np.array([[True, True, True, False]]))
    np.testing.assert_allclose(rows(select_detections(masked, away, config))[0][:, 0], [0.0])
    # Where any box holds points, nothing changes.
    boxes = [rows(select_detections(candidates(), cloud(), c))[0] for c in (PREDICT, config)]
    np.testing.assert_array_equal(*boxes)
