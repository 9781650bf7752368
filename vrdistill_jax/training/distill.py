"""Distillation: a frozen teacher reads the same clouds as the student, and distillers compare the two.

The teacher takes no part in optimiser or checkpoint: a run records where it came from, a hash of its weights and how well it
does on the validation split. Learnable parts of the distillers have their own optimiser; without them, and with distillers of
weight 0, a step does to the student what plain training does.
"""

import copy
import hashlib
import json
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vrdistill_jax.detectors import find_detector
from vrdistill_jax.distillers import find_distiller
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.nn.norm import update_running
from vrdistill_jax.structs import DetectorOutput
from vrdistill_jax.training import teacher_guided
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.training.optimizer import make_optimizer
from vrdistill_jax.training.state import Batch, DistillerState, TrainState
from vrdistill_jax.training.step import make_predict_step

TEACHER_SCORES = {"mAP_25": "mAP@0.25", "mAP_50": "mAP@0.5"}  # entries of config.teacher: names in a result


class Teacher(NamedTuple):
    """A trained detector that is not trained further."""

    model: nn.Module  # as it teaches
    variables: dict  # {"params", "batch_stats"}
    config: ConfigDict  # config.detector of its checkpoint


class Method(NamedTuple):
    """One entry of config.distiller.methods, built."""

    module: nn.Module
    needs_aligned: bool


class Distillation(NamedTuple):
    """What `make_distill_step` adds to plain training."""

    teacher: Teacher
    methods: dict[str, Method]
    optimizer: optax.GradientTransformation  # of the methods' parameters
    labels: ConfigDict | None = (
        None  # config.distiller.teacher_guided where the teacher's detections become labels
    )


def load_teacher(config: Any, workdir: str | pathlib.Path) -> Teacher:
    """Loads the teacher that a config names and checks that the student can learn from it.

    Args:
      config: the whole config, with the section teacher (`recipes.default_teacher_config`); its weights_sha256 is filled
        in, and its scores if the run has been started before with the same teacher.
      workdir: folder of the run, which may not exist yet.

    Returns:
      The teacher, its variables on the device.

    Raises:
      ValueError: if there is no such checkpoint, its weights are not the recorded ones, or it reads other input than the
        student.
    """
    if not config.teacher.checkpoint:
        raise ValueError(
            "config.teacher.checkpoint is empty; name a trained detector: --config.teacher.checkpoint=runs/teacher"
        )
    variables, teacher_config = load_inference_checkpoint(config.teacher.checkpoint)
    found, expected = hash_weights(variables), config.teacher.weights_sha256
    if expected and found != expected:
        raise ValueError(
            f"the weights in {config.teacher.checkpoint} have the hash {found}, but config.teacher.weights_sha256 is "
            f"{expected}; name the checkpoint that was meant, or empty the entry"
        )
    config.teacher.weights_sha256 = found
    _recall_scores(config, pathlib.Path(workdir) / "config.json")
    check_same_input(config.detector, teacher_config.detector)

    teaching = copy.deepcopy(teacher_config.detector)
    for name, value in config.teacher.detector.items():
        if name not in teaching:
            raise ValueError(
                f"config.teacher.detector.{name} is no entry of the teacher's config.detector; it has "
                f"{', '.join(sorted(teaching))}"
            )
        teaching[name] = value
    model = find_detector(teaching.name).build(teaching)
    return Teacher(model, jax.device_put(variables), teacher_config.detector)


def check_same_input(student: Any, teacher: Any) -> None:
    """Checks that one loaded batch serves both networks.

    Args:
      student: its config.detector.
      teacher: likewise.

    Raises:
      ValueError: naming the entry that differs.
    """
    pyramids = [find_detector(config.name).pyramid_config(config) for config in (student, teacher)]
    pairs = {
        "point pyramids (detector.levels)": pyramids,
        "input features (detector.input_features)": [tuple(c.input_features) for c in (student, teacher)],
        "classes (detector.class_names)": [tuple(c.class_names) for c in (student, teacher)],
    }
    for what, (of_student, of_teacher) in pairs.items():
        if of_student != of_teacher:
            raise ValueError(
                f"teacher and student need the same {what}: the teacher has {of_teacher}, the student {of_student}; give the "
                "student's config the teacher's, or train another teacher"
            )


def hash_weights(variables: dict) -> str:
    """SHA-256 of names, shapes and values of all parameters and running statistics."""
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def make_teacher_predict(teacher: Teacher) -> Callable:
    """predict(variables, points, pyramid) -> Detections, as `evaluate` runs the teacher's checkpoint."""
    detector = find_detector(teacher.config.name)
    return make_predict_step(detector.build(teacher.config), detector.decode, teacher.config)


def init_student(config: Any, teacher: Teacher, variables: dict) -> dict:
    """The student's initial variables: as they are, or cut out of the teacher's if config.distiller.teacher_guided says so."""
    guided = config.distiller.get("teacher_guided")
    if not (guided and guided.initialize):
        return variables
    return teacher_guided.guided_variables(teacher.variables, variables, config.detector.name)


def teacher_scores(config: Any) -> dict[str, float]:
    """What the config records of the teacher on the validation split; empty if it has not been evaluated yet."""
    if config.teacher.mAP_25 < 0:
        return {}
    return {name: config.teacher[entry] for entry, name in TEACHER_SCORES.items()}


def record_teacher_scores(config: Any, scores: dict[str, float]) -> None:
    """Writes "mAP@0.25" and "mAP@0.5" of the teacher into the config."""
    for entry, name in TEACHER_SCORES.items():
        config.teacher[entry] = scores[name]


def _recall_scores(config: Any, path: pathlib.Path) -> None:
    """Takes the scores from an earlier start of the run, so that a resumed one does not evaluate the teacher again."""
    before = json.loads(path.read_text()).get("teacher", {}) if path.exists() else {}
    if before.get("weights_sha256") == config.teacher.weights_sha256:
        record_teacher_scores(config, {name: before[entry] for entry, name in TEACHER_SCORES.items()})


def make_distillation(
    config: Any, teacher: Teacher, schedule: optax.Schedule, axis_name: str | None = None
) -> Distillation:
    """Builds the methods of config.distiller and their optimiser.

    Args:
      config: the whole config. The optimiser is the student's (with clipping of its own), except that
        config.optimizer.distiller_weight_decay, if it is there, replaces weight_decay.
      teacher: of the run.
      schedule: learning rate by step.
      axis_name: mapped device axis, or None.

    Raises:
      ValueError: for an unknown method, or nothing to do.
    """
    guided = config.distiller.get("teacher_guided") or teacher_guided.default_config()
    if not (config.distiller.methods or guided.initialize or guided.label):
        raise ValueError("config.distiller.methods is empty; name a method, or leave config.distiller out")
    methods = {}
    for name, entry in config.distiller.methods.items():
        file = find_distiller(name)
        module = file.build(entry, config.detector, teacher.config, axis_name)
        methods[name] = Method(module, file.NEEDS_ALIGNED)
    settings = ConfigDict(config.optimizer.to_dict())
    settings.weight_decay = settings.get("distiller_weight_decay", settings.weight_decay)
    return Distillation(
        teacher, methods, make_optimizer(settings, schedule), guided if guided.label else None
    )


def init_distillers(
    distillation: Distillation, key: jax.Array, student: nn.Module, variables: dict, batch: Batch
) -> DistillerState:
    """Initial parameters of the methods; only the shapes of the batch matter.

    Args:
      distillation: the methods.
      key: random.
      student: the student's network.
      variables: its variables.
      batch: labelled scenes and their geometry.
    """

    @jax.jit
    def init(key, variables, teacher_variables, batch):
        scene, pyramid = batch
        taught = distillation.teacher.model.apply(teacher_variables, scene.points, pyramid, train=False)
        output = student.apply(variables, scene.points, pyramid, train=False)
        taught = choose_proposals(distillation.teacher.model, teacher_variables, taught, taught)
        output = choose_proposals(student, variables, output, taught)
        params = {}
        for n, (name, method) in enumerate(distillation.methods.items()):
            aligned = None
            if method.needs_aligned:
                aligned = _at_clusters_of(student, variables, output, taught, train=False)
            keys = {"params": jax.random.fold_in(key, n), "distiller": key}
            module = method.module.clone(axis_name=None)  # no devices here
            params[name] = module.init(keys, output, taught, scene, aligned=aligned, train=True).get(
                "params", {}
            )
        return params

    params = init(key, variables, distillation.teacher.variables, batch)
    return DistillerState(params, distillation.optimizer.init(params))


def choose_proposals(model: nn.Module, variables: dict, output: Any, like: Any) -> Any:
    """What distillers read of a network that predicts at every anchor: the anchors where `like` is most certain.

    Args:
      model: of
      output: whose proposals are chosen; an output that has proposals is returned as it is.
      variables: of the model.
      like: the teacher's output, so that student and teacher are compared at the same anchors.

    Raises:
      ValueError: if teacher and student have different anchors.
    """
    if "proposals" in output.taps or not hasattr(model, "propose_like"):
        return output
    if type(output.raw) is not type(like.raw):
        raise ValueError(
            "a student that predicts at every anchor learns from a teacher with the same anchors; this teacher is of "
            "another kind"
        )
    return model.apply(variables, output, like, train=False, method="propose_like")


def _at_clusters_of(
    student: nn.Module, variables: dict, output: Any, teacher: Any, *, train: bool
) -> DetectorOutput:
    """The student's proposals at the teacher's clusters; what that pass does to the statistics is dropped."""
    if not hasattr(student, "propose_like") or type(output.raw) is not type(teacher.raw):
        raise ValueError(
            "this distiller compares proposals one by one; it needs a teacher and a student of one kind that can propose at "
            "given places"
        )
    arguments = (variables, output, teacher)
    aligned: Any = student.apply(*arguments, train=train, method="propose_like", mutable=["batch_stats"])
    return aligned[0]


def make_distill_step(
    model: nn.Module,
    loss: Callable,
    config: Any,
    optimizer: optax.GradientTransformation,
    norm_momentum: optax.Schedule,
    distillation: Distillation,
    axis_name: str | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds step(state, batch, key, teacher_variables) -> (state, metrics).

    Args:
      model: the student.
      loss: its detector's loss(output, scene, config, axis_name).
      config: its config.detector.
      optimizer: of its parameters.
      norm_momentum: batch-norm momentum by step.
      distillation: teacher and methods.
      axis_name: mapped device axis, or None for a single device.

    Returns:
      A function of the state, this device's part of the batch, a key and the teacher's variables. Metrics are those of
      `training.step.make_train_step` (norms are the student's), the detection loss as "detection", the terms of each
      method as "name/term" and its share of the total as "name/total", and per scene the number of the teacher's labels.
    """
    teacher, methods, distiller_optimizer, labels = distillation
    needs_aligned = any(method.needs_aligned for method in methods.values())

    def mean_over_devices(tree):
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def step(state: TrainState, batch: Batch, key: jax.Array, teacher_variables: dict):
        key = jax.random.fold_in(key, state.step)
        scene, pyramid = batch
        taught: Any = teacher.model.apply(teacher_variables, scene.points, pyramid, train=False)
        taught = choose_proposals(teacher.model, teacher_variables, taught, taught)
        taught = jax.lax.stop_gradient(taught)
        # The detection loss alone sees the teacher's labels; the methods see the ground truth.
        labelled, counts = scene, {}
        if labels is not None:
            labelled, count = teacher_guided.append_detections(
                scene,
                teacher_guided.label_detections(taught.predictions, scene.points),
                threshold=labels.label_threshold,
                max_iou=labels.label_max_iou,
            )
            mean = partial(masked_mean, mask=scene.mask, axis_name=axis_name)
            counts = {
                f"labels/{name}": mean(value.astype(jnp.float32)) for name, value in count._asdict().items()
            }

        def objective(params, distiller_params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            output, updates = model.apply(
                variables,
                scene.points,
                pyramid,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            detection, terms = loss(output, labelled, config, axis_name)
            total, terms = detection, terms | counts | {"detection": detection}
            output = choose_proposals(model, variables, output, taught)
            aligned = _at_clusters_of(model, variables, output, taught, train=True) if needs_aligned else None
            for n, (name, method) in enumerate(methods.items()):
                value, parts = method.module.apply(
                    {"params": distiller_params[name]},
                    output,
                    taught,
                    scene,
                    aligned=aligned if method.needs_aligned else None,
                    train=True,
                    rngs={"distiller": jax.random.fold_in(key, n)},
                )
                total = total + value
                terms |= {f"{name}/{term}": part for term, part in parts.items()} | {f"{name}/total": value}
            return total, (terms, updates["batch_stats"])

        learned = state.distiller
        if learned is None:
            raise ValueError("the state has no distiller parameters; see init_distillers")
        gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (total, (terms, stats)), grads = gradient(state.params, learned.params)
        grads, stats, metrics = mean_over_devices((grads, stats, {"total": total} | terms))
        params, opt_state = _descend(optimizer, grads[0], state.opt_state, state.params)
        learned = DistillerState(*_descend(distiller_optimizer, grads[1], learned.opt_state, learned.params))
        stats = update_running(state.batch_stats, stats, norm_momentum(state.step))
        metrics |= {
            "gradient_norm": optax.global_norm(grads[0]),
            "parameter_norm": optax.global_norm(params),
            "distiller_gradient_norm": optax.global_norm(grads[1]),
            "distiller_parameter_norm": optax.global_norm(learned.params),
        }
        return TrainState(state.step + 1, params, stats, opt_state, learned), metrics

    return step


def _descend(optimizer, grads, opt_state, params) -> tuple[Any, Any]:
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
