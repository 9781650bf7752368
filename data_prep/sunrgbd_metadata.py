"""SUN RGB-D's Matlab metadata: each frame's files, camera and labels, and the split."""

import os
import pathlib
import posixpath
from typing import Any, NamedTuple

import numpy as np

from data_prep.matlab_files import read_matlab, structs_from
from data_prep.sunrgbd_annotations import Annotation, SceneBoxes, boxes_from_annotations
from vrdistill_jax.data.class_tables import SUNRGBD_CLASSES
from vrdistill_jax.data.point_tables import printable

_PUBLISHED_ROOT = "/n/fs/sun3d/data/"  # the metadata's paths begin with the authors' own folder


class Frame(NamedTuple):
    """One entry of the metadata."""

    folder: str  # "SUNRGBD/kv2/...", relative to the raw data, like the two paths
    depth_path: str
    color_path: str
    intrinsics: np.ndarray  # f64[3, 3] pixels
    tilt: np.ndarray  # f64[3, 3] Rtilt: rotates (x, depth, -y) of the camera to the upright frame
    boxes: SceneBoxes
    unlisted: int  # boxes of the benchmark's classes that VoteNet's extraction loses


def read_frames(
    frames_path: str | os.PathLike,
    labels_v1_path: str | os.PathLike | None = None,
    boxes2d_path: str | os.PathLike | None = None,
    all_boxes: bool = False,
) -> list[Frame | str]:
    """Reads the metadata of all frames.

    VoteNet's extraction writes a frame's boxes until the first one without a 2D box (for version 2: or with
    a 2D box of another class) and silently loses those after it. The published numbers are measured on what
    is left, so that this is the default here, too.

    Args:
      frames_path: SUNRGBDMeta3DBB_v2.mat: files, cameras and version 2 boxes.
      labels_v1_path: SUNRGBDMeta.mat of the toolbox, to take the boxes from it instead.
      boxes2d_path: SUNRGBDMeta2DBB_v2.mat, which says where the extraction stops; for version 2 unless
        `all_boxes`.
      all_boxes: keep the boxes that the extraction loses.

    Returns:
      In VoteNet's numbering, scene 000001 first: a frame, or the reason why its entry cannot be used.

    Raises:
      ValueError: if a file cannot be read as a whole.
    """
    entries = _read_entries(frames_path, "SUNRGBDMeta")
    labelled: list[dict | None] = list(entries)
    boxes2d: list[dict | None] | None = None  # None keeps every box
    if labels_v1_path is not None:
        frames_path = labels_v1_path
        labelled = _match_by_folder(entries, _read_entries(labels_v1_path, "SUNRGBDMeta"))
    if not all_boxes:
        if labels_v1_path is not None:
            boxes2d = labelled
        elif boxes2d_path is not None:
            boxes2d = list(_read_entries(boxes2d_path, "SUNRGBDMeta2DBB"))
        else:
            raise ValueError(
                "version 2 labels need SUNRGBDMeta2DBB_v2.mat, too; or keep all boxes with --all_boxes"
            )
        assert boxes2d is not None
        if len(boxes2d) != len(entries):
            raise ValueError(
                f"{boxes2d_path} has {len(boxes2d)} frames, not {len(entries)}; download both again"
            )
    frames: list[Frame | str] = []
    for row, entry in enumerate(entries):
        try:
            frames.append(
                _frame_from_entry(
                    entry, labelled[row], boxes2d[row] if boxes2d else None, labels_v1_path is None
                )
            )
        except ValueError as error:
            name = pathlib.Path(frames_path).name
            frames.append(printable(f"entry {row + 1} of {name} cannot be used: {error}"))
    return frames


def read_split(path: str | os.PathLike) -> dict[str, str]:
    """Reads the toolbox's allsplit.mat.

    Returns:
      Frame folder ("SUNRGBD/kv2/...") -> "train" or "val" (the published test frames).

    Raises:
      ValueError: if the file cannot be read or lists a folder twice.
    """
    split: dict[str, str] = {}
    found = read_matlab(path, ["alltrain", "alltest"])
    for variable, name in (("alltrain", "train"), ("alltest", "val")):
        listed = found[variable]
        for text in [listed] if isinstance(listed, str) else listed:
            try:
                folder = relative_path(text)
            except ValueError as error:
                raise ValueError(f"{path}, {variable}: {error}") from error
            if folder in split:
                raise ValueError(f"{path} lists {folder} twice; download the toolbox again")
            split[folder] = name
    return split


def relative_path(text: Any) -> str:
    """Turns a path of the metadata into one below the raw data.

    "/n/fs/sun3d/data/SUNRGBD/a//b/" becomes "SUNRGBD/a/b".

    Raises:
      ValueError: if it is no text or leads elsewhere than into SUNRGBD.
    """
    if not isinstance(text, str):
        raise ValueError(f"a path is missing (found {type(text).__name__})")
    parts = [part for part in text.removeprefix(_PUBLISHED_ROOT).split("/") if part not in ("", ".")]
    unsafe = any(part == ".." or not part.isprintable() or "\\" in part or ":" in part for part in parts)
    if unsafe or len(parts) < 2 or parts[0] != "SUNRGBD" or len(text) > 1000:
        raise ValueError(f"{text[:120]!a} is no path below SUNRGBD")
    return "/".join(parts)


def check_intrinsics(matrix: Any) -> np.ndarray:
    """Returns f64[3, 3] intrinsics, or raises ValueError if no camera can have them."""
    matrix = _matrix(matrix, "K")
    focal, center = matrix[[0, 1], [0, 1]], matrix[[0, 1], 2]
    if not ((focal > 1) & (focal < 1e5)).all() or not (np.abs(center) < 1e5).all():
        raise ValueError(
            f"K has focal lengths {focal.tolist()} and centre {center.tolist()}, which no camera has"
        )
    return matrix


def check_rotation(matrix: Any) -> np.ndarray:
    """Returns the f64[3, 3] rotation, or raises ValueError if it is none (to 1 %)."""
    matrix = _matrix(matrix, "Rtilt")
    if not np.allclose(matrix @ matrix.T, np.eye(3), atol=0.01) or np.linalg.det(matrix) < 0:
        raise ValueError(f"Rtilt is no rotation: {np.round(matrix, 4).tolist()}")
    return matrix


def _read_entries(path: str | os.PathLike, variable: str) -> list[dict]:
    try:
        return structs_from(read_matlab(path, [variable])[variable])
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}, {variable}: {message}") from error


def _frame_from_entry(entry: dict, labelled: dict | None, boxes2d: dict | None, same_classes: bool) -> Frame:
    folder = _folder(entry)
    if labelled is None:
        raise ValueError(f"the version 1 labels have no frame {folder}")
    objects = structs_from(_field(labelled, "groundtruth3DBB"))
    listed = len(objects)
    if boxes2d is not None:
        if "sequenceName" in boxes2d and _sequence(boxes2d) != _sequence(entry):
            raise ValueError(f"its 2D boxes are of another frame, {boxes2d['sequenceName']!a}")
        flat = structs_from(_field(boxes2d, "groundtruth2DBB"))
        listed = _count_listed(objects, flat, same_classes)
    lost = sum(item.get("classname") in SUNRGBD_CLASSES for item in objects[listed:])
    fields = ("classname", "centroid", "coeffs", "orientation")
    annotations = [Annotation(*[item.get(field) for field in fields]) for item in objects[:listed]]  # type: ignore[arg-type]
    return Frame(
        folder,
        relative_path(_field(entry, "depthpath")),
        relative_path(_field(entry, "rgbpath")),
        check_intrinsics(_field(entry, "K")),
        check_rotation(_field(entry, "Rtilt")),
        boxes_from_annotations(annotations),
        lost,
    )


def _count_listed(objects: list[dict], boxes2d: list[dict], same_classes: bool) -> int:
    """Counts the boxes before the one at which VoteNet's extraction script stops."""
    for row, item in enumerate(objects):
        if row >= len(boxes2d) or np.size(boxes2d[row].get("gtBb2D", ())) < 4:
            return row
        if same_classes and boxes2d[row].get("classname") != item.get("classname"):
            return row
    return len(objects)


def _match_by_folder(entries: list[dict], others: list[dict]) -> list[dict | None]:
    """Pairs two lists of frames: they have the same order, unless a folder says otherwise."""
    by_folder = {_folder_or_none(other): other for other in others}
    paired: list[dict | None] = []
    for row, entry in enumerate(entries):
        folder = _folder_or_none(entry)
        same_row = row < len(others) and _folder_or_none(others[row]) == folder
        paired.append(others[row] if same_row else by_folder.get(folder))
    return paired


def _folder(entry: dict) -> str:
    return posixpath.dirname(posixpath.dirname(relative_path(_field(entry, "depthpath"))))


def _folder_or_none(entry: dict) -> str | None:
    try:
        return _folder(entry)
    except ValueError:
        return None


def _sequence(entry: dict) -> str:
    return str(entry.get("sequenceName", "")).strip("/")


def _field(entry: dict, name: str) -> Any:
    if name not in entry:
        raise ValueError(f"it has no field {name}; fields are {', '.join(entry)[:200]}")
    return entry[name]


def _matrix(value: Any, name: str) -> np.ndarray:
    try:
        matrix = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not made of numbers") from error
    if matrix.shape != (3, 3) or not (np.abs(matrix) < 1e6).all():  # NaN, too
        raise ValueError(f"{name} is no 3x3 matrix of finite numbers")
    return matrix
