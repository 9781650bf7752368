import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import fgd as oracle

from vrdistill_jax.distillers import fgd
from vrdistill_jax.structs import Boxes, DetectorOutput, Points, PointSet, Scene

B, M, C, G = 2, 20, 8, 3
TERMS = ("foreground", "background", "spatial_attention", "channel_attention", "context")


def make_outputs(student_size=4, teacher_size=C, key=0):
    rng = np.random.default_rng(key)
    xyz = rng.uniform(-1, 1, (B, M, 3)).astype(np.float32)
    index = np.tile(np.arange(M, dtype=np.int32), (B, 1))

    def output(size):
        features = np.abs(rng.normal(size=(B, M, size))).astype(np.float32)
        return DetectorOutput(None, {"seeds": PointSet(xyz, features, np.ones((B, M), bool), index)}, None)

    return output(student_size), output(teacher_size)


def box_rows():
    """Two overlapping boxes, one of them turned, in the first scene; one in the second."""
    first = [[-0.4, 0, 0, 1.2, 1.5, 2, 0.5], [0.1, 0.2, 0, 1.0, 1.0, 1.2, 0.0]]
    return [np.array(first), np.array([[0.3, -0.2, 0.1, 1.3, 1.0, 1.5, -2.0]])]


def make_scene(rows=None, mask=(True,) * B):
    center, size, yaw = np.zeros((B, G, 3)), np.ones((B, G, 3)), np.zeros((B, G))
    box_mask = np.zeros((B, G), bool)
    for b, scene_rows in enumerate(box_rows() if rows is None else rows):
        count = len(scene_rows)
        scene_rows = np.reshape(scene_rows, (count, 7))
        center[b, :count], size[b, :count] = scene_rows[:, :3], scene_rows[:, 3:6]
        yaw[b, :count], box_mask[b, :count] = scene_rows[:, 6], True
    center, size, yaw = (x.astype(np.float32) for x in (center, size, yaw))
    boxes = Boxes(center, size, yaw, np.where(box_mask, 0, -1).astype(np.int32), box_mask, center)
    points = Points(np.zeros((B, 1, 3), np.float32), np.zeros((B, 1, 0), np.float32), np.ones((B, 1), bool))
    return Scene(points, boxes, None, None, None, np.array(mask))


def with_taps(output, **fields):
    return output._replace(taps={"seeds": output.taps["seeds"]._replace(**fields)})


def make_module(**changes):
    config = fgd.default_config()
    config.update(changes)
    return fgd.build(config, None, None)


def make_variables(module, student, teacher, scene, random=True):
    """Initial variables; `random` moves the layers that start at zero, so that the context blocks do something."""
    variables = module.init(jax.random.key(0), student, teacher, scene)
    if not random:
        return variables
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), variables)


def unweighted(module, terms):
    return {name: terms[name] / getattr(module, name) for name in TERMS}


def expected_terms(student, teacher, variables, rows, points=slice(None), scenes=range(B), temperature=0.5):
    """Mean over scenes of the oracle's terms."""
    params = jax.tree.map(np.float64, variables["params"])
    s, t = student.taps["seeds"], teacher.taps["seeds"]
    results = [
        oracle.fgd(
            np.float64(s.features[b][points]),
            np.float64(t.features[b][points]),
            np.float64(t.xyz[b][points]),
            rows[b],
            params,
            temperature,
        )
        for b in scenes
    ]
    return {name: np.mean([result[name] for result in results]) for name in TERMS}


@pytest.mark.parametrize("student_size", [4, C])
@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_matches_the_oracle(student_size, temperature):
    student, teacher = make_outputs(student_size)
    module, scene = make_module(temperature=temperature), make_scene()
    variables = make_variables(module, student, teacher, scene)
    assert ("align" in variables["params"]) == (student_size != C)
    total, terms = module.apply(variables, student, teacher, scene, aligned=None, train=True)
    expected = expected_terms(student, teacher, variables, box_rows(), temperature=temperature)
    assert min(expected.values()) > 0
    got = unweighted(module, terms)
    for name in TERMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(total, sum(terms.values()), rtol=1e-6)


def test_start_values_carry_over_and_parameters_are_the_papers():
    config = fgd.default_config()
    assert (config.temperature, config.foreground, config.background) == (0.5, 1e-2, 5e-3)
    assert (config.spatial_attention, config.channel_attention, config.context) == (0.1, 5e-3, 1e-3)
    student, teacher = make_outputs(128, 256)
    module = make_module()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), student, teacher, make_scene()))
    sizes = {name: sum(x.size for x in jax.tree.leaves(p)) for name, p in shapes["params"].items()}
    assert sizes == {"align": 33024, "student_context": 257 + 66176, "teacher_context": 257 + 66176}


def test_identical_networks_have_no_loss_at_the_start():
    _, teacher = make_outputs()
    module, scene = make_module(), make_scene()
    variables = make_variables(module, teacher, teacher, scene, random=False)
    kernels = [
        variables["params"][f"{side}_context"]["attention"]["kernel"] for side in ("student", "teacher")
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 0  # separate blocks, yet both are the identity
    total, terms = module.apply(variables, teacher, teacher, scene)
    assert total == 0.0
    assert all(value == 0.0 for value in terms.values())


def test_equal_context_blocks_of_identical_networks_have_no_loss():
    _, teacher = make_outputs()
    module, scene = make_module(), make_scene()
    params = make_variables(module, teacher, teacher, scene)["params"]
    assert module.apply({"params": params}, teacher, teacher, scene)[1]["context"] > 0
    same = {"student_context": params["teacher_context"], "teacher_context": params["teacher_context"]}
    assert module.apply({"params": same}, teacher, teacher, scene)[0] == 0.0


def test_attentions_sum_to_their_numbers_and_skip_pads():
    features = np.abs(np.random.default_rng(0).normal(size=(2, M, C))).astype(np.float32)
    mask = np.ones((2, M), bool)
    mask[1, 7:] = False
    features[1, 7:] = 50.0
    spatial = np.asarray(fgd.spatial_attention(features, mask, 0.5))
    np.testing.assert_allclose(spatial.sum(1), [M, 7], rtol=1e-5)
    assert (spatial[1, 7:] == 0).all()
    channel = np.asarray(fgd.channel_attention(features, mask, 0.5))
    np.testing.assert_allclose(channel.sum(1), [C, C], rtol=1e-5)
    np.testing.assert_allclose(channel[1], oracle.attentions(np.float64(features[1, :7]), 0.5)[1], rtol=1e-5)
    nothing = fgd.spatial_attention(features, np.zeros((2, M), bool), 0.5)
    np.testing.assert_array_equal(nothing, 0)


def test_constant_teacher_makes_the_feature_terms_plain_weighted_errors():
    student, teacher = make_outputs(C)
    teacher = with_taps(teacher, features=np.full((B, M, C), 0.7, np.float32))
    module, scene = make_module(), make_scene()
    variables = make_variables(module, student, teacher, scene)
    got = unweighted(module, module.apply(variables, student, teacher, scene)[1])
    error = ((np.float64(student.taps["seeds"].features) - 0.7) ** 2).sum(-1)
    xyz = np.float64(teacher.taps["seeds"].xyz)
    weights = [oracle.region_weights(oracle.inside_boxes(xyz[b], box_rows()[b])) for b in range(B)]
    for k, name in enumerate(("foreground", "background")):
        expected = np.mean([(weights[b][k] * error[b]).sum() for b in range(B)])
        np.testing.assert_allclose(got[name], expected, rtol=1e-5)


def test_joint_permutation_changes_nothing():
    student, teacher = make_outputs()
    module, scene = make_module(), make_scene()
    variables = make_variables(module, student, teacher, scene)
    order = np.random.default_rng(3).permutation(M)
    shuffled = jax.tree.map(lambda x: x[:, order], (student, teacher))
    got, expected = (module.apply(variables, *pair, scene)[1] for pair in (shuffled, (student, teacher)))
    for name in TERMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)


def test_scene_without_boxes_and_scene_full_of_box():
    student, teacher = make_outputs()
    module = make_module()
    everywhere = np.array([[0, 0, 0, 9, 9, 9, 0.3]])
    scene = make_scene([np.zeros((0, 7)), everywhere])
    variables = make_variables(module, student, teacher, scene)

    def loss(variables, features, mask):
        return module.apply(
            variables, with_taps(student, features=features), teacher, scene._replace(mask=mask)
        )

    for b, absent in ((0, "foreground"), (1, "background")):
        arguments = variables, student.taps["seeds"].features, np.arange(B) == b
        (total, terms), gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(*arguments)
        assert np.isfinite(total)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert terms[absent] == 0.0
        present = {"foreground": "background", "background": "foreground"}[absent]
        expected = expected_terms(student, teacher, variables, [np.zeros((0, 7)), everywhere], scenes=[b])
        np.testing.assert_allclose(terms[present] / getattr(module, present), expected[present], rtol=2e-5)


def test_gradients():
    student, teacher = make_outputs()
    module, scene = make_module(), make_scene()
    variables = make_variables(module, student, teacher, scene)

    def loss(variables, s, t):
        return module.apply(variables, with_taps(student, features=s), with_taps(teacher, features=t), scene)[
            0
        ]

    features = student.taps["seeds"].features, teacher.taps["seeds"].features
    to_params, to_student, to_teacher = jax.grad(loss, (0, 1, 2))(variables, *features)
    assert (np.asarray(to_teacher) == 0).all()
    assert (np.abs(to_student).max(-1) > 0).all()
    for side in ("student_context", "teacher_context"):
        for layer in ("attention", "reduce", "expand"):
            assert np.abs(to_params["params"][side][layer]["kernel"]).max() > 0, (side, layer)


def test_pads_and_padded_scenes_are_ignored_even_nan():
    student, teacher = make_outputs()
    valid = 12
    mask = np.zeros((B, M), bool)
    mask[:, :valid] = True
    module, scene = make_module(), make_scene(mask=(True, False))
    variables = make_variables(module, student, teacher, scene)
    expected = expected_terms(student, teacher, variables, box_rows(), points=np.arange(valid), scenes=[0])

    def poison(array):
        array = array.copy()
        array[:, valid:], array[1] = np.nan, np.nan
        return array

    dirty = with_taps(
        teacher,
        features=poison(teacher.taps["seeds"].features),
        xyz=poison(teacher.taps["seeds"].xyz),
        mask=mask,
    )

    def loss(variables, features):
        return module.apply(variables, with_taps(student, features=features, mask=mask), dirty, scene)

    arguments = variables, poison(student.taps["seeds"].features)
    (_, terms), gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(*arguments)
    for name in TERMS:
        np.testing.assert_allclose(terms[name] / getattr(module, name), expected[name], rtol=2e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    nothing = module.apply(variables, student, teacher, scene._replace(mask=np.zeros(B, bool)))[0]
    assert nothing == 0.0


def test_region_and_margin_reach_the_weights():
    student, teacher = make_outputs()
    scene = make_scene()
    instance = np.full((B, M, 1), -1, np.int32)
    instance[:, :5] = 0
    scene = scene._replace(point_instance=instance)
    variables = make_variables(make_module(), student, teacher, scene)

    def foreground(**changes):
        return float(make_module(**changes).apply(variables, student, teacher, scene)[1]["foreground"])

    values = [foreground(), foreground(margin=0.3), foreground(region="instances")]
    assert len({round(value, 6) for value in values}) == 3
    wider = [np.concatenate([r[:, :3], r[:, 3:6] + 0.6, r[:, 6:]], 1) for r in box_rows()]
    expected = expected_terms(student, teacher, variables, wider)
    np.testing.assert_allclose(values[1] / make_module().foreground, expected["foreground"], rtol=2e-5)


def test_mean_over_devices_equals_the_whole_batch():
    student, teacher = make_outputs()
    module, scene = make_module(), make_scene()
    parallel = module.clone(axis_name="devices")
    variables = make_variables(module, student, teacher, scene)
    whole = module.apply(variables, student, teacher, scene)[1]

    def share(s, t, boxes, mask):
        s, t, boxes, mask = jax.tree.map(lambda x: x[None], (s, t, boxes, mask))
        terms = parallel.apply(variables, s, t, scene._replace(boxes=boxes, mask=mask))[1]
        return jax.lax.pmean(terms, "devices")

    mapped = jax.vmap(share, axis_name="devices")(student, teacher, scene.boxes, scene.mask)
    for name in TERMS:
        np.testing.assert_allclose(mapped[name], whole[name], rtol=1e-5)


def test_weight_multiplies_everything():
    student, teacher = make_outputs()
    module, scene = make_module(), make_scene()
    variables = make_variables(module, student, teacher, scene)
    one, two = (make_module(weight=w).apply(variables, student, teacher, scene) for w in (1.0, 2.0))
    np.testing.assert_allclose(two[0], 2 * one[0], rtol=1e-6)
    for name in TERMS:
        np.testing.assert_allclose(two[1][name], 2 * one[1][name], rtol=1e-6)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match=r"fgd\.temperature is 0\.0"):
        make_module(temperature=0.0)


def test_a_scene_without_labels_is_an_error():
    student, teacher = make_outputs()
    module, scene = make_module(), make_scene()
    variables = make_variables(module, student, teacher, scene)
    with pytest.raises(ValueError, match=r"scene\.boxes"):
        module.apply(variables, student, teacher, scene._replace(boxes=None))
