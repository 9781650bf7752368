"""Trains a detector, on its own or (where the config has a section `distiller`) with a teacher.

    python -m vrdistill_jax.train --config=configs/synthrooms.py
    python -m vrdistill_jax.train --config=configs/synthrooms.py --workdir=runs/wide --config.detector.width=1.0
    python -m vrdistill_jax.train --config=configs/distill/vrdistill_half.py --config.teacher.checkpoint=runs/teacher

The work directory receives checkpoints, metrics.jsonl, config.json, env.json and report.txt. Starting the same command
again resumes it; on a CPU the result is bit for bit that of an uninterrupted run.
"""

import copy
import pathlib
import time
from functools import partial

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.loader import evaluation_batches, train_batches
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.evaluation.average_precision import render_table
from vrdistill_jax.evaluation.evaluator import evaluate
from vrdistill_jax.training.checkpoint import RunCheckpoints, check_same_config
from vrdistill_jax.training.distill import (
    init_distillers,
    init_student,
    make_distill_step,
    make_distillation,
)
from vrdistill_jax.training.logging import RunLog
from vrdistill_jax.training.optimizer import make_optimizer
from vrdistill_jax.training.parallel import AXIS, map_train_step
from vrdistill_jax.training.schedules import learning_rate_schedule, norm_momentum_schedule
from vrdistill_jax.training.state import Batch, count_parameters, init_state, init_variables
from vrdistill_jax.training.step import find_non_finite, make_predict_step, make_train_step
from vrdistill_jax.training.teacher import (
    evaluate_teacher,
    load_teacher,
    record_teacher_scores,
    teacher_scores,
)


def train(config, workdir: str | pathlib.Path, tensorboard: bool = False) -> dict:
    """Trains `config` in `workdir`, resuming what is there.

    Args:
      config: ConfigDict as configs/synthrooms.py makes it.
      workdir: folder of the run.
      tensorboard: also write TensorBoard files.

    Returns:
      The final evaluation: what evaluation.average_precision returns.

    Raises:
      ValueError: for impossible configs, a teacher that does not fit, or a workdir that holds a run of another config.
      FloatingPointError: when a loss term is no longer finite.
    """
    workdir, config = pathlib.Path(workdir), copy.deepcopy(config)
    teacher = load_teacher(config, workdir) if config.get("distiller") else None
    check_same_config(workdir, config)

    # ---- Data
    detector = find_detector(config.detector.name)
    pyramid = detector.pyramid_config(config.detector)
    teacher_reads = teacher.reads if teacher else None  # None: the same as the student
    train_source, val_source = open_source(config.dataset, "train"), open_source(config.dataset, "val")
    steps_per_epoch = max(len(train_source) // config.train.batch_size, 1)
    num_steps = config.train.num_steps

    # ---- Model, optimiser, state
    axis_name = AXIS if jax.local_device_count() > 1 else None
    model = detector.build(config.detector, axis_name if config.train.sync_batch_norm else None)
    learning_rate = learning_rate_schedule(config.optimizer, num_steps, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, learning_rate)
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    first = Batch(*next(evaluation_batches(val_source, config, pyramid, 1, teacher_reads)))
    variables = init_variables(model, init_key, first.scene.points, first.pyramid)
    if teacher is not None:
        variables = init_student(config, teacher, variables)
    state = init_state(variables, optimizer)
    names = tuple(config.detector.class_names)

    def measure(variables) -> dict:
        batches = evaluation_batches(val_source, config, pyramid, config.train.eval_batch_size)
        variables = jax.device_put(variables, jax.local_devices()[0])
        return evaluate(lambda points, p: predict_fn(variables, points, p), batches, names)

    # ---- Step
    norm_momentum = norm_momentum_schedule(config.norm_momentum, steps_per_epoch)
    student = (model, detector.loss, config.detector, optimizer, norm_momentum)
    constants: tuple = ()  # what the step takes besides state, batch and key
    if teacher is None:
        step_fn = make_train_step(*student, axis_name)
    else:
        distillation = make_distillation(config, teacher, learning_rate, axis_name)
        key = jax.random.fold_in(init_key, 1)
        learned = init_distillers(distillation, key, model, state.variables, first)
        state = state._replace(distiller=learned)
        step_fn = make_distill_step(*student, distillation, axis_name)
        constants = (teacher.variables,)
    mapped = partial(map_train_step, num_constants=len(constants))
    step_fn = mapped(step_fn) if axis_name else jax.jit(step_fn, donate_argnums=(0,))
    predict_fn = make_predict_step(model, detector.decode, config.detector)

    if teacher is not None and not teacher_scores(config):
        record_teacher_scores(config, headline(evaluate_teacher(config, teacher, val_source)))

    # ---- Loop
    with RunCheckpoints(workdir, config) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        start = int(state.step)
        log = RunLog(workdir, config, start, num_steps, tensorboard)
        log.say(
            f"{config.detector.name}, {count_parameters(state.params):,} parameters, {len(train_source)} training scenes, "
            f"{'resuming at' if start else 'starting at'} step {start} of {num_steps}"
        )
        if teacher is not None:
            measured = teacher_scores(config)
            text = ", ".join(f"{name} {score:.3f}" for name, score in measured.items())
            log.say(f"teacher {config.teacher.checkpoint}: {text}")
            if not start:
                log.write(0, measured, "teacher/")
        batches = train_batches(train_source, config, pyramid, start, teacher_reads)
        waiting, pending, result = 0.0, None, None
        for step in range(start + 1, num_steps + 1):
            began = time.perf_counter()
            batch = Batch(*next(batches))
            waiting += time.perf_counter() - began
            state, metrics = step_fn(state, batch, run_key, *constants)
            if pending is not None:  # looked at one step late, so that the device never waits for the host
                check_finite(step - 1, pending)
            pending = metrics
            log.bar.update()
            if step % config.train.log_every == 0 or step == num_steps:
                check_finite(step, metrics)
                extra = {"learning_rate": learning_rate(step - 1), "input_wait_s": waiting}
                log.write(step, metrics | extra, "train/")
                log.show(
                    {"loss": metrics["total"]}
                    | {k: metrics[k] for k in ("vote", "objectness") if k in metrics}
                )
                waiting = 0.0
            last = step == num_steps
            scores = None
            if step % config.train.eval_every == 0 or last:
                check_finite(step, metrics)
                result = measure(state.variables)
                scores = headline(result)
                log.write(step, scores, "val/")
                log.say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            if step % config.train.checkpoint_every == 0 or scores or last:
                check_finite(step, metrics)
                checkpoints.save(state, scores)
        log.close()
    return result if result is not None else measure(state.variables)


def headline(result: dict) -> dict[str, float]:
    """The two numbers that a run is judged by."""
    return {name: float(result[name]) for name in ("mAP@0.25", "mAP@0.5")}


def check_finite(step: int, metrics: dict) -> None:
    """Stops the run at a loss that is NaN or infinite.

    Raises:
      FloatingPointError: naming the step and the terms.
    """
    bad = find_non_finite({name: np.asarray(value) for name, value in metrics.items()})
    if bad:
        raise FloatingPointError(
            f"step {step}: {', '.join(bad)} not finite; the last checkpoint is untouched. Lower "
            "config.optimizer.learning_rate or set config.optimizer.clip_norm"
        )


def define_flags() -> None:
    """Declares the verb's flags; not at import, because other verbs use the same names."""
    config_flags.DEFINE_config_file("config", None, "What to train: a Python file with get_config().")
    flags.DEFINE_string("workdir", None, "Where the run is kept; default runs/<name of the config file>.")
    flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard files (extra: tensorboard).")


def main() -> int:
    """Trains, then prints the per-class table and what to do next."""
    options = flags.FLAGS
    if options.config is None:
        raise ValueError("--config is needed, for example --config=configs/synthrooms.py")
    name = pathlib.Path(config_flags.get_config_filename(options["config"]).partition(":")[0]).stem
    workdir = pathlib.Path(options.workdir or f"runs/{name}")
    try:
        result = train(options.config, workdir, options.tensorboard)
    except FloatingPointError as error:
        print(f"error: {error}")
        return 1
    table = render_table(result)
    (workdir / "report.txt").write_text(table + "\n")
    print(table)
    print(
        f"\nThe run is in {workdir}. Next:\n"
        f"  python -m vrdistill_jax.predict --checkpoint={workdir} --input=SCAN.ply   boxes, and a room in your browser\n"
        f"  python -m vrdistill_jax.evaluate --checkpoint={workdir}                   this table again"
    )
    return 0


if __name__ == "__main__":
    define_flags()
    run_verb(main, large_memory=True)
