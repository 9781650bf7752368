"""What a figure or a page shows besides the cloud: named sets of points (votes) and of boxes (detections)."""

from typing import NamedTuple

import numpy as np

from vrdistill_jax.structs import Array

BLUE, RED = (24, 100, 220), (222, 30, 45)  # of votes, and of what is better about them
LAYER_COLORS = (BLUE, RED, (20, 140, 80), (235, 130, 0))
# From unimportant to important; the darker, the more important.
_HEAT = np.array([(255, 240, 180), (253, 165, 60), (215, 40, 40), (95, 0, 60)], np.float64)


class PointLayer(NamedTuple):
    """Points with a name, drawn larger than those of the cloud."""

    name: str
    xyz: Array  # f32[n, 3] metres, finite
    color: tuple[int, int, int] = BLUE
    values: Array | None = None  # f32[n]: shades each point instead; dark is high


class BoxSet(NamedTuple):
    """Boxes with a name: what one detector found, or the truth."""

    name: str
    boxes: Array  # f32[d, 7] centre, full size, yaw
    labels: Array  # i32[d]
    scores: Array | None = None  # f32[d] in [0, 1]


def heat_colors(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Shades of values.

    Args:
      values: f32[n].
      low: value of the lightest shade; smaller ones have it too.
      high: value of the darkest one, likewise.

    Returns:
      u8[n, 3] RGB.
    """
    share = np.clip((np.asarray(values, np.float64) - low) / max(high - low, 1e-12), 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    return np.rint(np.stack([np.interp(share, stops, channel) for channel in _HEAT.T], -1)).astype(np.uint8)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value; (0, 1) of nothing."""
    return (float(np.min(values)), float(np.max(values))) if len(values) else (0.0, 1.0)


def check_layer(layer: PointLayer) -> PointLayer:
    """The layer as NumPy arrays.

    Raises:
      ValueError: naming the layer and what is wrong with it.
    """
    xyz = np.asarray(layer.xyz, np.float32)
    values = None if layer.values is None else np.asarray(layer.values, np.float32)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or (values is not None and values.shape != xyz.shape[:1]):
        got = None if values is None else values.shape
        raise ValueError(f"layer {layer.name!r}: xyz {xyz.shape} and values {got} must be [n, 3] and [n]")
    if not np.isfinite(xyz).all() or (values is not None and not np.isfinite(values).all()):
        raise ValueError(f"layer {layer.name!r} holds NaN or infinity; leave those rows out")
    return layer._replace(xyz=xyz, values=values)
