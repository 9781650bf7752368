"""PLY files for MeshLab, CloudCompare and Blender: coloured clouds, and boxes as frames of thin bars."""

import os
import pathlib

import numpy as np

# Distinct hues that read on light and on dark; classes beyond the last start over.
CLASS_COLORS = np.array(
    [
        *((230, 57, 70), (29, 120, 216), (42, 157, 90), (244, 140, 6), (131, 56, 236), (0, 163, 173)),
        *((214, 40, 140), (140, 110, 20), (110, 80, 220), (90, 160, 0), (200, 90, 60), (20, 140, 130)),
        *((170, 60, 170), (70, 110, 150), (215, 165, 0), (150, 75, 0), (90, 90, 200), (60, 130, 60)),
        *((220, 100, 130), (100, 100, 100)),
    ],
    np.uint8,
)

# Corner k of a bar or a box has bit 0 of k for +x, bit 1 for +y, bit 2 for +z.
_CORNER_SIGNS = np.array([[(k >> axis & 1) * 2 - 1 for axis in range(3)] for k in range(8)], np.float64)
_CUBE_TRIANGLES = np.array(
    [
        *([0, 2, 3], [0, 3, 1], [4, 5, 7], [4, 7, 6], [0, 1, 5], [0, 5, 4]),
        *([2, 6, 7], [2, 7, 3], [0, 4, 6], [0, 6, 2], [1, 3, 7], [1, 7, 5]),
    ],
    np.int32,
)


def class_color(label: int) -> tuple[int, int, int]:
    """Returns the RGB colour, 0..255, that every picture uses for a class."""
    red, green, blue = CLASS_COLORS[int(label) % len(CLASS_COLORS)]
    return int(red), int(green), int(blue)


def box_corners(boxes: np.ndarray) -> np.ndarray:
    """Computes the corners of boxes.

    Args:
      boxes: f32[d, 7] centre, full size (metres) and yaw (radians).

    Returns:
      f64[d, 8, 3]; bit 0, 1, 2 of the corner's number is set on the +x, +y, +z side of the box's own axes.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 7)
    return _place(_CORNER_SIGNS * boxes[:, None, 3:6] / 2, boxes)


def write_points_ply(
    path: str | os.PathLike, xyz: np.ndarray, color: np.ndarray | None = None
) -> pathlib.Path:
    """Writes a point cloud as a binary little-endian PLY.

    Args:
      path: the file to write; its folder is made.
      xyz: f32[n, 3] metres.
      color: f32[n, 3] in [0, 1], or None.

    Returns:
      The path.

    Raises:
      ValueError: if the shapes do not fit.
    """
    xyz = np.asarray(xyz, np.float32)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or (color is not None and np.asarray(color).shape != xyz.shape):
        got = None if color is None else np.asarray(color).shape
        raise ValueError(f"xyz {xyz.shape} and color {got} must both be [n, 3]")
    return _write(path, xyz, None if color is None else _bytes_from_color(color), None)


def write_boxes_ply(
    path: str | os.PathLike,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None = None,
    bar: float = 0.02,
) -> pathlib.Path:
    """Writes boxes as a triangle mesh: twelve bars along the edges of each box, coloured by class.

    Args:
      path: the file to write; its folder is made.
      boxes: f32[d, 7] centre, full size (metres) and yaw (radians).
      labels: i32[d] class of each box.
      scores: f32[d] in [0, 1], stored per vertex as property `score`; None leaves it out.
      bar: thickness of the bars in metres; thinner for boxes smaller than four bars.

    Returns:
      The path.

    Raises:
      ValueError: if the counts differ or a box is not finite.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 7)
    labels = np.asarray(labels).reshape(-1)
    num_scores = len(boxes) if scores is None else np.asarray(scores).size
    if not len(labels) == num_scores == len(boxes):
        raise ValueError(f"{len(boxes)} boxes, {len(labels)} labels and {num_scores} scores must be as many")
    if not np.isfinite(boxes).all():
        raise ValueError("boxes hold NaN or infinity; leave those rows out")
    vertices = _bar_vertices(boxes, bar).reshape(-1, 3)
    each = 12 * 8  # vertices per box
    cubes = np.arange(len(boxes) * 12)[:, None, None] * 8
    triangles = (cubes + _CUBE_TRIANGLES).reshape(-1, 3)
    color = np.repeat(CLASS_COLORS[labels.astype(np.int64) % len(CLASS_COLORS)].reshape(-1, 3), each, axis=0)
    extra = {"label": np.repeat(labels.astype(np.int32), each)}
    if scores is not None:
        extra["score"] = np.repeat(np.ravel(scores).astype(np.float32), each)
    return _write(path, vertices, color, triangles, extra)


def _place(local: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Turns and shifts f64[d, k, 3] from the boxes' own axes into the scene."""
    c, s = np.cos(boxes[:, None, 6]), np.sin(boxes[:, None, 6])
    x, y = c * local[..., 0] - s * local[..., 1], s * local[..., 0] + c * local[..., 1]
    return np.stack([x, y, local[..., 2]], -1) + boxes[:, None, :3]


def _bar_vertices(boxes: np.ndarray, bar: float) -> np.ndarray:
    """f64[d, 12 * 8, 3]: for each axis four bars that lie inside the box and touch its surface."""
    size = boxes[:, None, 3:6]
    thickness = np.minimum(bar, size / 4)
    bars = []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        for first, second in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
            corners = _CORNER_SIGNS * thickness / 2
            corners[..., axis] = _CORNER_SIGNS[:, axis] * size[..., axis] / 2
            for a, sign in zip(others, (first, second), strict=True):
                corners[..., a] += sign * (size[..., a] - thickness[..., a]) / 2
            bars.append(corners)
    return _place(np.concatenate(bars, 1) if len(boxes) else np.zeros((0, 96, 3)), boxes)


def _bytes_from_color(color: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(np.asarray(color, np.float64), 0, 1) * 255).astype(np.uint8)


def _write(path, xyz, color, triangles, extra=None) -> pathlib.Path:
    path = pathlib.Path(path)
    types = {"<f4": "float", "|u1": "uchar", "<i4": "int"}
    columns = dict(zip("xyz", np.asarray(xyz, "<f4").T, strict=True))
    if color is not None:
        columns |= dict(zip(("red", "green", "blue"), color.T, strict=True))
    columns |= extra or {}
    table = np.zeros(len(xyz), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        table[name] = column
    header = ["ply", "format binary_little_endian 1.0", "comment metres, z up", f"element vertex {len(xyz)}"]
    header += [f"property {types[column.dtype.str]} {name}" for name, column in columns.items()]
    faces = b""
    if triangles is not None:
        header += [f"element face {len(triangles)}", "property list uchar int vertex_indices"]
        rows = np.zeros(len(triangles), [("length", "u1"), ("index", "<i4", 3)])
        rows["length"], rows["index"] = 3, triangles
        faces = rows.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join([*header, "end_header\n"]).encode("ascii") + table.tobytes() + faces)
    return path
