"""Triangle meshes assembled from coloured primitives: boxes, cylinders, ellipsoids, sheets and prisms."""

import functools
from typing import NamedTuple

import numpy as np

Color = tuple[float, float, float] | np.ndarray

_BOX_CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float32)
_BOX_FACES = np.array(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
     [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]], np.int32
)  # fmt: skip


class TriangleMesh(NamedTuple):
    """Triangles with a colour and a chance that a depth camera gets no return from them."""

    vertices: np.ndarray  # f32[v, 3] metres
    faces: np.ndarray  # i32[f, 3] rows of vertices
    color: np.ndarray  # f32[f, 3] in [0, 1]
    absorption: np.ndarray  # f32[f] probability of a missing return, in [0, 1]


class MeshBuilder:
    """Collects primitives into one mesh."""

    def __init__(self) -> None:
        self._vertices: list[np.ndarray] = []
        self._faces: list[np.ndarray] = []
        self._colors: list[np.ndarray] = []
        self._absorption: list[np.ndarray] = []
        self._count = 0

    def add(self, vertices: np.ndarray, faces: np.ndarray, color: Color, absorption: float = 0.0) -> None:
        """Adds triangles.

        Args:
          vertices: f32[v, 3] metres.
          faces: i32[f, 3] rows of `vertices`.
          color: one colour in [0, 1], or one per face.
          absorption: probability in [0, 1] that a depth camera gets no return.
        """
        self._vertices.append(vertices)
        self._faces.append(faces + self._count)
        self._count += len(vertices)
        self._colors.append(np.broadcast_to(np.asarray(color, np.float32), (len(faces), 3)))
        self._absorption.append(np.full(len(faces), absorption, np.float32))

    def box(self, low, high, color: Color, absorption: float = 0.0) -> None:
        """Adds an axis-aligned box between two corners."""
        low = np.asarray(low, np.float32)
        self.add(low + _BOX_CORNERS * (np.asarray(high, np.float32) - low), _BOX_FACES, color, absorption)

    def boxes(self, low: np.ndarray, high: np.ndarray, colors: np.ndarray) -> None:
        """Adds n boxes at once: corners f32[n, 3], colours f32[n, 3]."""
        count = len(low)
        vertices = low[:, None] + _BOX_CORNERS * (high - low)[:, None]
        faces = _BOX_FACES + 8 * np.arange(count, dtype=np.int32)[:, None, None]
        self.add(vertices.reshape(-1, 3).astype(np.float32), faces.reshape(-1, 3), np.repeat(colors, 12, 0))

    def cylinder(
        self,
        start,
        end,
        radius,
        color: Color,
        end_radius=None,
        sides: int = 10,
        absorption: float = 0.0,
        caps=True,
    ) -> None:
        """Adds a (truncated) cone between two points; radii in metres."""
        start, end = np.asarray(start, np.float32), np.asarray(end, np.float32)
        axis = (end - start) / max(float(np.linalg.norm(end - start)), 1e-6)
        helper = np.array([1, 0, 0] if abs(axis[0]) < 0.8 else [0, 1, 0], np.float32)
        u = np.cross(axis, helper)
        u /= np.linalg.norm(u)
        circle = _circle(sides) @ np.stack([u, np.cross(axis, u)])
        end_radius = radius if end_radius is None else end_radius
        vertices = np.concatenate(
            [start + radius * circle, end + end_radius * circle, start[None], end[None]]
        )
        faces = _tube_faces(sides)
        self.add(vertices.astype(np.float32), faces if caps else faces[: 2 * sides], color, absorption)

    def ellipsoid(
        self, center, radii, color: Color, rows: int = 6, sides: int = 10, lowest: float = -1.0
    ) -> None:
        """Adds an ellipsoid, cut flat below `lowest` (in units of its vertical radius, -1 is the whole)."""
        height = np.sin(np.linspace(np.arcsin(lowest), np.pi / 2, rows)).astype(np.float32)
        ring = np.sqrt(np.maximum(1 - height**2, 0))[:, None, None] * _circle(sides)
        points = np.concatenate([ring, np.broadcast_to(height[:, None, None], (rows, sides, 1))], -1)
        points = np.concatenate([points, points[:, :1]], 1)
        self.sheet(np.asarray(center, np.float32) + points * np.asarray(radii, np.float32), color)

    def sheet(self, points: np.ndarray, color: Color, absorption: float = 0.0) -> None:
        """Adds a surface through a grid of points f32[r, c, 3]."""
        rows, columns = points.shape[:2]
        self.add(points.reshape(-1, 3).astype(np.float32), _grid_faces(rows, columns), color, absorption)

    def prism(
        self, outline: np.ndarray, bottom: float, top: float, color: Color, absorption: float = 0.0
    ) -> None:
        """Adds an upright prism over a convex outline f32[n, 2], counter-clockwise."""
        count = len(outline)
        z = np.repeat(np.array([bottom, top], np.float32), count)[:, None]
        vertices = np.concatenate([np.concatenate([outline, outline]), z], 1).astype(np.float32)
        this = np.arange(count)
        after = (this + 1) % count
        fan = np.stack([np.zeros(count - 2, int), this[1:-1], this[2:]], 1)
        faces = np.concatenate(
            [
                np.stack([this, after, after + count], 1),
                np.stack([this, after + count, this + count], 1),
                fan[:, ::-1],
                fan + count,
            ]
        )
        self.add(vertices, faces.astype(np.int32), color, absorption)

    def build(self) -> TriangleMesh:
        """Joins everything added so far."""
        return TriangleMesh(
            np.concatenate(self._vertices),
            np.concatenate(self._faces),
            np.concatenate(self._colors),
            np.concatenate(self._absorption),
        )


def fit_mesh(mesh: TriangleMesh, size) -> TriangleMesh:
    """Scales and shifts a mesh so that it fills the box [-x/2, x/2] x [-y/2, y/2] x [0, z].

    Args:
      mesh: any mesh.
      size: f32[3] metres.

    Returns:
      The mesh with new vertices.
    """
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    size = np.asarray(size, np.float32)
    scale = size / np.maximum(high - low, 1e-6)
    offset = np.array([0.5, 0.5, 0.0], np.float32) * size
    return mesh._replace(vertices=((mesh.vertices - low) * scale - offset).astype(np.float32))


def move_mesh(mesh: TriangleMesh, position, yaw: float) -> TriangleMesh:
    """Turns a mesh about z by `yaw` radians (counter-clockwise) and then shifts it to `position` f32[3]."""
    c, s = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
    x, y, z = mesh.vertices.T
    vertices = np.stack([c * x - s * y, s * x + c * y, z], 1) + np.asarray(position, np.float32)
    return mesh._replace(vertices=vertices.astype(np.float32))


@functools.cache
def _circle(sides: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(sides) / sides
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


@functools.cache
def _tube_faces(sides: int) -> np.ndarray:
    this = np.arange(sides)
    after = (this + 1) % sides
    bottom, top = np.full(sides, 2 * sides), np.full(sides, 2 * sides + 1)
    return np.concatenate(
        [
            np.stack([this, after, after + sides], 1),
            np.stack([this, after + sides, this + sides], 1),
            np.stack([after, this, bottom], 1),
            np.stack([this + sides, after + sides, top], 1),
        ]
    ).astype(np.int32)


@functools.cache
def _grid_faces(rows: int, columns: int) -> np.ndarray:
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).reshape(-1)
    return np.concatenate(
        [
            np.stack([corner, corner + 1, corner + columns], 1),
            np.stack([corner + 1, corner + columns + 1, corner + columns], 1),
        ]
    ).astype(np.int32)
