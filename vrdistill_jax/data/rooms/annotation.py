"""Labels as people draw them: coarse at the edges of objects, with patches forgotten."""

import numpy as np

_CELL = 0.04  # metres, resolution of the lookup
_PATCH = 0.22  # metres; the labels of a patch are shifted, or forgotten, together


def smear_labels(
    xyz: np.ndarray, owner: np.ndarray, rng: np.random.Generator, reach: float, forgotten: float
) -> np.ndarray:
    """Moves the borders between labels by a few centimetres, patch by patch.

    Annotators of scans label segments of a mesh, not points; segments run over edges onto the floor, the
    wall or a neighbour, and some of an object's segments stay without a label.

    Args:
      xyz: f32[n, 3] metres.
      owner: i32[n] object of each point, -1 none.
      rng: random numbers.
      reach: metres, standard deviation of the shift along each axis; 0 leaves the borders.
      forgotten: share of the patches that lose their label, in [0, 1].

    Returns:
      i32[n] the object that each point is labelled with, -1 none.
    """
    low = xyz.min(0) - _CELL
    cells = np.ceil((xyz.max(0) - low) / _CELL).astype(np.int64) + 2
    patch = _keys((xyz - low) / _PATCH, np.ceil(cells * _CELL / _PATCH).astype(np.int64) + 1)
    shift = rng.standard_normal((int(patch.max()) + 1, 3), np.float32)
    table = np.full(int(cells.prod()), -2, np.int32)  # -2: nothing there
    table[_keys((xyz - low) / _CELL, cells)] = owner
    found = table[_keys((xyz + reach * np.clip(shift, -2, 2)[patch] - low) / _CELL, cells)]
    label = np.where(found == -2, owner, found)
    label[(rng.random(len(shift)) < forgotten)[patch]] = -1
    return label


def _keys(position: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Numbers the cells of a grid; what lies outside counts to the nearest cell."""
    x, y, z = np.clip(position.astype(np.int64), 0, cells - 1).T
    return (x * cells[1] + y) * cells[2] + z
