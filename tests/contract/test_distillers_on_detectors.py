"""Every distiller on every detector: finite with and without boxes, trains the student, leaves the teacher alone."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import make_batch, tiny_config

from vrdistill_jax.detectors import DETECTORS, find_detector
from vrdistill_jax.distillers import DISTILLERS, find_distiller
from vrdistill_jax.structs import Scene
from vrdistill_jax.training.state import Batch, init_variables

# Each program runs once or twice: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
# Methods that draw random numbers for the whole batch: another batch size gives other numbers.
RANDOM = ("mgd",)
# A small config of each detector; a detector without one fails the first test.
CONFIGS = {"votenet": tiny_config}


def test_every_detector_takes_part():
    assert set(CONFIGS) == set(DETECTORS)


class Pair:
    """A student and a teacher of twice its width on the same scenes."""

    def __init__(self, name: str):
        detector = find_detector(name)
        self.student_config, self.teacher_config = CONFIGS[name](), CONFIGS[name]()
        self.teacher_config.detector.width *= 2
        self.batches = {n: make_batch(self.student_config, num_boxes=n) for n in (0, 3)}
        scene, pyramid = self.batches[3]
        self.student, self.teacher = (
            detector.build(c.detector) for c in (self.student_config, self.teacher_config)
        )
        self.variables, self.teacher_variables = (
            init_variables(model, jax.random.key(n), scene.points, pyramid)
            for n, model in enumerate((self.student, self.teacher))
        )


@pytest.fixture(scope="module", params=list(DETECTORS))
def pair(request):
    return Pair(request.param)


@pytest.fixture(scope="module", params=list(DISTILLERS))
def loss(request, pair):
    """loss(student parameters, teacher variables, distiller parameters, batch), and the distiller's parameters."""
    file = find_distiller(request.param)
    module = file.build(file.default_config(), pair.student_config.detector, pair.teacher_config.detector)

    def outputs(params, teacher_variables, batch):
        scene, pyramid = batch
        variables = pair.variables | {"params": params}
        taught = pair.teacher.apply(teacher_variables, scene.points, pyramid, train=False)
        output = pair.student.apply(variables, scene.points, pyramid, train=False)
        aligned = None
        if file.NEEDS_ALIGNED:
            aligned = pair.student.apply(variables, output, taught, train=False, method="propose_like")
        return output, taught, aligned

    def total(params, teacher_variables, learned, batch):
        output, taught, aligned = outputs(params, teacher_variables, batch)
        rngs = {"distiller": jax.random.key(0)}
        value, terms = module.apply(
            {"params": learned}, output, taught, batch.scene, aligned=aligned, rngs=rngs
        )
        return value, terms

    def init(batch):
        output, taught, aligned = outputs(pair.variables["params"], pair.teacher_variables, batch)
        keys = {"params": jax.random.key(1), "distiller": jax.random.key(0)}
        return module.init(keys, output, taught, batch.scene, aligned=aligned).get("params", {})

    learned = jit(init)(pair.batches[3])
    gradient = jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    value = jit(lambda *arguments: total(*arguments)[0])
    arguments = (pair.variables["params"], pair.teacher_variables, learned)
    return SimpleNamespace(
        name=request.param,
        gradient=lambda batch: gradient(*arguments, batch),
        value=lambda batch: value(*arguments, batch),
    )


def total_size(tree) -> float:
    return float(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)))


def test_finite_with_and_without_boxes_and_trains_the_student_only(pair, loss):
    for num_boxes, batch in pair.batches.items():
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


def test_more_padding_of_boxes_changes_nothing(pair, loss):
    scene, pyramid = pair.batches[3]
    boxes = scene.boxes

    def pad(array, value):
        shape = (array.shape[0], 5, *array.shape[2:])
        return np.concatenate([array, np.full(shape, value, array.dtype)], 1)

    padded = type(boxes)(
        pad(boxes.center, 0), pad(boxes.size, 1), pad(boxes.yaw, 0), pad(boxes.label, -1), pad(boxes.mask, False),
        pad(boxes.vote_center, 0),
    )  # fmt: skip
    after = loss.value(Batch(scene._replace(boxes=padded), pyramid))
    np.testing.assert_allclose(after, loss.value(pair.batches[3]), rtol=1e-5)


def test_a_padded_scene_changes_nothing(pair, loss):
    """The same scenes with a third one that the mask takes out, full of other points."""
    if loss.name in RANDOM:
        pytest.skip("draws its numbers for the whole batch")
    scene, pyramid = make_batch(pair.student_config, seeds=(0, 1, 2))
    scene: Scene = scene._replace(mask=np.array([True, True, False]))
    after = loss.value(Batch(scene, pyramid))
    np.testing.assert_allclose(after, loss.value(pair.batches[3]), rtol=2e-5)
