"""A config of a distillation run for the scenes of `scenes.py`, and teachers with random weights."""

import pathlib

import jax
from h3dnet_scenes import random_variables
from ml_collections import ConfigDict
from scenes import make_batch, tiny_config

from vrdistill_jax.detectors import find_detector
from vrdistill_jax.distillers import find_distiller
from vrdistill_jax.recipes import default_teacher_config
from vrdistill_jax.training.checkpoint import save_inference_checkpoint
from vrdistill_jax.training.state import init_variables


def distill_config(teacher: str | pathlib.Path, methods, **changes) -> ConfigDict:
    """The very small VoteNet as a student; `changes` set dotted keys."""
    config = tiny_config(**changes)
    config.teacher = default_teacher_config()
    config.teacher.checkpoint = str(teacher)
    config.distiller = ConfigDict({"methods": {}})
    for name in methods:
        config.distiller.methods[name] = find_distiller(name).default_config()
    if "vrdistill" in methods:
        # Four layers would take four times as long to compile.
        config.distiller.methods.vrdistill.layers = 1
    return config


def save_teacher(folder: pathlib.Path, config: ConfigDict, initialize: bool = True) -> pathlib.Path:
    """An untrained detector as a checkpoint; `initialize` False draws weights of any size without compiling the network."""
    batch = make_batch(config)
    model = find_detector(config.detector.name).build(config.detector)
    if initialize:
        variables = init_variables(model, jax.random.key(9), batch.scene.points, batch.pyramid)
    else:
        variables = random_variables(model, batch, seed=9)
    save_inference_checkpoint(folder, variables, config)
    return folder
