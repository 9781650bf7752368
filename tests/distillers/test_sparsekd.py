from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from oracles import sparsekd as oracle
from proposal_outputs import MEAN_SIZES, make_output, make_scene, mask_proposals, permute_proposals

from vrdistill_jax.detectors.votenet import predictions_from_head
from vrdistill_jax.distillers import sparsekd
from vrdistill_jax.structs import Boxes, Predictions

best_after_nms = jax.jit(sparsekd.best_after_nms, static_argnums=(2, 3))
DETECTOR = ConfigDict({"class_names": ("a", "b", "c", "d")})


def distil(student, teacher, scene, **changes):
    config = sparsekd.default_config()
    config.update(changes)
    return run(sparsekd.build(config, DETECTOR, DETECTOR), student, teacher, scene)


@partial(jax.jit, static_argnums=0)
def run(module, student, teacher, scene):
    return module.apply({}, student, teacher, scene, aligned=student)


@pytest.fixture(scope="module")
def case():
    scene = make_scene()
    return make_output(1, scene), mask_proposals(make_output(2, scene), 3), scene


@pytest.mark.parametrize("changes", [{}, {"threshold": 0.3, "clip": 0.05, "max_distance": 1e3}])
@pytest.mark.parametrize("num_boxes", [0, 3])
def test_terms_equal_the_oracle(changes, num_boxes):
    scene = make_scene(num_boxes=num_boxes)
    student, teacher = make_output(1, scene), mask_proposals(make_output(2, scene), 3)
    total, terms = distil(student, teacher, scene, **changes)
    want = oracle.terms(student, teacher, scene, **changes)
    np.testing.assert_allclose(terms["heat"], 10 * want["heat"], rtol=1e-4)
    np.testing.assert_allclose(terms["box"], 0.2 * want["box"], rtol=1e-4)
    np.testing.assert_allclose(terms["pivotal"], want["pivotal"], rtol=1e-4)
    np.testing.assert_allclose(total, 10 * want["heat"] + 0.2 * want["box"], rtol=1e-4)
    if num_boxes:
        assert want["heat"] > 0
        assert want["box"] > 0
        assert (want["objects"] == 6) == (changes != {})  # some clusters are too far, unless all may be
    else:
        assert total == 0


def test_equal_networks_have_no_loss(case):
    _, teacher, scene = case
    total, terms = distil(teacher, teacher, scene)
    assert total == terms["heat"] == terms["box"] == 0
    assert terms["pivotal"] > 0


def test_heat_term_does_not_depend_on_the_scale_of_the_weights(case):
    student, teacher, scene = case

    # Half the objectness halves every weight, and every difference of heats: only the latter must show, squared.
    def halve(output):
        p = output.predictions
        return output._replace(predictions=p._replace(objectness=p.objectness / 2))

    full = distil(student, teacher, scene, clip=0.0)[1]["heat"]
    half = distil(halve(student), halve(teacher), scene, clip=0.0)[1]["heat"]
    np.testing.assert_allclose(4 * half, full, rtol=1e-4)


def test_threshold_of_one_leaves_nothing(case):
    student, teacher, scene = case
    _, terms = distil(student, teacher, scene, threshold=1.0)
    assert terms["heat"] == terms["pivotal"] == 0
    assert terms["box"] > 0


def test_object_heat_in_a_turned_box():
    boxes = Boxes(
        np.array([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]], np.float32),
        np.array([[2.0, 0.6, 1.0], [1.0, 1.0, 1.0]], np.float32),
        np.array([np.pi / 2, 0.0], np.float32),
        np.zeros(2, np.int32),
        np.array([True, False]),
        np.zeros((2, 3), np.float32),
    )
    center = boxes.center[0]
    points = np.stack([center, center + [0, 1, 0], center + [0.3, 0, 0], center + [0, 0, 0.5], [0, 0, 0]])
    heat = np.asarray(sparsekd.object_heat(points.astype(np.float32), boxes))
    np.testing.assert_allclose(heat[:4], [1, np.exp(-0.5), np.exp(-0.5), np.exp(-0.5)], rtol=1e-5)
    assert heat[4] < 1e-3  # the pad at the origin attracts nothing
    none = boxes._replace(mask=np.zeros(2, bool))
    assert not np.any(sparsekd.object_heat(points.astype(np.float32), none))


def test_best_proposals_after_suppression():
    def predictions(center):
        n = len(center)
        return Predictions(
            np.asarray(center, np.float32), np.ones((n, 3), np.float32), np.zeros(n, np.float32),
            np.zeros((n, 4), np.float32), np.ones(n, np.float32), np.arange(n) != 4,
        )  # fmt: skip

    p = predictions([[0, 0, 0], [0.1, 0, 0], [5, 0, 0], [9, 0, 0], [20, 0, 0]])
    score = np.array([0.9, 0.8, 0.3, 0.7, 1.0], np.float32)  # row 1 is suppressed by row 0, row 4 is a pad
    for count, want in ((0, []), (1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (9, [0, 2, 3])):
        got = np.flatnonzero(best_after_nms(p, score, count, 0.25))
        np.testing.assert_array_equal(got, want)


def test_top_k_restricts_the_pivotal_proposals(case):
    student, teacher, scene = case
    heat = sparsekd.class_heat(teacher.predictions).max(-1)
    keep = np.stack(
        [
            best_after_nms(jax.tree.map(lambda x, b=b: x[b], teacher.predictions), heat[b], 2, 0.25)
            for b in range(2)
        ]
    )
    assert (keep.sum(1) == 2).all()
    want = oracle.terms(student, teacher, scene, keep=keep)["heat"]
    np.testing.assert_allclose(distil(student, teacher, scene, top_k=2)[1]["heat"], 10 * want, rtol=1e-4)
    assert abs(want - oracle.terms(student, teacher, scene)["heat"]) > 1e-4


def test_order_of_proposals_does_not_matter(case):
    student, teacher, scene = case
    order = np.random.default_rng(0).permutation(20)
    permuted = distil(permute_proposals(student, order), permute_proposals(teacher, order), scene)[0]
    np.testing.assert_allclose(permuted, distil(student, teacher, scene)[0], rtol=1e-5)


def test_pads_do_not_matter(case):
    student, teacher, scene = case
    want = distil(student, teacher, scene)[0]
    boxes, pads = scene.boxes, ~scene.boxes.mask
    dirty = boxes._replace(
        center=np.where(pads[..., None], teacher.taps["clusters"].xyz[:, :1], boxes.center),
        size=np.where(pads[..., None], 0.0, boxes.size).astype(np.float32),
        label=np.where(pads, 2, boxes.label),
    )
    invalid = ~teacher.predictions.mask[..., None]

    def spoil(output, value):
        clusters = output.taps["clusters"]
        xyz = np.where(invalid, scene.boxes.center[:, :1], clusters.xyz).astype(np.float32)
        logits = np.where(invalid, value, output.predictions.class_logits).astype(np.float32)
        return output._replace(
            predictions=output.predictions._replace(class_logits=logits),
            taps=output.taps | {"clusters": clusters._replace(xyz=xyz)},
        )

    got = distil(spoil(student, [9, 0, 0, 0]), spoil(teacher, [0, 9, 0, 0]), scene._replace(boxes=dirty))[0]
    np.testing.assert_array_equal(got, want)
    masked = scene._replace(mask=np.array([True, False]))
    want = oracle.terms(student, teacher, masked)
    np.testing.assert_allclose(
        distil(student, teacher, masked)[0], 10 * want["heat"] + 0.2 * want["box"], rtol=1e-4
    )


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_gradients_are_finite_and_only_the_students(num_boxes):
    scene = make_scene(num_boxes=num_boxes)
    student, teacher = make_output(1, scene), make_output(2, scene)

    def put(output, head):
        predictions = predictions_from_head(head, output.predictions.mask, MEAN_SIZES)
        heading = jnp.concatenate([head.heading_logits, head.heading_residual], -1)
        return output._replace(predictions=predictions, head=output.head | {"heading": heading})

    def loss(s, t):
        return distil(put(student, s), put(teacher, t), scene)[0]

    to_student, to_teacher = jax.jit(jax.grad(loss, (0, 1)))(
        *(jax.tree.map(jnp.asarray, x.raw.head) for x in (student, teacher))
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(to_student))
    for name in ("class_logits", "objectness_logits", "center", "size_residual", "heading_residual"):
        assert np.any(getattr(to_student, name)) == (num_boxes > 0), name
    assert not any(np.any(x) for x in jax.tree.leaves(to_teacher))


def test_impossible_calls_say_what_is_wrong(case):
    student, teacher, scene = case
    config = sparsekd.default_config()
    with pytest.raises(ValueError, match="output at the teacher's clusters"):
        sparsekd.build(config, DETECTOR, DETECTOR).apply({}, student, teacher, scene)
    with pytest.raises(ValueError, match="train the student on the teacher's classes"):
        sparsekd.build(config, ConfigDict({"class_names": ("x",)}), DETECTOR)


def test_a_head_without_heading_bins_compares_yaws_up_to_half_a_turn(case):
    _, teacher, _ = case
    head = {name: group for name, group in teacher.head.items() if name != "heading"}
    teacher = teacher._replace(head=head)
    p = teacher.predictions
    turned = teacher._replace(predictions=p._replace(yaw=p.yaw + np.pi + 0.25, center=p.center + 0.5))
    np.testing.assert_allclose(sparsekd.box_gap(turned, teacher), 1.5 + 0.25, rtol=1e-4)
