import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vrdistill_jax.distillers import seed
from vrdistill_jax.structs import DetectorOutput, Points, PointSet, Scene

B, M = 3, 16


def make_outputs(student_size=8, teacher_size=8, key=0, count=M):
    rng = np.random.default_rng(key)
    xyz = rng.uniform(-2, 2, (B, count, 3)).astype(np.float32)
    index = np.tile(np.arange(count, dtype=np.int32), (B, 1))

    def output(size):
        features = np.abs(rng.normal(size=(B, count, size))).astype(np.float32)
        return DetectorOutput(
            None, {"seeds": PointSet(xyz, features, np.ones((B, count), bool), index)}, None
        )

    return output(student_size), output(teacher_size)


def make_scene(mask=(True,) * B):
    points = Points(np.zeros((B, 1, 3), np.float32), np.zeros((B, 1, 0), np.float32), np.ones((B, 1), bool))
    return Scene(points, None, None, None, None, np.array(mask))


def with_features(output, features):
    return output._replace(taps={"seeds": output.taps["seeds"]._replace(features=features)})


def with_mask(output, mask):
    return output._replace(taps={"seeds": output.taps["seeds"]._replace(mask=mask)})


def make_module(**changes):
    config = seed.default_config()
    config.update(changes)
    return seed.build(config, None, None)


def init(module, *args):
    return module.init({"params": jax.random.key(0), "distiller": jax.random.key(1)}, *args)


def test_identical_networks_have_no_loss_and_no_parameters():
    student, _ = make_outputs()
    module = make_module()
    assert init(module, student, student, make_scene()) == {}
    total, terms = module.apply({"params": {}}, student, student, make_scene(), aligned=None, train=True)
    assert total == 0.0
    assert terms["feature"] == 0.0


@pytest.mark.parametrize(("student_size", "count"), [(4, 4 * 8 + 8), (2, 2 * 8 + 8)])
def test_matches_the_formula_through_the_alignment_layer(student_size, count):
    student, teacher = make_outputs(student_size)
    mask = np.random.default_rng(2).random((B, M)) < 0.7
    student, teacher = with_mask(student, mask), with_mask(teacher, mask)
    scene = make_scene((True, True, False))
    module = make_module(weight=0.5)
    variables = init(module, student, teacher, scene)
    assert sum(x.size for x in jax.tree.leaves(variables)) == count
    total, _ = module.apply(variables, student, teacher, scene)
    layer = jax.tree.map(np.float64, variables["params"]["align"])
    hint = student.taps["seeds"].features @ layer["kernel"] + layer["bias"]
    distance = ((hint - teacher.taps["seeds"].features) ** 2).sum(-1)
    expected = 0.5 * np.mean([distance[b][mask[b]].mean() for b in (0, 1)])
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_alignment_layer_of_the_full_network():
    student, teacher = make_outputs(128, 256)
    variables = jax.eval_shape(lambda: init(make_module(), student, teacher, make_scene()))
    assert sum(x.size for x in jax.tree.leaves(variables)) == 33024


def test_scales_with_the_square_of_the_teacher():
    student, teacher = make_outputs()
    student = with_features(student, jnp.zeros_like(student.taps["seeds"].features))
    module = make_module()
    one = module.apply({}, student, teacher, make_scene())[0]
    three = module.apply(
        {}, student, with_features(teacher, 3 * teacher.taps["seeds"].features), make_scene()
    )[0]
    np.testing.assert_allclose(three, 9 * one, rtol=1e-5)


def test_joint_permutation_changes_nothing():
    student, teacher = make_outputs(4)
    module, scene = make_module(), make_scene()
    variables = init(module, student, teacher, scene)
    order = np.random.default_rng(3).permutation(M)
    shuffled = jax.tree.map(lambda x: x[:, order], (student, teacher))
    np.testing.assert_allclose(
        module.apply(variables, *shuffled, scene)[0],
        module.apply(variables, student, teacher, scene)[0],
        rtol=1e-6,
    )
    # Rows in another order than the teacher's are paired by their places.
    np.testing.assert_allclose(
        module.apply(variables, shuffled[0], teacher, scene)[0],
        module.apply(variables, student, teacher, scene)[0],
        rtol=1e-6,
    )


def test_gradient_reaches_the_student_and_the_layer_only():
    student, teacher = make_outputs(4)
    module, scene = make_module(), make_scene()
    variables = init(module, student, teacher, scene)

    def loss(variables, s, t):
        return module.apply(variables, with_features(student, s), with_features(teacher, t), scene)[0]

    features = student.taps["seeds"].features, teacher.taps["seeds"].features
    to_layer, to_student, to_teacher = jax.grad(loss, (0, 1, 2))(variables, *features)
    assert (np.asarray(to_teacher) == 0).all()
    assert (np.abs(to_student).max(-1) > 0).all()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(to_layer))


def test_pads_and_padded_scenes_are_ignored_even_nan():
    student, teacher = make_outputs(4)
    mask = np.ones((B, M), bool)
    mask[:, 10:] = False
    module, scene = make_module(), make_scene((True, False, True))
    variables = init(module, student, teacher, scene)
    clean = module.apply(variables, with_mask(student, mask), with_mask(teacher, mask), scene)[0]

    def loss(variables, s):
        dirty_s, dirty_t = with_features(student, s), teacher.taps["seeds"].features.copy()
        dirty_t[:, 10:], dirty_t[1] = np.nan, np.nan
        dirty_t = with_features(teacher, dirty_t)
        return module.apply(variables, with_mask(dirty_s, mask), with_mask(dirty_t, mask), scene)[0]

    features = student.taps["seeds"].features.copy()
    features[:, 10:], features[1] = np.nan, np.nan
    value, gradient = jax.value_and_grad(loss, (0, 1))(variables, features)
    np.testing.assert_allclose(value, clean, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    nothing = module.apply(variables, student, teacher, make_scene((False,) * B))[0]
    assert nothing == 0.0


def test_variants():
    student, teacher = make_outputs()
    scene = make_scene()
    s, t = (np.float64(x.taps["seeds"].features) for x in (student, teacher))
    normalized = make_module(normalize=True).apply({}, student, teacher, scene)[0]

    def standardized(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    expected = ((standardized(s) - standardized(t)) ** 2).sum(-1).mean()
    np.testing.assert_allclose(normalized, expected, rtol=1e-4)
    negative = with_features(student, -student.taps["seeds"].features)
    rectified = make_module(rectify=True).apply({}, negative, teacher, scene)[0]
    np.testing.assert_allclose(rectified, (t**2).sum(-1).mean(), rtol=1e-5)


def test_mean_over_devices_equals_the_whole_batch():
    student, teacher = make_outputs(4)
    module, scene = make_module(), make_scene((True, False, True))
    variables = init(module, student, teacher, scene)
    whole = module.apply(variables, student, teacher, scene)[0]

    def share(s, t, mask):
        one = jax.tree.map(lambda x: x[None], (s, t))
        total, _ = module.clone(axis_name="devices").apply(variables, *one, scene._replace(mask=mask[None]))
        return jax.lax.pmean(total, "devices")

    mapped = jax.vmap(share, axis_name="devices")(student, teacher, scene.mask)
    np.testing.assert_allclose(mapped, whole, rtol=1e-5)


def test_errors_name_the_remedy():
    student, teacher = make_outputs()
    with pytest.raises(ValueError, match="no tap 'voxels'; it offers: seeds"):
        make_module(tap="voxels").apply({}, student, teacher, make_scene())
