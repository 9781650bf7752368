"""Building blocks of config files: whole configs that a file in configs/ adjusts.

A config has the sections `detector` (architecture; all that a checkpoint needs at inference), `dataset`, `optimizer`,
`norm_momentum` and `train`, `seed`, and for distillation `teacher` and `distiller`. Every entry can be overridden on the
command line: --config.train.batch_size=4.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ml_collections import ConfigDict

from vrdistill_jax.data.augment import Augmentation
from vrdistill_jax.data.class_tables import (
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
)
from vrdistill_jax.detectors import votenet
from vrdistill_jax.distillers import find_distiller
from vrdistill_jax.training import teacher_guided


class Task(NamedTuple):
    """What is to be found: classes, their mean sizes, and whether boxes are turned."""

    class_names: tuple[str, ...]
    mean_sizes: tuple[tuple[float, float, float], ...]  # metres
    oriented: bool


def _rows(sizes) -> tuple[tuple[float, float, float], ...]:
    return tuple((float(x), float(y), float(z)) for x, y, z in sizes)


SCANNET = Task(tuple(SCANNET_CLASSES), _rows(SCANNET_MEAN_SIZES), oriented=False)
SUNRGBD = Task(tuple(SUNRGBD_CLASSES), _rows(SUNRGBD_MEAN_SIZES), oriented=True)

# Sizes of VoteNet: width, proposals, set abstractions (centres, radius in metres, neighbours), points of a cloud.
VOTENET_SIZES = {
    "full": (1.0, 256, ((2048, 0.2, 64), (1024, 0.4, 32), (512, 0.8, 16), (256, 1.2, 16)), 20000),
    "small": (0.5, 128, ((1024, 0.2, 32), (512, 0.4, 16), (256, 0.8, 16), (128, 1.2, 16)), 8192),
    "tiny": (0.25, 32, ((128, 0.3, 8), (64, 0.6, 8), (32, 0.8, 8), (16, 1.2, 8)), 1024),
    "teacher": (1.0, 96, ((768, 0.2, 16), (384, 0.4, 16), (192, 0.8, 16), (96, 1.2, 16)), 4096),
}


# Of a student's hidden layers, as a share of its teacher's.
STUDENT_WIDTHS = {"same": 1.0, "half": 0.5, "quarter": 0.25}


def votenet_config(task: Task, size: str = "full") -> ConfigDict:
    """VoteNet on a task, with a training recipe that suits its size.

    Args:
      task: classes and boxes.
      size: "full" is the published architecture; "small" trains in minutes on two CPU cores; "teacher" reads half as many
        points at full width, for students to learn from (its size in docs/distillation.md); "tiny" is for tests.

    Returns:
      A whole config; `dataset.name` is left for the caller to set.

    Raises:
      ValueError: for an unknown size.
    """
    if size not in VOTENET_SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(VOTENET_SIZES)}")
    width, num_proposals, levels, num_points = VOTENET_SIZES[size]
    config = ConfigDict()
    config.seed = 0
    config.detector = votenet.default_config(task.class_names, task.mean_sizes, task.oriented)
    config.detector.width, config.detector.num_proposals, config.detector.levels = (
        width,
        num_proposals,
        levels,
    )

    config.dataset = ConfigDict()
    config.dataset.name = ""
    config.dataset.data_dir = ""
    config.dataset.oriented = task.oriented
    config.dataset.num_points = num_points
    config.dataset.max_boxes = 64
    config.dataset.num_threads = 2
    config.dataset.num_workers = 0
    config.dataset.augment = augmentation(task)

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
    config.train.num_steps = 4 if size == "tiny" else 1800
    config.train.eval_every = 2 if size == "tiny" else 900
    config.train.checkpoint_every = 2 if size == "tiny" else 300
    config.train.log_every = 1 if size == "tiny" else 10
    config.train.sync_batch_norm = False
    config.train.eval_batch_size = 4 if size == "tiny" else 8
    return config


# What is done to training scenes, per detector: (axis-aligned boxes: ScanNet, turned boxes: SUN RGB-D). Colour steps take
# effect only where the detector reads colour. docs/data.md says where the numbers are from.
_VOTENET = (
    Augmentation(flip_x=0.5, flip_y=0.5, max_turn=math.radians(5), refit_boxes=True),
    Augmentation(
        flip_x=0.5,
        max_turn=math.radians(30),
        max_scale=0.15,
        color_gain=0.2,
        color_shift=0.05,
        color_jitter=0.025,
        color_drop=0.3,
    ),
)
_THREE_DETR = (
    _VOTENET[0]._replace(crop="first", crop_min_share=0.5, crop_min_aspect=0.8),
    _VOTENET[1]._replace(crop="last", crop_min_share=0.75, crop_min_aspect=0.75),
)
_TR3D = (
    Augmentation(
        points_share=(0.33, 1.0),
        flip_x=0.5,
        flip_y=0.5,
        max_turn=0.02,
        max_scale=0.1,
        shift_std=0.1,
        refit_boxes=True,
    ),
    Augmentation(flip_x=0.5, max_turn=math.radians(30), max_scale=0.15, shift_std=0.1),
)
AUGMENTATIONS = {
    "votenet": _VOTENET,
    "groupfree3d": _VOTENET,
    "h3dnet": _VOTENET,
    "3detr": _THREE_DETR,
    "3detr_m": _THREE_DETR,
    "fcaf3d": (_TR3D[0]._replace(points_share=(1.0, 1.0), max_turn=math.radians(5)), _TR3D[1]),
    "tr3d": _TR3D,
    "sr3d": (_TR3D[0]._replace(max_turn=math.radians(5), max_scale=0.4), _TR3D[1]),
}


def augmentation(task: Task, detector: str = "votenet") -> ConfigDict:
    """The published augmentation of a detector: ScanNet's where boxes are axis-aligned, SUN RGB-D's where they are turned.

    Raises:
      ValueError: for an unknown detector.
    """
    if detector not in AUGMENTATIONS:
        raise ValueError(f"no augmentation for detector {detector!r}; known: {', '.join(AUGMENTATIONS)}")
    return ConfigDict(AUGMENTATIONS[detector][task.oriented]._asdict())


def use_published_schedule(config: ConfigDict, num_scenes: int) -> None:
    """Sets VoteNet's training recipe: Adam, 180 epochs of batches of 8, steps at 80, 120 and 160, falling norm momentum.

    Source: votenet, train.py.
    """
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adam", 1e-3, 0.0
    config.optimizer.clip_norm, config.optimizer.warmup_steps = 0.0, 0
    config.optimizer.schedule, config.optimizer.decay_epochs = "steps", (80, 120, 160)
    config.norm_momentum = ConfigDict(dict(initial=0.5, factor=0.5, decay_epochs=20.0, floor=0.001))
    epoch = num_scenes // config.train.batch_size
    config.train.num_steps = 180 * epoch
    config.train.eval_every = config.train.checkpoint_every = 10 * epoch


def synthrooms_config(size: str = "small", style: str = "scan") -> ConfigDict:
    """VoteNet on SynthRooms: style "scan" is ScanNet's task, "view" SUN RGB-D's; sizes as in `votenet_config`."""
    config = votenet_config(SUNRGBD if style == "view" else SCANNET, size)
    config.dataset.name = "synthrooms"
    config.dataset.style = style
    config.dataset.num_train = 64 if size == "tiny" else 1200
    config.dataset.num_val = 16 if size == "tiny" else 312
    config.dataset.room_size = 0.0 if size == "teacher" else 1.0
    if size == "full":
        config.train.num_steps, config.train.eval_every, config.train.checkpoint_every = 27000, 1500, 1500
    return config


def scannet_config(size: str = "full") -> ConfigDict:
    """VoteNet on ScanNet with its published schedule at full size."""
    config = votenet_config(SCANNET, size)
    config.dataset.name = "scannet"
    if size == "full":
        config.dataset.num_points = 40000
        use_published_schedule(config, num_scenes=1201)
    return config


def sunrgbd_config(size: str = "full") -> ConfigDict:
    """VoteNet on SUN RGB-D with its published schedule at full size."""
    config = votenet_config(SUNRGBD, size)
    config.dataset.name = "sunrgbd"
    if size == "full":
        config.dataset.num_points = 20000
        use_published_schedule(config, num_scenes=5285)
    return config


DATASETS: dict[str, Callable[..., ConfigDict]] = {
    "synthrooms": synthrooms_config,
    "synthrooms_view": partial(synthrooms_config, style="view"),
    "scannet": scannet_config,
    "sunrgbd": sunrgbd_config,
}


def student_config(
    methods: tuple[str, ...], width: str = "half", size: str = "teacher", dataset: str = "synthrooms"
) -> ConfigDict:
    """A narrow VoteNet that learns from a trained one: the config of a distillation run.

    Args:
      methods: names of distillers, whose losses are added up; none of them trains the same student on its own, the
        comparison that a distiller is judged by.
      width: of STUDENT_WIDTHS, relative to the teacher.
      size: of the teacher, as in `votenet_config`.
      dataset: of DATASETS.

    Returns:
      A whole config; `teacher.checkpoint` is left for the caller to set.

    Raises:
      ValueError: for an unknown name.
    """
    for name, known in ((width, STUDENT_WIDTHS), (dataset, DATASETS)):
        if name not in known:
            raise ValueError(f"unknown {name!r}; known: {', '.join(known)}")
    config = DATASETS[dataset](size)
    config.detector.width *= STUDENT_WIDTHS[width]
    if size == "full":
        _use_distillation_schedule(config, dataset)
    if not methods:
        return config
    config.optimizer.distiller_weight_decay = 1e-2
    config.teacher = default_teacher_config()
    config.distiller = ConfigDict({"methods": {}, "teacher_guided": teacher_guided.default_config()})
    with config.unlocked():
        for name in methods:
            config.distiller.methods[name] = find_distiller(name).default_config()
    return config


def default_teacher_config() -> ConfigDict:
    """The section `teacher` of a distillation run.

    Returns:
      A ConfigDict with
        checkpoint: a run's work directory or an imported checkpoint,
        detector: entries of the teacher's config.detector that are changed while it teaches (not where it is evaluated):
          its clusters are spread over votes, as in training,
        weights_sha256, mAP_25, mAP_50: filled in by training, for the record (a hash that is given is checked).
    """
    config = ConfigDict()
    config.checkpoint = ""
    config.detector = ConfigDict({"cluster_sampling_eval": "vote_fps"})
    config.weights_sha256 = ""
    config.mAP_25 = config.mAP_50 = -1.0
    return config


def _use_distillation_schedule(config: ConfigDict, dataset: str) -> None:
    """AdamW, 180 epochs of batches of 8, cosine to zero; the refinement decays more than the student.

    Source: VRDistill, section 4.2. The learning rate on ScanNet is not given there; this is VoteNet's.
    """
    config.optimizer.name, config.optimizer.schedule = "adamw", "cosine"
    config.optimizer.learning_rate = 0.005 if dataset == "sunrgbd" else 1e-3
    config.optimizer.weight_decay = 1e-5
    config.optimizer.decay_epochs = ()


def densify(config: ConfigDict, factor: int) -> None:
    """Makes a trained detector read more points: as many times more points, centres per level and proposals.

    A detector trained on few points finds more in rooms larger than those that it was trained on if it samples them as
    densely. Weights do not depend on these numbers; radii and neighbours per centre stay.

    Args:
      config: a whole config of a detector that reads a point pyramid; changed in place.
      factor: 1 changes nothing.

    Raises:
      ValueError: if the factor is not a positive whole number.
    """
    if factor < 1:
        raise ValueError(f"--density={factor} must be 1 or more")
    config.dataset.num_points *= factor
    config.detector.num_proposals *= factor
    levels = [(factor * centers, radius, neighbors) for centers, radius, neighbors in config.detector.levels]
    with config.unlocked():
        config.detector.levels = tuple(levels)
