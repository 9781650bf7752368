from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import itkd as oracle
from proposal_outputs import (
    BINS,
    CHANNELS,
    CLASSES,
    SIZES,
    join_head,
    make_output,
    make_scene,
    permute_proposals,
)

from vrdistill_jax.detectors.votenet import group_channels
from vrdistill_jax.distillers import itkd

GROUPS = (2, 3, 2 * BINS, 4 * SIZES, CLASSES)


def small_config(**changes):
    config = itkd.default_config()
    config.code_sizes = (6, 4, 3)
    config.update(changes)
    return config


def make_module(student, teacher, scene, **changes):
    module = itkd.build(small_config(**changes), None, None)
    params = jax.jit(module.init)(jax.random.key(0), student, teacher, scene, aligned=student)["params"]
    return params, lambda s, t, scene, params=params: run(module, params, s, t, scene)


@partial(jax.jit, static_argnums=0)
def run(module, params, student, teacher, scene):
    return module.apply({"params": params}, student, teacher, scene, aligned=student)


def make_case(num_boxes=3, seed_size=4):
    scene = make_scene(num_boxes=num_boxes)
    student, teacher = make_output(1, scene, seed_size=seed_size), make_output(2, scene)
    mask = np.ones((2, 16), bool)
    mask[:, 11:] = False  # seeds that are pads, the same in both

    def pad(output):
        return output._replace(taps=output.taps | {"seeds": output.taps["seeds"]._replace(mask=mask)})

    return pad(student), pad(teacher), scene


def oracle_terms(student, teacher, scene, params, slots=64):
    s, t = student.taps["seeds"], teacher.taps["seeds"]
    valid, clusters = t.mask, teacher.taps["clusters"]
    rows = np.flatnonzero(scene.mask)
    return oracle.terms(
        [(s.features[b][valid[b]], t.features[b][valid[b]], t.xyz[b][valid[b]]) for b in rows],
        [
            tuple(x[b][clusters.mask[b]] for x in (join_head(student), join_head(teacher), clusters.xyz))
            for b in rows
        ],
        [scene.boxes.center[b][scene.boxes.mask[b]] for b in rows],
        params,
        GROUPS,
        slots,
    )


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_terms_equal_the_oracle(num_boxes):
    student, teacher, scene = make_case(num_boxes)
    scene = scene._replace(mask=np.array([True, num_boxes > 0]))
    params, distil = make_module(student, teacher, scene)
    total, terms = distil(student, teacher, scene)
    want = oracle_terms(student, teacher, scene, params)
    np.testing.assert_allclose(terms["code"], 10 * want["code"], rtol=1e-4)
    np.testing.assert_allclose(terms["interchange"], 10 * want["interchange"], rtol=1e-4)
    np.testing.assert_allclose(terms["attention"], want["attention"], rtol=1e-4)
    np.testing.assert_allclose(total, sum(terms.values()), rtol=1e-6)
    assert (terms["attention"] > 0) == (num_boxes > 0)
    assert terms["code"] > 0


def test_parameters_are_one_autoencoder_one_lift_and_one_mix():
    student, teacher, scene = make_case()
    params, _ = make_module(student, teacher, scene)
    kernels = {
        "/".join(k.key for k in path[:-1]): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    assert kernels == {
        "lift": (4, 8),
        "encoder/layer0": (8, 6),
        "encoder/layer1": (6, 4),
        "encoder/layer2": (4, 3),
        "decoder/layer0": (3, 4),
        "decoder/layer1": (4, 6),
        "decoder/layer2": (6, 4),
        "mix": (2 * CHANNELS, CHANNELS),
    }
    same, _ = make_module(teacher, teacher, scene)
    assert "lift" not in same


def test_parameter_counts_at_full_size():
    """Lift, encoder and decoder at 128 and 64 of 256 channels."""
    student, teacher, scene = make_case()
    for narrow, expected in ((128, 43_232 + 26_944 + 33_024), (64, 43_232 + 18_688 + 16_640)):

        def wide(output, size):
            seeds = output.taps["seeds"]
            features = np.zeros((*seeds.mask.shape, size), np.float32)
            return output._replace(taps=output.taps | {"seeds": seeds._replace(features=features)})

        module = itkd.build(itkd.default_config(), None, None)
        a, b = wide(student, narrow), wide(teacher, 256)
        params = jax.eval_shape(
            lambda module=module, a=a, b=b: module.init(jax.random.key(0), a, b, scene, aligned=a)
        )["params"]
        params.pop("mix")
        assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_equal_networks_differ_only_by_the_reconstruction_error():
    _, teacher, scene = make_case()
    params, distil = make_module(teacher, teacher, scene)
    _, terms = distil(teacher, teacher, scene)
    assert terms["code"] == 0
    assert terms["attention"] == 0
    seeds = teacher.taps["seeds"]
    decoded = oracle.chain(oracle.chain(seeds.features.astype(float), params["encoder"]), params["decoder"])
    error = decoded - seeds.features
    at_objects = []
    for b in range(2):
        for center in scene.boxes.center[b, :3]:
            i = np.argmin(((seeds.xyz[b, :11] - center) ** 2).sum(1))
            at_objects.append((error[b, i] ** 2).mean())
    want = 2 * (np.abs(error[:, :11]).mean() + np.mean(at_objects))
    assert want > 0.1
    np.testing.assert_allclose(terms["interchange"], 10 * want, rtol=1e-4)


def test_equal_networks_and_an_autoencoder_that_is_the_identity_have_no_loss():
    _, teacher, scene = make_case()
    params, distil = make_module(teacher, teacher, scene, code_sizes=(8,))
    for name in ("encoder", "decoder"):
        params[name]["layer0"] = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    assert distil(teacher, teacher, scene, params)[0] == 0


def test_code_term_is_symmetric():
    student, teacher, scene = make_case(seed_size=8)
    params, distil = make_module(student, teacher, scene)
    a, b = distil(student, teacher, scene)[1]["code"], distil(teacher, student, scene)[1]["code"]
    assert a == b > 0


def test_channel_attention_is_a_mixture_of_channels_and_follows_the_objects():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 5, 6)).astype(np.float32)
    got = np.asarray(itkd.channel_attention(rows, 64))
    np.testing.assert_allclose(got[0], oracle.attend(rows[0].astype(float), 64), rtol=1e-4, atol=1e-6)
    ones = np.ones((1, 5, 6), np.float32)  # columns of the mixing matrix sum to 1
    np.testing.assert_allclose(itkd.channel_attention(ones, 64), ones, rtol=1e-6)
    order = [3, 0, 4, 1, 2]
    np.testing.assert_allclose(itkd.channel_attention(rows[:, order], 64), got[:, order], rtol=1e-5)
    padded = np.concatenate([rows, np.zeros((1, 3, 6), np.float32)], 1)
    np.testing.assert_allclose(itkd.channel_attention(padded, 64)[:, :5], got, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(itkd.channel_attention(rows, 8)) - got).max() > 1e-3


def test_padding_mean_counts_empty_slots():
    student, teacher, scene = make_case()
    params, distil = make_module(student, teacher, scene)
    _, literal = make_module(student, teacher, scene, literal_padding_mean=True)
    a = distil(student, teacher, scene)[1]["interchange"]
    b = literal(student, teacher, scene, params)[1]["interchange"]
    none = scene._replace(boxes=scene.boxes._replace(mask=np.zeros_like(scene.boxes.mask)))
    rest = distil(student, teacher, none)[1]["interchange"]
    np.testing.assert_allclose(b - rest, (a - rest) * 3 / 5, rtol=1e-4)


def test_order_of_proposals_does_not_matter():
    student, teacher, scene = make_case()
    _, distil = make_module(student, teacher, scene)
    order = np.random.default_rng(0).permutation(20)
    permuted = distil(permute_proposals(student, order), permute_proposals(teacher, order), scene)[0]
    np.testing.assert_allclose(permuted, distil(student, teacher, scene)[0], rtol=1e-5)


def test_pads_do_not_matter():
    student, teacher, scene = make_case()
    _, distil = make_module(student, teacher, scene)
    want = distil(student, teacher, scene)[0]
    boxes = scene.boxes
    dirty = boxes._replace(center=np.where(boxes.mask[..., None], boxes.center, 0.5).astype(np.float32))

    def spoil(output):
        seeds = output.taps["seeds"]
        pads = ~seeds.mask[..., None]
        seeds = seeds._replace(
            features=np.where(pads, 99, seeds.features).astype(np.float32),
            xyz=np.where(pads, boxes.center[:, :1], seeds.xyz).astype(np.float32),
        )
        return output._replace(taps=output.taps | {"seeds": seeds})

    got = distil(spoil(student), spoil(teacher), scene._replace(boxes=dirty))[0]
    np.testing.assert_array_equal(got, want)
    more = boxes._replace(
        **{name: np.concatenate([x, np.zeros_like(x[:, :2])], 1) for name, x in boxes._asdict().items()}
    )
    np.testing.assert_allclose(distil(student, teacher, scene._replace(boxes=more))[0], want, rtol=1e-6)


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_gradients_are_finite_and_the_teachers_are_zero(num_boxes):
    student, teacher, scene = make_case(num_boxes)
    params, distil = make_module(student, teacher, scene)

    def loss(params, s, t):
        def put(output, x):
            seeds = output.taps["seeds"]._replace(features=x[0])
            return output._replace(
                taps=output.taps | {"seeds": seeds}, head=group_channels(x[1], BINS, SIZES)
            )

        return distil(put(student, s), put(teacher, t), scene, params)[0]

    def inputs(output):
        return jnp.asarray(output.taps["seeds"].features), jnp.asarray(join_head(output))

    to_params, to_student, to_teacher = jax.jit(jax.grad(loss, (0, 1, 2)))(
        params, inputs(student), inputs(teacher)
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((to_params, to_student)))
    assert np.abs(to_student[0]).max() > 0
    assert np.any(to_student[1]) == (num_boxes > 0)
    assert np.abs(to_params["encoder"]["layer0"]["kernel"]).max() > 0
    assert not any(np.any(x) for x in to_teacher)


def test_impossible_calls_say_what_is_wrong():
    student, teacher, scene = make_case()
    module = itkd.build(small_config(), None, None)
    with pytest.raises(ValueError, match="output at the teacher's clusters"):
        module.apply({"params": {}}, student, teacher, scene)
    with pytest.raises(ValueError, match="code_sizes is empty"):
        itkd.build(small_config(code_sizes=()), None, None)
    other = student._replace(head=student.head | {"class": np.zeros((2, 20, 7), np.float32)})
    with pytest.raises(ValueError, match="same classes"):
        module.init(jax.random.key(0), other, teacher, scene, aligned=other)
