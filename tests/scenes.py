"""Small labelled scenes for tests: a floor and a few boxes of points."""

import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.data.loader import stack_scenes
from vrdistill_jax.data.samples import labelled_scene, scene_with_pyramid
from vrdistill_jax.detectors import find_detector, groupfree3d, three_detr
from vrdistill_jax.training.state import Batch


def make_sample(seed: int, num_boxes: int = 3, num_points: int = 600) -> dict:
    """A stored scene: points on the floor and inside `num_boxes` disjoint boxes."""
    rng = np.random.default_rng(seed)
    center = np.stack(
        [2.0 * np.arange(num_boxes) - 2.0, rng.uniform(-1, 1, num_boxes), np.full(num_boxes, 0.5)], 1
    )
    size = rng.uniform(0.5, 1.0, (num_boxes, 3))
    instance = rng.integers(-1, num_boxes, num_points) if num_boxes else np.full(num_points, -1)
    floor = np.concatenate([rng.uniform(-4, 4, (num_points, 2)), np.zeros((num_points, 1))], 1)
    inside = np.zeros_like(floor)
    if num_boxes:
        inside = center[instance] + rng.uniform(-0.5, 0.5, (num_points, 3)) * size[instance]
    return {
        "xyz": np.where(instance[:, None] >= 0, inside, floor).astype(np.float32),
        "color": rng.random((num_points, 3)).astype(np.float32),
        "instance": instance.astype(np.int32),
        "boxes_center": center.astype(np.float32),
        "boxes_size": size.astype(np.float32),
        "boxes_yaw": np.zeros(num_boxes, np.float32),
        "boxes_label": (np.arange(num_boxes) % 4).astype(np.int32),
        "name": f"scene{seed}",
    }


def tiny_config(**changes) -> ConfigDict:
    """A whole config with a very small VoteNet; `changes` set dotted keys."""
    config = ConfigDict()
    config.seed = 0
    config.detector = ConfigDict(
        {
            "name": "votenet",
            "class_names": ("a", "b", "c", "d"),
            "mean_sizes": ((0.7, 0.7, 0.7), (0.8, 0.7, 0.6), (0.6, 0.6, 0.9), (0.9, 0.9, 0.6)),
            "num_heading_bins": 1,
            "input_features": ("height",),
            "width": 0.125,
            "num_proposals": 16,
            "levels": ((64, 0.5, 8), (32, 0.8, 8), (16, 1.0, 8), (8, 1.5, 8)),
            "cluster_sampling": "vote_fps",
            "cluster_sampling_eval": "seed_fps",
            "aggregation_radius": 0.5,
            "aggregation_neighbors": 8,
            "normalize_votes": True,
            "norm_epsilon": 1e-5,
            "reference_padding": False,
        }
    )
    config.dataset = ConfigDict(
        {
            "name": "synthrooms",
            "num_points": 256,
            "max_boxes": 8,
            "oriented": False,
            "num_threads": 1,
            "augment": {"flip_x": 0.5, "flip_y": 0.5, "max_turn": 0.1, "max_scale": 0.0, "refit_boxes": True},
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adam",
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
            "schedule": "constant",
            "warmup_steps": 0,
            "decay_epochs": (),
            "decay_factor": 0.1,
        }
    )
    config.norm_momentum = ConfigDict({"initial": 0.1, "factor": 1.0, "decay_epochs": 20.0, "floor": 0.001})
    config.train = ConfigDict(
        {
            "batch_size": 2,
            "num_steps": 4,
            "eval_every": 4,
            "checkpoint_every": 2,
            "log_every": 1,
            "sync_batch_norm": False,
            "eval_batch_size": 2,
        }
    )
    for key, value in changes.items():
        config.update_from_flattened_dict({key: value})
    return config


def tiny_groupfree3d_config(oriented: bool = False, **changes) -> ConfigDict:
    """A whole config with a very small Group-Free-3D; `changes` set dotted keys."""
    config = tiny_config()
    old = config.detector
    config.detector = groupfree3d.default_config(old.class_names, old.mean_sizes, oriented)
    config.detector.update(
        width=1 / 8, num_proposals=12, decoder_layers=2, num_heads=4, dropout=0.0, levels=old.levels
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return config


def tiny_three_detr_config(masked: bool = False, **changes):
    """A whole config with a very small 3DETR; `changes` set dotted keys."""
    config = tiny_config()
    config.detector = three_detr.default_config(
        config.detector.class_names, (), oriented=False, masked=masked
    )
    config.detector.update(
        width=1 / 16, num_proposals=12, encoder_layers=2, decoder_layers=2, encoder_dropout=0.0,
        decoder_dropout=0.0, head_dropout=0.0, levels=((64, 0.5, 8), (32, 0.8, 8))[: 1 + masked],
        masking_radii=(1.0, 2.0) if masked else (),
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return config


def tiny_sparse_config(name: str = "tr3d", **changes) -> ConfigDict:
    """A whole config with a very small TR3D or SR3D; `changes` set dotted keys."""
    config = tiny_config()
    old = config.detector
    config.detector = find_detector(name).default_config(old.class_names, old.mean_sizes, False)
    config.detector.update(
        width=1 / 16, voxel_size=0.08, num_blocks=(1, 1, 1, 1),
        capacities=((256, 256, 256, 192, 128, 96, 48, 384, 2560),),
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return config


def make_batch(config: ConfigDict, seeds=(0, 1), num_boxes: int = 3, train: bool = False) -> Batch:
    """Prepared scenes, stacked."""
    pyramid = find_detector(config.detector.name).pyramid_config(config.detector)
    prepared = [
        scene_with_pyramid(
            labelled_scene(make_sample(seed, num_boxes), seed, config, np.random.default_rng(seed), train),
            pyramid,
        )
        for seed in seeds
    ]
    return Batch(*stack_scenes(prepared, pyramid))
