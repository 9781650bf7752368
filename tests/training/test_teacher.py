"""The teacher of a run: found, identified, adjusted, evaluated on what the student reads."""

import jax
import numpy as np
import pytest
from distill_scenes import distill_config, save_teacher
from ml_collections import ConfigDict
from scenes import make_batch, make_sample, tiny_config, tiny_three_detr_config

from vrdistill_jax.detectors import three_detr, votenet
from vrdistill_jax.structs import InputConfig
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.training.state import init_variables
from vrdistill_jax.training.teacher import (
    Teacher,
    evaluate_teacher,
    hash_weights,
    input_config,
    load_teacher,
    teacher_input,
)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    """A random teacher of twice the student's width."""
    return save_teacher(tmp_path_factory.mktemp("teacher"), tiny_config(**{"detector.width": 0.25}))


def test_what_the_teacher_reads_is_told_only_where_it_differs(teacher_dir):
    student = tiny_config().detector
    assert teacher_input(student, tiny_config(**{"detector.width": 1.0}).detector) is None
    _, loaded = load_inference_checkpoint(teacher_dir)  # tuples have become lists in JSON
    assert teacher_input(student, loaded.detector) is None
    levels = ((64, 0.5, 8), (32, 0.8, 8), (16, 1.0, 8), (8, 1.6, 8))
    other = tiny_config(**{"detector.levels": levels}).detector
    assert teacher_input(student, other) == InputConfig(("height",), votenet.pyramid_config(other))
    colored = tiny_config(**{"detector.input_features": ("color", "height")}).detector
    assert teacher_input(student, colored) == InputConfig(
        ("color", "height"), votenet.pyramid_config(student)
    )
    family = tiny_three_detr_config().detector
    assert teacher_input(student, family) == InputConfig((), three_detr.pyramid_config(family))
    with pytest.raises(ValueError, match="need the same classes"):
        teacher_input(student, tiny_config(**{"detector.class_names": ("a", "b", "c", "e")}).detector)


def test_a_teacher_without_votes_does_without_their_sampling(tmp_path):
    """config.teacher.detector.cluster_sampling_eval is there by default, and means nothing to 3DETR."""
    own = tiny_three_detr_config()
    save_teacher(tmp_path, own)
    teacher = load_teacher(distill_config(tmp_path, ("vrdistill",)), tmp_path)
    assert teacher.reads == input_config(own.detector)


def test_the_teacher_is_evaluated_with_its_own_input():
    """A colour teacher of a height student: it sees the same points, and what its own evaluation would see of them."""
    config, own = tiny_config(), tiny_config(**{"detector.input_features": ("color",)})
    model, batch = votenet.build(own.detector), make_batch(own)
    variables = init_variables(model, jax.random.key(0), batch.scene.points, batch.pyramid)
    before, source = config.to_json(), [make_sample(seed) for seed in range(3)]
    reads = teacher_input(config.detector, own.detector)
    result = evaluate_teacher(config, Teacher(model, variables, own.detector, reads), source)
    assert 0 <= result["mAP@0.25"] <= 1
    assert config.to_json() == before


def test_teacher_is_found_identified_and_adjusted(teacher_dir, tmp_path):
    config = distill_config(teacher_dir, ("vrdistill",))
    config.teacher.detector.cluster_sampling_eval = "vote_fps"
    teacher = load_teacher(config, tmp_path)
    assert config.teacher.weights_sha256 == hash_weights(teacher.variables)
    assert teacher.model.cluster_sampling_eval == "vote_fps"
    assert teacher.config.cluster_sampling_eval == "seed_fps"  # as it is evaluated
    assert teacher.model.width == 0.25
    load_teacher(config, tmp_path)  # the recorded hash fits
    config.teacher.weights_sha256 = "0" * 64
    with pytest.raises(ValueError, match="but config.teacher.weights_sha256 is 0000"):
        load_teacher(config, tmp_path)
    with pytest.raises(ValueError, match="config.teacher.checkpoint is empty"):
        load_teacher(distill_config("", ("vrdistill",)), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_teacher(distill_config(tmp_path, ("vrdistill",)), tmp_path)
    config = distill_config(teacher_dir, ("vrdistill",))
    config.teacher.detector = ConfigDict({"samplng": 1})
    with pytest.raises(ValueError, match="config.teacher.detector.samplng is no entry"):
        load_teacher(config, tmp_path)


def test_hash_sees_names_shapes_and_values():
    weights = {"params": {"a": np.zeros(4, np.float32), "b": np.ones(2, np.float32)}}
    same = {"params": {"b": np.ones(2, np.float32), "a": np.zeros(4, np.float32)}}
    assert hash_weights(weights) == hash_weights(same)
    for other in (
        {"a": np.zeros((2, 2), np.float32), "b": np.ones(2, np.float32)},
        {"a": np.zeros(4, np.float32), "c": np.ones(2, np.float32)},
        {"a": np.zeros(4, np.float32), "b": np.float32([1, 2])},
    ):
        assert hash_weights({"params": other}) != hash_weights(weights)
