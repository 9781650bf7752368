"""Runs a detector over a labelled dataset and measures average precision."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from vrdistill_jax.evaluation.average_precision import AveragePrecision
from vrdistill_jax.structs import AnyPyramid, Detections, Scene


def evaluate(
    predict: Callable[..., Detections],
    batches: Iterable[tuple[Scene, AnyPyramid]],
    class_names: tuple[str, ...],
    thresholds: tuple[float, ...] = (0.25, 0.5),
) -> dict[str, Any]:
    """Mean average precision of `predict`.

    Args:
      predict: predict(points, pyramid) -> Detections.
      batches: labelled batches; rows whose scene.mask is False are left out.
      class_names: K names.
      thresholds: IoU thresholds.

    Returns:
      What AveragePrecision.compute returns.
    """
    precision = AveragePrecision(class_names, thresholds)
    for scene, pyramid in batches:
        if scene.boxes is None:
            raise ValueError("evaluation needs labelled scenes; this dataset has no boxes")
        detections = jax.tree.map(np.asarray, predict(scene.points, pyramid))
        precision.add_batch(detections, scene.boxes, scene.mask)
    return precision.compute()
