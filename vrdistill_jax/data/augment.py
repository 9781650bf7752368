"""Random changes of a scene that keep its labels true.

A scene here is the sample dict that sources give: xyz f32[n, 3], color f32[n, 3], instance i32[n], boxes_center f32[g, 3],
boxes_size f32[g, 3], boxes_yaw f32[g], boxes_label i32[g] and, where it is stored, vote_center f32[g, 3]. A scene without
`color` keeps being without. Functions return a new dict and leave the given one as it is.

The steps, in order: take a share of the points, crop ("first"), flip x, flip y, turn, scale, shift, crop ("last"), colours.
docs/data.md lists what each detector family uses.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from vrdistill_jax.data.crops import crop_sample, take_points

CROPS = ("never", "first", "last")


class Augmentation(NamedTuple):
    """`config.dataset.augment`: what is done to a training scene. The defaults do nothing."""

    points_share: tuple[float, float] = (1.0, 1.0)  # keep a share of the points, uniform between the two
    flip_x: float = 0.0  # probability of mirroring x
    flip_y: float = 0.0  # probability of mirroring y
    max_turn: float = 0.0  # radians; the turn about z is uniform in +-max_turn
    max_scale: float = 0.0  # 0.15 for a factor uniform in [0.85, 1.15]
    shift_std: float = 0.0  # metres; the shift is normal on each axis
    refit_boxes: bool = (
        False  # True where boxes are axis-aligned: a turned box becomes its bounds, so sizes grow
    )
    crop: str = "never"  # a random cuboid: "first" before the other steps, "last" after them
    crop_min_share: float = (
        0.5  # of the cloud's extent, per axis; the share is uniform in [crop_min_share, 1]
    )
    crop_min_aspect: float = 0.8  # the two shares of at least one pair of axes must be this alike
    crop_min_points: int = 30000  # left in the crop; clouds of less than 50,000 points must keep 60 %
    color_gain: float = 0.0  # 0.2 for a factor per channel uniform in [0.8, 1.2]
    color_shift: float = 0.0  # 0.05 for a summand per channel uniform in +-0.05
    color_jitter: float = 0.0  # 0.025 for a summand per point, the same for its channels, uniform in +-0.025
    color_drop: float = 0.0  # probability that a point's colour becomes black


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


def read_augmentation(config: Any) -> Augmentation:
    """Reads and checks `config.dataset.augment`; what it does not name is off.

    Args:
      config: an Augmentation, a mapping or ConfigDict, or an object with such attributes.

    Raises:
      ValueError: naming an unknown entry, or the value that is out of range and its limits.
    """
    if isinstance(config, Augmentation):
        steps = config
    else:
        entries = dict(config.items()) if hasattr(config, "items") else dict(vars(config))
        unknown = sorted(set(entries) - set(Augmentation._fields))
        if unknown:
            raise ValueError(
                f"config.dataset.augment has an unknown entry {unknown[0]!r}; known: {', '.join(Augmentation._fields)}"
            )
        steps = Augmentation(**entries)
    limits = {
        "flip_x": (0, 1),
        "flip_y": (0, 1),
        "max_turn": (0, np.pi),
        "max_scale": (0, 0.99),
        "shift_std": (0, np.inf),
        "crop_min_share": (0.01, 1),
        "crop_min_aspect": (0, 1),
        "crop_min_points": (1, np.inf),
        "color_gain": (0, 1),
        "color_shift": (0, 1),
        "color_jitter": (0, 1),
        "color_drop": (0, 1),
    }
    for name, (low, high) in limits.items():
        value = getattr(steps, name)
        if not low <= value <= high:
            raise ValueError(f"config.dataset.augment.{name} is {value}; it must lie in [{low:g}, {high:g}]")
    if steps.crop not in CROPS:
        raise ValueError(f"config.dataset.augment.crop is {steps.crop!r}; known: {', '.join(CROPS)}")
    if len(steps.points_share) != 2 or not 0 < steps.points_share[0] <= steps.points_share[1] <= 1:
        raise ValueError(
            f"config.dataset.augment.points_share is {steps.points_share}; it must be (low, high) with 0 < low <= high <= 1"
        )
    return steps


def augment(sample: dict, config: Any, rng: np.random.Generator) -> tuple[dict, np.ndarray]:
    """Changes a training scene at random, as the config says.

    Args:
      sample: a scene.
      config: an Augmentation, or what `read_augmentation` reads.
      rng: source of randomness. Each step has a stream of its own, so that switching one on or off leaves the draws of
        the others as they are.

    Returns:
      (new sample, f64[4, 4] that maps the old coordinates to the new ones). Points and boxes may be fewer than before.

    Source: VoteNet, scannet_detection_dataset.py and sunrgbd_detection_dataset.py; 3DETR, random_cuboid.py; mmdetection3d,
    RandomFlip3D and GlobalRotScaleTrans (TR3D, FCAF3D).
    """
    steps = read_augmentation(config)
    share_rng, crop_rng, shift_rng, color_rng = rng.spawn(4)
    low, high = steps.points_share
    if low < 1:
        count = len(sample["xyz"])
        kept = max(int(count * share_rng.uniform(low, high)), 1)
        sample = take_points(sample, share_rng.permutation(count)[:kept])
    if steps.crop == "first":
        sample = _crop(sample, steps, crop_rng)
    matrix = _draw_matrix(steps, rng, shift_rng)
    sample = transform_sample(sample, matrix, steps.refit_boxes)
    if steps.crop == "last":
        sample = _crop(sample, steps, crop_rng)
    changes_color = steps.color_gain or steps.color_shift or steps.color_jitter or steps.color_drop
    if changes_color and sample.get("color") is not None:
        sample = {**sample, "color": change_color(sample["color"], steps, color_rng)}
    return sample, matrix


def _crop(sample: dict, steps: Augmentation, rng: np.random.Generator) -> dict:
    return crop_sample(sample, steps.crop_min_share, steps.crop_min_aspect, steps.crop_min_points, rng)


def _draw_matrix(steps: Augmentation, rng: np.random.Generator, shift_rng: np.random.Generator) -> np.ndarray:
    """Flip x, flip y, turn, scale, shift, in this order, as one f64[4, 4]."""
    flip_x, flip_y, turn, stretch = rng.random(4)
    angle = (2 * turn - 1) * steps.max_turn
    scale = 1.0 + (2 * stretch - 1) * steps.max_scale
    flip = np.diag([-1.0 if flip_x < steps.flip_x else 1.0, -1.0 if flip_y < steps.flip_y else 1.0, 1.0])
    rotation = np.eye(3)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix = np.eye(4)
    matrix[:3, :3] = scale * rotation @ flip
    matrix[:3, 3] = shift_rng.normal(0.0, steps.shift_std, 3)
    return matrix


def transform_sample(sample: dict, matrix: np.ndarray, refit_boxes: bool) -> dict:
    """Applies mirroring, a turn about z, a uniform scale and a shift to points and boxes.

    Args:
      sample: a scene.
      matrix: f64[4, 4] made of those four only.
      refit_boxes: True keeps boxes axis-aligned (yaw 0), replacing a turned box by its bounds.

    Returns:
      A new sample.
    """
    linear, shift = matrix[:3, :3], matrix[:3, 3]
    scale = np.linalg.norm(linear[0])
    out = dict(sample)
    out["xyz"] = sample["xyz"] @ linear.T.astype(np.float32)
    out["xyz"] += shift.astype(np.float32)
    for name in ("boxes_center", "vote_center"):
        if name in sample:
            out[name] = (sample[name].astype(np.float64) @ linear.T + shift).astype(np.float32)
    size = sample["boxes_size"].astype(np.float64) * scale
    yaw = sample["boxes_yaw"].astype(np.float64)
    direction = np.stack([np.cos(yaw), np.sin(yaw)], axis=1) @ linear[:2, :2].T
    if refit_boxes:
        cos, sin = np.abs(direction.T) / scale
        length, width, height = size.T
        size = np.stack([cos * length + sin * width, sin * length + cos * width, height], axis=1)
        out["boxes_yaw"] = np.zeros(len(yaw), np.float32)
    else:
        yaw = np.arctan2(direction[:, 1], direction[:, 0]).astype(np.float32)
        out["boxes_yaw"] = np.where(yaw >= np.float32(np.pi), -yaw, yaw)  # [-pi, pi)
    out["boxes_size"] = size.astype(np.float32)
    return out


def change_color(color: np.ndarray, steps: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness and tint of a cloud and each point's brightness, and blackens some points.

    Args:
      color: f32[n, 3] in [0, 1].
      steps: its four `color_` entries.
      rng: source of randomness.

    Returns:
      f32[n, 3] in [0, 1].

    Source: VoteNet, sunrgbd_detection_dataset.py.
    """
    gain = 1 + steps.color_gain * (2 * rng.random(3) - 1)
    shift = steps.color_shift * (2 * rng.random(3) - 1)
    jitter = np.float32(steps.color_jitter) * (2 * rng.random(len(color), np.float32) - 1)
    kept = rng.random(len(color), np.float32) >= steps.color_drop
    changed = color * gain.astype(np.float32) + shift.astype(np.float32) + jitter[:, None]
    return np.clip(changed, 0, 1, out=changed) * kept[:, None]
