"""What is measured on a trained run besides average precision, on the held-out scenes.

Where votes are (the distance of votes on objects to the centre of their object: teacher's, refined, student's), how far teacher
and student find the same objects, and how recall depends on the size of an object. Also how what was logged went.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.data.loader import evaluation_batches
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.detectors.decoding import PREDICT
from vrdistill_jax.distillers import vrdistill
from vrdistill_jax.evaluation.agreement import Agreement, RecallByVolume
from vrdistill_jax.evaluation.consistency import training_curve
from vrdistill_jax.structs import Boxes, Detections, DetectorOutput, PointSet, Scene
from vrdistill_jax.training.checkpoint import load_distiller_params, load_inference_checkpoint
from vrdistill_jax.training.distill import choose_proposals
from vrdistill_jax.training.state import Batch
from vrdistill_jax.training.teacher import Teacher, load_teacher

SAME_OBJECT = 0.5  # IoU from which teacher and student agree


def analyse_run(
    workdir: str | pathlib.Path, split: str = "val", dataset: str | None = None, data_dir: str | None = None
) -> dict[str, Any]:
    """Measures a run on labelled scenes.

    Args:
      workdir: of a training run (teacher, plain or distilled student).
      split: "train" or "val".
      dataset: name of another dataset with the same classes; None for the run's own.
      data_dir: where it lies; None for where the run had it.

    Returns:
      "recall_by_volume": of detections with objectness > 0.5, at IoU 0.25; with votes,
      "vote_distance": {"student", and of a distilled run "teacher" and (VRDistill) "refined"}, each {"mean_m", "num_votes"}:
        the mean distance in metres from votes of seeds on objects to the centre of their object;
      of a distilled run "agreement": share of the detections (objectness > 0.5) of teacher and student that are the same
        object (class, and IoU > 0.5).
    """
    run = load_run(workdir)
    run.config.dataset.name = dataset or run.config.dataset.name
    run.config.dataset.data_dir = run.config.dataset.data_dir if data_dir is None else data_dir
    recall, agreement = RecallByVolume(), Agreement(SAME_OBJECT)
    sums: dict[str, np.ndarray] = {}
    for scene, found, taught, distances in run.outputs(split):
        for row in np.flatnonzero(scene.mask):
            own = kept_detections(found, row)
            recall.add(*own, *real_boxes(scene.boxes, row))
            if taught is not None:
                agreement.add(*own, *kept_detections(taught, row))
        for name, values in distances.items():
            sums[name] = sums.get(name, np.zeros(2)) + values
    result: dict[str, Any] = {"recall_by_volume": recall.compute()}
    if sums:
        result["vote_distance"] = {
            name: {"mean_m": float(total / max(count, 1)), "num_votes": int(count)}
            for name, (total, count) in sums.items()
        }
    if run.teacher is not None:
        result["agreement"] = agreement.compute()
    return result


class Run:
    """A trained run, ready to be asked for everything that it and its teacher make of a scene."""

    def __init__(
        self, variables: dict, config: ConfigDict, teacher: Teacher | None, refinement: tuple | None
    ):
        """`refinement`: (distiller module, its parameters) of VRDistill, or None."""
        self.config, self.teacher = config, teacher
        detector = find_detector(config.detector.name)
        model = detector.build(config.detector)

        def votes_of(output: DetectorOutput) -> PointSet | None:
            level = refinement[0].vote_level if refinement else "cluster"
            return vrdistill.select_votes(output, level) if "clusters" in output.taps else None

        @jax.jit
        def measure(variables, teacher_variables, params, batch):
            scene = batch.scene
            output = model.apply(variables, scene.points, batch.pyramid, train=False)
            found = detector.decode(output, scene.points, config.detector, PREDICT)
            votes, taught = {"student": votes_of(output)}, None
            if teacher is not None:
                of_teacher: Any = teacher.model.apply(teacher_variables, *batch.teacher_input, train=False)
                decode = find_detector(teacher.config.name).decode
                taught = decode(of_teacher, scene.points, teacher.config, PREDICT)
                of_teacher = choose_proposals(teacher.model, teacher_variables, of_teacher, of_teacher)
                like = of_teacher if teacher.same_geometry else output
                output = choose_proposals(model, variables, output, like)
                votes = {"student": votes_of(output), "teacher": votes_of(of_teacher)}
                if refinement is not None:
                    votes["teacher"], votes["refined"] = vrdistill.refine_votes(
                        refinement[0], params, of_teacher
                    )
            distances = {name: distance_sum(v, scene) for name, v in votes.items() if v is not None}
            return found, taught, votes, distances

        self._measure = measure
        self._constants = (
            variables,
            teacher.variables if teacher else {},
            refinement[1] if refinement else {},
        )

    def measure(self, batch: Batch) -> tuple[Detections, Detections | None, dict, dict]:
        """(detections, the teacher's or None, votes by whose they are, (sum of distances, count) by whose they are)."""
        return jax.tree.map(np.asarray, self._measure(*self._constants, batch))

    def outputs(self, split: str):
        """Goes through the dataset: (scene, detections, the teacher's, distances) per batch."""
        pyramid = find_detector(self.config.detector.name).pyramid_config(self.config.detector)
        source, batch_size = open_source(self.config.dataset, split), self.config.train.eval_batch_size
        reads = self.teacher.reads if self.teacher else None
        for parts in evaluation_batches(source, self.config, pyramid, batch_size, reads):
            batch = Batch(*parts)
            found, taught, _, distances = self.measure(batch)
            yield batch.scene, found, taught, distances


def load_run(workdir: str | pathlib.Path) -> Run:
    """Loads a run with the teacher and the refinement that it was trained with.

    Raises:
      ValueError: if there is no such run, or its teacher is gone or no longer the same.
    """
    variables, config = load_inference_checkpoint(workdir)
    teacher, refinement = None, None
    if config.get("distiller"):
        teacher = load_teacher(config, workdir)
        entry = config.distiller.methods.get("vrdistill")
        if entry:
            # A run may be older than an entry; those that came later do not change what a refinement is.
            entry = ConfigDict(vrdistill.default_config().to_dict() | entry.to_dict())
            module = vrdistill.build(entry, config.detector, teacher.config)
            refinement = (module, load_distiller_params(workdir)["vrdistill"])
    return Run(variables, config, teacher, refinement)


def read_curve(workdir: str | pathlib.Path, key: str) -> list[list[float]]:
    """A logged value over training: [[step, mean of the 50 steps before], ...]; empty where it was not logged."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return training_curve(rows, key=key).round(5).tolist()


def distance_sum(votes: PointSet, scene: Scene) -> jax.Array:
    """Sum of the distances (metres) of votes on objects to their centres, and their number: f32[2]."""
    distance, on_object = vrdistill.center_distances(votes, scene)
    return jnp.stack([jnp.sum(jnp.where(on_object, distance, 0.0)), jnp.sum(on_object)])


def kept_detections(detections: Detections, row: int | np.integer) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [n, 7] and labels [n] of one scene."""
    kept = detections.mask[row]
    return detections.boxes[row][kept], detections.label[row][kept]


def real_boxes(boxes: Boxes | None, row: int | np.integer) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth [g, 7] and labels [g] of one scene."""
    if boxes is None:
        raise ValueError("this needs labelled scenes; this dataset has no boxes")
    real = np.asarray(boxes.mask)[row]
    rows = np.concatenate([boxes.center[row], boxes.size[row], boxes.yaw[row][:, None]], axis=-1)
    return rows[real], np.asarray(boxes.label)[row][real]
