"""From one stored scene to the padded arrays that a network reads."""

from typing import Any

import numba
import numpy as np

from vrdistill_jax.data.augment import augment
from vrdistill_jax.geometry.host.boxes import FACE_MARGIN
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid
from vrdistill_jax.structs import (
    AnyPyramid,
    AnyPyramidConfig,
    Points,
    Scene,
    VoxelPyramidConfig,
    pad_boxes,
)

VOTE_SLOTS = 3  # boxes per point that oriented, overlapping boxes may claim (SUN RGB-D)


def find_floor(xyz: np.ndarray) -> np.float32:
    """Level of the lowest points, metres.

    It is numpy's 0.99th percentile of z (the lowest 1 %, not the 99th percentile), as VoteNet computes it on the whole cloud
    before anything is done to it; its checkpoints depend on it.

    Args:
      xyz: f32[n, 3].
    """
    return np.percentile(xyz[:, 2], 0.99).astype(np.float32)


def height_above_floor(xyz: np.ndarray) -> np.ndarray:
    """Height of each point above `find_floor`, f32[n] metres."""
    return xyz[:, 2] - find_floor(xyz)


def stack_features(
    xyz: np.ndarray, color: np.ndarray | None, names, floor: np.float32 | None = None
) -> np.ndarray:
    """The feature columns that a network asks for.

    Args:
      xyz: f32[n, 3] z up, metres.
      color: f32[n, 3] in [0, 1], or None.
      names: config.detector.input_features, of "color" and "height".
      floor: z from which height is measured, metres; None for `find_floor` of `xyz`, which is then the whole cloud.

    Returns:
      f32[n, F].

    Raises:
      ValueError: for an unknown name, or colour that the cloud does not have.
    """
    columns = [np.zeros((len(xyz), 0), np.float32)]
    for name in names:
        if name == "height":
            level = find_floor(xyz) if floor is None else floor
            columns.append(xyz[:, 2:] - level)
        elif name == "color":
            if color is None:
                raise ValueError(
                    "the detector reads colour but this cloud has none; use a model without colour"
                )
            columns.append(color)
        else:
            raise ValueError(f"unknown input feature {name!r}; known: color, height")
    return np.concatenate(columns, axis=1, dtype=np.float32)


def pad_points(xyz: np.ndarray, features: np.ndarray, capacity: int, rng: np.random.Generator):
    """Draws `capacity` points without replacement, or pads a smaller cloud.

    Returns:
      (Points without batch axis, i64[m] the rows taken, in order).
    """
    rows = rng.permutation(len(xyz))[:capacity]
    return _pad(xyz[rows], features[rows], capacity), rows


def _pad(xyz: np.ndarray, features: np.ndarray, capacity: int) -> Points:
    """Points of `capacity` rows, zeros after the given ones."""
    count = len(xyz)
    points = Points(
        np.empty((capacity, 3), np.float32),
        np.empty((capacity, features.shape[1]), np.float32),
        np.arange(capacity) < count,
    )
    points.xyz[:count], points.features[:count] = xyz, features
    points.xyz[count:], points.features[count:] = 0, 0
    return points


def unlabelled_scene(
    xyz: np.ndarray, color: np.ndarray | None, num_points: int, input_features, rng: np.random.Generator
) -> Scene:
    """A scene for prediction: no boxes needed; arguments as in `stack_features` and `pad_points`."""
    points, _ = pad_points(xyz, stack_features(xyz, color, input_features), num_points, rng)
    return Scene(points, None, None, np.eye(4, dtype=np.float32), np.int32(-1), np.True_)


def select_features(points: Points, names: tuple[str, ...], wanted: tuple[str, ...]) -> Points:
    """Points with some of their feature columns.

    Args:
      points: f32[..., F] columns by `names`, as `stack_features` makes them.
      names: of "color" (three columns) and "height" (one).
      wanted: of `names`.
    """
    ends = np.cumsum([3 if name == "color" else 1 for name in names])
    columns = dict(zip(names, np.split(points.features, ends[:-1], axis=-1) if names else (), strict=True))
    picked = [columns[name] for name in wanted] or [points.features[..., :0]]
    return points._replace(features=np.concatenate(picked, axis=-1))


def labelled_scene(
    sample: dict,
    index: int,
    config: Any,
    rng: np.random.Generator,
    train: bool,
    features: tuple | None = None,
) -> Scene:
    """Augments, subsamples and pads one stored scene.

    Args:
      sample: as `data.sources` give them.
      index: its row in the dataset.
      config: the whole config: `dataset.num_points`, `dataset.max_boxes`, `dataset.augment`, `dataset.oriented`,
        `detector.input_features`.
      rng: decides the points taken and the augmentation.
      train: whether to augment.
      features: columns to make instead of `detector.input_features`.

    Returns:
      Scene without batch axis.
    """
    dataset, names = config.dataset, config.detector.input_features if features is None else features
    matrix = np.eye(4)
    points_rng, augment_rng = rng.spawn(2)
    floor = find_floor(sample["xyz"]) if "height" in names else None
    if train:
        if "color" not in names:
            sample = {key: value for key, value in sample.items() if key != "color"}  # nothing to augment
        sample, matrix = augment(sample, dataset.augment, augment_rng)
        if floor is not None:  # it moves with the cloud; a crop does not change it
            floor = np.float32(matrix[2, 2] * floor + matrix[2, 3])
    count = min(len(sample["xyz"]), dataset.num_points)
    rows = points_rng.permutation(len(sample["xyz"]))[:count]
    xyz = sample["xyz"][rows]
    color = sample["color"][rows] if "color" in names and sample.get("color") is not None else None
    points = _pad(xyz, stack_features(xyz, color, names, floor), dataset.num_points)
    center, size, yaw = sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"]
    if dataset.oriented:
        slots = np.full((dataset.num_points, VOTE_SLOTS), -1, np.int32)
        slots[:count] = vote_slots(xyz, np.concatenate([center, size, yaw[:, None]], axis=1))
        vote_center = center
    else:
        slots = np.full((dataset.num_points, 1), -1, np.int32)
        slots[:count, 0] = sample["instance"][rows]
        vote_center = middle_of_instances(xyz, slots[:count, 0], center)
    boxes = pad_boxes(center, size, yaw, sample["boxes_label"], dataset.max_boxes, vote_center)
    return Scene(points, boxes, slots, matrix.astype(np.float32), np.int32(index), np.True_)


def middle_of_instances(xyz: np.ndarray, instance: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Middle of the bounds of each instance's points; `fallback` where it has none.

    Args:
      xyz: f32[n, 3].
      instance: i32[n] rows of `fallback`, -1 none.
      fallback: f32[g, 3] box centres.

    Returns:
      f32[g, 3].

    Raises:
      ValueError: for an instance that has no row.

    Source: VoteNet's ScanNet loader, which aims votes there and not at the labelled box centre.
    """
    if np.max(instance, initial=-1) >= len(fallback):
        raise ValueError(
            f"a point is of instance {np.max(instance)} but there are {len(fallback)} boxes; instances are rows of the boxes"
        )
    low, high = _instance_bounds(
        np.ascontiguousarray(xyz, np.float32), np.asarray(instance, np.int32), len(fallback)
    )
    return np.where(low <= high, np.float32(0.5) * (low + high), np.asarray(fallback, np.float32))


@numba.njit(cache=True, nogil=True)
def _instance_bounds(xyz, instance, count):
    """Lowest and highest coordinates of each instance; low > high where it has no points."""
    low = np.full((count, 3), np.float32(3e38), np.float32)
    high = np.full((count, 3), np.float32(-3e38), np.float32)
    for point in range(len(xyz)):
        row = instance[point]
        if row >= 0:
            for axis in range(3):
                low[row, axis] = min(low[row, axis], xyz[point, axis])
                high[row, axis] = max(high[row, axis], xyz[point, axis])
    return low, high


def vote_slots(xyz: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The boxes that each point may vote for, where boxes overlap.

    Args:
      xyz: f32[n, 3].
      boxes: f32[g, 7].

    Returns:
      i32[n, 3] rows of `boxes`, -1 none: the first box that holds the point fills all slots, a second one replaces the
      second slot, each later one the third.

    Source: VoteNet, sunrgbd_data.py.
    """
    boxes = np.asarray(boxes, np.float64)
    turn = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], axis=1)
    return _vote_slots(np.ascontiguousarray(xyz), boxes[:, :6].copy(), turn)


@numba.njit(cache=True, nogil=True)
def _vote_slots(xyz, boxes, turn):
    """The test of `geometry.host.boxes.points_in_boxes`, point by point, without its temporaries."""
    slots = np.full((len(xyz), VOTE_SLOTS), -1, np.int32)
    half = boxes[:, 3:6] / 2 + FACE_MARGIN
    for row in range(len(boxes)):
        if min(boxes[row, 3], boxes[row, 4], boxes[row, 5]) <= 0:
            half[row] = -1.0  # an empty box holds nothing
    reach = np.sqrt(half[:, 0] ** 2 + half[:, 1] ** 2) * 1.001  # a quick test that most points fail
    for point in range(len(xyz)):
        x, y, z = xyz[point]
        found = 0
        for row in range(len(boxes)):
            dx, dy, dz = x - boxes[row, 0], y - boxes[row, 1], z - boxes[row, 2]
            if not (abs(dx) <= reach[row] and abs(dy) <= reach[row] and abs(dz) <= half[row, 2]):
                continue
            cos, sin = turn[row]
            if abs(cos * dx + sin * dy) <= half[row, 0] and abs(cos * dy - sin * dx) <= half[row, 1]:
                if found == 0:
                    slots[point] = row
                else:
                    slots[point, min(found, VOTE_SLOTS - 1)] = row
                found += 1
    return slots


def scene_with_pyramid(scene: Scene, config: AnyPyramidConfig) -> tuple[Scene, AnyPyramid]:
    """Adds the geometry that every network reading this cloud shares; `loader.stack_scenes` makes a batch of several."""
    if isinstance(config, VoxelPyramidConfig):
        return scene, build_voxel_pyramid(scene.points.xyz, scene.points.mask, config)
    return scene, build_point_pyramid(scene.points.xyz, scene.points.mask, config)
