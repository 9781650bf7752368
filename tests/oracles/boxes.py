"""Naive float64 box geometry, one box or one pair at a time: the oracle of the geometry tests."""

import math

import numpy as np


def rotate(point, yaw):
    x, y = point
    return x * math.cos(yaw) - y * math.sin(yaw), x * math.sin(yaw) + y * math.cos(yaw)


def corners(box):
    """Eight corners in the documented order, spelled out."""
    cx, cy, cz, length, width, height, yaw = map(float, box)
    result = []
    for z in (cz - height / 2, cz + height / 2):
        for x, y in ((1, 1), (1, -1), (-1, -1), (-1, 1)):
            dx, dy = rotate((x * length / 2, y * width / 2), yaw)
            result.append((cx + dx, cy + dy, z))
    return np.array(result)


def signed_depth(point, box):
    """Distance in metres from a point to the nearest face, positive inside."""
    cx, cy, cz, length, width, height, yaw = map(float, box)
    x, y = rotate((point[0] - cx, point[1] - cy), -yaw)
    return min(length / 2 - abs(x), width / 2 - abs(y), height / 2 - abs(point[2] - cz))


def clip_polygon(polygon, inside_of):
    """Sutherland-Hodgman: clips a convex polygon by another, both counter-clockwise lists of (x, y)."""
    for (ax, ay), (bx, by) in zip(inside_of, inside_of[1:] + inside_of[:1], strict=True):

        def side(p, ax=ax, ay=ay, bx=bx, by=by):
            return (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax)

        output = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            if side(p) >= 0:
                output.append(p)
            if side(p) * side(q) < 0:
                t = side(p) / (side(p) - side(q))
                output.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        polygon = output
    return polygon


def shoelace(polygon):
    if len(polygon) < 3:
        return 0.0
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return sum(p[0] * q[1] - q[0] * p[1] for p, q in pairs) / 2


def bev_polygon(box, rotated=True):
    if not rotated:
        box = [*box[:6], 0.0]
    return [tuple(corners(box)[row, :2]) for row in (2, 1, 0, 3)]


def is_empty(box):
    return min(box[3:6]) <= 0


def bev_intersection(a, b, rotated=True):
    if min(a[3], a[4], b[3], b[4]) <= 0:
        return 0.0
    return max(shoelace(clip_polygon(bev_polygon(a, rotated), bev_polygon(b, rotated))), 0.0)


def intersection(a, b, rotated=True):
    if is_empty(a) or is_empty(b):
        return 0.0
    height = min(a[2] + a[5] / 2, b[2] + b[5] / 2) - max(a[2] - a[5] / 2, b[2] - b[5] / 2)
    return bev_intersection(a, b, rotated) * max(height, 0.0)


def volume(box):
    return 0.0 if is_empty(box) else float(np.prod(box[3:6]))


def iou(a, b, rotated=True):
    shared = intersection(a, b, rotated)
    return shared / (volume(a) + volume(b) - shared) if shared else 0.0


def bev_iou(a, b, rotated=True):
    shared = bev_intersection(a, b, rotated)
    return shared / (a[3] * a[4] + b[3] * b[4] - shared) if shared else 0.0


def enclosing_size(a, b, rotated=True):
    points = np.concatenate([corners(box if rotated else [*box[:6], 0.0]) for box in (a, b)])
    return points.max(0) - points.min(0)


def giou(a, b, rotated=True):
    union = volume(a) + volume(b) - intersection(a, b, rotated)
    return iou(a, b, rotated) - 1 + union / enclosing_size(a, b, rotated).prod()


def diou(a, b, rotated=True):
    distance = ((np.asarray(a[:3]) - np.asarray(b[:3])) ** 2).sum()
    return iou(a, b, rotated) - distance / (enclosing_size(a, b, rotated) ** 2).sum()


def axis_aligned(box):
    """The axis-aligned box around a box, as a box row."""
    points = corners(box)
    low, high = points.min(0), points.max(0)
    return np.array([*((low + high) / 2), *(high - low), 0.0])


def greedy_nms(boxes, score, threshold, overlap, label=None, mask=None):
    """Rows in picking order; `overlap(better, candidate)` is compared with the threshold."""
    rows = [row for row in range(len(boxes)) if mask is None or mask[row]]
    rows.sort(key=lambda row: (-score[row], row))
    picked = []
    for row in rows:
        rivals = [p for p in picked if label is None or label[p] == label[row]]
        if not any(overlap(boxes[p], boxes[row]) > threshold for p in rivals):
            picked.append(row)
    return picked


def random_boxes(rng, count, spread=1.0, yaw=True):
    """Boxes of furniture size around the origin, f64[count, 7]."""
    center = rng.uniform(-spread, spread, (count, 3))
    size = rng.uniform(0.2, 2.0, (count, 3))
    angle = rng.uniform(-np.pi, np.pi, (count, 1)) * yaw
    return np.concatenate([center, size, angle], axis=-1)
