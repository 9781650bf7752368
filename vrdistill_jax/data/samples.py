"""From one stored scene to the padded arrays that a network reads."""

from typing import Any

import numpy as np

from vrdistill_jax.data.augment import augment
from vrdistill_jax.geometry.host.boxes import points_in_boxes
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.structs import PointPyramid, Points, PyramidConfig, Scene, pad_boxes

VOTE_SLOTS = 3  # boxes per point that oriented, overlapping boxes may claim (SUN RGB-D)


def height_above_floor(xyz: np.ndarray) -> np.ndarray:
    """Height of each point above the lowest ones, metres.

    The floor is numpy's 0.99th percentile of z (the lowest 1 %, not the 99th percentile), as VoteNet computes it on the
    whole cloud before subsampling; its checkpoints depend on it.

    Args:
      xyz: f32[n, 3].

    Returns:
      f32[n].
    """
    return xyz[:, 2] - np.percentile(xyz[:, 2], 0.99).astype(np.float32)


def stack_features(xyz: np.ndarray, color: np.ndarray | None, names) -> np.ndarray:
    """The feature columns that a network asks for.

    Args:
      xyz: f32[n, 3] the whole cloud, z up, metres.
      color: f32[n, 3] in [0, 1], or None.
      names: config.detector.input_features, of "color" and "height".

    Returns:
      f32[n, F].

    Raises:
      ValueError: for an unknown name, or colour that the cloud does not have.
    """
    columns = [np.zeros((len(xyz), 0), np.float32)]
    for name in names:
        if name == "height":
            columns.append(height_above_floor(xyz)[:, None])
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
    count = min(len(xyz), capacity)
    rows = rng.permutation(len(xyz))[:capacity]
    points = Points(
        np.zeros((capacity, 3), np.float32),
        np.zeros((capacity, features.shape[1]), np.float32),
        np.arange(capacity) < count,
    )
    points.xyz[:count], points.features[:count] = xyz[rows], features[rows]
    return points, rows


def unlabelled_scene(
    xyz: np.ndarray, color: np.ndarray | None, num_points: int, input_features, rng: np.random.Generator
) -> Scene:
    """A scene for prediction: no boxes needed; arguments as in `stack_features` and `pad_points`."""
    points, _ = pad_points(xyz, stack_features(xyz, color, input_features), num_points, rng)
    return Scene(points, None, None, np.eye(4, dtype=np.float32), np.int32(-1), np.True_)


def labelled_scene(sample: dict, index: int, config: Any, rng: np.random.Generator, train: bool) -> Scene:
    """Subsamples, augments and pads one stored scene.

    Args:
      sample: as `data.sources` give them.
      index: its row in the dataset.
      config: the whole config: `dataset.num_points`, `dataset.max_boxes`, `dataset.augment`, `dataset.oriented`,
        `detector.input_features`.
      rng: decides the points taken and the augmentation.
      train: whether to augment.

    Returns:
      Scene without batch axis.
    """
    dataset = config.dataset
    matrix = np.eye(4)
    points_rng, augment_rng = rng.spawn(2)
    if train:
        sample, matrix = augment(sample, dataset.augment, augment_rng)
    features = stack_features(sample["xyz"], sample.get("color"), config.detector.input_features)
    points, rows = pad_points(sample["xyz"], features, dataset.num_points, points_rng)
    count = len(rows)
    center, size, yaw = sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"]
    if dataset.oriented:
        slots = np.full((dataset.num_points, VOTE_SLOTS), -1, np.int32)
        slots[:count] = vote_slots(points.xyz[:count], np.concatenate([center, size, yaw[:, None]], axis=1))
        vote_center = center
    else:
        slots = np.full((dataset.num_points, 1), -1, np.int32)
        slots[:count, 0] = sample["instance"][rows]
        vote_center = middle_of_instances(points.xyz[:count], slots[:count, 0], center)
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

    Source: VoteNet's ScanNet loader, which aims votes there and not at the labelled box centre.
    """
    middle = np.array(fallback, np.float32)
    for row in np.unique(instance[instance >= 0]):
        points = xyz[instance == row]
        middle[row] = 0.5 * (points.min(axis=0) + points.max(axis=0))
    return middle


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
    slots = np.full((len(xyz), VOTE_SLOTS), -1, np.int32)
    found = np.zeros(len(xyz), np.int32)
    for row, inside in enumerate(points_in_boxes(xyz, boxes).T):
        first = inside & (found == 0)
        slots[first] = row
        later = np.flatnonzero(inside & (found > 0))
        slots[later, np.minimum(found[later], VOTE_SLOTS - 1)] = row
        found += inside
    return slots


def scene_with_pyramid(scene: Scene, config: PyramidConfig) -> tuple[Scene, PointPyramid]:
    """Adds the geometry that every network reading this cloud shares."""
    return scene, build_point_pyramid(scene.points.xyz, scene.points.mask, config)
