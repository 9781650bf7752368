"""Naive augmentation: one step after the other, point by point, in mmdetection3d's order and conventions."""

import math

import numpy as np


def flip_turn_scale_shift(sample, flip_x, flip_y, angle, scale, shift):
    """x-flip: x = -x, yaw = pi - yaw; y-flip: y = -y, yaw = -yaw; then a turn, a scale of everything, a shift.

    Returns:
      xyz, boxes_center, vote_center (if given), boxes_size, boxes_yaw and bounds_size: the axis-aligned extents of the
      corners of the final boxes.
    """
    cos, sin = math.cos(angle), math.sin(angle)

    def move(points):
        moved = []
        for x, y, z in np.asarray(points, float):
            x, y = (-x if flip_x else x), (-y if flip_y else y)
            x, y = cos * x - sin * y, sin * x + cos * y
            moved.append([scale * x + shift[0], scale * y + shift[1], scale * z + shift[2]])
        return np.array(moved)

    yaws = []
    for yaw in sample["boxes_yaw"].astype(float):
        yaw = math.pi - yaw if flip_x else yaw
        yaw = -yaw if flip_y else yaw
        yaws.append(yaw + angle)
    size = scale * sample["boxes_size"].astype(float)
    bounds = []
    for (length, width, height), yaw in zip(size, yaws, strict=True):
        corners = [
            (
                math.cos(yaw) * i * length / 2 - math.sin(yaw) * j * width / 2,
                math.sin(yaw) * i * length / 2 + math.cos(yaw) * j * width / 2,
            )
            for i in (-1, 1)
            for j in (-1, 1)
        ]
        bounds.append([*np.ptp(corners, axis=0), height])
    out = {"xyz": move(sample["xyz"]), "boxes_center": move(sample["boxes_center"])}
    if "vote_center" in sample:
        out["vote_center"] = move(sample["vote_center"])
    return out | {"boxes_size": size, "boxes_yaw": np.array(yaws), "bounds_size": np.array(bounds)}


def crop_is_allowed(points, new_points, boxes_center, kept_centers, min_share, min_points):
    """Whether a part of a cloud can be the result of 3DETR's random cuboid.

    Checks: all points inside the part's own bounds were kept; enough are left; each side is at most the cloud's; and of the
    boxes exactly those remain whose centre lies within the bounds of the part.
    """
    low, high = new_points.min(axis=0), new_points.max(axis=0)
    inside = [all(low[a] <= p[a] <= high[a] for a in range(3)) for p in points]
    expected = [c for c in boxes_center if all(low[a] <= c[a] <= high[a] for a in range(3))]
    return (
        sum(inside) == len(new_points) >= min_points
        and np.array_equal(np.array(expected).reshape(-1, 3), kept_centers)
        and len(expected) >= min(1, len(boxes_center))
    )
