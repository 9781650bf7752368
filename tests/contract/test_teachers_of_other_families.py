"""Teachers of one family, students of another: what can be compared is, and the rest says so."""

from functools import partial

import h3dnet_scenes
import jax
import numpy as np
import optax
import pytest
from distill_scenes import distill_config, save_teacher
from h3dnet_scenes import random_variables
from ml_collections import ConfigDict
from scenes import (
    make_sample,
    tiny_config,
    tiny_groupfree3d_config,
    tiny_sparse_config,
    tiny_three_detr_config,
)

from vrdistill_jax import train as train_verb
from vrdistill_jax.data.loader import PreparedScenes, stack_scenes
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.distillers import DISTILLERS
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.training.distill import init_distillers, make_distill_step, make_distillation
from vrdistill_jax.training.state import Batch, init_state
from vrdistill_jax.training.teacher import input_config, load_teacher

# Each program runs a few times: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def wider_votenet_config() -> ConfigDict:
    """Another point pyramid with as many seeds as the student's: only their rows tell that they are others."""
    levels = ((80, 0.5, 8), (32, 0.8, 8), (16, 1.0, 8), (8, 1.5, 8))
    return tiny_config(**{"detector.levels": levels, "detector.input_features": ("color", "height")})


FAMILIES = {
    "3detr": tiny_three_detr_config,
    "groupfree3d": tiny_groupfree3d_config,
    "h3dnet": h3dnet_scenes.small_config,
    "tr3d": tiny_sparse_config,
    "votenet": wider_votenet_config,
}
ONE_BY_ONE = ["pgd", "itkd", "sparsekd"]
OTHERS = [name for name in DISTILLERS if name not in ONE_BY_ONE]
SLOW = {"h3dnet", "votenet"}


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES]
)
def teacher_dir(request, tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp(request.param), FAMILIES[request.param](), initialize=False)


def draw(init, batch):
    """What `init`(batch) would give as a DistillerState, with random parameters: nothing is compiled."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(init, batch)
    params = jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes.params)
    return shapes._replace(
        params=params, opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state)
    )


def read_batch(config, teacher, num_boxes=3) -> Batch:
    source = [make_sample(seed, num_boxes) for seed in range(2)]
    pyramid = input_config(config.detector).pyramid
    scenes = PreparedScenes(source, config, pyramid, False, teacher.reads)
    return Batch(*stack_scenes([scenes.prepare(n) for n in range(2)], pyramid, teacher.reads))


def test_a_votenet_learns_from_it(teacher_dir, tmp_path):
    """All methods that can, in one step: every loss is there, finite with and without boxes, and trains the student."""
    config = distill_config(teacher_dir, OTHERS)
    config.distiller.methods.vrdistill.layers = 1
    teacher = load_teacher(config, tmp_path)
    # A Group-Free teacher without colour or height differs in its features only, the others in their geometry too.
    assert teacher.reads is not None
    model = find_detector("votenet").build(config.detector)
    full, empty = (read_batch(config, teacher, num_boxes) for num_boxes in (3, 0))
    variables = random_variables(model, full)
    optimizer = optax.sgd(1e-3)
    distillation = make_distillation(config, teacher, optax.constant_schedule(1e-3))
    learned = draw(
        lambda batch: init_distillers(distillation, jax.random.key(1), model, variables, batch), full
    )
    state = init_state(variables, optimizer)._replace(distiller=learned)
    loss = find_detector("votenet").loss
    momentum = optax.constant_schedule(0.1)
    step = jit(make_distill_step(model, loss, config.detector, optimizer, momentum, distillation))
    for batch in (full, empty):
        after, metrics = step(state, batch, jax.random.key(2), teacher.variables)
        assert not [name for name, value in metrics.items() if not np.isfinite(value)]
        shares = sum(metrics[f"{name}/total"] for name in OTHERS)
        np.testing.assert_allclose(metrics["total"], metrics["detection"] + shares, rtol=1e-5)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
        moved = [
            bool((a != b).any())
            for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True)
        ]
        assert sum(moved) > len(moved) / 2
        if batch is full:  # without boxes VRDistill has nothing to say
            assert all(metrics[f"{name}/total"] > 0 for name in OTHERS)
            if teacher.config.name != "tr3d":  # whose anchors need not lie in a box
                assert metrics["vrdistill/ref_start"] > 0  # the teacher's seeds know their objects


def test_methods_that_compare_proposals_one_by_one_say_what_differs(teacher_dir, tmp_path):
    for method in [*ONE_BY_ONE, "vrdistill"]:
        config = distill_config(teacher_dir, (method,))
        if method == "vrdistill":
            config.distiller.methods.vrdistill.same_clusters = True
        teacher = load_teacher(config, tmp_path)
        message = rf"{method}, as configured, .* With their default entries, these methods can: vrdistill, seed, fgd, mgd$"
        with pytest.raises(ValueError, match=message):
            make_distillation(config, teacher, optax.constant_schedule(1e-3))


@pytest.mark.parametrize("detector", ["3detr", "groupfree3d", "tr3d"])
def test_any_student_learns_from_a_votenet(detector, tmp_path):
    """The other way round; for shapes and names, nothing is computed."""
    config = FAMILIES[detector]()
    own = distill_config(save_teacher(tmp_path, tiny_config(), initialize=False), ("vrdistill", "seed"))
    config.teacher, config.distiller = own.teacher, own.distiller
    teacher = load_teacher(config, tmp_path)
    file = find_detector(detector)
    model, batch = file.build(config.detector), read_batch(config, teacher)
    variables = random_variables(model, batch)
    optimizer, momentum = optax.sgd(1e-3), optax.constant_schedule(0.1)
    distillation = make_distillation(config, teacher, optax.constant_schedule(1e-3))
    learned = jax.eval_shape(
        lambda batch: init_distillers(distillation, jax.random.key(1), model, variables, batch), batch
    )
    state = init_state(variables, optimizer)._replace(distiller=learned)
    step = make_distill_step(model, file.loss, config.detector, optimizer, momentum, distillation)
    _, metrics = jax.eval_shape(step, state, batch, jax.random.key(2), teacher.variables)
    assert {"vrdistill/total", "seed/total", "detection"} <= set(metrics)


@pytest.mark.slow
def test_the_whole_verb_with_a_teacher_of_another_family(tmp_path, monkeypatch):
    """The loader builds both geometries; the teacher is evaluated with its own, and the student alone is what is left."""

    def open_source(config, split):
        return [make_sample(seed) for seed in (range(6) if split == "train" else range(20, 23))]

    monkeypatch.setattr(train_verb, "open_source", open_source)
    folder = save_teacher(tmp_path / "teacher", tiny_sparse_config())
    config = distill_config(folder, ("vrdistill", "seed"), **{"train.num_steps": 2})
    result = train_verb.train(config, tmp_path / "run")
    assert np.isfinite(result["mAP@0.25"])
    _, stored = load_inference_checkpoint(tmp_path / "run", 2)
    assert 0 <= stored.teacher.mAP_25 <= 1
    assert stored.detector.name == "votenet"
