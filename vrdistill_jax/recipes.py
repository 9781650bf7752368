"""Building blocks of config files: whole configs that a file in configs/ adjusts.

A config has the sections `detector` (architecture; all that a checkpoint needs at inference), `dataset`, `optimizer`,
`norm_momentum` and `train`, `seed`, and for distillation `teacher` and `distiller`. Every entry can be overridden on the
command line: --config.train.batch_size=4.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ml_collections import ConfigDict

from vrdistill_jax.data.augment import AUGMENTATIONS
from vrdistill_jax.data.class_tables import (
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
)
from vrdistill_jax.detectors import fcaf3d, groupfree3d, h3dnet, sr3d, three_detr, tr3d, votenet
from vrdistill_jax.distillers import find_distiller
from vrdistill_jax.geometry.host.voxel_pyramid import make_capacities
from vrdistill_jax.schedules_of_papers import SPARSE, use_distillation_schedule, use_published_schedule
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
    "light": (0.5, 64, ((512, 0.2, 16), (256, 0.4, 16), (128, 0.8, 16), (64, 1.2, 16)), 4096),
}

# Of 3DETR: width, queries, tokens of the encoder, decoder layers, points of a cloud.
THREE_DETR_SIZES = {
    "full": (1.0, 0, 0, 8, 20000),  # queries and tokens as published, by task
    "small": (0.5, 96, 768, 4, 4096),
    "light": (0.5, 64, 384, 3, 4096),
    "tiny": (0.125, 16, 64, 2, 1024),
}
# Of TR3D and SR3D: voxel size in metres, channels of the stem and of the later stages, residual blocks, points of a cloud.
SPARSE_SIZES = {
    "full": (0.01, 64, 128, (3, 4, 6, 3), 100000),
    "small": (0.02, 32, 64, (1, 1, 1, 1), 20000),
    "teacher": (0.03, 16, 48, (1, 1, 1, 1), 12000),
    "tiny": (0.08, 8, 8, (1, 1, 1, 1), 1024),
}
# Of FCAF3D: voxel size, channels of the stem, the stages and the head, residual blocks, points of a cloud.
FCAF3D_SIZES = {
    "full": (0.01, 64, (64, 128, 256, 512), 128, (3, 4, 6, 3), 100000),
    "small": (0.02, 16, (16, 32, 64, 64), 32, (1, 1, 1, 1), 20000),
    "teacher": (0.03, 16, (16, 32, 48, 48), 32, (1, 1, 1, 1), 12000),
    "tiny": (0.08, 8, (8, 8, 8, 8), 8, (1, 1, 1, 1), 1024),
}
# Voxels per level of the largest rooms that "small" meets, a little above the maxima of 60 small SynthRooms.
SMALL_SCENES = (20_000, 20_000, 14_000, 6_000, 2_000, 512, 128, 1_536, 14_000)
# The same of "teacher": what 80 % of batches of 4 need that SR3D's augmentation made, what all of 100 needed, and more.
TEACHER_SCENES = (
    (12_032, 9_984, 5_632, 2_112, 640, 192, 64, 640, 5_888),
    (12_032, 10_752, 7_168, 3_072, 1_024, 320, 64, 704, 6_912),
    (12_032, 12_032, 11_008, 4_800, 1_472, 448, 128, 1_472, 13_824),
)
# Of a student's hidden layers, as a share of its teacher's.
STUDENT_WIDTHS = {"same": 1.0, "half": 0.5, "quarter": 0.25}


def votenet_config(task: Task, size: str = "full") -> ConfigDict:
    """VoteNet on a task, with a training recipe that suits its size.

    Args:
      task: classes and boxes.
      size: "full" is the published architecture; "small" trains in minutes on two CPU cores; "teacher" reads half as many
        points at full width, for students to learn from (its size in docs/distillation.md); "light" is the same for
        detectors with more layers, at half of their width; "tiny" is for tests.

    Returns:
      A whole config; `dataset.name` is left for the caller to set.

    Raises:
      ValueError: for an unknown size.
    """
    width, num_proposals, levels, num_points = _find_size(size, VOTENET_SIZES)
    detector = votenet.default_config(task.class_names, task.mean_sizes, task.oriented)
    detector.width, detector.num_proposals, detector.levels = width, num_proposals, levels
    return _whole_config(detector, task, num_points, size)


def groupfree3d_config(task: Task, size: str = "full") -> ConfigDict:
    """Group-Free-3D (L6, O256 at full size) on a task; sizes as in `votenet_config`.

    Source of the recipe: Group-Free-3D, README. The decoder (its layers, projections and position embeddings) learns more
    slowly than backbone and heads: ten times where boxes are axis-aligned (ScanNet), twenty times where they are turned (SUN
    RGB-D).
    """
    width, num_proposals, levels, num_points = _find_size(size, VOTENET_SIZES)
    detector = groupfree3d.default_config(task.class_names, task.mean_sizes, task.oriented)
    detector.width, detector.num_proposals, detector.levels = width, num_proposals, levels
    if size != "full":
        detector.decoder_layers = 2 if size == "light" else 3
    if size == "light":
        detector.num_heads = 4  # of a quarter of this width as well
    config = _whole_config(detector, task, num_points, size)
    config.optimizer.learning_rate = 4e-3 if task.oriented else 6e-3
    config.optimizer.group_rates = ConfigDict({"decoder": 0.05 if task.oriented else 0.1})
    config.optimizer.weight_decay, config.optimizer.clip_norm = 1e-8 if task.oriented else 5e-4, 0.1
    return config


def h3dnet_config(task: Task, size: str = "full") -> ConfigDict:
    """H3DNet (four towers at full size, else one) on a task; sizes as in `votenet_config`.

    The numbers of points that make a face or an edge follow the number of points of a cloud; they are meant for 40,000.
    """
    width, num_proposals, levels, num_points = _find_size(size, VOTENET_SIZES)
    detector = h3dnet.default_config(task.class_names, task.mean_sizes, task.oriented)
    detector.width, detector.num_proposals, detector.levels = width, num_proposals, levels
    if size == "light":  # every proposal has 18 faces and edges, each with its neighbours
        detector.num_proposals, detector.match_neighbors = 32, 8
    if size != "full":
        detector.num_towers = 1
        for name in ("face_points", "edge_points"):
            detector.primitives[name] = max(detector.primitives[name] * num_points // 40000, 1)
    return _whole_config(detector, task, num_points, size)


def three_detr_config(task: Task, size: str = "full", masked: bool = False) -> ConfigDict:
    """3DETR (or 3DETR-m) on a task; sizes as in `votenet_config`, but without "teacher".

    Source of the recipe: 3detr, main.py and its README. Differs: the cosine starts after the warm-up and ends at zero.
    """
    width, num_proposals, tokens, layers, num_points = _find_size(size, THREE_DETR_SIZES)
    detector = three_detr.default_config(task.class_names, task.mean_sizes, task.oriented, masked)
    detector.width, detector.decoder_layers = width, layers
    if size != "full":
        detector.num_proposals = num_proposals
        levels = ((tokens, 0.2, 16), (tokens // 2, 0.4, 16))
        with detector.unlocked():
            detector.levels = levels if masked else levels[:1]
    config = _whole_config(detector, task, num_points, size)
    config.optimizer.learning_rate = 7e-4 if task.oriented else 5e-4
    config.optimizer.weight_decay, config.optimizer.clip_norm = 0.1, 0.1
    return config


def sparse_config(task: Task, size: str = "full", name: str = "sr3d") -> ConfigDict:
    """SR3D or TR3D on a task; sizes as in `votenet_config`. "teacher" also suppresses among fewer anchors.

    Source of the recipes: TR3D's configs; SR3D, section 4.1.
    """
    voxel_size, stem, channels, blocks, num_points = _find_size(size, SPARSE_SIZES)
    file = {"tr3d": tr3d, "sr3d": sr3d}[name]
    detector = file.default_config(task.class_names, task.mean_sizes, task.oriented)
    detector.voxel_size, detector.stem_size, detector.max_size = voxel_size, stem, channels
    with detector.unlocked():
        detector.num_blocks = blocks
        if size != "full":
            detector.capacities = make_capacities(SMALL_SCENES, num_rungs=2)
        if size == "teacher":
            detector.capacities, detector.num_candidates = TEACHER_SCENES, 300
    return _sparse_training(_whole_config(detector, task, num_points, size), size)


def _sparse_training(config: ConfigDict, size: str) -> ConfigDict:
    """Optimiser and batch size that TR3D, SR3D and FCAF3D share."""
    config.optimizer.learning_rate, config.optimizer.weight_decay = 1e-3, 1e-4
    if size == "full":
        config.train.batch_size = 16
    elif size == "small":
        config.train.batch_size, config.train.num_steps, config.train.eval_every = 4, 1600, 1600
    return config


def fcaf3d_config(task: Task, size: str = "full") -> ConfigDict:
    """FCAF3D on a task; sizes as in `sparse_config`.

    Source of the recipe: FCAF3D's configs. Differs: their batch of 16 is spread over two GPUs, each with its own batch norm.
    """
    voxel_size, stem, stages, head, blocks, num_points = _find_size(size, FCAF3D_SIZES)
    detector = fcaf3d.default_config(task.class_names, task.mean_sizes, task.oriented)
    detector.voxel_size, detector.stem_size, detector.head_size = voxel_size, stem, head
    detector.stage_sizes = stages
    with detector.unlocked():
        detector.num_blocks = blocks
        if size != "full":
            largest = fcaf3d.largest_levels(SMALL_SCENES)
            detector.capacities = make_capacities(largest, num_rungs=2 if size == "small" else 6)
        if size == "teacher":
            detector.capacities = tuple(fcaf3d.largest_levels(rung) for rung in TEACHER_SCENES)
            detector.num_candidates = 300
    return _sparse_training(_whole_config(detector, task, num_points, size), size)


def sr3d_variant(config: ConfigDict, variant: str) -> ConfigDict:
    """Exchanges parts of SR3D for its ablations and competitors.

    Args:
      config: a whole config of SR3D (of TR3D for the variant "tr3d"); changed in place.
      variant: of sr3d.VARIANTS.

    Returns:
      The config.

    Raises:
      ValueError: for an unknown variant.
    """
    if variant not in sr3d.VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(sr3d.VARIANTS)}")
    config.detector.update(sr3d.VARIANTS[variant])
    return config


DETECTOR_RECIPES: dict[str, Callable[[Task, str], ConfigDict]] = {
    "votenet": votenet_config,
    "groupfree3d": groupfree3d_config,
    "h3dnet": h3dnet_config,
    "3detr": three_detr_config,
    "3detr_m": partial(three_detr_config, masked=True),
    "tr3d": partial(sparse_config, name="tr3d"),
    "sr3d": sparse_config,
    "fcaf3d": fcaf3d_config,
}


def detector_config(detector: str, task: Task, size: str) -> ConfigDict:
    """A detector on a task, by name; `dataset.name` is left for the caller to set.

    Raises:
      ValueError: for an unknown detector or size.
    """
    if detector not in DETECTOR_RECIPES:
        raise ValueError(f"no recipe for detector {detector!r}; known: {', '.join(DETECTOR_RECIPES)}")
    return DETECTOR_RECIPES[detector](task, size)


def _find_size(size: str, sizes: dict[str, tuple]) -> tuple:
    if size not in sizes:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(sizes)}")
    return sizes[size]


def _whole_config(detector: ConfigDict, task: Task, num_points: int, size: str) -> ConfigDict:
    """The sections beside `detector`, with a training recipe for few steps."""
    config = ConfigDict()
    config.seed = 0
    config.detector = detector
    config.dataset = ConfigDict()
    config.dataset.name = ""
    config.dataset.data_dir = ""
    config.dataset.oriented = task.oriented
    config.dataset.num_points = num_points
    config.dataset.max_boxes = 64
    config.dataset.num_threads = 2
    config.dataset.num_workers = 0
    config.dataset.augment = augmentation(task, detector.name)

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


def augmentation(task: Task, detector: str = "votenet") -> ConfigDict:
    """The published augmentation of a detector: ScanNet's where boxes are axis-aligned, SUN RGB-D's where they are turned.

    Raises:
      ValueError: for an unknown detector.
    """
    if detector not in AUGMENTATIONS:
        raise ValueError(f"no augmentation for detector {detector!r}; known: {', '.join(AUGMENTATIONS)}")
    return ConfigDict(AUGMENTATIONS[detector][task.oriented]._asdict())


def synthrooms_config(size: str = "small", style: str = "scan", detector: str = "votenet") -> ConfigDict:
    """A detector on SynthRooms: style "scan" is ScanNet's task, "view" SUN RGB-D's; sizes as in `votenet_config`."""
    config = detector_config(detector, SUNRGBD if style == "view" else SCANNET, size)
    config.dataset.name = "synthrooms"
    config.dataset.style = style
    config.dataset.num_train = 64 if size == "tiny" else 1200
    config.dataset.num_val = 16 if size == "tiny" else 312
    small_rooms = size in ("teacher", "light") or (size == "small" and detector != "votenet")
    config.dataset.room_size = 0.0 if small_rooms else 1.0
    if size == "full":
        config.train.num_steps, config.train.eval_every, config.train.checkpoint_every = 27000, 1500, 1500
    return config


def scannet_config(size: str = "full", detector: str = "votenet") -> ConfigDict:
    """A detector on ScanNet, at full size with its published schedule."""
    config = detector_config(detector, SCANNET, size)
    config.dataset.name = "scannet"
    if size == "full":
        if detector not in SPARSE:
            config.dataset.num_points = 50000 if detector == "groupfree3d" else 40000
        use_published_schedule(config, num_scenes=1201)
    return config


def sunrgbd_config(size: str = "full", detector: str = "votenet") -> ConfigDict:
    """A detector on SUN RGB-D, at full size with its published schedule."""
    config = detector_config(detector, SUNRGBD, size)
    config.dataset.name = "sunrgbd"
    if size == "full":
        use_published_schedule(config, num_scenes=5285)
    return config


DATASETS: dict[str, Callable[..., ConfigDict]] = {
    "synthrooms": synthrooms_config,
    "synthrooms_view": partial(synthrooms_config, style="view"),
    "scannet": scannet_config,
    "sunrgbd": sunrgbd_config,
}


def student_config(
    methods: tuple[str, ...],
    width: str = "half",
    size: str = "teacher",
    dataset: str = "synthrooms",
    detector: str = "votenet",
    teacher: str = "",
) -> ConfigDict:
    """A narrow detector that learns from a trained one: the config of a distillation run.

    Args:
      methods: names of distillers, whose losses are added up; none of them trains the same student on its own, the
        comparison that a distiller is judged by.
      width: of STUDENT_WIDTHS, relative to the teacher.
      size: of the teacher, as its recipe knows it.
      dataset: of DATASETS.
      detector: of DETECTOR_RECIPES, the student's.
      teacher: likewise, the teacher's; "" for the student's.

    Returns:
      A whole config; `teacher.checkpoint` is left for the caller to set.

    Raises:
      ValueError: for an unknown name.
    """
    for name, known in ((width, STUDENT_WIDTHS), (dataset, DATASETS)):
        if name not in known:
            raise ValueError(f"unknown {name!r}; known: {', '.join(known)}")
    config = DATASETS[dataset](size, detector=detector)
    config.detector.width *= STUDENT_WIDTHS[width]
    if "cluster_sampling" in config.detector:
        # Clusters of student and teacher at the same seeds; at votes, partners are far apart (docs/distillation.md).
        config.detector.cluster_sampling = "seed_fps"
    if size == "full" and detector == "votenet":
        use_distillation_schedule(config, dataset)
    if not methods:
        return config
    config.optimizer.distiller_weight_decay = 1e-2
    config.optimizer.distiller_group_rates = ConfigDict({"refinement": 1.0})
    config.teacher = default_teacher_config(teacher or detector)
    config.distiller = ConfigDict({"methods": {}, "teacher_guided": teacher_guided.default_config()})
    with config.unlocked():
        for name in methods:
            config.distiller.methods[name] = find_distiller(name).default_config()
    return config


def default_teacher_config(detector: str = "votenet") -> ConfigDict:
    """The section `teacher` of a distillation run.

    Args:
      detector: the teacher's.

    Returns:
      A ConfigDict with
        checkpoint: a run's work directory or an imported checkpoint,
        detector: entries of the teacher's config.detector that are changed while it teaches (not where it is evaluated):
          if it clusters votes, its clusters are spread over seeds, as the student's,
        weights_sha256, mAP_25, mAP_50: filled in by training, for the record (a hash that is given is checked).
    """
    config = ConfigDict()
    config.checkpoint = ""
    clusters_votes = detector in ("votenet", "h3dnet")
    config.detector = ConfigDict({"cluster_sampling_eval": "seed_fps"} if clusters_votes else {})
    config.weights_sha256 = ""
    config.mAP_25 = config.mAP_50 = -1.0
    return config


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
    if "levels" not in config.detector:
        if factor > 1:
            raise ValueError(
                f"--density={factor}: {config.detector.name} reads voxels, all that there are; leave it out"
            )
        return
    config.dataset.num_points *= factor
    config.detector.num_proposals *= factor
    levels = [(factor * centers, radius, neighbors) for centers, radius, neighbors in config.detector.levels]
    with config.unlocked():
        config.detector.levels = tuple(levels)
