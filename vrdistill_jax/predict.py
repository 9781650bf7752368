"""Finds the furniture in a scan.

    python -m vrdistill_jax.predict --checkpoint=runs/synthrooms --input=room.ply
    python -m vrdistill_jax.predict --checkpoint=runs/synthrooms --input=a.npy --input=b.bin --output=boxes --min_score=0.3

Reads .ply, .pcd, .las, .npy, .npz and .bin, needs no labels, and writes to OUTPUT/<name of the file>/ detections.json,
boxes.ply and viewer.html (opens in any browser, without a network). What had to be assumed about the scan is printed as
a warning. docs/predict.md describes options and files.
"""

import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.loader import stack_scenes
from vrdistill_jax.data.point_checks import (
    METERS_PER_UNIT,
    UP_AXES,
    CheckedCloud,
    check_points,
    input_from_scene_boxes,
)
from vrdistill_jax.data.point_files import read_points
from vrdistill_jax.data.samples import pad_points, scene_with_pyramid, stack_features
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.detectors.decoding import PREDICT
from vrdistill_jax.recipes import densify
from vrdistill_jax.structs import Detections, DetectorOutput, Points, Predictions, Scene
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.visualization.html_viewer import write_viewer
from vrdistill_jax.visualization.ply import write_boxes_ply

MAX_PASSES = 4
EXAMPLE = "--checkpoint=runs/synthrooms --input=room.ply"


class Predictor:
    """A checkpoint, ready to be given scans one after the other.

    >>> predictor = Predictor("runs/synthrooms")
    >>> detections = predictor(xyz)          # f32[n, 3], metres, z up
    >>> predictor.class_names[detections.label[0]], detections.boxes[0], detections.score[0]
    """

    def __init__(
        self,
        checkpoint: str | pathlib.Path,
        min_score: float = PREDICT.score_threshold,
        max_passes: int = MAX_PASSES,
        density: int = 1,
    ):
        """Loads a checkpoint.

        Args:
          checkpoint: a run's work directory or an imported checkpoint.
          min_score: boxes scored at most this are dropped.
          max_passes: how often the network may read a scan of more than `num_points` points, each time other ones.
          density: how many times more points, centres and proposals than in training; see `recipes.densify`.
        """
        if max_passes < 1:
            raise ValueError(f"max_passes is {max_passes}; the network must read a scan at least once")
        self.variables, self.config = load_inference_checkpoint(checkpoint)
        densify(self.config, density)
        detector_config = self.config.detector
        detector = find_detector(detector_config.name)
        self.class_names = tuple(detector_config.class_names)
        self.num_points = self.config.dataset.num_points
        self.max_passes = max_passes
        self._pyramid = detector.pyramid_config(detector_config)
        model = detector.build(detector_config)
        decode_config = PREDICT._replace(score_threshold=min_score)

        @jax.jit
        def propose(variables, points, pyramid) -> Predictions:
            return model.apply(variables, points, pyramid, train=False).predictions

        @jax.jit
        def decode(predictions: Predictions, points: Points) -> Detections:
            return detector.decode(
                DetectorOutput(predictions, {}, None), points, detector_config, decode_config
            )

        self._propose, self._decode = propose, decode

    def __call__(self, xyz: np.ndarray, color: np.ndarray | None = None) -> Detections:
        """Detects objects in one cloud.

        A cloud of more than `num_points` points is read in several passes, which together cover it as far as
        `max_passes` allows; the boxes of all passes compete in one suppression. One pass alone depends on the points
        that happen to be drawn (docs/predict.md has figures).

        Args:
          xyz: f32[n, 3] metres, z up, finite; `check_points` makes it so.
          color: f32[n, 3] in [0, 1]; needed only by models that read colour.

        Returns:
          Detections of NumPy arrays without batch axis, valid rows only, best first. The same cloud always gives the
          same result; which points are drawn depends on their number alone.

        Raises:
          ValueError: if the cloud is not finite [n, 3], or lacks colours that the model reads.
        """
        xyz = np.ascontiguousarray(xyz, np.float32)
        if xyz.ndim != 2 or xyz.shape[1] != 3 or not len(xyz) or not np.isfinite(xyz).all():
            raise ValueError(
                f"xyz of shape {xyz.shape} must be finite [n, 3] with n >= 1; clean the scan with check_points first"
            )
        if color is not None and np.shape(color) != xyz.shape:
            raise ValueError(f"color has shape {np.shape(color)}, expected {xyz.shape} like xyz")
        passes = []
        for scene in self._cut_passes(xyz, color):
            scene, pyramid = stack_scenes([scene_with_pyramid(scene, self._pyramid)], self._pyramid)
            passes.append((self._propose(self.variables, scene.points, pyramid), scene.points))
        # Candidates and points of all passes become those of one scene.
        predictions, points = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *passes)
        found = jax.tree.map(lambda x: np.asarray(x)[0], self._decode(predictions, points))
        return jax.tree.map(lambda x: x[found.mask], found)

    def count_passes(self, num_points: int) -> int:
        """How often the network reads a cloud of so many points."""
        return min(self.max_passes, math.ceil(num_points / self.num_points))

    def _cut_passes(self, xyz: np.ndarray, color: np.ndarray | None) -> Iterator[Scene]:
        """Cuts one random order of the points into pieces; the last piece of a covered cloud overlaps the one before."""
        features = stack_features(xyz, color, self.config.detector.input_features)
        rng = np.random.default_rng(0)
        order = rng.permutation(len(xyz))
        for number in range(self.count_passes(len(xyz))):
            end = min((number + 1) * self.num_points, len(xyz))
            rows = order[max(end - self.num_points, 0) : end]
            points, _ = pad_points(xyz[rows], features[rows], self.num_points, rng)
            yield Scene(points, None, None, np.eye(4, dtype=np.float32), np.int32(-1), np.True_)


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
        "num_points": len(checked.cloud.xyz),
        "num_points_per_pass": predictor.num_points,
        "num_passes": predictor.count_passes(len(checked.cloud.xyz)),
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


def read_scan(
    path: str, *, units: str = "auto", up: str = "auto", columns: int | None = None
) -> CheckedCloud:
    """Reads and checks one scan; errors name the file. Options as in `check_points` and `read_points`."""
    try:
        return check_points(read_points(path, columns), units=units, up=up)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if path in message else f"{path}: {message}") from error


def make_output_folder(path: str) -> pathlib.Path:
    """Makes the folder of the results, so that a wrong one is found before anything is computed."""
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output={path} cannot be made ({error.strerror}); choose another folder"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"--output={path} cannot be written to; choose another folder or change its permissions"
        )
    return folder


def name_results(paths: Sequence[str]) -> list[str]:
    """A name for each input's results: the file's stem, numbered from 2 on where it is taken."""
    names: list[str] = []
    for path in paths:
        stem = name = pathlib.Path(path).stem
        number = 2
        while name.lower() in {other.lower() for other in names}:  # some file systems ignore case
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def print_detections(found: Detections, class_names: tuple[str, ...], min_score: float) -> None:
    """Prints a line per object."""
    for row in range(len(found.score)):
        x, y, z, *size, _ = found.boxes[row]
        extent = " x ".join(f"{s:.2f}" for s in size)
        label = class_names[int(found.label[row])]
        print(f"  {label:16s} {found.score[row]:.2f}  at ({x:.2f}, {y:.2f}, {z:.2f})  {extent} m")
    if not len(found.score):
        print(f"  none scored above {min_score:g}; try a lower --min_score")


def predict_files(
    checkpoint: str,
    inputs: Sequence[str],
    output: str,
    *,
    min_score: float = PREDICT.score_threshold,
    max_passes: int = MAX_PASSES,
    density: int = 1,
    **reading: Any,
) -> None:
    """Predicts files, writes the results and prints them.

    Args:
      checkpoint: a run's work directory or an imported checkpoint.
      inputs: scans.
      output: folder of the results; one sub-folder per scan.
      min_score: as in `Predictor`.
      max_passes: as in `Predictor`.
      density: as in `Predictor`.
      **reading: options of `read_scan`.

    Raises:
      ValueError: if a scan, the output folder or the checkpoint is of no use; nothing is predicted then.
    """
    # Every input is read and checked before the model is loaded: bad input fails at once.
    scans = [read_scan(path, **reading) for path in inputs]
    folder = make_output_folder(output)
    predictor = Predictor(checkpoint, min_score, max_passes, density)
    for path, name, checked in zip(inputs, name_results(inputs), scans, strict=True):
        for warning in checked.warnings:
            print(f"warning: {path}: {warning}", file=sys.stderr)
        found = predictor(checked.cloud.xyz, checked.cloud.color)
        write_results(folder / name, path, checked, found, predictor)
        print(f"{path}: {len(found.score)} objects")
        print_detections(found, predictor.class_names, min_score)
        print(f"  open {folder / name / 'viewer.html'}")


def define_flags() -> None:
    """Declares the verb's flags; not at import, so that `Predictor` can be used in any program."""
    flags.DEFINE_string("checkpoint", None, "A run's work directory or an imported checkpoint.")
    flags.DEFINE_multi_string("input", [], "A scan; may be repeated.")
    flags.DEFINE_string("output", "predictions", "Folder of the results.")
    flags.DEFINE_float(
        "min_score", PREDICT.score_threshold, "Keep boxes scored higher than this, in [0, 1].", 0.0, 1.0
    )
    flags.DEFINE_integer(
        "max_passes", MAX_PASSES, "How often a scan larger than the network's input is read; 1 is fastest.", 1
    )
    flags.DEFINE_integer("density", 1, "How many times more points the detector reads than in training.", 1)
    flags.DEFINE_enum("units", "auto", ["auto", *METERS_PER_UNIT], "Units of the scan.")
    flags.DEFINE_enum("up", "auto", ["auto", *UP_AXES], "Axis of the scan that points up.")
    flags.DEFINE_integer("columns", None, "Values per point of a .bin file.", 3)


def main() -> int:
    """Predicts every input."""
    options = flags.FLAGS
    if options.checkpoint is None or not options.input:
        raise ValueError(f"--checkpoint and --input are needed, for example {EXAMPLE}")
    predict_files(
        options.checkpoint,
        options.input,
        options.output,
        min_score=options.min_score,
        max_passes=options.max_passes,
        density=options.density,
        units=options.units,
        up=options.up,
        columns=options.columns,
    )
    return 0


if __name__ == "__main__":
    define_flags()
    run_verb(main)
