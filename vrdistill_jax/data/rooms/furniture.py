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
    "cabinet:base": (0.62, 1.37, 0.91, 0.12),
    "cabinet:tall": (0.62, 1.20, 1.96, 0.12),
    "cabinet:wall": (0.36, 1.14, 0.72, 0.15),
    "cabinet:low": (0.46, 1.60, 0.57, 0.15),
    "cabinet:file": (0.57, 0.51, 1.03, 0.20),
    "dresser": (0.54, 1.08, 1.05, 0.12),
    "night_stand": (0.46, 0.55, 0.62, 0.12),
    "bed:single": (2.05, 1.15, 1.00, 0.07),
    "bed:double": (2.15, 1.70, 1.15, 0.07),
    "bed:bunk": (2.05, 1.10, 1.75, 0.06),
    "chair:dining": (0.52, 0.47, 0.77, 0.08),
    "chair:office": (0.60, 0.60, 0.83, 0.08),
    "chair:arm": (0.74, 0.72, 0.68, 0.10),
    "chair:shell": (0.55, 0.52, 0.72, 0.08),
    "sofa:one": (0.88, 1.04, 0.84, 0.08),
    "sofa:two": (0.92, 1.75, 0.84, 0.08),
    "sofa:three": (0.94, 2.23, 0.87, 0.08),
    "sofa:corner": (1.75, 2.54, 0.87, 0.08),
    "table:dining": (0.90, 1.50, 0.74, 0.12),
    "table:round": (1.00, 1.00, 0.73, 0.12),
    "table:coffee": (0.62, 1.10, 0.44, 0.14),
    "table:side": (0.52, 0.56, 0.55, 0.14),
    "table:meeting": (1.15, 2.30, 0.74, 0.12),
    "desk:plain": (0.75, 1.51, 0.76, 0.10),
    "desk:drawers": (0.77, 1.62, 0.76, 0.10),
    "desk:corner": (1.56, 1.84, 0.78, 0.08),
    "desk:hutch": (0.73, 1.40, 1.28, 0.10),
    "door:closed": (0.14, 0.96, 1.98, 0.05),
    "door:open": (0.10, 0.86, 1.96, 0.05),
    "door:double": (0.16, 1.55, 2.00, 0.06),
    "window": (0.23, 1.61, 1.30, 0.20),
    "bookshelf:tall": (0.34, 1.10, 2.11, 0.10),
    "bookshelf:wide": (0.36, 2.09, 1.73, 0.10),
    "bookshelf:low": (0.36, 1.43, 1.19, 0.12),
    "picture": (0.05, 0.58, 0.57, 0.30),
    "counter:straight": (0.66, 2.64, 0.29, 0.12),
    "counter:corner": (2.16, 2.70, 0.29, 0.10),
    "curtain": (0.26, 1.75, 1.75, 0.14),
    "refrigerator:full": (0.72, 0.78, 1.70, 0.07),
    "refrigerator:mini": (0.56, 0.54, 0.86, 0.08),
    "shower_curtain": (0.20, 0.55, 1.89, 0.12),
    "toilet": (0.70, 0.46, 0.74, 0.06),
    "sink:basin": (0.47, 0.55, 0.31, 0.08),
    "sink:wall": (0.49, 0.57, 0.39, 0.08),
    "bathtub": (0.76, 1.48, 0.50, 0.06),
    "garbage_bin:office": (0.39, 0.39, 0.41, 0.12),
    "garbage_bin:recycle": (0.48, 0.62, 0.64, 0.12),
    "garbage_bin:pedal": (0.48, 0.48, 0.66, 0.12),
    "garbage_bin:wheelie": (0.68, 0.64, 0.99, 0.10),
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
    factor = 1 + spread * np.clip(rng.standard_normal(3), -1.8, 1.8)
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
    "garbage_bin:recycle": partial(fixed.build_garbage_bin, kind="recycle"),
    "garbage_bin:pedal": partial(fixed.build_garbage_bin, kind="pedal"),
    "garbage_bin:wheelie": partial(fixed.build_garbage_bin, kind="wheelie"),
}
