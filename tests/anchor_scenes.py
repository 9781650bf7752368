"""Small scenes of anchors with predictions, for tests of assigners and of dense detectors."""

import numpy as np

from vrdistill_jax.assigners.assignment import Anchors
from vrdistill_jax.structs import Boxes

NUM_CLASSES = 4
LABEL_LEVELS = (0, 1, 0, 1)
STRIDES = (0.16, 0.32)


def make_boxes(seed: int, counts=(4, 2), capacity: int = 6, rotated: bool = True) -> Boxes:
    """Padded boxes of len(counts) scenes."""
    rng = np.random.default_rng(seed)
    shape = (len(counts), capacity)
    mask = np.arange(capacity) < np.array(counts)[:, None]
    center = np.where(mask[..., None], rng.uniform(-1, 1, (*shape, 3)), 0)
    size = np.where(mask[..., None], rng.uniform(0.4, 1.5, (*shape, 3)), 1)
    yaw = np.where(mask, rng.uniform(-np.pi, np.pi, shape), 0) * rotated
    label = np.where(mask, rng.integers(0, NUM_CLASSES, shape), -1)
    center, size, yaw = (x.astype(np.float32) for x in (center, size, yaw))
    return Boxes(center, size, yaw, label.astype(np.int32), mask, center)


def make_anchors(boxes: Boxes, seed: int, counts=(90, 30), pads=(6, 3), noise: float = 0.15) -> Anchors:
    """Anchors at random cells of two levels; each predicts some box of its scene, more or less well."""
    rng = np.random.default_rng(seed)
    batch = len(boxes.mask)
    xyz, mask, level = [], [], []
    for row, (count, pad, stride) in enumerate(zip(counts, pads, STRIDES, strict=True)):
        cells = round(2.4 / stride)
        picked = np.stack([rng.choice(cells**3, count, replace=False) for _ in range(batch)])
        grid = np.stack(np.unravel_index(picked, (cells,) * 3), -1) - cells // 2
        xyz.append(np.pad(grid * stride, ((0, 0), (0, pad), (0, 0))))
        mask.append(np.tile(np.arange(count + pad) < count, (batch, 1)))
        level.append(np.full(count + pad, row))
    xyz = np.concatenate(xyz, 1).astype(np.float32)
    level = np.concatenate(level).astype(np.int32)
    total = xyz.shape[1]
    predicted = np.zeros((batch, total, 7), np.float32)
    for b in range(batch):
        known = max(int(boxes.mask[b].sum()), 1)
        source = rng.integers(0, known, total)
        row = np.concatenate([boxes.center[b], boxes.size[b], boxes.yaw[b][:, None]], -1)[source]
        predicted[b] = row + rng.normal(0, noise, (total, 7)) * ([1] * 6 + [float(np.any(boxes.yaw))])
    predicted[..., 3:6] = np.maximum(predicted[..., 3:6], 0.1)
    logits = rng.normal(-1, 1.5, (batch, total, NUM_CLASSES)).astype(np.float32)
    stride = np.asarray(STRIDES, np.float32)[level]
    return Anchors(xyz, np.concatenate(mask, 1), predicted, logits, level, stride)


def take_scene(anchors: Anchors, boxes: Boxes, row: int) -> tuple[Anchors, Boxes]:
    """One scene without the batch axis."""
    single = Anchors(*(x[row] for x in anchors[:4]), *anchors[4:])
    return single, Boxes(*(x[row] for x in boxes))
