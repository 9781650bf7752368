"""What distillation costs: its step beside the teacher's forward pass and the student's plain training step."""

import jax
import jax.numpy as jnp
import numpy as np

from vrdistill_jax.benchmarks.cases import training_batch, training_rooms
from vrdistill_jax.benchmarks.recorder import Recorder
from vrdistill_jax.detectors import votenet
from vrdistill_jax.recipes import student_config
from vrdistill_jax.training.distill import init_distillers, make_distill_step, make_distillation
from vrdistill_jax.training.optimizer import make_optimizer
from vrdistill_jax.training.schedules import learning_rate_schedule, norm_momentum_schedule
from vrdistill_jax.training.state import init_state, init_variables
from vrdistill_jax.training.step import make_train_step
from vrdistill_jax.training.teacher import Teacher

SUITE = "distill_step"
TARGET = 1.25  # times the sum of the two


def run(recorder: Recorder, size: str = "teacher") -> None:
    """Times VRDistill with students of half and quarter width; untrained networks cost the same as trained ones."""
    size = "tiny" if recorder.effort.quick else size
    for width in ("half",) if recorder.effort.quick else ("half", "quarter"):
        _time_student(recorder, size, width)


def _time_student(recorder: Recorder, size: str, width: str) -> None:
    config = student_config(("vrdistill",), width, size)
    teaching = student_config((), "same", size).detector
    batch = training_batch(config, training_rooms(config))
    points, pyramid = batch.scene.points, batch.pyramid
    model, teacher_model = votenet.build(config.detector), votenet.build(teaching)
    variables = init_variables(model, jax.random.key(0), points, pyramid)
    teacher_variables = init_variables(teacher_model, jax.random.key(1), points, pyramid)
    schedule = learning_rate_schedule(config.optimizer, 1000, 100)
    optimizer, momentum = (
        make_optimizer(config.optimizer, schedule),
        norm_momentum_schedule(config.norm_momentum, 100),
    )
    student = (model, votenet.loss, config.detector, optimizer, momentum)
    distillation = make_distillation(config, Teacher(teacher_model, teacher_variables, teaching), schedule)
    learned = init_distillers(distillation, jax.random.key(2), model, variables, batch)

    teach = jax.jit(lambda v, points, p: teacher_model.apply(v, points, p, train=False))
    plain = jax.jit(make_train_step(*student), donate_argnums=(0,))
    distil = jax.jit(make_distill_step(*student, distillation), donate_argnums=(0,))

    def copy(tree):  # a step takes over the buffers of its state
        return jax.tree.map(jnp.copy, tree)

    batch, key = jax.device_put(batch), jax.random.key(3)
    states = {
        "plain": init_state(copy(variables), optimizer),
        "distil": init_state(copy(variables), optimizer)._replace(distiller=copy(learned)),
    }
    metrics = {}

    def step_plain():
        states["plain"], metrics["plain"] = plain(states["plain"], batch, key)
        return metrics["plain"]

    def step_distil():
        states["distil"], metrics["distil"] = distil(states["distil"], batch, key, teacher_variables)
        return metrics["distil"]

    case = f"{size}, student of {width} width, batch {config.train.batch_size}"
    rows = recorder.time_in_turn(
        SUITE,
        case,
        {
            "teacher forward": lambda: teach(teacher_variables, batch.scene.points, batch.pyramid),
            "student step, plain": step_plain,
            "student step, VRDistill": step_distil,
        },
        scenes=config.train.batch_size,
    )
    taught, alone, distilled = rows.values()
    for name, ratio in (("ratio_to_sum", "p50_ms"), ("ratio_to_sum_of_minima", "min_ms")):
        distilled[name] = round(distilled[ratio] / (taught[ratio] + alone[ratio]), 3)
    recorder.say(
        f"  VRDistill's step is {distilled['ratio_to_sum']:.2f} x teacher forward + plain step "
        f"(minima {distilled['ratio_to_sum_of_minima']:.2f} x; the aim is at most {TARGET} x)"
    )
    if not np.isfinite(np.asarray(metrics["distil"]["total"])):
        recorder.failures.append(f"{SUITE}, {case}: the loss is not finite")
