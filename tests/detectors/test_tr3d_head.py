"""TR3D and SR3D after the network: decoding, targets, losses and detections from given channels of the head."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anchor_scenes import LABEL_LEVELS, NUM_CLASSES, make_anchors, make_boxes
from ml_collections import ConfigDict
from oracles import boxes as geometry

from vrdistill_jax.assigners import ASSIGNERS
from vrdistill_jax.data.class_tables import (
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
)
from vrdistill_jax.detectors import sr3d, tr3d
from vrdistill_jax.structs import Boxes, DetectorOutput, Points, Scene

GOLDEN_CASES = {"narrow_small": 1, "narrow_batch2_train": 2, "full_small": 1}  # and their scenes
SLOW_CASES = [
    "narrow_batch2_train",
    *(pytest.param(case, marks=pytest.mark.slow) for case in ("narrow_small", "full_small")),
]


def make_config(file=tr3d, oriented=True, **changes):
    config = file.default_config(
        [f"c{n}" for n in range(NUM_CLASSES)], [(1.0, 1.0, 1.0)] * NUM_CLASSES, oriented
    )
    config.label_levels = LABEL_LEVELS
    config.update_from_flattened_dict(changes)
    return config


def make_head(boxes, seed=0, oriented=True, **sizes) -> tr3d.HeadOutput:
    """Channels that decode to boxes near those given."""
    anchors = make_anchors(boxes, seed, **sizes)
    size = anchors.boxes[..., 3:6]
    offset = anchors.boxes[..., :3] - anchors.xyz
    if not oriented:
        channels = np.concatenate([offset, size], -1)
    else:
        height = size[..., 2] / 2
        base = (size[..., 0] + size[..., 1])[..., None] / 2
        angle = np.stack([np.sin(2 * anchors.boxes[..., 6]), np.cos(2 * anchors.boxes[..., 6])], -1)
        channels = np.concatenate([offset, base, base, height[..., None], 0.1 * angle], -1)
    return tr3d.HeadOutput(
        anchors.xyz, channels.astype(np.float32), anchors.class_logits, anchors.mask, anchors.level
    )


def make_output(head) -> DetectorOutput:
    return DetectorOutput(tr3d.predictions_from_head(head), {}, tr3d.TR3DRaw(head, None, ()))


def make_scene(boxes, mask=None) -> Scene:
    batch = len(boxes.mask)
    points = Points(
        np.zeros((batch, 1, 3), np.float32), np.zeros((batch, 1, 3), np.float32), np.ones((batch, 1), bool)
    )
    mask = np.ones(batch, bool) if mask is None else jnp.asarray(mask)
    return Scene(points, boxes, None, None, None, mask)


@functools.cache
def compiled(kind, key):
    """A jitted function of (head, boxes, scene mask) for a config, given as JSON so that it can be a key."""
    config = ConfigDict(json.loads(key))
    if kind == "assign":
        return jax.jit(lambda head, boxes, mask: tr3d.assign_targets(head, make_scene(boxes, mask), config))
    if kind == "decode":
        return jax.jit(
            lambda head, boxes, mask: tr3d.decode(make_output(head), make_scene(boxes, mask).points, config)
        )

    def objective(trained, head, boxes, mask):
        head = head._replace(box_channels=trained[0], class_logits=trained[1])
        return tr3d.loss(make_output(head), make_scene(boxes, mask), config)

    function = objective if kind == "loss" else jax.value_and_grad(objective, has_aux=True)
    return jax.jit(
        lambda head, boxes, mask: function((head.box_channels, head.class_logits), head, boxes, mask)
    )


def run(kind, head, boxes, config, mask=None):
    """Of kind "assign", "decode", "loss" (total, terms) or "gradient" (that, and of channels and logits)."""
    mask = np.ones(len(boxes.mask), bool) if mask is None else np.asarray(mask)
    return compiled(kind, config.to_json())(head, boxes, mask)


def test_level_tables_are_the_published_ones():
    scannet = tr3d.label_levels(SCANNET_CLASSES, SCANNET_MEAN_SIZES, False)
    assert scannet == (0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0)
    sunrgbd = tr3d.label_levels(SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES, True)
    assert sunrgbd == (1, 1, 1, 0, 0, 1, 0, 0, 1, 0)


def test_decoding_by_hand():
    point = np.array([1.0, 2.0, 3.0], np.float32)
    aligned = tr3d.boxes_from_head(point, np.array([0.1, 0.2, 0.3, 1, 2, 4], np.float32))
    np.testing.assert_allclose(aligned, [1.1, 2.2, 3.3, 1, 2, 4, 0], rtol=1e-6)
    # log q = log 3 in the direction of 2 yaw = pi / 3
    a, b = np.log(3) * np.sin(np.pi / 3), np.log(3) * np.cos(np.pi / 3)
    turned = tr3d.boxes_from_head(point, np.array([0, 0, 0, 1, 3, 2, a, b], np.float32))
    np.testing.assert_allclose(turned, [1, 2, 3, 1, 3, 5, np.pi / 6], rtol=1e-5)
    square = tr3d.boxes_from_head(point, np.array([0, 0, 0, 1, 1, 1, 0, 0], np.float32))
    np.testing.assert_allclose(square, [1, 2, 3, 1, 1, 2, 0], rtol=1e-6)


def test_gradient_of_decoding_is_finite_without_an_angle():
    channels = jnp.array([0.0, 0, 0, 1, 1, 1, 0, 0])
    jacobian = jax.jacobian(lambda c: tr3d.boxes_from_head(jnp.zeros(3), c))(channels)
    assert np.isfinite(jacobian).all()
    assert jacobian[3, 3] == 0.5


def naive_loss(head, boxes, gt_index):
    """Focal and DIoU loss of a batch, anchor by anchor, with the assignment given."""
    classes, distances, count = 0.0, [], int((gt_index >= 0).sum())
    for b, a in zip(*np.nonzero(head.mask), strict=True):
        g = gt_index[b, a]
        for k, z in enumerate(head.class_logits[b, a].astype(float)):
            p = 1 / (1 + np.exp(-z))
            is_class = g >= 0 and boxes.label[b, g] == k
            p_t, alpha = (p, 0.25) if is_class else (1 - p, 0.75)
            classes -= alpha * (1 - p_t) ** 2 * np.log(p_t)
        if g >= 0:
            box = np.asarray(tr3d.boxes_from_head(head.points[b, a], head.box_channels[b, a]), float)
            target = [*boxes.center[b, g], *boxes.size[b, g], boxes.yaw[b, g]]
            distances.append(1 - geometry.diou(box, np.array(target, float)))
    return classes / max(count, 1), np.mean(distances)


@pytest.mark.parametrize("oriented", [True, False])
def test_loss_against_loops(oriented):
    boxes = make_boxes(3, rotated=oriented)
    head = make_head(boxes, 4, oriented, counts=(40, 20))
    config = make_config(oriented=oriented)
    index = np.asarray(run("assign", head, boxes, config).gt_index)
    total, terms = run("loss", head, boxes, config)
    classes, distance = naive_loss(head, boxes, index)
    assert terms["class"] == pytest.approx(classes, rel=1e-4)
    assert terms["box"] == pytest.approx(distance, rel=1e-4)
    assert total == pytest.approx(classes + distance, rel=1e-4)
    assert terms["positives"] == pytest.approx((index >= 0).sum() / 6)
    quality = [
        geometry.iou(
            np.asarray(tr3d.boxes_from_head(head.points[b, a], head.box_channels[b, a]), float),
            np.array([*boxes.center[b, g], *boxes.size[b, g], boxes.yaw[b, g]], float),
        )
        for b, a in zip(*np.nonzero(index >= 0), strict=True)
        for g in [index[b, a]]
    ]
    assert terms["quality"] == pytest.approx(np.mean(quality), rel=1e-4)


@pytest.mark.parametrize("assigner", list(ASSIGNERS))
def test_every_assigner_with_ras(assigner):
    boxes = make_boxes(5, rotated=False)
    head = make_head(boxes, 6, False)
    total, terms = run("loss", head, boxes, make_config(sr3d, False, assigner=assigner))
    assert np.isfinite(total)
    assert terms["positives"] > 0.5
    assert 0 < terms["quality"] < 1
    assert 0 < terms["aic"] < 1
    # No mean difference is smaller than the difference of the means.
    assert abs(terms["score_top_k"] - terms["quality_top_k"]) <= terms["aic_top_k"] + 1e-6


@pytest.mark.parametrize("oriented", [True, False])
def test_gradients_are_finite_with_and_without_boxes(oriented):
    boxes = make_boxes(5, rotated=oriented)
    head, config = make_head(boxes, 6, oriented), make_config(sr3d, oriented)
    (total, terms), gradient = run("gradient", head, boxes, config)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((total, terms, gradient)))
    assert all(np.abs(x).max() > 0 for x in gradient)
    none = boxes._replace(mask=np.zeros_like(boxes.mask))
    (_, terms), gradient = run("gradient", head, none, config)
    assert terms["box"] == 0
    assert terms["positives"] == 0
    assert (np.asarray(gradient[0]) == 0).all()
    assert np.isfinite(gradient[1]).all()


@pytest.mark.parametrize("name", tr3d.CLASSIFICATION_LOSSES)
def test_classification_losses_learn_the_label(name):
    boxes = make_boxes(5, rotated=False)
    head = make_head(boxes, 6, False)
    config = make_config(oriented=False, classification_loss=name)
    (_, terms), gradient = run("gradient", head, boxes, config)
    index = np.asarray(run("assign", head, boxes, config).gt_index)
    negative = (index < 0) & head.mask
    assert (np.asarray(gradient[1])[negative] > 0).all(), "scores of negatives fall"
    assert (np.asarray(gradient[1])[~head.mask] == 0).all()
    assert terms["class"] > 0
    values = [
        run("gradient", head, boxes, make_config(oriented=False, classification_loss=other))[0][1]["class"]
        for other in tr3d.CLASSIFICATION_LOSSES
    ]
    assert sum(np.isclose(value, terms["class"]) for value in values) == 1


def test_padding_and_garbage_change_nothing():
    boxes = make_boxes(5, rotated=False)
    head = make_head(boxes, 6, False)
    config = make_config(sr3d, False)
    (clean, clean_terms), clean_gradient = run("gradient", head, boxes, config)
    empty, unused = ~head.mask[..., None], ~boxes.mask
    dirty = head._replace(
        points=np.where(empty, 0.3, head.points),
        box_channels=np.where(empty, 1.7, head.box_channels),
        class_logits=np.where(empty, 3.0, head.class_logits),
    )
    dirty_boxes = boxes._replace(
        center=np.where(unused[..., None], 0.2, boxes.center),
        label=np.where(unused, 2, boxes.label),
        yaw=np.where(unused, 1.0, boxes.yaw),
    )
    (total, terms), gradient = run("gradient", dirty, dirty_boxes, config)
    np.testing.assert_allclose(total, clean, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), terms, clean_terms)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, clean_gradient)


def test_padding_scenes_of_a_batch_do_not_count():
    boxes, config = make_boxes(5, rotated=False), make_config(sr3d, False)
    head, other = make_head(boxes, 6, False), make_head(boxes, 7, False)
    mixed = tr3d.HeadOutput(
        *(np.stack([a[0], b[1]]) for a, b in zip(head[:4], other[:4], strict=True)), head.level
    )
    (first, _), gradient = run("gradient", head, boxes, config, [True, False])
    (second, _), _ = run("gradient", mixed, boxes, config, [True, False])
    np.testing.assert_allclose(first, second, rtol=1e-6)
    assert all((np.asarray(x)[1] == 0).all() for x in gradient)


def test_a_batch_over_devices_equals_one_device():
    boxes, config = make_boxes(5, rotated=False), make_config(sr3d, False)
    head = make_head(boxes, 6, False)

    def share(head, boxes):
        one = jax.tree.map(lambda x: x[None], (head._replace(level=None), boxes))
        output = make_output(one[0]._replace(level=head.level))
        points = Points(jnp.zeros((1, 1, 3)), jnp.zeros((1, 1, 3)), jnp.ones((1, 1), bool))
        scene = Scene(points, one[1], None, None, None, jnp.ones(1, bool))
        return jax.lax.pmean(tr3d.loss(output, scene, config, "devices"), "devices")

    axes = tr3d.HeadOutput(0, 0, 0, 0, None)
    total, terms = jax.jit(jax.vmap(share, (axes, 0), axis_name="devices"))(head, boxes)
    expected, expected_terms = run("loss", head, boxes, config)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), terms, jax.tree.map(
        lambda x: np.full(2, x), expected_terms
    ))  # fmt: skip


def test_targets_that_are_not_detached_reach_the_boxes():
    boxes = make_boxes(5, rotated=False)
    head = make_head(boxes, 6, False)
    gradients = [
        np.asarray(run("gradient", head, boxes, make_config(sr3d, False, **{"ras.detach": detach}))[1][0])
        for detach in (True, False)
    ]
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-4


def test_sr3d_differs_from_tr3d_in_two_switches():
    baseline, ours = make_config(tr3d), make_config(sr3d)
    assert (ours.assigner, ours.classification_loss) == ("spota", "ras")
    ours.name, ours.assigner, ours.classification_loss = "tr3d", "top_k", "focal"
    assert ours.to_dict() == baseline.to_dict()


def test_errors_name_the_remedy():
    boxes = make_boxes(5)
    output = make_output(make_head(boxes, 6))
    with pytest.raises(ValueError, match="this scene has no labels"):
        tr3d.loss(output, make_scene(boxes)._replace(boxes=None), make_config())
    with pytest.raises(ValueError, match="unknown assigner 'atss'"):
        jax.eval_shape(lambda: tr3d.loss(output, make_scene(boxes), make_config(assigner="atss")))
    with pytest.raises(ValueError, match="unknown classification_loss 'bce'; known: focal, qfl, vfl, ras"):
        jax.eval_shape(lambda: tr3d.loss(output, make_scene(boxes), make_config(classification_loss="bce")))


def test_decode_reads_predictions_only():
    boxes = make_boxes(5)
    predictions = tr3d.predictions_from_head(make_head(boxes, 6))
    config, points = make_config(), make_scene(boxes).points
    found = jax.jit(lambda p: tr3d.decode(DetectorOutput(p, {}, None), points, config))(predictions)
    assert found.mask.shape == (2, 129 * NUM_CLASSES)
    assert found.mask.sum() > 50
    score = np.asarray(found.score)
    assert (np.diff(score, axis=1) <= 0).all()
    assert score[np.asarray(found.mask)].min() > 0.01


# The reference's own numbers.


def golden_head(stored, b) -> tr3d.HeadOutput:
    levels = [{k: stored[f"head{n}/{k}{b}"] for k in ("points", "bbox_preds", "cls_preds")} for n in range(2)]
    points, channels, logits = (
        np.concatenate([level[k] for level in levels])[None] for k in ("points", "bbox_preds", "cls_preds")
    )
    level = np.repeat(np.arange(2, dtype=np.int32), [len(x["points"]) for x in levels])
    return tr3d.HeadOutput(points, channels, logits, np.ones(points.shape[:2], bool), level)


def golden_boxes(stored, b) -> Boxes:
    rows, label = stored[f"gt_boxes{b}"][None], stored[f"gt_labels{b}"][None].astype(np.int32)
    return Boxes(
        rows[..., :3], rows[..., 3:6], rows[..., 6], label, np.ones(label.shape, bool), rows[..., :3]
    )


def sunrgbd_config(**changes):
    config = tr3d.default_config(SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES, True)
    config.reference_diou = True
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def golden(shared):
    return {case: np.load(shared / f"golden/tr3d_sunrgbd/{case}.npz") for case in GOLDEN_CASES}


@pytest.mark.data
def test_golden_decoding(shared, golden):
    units = np.load(shared / "golden/tr3d_sunrgbd/units.npz")
    channels = np.concatenate([units["decode/pred8"]], -1)
    np.testing.assert_allclose(
        tr3d.boxes_from_head(units["decode/points"], channels), units["decode/box7"], rtol=1e-5, atol=1e-6
    )
    stored = golden["narrow_small"]
    head = golden_head(stored, 0)
    boxes = np.asarray(tr3d.boxes_from_head(head.points, head.box_channels))[0]
    expected = np.concatenate([stored[f"head{n}/boxes0"] for n in range(2)])
    assert stored["head0/boxes_step"] == stored["head1/boxes_step"] == 1
    np.testing.assert_allclose(boxes, expected, rtol=1e-5, atol=1e-6)


@jax.jit
def box_losses(points, channels, target):
    return tr3d.diou_loss(tr3d.boxes_from_head(points, channels), target, reference=True)


@pytest.mark.data
@pytest.mark.parametrize("case", SLOW_CASES)
@pytest.mark.parametrize("variant", ["samsung", "mmdet3d"])
def test_golden_losses(golden, case, variant):
    stored = golden[case]
    config = sunrgbd_config(**{"assigners.top_k.nearest_of_all": variant == "samsung"})
    suffix = "" if variant == "samsung" else "_mmdet3d"
    sums, distances = [], []
    for b in range(GOLDEN_CASES[case]):
        head, boxes = golden_head(stored, b), golden_boxes(stored, b)
        index = np.asarray(run("assign", head, boxes, config).gt_index)[0]
        np.testing.assert_array_equal(index, stored[f"assigned_{variant}{b}"])
        total, terms = run("loss", head, boxes, config)
        label = np.where(index >= 0, boxes.label[0, index], -1)
        per_location = tr3d.focal_loss(head.class_logits[0], label).sum(-1)
        if variant == "samsung":
            np.testing.assert_allclose(
                per_location, stored[f"loss_cls_per_location{b}"], rtol=1e-4, atol=1e-6
            )
        else:
            np.testing.assert_allclose(per_location.sum(), stored[f"loss_cls_sum_mmdet3d{b}"], rtol=1e-5)
        found = index >= 0
        target = np.concatenate([boxes.center, boxes.size, boxes.yaw[..., None]], -1)[0, index]
        distance = np.asarray(box_losses(head.points[0], head.box_channels[0], target))[found]
        np.testing.assert_allclose(distance, stored[f"loss_bbox_per_positive{suffix}{b}"], atol=2e-5)
        np.testing.assert_allclose(
            terms["box"], np.mean(stored[f"loss_bbox_per_positive{suffix}{b}"]), rtol=1e-5
        )
        np.testing.assert_allclose(terms["class"], per_location.sum() / found.sum(), rtol=1e-5)
        np.testing.assert_allclose(total, terms["class"] + terms["box"], rtol=1e-6)
        sums.append(float(per_location.sum()))
        distances.append(np.asarray(distance))
    if variant == "samsung":  # over the whole batch
        joined = np.concatenate(distances)
        np.testing.assert_allclose(joined.mean(), stored["eval_bbox_loss"], rtol=1e-5)
        np.testing.assert_allclose(sum(sums) / len(joined), stored["eval_cls_loss"], rtol=1e-5)


@pytest.mark.data
@pytest.mark.parametrize("case", SLOW_CASES)
def test_golden_detections(golden, case):
    """Every box, score and label; pairs with the threshold within rounding may appear or not."""
    stored = golden[case]
    for b in range(GOLDEN_CASES[case]):
        found = run("decode", golden_head(stored, b), golden_boxes(stored, b), sunrgbd_config())
        keep = np.asarray(found.mask[0])
        boxes, score, label = (np.asarray(x[0])[keep] for x in (found.boxes, found.score, found.label))
        order = np.lexsort((-score, label))
        expected = stored[f"det_boxes{b}"], stored[f"det_scores{b}"], stored[f"det_labels{b}"]
        by_score = np.lexsort((-expected[1], expected[2]))
        assert len(score) == len(expected[1])
        np.testing.assert_array_equal(label[order], expected[2][by_score])
        np.testing.assert_allclose(score[order], expected[1][by_score], atol=1e-6)
        np.testing.assert_allclose(boxes[order], expected[0][by_score], rtol=1e-4, atol=1e-5)
