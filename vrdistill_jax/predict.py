"""Finds the furniture in a scan.

    python -m vrdistill_jax.predict --checkpoint=runs/synthrooms --input=room.ply
    python -m vrdistill_jax.predict --checkpoint=runs/synthrooms --input=a.npy --input=b.bin --output=boxes --min_score=0.3

Reads .ply, .npy, .npz and .bin, needs no labels, and writes to OUTPUT/<name of the file>/ detections.json, boxes.ply and
viewer.html (opens in any browser, without a network). What had to be assumed about the scan is printed as a warning.
"""

import json
import pathlib
import sys
import zlib
from typing import Any

import jax
import numpy as np
from absl import flags

from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.data.point_checks import CheckedCloud, check_points, input_from_scene_boxes
from vrdistill_jax.data.point_files import read_points
from vrdistill_jax.data.samples import scene_with_pyramid, unlabelled_scene
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.detectors.decoding import PREDICT
from vrdistill_jax.structs import Detections
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.training.step import make_predict_step
from vrdistill_jax.visualization.html_viewer import write_viewer
from vrdistill_jax.visualization.ply import write_boxes_ply

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's work directory or an imported checkpoint.")
_INPUT = flags.DEFINE_multi_string("input", [], "A scan; may be repeated.")
_OUTPUT = flags.DEFINE_string("output", "predictions", "Folder of the results.")
_MIN_SCORE = flags.DEFINE_float("min_score", 0.5, "Keep boxes scored higher than this, in [0, 1].", 0.0, 1.0)
_UNITS = flags.DEFINE_enum("units", "auto", ["auto", "m", "cm", "mm", "in", "ft"], "Units of the scan.")
_UP = flags.DEFINE_enum(
    "up", "auto", ["auto", "x", "y", "z", "-x", "-y", "-z"], "Axis of the scan that points up."
)
_COLUMNS = flags.DEFINE_integer("columns", None, "Values per point of a .bin file.", 3)


class Predictor:
    """A checkpoint, ready to be given scans one after the other.

    >>> predictor = Predictor("runs/synthrooms")
    >>> detections = predictor(xyz)          # f32[n, 3], metres, z up
    >>> predictor.class_names[detections.label[0]], detections.boxes[0], detections.score[0]
    """

    def __init__(self, checkpoint: str | pathlib.Path, min_score: float = PREDICT.score_threshold):
        """Loads a checkpoint; boxes scored at most `min_score` are dropped."""
        self.variables, self.config = load_inference_checkpoint(checkpoint)
        detector_config = self.config.detector
        detector = find_detector(detector_config.name)
        self.class_names = tuple(detector_config.class_names)
        self._pyramid = detector.pyramid_config(detector_config)
        decode_config = PREDICT._replace(score_threshold=min_score)
        model = detector.build(detector_config)
        self._predict = make_predict_step(model, detector.decode, detector_config, decode_config)

    def __call__(self, xyz: np.ndarray, color: np.ndarray | None = None) -> Detections:
        """Detects objects in one cloud.

        Args:
          xyz: f32[n, 3] metres, z up, finite.
          color: f32[n, 3] in [0, 1]; needed only by models that read colour.

        Returns:
          Detections of NumPy arrays without batch axis, valid rows only, best first. Clouds larger than the model's
          number of points are subsampled; the same cloud always gives the same result.
        """
        # The points that are drawn depend on the cloud alone, not on what was predicted before it.
        rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(xyz).tobytes()))
        scene = unlabelled_scene(
            xyz, color, self.config.dataset.num_points, self.config.detector.input_features, rng
        )
        scene, pyramid = stack_trees([scene_with_pyramid(scene, self._pyramid)])
        found = self._predict(self.variables, scene.points, pyramid)
        found = jax.tree.map(lambda x: np.asarray(x)[0], found)
        return jax.tree.map(lambda x: x[found.mask], found)


def describe_detections(
    found: Detections, checked: CheckedCloud, class_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The detections as JSON-ready records, in the working frame and in the frame of the input file."""
    center, corners = input_from_scene_boxes(found.boxes, checked.scene_from_input)
    return [
        {
            "class": class_names[int(found.label[row])],
            "score": round(float(found.score[row]), 6),
            "center": found.boxes[row, :3].tolist(),
            "size": found.boxes[row, 3:6].tolist(),
            "yaw": float(found.boxes[row, 6]),
            "input_center": center[row].tolist(),
            "input_corners": corners[row].tolist(),
        }
        for row in range(len(found.score))
    ]


def write_results(
    folder: pathlib.Path, source: str, checked: CheckedCloud, found: Detections, predictor: Predictor
) -> None:
    """Writes detections.json, boxes.ply and viewer.html."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "input": source,
        "frame": "metres, z up; yaw counter-clockwise about z; input_* in the frame and units of the input file",
        "scene_from_input": checked.scene_from_input.tolist(),
        "warnings": checked.warnings,
        "class_names": predictor.class_names,
        "detections": describe_detections(found, checked, predictor.class_names),
    }
    (folder / "detections.json").write_text(json.dumps(record, indent=1))
    write_boxes_ply(folder / "boxes.ply", found.boxes, found.label, found.score)
    cloud = checked.cloud
    write_viewer(
        folder / "viewer.html",
        cloud.xyz,
        cloud.color,
        found.boxes,
        found.label,
        found.score,
        predictor.class_names,
        title=pathlib.Path(source).name,
        notes=checked.warnings,
    )


def main() -> int:
    """Predicts every input."""
    if _CHECKPOINT.value is None or not _INPUT.value:
        raise ValueError(
            "--checkpoint and --input are needed, for example --checkpoint=runs/synthrooms --input=room.ply"
        )
    # Every input is read and checked before the model is loaded: bad input fails at once.
    scans = [
        (path, check_points(read_points(path, _COLUMNS.value), units=_UNITS.value, up=_UP.value))
        for path in _INPUT.value
    ]
    names = [pathlib.Path(path).stem for path, _ in scans]
    predictor = Predictor(_CHECKPOINT.value, _MIN_SCORE.value)
    for number, (path, checked) in enumerate(scans):
        for warning in checked.warnings:
            print(f"warning: {path}: {warning}", file=sys.stderr)
        found = predictor(checked.cloud.xyz, checked.cloud.color)
        name = names[number] if names.count(names[number]) == 1 else f"{names[number]}_{number}"
        folder = pathlib.Path(_OUTPUT.value) / name
        write_results(folder, path, checked, found, predictor)
        print(f"{path}: {len(found.score)} objects")
        for row in range(len(found.score)):
            x, y, z, *size, _ = found.boxes[row]
            extent = " x ".join(f"{s:.2f}" for s in size)
            label = predictor.class_names[int(found.label[row])]
            print(f"  {label:16s} {found.score[row]:.2f}  at ({x:.2f}, {y:.2f}, {z:.2f})  {extent} m")
        if not len(found.score):
            print(f"  none scored above {_MIN_SCORE.value}; try --min_score=0.2")
        print(f"  open {folder / 'viewer.html'}")
    return 0


if __name__ == "__main__":
    run_verb(main)
