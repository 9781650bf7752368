"""The .json file that goes with a scan of one's own: the boxes, and optionally the box of every point.

    {"boxes": [{"label": "chair", "center": [1.2, 0.4, 0.45], "size": [0.6, 0.6, 0.9], "yaw": 0.1}],
     "instance": "scan_01_instance.npy"}

docs/custom_dataset.md describes the schema.
"""

import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from vrdistill_jax.data.point_tables import printable, read_npy_table
from vrdistill_jax.geometry.frames import wrap_yaw

MAX_JSON_BYTES = 256 << 20
_MAX_BOXES = 10_000
_SMALLEST_SIZE = 1e-9  # in any unit; as float32, smaller ones may become 0
_BOX_KEYS = {"label", "center", "size", "yaw"}
_FILE_KEYS = {"boxes", "instance", "comment"}


class AnnotationError(ValueError):
    """A .json file that does not follow the schema: names the file, the place and what is expected."""

    def __init__(self, path: str | os.PathLike, problem: str):
        super().__init__(printable(f"{os.fspath(path)}: {problem}; docs/custom_dataset.md shows the form"))


class Annotation(NamedTuple):
    """The boxes of one scan, in the scan's own unit."""

    labels: tuple[str, ...]
    center: np.ndarray  # f64[g, 3]
    size: np.ndarray  # f64[g, 3] full extents
    yaw: np.ndarray  # f64[g] radians, in [-pi, pi)
    instance: np.ndarray | str | None  # i64[n] row of the boxes per point, -1 none; or the file that holds it


def read_annotation(path: str | os.PathLike) -> Annotation:
    """Reads the .json of a scan.

    Args:
      path: the file.

    Returns:
      The checked boxes.

    Raises:
      AnnotationError: if the file is missing, no JSON, or does not follow the schema.
    """
    path = pathlib.Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AnnotationError(path, f"has more than {MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise AnnotationError(path, 'is missing; a scan without objects has {"boxes": []}') from error
    except OSError as error:
        raise AnnotationError(path, f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(path, f"is no JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict) or not isinstance(content.get("boxes"), list):
        raise AnnotationError(path, 'has no list "boxes"')
    _check_keys(path, "the file", content, _FILE_KEYS)
    boxes = content["boxes"]
    if len(boxes) > _MAX_BOXES:
        raise AnnotationError(path, f"has {len(boxes)} boxes, more than {_MAX_BOXES}")
    labels, rows = [], np.zeros((len(boxes), 7))
    for i, box in enumerate(boxes):
        if not isinstance(box, dict):
            raise AnnotationError(path, f"boxes[{i}] is no object")
        _check_keys(path, f"boxes[{i}]", box, _BOX_KEYS)
        label = box.get("label")
        if not isinstance(label, str) or not label.strip() or len(label) > 100 or not label.isprintable():
            raise AnnotationError(path, f"boxes[{i}].label is {str(label)[:60]!r}, expected a name")
        labels.append(label.strip())
        rows[i, :3] = _read_numbers(path, f"boxes[{i}].center", box.get("center"), 3)
        rows[i, 3:6] = _read_numbers(path, f"boxes[{i}].size", box.get("size"), 3)
        rows[i, 6:] = _read_numbers(path, f"boxes[{i}].yaw", [box.get("yaw", 0.0)], 1)
        if (rows[i, 3:6] < _SMALLEST_SIZE).any():
            raise AnnotationError(path, f"boxes[{i}].size is {box['size']}; full extents are greater than 0")
        if abs(rows[i, 6]) > 2 * math.pi + 1e-6:
            raise AnnotationError(path, f"boxes[{i}].yaw is {rows[i, 6]:g}; it is in radians, at most 2 pi")
    instance = content.get("instance")
    if isinstance(instance, list):
        if any(type(value) is not int or abs(value) > _MAX_BOXES for value in instance):
            raise AnnotationError(path, "instance holds something else than rows of boxes or -1")
        instance = np.array(instance, np.int64)
    elif instance is not None and not (
        isinstance(instance, str) and re.fullmatch(r"[^\\/:\0]+\.npy", instance)
    ):
        expected = "a list of integers or the name of a .npy file in the same folder"
        raise AnnotationError(path, f"instance is {str(instance)[:60]!r}, expected {expected}")
    yaw = np.asarray(wrap_yaw(rows[:, 6]))
    return Annotation(tuple(labels), rows[:, :3], rows[:, 3:6], yaw, instance)


def read_instance(path: pathlib.Path, annotation: Annotation, count: int) -> np.ndarray | None:
    """Gives the box of every point, if the annotation has it.

    Args:
      path: the .json file.
      annotation: what it holds.
      count: points of the scan.

    Returns:
      i64[n] row of the boxes, -1 none; or None.

    Raises:
      ValueError: if the rows are not as many as the points, or not rows of the boxes.
    """
    instance = annotation.instance
    if instance is None:
        return None
    if isinstance(instance, str):
        file = path.with_name(instance)
        try:
            with file.open("rb") as stream:
                instance = read_npy_table(file, stream, file.stat().st_size)
        except OSError as error:
            raise AnnotationError(
                path, f"instance file {file.name!r} cannot be read ({error.strerror})"
            ) from error
        if instance.dtype.kind not in "iu":
            raise AnnotationError(path, f"{file.name!r} holds {instance.dtype}, expected integers")
    if instance.shape != (count,):
        raise AnnotationError(path, f"instance has shape {instance.shape}, but the scan has {count} points")
    boxes = len(annotation.labels)
    if count and not -1 <= int(instance.min()) <= int(instance.max()) < boxes:
        problem = f"instance lies in {instance.min()}..{instance.max()}, expected rows of {boxes} boxes or -1"
        raise AnnotationError(path, problem)
    return instance.astype(np.int64)


def _read_numbers(path: pathlib.Path, where: str, values: Any, count: int) -> list[float]:
    good = isinstance(values, list) and len(values) == count
    if not good or any(type(v) not in (int, float) or not abs(v) < 1e6 for v in values):
        what = f"{count} numbers" if count > 1 else "a number"
        raise AnnotationError(path, f"{where} is {str(values)[:60]}, expected {what} below 1e6")
    return [float(value) for value in values]


def _check_keys(path: pathlib.Path, where: str, table: dict, known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise AnnotationError(path, f"{where} has the unknown field {unknown[0][:60]!r}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
