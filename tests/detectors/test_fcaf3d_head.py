"""FCAF3D after the network: decoding, targets, losses and detections from given channels of the head."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anchor_scenes import NUM_CLASSES, make_boxes
from ml_collections import ConfigDict
from oracles import fcaf3d as oracle

from vrdistill_jax.detectors import fcaf3d
from vrdistill_jax.detectors.decoding import PREDICT
from vrdistill_jax.structs import DetectorOutput, Points, Scene

SIZES = {
    0.25: 400,
    0.5: 60,
    1.0: 12,
    2.0: 5,
}  # anchors of a level by their distance in metres; the last ones are pads


def make_config(oriented=False, **changes):
    config = fcaf3d.default_config([f"c{n}" for n in range(NUM_CLASSES)], None, oriented)
    config.update_from_flattened_dict(changes)
    return config


def make_head(seed=0, oriented=False, batch=2) -> fcaf3d.HeadOutput:
    """Anchors at random places of four lattices around the origin, with random channels."""
    rng = np.random.default_rng(seed)
    xyz, mask, level = [], [], []
    for row, (stride, count) in enumerate(SIZES.items()):
        steps = np.arange(-int(2 / stride), int(2 / stride)) * stride + 0.01 * seed + 0.003
        grid = np.stack(np.meshgrid(steps, steps, steps / 2, indexing="ij"), -1).reshape(-1, 3)
        xyz.append(np.stack([grid[rng.permutation(len(grid))[:count]] for _ in range(batch)]))
        mask.append(np.tile(np.arange(count) < count - 2, (batch, 1)))
        level.append(np.full(count, row, np.int32))
    points, mask = np.concatenate(xyz, 1).astype(np.float32), np.concatenate(mask, 1)
    shape = mask.shape
    distances = np.exp(rng.normal(-1, 0.4, (*shape, 6)))
    angle = rng.normal(0, 0.3, (*shape, 2))
    channels = np.concatenate([distances, angle], -1) if oriented else distances
    return fcaf3d.HeadOutput(
        points, channels.astype(np.float32), rng.normal(0, 1, shape).astype(np.float32),
        rng.normal(-2.5, 1.5, (*shape, NUM_CLASSES)).astype(np.float32), mask, np.concatenate(level),
    )  # fmt: skip


def make_output(head, candidates=1000) -> DetectorOutput:
    predictions = fcaf3d.predictions_from_head(head, list(SIZES.values()), candidates)
    return DetectorOutput(predictions, {}, fcaf3d.FCAF3DRaw(head, None, ()))


def make_scene(boxes, mask=None) -> Scene:
    batch = len(boxes.mask)
    nothing = np.zeros((batch, 1, 3), np.float32)
    points = Points(nothing, nothing, np.ones((batch, 1), bool))
    return Scene(points, boxes, None, None, None, np.ones(batch, bool) if mask is None else jnp.asarray(mask))


@functools.cache
def compiled(kind, key):
    """A jitted function of (head, boxes, scene mask) for a config, given as JSON so that it can be a key."""
    config = ConfigDict(json.loads(key))
    if kind == "assign":
        return jax.jit(lambda head, boxes, mask: fcaf3d.assign_targets(head, make_scene(boxes, mask), config))
    if kind == "decode":
        count = config.num_candidates
        return jax.jit(
            lambda head, boxes, mask: fcaf3d.decode(
                make_output(head, count), make_scene(boxes).points, config
            )
        )

    def objective(trained, head, boxes, mask):
        head = head._replace(box_channels=trained[0], center_logit=trained[1], class_logits=trained[2])
        return fcaf3d.loss(make_output(head), make_scene(boxes, mask), config)

    function = jax.value_and_grad(objective, has_aux=True)
    return jax.jit(
        lambda head, boxes, mask: function(
            (head.box_channels, head.center_logit, head.class_logits), head, boxes, mask
        )
    )


def run(kind, head, boxes, config, mask=None):
    """Of kind "assign", "decode" or "gradient" ((total, terms), and of box channels, centre and class logits)."""
    mask = np.ones(len(boxes.mask), bool) if mask is None else np.asarray(mask)
    return compiled(kind, config.to_json())(head, boxes, mask)


def test_decoding_by_hand():
    point = np.array([1.0, 2.0, 3.0], np.float32)
    aligned = fcaf3d.boxes_from_head(point, np.array([0.5, 1.5, 1, 1, 2, 1], np.float32))
    np.testing.assert_allclose(aligned, [1.5, 2, 2.5, 2, 2, 3, 0], rtol=1e-6)
    # log q = log 3 in the direction of 2 yaw = pi / 3
    a, b = np.log(3) * np.sin(np.pi / 3), np.log(3) * np.cos(np.pi / 3)
    turned = fcaf3d.boxes_from_head(point, np.array([0.5, 1.5, 1, 1, 2, 1, a, b], np.float32))
    np.testing.assert_allclose(turned, [1.5, 2, 2.5, 1, 3, 3, np.pi / 6], rtol=1e-5)


@pytest.mark.parametrize("oriented", [True, False])
def test_decoding_against_loops(oriented):
    head = make_head(3, oriented)
    boxes = fcaf3d.boxes_from_head(head.points[0], head.box_channels[0])
    np.testing.assert_allclose(boxes, oracle.decode(head.points[0], head.box_channels[0]), atol=1e-5)


def test_gradient_of_decoding_is_finite_without_an_angle():
    channels = jnp.array([1.0, 1, 1, 1, 1, 1, 0, 0])
    jacobian = jax.jacobian(lambda c: fcaf3d.boxes_from_head(jnp.zeros(3), c))(channels)
    assert np.isfinite(jacobian).all()
    assert jacobian[0, 0] == -0.5


@pytest.mark.parametrize("oriented", [True, False])
def test_loss_against_loops(oriented):
    boxes, head = make_boxes(3, rotated=oriented), make_head(4, oriented)
    boxes = boxes._replace(size=boxes.size * 1.4)
    config = make_config(oriented)
    index = np.asarray(run("assign", head, boxes, config).gt_index)
    (total, terms), gradient = run("gradient", head, boxes, config)
    expected = []
    for b in range(2):
        real, count = head.mask[b], int(boxes.mask[b].sum())
        rows = np.concatenate([boxes.center[b], boxes.size[b], boxes.yaw[b][:, None]], -1)[:count]
        points, channels = head.points[b][real], head.box_channels[b][real]
        assigned = oracle.assign(points, head.level[real], rows)
        np.testing.assert_array_equal(index[b][real], assigned)
        assert (assigned >= 0).sum() > 20
        logits = head.class_logits[b][real].astype(float), head.center_logit[b][real].astype(float)
        expected.append(oracle.losses(points, channels, *logits, assigned, rows, boxes.label[b]))
    expected = np.mean(expected, 0)
    ours = [terms[name] for name in ("center", "box", "class")]
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert total == pytest.approx(expected.sum(), rel=1e-4)
    assert terms["positives"] == pytest.approx((index >= 0).sum() / 6)
    assert 0 < terms["quality"] < 1
    positive = index >= 0
    assert (np.abs(gradient[0][positive]).max(-1) > 0).mean() > 0.9
    assert (np.asarray(gradient[0])[~positive] == 0).all()
    assert (np.asarray(gradient[1])[~positive] == 0).all()
    assert all(np.isfinite(x).all() for x in gradient)
    assert (np.asarray(gradient[2])[~head.mask] == 0).all()


def test_scenes_without_boxes_and_padding_scenes():
    boxes, head, config = make_boxes(5, rotated=False), make_head(6), make_config()
    none = boxes._replace(mask=np.zeros_like(boxes.mask))
    (total, terms), gradient = run("gradient", head, none, config)
    assert terms["box"] == terms["center"] == terms["positives"] == 0
    assert np.isfinite(total)
    assert all(np.isfinite(x).all() for x in gradient)
    assert (np.asarray(gradient[0]) == 0).all()
    other = make_head(7)
    mixed = fcaf3d.HeadOutput(
        *(np.stack([a[0], b[1]]) for a, b in zip(head[:5], other[:5], strict=True)), head.level
    )
    (first, _), gradient = run("gradient", head, boxes, config, [True, False])
    (second, _), _ = run("gradient", mixed, boxes, config, [True, False])
    np.testing.assert_allclose(first, second, rtol=1e-6)
    assert all((np.asarray(x)[1] == 0).all() for x in gradient)


def test_a_batch_over_devices_equals_one_device():
    boxes, head, config = make_boxes(5, rotated=False), make_head(6), make_config()

    def share(head, boxes):
        one = jax.tree.map(lambda x: x[None], (head._replace(level=None), boxes))
        output = make_output(one[0]._replace(level=head.level))
        return jax.lax.pmean(fcaf3d.loss(output, make_scene(one[1]), config, "devices"), "devices")

    axes = fcaf3d.HeadOutput(0, 0, 0, 0, 0, None)
    total, terms = jax.jit(jax.vmap(share, (axes, 0), axis_name="devices"))(head, boxes)
    (expected, expected_terms), _ = run("gradient", head, boxes, config)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for name, value in terms.items():
        np.testing.assert_allclose(value, expected_terms[name], rtol=1e-5)


@pytest.mark.parametrize("oriented", [True, False])
@pytest.mark.parametrize("candidates", [pytest.param(1000, marks=pytest.mark.slow), 40])
def test_detections_against_loops(oriented, candidates):
    head, boxes = make_head(8, oriented), make_boxes(0)
    found = run("decode", head, boxes, make_config(oriented, num_candidates=candidates))
    for b in range(2):
        levels = []
        for n in range(4):
            rows = head.mask[b] & (head.level == n)
            levels.append(
                oracle.SimpleNamespace(
                    points=head.points[b][rows], bbox=head.box_channels[b][rows],
                    cls=head.class_logits[b][rows].astype(float), center=head.center_logit[b][rows].astype(float),
                )
            )  # fmt: skip
        expected_boxes, scores, labels = oracle.detect(levels, oriented, candidates)
        keep = np.asarray(found.mask[b])
        order = np.argsort(-scores, kind="stable")
        assert keep.sum() == len(scores) > 30
        np.testing.assert_allclose(np.asarray(found.score[b])[keep], scores[order], atol=1e-6)
        np.testing.assert_array_equal(np.asarray(found.label[b])[keep], labels[order])
        np.testing.assert_allclose(np.asarray(found.boxes[b])[keep], expected_boxes[order], atol=1e-4)


def test_each_level_has_its_own_candidates():
    best = jnp.array([[5.0, 9, 1, 7, 2, 3]])
    np.testing.assert_array_equal(fcaf3d.candidates_by_level(best, [3, 2, 1], 2), [[1, 0, 3, 4, 5]])


def test_passes_over_one_scan_compete():
    """As prediction joins them: twice the same candidates give the same boxes, and no more than fit the table."""
    output, config = make_output(make_head(8), 20), make_config(num_candidates=20)
    points = make_scene(make_boxes(0)).points
    lenient = PREDICT._replace(score_threshold=0.05, min_points=0)
    one = DetectorOutput(output.predictions, {}, None)
    two = DetectorOutput(jax.tree.map(lambda x: jnp.concatenate([x, x], 1), output.predictions), {}, None)
    found = [jax.jit(lambda o: fcaf3d.decode(o, points, config, lenient))(o) for o in (one, two)]
    assert found[1].mask.shape == (2, 80)
    for b in range(2):
        first, second = (np.asarray(x.boxes[b])[np.asarray(x.mask[b])] for x in found)
        assert 0 < len(second) <= len(first)
        np.testing.assert_allclose(second, first[: len(second)])


def test_errors_name_the_remedy():
    boxes, output = make_boxes(5), make_output(make_head(6))
    with pytest.raises(ValueError, match="this scene has no labels"):
        fcaf3d.loss(output, make_scene(boxes)._replace(boxes=None), make_config())
    with pytest.raises(ValueError, match="unknown assigner 'atss'"):
        jax.eval_shape(lambda: fcaf3d.loss(output, make_scene(boxes), make_config(assigner="atss")))
    with pytest.raises(ValueError, match="config.detector.label_levels"):
        jax.eval_shape(lambda: fcaf3d.loss(output, make_scene(boxes), make_config(assigner="top_k")))


def test_other_assigners_can_be_chosen():
    boxes, head = make_boxes(5, rotated=False), make_head(6)
    index = np.asarray(run("assign", head, boxes, make_config(assigner="spota")).gt_index)
    assert [np.sum(index == g) for g in range(2)] >= [6, 6]
