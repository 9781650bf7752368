"""How long, and with which learning rates, the authors of the detectors and of VRDistill trained."""

from ml_collections import ConfigDict

SPARSE = ("tr3d", "sr3d", "fcaf3d")


def use_published_schedule(config: ConfigDict, num_scenes: int) -> None:
    """Sets the length of training and the schedule that the detector's authors used.

    VoteNet: Adam, 180 epochs of batches of 8, steps at 80, 120 and 160, falling norm momentum. H3DNet: likewise, 360 epochs,
    own steps. Group-Free-3D: 400 epochs of batches of 32, steps at 280 and 340 (SUN RGB-D: 600; 420, 480 and 540). 3DETR: 1080
    epochs of batches of 8, nine of warm-up, cosine. TR3D: 12 epochs of batches of 16, each of which shows a scene 15 times
    (ScanNet) or 5 times (SUN RGB-D), steps at 8 and 11; FCAF3D: likewise, 10 times or 3 times; SR3D: 13 epochs, steps at 8, 11
    and 12, 300 steps of warm-up.

    Source: votenet, train.py; 3detr, README; tr3d and fcaf3d, configs; SR3D, section 4.1.
    """
    epoch, name = num_scenes // config.train.batch_size, config.detector.name
    if name in SPARSE:
        scannet, sunrgbd = (10, 3) if name == "fcaf3d" else (15, 5)
        repeats = sunrgbd if config.detector.oriented else scannet
        num_epochs, at = (13, (8, 11, 12)) if name == "sr3d" else (12, (8, 11))
        config.optimizer.schedule = "steps"
        config.optimizer.decay_epochs = tuple(float(repeats * epoch_number) for epoch_number in at)
        config.optimizer.warmup_steps = 300 if name == "sr3d" else 0
        config.train.num_steps = num_epochs * repeats * epoch
        config.train.eval_every = config.train.checkpoint_every = repeats * epoch
        return
    if name in ("3detr", "3detr_m"):
        config.optimizer.warmup_steps = 9 * epoch
        config.train.num_steps = 1080 * epoch
        config.train.eval_every = config.train.checkpoint_every = 10 * epoch
        return
    oriented = config.dataset.oriented
    if name == "groupfree3d":
        num_epochs, at = (600, (420, 480, 540)) if oriented else (400, (280, 340))
        config.train.batch_size = 32  # of four devices
        epoch = num_scenes // config.train.batch_size
        config.optimizer.schedule, config.optimizer.decay_epochs = "steps", tuple(map(float, at))
        config.optimizer.warmup_steps, config.train.num_steps = 0, num_epochs * epoch
        config.train.eval_every = config.train.checkpoint_every = 10 * epoch
        return
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adam", 1e-3, 0.0
    config.optimizer.clip_norm, config.optimizer.warmup_steps = 0.0, 0
    config.optimizer.schedule, config.optimizer.decay_epochs = "steps", (80, 120, 160)
    config.norm_momentum = ConfigDict(dict(initial=0.5, factor=0.5, decay_epochs=20.0, floor=0.001))
    config.train.num_steps = 180 * epoch
    if name == "h3dnet":
        config.train.num_steps = 360 * epoch
        config.optimizer.decay_epochs = (160, 220, 260) if oriented else (80, 140, 200, 240)
        config.optimizer.learning_rate = 1e-3 if oriented else 1e-2
        if oriented:
            config.train.batch_size, config.train.num_steps = 16, 360 * (num_scenes // 16)
    config.train.eval_every = config.train.checkpoint_every = 10 * epoch


def use_distillation_schedule(config: ConfigDict, dataset: str) -> None:
    """AdamW, 180 epochs of batches of 8, cosine to zero; the refinement decays more than the student.

    Source: VRDistill, section 4.2. The learning rate on ScanNet is not given there; this is VoteNet's.
    """
    config.optimizer.name, config.optimizer.schedule = "adamw", "cosine"
    config.optimizer.learning_rate = 0.005 if dataset == "sunrgbd" else 1e-3
    config.optimizer.weight_decay = 1e-5
    config.optimizer.decay_epochs = ()
