"""VoteNet on SynthRooms, the procedural rooms that come with the library.

    python -m vrdistill_jax.train --config=configs/synthrooms.py

Sized for two CPU cores: few points, half-size set abstraction, half width. `:full` is VoteNet at its published size, for a GPU;
`:tiny` is for tests.
"""

import math

from ml_collections import ConfigDict

from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SCANNET_MEAN_SIZES


def get_config(size: str = "small") -> ConfigDict:
    if size not in ("small", "full", "tiny"):
        raise ValueError(f"unknown size {size!r}; known: small, full, tiny")
    config = ConfigDict()
    config.seed = 0

    config.detector = ConfigDict()
    config.detector.name = "votenet"
    config.detector.class_names = tuple(SCANNET_CLASSES)
    config.detector.mean_sizes = tuple(tuple(float(x) for x in row) for row in SCANNET_MEAN_SIZES)
    config.detector.num_heading_bins = 1
    config.detector.input_features = ("height",)
    config.detector.width = {"small": 0.5, "full": 1.0, "tiny": 0.25}[size]
    config.detector.num_proposals = {"small": 128, "full": 256, "tiny": 32}[size]
    # (centres, radius in metres, neighbours) of each set abstraction
    config.detector.levels = {
        "small": ((1024, 0.2, 32), (512, 0.4, 16), (256, 0.8, 16), (128, 1.2, 16)),
        "full": ((2048, 0.2, 64), (1024, 0.4, 32), (512, 0.8, 16), (256, 1.2, 16)),
        "tiny": ((128, 0.3, 8), (64, 0.6, 8), (32, 0.8, 8), (16, 1.2, 8)),
    }[size]
    config.detector.cluster_sampling = "vote_fps"
    config.detector.cluster_sampling_eval = "seed_fps"
    config.detector.aggregation_radius = 0.3
    config.detector.aggregation_neighbors = 16
    config.detector.normalize_votes = True
    config.detector.norm_epsilon = 1e-5
    config.detector.reference_padding = False

    config.dataset = ConfigDict()
    config.dataset.name = "synthrooms"
    config.dataset.style = "scan"
    config.dataset.data_dir = ""  # empty: VRDISTILL_DATA or ~/.cache/vrdistill_jax/datasets
    config.dataset.num_train = 64 if size == "tiny" else 1200
    config.dataset.num_val = 16 if size == "tiny" else 312
    config.dataset.oriented = False
    config.dataset.num_points = {"small": 8192, "full": 20000, "tiny": 1024}[size]
    config.dataset.max_boxes = 64
    config.dataset.num_threads = 2
    config.dataset.augment = ConfigDict(
        dict(flip_x=0.5, flip_y=0.5, max_turn=math.radians(5), max_scale=0.0, refit_boxes=True)
    )

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 10.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_epochs = ()
    config.optimizer.decay_factor = 0.1

    config.norm_momentum = ConfigDict(dict(initial=0.1, factor=1.0, decay_epochs=20.0, floor=0.001))

    config.train = ConfigDict()
    config.train.batch_size = 2 if size == "tiny" else 8
    config.train.num_steps = {"small": 1800, "full": 27000, "tiny": 4}[size]
    config.train.eval_every = {"small": 900, "full": 1500, "tiny": 2}[size]
    config.train.checkpoint_every = {"small": 300, "full": 1500, "tiny": 2}[size]
    config.train.log_every = 10 if size != "tiny" else 1
    config.train.sync_batch_norm = False
    config.train.eval_batch_size = 8 if size != "tiny" else 4
    return config
