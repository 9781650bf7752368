"""Boxes on the host: float64 NumPy twins of `geometry.boxes` and `geometry.iou`, without JAX.

A box row is (x, y, z, l, w, h, yaw): centre, full size along the box's own axes, yaw counter-clockwise about
+z. A box with any size <= 0 is empty: it holds no points and its IoU is 0.
"""

import numpy as np
from jaxtyping import Bool, Float

# Corner signs in units of half a size; the sketch stands at geometry.boxes.corners_from_boxes.
CORNER_SIGNS = np.array(
    [[1, 1, -1], [1, -1, -1], [-1, -1, -1], [-1, 1, -1], [1, 1, 1], [1, -1, 1], [-1, -1, 1], [-1, 1, 1]],
    np.float32,
)
# Points this close to a face (metres) count as inside, so that a box fitted to its points holds all of them
# whatever the rounding of float32 coordinates.
FACE_MARGIN = 1e-5
# Below this length (metres) a polygon edge is taken to be flat; it only keeps divisions finite.
FLAT = 1e-12
# Volumes, areas and squared lengths up to this are taken as 0: below it, 1 / x^2 in a gradient overflows
# float32.
SMALLEST = 1e-18
# The BEV corners of a box, counter-clockwise.
_BEV_SIGNS = ((1, 1), (-1, 1), (-1, -1), (1, -1))


def corners_from_boxes(boxes: Float[np.ndarray, "*b 7"]) -> Float[np.ndarray, "*b 8 3"]:
    """Gives the eight corners of every box, in the order of `geometry.boxes.corners_from_boxes`.

    Args:
      boxes: [..., 7] metres and radians.

    Returns:
      f64[..., 8, 3] metres.
    """
    boxes = np.asarray(boxes, np.float64)
    local = CORNER_SIGNS * (boxes[..., None, 3:6] / 2)
    cos, sin = np.cos(boxes[..., 6:7]), np.sin(boxes[..., 6:7])
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    return boxes[..., None, :3] + np.stack([x, y, local[..., 2]], axis=-1)


def axis_aligned_boxes(boxes: Float[np.ndarray, "*b 7"]) -> Float[np.ndarray, "*b 7"]:
    """Gives the smallest axis-aligned box around every box.

    Args:
      boxes: [..., 7] metres and radians.

    Returns:
      f64[..., 7] with yaw 0 and sizes >= 0.
    """
    boxes = np.asarray(boxes, np.float64)
    size = np.maximum(boxes[..., 3:6], 0)
    cos, sin = np.abs(np.cos(boxes[..., 6])), np.abs(np.sin(boxes[..., 6]))
    extent_x = cos * size[..., 0] + sin * size[..., 1]
    extent_y = sin * size[..., 0] + cos * size[..., 1]
    rest = np.stack([extent_x, extent_y, size[..., 2], np.zeros_like(extent_x)], axis=-1)
    return np.concatenate([boxes[..., :3], rest], axis=-1)


def axis_aligned_bounds(
    boxes: Float[np.ndarray, "*b 7"],
) -> tuple[Float[np.ndarray, "*b 3"], Float[np.ndarray, "*b 3"]]:
    """Gives the lower and the upper corner of the smallest axis-aligned box around every box.

    Args:
      boxes: [..., 7] metres and radians.

    Returns:
      f64[..., 3] lowest and f64[..., 3] highest coordinates, metres.
    """
    aligned = axis_aligned_boxes(boxes)
    return aligned[..., :3] - aligned[..., 3:6] / 2, aligned[..., :3] + aligned[..., 3:6] / 2


def points_in_boxes(
    xyz: Float[np.ndarray, "n 3"], boxes: Float[np.ndarray, "g 7"]
) -> Bool[np.ndarray, "n g"]:
    """Tells which points lie in which boxes; faces belong to the box, within `FACE_MARGIN`.

    Args:
      xyz: [n, 3] metres.
      boxes: [g, 7] metres and radians.

    Returns:
      bool[n, g].
    """
    xyz, boxes = np.asarray(xyz, np.float64), np.asarray(boxes, np.float64)
    inside = np.zeros((len(xyz), len(boxes)), bool)
    for row, box in enumerate(
        boxes
    ):  # scenes have tens of boxes: one pass each keeps the temporaries at n rows
        if (box[3:6] <= 0).any():
            continue
        offset = xyz - box[:3]
        cos, sin = np.cos(box[6]), np.sin(box[6])
        half = box[3:6] / 2 + FACE_MARGIN
        inside[:, row] = (
            (np.abs(cos * offset[:, 0] + sin * offset[:, 1]) <= half[0])
            & (np.abs(cos * offset[:, 1] - sin * offset[:, 0]) <= half[1])
            & (np.abs(offset[:, 2]) <= half[2])
        )
    return inside


def box_iou(
    a: Float[np.ndarray, "*#b 7"], b: Float[np.ndarray, "*#b 7"], *, rotated: bool = True
) -> Float[np.ndarray, "*b"]:
    """Gives the 3D IoU of box pairs (leading axes broadcast).

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw, as for axis-aligned data sets.

    Returns:
      f64[...] in [0, 1].
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    overlap = _bev_overlap(a, b) if rotated else _interval_overlap(a, b, 0) * _interval_overlap(a, b, 1)
    intersection = overlap * _interval_overlap(a, b, 2)
    return _ratio(intersection, _volume(a[..., 3:6]) + _volume(b[..., 3:6]) - intersection)


def bev_iou(
    a: Float[np.ndarray, "*#b 7"], b: Float[np.ndarray, "*#b 7"], *, rotated: bool = True
) -> Float[np.ndarray, "*b"]:
    """Gives the IoU of the boxes' outlines seen from above (leading axes broadcast).

    Args:
      a: [..., 7] metres and radians.
      b: [..., 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f64[...] in [0, 1].
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    intersection = _bev_overlap(a, b) if rotated else _interval_overlap(a, b, 0) * _interval_overlap(a, b, 1)
    return _ratio(intersection, _volume(a[..., 3:5]) + _volume(b[..., 3:5]) - intersection)


def pairwise_iou(
    a: Float[np.ndarray, "n 7"], b: Float[np.ndarray, "m 7"], *, rotated: bool = True
) -> Float[np.ndarray, "n m"]:
    """Gives the 3D IoU of every box of `a` with every box of `b`.

    Args:
      a: [n, 7] metres and radians.
      b: [m, 7] metres and radians.
      rotated: False ignores the yaw.

    Returns:
      f64[n, m] in [0, 1].
    """
    return box_iou(np.asarray(a)[:, None], np.asarray(b)[None], rotated=rotated)


def _volume(size: np.ndarray) -> np.ndarray:
    return np.where((size > 0).all(-1), size.prod(-1), 0.0)


def _ratio(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    return np.where(union > SMALLEST, intersection / np.where(union > SMALLEST, union, 1), 0.0)


def _interval_overlap(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Length shared by two intervals, measured from b's centre so that far-away boxes lose no digits."""
    offset = a[..., axis] - b[..., axis]
    half_a, half_b = a[..., 3 + axis] / 2, b[..., 3 + axis] / 2
    return np.maximum(np.minimum(offset + half_a, half_b) - np.maximum(offset - half_a, -half_b), 0)


def _bev_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area shared by two rotated rectangles; geometry.iou explains the method."""
    delta, turn = a[..., :2] - b[..., :2], a[..., 6] - b[..., 6]
    cos_b, sin_b = np.cos(b[..., 6]), np.sin(b[..., 6])
    center_x = cos_b * delta[..., 0] + sin_b * delta[..., 1]
    center_y = cos_b * delta[..., 1] - sin_b * delta[..., 0]
    cos, sin = np.cos(turn), np.sin(turn)
    half_a, half_b = np.maximum(a[..., 3:5], 0) / 2, np.maximum(b[..., 3:5], 0) / 2
    corners = [
        (
            center_x + i * cos * half_a[..., 0] - j * sin * half_a[..., 1],
            center_y + i * sin * half_a[..., 0] + j * cos * half_a[..., 1],
        )
        for i, j in _BEV_SIGNS
    ]
    limit_x, limit_y = half_b[..., 0], half_b[..., 1]
    area = 0.0
    for (x_p, y_p), (x_q, y_q) in zip(corners, corners[1:] + corners[:1], strict=True):
        x_0, x_1 = np.clip(x_p, -limit_x, limit_x), np.clip(x_q, -limit_x, limit_x)
        run = x_q - x_p
        slope = np.where(np.abs(run) > FLAT, (y_q - y_p) / np.where(np.abs(run) > FLAT, run, 1), 0)
        y_0, y_1 = y_p + (x_0 - x_p) * slope, y_q + (x_1 - x_q) * slope
        c_0, c_1 = np.clip(y_0, -limit_y, limit_y), np.clip(y_1, -limit_y, limit_y)
        rise = y_1 - y_0
        flat = np.abs(rise) <= FLAT
        share = np.where(flat, 0.5, (y_1 - (c_0 + c_1) / 2) / np.where(flat, 1, rise))
        area = area - (x_1 - x_0) * (c_0 + (c_1 - c_0) * np.clip(share, 0, 1))
    return np.clip(area, 0, np.minimum(_volume(a[..., 3:5]), _volume(b[..., 3:5])))
