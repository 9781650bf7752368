"""Outputs of a detector with drawn numbers, to be written down under a reference's names.

Of datasets that no golden folder at hand has, comparisons are tested with these: what is written down must agree, what is
changed must not.
"""

from types import SimpleNamespace

import jax
import numpy as np
from ml_collections import ConfigDict
from scenes import make_batch, tiny_config

from vrdistill_jax.detectors import find_detector
from vrdistill_jax.geometry.boxes import corners_from_boxes
from vrdistill_jax.interop.parity import ParityTable

LEVELS = ((64, 0.5, 8), (32, 0.8, 8), (16, 1.0, 8), (8, 1.5, 8))


def draw_output(config: ConfigDict, **changes) -> SimpleNamespace:
    """A batch of the tiny scenes and an output of the network that `config.detector` describes, with random numbers."""
    whole = tiny_config()
    whole.detector, whole.dataset.oriented = config.detector, config.dataset.oriented
    whole.detector.update(changes)
    batch, rng = make_batch(whole), np.random.default_rng(0)
    model = find_detector(whole.detector.name).build(whole.detector)
    arguments = batch.scene.points, batch.pyramid
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments, train=False))
    shapes = jax.eval_shape(lambda v: model.apply(v, *arguments, train=False), variables)

    def fill(leaf):
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        if np.issubdtype(leaf.dtype, np.integer):
            return np.broadcast_to(np.arange(leaf.shape[-1]), leaf.shape).astype(leaf.dtype)
        return rng.normal(size=leaf.shape).astype(np.float32)

    output = jax.tree.map(fill, shapes)
    return SimpleNamespace(config=whole, batch=batch, output=output, table=ParityTable())


def camera(boxes) -> np.ndarray:
    """Corners in the reference's camera frame: (x, -z, y)."""
    x, y, z = np.moveaxis(np.asarray(corners_from_boxes(boxes)), -1, 0)
    return np.stack([x, -z, y], -1)


def softmax(logits):
    """Of the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def names(table) -> set[str]:
    """Of all rows of a table."""
    return {row.name for row in table.rows}


def channels_first(values):
    """[B, N, C] -> [B, C, N]."""
    return np.swapaxes(values, 1, 2)
