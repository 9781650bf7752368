"""Folders that VoteNet's preparation scripts have written (ScanNet, SUN RGB-D) -> samples.

ScanNet: `scannet_train_detection_data/sceneXXXX_XX_{vert,ins_label,sem_label,bbox}.npy`, axis-aligned and
thinned to 50,000 vertices. SUN RGB-D: `sunrgbd_pc_bbox_votes_50k_v1_{train,val}/NNNNNN_{pc.npz,bbox.npy}`;
the votes stored beside them are not needed, the loader derives them from the boxes.

Source: https://github.com/facebookresearch/votenet, scannet/ and sunrgbd/.
"""

import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from data_prep.conversion import check_scene_id, positive_sizes
from data_prep.scannet_raw import CLASS_ROW, SCENE_PATTERN
from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SUNRGBD_CLASSES
from vrdistill_jax.data.point_files import PointFileError, read_points
from vrdistill_jax.data.point_tables import read_npy_table
from vrdistill_jax.data.samples import middle_of_instances, vote_slots
from vrdistill_jax.geometry.frames import boxes_from_votenet

SUNRGBD_PATTERN = r"\d{6}"
CONTAINMENT_MARGIN = (
    1e-3  # metres by which a thinned instance may stick out of its box (rounding of the files)
)
_MAX_BOXES = 1000
_MAX_INSTANCES = 5000  # of a scene; each costs a pass over the points
_AGAIN = "run VoteNet's preparation script again"


def convert_votenet_scannet(folder: str | os.PathLike, scene: str, split: str) -> dict:
    """Reads one ScanNet scene of VoteNet's arrays.

    A box holds the points of the instance that it was made of. An instance counts if the class of its first
    point is one of the 18, as in VoteNet's loader.

    Args:
      folder: the folder of the arrays.
      scene: such as "scene0000_00".
      split: not needed; the driver passes it.

    Returns:
      A sample as `conversion.convert_dataset` wants it.

    Raises:
      ValueError: naming the file that is missing or malformed, and why.
    """
    check_scene_id(scene, SCENE_PATTERN)
    start = pathlib.Path(folder) / scene
    vert_path, box_path = pathlib.Path(f"{start}_vert.npy"), pathlib.Path(f"{start}_bbox.npy")
    if not box_path.exists() and pathlib.Path(f"{start}_aligned_bbox.npy").exists():
        raise PointFileError(
            box_path,
            "only an _aligned_bbox.npy is there, as mmdetection3d writes it",
            "convert with --mmdet3d=DIR",
        )
    vert = _read_table(vert_path, 6)
    count = len(vert)
    instance_id = _read_labels(pathlib.Path(f"{start}_ins_label.npy"), count)
    nyu40 = _read_labels(pathlib.Path(f"{start}_sem_label.npy"), count)
    boxes = _read_boxes(box_path, 7)
    labels = [CLASS_ROW.get(int(value), -1) if value == int(value) else -1 for value in boxes[:, 6]]
    if -1 in labels:
        raise PointFileError(
            box_path, f"row {labels.index(-1)} is of class {boxes[labels.index(-1), 6]:g}", _AGAIN
        )
    rgb = vert[:, 3:6]
    if rgb.min(initial=0) < 0 or rgb.max(initial=0) > 255:
        raise PointFileError(vert_path, "columns 4 to 6 are no colours of 0 to 255", _AGAIN)
    xyz = np.ascontiguousarray(vert[:, :3], np.float32)
    names = [f"{SCANNET_CLASSES[label]} of box {row}" for row, label in enumerate(labels)]
    try:
        box_of_instance, notes = match_instances(xyz, instance_id, nyu40, boxes)
        size, flat_notes = positive_sizes(boxes[:, 3:6].astype(np.float32), names)
    except ValueError as error:
        raise PointFileError(box_path, str(error), _AGAIN) from error
    instance = np.full(count, -1, np.int32)
    for value, row in box_of_instance.items():
        instance[instance_id == value] = row
    center = boxes[:, :3].astype(np.float32)
    return {
        "xyz": xyz,
        "color": (rgb / 255).astype(np.float32),
        "instance": instance,
        "boxes_center": center,
        "boxes_size": size,
        "boxes_yaw": np.zeros(len(boxes), np.float32),
        "boxes_label": np.array(labels, np.int32),
        "vote_center": middle_of_instances(xyz, instance, center),
        "name": scene,
        "notes": [*notes, *flat_notes],
    }


def match_instances(
    xyz: np.ndarray, instance_id: np.ndarray, nyu40: np.ndarray, boxes: np.ndarray
) -> tuple[dict[int, int], list[str]]:
    """Finds the box of every instance, which the files do not name.

    The rows of the boxes follow the rising ids of the instances, with gaps on both sides: thinning may lose
    an instance, and other classes have no box. So the longest pairing that keeps both orders is taken, and of
    those the one whose bounds differ least; a pair must agree in class, and the instance lie in its box.

    Args:
      xyz: f32[n, 3] metres.
      instance_id: i64[n] 0 none.
      nyu40: i64[n].
      boxes: f64[g, 7] centre, full size, nyu40 class.

    Returns:
      Box row by instance id, and a note for each instance or box that is left over.

    Raises:
      ValueError: if there are boxes and instances but not one pair.
    """
    instances: list[tuple[int, np.ndarray, np.ndarray, set[int]]] = []
    numbers = np.unique(instance_id)
    if len(numbers) > _MAX_INSTANCES:
        raise ValueError(f"the points have {len(numbers)} instances, more than {_MAX_INSTANCES}")
    for value in numbers:
        rows = np.flatnonzero(instance_id == value)
        if value != 0 and int(nyu40[rows[0]]) in CLASS_ROW:
            points = xyz[rows]
            classes = set(np.unique(nyu40[rows]).tolist())
            instances.append((int(value), points.min(axis=0), points.max(axis=0), classes))
    low, high = boxes[:, :3] - boxes[:, 3:6] / 2, boxes[:, :3] + boxes[:, 3:6] / 2
    gap = np.full((len(instances), len(boxes)), np.inf)
    for i, (_, lower, upper, classes) in enumerate(instances):
        sticks_out = np.maximum(low - lower, upper - high).max(axis=1, initial=-np.inf)
        differs = np.maximum(np.abs(low - lower), np.abs(upper - high)).max(axis=1, initial=0)
        fits = (sticks_out <= CONTAINMENT_MARGIN) & np.isin(boxes[:, 6], list(classes))
        gap[i, fits] = differs[fits]
    pairs = _pair_in_order(gap)
    if instances and len(boxes) and not pairs:
        raise ValueError("no box fits any instance: the cloud is not the one that the boxes were made of")
    notes = []
    for i, (value, *_) in enumerate(instances):
        if i not in pairs:
            count = int((instance_id == value).sum())
            notes.append(f"instance {value} ({count} points) has no box; its points belong to no object")
    for row in sorted(set(range(len(boxes))) - set(pairs.values())):
        name = SCANNET_CLASSES[CLASS_ROW[int(boxes[row, 6])]]
        notes.append(f"box {row} ({name}) has no instance among the points")
    return {instances[i][0]: row for i, row in pairs.items()}, notes


def convert_votenet_sunrgbd(folders: Mapping[str, str | os.PathLike], scene: str, split: str) -> dict:
    """Reads one SUN RGB-D scan of VoteNet's arrays.

    Args:
      folders: the folder of each split.
      scene: such as "005051".
      split: "train" or "val".

    Returns:
      A sample as `conversion.convert_dataset` wants it; a point's instance is the first box that holds it.

    Raises:
      ValueError: naming the file that is missing or malformed, and why.
    """
    check_scene_id(scene, SUNRGBD_PATTERN)
    start = pathlib.Path(folders[split]) / scene
    cloud_path, box_path = pathlib.Path(f"{start}_pc.npz"), pathlib.Path(f"{start}_bbox.npy")
    cloud = read_points(cloud_path)
    bad = int((~np.isfinite(cloud.xyz)).any(axis=1).sum())
    if bad:
        raise PointFileError(cloud_path, f"{bad} points are not finite", _AGAIN)
    if cloud.color is None:
        raise PointFileError(cloud_path, "the points have no colours", _AGAIN)
    rows = _read_boxes(box_path, 8)
    label = rows[:, 7].astype(np.int32)
    wrong = np.flatnonzero((label != rows[:, 7]) | (label < 0) | (label >= len(SUNRGBD_CLASSES)))
    if len(wrong):
        raise PointFileError(
            box_path, f"row {wrong[0]} is of class {rows[wrong[0], 7]:g}, not 0 to 9", _AGAIN
        )
    boxes = np.asarray(boxes_from_votenet(rows[:, :7], "half"))
    names = [f"{SUNRGBD_CLASSES[value]} of box {row}" for row, value in enumerate(label)]
    try:
        size, notes = positive_sizes(boxes[:, 3:6].astype(np.float32), names)
    except ValueError as error:
        raise PointFileError(box_path, str(error), _AGAIN) from error
    boxes = np.concatenate([boxes[:, :3].astype(np.float32), size, boxes[:, 6:].astype(np.float32)], axis=1)
    return {
        "xyz": cloud.xyz,
        "color": cloud.color,
        "instance": vote_slots(cloud.xyz, boxes)[:, 0],
        "boxes_center": boxes[:, :3],
        "boxes_size": boxes[:, 3:6],
        "boxes_yaw": boxes[:, 6],
        "boxes_label": label,
        "vote_center": boxes[:, :3],
        "name": scene,
        "notes": [*cloud.warnings, *notes],
    }


def find_sunrgbd_splits(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Finds the two folders of VoteNet's SUN RGB-D arrays.

    Args:
      folder: holds one folder that ends in `_train` and one that ends in `_val`.

    Returns:
      The folder of each split.

    Raises:
      ValueError: if one is missing or there are several, such as those of both label versions.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    found = {}
    for split in ("train", "val"):
        fitting = sorted(path for path in root.iterdir() if path.is_dir() and path.name.endswith(f"_{split}"))
        fitting = [path for path in fitting if next(path.glob("*_bbox.npy"), None)]
        if len(fitting) != 1:
            names = ", ".join(path.name for path in fitting) or "none"
            raise ValueError(
                f"{root} must hold one folder of *_bbox.npy files named ..._{split}; found: {names}; "
                "VoteNet names them sunrgbd_pc_bbox_votes_50k_v1_train and _val; keep the label versions in "
                "separate folders"
            )
        found[split] = fitting[0]
    return found


def list_scenes(folder: str | os.PathLike, pattern: str) -> list[str]:
    """Lists the scenes of a folder of arrays, sorted.

    Args:
      folder: holds `<scene>_bbox.npy` files.
      pattern: regular expression of a scene's id.

    Returns:
      The ids.
    """
    names = (path.name.removesuffix("_bbox.npy") for path in pathlib.Path(folder).glob("*_bbox.npy"))
    return sorted(name for name in names if re.fullmatch(pattern, name, re.ASCII))


def _pair_in_order(gap: np.ndarray) -> dict[int, int]:
    """Pairs rows with columns so that both rise: most pairs, then the smallest sum of gaps (inf = never)."""
    rows, columns = gap.shape
    best = [[(0, 0.0)] * (columns + 1) for _ in range(rows + 1)]  # (pairs, -sum of gaps) of the first i and j
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            best[i][j] = max(best[i - 1][j], best[i][j - 1])
            if np.isfinite(gap[i - 1, j - 1]):
                count, minus_sum = best[i - 1][j - 1]
                best[i][j] = max(best[i][j], (count + 1, minus_sum - float(gap[i - 1, j - 1])))
    pairs = {}
    i, j = rows, columns
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs[i] = j
    return pairs


def _read_array(path: pathlib.Path) -> np.ndarray:
    try:
        with path.open("rb") as stream:
            return read_npy_table(path, stream, path.stat().st_size)
    except OSError as error:
        raise PointFileError(
            path, f"cannot be read ({error.strerror or error})", "check the folder"
        ) from error


def _read_table(path: pathlib.Path, columns: int) -> np.ndarray:
    array = _read_array(path)
    if array.ndim != 2 or array.shape[1] < columns or len(array) == 0 or array.dtype.kind not in "iuf":
        raise PointFileError(
            path, f"an array of shape {array.shape} and type {array.dtype}, not [n, {columns}]", _AGAIN
        )
    array = array[:, :columns]
    with np.errstate(invalid="ignore"):  # damaged floats may be signalling NaNs
        bad = int((~(np.abs(array.astype(np.float64)) < 1e30)).any(axis=1).sum())
    if bad:
        raise PointFileError(path, f"{bad} rows are not finite", _AGAIN)
    return array


def _read_labels(path: pathlib.Path, count: int) -> np.ndarray:
    array = _read_array(path)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        problem = f"an array of shape {array.shape} and type {array.dtype}, not integers of {count} points"
        raise PointFileError(path, problem, _AGAIN)
    return array.astype(np.int64)


def _read_boxes(path: pathlib.Path, columns: int) -> np.ndarray:
    array = _read_array(path)
    if array.size == 0:  # a scene without objects
        return np.zeros((0, columns))
    good = array.ndim == 2 and array.shape[1] == columns and array.dtype.kind in "iuf"
    if not good or len(array) > _MAX_BOXES:
        problem = (
            f"an array of shape {array.shape} and type {array.dtype}, not [k <= {_MAX_BOXES}, {columns}]"
        )
        raise PointFileError(path, problem, _AGAIN)
    with np.errstate(invalid="ignore"):
        array = array.astype(np.float64)
    if not (np.abs(array) < 1e6).all():
        raise PointFileError(path, "a value is not finite or beyond 1e6", _AGAIN)
    return array
