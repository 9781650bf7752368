"""Gradients behind a ReLU that two implementations of one network may take on different sides.

Rounding decides whether an input of a ReLU that is almost 0 passes. Forwards nothing comes of it; backwards one entry of the
gradient appears or vanishes, which can be a good part of a weight's gradient where few rows carry any. So a large difference
need not be an error, but it must then be exactly the difference that this one row makes.
"""

from typing import NamedTuple

import numpy as np


class Layer(NamedTuple):
    """A linear layer, the batch norm after it (in training) and the ReLU after that."""

    inputs: np.ndarray  # f32[N, I] the valid rows
    kernel: np.ndarray  # f32[I, O]
    bias: np.ndarray  # f32[O]
    scale: np.ndarray  # f32[O]
    shift: np.ndarray  # f32[O]
    epsilon: float


class Flip(NamedTuple):
    """An input of a ReLU that is on the other side in the other implementation."""

    row: int
    column: int
    value: float  # as a share of the column's largest


def undo_flips(
    ours: np.ndarray, theirs: np.ndarray, layer: Layer, slack: float, tolerance: float
) -> tuple[np.ndarray, list[Flip]]:
    """Our gradient of a layer's kernel with the ReLUs at 0 on the side where the other implementation has them.

    If row q's gradient behind the ReLU of column j changes, batch norm turns that into a change of the kernel's column by a
    multiple of d = x_q - mean(x) - z_q mean(z x), where x are the layer's inputs and z the normalised outputs of the column.
    The multiple is fitted, the direction is not: whatever else a column differs in stays.

    Args:
      ours: [I, O] gradient of the kernel.
      theirs: the same of the other implementation.
      layer: ours.
      slack: a row is taken for undecided if the ReLU's input is at most this share of the column's largest.
      tolerance: columns that agree to this share of the largest entry of `theirs` are left alone.

    Returns:
      ([I, O] the changed gradient, the flips that changed it).
    """
    x = layer.inputs.astype(np.float64)
    linear = x @ layer.kernel.astype(np.float64) + layer.bias
    normed = (linear - linear.mean(0)) / np.sqrt(linear.var(0) + layer.epsilon)
    value = layer.scale * normed + layer.shift
    share = np.abs(value) / np.abs(value).max(0)
    changed, flips = np.array(ours, np.float64), []
    apart = np.abs(theirs - ours).max(0) > tolerance * np.abs(theirs).max()
    for column in np.flatnonzero(apart):
        rows = np.flatnonzero(share[:, column] <= slack)
        if not len(rows):
            continue
        z = normed[:, column]
        direction = x[rows] - x.mean(0) - z[rows, None] * (z[:, None] * x).mean(0)
        multiple, *_ = np.linalg.lstsq(direction.T, theirs[:, column] - changed[:, column], rcond=None)
        changed[:, column] += multiple @ direction
        flips += [Flip(int(row), int(column), float(share[row, column])) for row in rows]
    return changed, flips
