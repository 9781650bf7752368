"""A config of a distillation run for the scenes of `scenes.py`, and teachers with random weights."""

import pathlib

from h3dnet_scenes import random_variables
from ml_collections import ConfigDict
from scenes import make_batch, tiny_config

from vrdistill_jax.detectors import find_detector
from vrdistill_jax.distillers import find_distiller
from vrdistill_jax.recipes import default_teacher_config
from vrdistill_jax.training.checkpoint import save_inference_checkpoint


def distill_config(teacher: str | pathlib.Path, methods, **changes) -> ConfigDict:
    """The very small VoteNet as a student; `changes` set dotted keys."""
    config = tiny_config(**changes)
    config.teacher = default_teacher_config()
    config.teacher.checkpoint = str(teacher)
    config.distiller = ConfigDict({"methods": {}})
    for name in methods:
        config.distiller.methods[name] = find_distiller(name).default_config()
    return config


def save_teacher(folder: pathlib.Path, config: ConfigDict) -> pathlib.Path:
    """An untrained detector as a checkpoint."""
    batch = make_batch(config)
    model = find_detector(config.detector.name).build(config.detector)
    save_inference_checkpoint(folder, random_variables(model, batch, seed=9), config)
    return folder
