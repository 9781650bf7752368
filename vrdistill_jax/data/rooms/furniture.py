"""Furniture of the benchmarks' classes, from parts: each class is known by its shape and yet varied.

A kind is "class" or "class:variant". Every object stands in its own frame: footprint centred on the origin,
bottom at z = 0, facing +x; its size is (depth, width, height) along x, y and z. A builder draws into the box
[-d/2, d/2] x [-w/2, w/2] x [0, h], and `build_furniture` makes the mesh fill that box exactly.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from vrdistill_jax.data.rooms import furniture_fixed as fixed
from vrdistill_jax.data.rooms import furniture_movable as movable
from vrdistill_jax.data.rooms.clutter import CLUTTER_BUILDERS, CLUTTER_SIZES
from vrdistill_jax.data.rooms.furniture_common import corner_arms
from vrdistill_jax.data.rooms.mesh_parts import MeshBuilder, TriangleMesh, fit_mesh

# Mean depth, width and height in metres, and the relative spread. Chosen so that the boxes of generated
# scans have ScanNet's mean sizes: a scanned box is axis-aligned around what was seen, hence larger than a
# turned object.
FURNITURE_SIZES: dict[str, tuple[float, float, float, float]] = {
    "cabinet:base": (0.60, 1.30, 0.90, 0.22),
    "cabinet:tall": (0.60, 1.15, 1.95, 0.22),
    "cabinet:wall": (0.36, 1.05, 0.72, 0.28),
    "cabinet:low": (0.46, 1.45, 0.60, 0.25),
    "cabinet:file": (0.55, 0.52, 0.92, 0.28),
    "dresser": (0.54, 1.08, 1.05, 0.18),
    "night_stand": (0.46, 0.55, 0.62, 0.18),
    "bed:single": (2.05, 1.15, 1.00, 0.08),
    "bed:double": (2.15, 1.70, 1.15, 0.09),
    "bed:bunk": (2.05, 1.10, 1.75, 0.06),
    "chair:dining": (0.52, 0.47, 0.77, 0.12),
    "chair:office": (0.60, 0.60, 0.83, 0.12),
    "chair:arm": (0.74, 0.72, 0.68, 0.15),
    "chair:shell": (0.55, 0.52, 0.72, 0.12),
    "sofa:one": (0.88, 1.04, 0.84, 0.12),
    "sofa:two": (0.92, 1.75, 0.84, 0.12),
    "sofa:three": (0.94, 2.23, 0.87, 0.12),
    "sofa:corner": (1.75, 2.54, 0.87, 0.12),
    "table:dining": (1.00, 1.70, 0.75, 0.22),
    "table:round": (1.05, 1.05, 0.75, 0.22),
    "table:coffee": (0.66, 1.15, 0.46, 0.25),
    "table:side": (0.56, 0.62, 0.58, 0.25),
    "table:meeting": (1.25, 2.60, 0.76, 0.20),
    "desk:plain": (0.75, 1.51, 0.76, 0.14),
    "desk:drawers": (0.77, 1.62, 0.76, 0.14),
    "desk:corner": (1.56, 1.84, 0.78, 0.12),
    "desk:hutch": (0.73, 1.40, 1.28, 0.14),
    "door:closed": (0.13, 0.88, 1.84, 0.12),
    "door:open": (0.08, 0.76, 1.82, 0.10),
    "door:double": (0.15, 1.40, 1.90, 0.12),
    "window": (0.26, 1.72, 1.25, 0.36),
    "bookshelf:tall": (0.34, 1.10, 2.05, 0.20),
    "bookshelf:wide": (0.36, 2.05, 1.70, 0.20),
    "bookshelf:low": (0.36, 1.43, 1.19, 0.25),
    "picture": (0.035, 0.50, 0.51, 0.42),
    "counter:straight": (0.64, 2.64, 0.18, 0.20),
    "counter:corner": (2.16, 2.70, 0.18, 0.14),
    "curtain": (0.24, 1.75, 1.65, 0.24),
    "refrigerator:full": (0.72, 0.78, 1.68, 0.12),
    "refrigerator:mini": (0.56, 0.54, 0.86, 0.14),
    "shower_curtain": (0.20, 0.58, 1.89, 0.18),
    "toilet": (0.68, 0.45, 0.72, 0.08),
    "sink:basin": (0.46, 0.54, 0.28, 0.14),
    "sink:wall": (0.48, 0.56, 0.36, 0.14),
    "bathtub": (0.76, 1.48, 0.48, 0.09),
    "garbage_bin:office": (0.42, 0.42, 0.48, 0.22),
    "garbage_bin:small": (0.30, 0.32, 0.35, 0.18),
    "garbage_bin:recycle": (0.52, 0.66, 0.74, 0.22),
    "garbage_bin:pedal": (0.50, 0.50, 0.74, 0.22),
    "garbage_bin:wheelie": (0.72, 0.70, 1.10, 0.15),
    **CLUTTER_SIZES,
}


def class_from_kind(kind: str) -> str:
    """Strips the variant: "table:round" gives "table"."""
    return kind.split(":")[0]


def sample_size(rng: np.random.Generator, kind: str, scale=(1.0, 1.0, 1.0)) -> np.ndarray:
    """Draws the size of an object.

    Args:
      rng: random numbers.
      kind: key of `FURNITURE_SIZES`.
      scale: factors on depth, width and height.

    Returns:
      f32[3] depth, width, height in metres.
    """
    *mean, spread = FURNITURE_SIZES[kind]
    whole, *each = np.clip(rng.standard_normal(4), -1.8, 1.8)  # large things are large along every axis
    factor = 1 + spread * (0.6 * whole + 0.8 * np.array(each)) / 1.1
    return (np.asarray(mean) * factor * scale).astype(np.float32)


def footprint_solids(kind: str, size) -> np.ndarray:
    """Gives the boxes that an object occupies, in its own frame: two for corner furniture, one for all else.

    Args:
      kind: key of `FURNITURE_SIZES`.
      size: f32[3] depth, width, height in metres.

    Returns:
      f64[n, 4] rectangles (centre x, centre y, extent x, extent y) in metres.
    """
    d, w, _ = (float(v) for v in size)
    if not kind.endswith(":corner"):
        return np.array([[0.0, 0.0, d, w]])
    back, side = corner_arms(kind, size)
    return np.array([[-d / 2 + back / 2, 0.0, back, w], [back / 2, -w / 2 + side / 2, d - back, side]])


def build_furniture(rng: np.random.Generator, kind: str, size, **options) -> TriangleMesh:
    """Builds one object.

    Args:
      rng: random numbers for shape details and colours.
      kind: key of `FURNITURE_SIZES`.
      size: f32[3] depth, width, height in metres.
      **options: passed to the builder, e.g. `hole` of a counter.

    Returns:
      A mesh that fills [-d/2, d/2] x [-w/2, w/2] x [0, h] and faces +x.

    Raises:
      ValueError: if the kind is unknown.
    """
    builder = _BUILDERS.get(kind) or _BUILDERS.get(class_from_kind(kind))
    if builder is None:
        raise ValueError(f"unknown furniture kind {kind!r}; known are {', '.join(sorted(FURNITURE_SIZES))}")
    mesh = MeshBuilder()
    builder(mesh, rng, *(float(v) for v in size), **options)
    return fit_mesh(mesh.build(), size)


_BUILDERS: dict[str, Callable[..., None]] = {
    **CLUTTER_BUILDERS,
    "cabinet:base": partial(fixed.build_cabinet, kind="base"),
    "cabinet:tall": partial(fixed.build_cabinet, kind="tall"),
    "cabinet:wall": partial(fixed.build_cabinet, kind="wall"),
    "cabinet:low": partial(fixed.build_cabinet, kind="low"),
    "cabinet:file": partial(fixed.build_cabinet, kind="file"),
    "dresser": movable.build_dresser,
    "night_stand": movable.build_night_stand,
    "bed": movable.build_bed,
    "bed:bunk": partial(movable.build_bed, bunk=True),
    "chair:dining": movable.build_dining_chair,
    "chair:office": movable.build_office_chair,
    "chair:arm": movable.build_arm_chair,
    "chair:shell": movable.build_shell_chair,
    "sofa:one": partial(movable.build_sofa, seats=1),
    "sofa:two": partial(movable.build_sofa, seats=2),
    "sofa:three": partial(movable.build_sofa, seats=3),
    "sofa:corner": partial(movable.build_sofa, seats=2, corner=True),
    "table": movable.build_table,
    "table:round": movable.build_round_table,
    "desk": movable.build_desk,
    "desk:drawers": partial(movable.build_desk, pedestal=True),
    "desk:corner": partial(movable.build_desk, corner=True),
    "desk:hutch": partial(movable.build_desk, hutch=True),
    "door:closed": fixed.build_door,
    "door:open": partial(fixed.build_door, kind="open"),
    "door:double": partial(fixed.build_door, kind="double"),
    "window": fixed.build_window,
    "bookshelf": fixed.build_bookshelf,
    "picture": fixed.build_picture,
    "counter": fixed.build_counter,
    "counter:corner": partial(fixed.build_counter, corner=True),
    "curtain": fixed.build_curtain,
    "shower_curtain": partial(fixed.build_curtain, rings=True),
    "refrigerator": fixed.build_refrigerator,
    "refrigerator:mini": partial(fixed.build_refrigerator, mini=True),
    "toilet": fixed.build_toilet,
    "sink": fixed.build_sink,
    "sink:wall": partial(fixed.build_sink, wall=True),
    "bathtub": fixed.build_bathtub,
    "garbage_bin:office": fixed.build_garbage_bin,
    "garbage_bin:small": fixed.build_garbage_bin,
    "garbage_bin:recycle": partial(fixed.build_garbage_bin, kind="recycle"),
    "garbage_bin:pedal": partial(fixed.build_garbage_bin, kind="pedal"),
    "garbage_bin:wheelie": partial(fixed.build_garbage_bin, kind="wheelie"),
}
