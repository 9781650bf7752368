"""The teacher of a run: a trained detector that is not trained further.

A run records where it came from, a hash of its weights and how well it does on the validation split. It may be of another
family than the student, with another geometry and other input features: the loader then makes both networks' inputs of the same
points (`Teacher.reads`).
"""

import copy
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.data.loader import evaluation_batches
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.evaluation.evaluator import evaluate
from vrdistill_jax.structs import InputConfig
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.training.step import make_predict_step

# An entry of config.teacher.detector that is there by default, for teachers that group votes; others do without.
SAMPLING = "cluster_sampling_eval"
TEACHER_SCORES = {"mAP_25": "mAP@0.25", "mAP_50": "mAP@0.5"}  # entries of config.teacher: names in a result


class Teacher(NamedTuple):
    """A trained detector that is not trained further."""

    model: nn.Module  # as it teaches
    variables: dict  # {"params", "batch_stats"}
    config: ConfigDict  # config.detector of its checkpoint
    reads: InputConfig | None = None  # None if that is what the student reads
    same_geometry: bool = True  # whether both read one pyramid, so that seeds and anchors are the same points


def load_teacher(config: Any, workdir: str | pathlib.Path) -> Teacher:
    """Loads the teacher that a config names and checks that the student can learn from it.

    Args:
      config: the whole config, with the section teacher (`recipes.default_teacher_config`); its weights_sha256 is filled
        in, and its scores if the run has been started before with the same teacher.
      workdir: folder of the run, which may not exist yet.

    Returns:
      The teacher, its variables on the device.

    Raises:
      ValueError: if there is no such checkpoint, its weights are not the recorded ones, or it finds other classes than the
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
    teaching = copy.deepcopy(teacher_config.detector)
    for name, value in config.teacher.detector.items():
        if name not in teaching:
            if name == SAMPLING:
                continue
            raise ValueError(
                f"config.teacher.detector.{name} is no entry of the teacher's config.detector; it has "
                f"{', '.join(sorted(teaching))}"
            )
        teaching[name] = value
    reads, model = teacher_input(config.detector, teaching), find_detector(teaching.name).build(teaching)
    same_geometry = reads is None or reads.pyramid == input_config(config.detector).pyramid
    return Teacher(model, jax.device_put(variables), teacher_config.detector, reads, same_geometry)


def teacher_input(student: Any, teacher: Any) -> InputConfig | None:
    """What the teacher reads of a cloud, or None if that is what the student reads.

    Args:
      student: its config.detector.
      teacher: likewise.

    Raises:
      ValueError: if they do not find the same classes.
    """
    names = tuple(student.class_names), tuple(teacher.class_names)
    if names[0] != names[1]:
        raise ValueError(
            f"teacher and student need the same classes (detector.class_names): the teacher has {names[1]}, the student "
            f"{names[0]}; give the student's config the teacher's, or train another teacher"
        )
    own, other = (input_config(config) for config in (student, teacher))
    return None if own == other else other


def input_config(detector: Any) -> InputConfig:
    """What the network of a config.detector reads of a cloud."""
    return InputConfig(tuple(detector.input_features), find_detector(detector.name).pyramid_config(detector))


def hash_weights(variables: dict) -> str:
    """SHA-256 of names, shapes and values of all parameters and running statistics."""
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def evaluate_teacher(config: Any, teacher: Teacher, source: Any) -> dict:
    """Evaluates the teacher, as its checkpoint is evaluated, on the clouds that the student reads.

    Args:
      config: the whole config of the run: how many points a cloud has, and the batch size.
      teacher: of the run.
      source: the split.

    Returns:
      What evaluation.average_precision returns.
    """
    own = copy.deepcopy(config)
    with own.unlocked():
        own.detector = teacher.config
    detector = find_detector(teacher.config.name)
    predict = make_predict_step(detector.build(teacher.config), detector.decode, teacher.config)
    pyramid = detector.pyramid_config(teacher.config)
    batches = evaluation_batches(source, own, pyramid, config.train.eval_batch_size)
    variables = jax.device_put(teacher.variables, jax.local_devices()[0])
    names = tuple(teacher.config.class_names)
    return evaluate(lambda points, p: predict(variables, points, p), batches, names)


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
