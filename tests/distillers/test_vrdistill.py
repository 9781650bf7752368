import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import vrdistill as oracle
from vote_scenes import B, C, M, make_scene, make_votes, shaken

from vrdistill_jax.distillers import vrdistill
from vrdistill_jax.distillers.vote_refinement import VoteRefinement
from vrdistill_jax.structs import DetectorOutput, PointSet


def output_of(votes: PointSet) -> DetectorOutput:
    return DetectorOutput(None, {"clusters": votes, "votes": votes}, None)


def make(**changes):
    """The method as printed, but for `changes`."""
    config = vrdistill.default_config()
    config.target_features = "refined"
    config.update(changes)
    return vrdistill.build(config, None, None)


def apply(module, params, student, teacher, scene):
    return module.apply({"params": params}, output_of(student), output_of(teacher), scene, train=True)


def init(module, student, teacher, scene, key=0):
    return module.init(jax.random.key(key), output_of(student), output_of(teacher), scene, train=True).get(
        "params", {}
    )


# ---- Mask


def test_soft_mask_matches_the_oracle():
    for yaw, rotate in ((0.0, True), (0.7, True), (0.7, False)):
        scene, votes = make_scene(yaw=yaw), make_votes(3)
        got = vrdistill.foreground_mask(votes.xyz, scene.boxes, "soft", 0.5, rotate=rotate)
        for b in range(B):
            boxes = [np.asarray(field[b], np.float64) for field in scene.boxes]
            want = oracle.soft_mask(votes.xyz[b], *boxes[:3], scene.boxes.mask[b], 0.5, rotate)
            np.testing.assert_allclose(got[b], want, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_soft_mask_range_ray_translation_and_scale(sigma):
    scene = make_scene(counts=(1, 1))
    center, size = scene.boxes.center[:, :1], scene.boxes.size[:, :1]
    ray = center + np.linspace(0, 5, M)[None, :, None] * np.float32([0.6, -0.8, 0.3])
    weight = np.asarray(vrdistill.foreground_mask(ray, scene.boxes, "soft", sigma))
    np.testing.assert_allclose(weight[:, 0], 1 / sigma, rtol=1e-6)
    assert (weight > 0).all()
    assert (np.diff(weight) < 0).all()
    face = center + size * np.float32([0.5, 0, 0])
    np.testing.assert_allclose(
        vrdistill.foreground_mask(face, scene.boxes, "soft", sigma), 1 / (0.25 + sigma), rtol=1e-5
    )
    boxes = scene.boxes._replace(center=3 * scene.boxes.center + 1, size=3 * scene.boxes.size)
    np.testing.assert_allclose(
        vrdistill.foreground_mask(3 * ray + 1, boxes, "soft", sigma), weight, rtol=1e-3
    )
    normalized = vrdistill.foreground_mask(ray, scene.boxes, "soft", sigma, normalize=True)
    np.testing.assert_allclose(normalized, weight * sigma, rtol=1e-6)


def test_padded_boxes_do_not_count():
    scene = make_scene(counts=(2, 0))
    votes = scene.boxes.center  # among them the centres of the pads
    for kind in ("soft", "hard"):
        weight = np.asarray(vrdistill.foreground_mask(votes, scene.boxes, kind))
        np.testing.assert_array_equal(weight[1], 0)
        np.testing.assert_allclose(weight[0, :2], 1.0)
        assert (weight[0, 2:] < 1).all()
    np.testing.assert_array_equal(vrdistill.foreground_mask(votes, scene.boxes, "off"), 1)


# ---- Losses


def test_no_layers_equal_refine_off():
    scene, student, teacher = make_scene(), make_votes(1), make_votes(2)
    off, none = make(refine=False), make(layers=0)
    assert init(off, student, teacher, scene) == init(none, student, teacher, scene) == {}
    total, terms = apply(off, {}, student, teacher, scene)
    assert total == apply(none, {}, student, teacher, scene)[0]
    assert "ref" not in terms


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_match_the_oracle(reduction):
    scene = make_scene(yaw=0.4)
    student, teacher = make_votes(1, pads=2), make_votes(2, count=M - 4, pads=1)
    module = make(refine=True, layers=2, heads=2, reduction=reduction, eta=3.0, mu=7.0, weight=0.5)
    params = shaken(init(module, student, teacher, scene), scale=0.1)
    total, terms = apply(module, params, student, teacher, scene)
    refine = VoteRefinement(C, layers=2, heads=2)
    refined = jax.tree.map(np.asarray, refine.apply({"params": params["refinement"]}, teacher))
    sums, counts, distances, on_object = 0.0, 0, 0.0, 0
    for b in range(B):
        boxes = [field[b] for field in scene.boxes]
        weight = oracle.soft_mask(refined.xyz[b], *boxes[:3], scene.boxes.mask[b], 1.0)
        value, count = oracle.consistency(
            student.xyz[b],
            student.features[b],
            student.mask[b],
            refined.xyz[b],
            refined.features[b],
            refined.mask[b],
            weight,
        )
        sums, counts = sums + value, counts + count
        value, count = oracle.refinement(
            refined.xyz[b],
            refined.mask[b],
            refined.seed_index[b],
            scene.point_instance[b],
            scene.boxes.center[b],
        )
        distances, on_object = distances + value, on_object + count
    dis = sums / counts / C if reduction == "mean" else sums / B
    np.testing.assert_allclose(terms["dis"], dis, rtol=1e-4)
    np.testing.assert_allclose(terms["sum"], sums / B, rtol=1e-4)
    np.testing.assert_allclose(terms["ref"], distances / on_object, rtol=1e-4)
    np.testing.assert_allclose(total, 0.5 * (3 * dis + 7 * distances / on_object), rtol=1e-4)


def test_equal_networks_have_no_consistency_loss():
    scene, votes = make_scene(), make_votes(1)
    module = make(heads=2)
    params = init(module, votes, votes, scene)
    assert set(params) == {"refinement"}  # no alignment between equal channels
    assert apply(module, params, votes, votes, scene)[1]["dis"] == 0


def test_refinement_loss_is_zero_only_on_the_centers():
    scene = make_scene()
    votes = make_votes(0)
    rows = np.take_along_axis(scene.point_instance[..., 0], votes.seed_index, 1)
    on_center = np.take_along_axis(scene.boxes.center, np.maximum(rows, 0)[..., None], 1)
    votes = votes._replace(xyz=on_center)
    assert vrdistill.refinement_loss(votes, scene) == 0
    elsewhere = np.where((rows < 0)[..., None], 50.0, on_center)
    assert vrdistill.refinement_loss(votes._replace(xyz=elsewhere), scene) == 0
    off = on_center.copy()
    first = np.argwhere(rows[0] > 0)[0, 0]  # a seed of no other box
    off[0, first] += [0.3, 0, 0.4]
    count = (rows >= 0).sum()
    seeds = scene.point_instance[0, votes.seed_index[0, first]]
    assert vrdistill.refinement_loss(votes._replace(xyz=off), scene) > 0
    if seeds[1] < 0:
        np.testing.assert_allclose(
            vrdistill.refinement_loss(votes._replace(xyz=off), scene), 0.5 / count, rtol=1e-4
        )
    aim = vrdistill.refinement_loss(votes, scene, "vote_center")
    np.testing.assert_allclose(aim, np.sqrt(0.03), rtol=1e-3)


def test_loss_is_invariant_to_separate_permutations():
    scene, student, teacher = make_scene(), make_votes(1, size=4), make_votes(2)
    module = make(heads=2, layers=1)
    params = shaken(init(module, student, teacher, scene), scale=0.1)
    total, _ = apply(module, params, student, teacher, scene)
    rng = np.random.default_rng(0)
    shuffled = []
    for votes in (student, teacher):
        order = rng.permutation(M)
        shuffled.append(PointSet(*(field[:, order] for field in votes)))
    np.testing.assert_allclose(apply(module, params, *shuffled, scene)[0], total, rtol=1e-5)


def test_padded_scenes_do_not_count():
    scene, student, teacher = make_scene(), make_votes(1), make_votes(2)
    module = make(refine=False, mask="off")
    alone, _ = apply(module, {}, student, teacher, scene._replace(mask=np.array([True, False])))
    other = student._replace(features=student.features * np.float32([[[1.0]], [[9.0]]]))
    again, _ = apply(module, {}, other, teacher, scene._replace(mask=np.array([True, False])))
    assert alone == again
    assert apply(module, {}, other, teacher, scene)[0] > alone


# ---- Gradients


def gradients(student, teacher, scene, params=None, **changes):
    """Gradients with respect to the student's features and coordinates, the teacher's features, and the parameters."""
    module = make(heads=2, layers=2, **changes)
    params = shaken(init(module, student, teacher, scene), scale=0.1) if params is None else params

    def loss(features, xyz, teacher_features, params):
        votes = student._replace(features=features, xyz=xyz)
        return apply(module, params, votes, teacher._replace(features=teacher_features), scene)[0]

    return jax.grad(loss, argnums=(0, 1, 2, 3))(student.features, student.xyz, teacher.features, params)


def test_where_gradients_go():
    scene, student, teacher = make_scene(), make_votes(1, size=4), make_votes(2)
    features, xyz, teacher_features, params = gradients(student, teacher, scene, mu=0.0)
    assert np.abs(features).max() > 0
    np.testing.assert_array_equal(xyz, 0)
    np.testing.assert_array_equal(teacher_features, 0)
    assert np.abs(params["align"]["kernel"]).max() > 0
    refinement = params["refinement"]
    for name, leaf in refinement.items():
        moves = name.startswith("offset")
        size = max(float(np.abs(x).max()) for x in jax.tree.leaves(leaf))
        assert (size == 0) == moves, name

    *_, params = gradients(student, teacher, scene, mu=0.0, dis_detach_target=True)
    assert all(not np.any(x) for x in jax.tree.leaves(params["refinement"]))
    *_, params = gradients(student, teacher, scene, mu=0.0, stop_mask_gradient=False)
    assert np.abs(params["refinement"]["offset_out1"]["kernel"]).max() > 0
    *_, params = gradients(student, teacher, scene, mu=0.0, stop_bias_gradient=False)
    assert np.abs(params["refinement"]["offset_out0"]["kernel"]).max() > 0
    _, xyz, *_ = gradients(student, teacher, scene, mu=0.0, coordinate_weight=1.0)
    assert np.abs(xyz).max() > 0
    *_, params = gradients(student, teacher, scene, eta=0.0)
    assert np.abs(params["refinement"]["offset_out1"]["kernel"]).max() > 0
    np.testing.assert_array_equal(params["align"]["kernel"], 0)


def test_clusters_at_the_teachers_seeds():
    """The loss is of the aligned output, whatever the student's own clusters are."""
    student, aligned, teacher, scene = make_votes(1), make_votes(2), make_votes(3), make_scene()
    plain, module = make(), make(same_clusters=True)
    params = init(plain, aligned, teacher, scene)
    expected = apply(plain, params, aligned, teacher, scene)
    outputs = output_of(student), output_of(teacher)
    found = module.apply({"params": params}, *outputs, scene, aligned=output_of(aligned))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert module.needs_aligned
    assert not plain.needs_aligned
    with pytest.raises(
        ValueError, match="same_clusters needs the student's output at the teacher's clusters"
    ):
        module.apply({"params": params}, *outputs, scene)


def test_the_teachers_own_features_as_the_target():
    """Positions are the refined ones, features the teacher's; L_dis then has nothing to change in the refinement."""
    assert vrdistill.default_config().target_features == "initial"
    scene, student, teacher = make_scene(), make_votes(1), make_votes(2)
    module = make(heads=2, layers=1, target_features="initial")
    params = shaken(init(module, student, teacher, scene), scale=0.1)
    refined = vrdistill.refine_votes(module, params, output_of(teacher))[1]
    assert np.abs(refined.features - teacher.features).max() > 0.01
    _, terms = apply(module, params, refined._replace(features=teacher.features), teacher, scene)
    assert terms["dis"] == 0
    *_, grads = gradients(student, teacher, scene, mu=0.0, target_features="initial")
    assert all(not np.any(x) for x in jax.tree.leaves(grads["refinement"]))


def test_the_teachers_head_trains_the_refinement_only():
    scene, student, teacher = make_scene(), make_votes(1), make_votes(2)
    module = make(heads=2, layers=1, eta=0.0, mu=0.0, head_weight=3.0)
    assert module.needs_judge
    assert not make().needs_judge
    assert not make(refine=False, head_weight=1.0).needs_judge
    params = shaken(init(module, student, teacher, scene), scale=0.1)

    def loss(params, features):
        votes = student._replace(features=features)
        outputs = output_of(votes), output_of(teacher)
        return module.apply({"params": params}, *outputs, scene, judge=lambda v: jnp.sum(v.features**2))

    refined = vrdistill.refine_votes(module, params, output_of(teacher))[1]
    total, terms = loss(params, student.features)
    np.testing.assert_allclose(total, 3 * np.sum(refined.features**2), rtol=1e-5)
    np.testing.assert_allclose(terms["head"], total / 3, rtol=1e-6)
    of_params, of_student = jax.grad(lambda *x: loss(*x)[0], argnums=(0, 1))(params, student.features)
    assert np.abs(of_params["refinement"]["ffn_out0"]["kernel"]).max() > 0
    np.testing.assert_array_equal(of_student, 0)
    assert "head" not in apply(module, params, student, teacher, scene)[1]


@pytest.mark.parametrize("stop", [True, False])
def test_everything_is_finite_with_coincident_votes_no_boxes_and_no_votes(stop):
    coincident = make_votes(1, size=4)._replace(xyz=np.zeros((B, M, 3), np.float32))
    at_center = make_votes(2)._replace(xyz=np.zeros((B, M, 3), np.float32))
    nobody = at_center._replace(mask=np.zeros((B, M), bool))
    settings = dict(stop_bias_gradient=stop, stop_mask_gradient=stop, coordinate_weight=1.0)
    scene = make_scene()
    scene = scene._replace(boxes=scene.boxes._replace(center=np.zeros_like(scene.boxes.center)))
    for teacher in (at_center, nobody):
        for labels in (scene, make_scene(counts=(0, 0)), scene._replace(mask=np.zeros(B, bool))):
            module = make(heads=2, layers=2, **settings)
            # Untrained: refined votes lie exactly on their centres, where a plain norm has no gradient.
            params = init(module, coincident, teacher, labels)
            total, terms = apply(module, params, coincident, teacher, labels)
            assert np.isfinite(total)
            assert all(np.isfinite(x) for x in terms.values())
            for leaf in jax.tree.leaves(gradients(coincident, teacher, labels, params, **settings)):
                assert np.isfinite(leaf).all()


def test_refinement_learns_to_move_votes_on_unseen_scenes():
    """Figure 1's claim, where features tell the way: refined votes end nearer to the centres than the teacher's."""
    rng = np.random.default_rng(0)
    code = rng.normal(size=(3, C)).astype(np.float32)

    def sample(seed):
        scene, votes = make_scene(seed), make_votes(seed + 1000)
        rows = np.take_along_axis(scene.point_instance[..., 0], votes.seed_index, 1)
        center = np.take_along_axis(scene.boxes.center, np.maximum(rows, 0)[..., None], 1)
        offset = np.random.default_rng(seed).normal(scale=0.3, size=(B, M, 3)).astype(np.float32)
        votes = votes._replace(xyz=center + offset, features=offset @ code)
        return votes, scene._replace(point_instance=scene.point_instance[..., :1])

    def stack(seeds):
        return jax.tree.map(lambda *x: jnp.stack(x), *[sample(s) for s in seeds])

    module = VoteRefinement(C, layers=1, heads=2)
    votes, scenes = stack(range(16))
    params = module.init(jax.random.key(0), jax.tree.map(lambda x: x[0], votes))
    optimizer = optax.adam(1e-2)

    def loss(params, batch):
        return vrdistill.refinement_loss(module.apply(params, batch[0]), batch[1])

    @jax.jit
    def train(params):
        def step(carry, n):
            params, state = carry
            batch = jax.tree.map(lambda x: x[n % 16], (votes, scenes))
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(300))[0][0]

    params = train(params)
    unseen = [sample(seed) for seed in range(100, 104)]
    before = np.mean([vrdistill.refinement_loss(*batch) for batch in unseen])
    after = np.mean([loss(params, batch) for batch in unseen])
    assert after < 0.6 * before, (before, after)


# ---- Configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vote_level="seed"), "vote_level is 'seed'; expected one of cluster, sampled_vote, vote"),
        (dict(mask="none"), "mask is 'none'"),
        (dict(bias_sign=2), "bias_sign is 2"),
        (dict(sigma=0.0), "sigma is 0.0; expected > 0"),
        (dict(neighbors=0), "neighbors is 0"),
        (dict(cross_query="other"), "cross_query"),
        (dict(ref_target="seed"), "ref_target"),
        (dict(reduction="max"), "reduction"),
        (dict(target_features="votes"), "target_features"),
        (dict(head_weight=1.0, vote_level="vote"), "head reads clusters"),
        (dict(same_clusters=True, vote_level="vote"), "vote_level is vote and reads no clusters"),
    ],
)
def test_bad_knobs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_heads_must_divide_channels_and_labels_must_be_there():
    scene, votes = make_scene(), make_votes(1)
    with pytest.raises(ValueError, match="8 channels do not divide into 3 heads"):
        init(make(heads=3), votes, votes, scene)
    with pytest.raises(ValueError, match="this scene has no labels"):
        init(make(), votes, votes, scene._replace(boxes=None))


def test_vote_levels_read_their_tap():
    clusters, votes = make_votes(1), make_votes(2, size=2 * C)
    raw = type("Raw", (), {"cluster_index": np.array([[3, 1], [0, 9]])})
    output = DetectorOutput(None, {"clusters": clusters, "votes": votes}, raw)
    assert vrdistill.select_votes(output, "cluster") is clusters
    assert vrdistill.select_votes(output, "vote") is votes
    sampled = vrdistill.select_votes(output, "sampled_vote")
    np.testing.assert_array_equal(sampled.features[1, 1], votes.features[1, 9])
    with pytest.raises(ValueError, match="reads the tap 'votes'"):
        vrdistill.select_votes(DetectorOutput(None, {"clusters": clusters}, raw), "vote")


def test_a_vote_without_a_seed_is_on_the_objects_whose_boxes_hold_its_start():
    scene = make_scene(counts=(2, 1))
    start = np.stack([scene.boxes.center[:, 0], scene.boxes.center[:, 0] + 50], 1).astype(np.float32)
    moved = start + np.float32([0.3, 0, 0.4])
    votes = PointSet(moved, np.zeros((B, 2, 4), np.float32), np.ones((B, 2), bool), None)
    distance, on_object = vrdistill.center_distances(votes, scene, seed_xyz=start)
    np.testing.assert_array_equal(on_object, [[True, False]] * B)
    nearest = np.linalg.norm(moved[:, 0, None] - scene.boxes.center, axis=-1)
    assert np.asarray(distance)[1, 0] == pytest.approx(nearest[1, 0], abs=1e-6)
    assert np.asarray(distance)[0, 0] <= nearest[0, 0] + 1e-6
    # Points of the cloud are not asked for.
    loss = vrdistill.refinement_loss(votes, scene._replace(point_instance=None), seed_xyz=start)
    np.testing.assert_allclose(loss, np.asarray(distance)[:, 0].mean(), rtol=1e-5)
