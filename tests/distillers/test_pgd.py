from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import pgd as oracle
from proposal_outputs import make_output, make_scene, mask_proposals, permute_proposals, replace_proposals

from vrdistill_jax.distillers import pgd

CONFIG = pgd.default_config()
gaussian_weights = jax.jit(pgd.gaussian_weights, static_argnums=3)
teacher_scores = jax.jit(pgd.teacher_scores)


def distil(student, teacher, scene, params=None, **changes):
    config = pgd.default_config()
    config.update(changes)
    return run(pgd.build(config, None, None), params or {}, student, teacher, scene)


@partial(jax.jit, static_argnums=0)
def run(module, params, student, teacher, scene):
    return module.apply({"params": params}, student, teacher, scene, aligned=student)


def random_candidates(seed, queries=30, objects=3):
    rng = np.random.default_rng(seed)
    quality = rng.random((queries, objects)).astype(np.float32)
    xyz = rng.normal(size=(queries, 3)).astype(np.float32)
    in_box = rng.random((queries, objects)) < 0.8
    return quality, xyz, in_box


@pytest.mark.parametrize("seed", range(4))
def test_weights_equal_the_oracle(seed):
    quality, xyz, in_box = random_candidates(seed)
    quality[quality < 0.3] = 0.0
    quality[5:, 2] = 0.0  # fewer candidates than K
    got = np.asarray(gaussian_weights(quality, xyz, in_box, 9, 0.05))
    want = oracle.gaussian_weights(quality.astype(float), xyz.astype(float), in_box, 9, 0.05)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert 0 < (got > 0).sum() <= 9 * 3
    assert (got >= 0).all()
    assert (got <= 1).all()
    assert not got[~in_box.any(1)].any()


def test_one_candidate_weighs_one_and_four_are_degenerate():
    quality, xyz, in_box = random_candidates(0, objects=1)
    everywhere = np.ones_like(in_box)
    one = np.asarray(gaussian_weights(quality, xyz, everywhere, 1, 0.05))
    assert one[np.argmax(quality[:, 0])] == 1.0
    assert (one > 0).sum() == 1
    four = np.asarray(gaussian_weights(quality, xyz, everywhere, 4, 1e-3))
    np.testing.assert_allclose(four[four > 0], np.exp(-1.5), rtol=2e-3)


def test_weights_do_not_change_under_affine_maps_without_the_regulariser():
    quality, xyz, in_box = random_candidates(1)
    affine = np.array([[1.3, 0.4, 0.0], [-0.2, 0.9, 0.3], [0.1, 0.0, 1.6]], np.float32)
    a = gaussian_weights(quality, xyz, in_box, 12, 1e-5)
    b = gaussian_weights(quality, xyz @ affine + 2.0, in_box, 12, 1e-5)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_more_candidates_than_proposals_are_all_of_them():
    quality, xyz, in_box = random_candidates(2, queries=5)
    np.testing.assert_array_equal(
        gaussian_weights(quality, xyz, in_box, 9, 0.05),
        gaussian_weights(quality, xyz, in_box, 5, 0.05),
    )


def test_a_better_score_only_moves_a_proposal_into_the_candidates():
    quality, xyz, in_box = random_candidates(3, objects=1)
    everywhere = np.ones_like(in_box)
    before = np.asarray(gaussian_weights(quality, xyz, everywhere, 9, 0.05)) > 0
    for row in range(len(quality)):
        raised = quality.copy()
        raised[row] += 0.5
        after = np.asarray(gaussian_weights(raised, xyz, everywhere, 9, 0.05)) > 0
        assert after[row] >= before[row]
        assert after.sum() == 9


@pytest.fixture(scope="module")
def case():
    scene = make_scene()
    return make_output(1, scene), mask_proposals(make_output(2, scene), 3), scene


def test_scores_and_iou_are_those_of_the_objects(case):
    _, teacher, scene = case
    score, iou = (np.asarray(x) for x in teacher_scores(teacher, scene.boxes))
    p = teacher.predictions
    probability = np.asarray(p.objectness)[..., None] * oracle.softmax(np.asarray(p.class_logits))
    for b in range(2):
        for g in range(3):
            np.testing.assert_allclose(score[b, :, g], probability[b, :, scene.boxes.label[b, g]], rtol=1e-5)
    # By counting points of a fine grid over the object.
    rng = np.random.default_rng(0)
    for b, g in ((0, 0), (1, 2)):
        i = int(iou[b, :, g].argmax())
        assert iou[b, i, g] > 0.1
        low, high = scene.boxes.center[b, g] - 1.5, scene.boxes.center[b, g] + 1.5
        points = rng.uniform(low, high, (20000, 3))
        box = np.asarray(p.center[b, i]), np.asarray(p.size[b, i]), float(p.yaw[b, i])
        object_box = scene.boxes.center[b, g], scene.boxes.size[b, g], scene.boxes.yaw[b, g]
        in_a = np.array([oracle.inside(x, *box) for x in points])
        in_b = np.array([oracle.inside(x, *object_box) for x in points])
        np.testing.assert_allclose(iou[b, i, g], (in_a & in_b).sum() / (in_a | in_b).sum(), atol=0.04)


def oracle_terms(student, teacher, scene, config, features=None):
    """All terms, from the outputs; mean over the valid scenes."""
    score, iou = (np.asarray(x, float) for x in teacher_scores(teacher, scene.boxes))
    boxes, xyz = scene.boxes, np.asarray(teacher.taps["clusters"].xyz, float)
    features = np.asarray(student.taps["proposals"].features if features is None else features, float)
    found = []
    for b in np.flatnonzero(scene.mask):
        objects = np.flatnonzero(boxes.mask[b])
        mask = np.asarray(teacher.predictions.mask[b])
        in_box = np.array(
            [
                [oracle.inside(x, boxes.center[b, g], boxes.size[b, g], boxes.yaw[b, g]) for g in objects]
                for x in xyz[b]
            ]
        ).reshape(len(mask), len(objects))

        def weights(share, b=b, objects=objects, mask=mask, in_box=in_box):
            quality = score[b][:, objects] ** (1 - share) * iou[b][:, objects] ** share * mask[:, None]
            return oracle.gaussian_weights(
                quality, xyz[b], in_box, config["num_candidates"], config["spread"]
            )

        found.append(
            oracle.scene_terms(
                features[b],
                np.asarray(teacher.taps["proposals"].features[b], float),
                mask,
                weights(config["feature_iou_share"]),
                weights(config["box_iou_share"]),
                ~in_box.any(1),
                config,
            )
        )
    return {name: np.mean([terms[name] for terms in found]) for name in found[0]}


@pytest.mark.parametrize(
    "changes", [{}, {"feature_iou_share": 0.0, "box_iou_share": 1.0, "temperature": 0.4}]
)
@pytest.mark.parametrize("num_boxes", [0, 3])
def test_terms_equal_the_oracle(changes, num_boxes):
    scene = make_scene(num_boxes=num_boxes)
    student, teacher = make_output(1, scene), mask_proposals(make_output(2, scene), 3)
    total, terms = distil(student, teacher, scene, **changes)
    want = oracle_terms(student, teacher, scene, dict(CONFIG.to_dict()) | changes)
    assert set(terms) == set(want)
    for name, value in terms.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(total, sum(want.values()), rtol=1e-4)
    positive = ("background", "attention") if num_boxes == 0 else want
    assert all(want[name] > 0 for name in positive)
    if num_boxes == 0:
        assert terms["foreground"] == terms["box"] == terms["box_attention"] == 0


def test_equal_networks_have_no_loss(case):
    _, teacher, scene = case
    total, terms = distil(teacher, teacher, scene)
    assert total < 1e-7  # the compiler may fuse the two sides' softmaxes differently
    assert all(value < 1e-7 for value in terms.values())


def test_attentions_sum_to_rows_and_channels():
    rng = np.random.default_rng(0)
    mask = np.arange(6) < np.array([[4], [0]])
    spatial, channel = pgd.attentions(jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32), mask, 0.8)
    np.testing.assert_allclose(np.sum(spatial, 1), [4, 0], rtol=1e-6)
    np.testing.assert_allclose(np.sum(channel, 2), 5, rtol=1e-6)


def test_narrow_student_is_aligned_by_a_linear_layer(case):
    _, teacher, scene = case
    student = make_output(5, scene, size=4)
    module = pgd.build(CONFIG, None, None)
    params = jax.jit(module.init)(jax.random.key(0), student, teacher, scene, aligned=student)["params"]
    assert jax.tree.map(jnp.shape, params) == {"align": {"kernel": (4, 8), "bias": (8,)}}
    total, _ = distil(student, teacher, scene, params)
    hint = student.taps["proposals"].features @ params["align"]["kernel"] + params["align"]["bias"]
    want = oracle_terms(student, teacher, scene, CONFIG.to_dict(), hint)
    np.testing.assert_allclose(total, sum(want.values()), rtol=1e-4)


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
        center=np.where(pads[..., None], boxes.center[:, :1], boxes.center),
        size=np.where(pads[..., None], 3.0, boxes.size).astype(np.float32),
        label=np.where(pads, 2, boxes.label),
    )
    garbage = np.where(teacher.predictions.mask[..., None], 0, 50).astype(np.float32)

    def spoil(output):
        return replace_proposals(output, output.taps["proposals"].features + garbage)

    got = distil(spoil(student), spoil(teacher), scene._replace(boxes=dirty))[0]
    np.testing.assert_array_equal(got, want)
    masked = scene._replace(mask=np.array([True, False]))
    scale = np.array([1, 7])[:, None, None]
    other = replace_proposals(student, student.taps["proposals"].features * scale)
    np.testing.assert_array_equal(distil(other, teacher, masked)[0], distil(student, teacher, masked)[0])


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_gradients_are_finite_and_only_the_students(num_boxes):
    scene = make_scene(num_boxes=num_boxes)
    student, teacher = make_output(1, scene), make_output(2, scene)

    def loss(student_features, teacher_features):
        s = replace_proposals(student, student_features)
        t = replace_proposals(teacher, teacher_features)
        return distil(s, t, scene)[0]

    to_student, to_teacher = jax.jit(jax.grad(loss, (0, 1)))(
        *(jnp.asarray(x.taps["proposals"].features) for x in (student, teacher))
    )
    assert np.isfinite(to_student).all()
    assert np.abs(to_student).max() > 0
    assert not np.any(to_teacher)


def test_impossible_calls_say_what_is_wrong(case):
    student, teacher, scene = case
    with pytest.raises(ValueError, match="output at the teacher's clusters"):
        pgd.build(CONFIG, None, None).apply({}, student, teacher, scene)
    for key, value in (("spread", 0.0), ("num_candidates", 0)):
        config = pgd.default_config()
        config[key] = value
        with pytest.raises(ValueError, match=f"{key} is 0"):
            pgd.build(config, None, None)
