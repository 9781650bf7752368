"""Recipes of FCAF3D: published numbers, and sizes that fit what they meet."""

import importlib.util
import pathlib

import pytest

from vrdistill_jax.detectors import fcaf3d
from vrdistill_jax.recipes import SCANNET, SUNRGBD, detector_config, scannet_config, sunrgbd_config

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs/fcaf3d"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"fcaf3d_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("make", "scenes", "repeats"), [(scannet_config, 1201, 10), (sunrgbd_config, 5285, 3)]
)
def test_published_schedule_of_fcaf3d(make, scenes, repeats):
    config = make("full", detector="fcaf3d")
    epoch = repeats * (scenes // 16)
    assert (config.train.batch_size, config.train.num_steps) == (16, 12 * epoch)
    assert config.train.eval_every == epoch
    assert config.optimizer.name == "adamw"
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-3, 1e-4)
    assert (config.optimizer.schedule, config.optimizer.warmup_steps) == ("steps", 0)
    assert tuple(config.optimizer.decay_epochs) == (8.0 * repeats, 11.0 * repeats)
    assert config.dataset.num_points == 100_000
    assert config.detector.to_dict() == (
        fcaf3d.default_config(config.detector.class_names, None, config.detector.oriented).to_dict()
    )


def test_sr3d_and_tr3d_keep_their_schedules():
    tr3d, sr3d = (scannet_config("full", detector=name) for name in ("tr3d", "sr3d"))
    assert tuple(tr3d.optimizer.decay_epochs) == (120.0, 165.0)
    assert tuple(sr3d.optimizer.decay_epochs) == (120.0, 165.0, 180.0)
    assert (tr3d.optimizer.warmup_steps, sr3d.optimizer.warmup_steps) == (0, 300)
    assert (tr3d.train.num_steps, sr3d.train.num_steps) == (12 * 15 * 75, 13 * 15 * 75)


@pytest.mark.parametrize("size", ["small", "tiny"])
def test_rungs_hold_eight_children_of_every_voxel(size):
    for task in (SCANNET, SUNRGBD):
        detector = detector_config("fcaf3d", task, size).detector
        for rung in detector.capacities:
            assert len(rung) == len(fcaf3d.pyramid_config(detector).capacities[0]) == 10
        largest = detector.capacities[-1]
        assert [largest[row + 1] for row in (6, 7, 8)] == [8 * largest[row] for row in (6, 7, 8)]


@pytest.mark.parametrize("name", ["synthrooms", "scannet", "sunrgbd"])
def test_config_files(name):
    module = load(name)
    config, small = module.get_config(), module.get_config("small")
    assert config.detector.name == small.detector.name == "fcaf3d"
    assert config.dataset.name == name
    assert config.detector.oriented == (name == "sunrgbd")
    assert small.detector.stem_size == 16
