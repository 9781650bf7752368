"""SUN RGB-D's box annotations and the sample that every reader of its points makes with them."""

import os
import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from data_prep.conversion import MIN_SIZE
from vrdistill_jax.data.class_tables import SUNRGBD_CLASSES
from vrdistill_jax.data.point_tables import printable
from vrdistill_jax.data.samples import vote_slots
from vrdistill_jax.geometry.frames import wrap_yaw

MAX_TEXT_BYTES = 1 << 20
MAX_OBJECTS = 1000  # of a frame; the dataset's fullest has some 200
_LABEL_VALUES = 12  # after the class name: a 2D box (4), centre (3), half sizes (3), direction (2)


class Annotation(NamedTuple):
    """One labelled object as SUN RGB-D describes it, in the upright frame."""

    name: str
    centroid: Any  # f64[3] metres
    coeffs: Any  # f64[3] half of width, length and height in metres, of either sign
    orientation: Any  # f64[2] or f64[3] direction of the front, x and y


class SceneBoxes(NamedTuple):
    """The boxes of a scene that belong to the benchmark's classes, and what was left out."""

    boxes: np.ndarray  # f32[g, 7] centre, full size, yaw
    label: np.ndarray  # i32[g] row of SUNRGBD_CLASSES
    other_classes: Counter[str]  # class name -> boxes left out
    notes: tuple[str, ...]


def boxes_from_annotations(annotations: Iterable[Annotation]) -> SceneBoxes:
    """Converts a scene's annotations to boxes of the contract.

    Args:
      annotations: in any number; classes that the benchmark does not use are left out and counted.

    Returns:
      The boxes, in the same order. Boxes with unusable numbers are left out and named in the notes.

    Raises:
      ValueError: if there are more than `MAX_OBJECTS`.

    Source: VoteNet, sunrgbd_utils.py: the first coefficient is half the width, the second half the length.
    Differs: VoteNet's heading is -atan2(y, x), clockwise; the contract's yaw is its negative. Sizes of 0
    become 1 mm.
    """
    boxes, labels, notes = [], [], []
    others: Counter[str] = Counter()
    for row, annotation in enumerate(annotations, 1):
        if row > MAX_OBJECTS:
            raise ValueError(f"a frame has more than {MAX_OBJECTS} objects")
        if annotation.name not in SUNRGBD_CLASSES:
            name = (
                annotation.name if isinstance(annotation.name, str) else f"<{type(annotation.name).__name__}>"
            )
            others[printable(name, 60)] += 1
            continue
        try:
            box = _box_from_annotation(annotation)
        except ValueError as error:
            notes.append(f"object {row} ({annotation.name}) is left out: {error}")
            continue
        if (box[3:6] < MIN_SIZE).any():
            notes.append(f"object {row} ({annotation.name}) is flat and was made {MIN_SIZE} m thick")
            box[3:6] = np.maximum(box[3:6], MIN_SIZE)
        boxes.append(box)
        labels.append(SUNRGBD_CLASSES.index(annotation.name))
    array = np.array(boxes, np.float64).reshape(-1, 7).astype(np.float32)
    array[:, 6] = wrap_yaw(array[:, 6])  # pi itself, and what rounding made of it, belongs to the other end
    return SceneBoxes(array, np.array(labels, np.int32), others, tuple(notes))


def read_label_file(path: str | os.PathLike) -> list[Annotation]:
    """Reads a label file of VoteNet's extraction: per line class, 2D box, centre, half sizes, direction.

    Raises:
      ValueError: naming the file and line that cannot be read.
    """
    annotations: list[Annotation] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word) for word in words[-_LABEL_VALUES:]]
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; download or extract it again") from error
        if len(words) <= _LABEL_VALUES:
            raise ValueError(
                f"{path}, line {number} has {len(words)} words, expected a class and {_LABEL_VALUES} "
                "numbers; download or extract it again"
            )
        if len(annotations) == MAX_OBJECTS:
            raise ValueError(f"{path} has more than {MAX_OBJECTS} objects; download or extract it again")
        name = " ".join(words[:-_LABEL_VALUES])
        annotations.append(Annotation(name, values[4:7], values[7:10], values[10:12]))
    return annotations


def read_text(path: str | os.PathLike) -> str:
    """Reads a small ASCII file.

    Raises:
      ValueError: naming the file, if it is missing, large or no text.
    """
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"{path} has more than {MAX_TEXT_BYTES} bytes; is it the right file?")
        return path.read_bytes().decode("ascii")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file ({error.reason} at byte {error.start})") from error


def sample_from_points(
    scene: str, xyz: np.ndarray, color: np.ndarray, scene_boxes: SceneBoxes, num_points: int
) -> dict:
    """Draws points without replacement and joins them with the boxes.

    Args:
      scene: VoteNet's number of the scene, "000001" on; it seeds the draw.
      xyz: f32[m, 3] metres, upright.
      color: f32[m, 3] in [0, 1].
      scene_boxes: the scene's boxes.
      num_points: at most so many points are kept, in the order they came; 0 keeps all.

    Returns:
      A sample of the stored form. Its instance is the first box that holds the point, -1 none: SUN RGB-D
      has no instance labels, and readers find overlapping boxes anew.
    """
    if num_points and len(xyz) > num_points:
        rng = np.random.default_rng(int(scene))
        rows = np.sort(rng.choice(len(xyz), num_points, replace=False, shuffle=False))
        xyz, color = xyz[rows], color[rows]
    boxes = scene_boxes.boxes
    return {
        "xyz": xyz,
        "color": color,
        "instance": vote_slots(xyz, boxes)[:, 0],
        "boxes_center": boxes[:, :3],
        "boxes_size": boxes[:, 3:6],
        "boxes_yaw": boxes[:, 6],
        "boxes_label": scene_boxes.label,
        "vote_center": boxes[:, :3],
        "notes": scene_boxes.notes,
    }


def _box_from_annotation(annotation: Annotation) -> np.ndarray:
    vectors = []
    for name, counts in (("centroid", (3,)), ("coeffs", (3,)), ("orientation", (2, 3))):
        value = getattr(annotation, name)
        try:
            vector = np.ravel(np.asarray(value, np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(f"its {name} is not made of numbers") from error
        if vector.size not in counts:
            raise ValueError(f"its {name} has {vector.size} values, expected {counts[0]}")
        if not (np.abs(vector) < 1e6).all():  # false for NaN, too
            raise ValueError(f"its {name} is {vector.tolist()}")
        vectors.append(vector)
    center, half, direction = vectors
    if not direction[:2].any():
        raise ValueError("its orientation is (0, 0)")
    width, length, height = 2 * np.abs(half)
    return np.array([*center, length, width, height, np.arctan2(direction[1], direction[0])])
