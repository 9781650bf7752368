"""Parts of a scene: some of its points, some of its boxes, a random cuboid."""

import numpy as np

NUM_TRIES = 100
# The reference asks for 30,000 of the 50,000 points that it stores per scene; smaller clouds keep the same share.
MIN_POINTS_SHARE = 30000 / 50000
_PER_POINT = ("xyz", "color", "instance")
_PER_BOX = ("boxes_center", "boxes_size", "boxes_yaw", "boxes_label", "vote_center")


def take_points(sample: dict, rows: np.ndarray) -> dict:
    """The scene with some of its points.

    Args:
      sample: a scene as `data.augment` describes it.
      rows: i[m] rows, or bool[n].

    Returns:
      A new sample.
    """
    return {**sample, **{k: sample[k][rows] for k in _PER_POINT if sample.get(k) is not None}}


def take_boxes(sample: dict, keep: np.ndarray) -> dict:
    """The scene with some of its boxes; the points of the others belong to no object.

    Args:
      sample: a scene as `data.augment` describes it.
      keep: bool[g].

    Returns:
      A new sample.
    """
    new_row = np.where(keep, np.cumsum(keep) - 1, -1)
    new_row = np.append(new_row, -1).astype(np.int32)  # the last entry answers for instance -1
    boxes = {name: sample[name][keep] for name in _PER_BOX if name in sample}
    return {**sample, **boxes, "instance": new_row[sample["instance"]]}


def crop_sample(
    sample: dict, min_share: float, min_aspect: float, min_points: int, rng: np.random.Generator
) -> dict:
    """Crops a scene to a random cuboid around one of its points.

    Each try draws the cuboid's share of the cloud's extent per axis, uniform in [min_share, 1], and a point as its centre. It
    is taken if the two shares of some pair of axes differ by a factor of at most 1 / min_aspect, enough points are left and,
    in a scene with boxes, the centre of at least one box lies within the extent of the points left. Boxes whose centre
    does not are removed; the others keep their full size.

    Args:
      sample: a scene as `data.augment` describes it.
      min_share: in (0, 1].
      min_aspect: in [0, 1].
      min_points: points that must be left; of clouds of fewer than min_points / 0.6, 60 % of theirs.
      rng: source of randomness.

    Returns:
      A new sample; the given one if 100 tries find no such cuboid.

    Source: 3DETR, random_cuboid.py (box filter "center").
    Differs: the demand on the points shrinks with small clouds, which the reference would never crop.
    """
    xyz = sample["xyz"]
    x, y, z = np.ascontiguousarray(xyz.T)  # whole columns compare several times faster
    extent = np.array([x.max() - x.min(), y.max() - y.min(), z.max() - z.min()])
    needed = min(min_points, int(np.ceil(MIN_POINTS_SHARE * len(xyz))))
    centers = sample["boxes_center"]
    for _ in range(NUM_TRIES):
        share = rng.uniform(min_share, 1.0, 3)
        small, middle, large = np.sort(share)
        if max(small / middle, middle / large) < min_aspect:  # the third pair is never more alike than these
            continue
        center = xyz[rng.integers(len(xyz))]
        low, high = center - share * extent / 2, center + share * extent / 2
        low, high = low.astype(np.float32), high.astype(np.float32)
        inside = (x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1])
        inside &= (z >= low[2]) & (z <= high[2])
        if np.count_nonzero(inside) < needed:
            continue
        part = take_points(sample, inside)
        if not len(centers):
            return part
        keep = ((centers >= part["xyz"].min(axis=0)) & (centers <= part["xyz"].max(axis=0))).all(axis=1)
        if keep.any():
            return take_boxes(part, keep)
    return sample
