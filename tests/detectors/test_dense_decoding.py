import jax
import numpy as np
import pytest
from oracles import boxes as oracle

from vrdistill_jax.detectors.decoding import PREDICT, DecodeConfig
from vrdistill_jax.detectors.dense_decoding import evaluation_protocol, select_dense_detections, suppress
from vrdistill_jax.structs import Points, Predictions


def make_predictions(seed=0, batch=2, count=60, classes=3, rotated=True):
    rng = np.random.default_rng(seed)
    boxes = np.stack([oracle.random_boxes(rng, count, yaw=rotated) for _ in range(batch)]).astype(np.float32)
    logits = rng.normal(-3, 2, (batch, count, classes)).astype(np.float32)
    mask = rng.random((batch, count)) < 0.9
    objectness = (1 / (1 + np.exp(-logits.max(-1)))).astype(np.float32)
    return Predictions(boxes[..., :3], boxes[..., 3:6], boxes[..., 6], logits, objectness, mask)


def no_points(batch=2):
    return Points(
        np.zeros((batch, 1, 3), np.float32), np.zeros((batch, 1, 0), np.float32), np.ones((batch, 1), bool)
    )


def rows_of(detections, b):
    keep = np.asarray(detections.mask[b])
    assert not keep[keep.sum() :].any(), "kept detections come first"
    columns = (np.asarray(x[b])[keep] for x in (detections.boxes, detections.score, detections.label))
    return [(label, score, *box) for box, score, label in zip(*columns, strict=True)]


def naive(p, b, rotated, candidates, threshold=0.01, nms_iou=0.5):
    """Class by class, in the reference's order of steps."""
    rows = [a for a in range(len(p.mask[b])) if p.mask[b, a]]
    score = 1 / (1 + np.exp(-p.class_logits[b].astype(float)))
    rows = sorted(rows, key=lambda a: -score[a].max())[:candidates]
    boxes = np.concatenate([p.center[b], p.size[b], p.yaw[b][:, None]], -1).astype(float)
    found = []
    for k in range(score.shape[1]):
        of_class = [a for a in rows if score[a, k] > threshold]
        picked = oracle.greedy_nms(
            boxes[of_class], score[of_class, k], nms_iou, lambda x, y: oracle.bev_iou(x, y, rotated)
        )
        found += [(k, score[of_class[i], k], *boxes[of_class[i]]) for i in picked]
    return sorted(found, key=lambda row: -row[1])


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("candidates", [1000, 25])
def test_against_loops(rotated, candidates):
    p = make_predictions(rotated=rotated)
    config = evaluation_protocol(rotated)
    select = jax.jit(lambda p: select_dense_detections(p, no_points(), config, candidates))
    result = select(p)
    assert result.mask.shape == (2, 3 * min(candidates, 60))
    for b in range(2):
        expected = naive(p, b, rotated, candidates)
        assert 10 < len(expected) < 3 * p.mask[b].sum()
        np.testing.assert_allclose(rows_of(result, b), expected, atol=1e-5)
    assert (np.asarray(result.score)[~np.asarray(result.mask)] == 0).all()


def test_extra_pads_change_nothing():
    p = make_predictions()
    more = Predictions(*(np.pad(x, [(0, 0), (0, 9)] + [(0, 0)] * (x.ndim - 2), constant_values=4) for x in p))
    more = more._replace(mask=np.pad(p.mask, [(0, 0), (0, 9)]))
    config = evaluation_protocol(True)
    select = jax.jit(lambda p: select_dense_detections(p, no_points(), config, 25))
    plain, padded = select(p), select(more)
    for b in range(2):
        assert rows_of(plain, b) == rows_of(padded, b)


def test_prediction_gives_each_anchor_once():
    p = make_predictions()
    config = DecodeConfig(0.25, False, 0.05, 0, "bev_rotated", per_class=False)
    result = jax.jit(lambda p: select_dense_detections(p, no_points(), config))(p)
    for b in range(2):
        rows = np.array(rows_of(result, b))
        boxes = np.concatenate([p.center[b], p.size[b], p.yaw[b][:, None]], -1)
        score = 1 / (1 + np.exp(-p.class_logits[b]))
        valid = p.mask[b] & (score.max(-1) > 0.05)
        picked = oracle.greedy_nms(boxes, score.max(-1), 0.25, lambda x, y: oracle.bev_iou(x, y), mask=valid)
        np.testing.assert_allclose(rows[:, 2:], boxes[picked], atol=1e-6)
        np.testing.assert_array_equal(rows[:, 0], p.class_logits[b][picked].argmax(-1))


def test_boxes_without_points_are_dropped_when_asked_for():
    p = make_predictions(batch=1)
    best = int(np.where(p.mask[0], p.objectness[0], -1).argmax())
    xyz = np.tile(p.center[:, best], (6, 1))[None]
    points = Points(xyz, np.zeros((1, 6, 0), np.float32), np.ones((1, 6), bool))
    config = PREDICT._replace(score_threshold=0.0)
    select = jax.jit(lambda points: select_dense_detections(p, points, config))
    boxes = np.array(rows_of(select(points), 0))[:, 2:]
    assert all(oracle.signed_depth(xyz[0, 0], box) >= -1e-4 for box in boxes)
    np.testing.assert_allclose(
        boxes[0], np.append(np.append(p.center[0, best], p.size[0, best]), p.yaw[0, best])
    )
    few = points._replace(mask=np.arange(6)[None] < 4)
    assert rows_of(select(few), 0) == []


@pytest.mark.parametrize("seed", range(3))
def test_suppression_without_sorting_is_greedy(seed):
    rng = np.random.default_rng(seed)
    overlaps = rng.random((40, 40)) < 0.1
    overlaps |= overlaps.T
    score = np.round(rng.random(40), 1).astype(np.float32)  # with ties
    mask = rng.random(40) < 0.8
    kept = np.flatnonzero(suppress(overlaps, score, mask))
    picked = oracle.greedy_nms(np.arange(40), score, 0.5, lambda a, b: float(overlaps[a, b]), mask=mask)
    np.testing.assert_array_equal(kept, sorted(picked))


def test_unknown_overlap_is_refused():
    config = evaluation_protocol(True)._replace(overlap="round")
    with pytest.raises(ValueError, match="overlap='round'"):
        select_dense_detections(make_predictions(), no_points(), config)


@pytest.mark.data
@pytest.mark.parametrize(("name", "overlap"), [("nms_rot", "bev_rotated"), ("nms_normal", "bev_aligned")])
def test_golden_suppression(shared, name, overlap):
    stored = np.load(shared / "golden/tr3d_sunrgbd/units.npz")
    boxes, score = stored[f"{name}/boxes"], stored[f"{name}/scores"]
    logits = np.log(score / (1 - score))[None, :, None]
    p = Predictions(
        boxes[None, :, :3],
        boxes[None, :, 3:6],
        boxes[None, :, 6],
        logits,
        score[None],
        np.ones((1, 600), bool),
    )
    config = DecodeConfig(nms_iou=0.5, score_threshold=0.0, min_points=0, overlap=overlap)
    select = jax.jit(lambda p: select_dense_detections(p, no_points(1), config))
    got = np.array(rows_of(select(p), 0))[:, 2:]
    expected = boxes[stored[f"{name}/keep"]]
    if overlap == "bev_aligned":  # the reference ignores the headings of these boxes
        expected, got = expected[:, :6], got[:, :6]
    np.testing.assert_array_equal(got.astype(np.float32), expected)
