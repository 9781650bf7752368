"""The folder that VoteNet's Matlab scripts extract from SUN RGB-D (`sunrgbd_trainval`)."""

import contextlib
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.conversion import check_scene_id
from data_prep.matlab_files import read_matlab
from data_prep.sunrgbd_annotations import (
    boxes_from_annotations,
    read_label_file,
    read_text,
    sample_from_points,
)
from data_prep.sunrgbd_metadata import check_intrinsics, check_rotation

LABEL_FOLDERS = {"v1": "label_v1", "v2": "label"}
LAST_VAL_SCENE = 5050  # the official test frames come first in the metadata
LAST_SCENE = 10335
MAX_DEPTH_BYTES = 1 << 29


def list_scenes(root: str | os.PathLike) -> dict[str, list[str]]:
    """Lists the scenes of a folder by split.

    Args:
      root: holds depth/%06d.mat and, where the split script ran, train_data_idx.txt and val_data_idx.txt;
        without them the official numbering is used.

    Returns:
      Ids of the scenes whose depth file exists, under "train" and "val".

    Raises:
      ValueError: if the folder or its lists cannot be used.
    """
    root = pathlib.Path(root)
    if not (root / "depth").is_dir():
        raise ValueError(
            f"{root} holds no folder depth; --trainval names the folder of VoteNet's Matlab extraction"
        )
    numbers = {"train": range(LAST_VAL_SCENE + 1, LAST_SCENE + 1), "val": range(1, LAST_VAL_SCENE + 1)}
    splits = {}
    for split, official in numbers.items():
        path = root / f"{split}_data_idx.txt"
        listed = (
            [_scene_number(word, path) for word in read_text(path).split()] if path.exists() else official
        )
        scenes = [f"{number:06d}" for number in listed]
        splits[split] = [scene for scene in scenes if (root / "depth" / f"{scene}.mat").is_file()]
    return splits


def convert_extracted(scene: str, split: str, root: str | os.PathLike, labels: str, num_points: int) -> dict:
    """Reads one extracted scene as a sample, for `convert_dataset`.

    Args:
      scene: "000001" .. "010335".
      split: not used.
      root: as in `list_scenes`.
      labels: "v1" or "v2".
      num_points: points kept per scene, 0 for all.

    Returns:
      The sample.

    Raises:
      ValueError: naming the file that cannot be read and why.
    """
    root = pathlib.Path(root)
    check_scene_id(scene, r"\d{6}")
    points = read_extracted_points(root / "depth" / f"{scene}.mat")
    boxes = boxes_from_annotations(read_label_file(_label_path(root, labels, scene)))
    return sample_from_points(scene, points[:, :3], points[:, 3:], boxes, num_points)


def count_other_classes(
    root: str | os.PathLike, labels: str, splits: Mapping[str, Sequence[str]]
) -> Counter[str]:
    """Counts the labelled objects that the benchmark does not use; files that cannot be read are passed over.

    Args:
      root: as in `list_scenes`.
      labels: "v1" or "v2".
      splits: the scenes.

    Returns:
      Class name -> objects.
    """
    others: Counter[str] = Counter()
    for scene in (scene for scenes in splits.values() for scene in scenes):
        with contextlib.suppress(ValueError):  # the scene's conversion says so
            others += boxes_from_annotations(read_label_file(_label_path(root, labels, scene))).other_classes
    return others


def read_extracted_points(path: str | os.PathLike) -> np.ndarray:
    """Reads depth/%06d.mat.

    Returns:
      f32[n, 6]: metres in the upright frame, colour in [0, 1].

    Raises:
      ValueError: naming the file, if it cannot be read or holds no such points.
    """
    points = read_matlab(path, ["instance"], MAX_DEPTH_BYTES)["instance"]
    if not isinstance(points, np.ndarray) or points.dtype.kind not in "fiu" or np.shape(points)[1:] != (6,):
        raise ValueError(f"{path}: 'instance' has shape {np.shape(points)}, expected points of six numbers")
    with np.errstate(invalid="ignore"):  # damaged floats may be signalling NaNs
        points = points.astype(np.float64)
    if not (np.abs(points[:, :3]) < 1e4).all():
        raise ValueError(f"{path}: coordinates must be finite and in metres; extract it again")
    if not ((points[:, 3:] >= 0) & (points[:, 3:] <= 1)).all():
        raise ValueError(f"{path}: colours must lie in [0, 1]; extract it again")
    return points.astype(np.float32)


def read_calibration(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads calib/%06d.txt: two lines of nine numbers, column by column as Matlab counts.

    Returns:
      (tilt f64[3, 3], intrinsics f64[3, 3]).

    Raises:
      ValueError: naming the file, if it cannot be read.
    """
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    if [len(line) for line in lines] != [9, 9]:
        raise ValueError(
            f"{path} has lines of {[len(line) for line in lines][:5]} numbers, expected two of nine"
        )
    try:
        tilt, intrinsics = (
            np.array([float(word) for word in line]).reshape(3, 3, order="F") for line in lines
        )
        return check_rotation(tilt), check_intrinsics(intrinsics)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _label_path(root: str | os.PathLike, labels: str, scene: str) -> pathlib.Path:
    return pathlib.Path(root) / LABEL_FOLDERS[labels] / f"{scene}.txt"


def _scene_number(word: str, path: pathlib.Path) -> int:
    if len(word) > 6 or not word.isdecimal() or not 1 <= int(word) <= LAST_SCENE:
        raise ValueError(f"{path}: {word[:40]!r} is no scene number between 1 and {LAST_SCENE}")
    return int(word)
