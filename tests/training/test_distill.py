import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from distill_scenes import distill_config, save_teacher
from ml_collections import ConfigDict
from scenes import make_batch, make_sample, tiny_config

from vrdistill_jax import evaluate as evaluate_verb
from vrdistill_jax import train as train_verb
from vrdistill_jax.detectors import votenet
from vrdistill_jax.distillers import DISTILLERS
from vrdistill_jax.predict import Predictor
from vrdistill_jax.recipes import student_config, synthrooms_config
from vrdistill_jax.training import teacher_guided
from vrdistill_jax.training.checkpoint import (
    RunCheckpoints,
    load_inference_checkpoint,
)
from vrdistill_jax.training.distill import (
    init_distillers,
    init_student,
    make_distill_step,
    make_distillation,
)
from vrdistill_jax.training.state import init_state, init_variables
from vrdistill_jax.training.step import make_train_step
from vrdistill_jax.training.teacher import hash_weights, load_teacher, teacher_input

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The tests run a program once or twice: compiling it well would take longer than it saves.
COMPILE_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MOMENTUM = optax.constant_schedule(0.3)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    """A random teacher of twice the student's width."""
    return save_teacher(tmp_path_factory.mktemp("teacher"), tiny_config(**{"detector.width": 0.25}))


def start(config, workdir, batch, distill=True):
    """A step function and a state, with the pieces that train.py puts together."""
    model = votenet.build(config.detector)
    optimizer = optax.adam(1e-3)
    variables = init_variables(model, jax.random.key(0), batch.scene.points, batch.pyramid)
    state = init_state(variables, optimizer)
    arguments = (model, votenet.loss, config.detector, optimizer, MOMENTUM)
    if not distill:
        return jax.jit(make_train_step(*arguments), compiler_options=COMPILE_QUICKLY), state, ()
    teacher = load_teacher(config, workdir)
    distillation = make_distillation(config, teacher, optax.constant_schedule(1e-3))
    learned = init_distillers(distillation, jax.random.key(1), model, variables, batch)
    step = jax.jit(make_distill_step(*arguments, distillation), compiler_options=COMPILE_QUICKLY)
    return step, state._replace(distiller=learned), (teacher.variables,)


def test_every_method_learns_and_stays_finite_without_boxes(teacher_dir, tmp_path):
    """All methods at once: the terms carry their names, and the total is their sum."""
    config = distill_config(teacher_dir, DISTILLERS)
    config.distiller.methods.vrdistill.head_weight = 1.0
    full, empty = make_batch(config), make_batch(config, num_boxes=0)
    step, state, constants = start(config, tmp_path, full)
    for batch in (full, empty, full):
        before = state
        state, metrics = step(state, batch, jax.random.key(2), *constants)
        assert all(np.isfinite(value) for value in metrics.values()), metrics
        shares = sum(metrics[f"{name}/total"] for name in DISTILLERS)
        np.testing.assert_allclose(metrics["total"], metrics["detection"] + shares, rtol=1e-5)
    assert set(state.distiller.params) == set(DISTILLERS)
    for name in DISTILLERS:
        assert metrics[f"{name}/total"] > 0, name
    assert metrics["vrdistill/head"] > 0
    for leaf in jax.tree.leaves(state.distiller.params):
        assert np.isfinite(leaf).all()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, state.params)
    assert sum(jax.tree.leaves(moved)) > len(jax.tree.leaves(moved)) / 2


def test_methods_of_weight_zero_do_nothing_to_the_student(teacher_dir, tmp_path):
    """Also the aligned second pass leaves no trace in the running statistics."""
    config = distill_config(teacher_dir, ("vrdistill", "pgd"))
    for entry in config.distiller.methods.values():
        entry.weight = 0.0
    config.distiller.methods.vrdistill.same_clusters = True
    batch = make_batch(config, train=True)
    plain_step, plain, _ = start(config, tmp_path, batch, distill=False)
    step, state, constants = start(config, tmp_path, batch)
    plain, plain_metrics = plain_step(plain, batch, jax.random.key(2))
    state, metrics = step(state, batch, jax.random.key(2), *constants)
    assert metrics["vrdistill/total"] == metrics["pgd/total"] == 0
    np.testing.assert_allclose(metrics["total"], plain_metrics["total"], rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], plain_metrics["gradient_norm"], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        state.batch_stats,
        plain.batch_stats,
    )
    assert jax.tree.structure(state.variables) == jax.tree.structure(plain.variables)


def test_distiller_parameters_decay_on_their_own(teacher_dir, tmp_path):
    config = distill_config(teacher_dir, ("vrdistill",))
    config.optimizer.name = "adamw"
    config.optimizer.distiller_weight_decay = 0.5
    optimizer = make_distillation(
        config, load_teacher(config, tmp_path), optax.constant_schedule(0.1)
    ).optimizer
    params = {"w": np.float32([2.0])}
    updates, _ = optimizer.update({"w": np.float32([0.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 2.0, rtol=1e-5)


def test_distiller_parameters_learn_at_rates_of_their_own(teacher_dir, tmp_path):
    config = distill_config(teacher_dir, ("vrdistill",))
    config.optimizer.update(name="adamw", weight_decay=0.0)
    config.optimizer.distiller_group_rates = ConfigDict({"refinement": 0.1, "nothing": 1.0})
    optimizer = make_distillation(
        config, load_teacher(config, tmp_path), optax.constant_schedule(0.5)
    ).optimizer
    params = {"vrdistill": {"refinement": {"w": np.float32([2.0])}, "align": {"w": np.float32([2.0])}}}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["vrdistill"]["align"]["w"], -0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["vrdistill"]["refinement"]["w"], -0.05, rtol=1e-5)


def test_teacher_guided_start_and_labels(teacher_dir, tmp_path):
    """The student starts from a slice of the teacher; the teacher's boxes enter the detection loss only, not FGD's regions."""
    config = distill_config(teacher_dir, ("fgd",))
    config.distiller.teacher_guided = teacher_guided.default_config()
    teacher = load_teacher(config, tmp_path)
    assert init_student(config, teacher, {"params": 1}) == {"params": 1}
    config.distiller.teacher_guided.update(initialize=True, label=True, label_threshold=0.0)
    batch = make_batch(config)
    variables = init_variables(votenet.build(config.detector), jax.random.key(0), *batch_inputs(batch))
    variables = init_student(config, teacher, variables)
    kernel = variables["params"]["voting_out"]["kernel"]
    np.testing.assert_array_equal(kernel, teacher.variables["params"]["voting_out"]["kernel"][:32, :35])

    step, state, constants = start(config, tmp_path, batch)
    _, metrics = step(state, batch, jax.random.key(2), *constants)
    config.distiller.teacher_guided.label = False
    step, state, constants = start(config, tmp_path, batch)
    _, plain = step(state, batch, jax.random.key(2), *constants)
    assert metrics["labels/added"] > 0
    assert "labels/added" not in plain
    np.testing.assert_allclose(metrics["fgd/total"], plain["fgd/total"], rtol=1e-5)
    assert abs(metrics["detection"] - plain["detection"]) > 1e-3


def batch_inputs(batch):
    return batch.scene.points, batch.pyramid


def test_proposals_at_given_clusters():
    """The second pass equals a whole pass with the same clusters; at the student's own ones it changes nothing."""
    config = tiny_config()
    model, batch = votenet.build(config.detector), make_batch(config)
    inputs = batch_inputs(batch)
    variables = init_variables(model, jax.random.key(0), *inputs)
    output = model.apply(variables, *inputs, train=False)
    index = np.stack([np.random.default_rng(b).permutation(32)[:10] for b in range(2)]).astype(np.int32)
    whole = model.apply(variables, *inputs, train=False, cluster_index=index)
    again = model.apply(variables, output, whole, train=False, method="propose_like")
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    np.testing.assert_array_equal(again.raw.cluster_index, index)
    np.testing.assert_array_equal(again.taps["clusters"].xyz[1, 3], output.taps["votes"].xyz[1, index[1, 3]])
    assert again.predictions.center.shape == (2, 10, 3)
    same = model.apply(variables, output, output, train=False, method="propose_like")
    jax.tree.map(np.testing.assert_array_equal, same, output)
    read = model.apply(variables, output, output.taps["clusters"], train=False, method="propose_at")
    jax.tree.map(np.testing.assert_array_equal, read, output)


# ---- Methods


def test_methods_are_named(teacher_dir, tmp_path):
    config = distill_config(teacher_dir, ())
    teacher = load_teacher(config, tmp_path)
    with pytest.raises(ValueError, match="config.distiller.methods is empty"):
        make_distillation(config, teacher, MOMENTUM)
    config = distill_config(teacher_dir, ("vrdistill",))
    config.distiller.methods.vrdistill.head_weight = 1.0
    assert make_distillation(config, teacher, MOMENTUM).methods["vrdistill"].needs_judge
    without = teacher._replace(model=nn.Dense(1))
    with pytest.raises(
        ValueError, match="head_weight is set, but the head of votenet cannot read other votes"
    ):
        make_distillation(config, without, MOMENTUM)
    config = distill_config(teacher_dir, ())
    config.distiller.methods["vrdistil"] = ConfigDict({"weight": 1.0})
    with pytest.raises(ValueError, match="unknown distiller 'vrdistil'; known: .*seed.*vrdistill"):
        make_distillation(config, teacher, MOMENTUM)


# ---- Configs


@pytest.mark.parametrize("size", ["teacher", "full", "tiny"])
def test_students_fit_their_teachers(size):
    teacher = synthrooms_config(size)
    for width, share in (("half", 0.5), ("quarter", 0.25)):
        student = student_config(("vrdistill",), width, size)
        assert student.detector.width == share * teacher.detector.width
        assert teacher_input(student.detector, teacher.detector) is None  # the same
        # Clusters of both at the same seeds.
        assert student.detector.cluster_sampling == "seed_fps"
        assert student.teacher.detector.cluster_sampling_eval == "seed_fps"
        votenet.build(student.detector)
        assert student.optimizer.distiller_weight_decay == 1e-2
        assert student.distiller.methods.vrdistill.layers == 4
    alone = student_config((), "half", size)
    assert "distiller" not in alone
    assert "teacher" not in alone
    assert alone.detector == student_config(("seed",), "half", size).detector
    assert (
        student_config((), "same", size).detector.cluster_sampling == "seed_fps"
    )  # the teacher's own training
    assert teacher.detector.width == (0.25 if size == "tiny" else 1.0)


def test_config_of_the_verb():
    path = ROOT / "configs" / "distill" / "student.py"
    spec = importlib.util.spec_from_file_location("student", path)
    student = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(student)
    config = student.get_config("seed+fgd,quarter,full,sunrgbd")
    assert set(config.distiller.methods) == {"seed", "fgd"}
    assert config.dataset.name == "sunrgbd"
    assert config.optimizer.name == "adamw"
    assert config.optimizer.learning_rate == 0.005
    assert "distiller" not in student.get_config("none,half")
    for arguments, message in (
        ("", "name a method"),
        ("kd", "unknown distiller 'kd'"),
        ("seed,third", "unknown 'third'; known: same, half, quarter"),
        ("seed,half,teacher,kitti", "unknown 'kitti'"),
        ("seed,half,teacher,scannet,x", "no recipe for detector 'x'"),
        (
            "seed,half,teacher,scannet,votenet,votenet,x",
            "expected METHOD,WIDTH,SIZE,DATASET,DETECTOR,TEACHER",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            student.get_config(arguments)


def test_a_missing_teacher_is_one_message():
    done = subprocess.run(
        [sys.executable, "-m", "vrdistill_jax.train", "--config=configs/distill/vrdistill_half.py:tiny"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 2
    assert "config.teacher.checkpoint is empty" in done.stderr
    assert "Traceback" not in done.stderr


# ---- The whole verb


@pytest.fixture
def sources(monkeypatch):
    """Train and validation scenes made by hand in place of a dataset."""

    def open_source(config, split):
        return [make_sample(seed) for seed in (range(6) if split == "train" else range(20, 23))]

    for verb in (train_verb, evaluate_verb):
        monkeypatch.setattr(verb, "open_source", open_source)


@pytest.fixture
def kept_compilations(tmp_path):
    """The same program is compiled once, however often the test starts a run."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


class Killed(Exception):
    pass


# The killed run's log is closed by the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_resumed_run_equals_an_uninterrupted_one(
    teacher_dir, tmp_path, sources, kept_compilations, monkeypatch, capsys
):
    config = distill_config(teacher_dir, ("vrdistill", "mgd"))  # mgd draws random numbers
    given = config.to_json()
    whole = train_verb.train(config, tmp_path / "whole")
    assert config.to_json() == given  # the caller's config is left alone

    save = RunCheckpoints.save

    def save_then_die(self, state, metrics=None):
        save(self, state, metrics)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "save", save_then_die)
        with pytest.raises(Killed):
            train_verb.train(config, tmp_path / "resumed")

    measured = []
    monkeypatch.setattr(train_verb, "evaluate_teacher", lambda *arguments: measured.append(arguments))
    capsys.readouterr()
    resumed = train_verb.train(config, tmp_path / "resumed")
    assert "resuming at step 2" in capsys.readouterr().out
    assert not measured  # the teacher has been evaluated before
    assert resumed["mAP@0.25"] == whole["mAP@0.25"]

    variables = {}
    for name in ("whole", "resumed"):
        variables[name], stored = load_inference_checkpoint(tmp_path / name, 4)
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 4]
        assert 0 <= records[0]["teacher/mAP@0.25"] == stored.teacher.mAP_25 <= 1
        assert {"train/vrdistill/dis", "train/mgd/total", "train/detection"} <= set(records[1])
        assert stored.teacher.weights_sha256 == hash_weights(load_inference_checkpoint(teacher_dir)[0])
        assert (
            json.loads((tmp_path / name / "config.json").read_text())["teacher"] == stored.teacher.to_dict()
        )
    jax.tree.map(np.testing.assert_array_equal, variables["whole"], variables["resumed"])
    items = [read_training_items(tmp_path / name) for name in ("whole", "resumed")]
    jax.tree.map(np.testing.assert_array_equal, *items)
    learned = items[0]["distiller"]["params"]["vrdistill"]
    assert learned["refinement"]["offset_out0"]["kernel"].any()

    # What the student leaves behind is an ordinary detector.
    scene, pyramid, _ = make_batch(config)
    plain = init_variables(votenet.build(config.detector), jax.random.key(0), scene.points, pyramid)
    assert jax.tree.structure(variables["whole"]) == jax.tree.structure(jax.tree.map(np.asarray, plain))
    assert evaluate_verb.evaluate_checkpoint(str(tmp_path / "whole"))["mAP@0.25"] == whole["mAP@0.25"]
    detections = Predictor(tmp_path / "whole", min_score=0.0)(make_sample(3)["xyz"])
    assert np.isfinite(detections.boxes).all()

    other = distill_config(teacher_dir, ("vrdistill", "mgd"))
    other.distiller.methods.vrdistill.eta = 3.0
    with pytest.raises(ValueError, match=r"distiller.methods.vrdistill.eta: 30.0 there, 3.0 here"):
        train_verb.train(other, tmp_path / "whole")


def read_training_items(workdir):
    """Step, optimisers and distiller parameters of the last checkpoint, as they lie on disk."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        items = ocp.args.Composite(training=ocp.args.StandardRestore())
        return manager.restore(4, args=items).training


DEVICES = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np, optax
from scenes import make_batch
from vrdistill_jax.detectors import votenet
from vrdistill_jax.training.distill import init_distillers, make_distill_step, make_distillation
from vrdistill_jax.training.parallel import AXIS, map_train_step
from vrdistill_jax.training.state import init_state, init_variables
from vrdistill_jax.training.teacher import load_teacher
from distill_scenes import distill_config

NAMES = "total", "vrdistill/total", "vrdistill/ref", "pgd/total", "gradient_norm", "distiller_gradient_norm"
config = distill_config(sys.argv[1], ("vrdistill", "pgd"))
config.distiller.methods.vrdistill.reduction = "sum"
batches = [make_batch(config, range(4 * k, 4 * k + 4), num_boxes=1 + k, train=True) for k in range(2)]
optimizer = optax.sgd(1e-7)  # a large step turns rounding into other nearest neighbours
teacher = load_teacher(config, "nowhere")
assert jax.local_device_count() == 2

def run(axis_name):
    model = votenet.build(config.detector, axis_name)
    scene, pyramid, _ = batches[0]
    variables = init_variables(model, jax.random.key(0), scene.points, pyramid)
    distillation = make_distillation(config, teacher, optax.constant_schedule(0.0), axis_name)._replace(optimizer=optimizer)
    learned = init_distillers(distillation, jax.random.key(1), model, variables, batches[0])
    state = init_state(variables, optimizer)._replace(distiller=learned)
    momentum = optax.constant_schedule(0.3)
    step = make_distill_step(model, votenet.loss, config.detector, optimizer, momentum, distillation, axis_name)
    step = map_train_step(step, num_constants=1) if axis_name else jax.jit(step)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch, jax.random.key(2), teacher.variables)
        losses.append([float(metrics[k]) for k in NAMES])
    return jax.tree.map(np.asarray, state), np.array(losses)

one, one_losses = run(None)
two, two_losses = run(AXIS)
worst = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))
print(one_losses, two_losses, worst)
assert worst < 1e-5
np.testing.assert_allclose(two_losses, one_losses, rtol=1e-4)
"""


@pytest.mark.slow
def test_two_devices_equal_one_with_synchronised_batch_norm(teacher_dir):
    tests = pathlib.Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{tests}:{tests / 'training'}",
    }
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, str(teacher_dir)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
