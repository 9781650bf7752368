"""Distillation: a frozen teacher reads the same clouds as the student, and distillers compare the two.

The teacher (`training.teacher`) takes no part in optimiser or checkpoint. Learnable parts of the distillers have their own
optimiser; without them, and with distillers of weight 0, a step does to the student what plain training does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vrdistill_jax.detectors import find_detector
from vrdistill_jax.distillers import DISTILLERS, find_distiller
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.nn.norm import update_running
from vrdistill_jax.structs import DetectorOutput, PointSet, VoxelPyramidConfig
from vrdistill_jax.training import teacher_guided
from vrdistill_jax.training.optimizer import make_optimizer
from vrdistill_jax.training.state import Batch, DistillerState, TrainState
from vrdistill_jax.training.teacher import Teacher, input_config


class Method(NamedTuple):
    """One entry of config.distiller.methods, built."""

    module: nn.Module
    needs_aligned: bool
    needs_judge: bool


class Distillation(NamedTuple):
    """What `make_distill_step` adds to plain training."""

    teacher: Teacher
    methods: dict[str, Method]
    optimizer: optax.GradientTransformation  # of the methods' parameters
    labels: ConfigDict | None = (
        None  # config.distiller.teacher_guided where the teacher's detections become labels
    )


def init_student(config: Any, teacher: Teacher, variables: dict) -> dict:
    """The student's initial variables: as they are, or cut out of the teacher's if config.distiller.teacher_guided says so."""
    guided = config.distiller.get("teacher_guided")
    if not (guided and guided.initialize):
        return variables
    return teacher_guided.guided_variables(teacher.variables, variables, config.detector.name)


def make_distillation(
    config: Any, teacher: Teacher, schedule: optax.Schedule, axis_name: str | None = None
) -> Distillation:
    """Builds the methods of config.distiller and their optimiser.

    Args:
      config: the whole config. The optimiser is the student's (with clipping of its own), except that
        config.optimizer.distiller_weight_decay and distiller_group_rates, if they are there, replace weight_decay and
        group_rates (a group whose rate is 1 need not be there: a method may have no refinement).
      teacher: of the run.
      schedule: learning rate by step.
      axis_name: mapped device axis, or None.

    Raises:
      ValueError: for an unknown method, one that cannot compare these two networks, or nothing to do.
    """
    guided = config.distiller.get("teacher_guided") or teacher_guided.default_config()
    if not (config.distiller.methods or guided.initialize or guided.label):
        raise ValueError("config.distiller.methods is empty; name a method, or leave config.distiller out")
    if guided.label and isinstance(input_config(teacher.config).pyramid, VoxelPyramidConfig):
        raise ValueError(
            f"teacher_guided.label compares all of a teacher's candidates pair by pair, of which {teacher.config.name} has one "
            "per voxel; set config.distiller.teacher_guided.label=False"
        )
    methods = {}
    for name, entry in config.distiller.methods.items():
        module = find_distiller(name).build(entry, config.detector, teacher.config, axis_name)
        needs_aligned = getattr(module, "needs_aligned", False)
        if needs_aligned:
            check_one_by_one(name, config.detector, teacher)
        needs_judge = getattr(module, "needs_judge", False)
        if needs_judge and not hasattr(teacher.model, "propose_at"):
            raise ValueError(
                f"distiller.methods.{name}.head_weight is set, but the head of {teacher.config.name} cannot read other votes "
                "than its own; set it to 0"
            )
        methods[name] = Method(module, needs_aligned, needs_judge)
    settings = ConfigDict(config.optimizer.to_dict())
    settings.weight_decay = settings.get("distiller_weight_decay", settings.weight_decay)
    rates = settings.get("distiller_group_rates", ConfigDict())
    settings.group_rates = ConfigDict({part: rate for part, rate in rates.items() if rate != 1})
    return Distillation(
        teacher, methods, make_optimizer(settings, schedule), guided if guided.label else None
    )


def check_one_by_one(method: str, student: Any, teacher: Teacher) -> None:
    """Checks that the student can propose where the teacher does, in the same terms.

    Args:
      method: name of the distiller that needs it.
      student: its config.detector.
      teacher: of the run.

    Raises:
      ValueError: saying what differs, and which methods do without.
    """
    reason = ""
    if student.name != teacher.config.name:
        reason = f"the teacher is {teacher.config.name}, the student {student.name}"
    elif not hasattr(find_detector(student.name).build(student), "propose_like"):
        reason = f"{student.name} cannot propose at given places"
    elif not teacher.same_geometry:
        reason = "their geometry (detector.levels, or voxel_size) differs"
    if reason:
        built = {
            name: file.build(file.default_config(), student, teacher.config)
            for name, file in DISTILLERS.items()
        }
        others = [name for name, module in built.items() if not getattr(module, "needs_aligned", False)]
        raise ValueError(
            f"{method}, as configured, compares proposals one by one and cannot be used here: {reason}. With their default "
            f"entries, these methods can: {', '.join(others)}"
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
      batch: labelled scenes and what both networks read.
    """

    @jax.jit
    def init(key, variables, teacher_variables, batch):
        scene = batch.scene
        taught = distillation.teacher.model.apply(teacher_variables, *batch.teacher_input, train=False)
        output = student.apply(variables, scene.points, batch.pyramid, train=False)
        taught = choose_proposals(distillation.teacher.model, teacher_variables, taught, taught)
        like = taught if distillation.teacher.same_geometry else output
        output = choose_proposals(student, variables, output, like)
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
      like: the teacher's output, so that student and teacher are compared at the same anchors; where that has other anchors,
        the student's own.
    """
    if "proposals" in output.taps or not hasattr(model, "propose_like"):
        return output
    like = like if type(output.raw) is type(like.raw) else output
    return model.apply(variables, output, like, train=False, method="propose_like")


def _at_clusters_of(
    student: nn.Module, variables: dict, output: Any, teacher: Any, *, train: bool
) -> DetectorOutput:
    """The student's proposals at the teacher's clusters; what that pass does to the statistics is dropped."""
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
        scene = batch.scene
        taught: Any = teacher.model.apply(teacher_variables, *batch.teacher_input, train=False)
        taught = choose_proposals(teacher.model, teacher_variables, taught, taught)
        taught = jax.lax.stop_gradient(taught)

        def judge(votes: PointSet) -> jax.Array:
            """The detection loss of the teacher's own head on other votes."""
            output = teacher.model.apply(teacher_variables, taught, votes, train=False, method="propose_at")
            return find_detector(teacher.config.name).loss(output, scene, teacher.config, axis_name)[0]

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
                batch.pyramid,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            detection, terms = loss(output, labelled, config, axis_name)
            total, terms = detection, terms | counts | {"detection": detection}
            output = choose_proposals(model, variables, output, taught if teacher.same_geometry else output)
            aligned = _at_clusters_of(model, variables, output, taught, train=True) if needs_aligned else None
            for n, (name, method) in enumerate(methods.items()):
                extras: dict[str, Any] = {"judge": judge} if method.needs_judge else {}
                value, parts = method.module.apply(
                    {"params": distiller_params[name]},
                    output,
                    taught,
                    scene,
                    aligned=aligned if method.needs_aligned else None,
                    train=True,
                    **extras,
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
