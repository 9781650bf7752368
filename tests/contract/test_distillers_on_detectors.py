"""Every distiller on every detector: finite with and without boxes, trains the student, leaves the teacher alone.

By default numbers are computed for every distiller on VoteNet, and of all other pairs only the
shapes are worked out, forwards and backwards; `-m slow` computes them all.
"""

from functools import cache, partial
from types import SimpleNamespace

import h3dnet_scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import (
    make_batch,
    tiny_config,
    tiny_groupfree3d_config,
    tiny_sparse_config,
    tiny_three_detr_config,
)

from vrdistill_jax.detectors import DETECTORS, find_detector
from vrdistill_jax.distillers import DISTILLERS, find_distiller
from vrdistill_jax.structs import Scene
from vrdistill_jax.training.distill import choose_proposals
from vrdistill_jax.training.state import Batch, init_variables

# Each program runs once or twice: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
# Methods that draw random numbers for the whole batch: another batch size gives other numbers.
RANDOM = ("mgd",)
# A small config of each detector; a detector without one fails the first test.
CONFIGS = {
    "votenet": tiny_config,
    "groupfree3d": tiny_groupfree3d_config,
    "h3dnet": h3dnet_scenes.small_config,
    "3detr": tiny_three_detr_config,
    "3detr_m": partial(tiny_three_detr_config, masked=True),
    "tr3d": partial(tiny_sparse_config, "tr3d"),
    "sr3d": partial(tiny_sparse_config, "sr3d"),
}
WITHOUT_TAPS = {"fcaf3d"}  # offers none that distillers read
PAIRS = [(detector, distiller) for detector in CONFIGS for distiller in DISTILLERS]
COVERING = [pair for pair in PAIRS if "votenet" in pair]


def test_every_detector_takes_part():
    assert set(CONFIGS) | WITHOUT_TAPS == set(DETECTORS)


@cache
def networks(name: str) -> SimpleNamespace:
    """A student and a teacher of twice its width, and the same scenes without and with boxes."""
    detector, student_config, teacher_config = find_detector(name), CONFIGS[name](), CONFIGS[name]()
    teacher_config.detector.width *= 2
    batches = {n: make_batch(student_config, num_boxes=n) for n in (0, 3)}
    student, teacher = (detector.build(c.detector) for c in (student_config, teacher_config))
    return SimpleNamespace(**locals())


@cache
def weights(name: str) -> tuple[dict, dict]:
    """Untrained variables of student and teacher."""
    of = networks(name)
    scene, pyramid, _ = of.batches[3]
    first, second = (
        init_variables(model, jax.random.key(n), scene.points, pyramid)
        for n, model in enumerate((of.student, of.teacher))
    )
    return first, second


def run_networks(of, variables, teacher_variables, batch, needs_aligned):
    """What a distiller is called with: the outputs of student and teacher, and the student's at the teacher's clusters."""
    scene, pyramid, _ = batch
    taught = of.teacher.apply(teacher_variables, scene.points, pyramid, train=False)
    output = of.student.apply(variables, scene.points, pyramid, train=False)
    taught = choose_proposals(of.teacher, teacher_variables, taught, taught)
    output = choose_proposals(of.student, variables, output, taught)
    aligned = None
    if needs_aligned:
        aligned = of.student.apply(variables, output, taught, train=False, method="propose_like")
    return output, taught, aligned


@cache
def output_shapes(name: str) -> tuple:
    """The shapes of what `run_networks` returns; nothing is computed."""
    of = networks(name)

    def run(batch):
        scene, pyramid, _ = batch
        variables = [
            model.init(jax.random.key(0), scene.points, pyramid, train=False)
            for model in (of.student, of.teacher)
        ]
        return run_networks(of, *variables, batch, needs_aligned=True)

    return jax.eval_shape(run, of.batches[3])


@cache
def distillation(detector: str, distiller: str) -> SimpleNamespace:
    """`total`(student's parameters, teacher's variables, distiller's parameters, batch) -> (loss, terms), and `init`(batch)."""
    of, file = networks(detector), find_distiller(distiller)
    module = file.build(file.default_config(), of.student_config.detector, of.teacher_config.detector)

    def outputs(params, teacher_variables, batch):
        variables = weights(detector)[0] | {"params": params}
        needs_aligned = getattr(module, "needs_aligned", False)
        return run_networks(of, variables, teacher_variables, batch, needs_aligned)

    def total(params, teacher_variables, learned, batch):
        output, taught, aligned = outputs(params, teacher_variables, batch)
        rngs = {"distiller": jax.random.key(0)}
        return module.apply({"params": learned}, output, taught, batch.scene, aligned=aligned, rngs=rngs)

    def init(batch):
        variables, teacher_variables = weights(detector)
        output, taught, aligned = outputs(variables["params"], teacher_variables, batch)
        keys = {"params": jax.random.key(1), "distiller": jax.random.key(0)}
        return module.init(keys, output, taught, batch.scene, aligned=aligned).get("params", {})

    gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    return SimpleNamespace(total=total, init=init, gradient=gradient)


@pytest.mark.parametrize(("detector", "distiller"), [pair for pair in PAIRS if pair not in COVERING])
def test_shapes(detector, distiller):
    of, file = networks(detector), find_distiller(distiller)
    module = file.build(file.default_config(), of.student_config.detector, of.teacher_config.detector)
    output, taught, aligned = output_shapes(detector)
    aligned, scene = aligned if getattr(module, "needs_aligned", False) else None, of.batches[3].scene
    keys = {"params": jax.random.key(1), "distiller": jax.random.key(0)}
    learned = jax.eval_shape(
        lambda *x: module.init(keys, *x[:3], aligned=x[3]), output, taught, scene, aligned
    )

    def total(learned, output, taught, aligned):
        rngs = {"distiller": jax.random.key(0)}
        return module.apply(learned, output, taught, scene, aligned=aligned, rngs=rngs)

    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True, allow_int=True)
    (value, terms), gradients = jax.eval_shape(gradient, learned, output, taught, aligned)
    assert value.shape == ()
    assert all(term.shape == () for term in terms.values())
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, (learned, output))


def numbers(pairs, **options):
    return [pytest.param(pair, id="-".join(pair), **options) for pair in pairs]


@pytest.fixture(
    scope="module",
    params=numbers(COVERING)
    + numbers([pair for pair in PAIRS if pair not in COVERING], marks=pytest.mark.slow),
)
def loss(request):
    of, made = networks(request.param[0]), distillation(*request.param)
    variables, teacher_variables = weights(request.param[0])  # before anything is traced that reads them
    learned = jit(made.init)(of.batches[3])
    arguments = (variables["params"], teacher_variables, learned)
    gradient, value = jit(made.gradient), jit(lambda *arguments: made.total(*arguments)[0])
    return SimpleNamespace(
        networks=of,
        distiller=request.param[1],
        gradient=lambda batch: gradient(*arguments, batch),
        value=lambda batch: value(*arguments, batch),
    )


def total_size(tree) -> float:
    return float(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)))


def test_finite_with_and_without_boxes_and_trains_the_student_only(loss):
    for num_boxes, batch in loss.networks.batches.items():
        (value, terms), gradients = loss.gradient(batch)
        assert np.isfinite(value)
        assert value >= 0
        assert all(np.isfinite(term) for term in terms.values())
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        of_student, of_teacher, _ = gradients
        assert total_size(of_teacher) == 0
        if num_boxes:
            assert value > 0
            assert total_size(of_student) > 0


def test_more_padding_of_boxes_changes_nothing(loss):
    scene, pyramid, _ = loss.networks.batches[3]
    boxes = scene.boxes

    def pad(array, value):
        shape = (array.shape[0], 5, *array.shape[2:])
        return np.concatenate([array, np.full(shape, value, array.dtype)], 1)

    padded = type(boxes)(
        pad(boxes.center, 0), pad(boxes.size, 1), pad(boxes.yaw, 0), pad(boxes.label, -1), pad(boxes.mask, False),
        pad(boxes.vote_center, 0),
    )  # fmt: skip
    after = loss.value(Batch(scene._replace(boxes=padded), pyramid))
    np.testing.assert_allclose(after, loss.value(Batch(scene, pyramid)), rtol=1e-5)


def test_a_padded_scene_changes_nothing(loss):
    """The same scenes with a third one that the mask takes out, full of other points."""
    if loss.distiller in RANDOM:
        pytest.skip("draws its numbers for the whole batch")
    scene, pyramid, _ = make_batch(loss.networks.student_config, seeds=(0, 1, 2))
    scene: Scene = scene._replace(mask=np.array([True, True, False]))
    after = loss.value(Batch(scene, pyramid))
    np.testing.assert_allclose(after, loss.value(loss.networks.batches[3]), rtol=2e-5)
