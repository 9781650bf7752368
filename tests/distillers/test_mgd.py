import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import mgd as oracle

from vrdistill_jax.distillers import mgd
from vrdistill_jax.structs import DetectorOutput, Points, PointSet, Scene

B, M, C = 2, 24, 8
KEY = jax.random.key(7)


def make_outputs(student_size=4, teacher_size=C, key=0):
    rng = np.random.default_rng(key)
    xyz = rng.uniform(-1, 1, (B, M, 3)).astype(np.float32)
    index = np.tile(np.arange(M, dtype=np.int32), (B, 1))

    def output(size):
        features = np.abs(rng.normal(size=(B, M, size))).astype(np.float32)
        return DetectorOutput(None, {"seeds": PointSet(xyz, features, np.ones((B, M), bool), index)}, None)

    return output(student_size), output(teacher_size)


def make_scene(mask=(True,) * B):
    points = Points(np.zeros((B, 1, 3), np.float32), np.zeros((B, 1, 0), np.float32), np.ones((B, 1), bool))
    return Scene(points, None, None, None, None, np.array(mask))


def with_taps(output, **fields):
    return output._replace(taps={"seeds": output.taps["seeds"]._replace(**fields)})


def make_module(**changes):
    config = mgd.default_config()
    config.update(changes)
    return mgd.build(config, None, None)


def make_variables(module, student, teacher):
    keys = {"params": jax.random.key(0), "distiller": jax.random.key(1)}
    return module.init(keys, student, teacher, make_scene())


def apply(module, variables, student, teacher, scene=None, key=KEY):
    scene = make_scene() if scene is None else scene
    return module.apply(
        variables, student, teacher, scene, aligned=None, train=True, rngs={"distiller": key}
    )[0]


def identity_variables():
    """A generator that passes non-negative features through."""
    layer = {
        "own": {"kernel": jnp.eye(C), "bias": jnp.zeros(C)},
        "around": {"kernel": jnp.zeros((C + 3, C))},
    }
    return {"params": {"generator": {"layer0": layer, "layer1": layer}}}


def expected_loss(student, teacher, variables, kept, points=slice(None), scenes=range(B)):
    params = jax.tree.map(np.float64, variables["params"])
    s, t = student.taps["seeds"], teacher.taps["seeds"]
    return np.mean(
        [
            oracle.mgd(
                np.float64(s.features[b][points]),
                np.float64(t.features[b][points]),
                np.float64(t.xyz[b][points]),
                kept[b],
                params,
            )
            for b in scenes
        ]
    )


def fix_mask(monkeypatch, kept):
    """Makes the distiller keep these points, bool[B, M]."""
    monkeypatch.setattr(mgd, "draw_kept", lambda key, rate, shape: jnp.asarray(kept))


@pytest.mark.parametrize("student_size", [4, C])
def test_matches_the_oracle(student_size, monkeypatch):
    student, teacher = make_outputs(student_size)
    module = make_module(weight=0.5, generation=0.02)
    variables = make_variables(module, student, teacher)
    assert ("align" in variables["params"]) == (student_size != C)
    kept = np.random.default_rng(1).random((B, M)) < 0.5
    fix_mask(monkeypatch, kept)
    total = apply(module, variables, student, teacher)
    np.testing.assert_allclose(total, 0.01 * expected_loss(student, teacher, variables, kept), rtol=1e-5)


def test_start_values_and_number_of_parameters():
    config = mgd.default_config()
    assert (config.weight, config.generation, config.mask_rate, config.num_neighbors) == (1, 4e-3, 0.65, 9)
    student, teacher = make_outputs(128, 256)
    shapes = jax.eval_shape(lambda: make_variables(make_module(), student, teacher))
    sizes = {name: sum(x.size for x in jax.tree.leaves(p)) for name, p in shapes["params"].items()}
    assert sizes == {"align": 33024, "generator": 2 * 132096}


def test_identity_generator_of_identical_networks():
    _, teacher = make_outputs()
    variables = identity_variables()
    assert apply(make_module(mask_rate=0.0), variables, teacher, teacher) == 0.0
    assert apply(make_module(), variables, teacher, teacher) > 0.0


def test_everything_masked_leaves_nothing_of_the_student():
    student, teacher = make_outputs(C)
    module = make_module(mask_rate=1.0)
    variables = make_variables(module, student, teacher)
    doubled = with_taps(student, features=2 * student.taps["seeds"].features)
    assert apply(module, variables, student, teacher) == apply(module, variables, doubled, teacher)
    partly = make_module()
    assert apply(partly, variables, student, teacher) != apply(partly, variables, doubled, teacher)


def test_gradient_stops_at_masked_points_and_at_the_teacher(monkeypatch):
    student, teacher = make_outputs(C)
    module = make_module()
    variables = make_variables(module, student, teacher)
    kept = np.random.default_rng(1).random((B, M)) < 0.5
    fix_mask(monkeypatch, kept)

    def loss(variables, s, t, xyz):
        taps = with_taps(student, features=s, xyz=xyz), with_taps(teacher, features=t, xyz=xyz)
        return apply(module, variables, *taps)

    seeds = teacher.taps["seeds"]
    arguments = variables, student.taps["seeds"].features, seeds.features, seeds.xyz
    to_params, to_student, to_teacher, to_xyz = jax.grad(loss, (0, 1, 2, 3))(*arguments)
    assert (np.asarray(to_student)[~kept] == 0).all()
    assert (np.abs(to_student).max(-1)[kept] > 0).all()
    assert (np.asarray(to_teacher) == 0).all()
    assert (np.asarray(to_xyz) == 0).all()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(to_params))


def test_masked_points_are_restored_from_their_neighbours():
    _, teacher = make_outputs()
    module = mgd.Generator()
    seeds = teacher.taps["seeds"]
    variables = module.init(jax.random.key(0), seeds.features, seeds.xyz, seeds.mask)
    features = jnp.asarray(seeds.features).at[:, 0].set(0)
    restored = module.apply(variables, features, seeds.xyz, seeds.mask)[0, 0]
    neighbor = oracle.neighbors(np.float64(seeds.xyz[0]), 9)[0][1]
    changed = module.apply(variables, features.at[0, neighbor].add(1.0), seeds.xyz, seeds.mask)[0, 0]
    assert np.abs(restored - changed).max() > 1e-3


def test_mask_follows_its_key_and_its_rate():
    student, teacher = make_outputs()
    module = make_module()
    variables = make_variables(module, student, teacher)
    first = apply(module, variables, student, teacher)
    assert first == apply(module, variables, student, teacher)
    assert first != apply(module, variables, student, teacher, key=jax.random.key(8))
    for rate in (0.15, 0.65):
        kept = np.asarray(mgd.draw_kept(KEY, rate, (8, 1024)))
        sigma = np.sqrt(rate * (1 - rate) / kept.size)
        assert abs((~kept).mean() - rate) < 3 * sigma
        assert len({row.tobytes() for row in kept}) == 8  # every scene has its own mask
    assert mgd.draw_kept(KEY, 0.0, (2, 64)).all()
    assert not mgd.draw_kept(KEY, 1.0, (2, 64)).any()


def test_mask_does_not_depend_on_padding():
    short, long = mgd.draw_kept(KEY, 0.5, (2, 30)), mgd.draw_kept(KEY, 0.5, (3, 50))
    np.testing.assert_array_equal(short, long[:2, :30])


def test_joint_permutation_of_points_and_mask_changes_nothing(monkeypatch):
    student, teacher = make_outputs()
    module = make_module()
    variables = make_variables(module, student, teacher)
    kept = np.random.default_rng(1).random((B, M)) < 0.5
    order = np.random.default_rng(3).permutation(M)
    fix_mask(monkeypatch, kept)
    expected = apply(module, variables, student, teacher)
    shuffled = jax.tree.map(lambda x: x[:, order], (student, teacher))
    assert abs(apply(module, variables, *shuffled) - expected) > 1e-6  # the mask stayed behind
    fix_mask(monkeypatch, kept[:, order])
    np.testing.assert_allclose(apply(module, variables, *shuffled), expected, rtol=1e-5)


def test_translation_changes_nothing_and_stretching_does():
    student, teacher = make_outputs()
    module = make_module()
    variables = make_variables(module, student, teacher)
    expected = apply(module, variables, student, teacher)
    xyz = teacher.taps["seeds"].xyz
    moved = [with_taps(x, xyz=xyz + np.float32([4, -2, 1])) for x in (student, teacher)]
    np.testing.assert_allclose(apply(module, variables, *moved), expected, rtol=1e-5)
    stretched = [with_taps(x, xyz=xyz * 2) for x in (student, teacher)]
    assert abs(apply(module, variables, *stretched) - expected) > 1e-4 * expected


def test_neighbors_match_the_oracle_with_ties_and_pads():
    rng = np.random.default_rng(0)
    xyz = rng.integers(0, 3, (2, 20, 3)).astype(np.float32)  # a grid: many equal distances
    mask = np.ones((2, 20), bool)
    mask[1, 4:] = False
    xyz[1, 4:] = xyz[1, :1]
    index, valid = mgd.find_neighbors(xyz, mask, 9)
    np.testing.assert_array_equal(index[0], oracle.neighbors(np.float64(xyz[0]), 9))
    assert np.asarray(valid[0]).all()
    np.testing.assert_array_equal(index[1, :4, :4], oracle.neighbors(np.float64(xyz[1, :4]), 4))
    np.testing.assert_array_equal(valid[1, :4], [np.arange(9) < 4] * 4)
    assert mgd.find_neighbors(xyz[:, :5], mask[:, :5], 9)[0].shape == (2, 5, 5)


def test_pads_and_padded_scenes_are_ignored_even_nan(monkeypatch):
    student, teacher = make_outputs()
    valid = 6  # fewer than the nine neighbours
    mask = np.zeros((B, M), bool)
    mask[:, :valid] = True
    module, scene = make_module(generation=1.0), make_scene((True, False))
    variables = make_variables(module, student, teacher)
    kept = np.random.default_rng(1).random((B, M)) < 0.5
    fix_mask(monkeypatch, kept)
    expected = expected_loss(student, teacher, variables, kept[:, :valid], np.arange(valid), [0])

    def poison(array):
        array = array.copy()
        array[:, valid:], array[1] = np.nan, np.nan
        return array

    seeds = teacher.taps["seeds"]
    dirty = with_taps(teacher, features=poison(seeds.features), xyz=poison(seeds.xyz), mask=mask)

    def loss(variables, features):
        taps = with_taps(student, features=features, mask=mask, xyz=poison(seeds.xyz))
        return apply(module, variables, taps, dirty, scene)

    arguments = variables, poison(student.taps["seeds"].features)
    value, gradient = jax.value_and_grad(loss, (0, 1))(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert apply(module, variables, student, teacher, make_scene((False,) * B)) == 0.0


def test_devices_draw_different_masks_and_share_the_mean():
    student, teacher = make_outputs()
    twice = jax.tree.map(
        lambda x: np.stack([x[0], x[0]]), (student, teacher)
    )  # the same scene on both devices
    variables = make_variables(make_module(), student, teacher)
    module = make_module().clone(axis_name="devices")

    def share(s, t, mask):
        one = jax.tree.map(lambda x: x[None], (s, t))
        return apply(module, variables, *one, make_scene()._replace(mask=mask[None]))

    mapped = jax.vmap(share, axis_name="devices")
    losses = mapped(*twice, np.ones(B, bool))
    assert abs(losses[0] - losses[1]) > 1e-6
    # A padded scene on the second device: the mean over devices is the first scene's loss alone.
    alone = mapped(*twice, np.array([True, False]))
    np.testing.assert_allclose(alone, [2 * losses[0], 0], rtol=1e-5)


def test_needs_a_key():
    student, teacher = make_outputs()
    module = make_module()
    variables = make_variables(module, student, teacher)
    with pytest.raises(Exception, match="distiller"):
        module.apply(variables, student, teacher, make_scene())


@pytest.mark.parametrize(
    "bad", [{"mask_rate": 1.5}, {"mask_rate": -0.1}, {"num_neighbors": 0}, {"offset_scale": 0.0}]
)
def test_impossible_values_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_module(**bad)
