"""How well the scores of a trained TR3D or SR3D agree with its boxes (SR3D: figure 6 and table 6)."""

import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vrdistill_jax.data.loader import evaluation_batches
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.evaluation.average_precision import AveragePrecision
from vrdistill_jax.evaluation.case_study import CORRECTIONS, correct_scores
from vrdistill_jax.evaluation.consistency import PredictionConsistency
from vrdistill_jax.experiments.analysis import read_curve
from vrdistill_jax.structs import DetectorOutput, Scene
from vrdistill_jax.training.checkpoint import load_inference_checkpoint

DETECTORS = ("tr3d", "sr3d")  # whose decoding reads the class logits of all anchors and nothing else
CURVES = ("aic", "aic_top_k", "score_top_k", "quality_top_k")  # of the logged metrics


def analyse_alignment(workdir: str | pathlib.Path, split: str = "val") -> dict[str, Any]:
    """Measures a run on labelled scenes.

    Args:
      workdir: of a training run of TR3D or SR3D.
      split: "train" or "val".

    Returns:
      "aic", "aic_top_k": [[step, mean |score - IoU| of positives over the 50 steps before], ...] from the run's metrics, of
        its own positives and of those that TR3D's assigner would choose; "score_top_k", "quality_top_k": the same of the mean
        score and the mean IoU of the latter;
      "consistency": what PredictionConsistency.compute returns, with the compared detections as "points";
      "case_study": AP with scores corrected by the ground truth, {"gt_ctr" or "gt_iou": {"mAP@0.25", "mAP@0.5"}}.
    """
    variables, config = load_inference_checkpoint(workdir)
    detector, settings = find_detector(config.detector.name), config.detector
    model, pyramid = detector.build(settings), detector.pyramid_config(settings)

    @jax.jit
    def detect(variables, scene: Scene, pyramid):
        output: Any = model.apply(variables, scene.points, pyramid, train=False)
        decode = partial(detector.decode, points=scene.points, config=settings)
        boxes: Any = scene.boxes  # labelled, see below
        corrected = {
            kind: output._replace(
                predictions=correct_scores(
                    output.predictions, anchor_points(output), boxes, kind, settings.oriented
                )
            )
            for kind in CORRECTIONS
        }
        return decode(output), {kind: decode(each) for kind, each in corrected.items()}

    names = tuple(settings.class_names)
    consistency = PredictionConsistency(names)
    precision = {kind: AveragePrecision(names) for kind in CORRECTIONS}
    source = open_source(config.dataset, split)
    for scene, built in evaluation_batches(source, config, pyramid, config.train.eval_batch_size):
        if scene.boxes is None:
            raise ValueError("alignment is measured on labelled scenes; this dataset has no boxes")
        found, corrected = jax.tree.map(np.asarray, detect(variables, scene, built))
        consistency.add_batch(found, scene.boxes, scene.mask)
        for kind, detections in corrected.items():
            precision[kind].add_batch(detections, scene.boxes, scene.mask)
    points = consistency.detections()
    return {name: read_curve(workdir, f"train/{name}") for name in CURVES} | {
        "consistency": consistency.compute()
        | {
            "points": {
                "label": points.label.tolist(),
                "score": points.score.round(4).tolist(),
                "iou": points.iou.round(4).tolist(),
            }
        },
        "case_study": {
            kind: {name: each.compute()[name] for name in ("mAP@0.25", "mAP@0.5")}
            for kind, each in precision.items()
        },
    }


def anchor_points(output: DetectorOutput) -> jax.Array:
    """f32[B, A, 3] where a dense network predicts, in the order of its predictions."""
    levels = [output.taps[name].xyz for name in sorted(output.taps) if name.startswith("level")]
    return jnp.concatenate(levels, 1)
