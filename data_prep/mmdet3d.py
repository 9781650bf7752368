"""Scenes that mmdetection3d has prepared (ScanNet, SUN RGB-D) as samples in the contract's frame.

An mmdetection3d folder holds `<dataset>_infos_<split>.pkl`, `points/*.bin` and, for ScanNet,
`instance_mask/` and `semantic_mask/`. Two forms of the info files are read: version 1.1, a dictionary of
`metainfo` and `data_list`, and the plain list of earlier releases.

Source: https://github.com/open-mmlab/mmdetection3d, tools/dataset_converters.
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from data_prep.safe_pickle import InfoFileError, describe_value, numbers_from_pickle, read_info_pickle
from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SCANNET_NYU40_IDS, SUNRGBD_CLASSES
from vrdistill_jax.data.point_files import read_points
from vrdistill_jax.data.point_tables import printable
from vrdistill_jax.data.samples import middle_of_instances, vote_slots
from vrdistill_jax.geometry.frames import boxes_from_mmdet3d
from vrdistill_jax.geometry.host.boxes import corners_from_boxes, pairwise_iou

SPLITS = ("train", "val", "test")
_REMEDY = "make the info files again with mmdetection3d's create_data.py"
_MAX_BOXES = 1000  # of a scene; the datasets have some 60 at most
_MAX_INSTANCES = 5000
_SAME_OBJECT_IOU = 0.25  # bounds of an instance against its box: 1 unless the cloud was thinned
_FAR = 1e6  # metres, pixels: nothing sensible is larger
_LARGEST_CLASS = 1 << 16  # of a semantic mask: nyu40's are at most 40, unlabelled points may have any mark
_CAMERA_FROM_DEPTH = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])


class InfoScene(NamedTuple):
    """One entry of an info file, checked."""

    name: str
    info_path: str  # for messages
    points_path: str
    num_columns: int
    boxes: np.ndarray  # f64[g, 7] centre, full size, yaw, in the frame of the contract
    label: np.ndarray  # i32[g]
    scene_from_file: np.ndarray  # f64[4, 4] what makes the cloud axis-aligned
    instance_path: str = ""
    semantic_path: str = ""


class InfoSplit(NamedTuple):
    """A split of an mmdetection3d folder; both parts can be sent to worker processes."""

    names: tuple[str, ...]  # of the scenes, in the file's order
    convert: Callable[..., dict]  # name -> sample; as `conversion.convert_dataset` wants it
    notes: tuple[str, ...]  # what was assumed or left out


def read_scannet_infos(folder: str | os.PathLike, split: str) -> InfoSplit:
    """Reads `scannet_infos_<split>.pkl`.

    The clouds of such a folder are not axis-aligned; each is turned by the matrix in its info. Boxes are
    axis-aligned bounds, and an object's points are those of the instance whose class and bounds fit its box.

    Args:
      folder: the mmdetection3d data folder.
      split: "train", "val" or "test".

    Returns:
      Scene names, and the function that makes the sample of a name.

    Raises:
      ValueError: if the file is not a harmless, complete info file; it names the file and the reason.
    """
    path = _info_path(folder, "scannet", split)
    table: dict[str, InfoScene] = {}
    notes = _Notes(path)
    for entry in _entries(path):
        scene = _scannet_scene(entry, notes)
        _add(table, scene)
    return InfoSplit(tuple(table), functools.partial(_convert, table, scannet_sample, path), notes.lines())


def read_sunrgbd_infos(folder: str | os.PathLike, split: str, yaw_direction: str = "auto") -> InfoSplit:
    """Reads `sunrgbd_infos_<split>.pkl`.

    mmdetection3d turned the sign of the yaw round in version 1.0 and the files do not say which they have.
    So the boxes are projected into the image with either sign and compared with the labelled 2D boxes; the
    sign that fits better is taken for the whole file, and `notes` says which.

    Args:
      folder: the mmdetection3d data folder.
      split: "train" or "val".
      yaw_direction: "counterclockwise" (version 1.0 and later) or "clockwise" (before), seen from above;
        "auto" decides as said above.

    Returns:
      Scene names, and the function that makes the sample of a name.

    Raises:
      ValueError: if the file is not a harmless, complete info file; it names the file and the reason.
    """
    if yaw_direction not in ("auto", "counterclockwise", "clockwise"):
        raise ValueError(f"yaw_direction={yaw_direction!r}; use auto, counterclockwise or clockwise")
    path = _info_path(folder, "sunrgbd", split)
    notes = _Notes(path)
    scenes, fits = [], np.zeros(2)
    for entry in _entries(path):
        scene, fit = _sunrgbd_scene(entry, notes)
        scenes.append(scene)
        fits += fit
    clockwise = yaw_direction == "clockwise"
    if yaw_direction == "auto":
        clockwise = bool(fits[1] > fits[0])
        found = f"IoU with the 2D boxes, summed: {fits[1]:.2f} clockwise, {fits[0]:.2f} counter-clockwise"
        if max(fits) < 1.02 * min(fits) or max(fits) == 0:
            clockwise = False
            found = "nothing in the file tells, so that of version 1.0 was taken"
        notes.say(f"the yaw turns {'clockwise' if clockwise else 'counter-clockwise'} ({found})")
    table: dict[str, InfoScene] = {}
    for scene in scenes:
        boxes = scene.boxes.copy()
        if clockwise:
            boxes[:, 6] *= -1
        _add(table, scene._replace(boxes=np.asarray(boxes_from_mmdet3d(boxes, "gravity"))))
    return InfoSplit(tuple(table), functools.partial(_convert, table, sunrgbd_sample, path), notes.lines())


def scannet_sample(scene: InfoScene) -> dict:
    """Reads a scene's files and makes its sample (fields as of `data.builders.open_split`).

    Raises:
      ValueError: if a file is missing, of another length than the cloud, or holds no finite points.
    """
    xyz, color = _read_cloud(scene)
    matrix = scene.scene_from_file
    xyz = (xyz @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32)
    instance = np.full(len(xyz), -1, np.int32)
    if len(scene.boxes):
        ids = _read_mask(scene.instance_path, len(xyz))
        classes = _read_mask(scene.semantic_path, len(xyz))
        instance = _rows_of_instances(xyz, ids, classes, scene)
    return _sample(scene, xyz, color, instance)


def sunrgbd_sample(scene: InfoScene) -> dict:
    """Reads a scene's cloud and makes its sample; a point belongs to the first box that holds it.

    Raises:
      ValueError: if the file is missing or holds no finite points.
    """
    xyz, color = _read_cloud(scene)
    xyz = xyz.astype(np.float32)
    return _sample(scene, xyz, color, vote_slots(xyz, scene.boxes)[:, 0])


def _convert(
    table: dict[str, InfoScene], make: Callable[[InfoScene], dict], path: str, name: str, split: str = ""
) -> dict:
    del split  # each info file is of one split; the driver of the conversion names it all the same
    if name not in table:
        raise ValueError(f"{path}: no scene {name!r} among its {len(table)}")
    return make(table[name])


def _sample(scene: InfoScene, xyz: np.ndarray, color: np.ndarray, instance: np.ndarray) -> dict:
    center = scene.boxes[:, :3].astype(np.float32)
    is_scannet = bool(scene.instance_path)
    empty = len(scene.boxes) - len(np.unique(instance[instance >= 0]))
    notes = [f"{empty} of {len(scene.boxes)} boxes hold no point of their own"] if empty else []
    return {
        "xyz": xyz,
        "color": color,
        "instance": instance.astype(np.int32),
        "boxes_center": center,
        "boxes_size": scene.boxes[:, 3:6].astype(np.float32),
        "boxes_yaw": scene.boxes[:, 6].astype(np.float32),
        "boxes_label": scene.label,
        "vote_center": middle_of_instances(xyz, instance, center) if is_scannet else center,
        "name": scene.name,
        "notes": notes,
    }


def _read_cloud(scene: InfoScene) -> tuple[np.ndarray, np.ndarray]:
    cloud = read_points(scene.points_path, columns=scene.num_columns)
    bad = int((~np.isfinite(cloud.xyz)).any(1).sum())
    if bad:
        raise InfoFileError(scene.points_path, f"{bad} points are not finite", "write the cloud again")
    color = np.full(cloud.xyz.shape, 0.5, np.float32) if cloud.color is None else cloud.color
    return cloud.xyz.astype(np.float64), color


def _read_mask(path: str, count: int) -> np.ndarray:
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InfoFileError(
            path, f"cannot be read ({error.strerror or error})", "check the folder"
        ) from error
    if len(data) != 8 * count:
        problem = f"{len(data)} bytes, but {count} points need {8 * count} (one int64 each)"
        raise InfoFileError(path, problem, "cloud and mask must come from the same run")
    return np.frombuffer(data, "<i8")


def _rows_of_instances(xyz: np.ndarray, ids: np.ndarray, classes: np.ndarray, scene: InfoScene) -> np.ndarray:
    """Gives the box of every point: the box of the same class that fits the bounds of its instance best.

    The masks number instances as the scan's annotation does, the boxes are a filtered list: nothing in the
    files links the two.
    """
    instance = np.full(len(xyz), -1, np.int32)
    label_of = {nyu40: row for row, nyu40 in enumerate(SCANNET_NYU40_IDS)}
    candidates = []
    numbers = np.unique(ids[ids > 0])
    if len(numbers) > _MAX_INSTANCES:
        problem = f"has {len(numbers)} instances, more than {_MAX_INSTANCES}"
        raise InfoFileError(scene.instance_path, problem, "make the masks again")
    wrong = int(((classes < 0) | (classes > _LARGEST_CLASS)).sum())
    if wrong:
        problem = f"{wrong} points are of a class outside 0 to {_LARGEST_CLASS}"
        raise InfoFileError(scene.semantic_path, problem, "make the masks again")
    for number in numbers:
        mine = ids == number
        points, label = xyz[mine], label_of.get(int(np.bincount(classes[mine]).argmax()), -1)
        rows = np.flatnonzero(scene.label == label)
        if not len(rows):
            continue
        low, high = points.min(0), points.max(0)
        bounds = np.concatenate([(low + high) / 2, np.maximum(high - low, 1e-3), [0.0]])
        overlaps = pairwise_iou(bounds[None], scene.boxes[rows], rotated=False)[0]
        candidates += [(float(iou), int(number), int(row)) for iou, row in zip(overlaps, rows, strict=True)]
    used: set[int] = set()
    taken: set[int] = set()
    for iou, number, row in sorted(candidates, reverse=True):
        if iou < _SAME_OBJECT_IOU or number in used or row in taken:
            continue
        instance[ids == number] = row
        used.add(number)
        taken.add(row)
    return instance


# ---- Entries of the two versions, brought to one form


class _Entry(NamedTuple):
    """An entry with the fields of either version under the same names, not yet checked."""

    path: str
    row: int
    points: Any
    num_columns: Any
    instance: Any
    semantic: Any
    matrix: Any
    boxes: Any  # list of rows, or array
    labels: Any  # list of names or rows
    boxes_2d: Any
    image_from_depth: Any

    def fail(self, problem: str) -> InfoFileError:
        return InfoFileError(self.path, f"entry {self.row}: {problem}", _REMEDY)


class _Notes:
    """Remarks on a file, with how often each was made."""

    def __init__(self, path: str):
        self.path = path
        self._counts: dict[str, int] = {}

    def say(self, text: str) -> None:
        self._counts[text] = self._counts.get(text, 0) + 1

    def lines(self) -> tuple[str, ...]:
        counted = ((text, f" ({n} times)" if n > 1 else "") for text, n in self._counts.items())
        return tuple(printable(f"{self.path}: {text}{times}") for text, times in counted)


def _info_path(folder: str | os.PathLike, dataset: str, split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return str(pathlib.Path(folder) / f"{dataset}_infos_{split}.pkl")


def _entries(path: str) -> list[_Entry]:
    infos = read_info_pickle(path)
    names: dict[int, str] = {}
    make: Callable[[str, int, dict], _Entry]
    if isinstance(infos, dict):
        items = infos.get("data_list")
        categories = (infos.get("metainfo") or {}) if isinstance(infos.get("metainfo"), dict | None) else {}
        categories = categories.get("categories", {})
        if not isinstance(items, list) or not isinstance(categories, dict):
            raise InfoFileError(path, "has no data_list of entries, or categories that are no table", _REMEDY)
        if not all(
            type(name) is str and isinstance(row, int | np.integer) for name, row in categories.items()
        ):
            raise InfoFileError(path, "metainfo.categories does not map names to numbers", _REMEDY)
        names = {int(row): name for name, row in categories.items() if row >= 0}
        make = functools.partial(_entry_of_dict, names)
    elif isinstance(infos, list):
        items, make = infos, _entry_of_list
    else:
        raise InfoFileError(path, f"holds a {type(infos).__name__}, neither list nor dictionary", _REMEDY)
    if not items:
        raise InfoFileError(path, "holds no scenes", _REMEDY)
    entries = []
    for row, item in enumerate(items):
        if not isinstance(item, dict):
            raise InfoFileError(path, f"entry {row} is a {type(item).__name__}, not a dictionary", _REMEDY)
        try:
            entries.append(make(path, row, item))
        except InfoFileError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            problem = f"entry {row} lacks a field or has one of the wrong type ({_short(error)})"
            raise InfoFileError(path, problem, _REMEDY) from error
    return entries


def _entry_of_dict(names: dict[int, str], path: str, row: int, item: dict) -> _Entry:
    """Version 1.1; its paths are file names, the folder is fixed."""
    lidar = item["lidar_points"]
    camera = (item.get("images") or {}).get("CAM0") or {}
    instances = item.get("instances") or []
    kept = [thing for thing in instances if int(thing["bbox_label_3d"]) >= 0]
    labels = [names.get(int(thing["bbox_label_3d"]), int(thing["bbox_label_3d"])) for thing in kept]
    return _Entry(
        *(path, row, _in_folder("points", lidar["lidar_path"]), lidar.get("num_pts_feats", 6)),
        _in_folder("instance_mask", item.get("pts_instance_mask_path")),
        _in_folder("semantic_mask", item.get("pts_semantic_mask_path")),
        item.get("axis_align_matrix"),
        [thing["bbox_3d"] for thing in kept],
        labels,
        [thing.get("bbox") for thing in kept],
        camera.get("depth2img"),
    )


def _entry_of_list(path: str, row: int, item: dict) -> _Entry:
    """Before version 1.1; its paths start at the data folder."""
    notes = item.get("annos") or {}
    count = int(notes.get("gt_num", 0))
    boxes = notes["gt_boxes_upright_depth"] if count else []
    labels = list(notes["name"] if "name" in notes else notes["class"]) if count else []
    image_from_depth = None
    if isinstance(item.get("calib"), dict):
        calibration = item["calib"]
        tilt, camera = (numbers_from_pickle(calibration[name]).reshape(3, 3) for name in ("Rt", "K"))
        if not (np.abs(tilt) < _FAR).all() or not (np.abs(camera) < _FAR).all():
            raise ValueError(f"calib holds a value that is not finite or beyond {_FAR:g}")
        image_from_depth = camera @ _CAMERA_FROM_DEPTH @ tilt.T
    if len(boxes) != count or len(labels) != count:
        raise InfoFileError(
            path, f"entry {row}: gt_num {count}, {len(boxes)} boxes and {len(labels)} classes differ", _REMEDY
        )
    return _Entry(
        *(path, row, item["pts_path"], (item.get("point_cloud") or {}).get("num_features", 6)),
        item.get("pts_instance_mask_path"),
        item.get("pts_semantic_mask_path"),
        notes.get("axis_align_matrix"),
        boxes,
        labels,
        notes.get("bbox"),
        image_from_depth,
    )


def _in_folder(folder: str, path: Any) -> Any:
    return f"{folder}/{path}" if isinstance(path, str) and "/" not in path else path


def _scannet_scene(entry: _Entry, notes: _Notes) -> InfoScene:
    boxes, label = _boxes_and_labels(entry, SCANNET_CLASSES, 6, notes)
    if entry.matrix is None:
        if len(boxes):
            raise entry.fail("has boxes but no axis_align_matrix, without which cloud and boxes do not fit")
        notes.say("scenes without boxes and without axis_align_matrix are left as scanned")
        matrix = np.eye(4)
    else:
        matrix = _numbers(entry, entry.matrix, "axis_align_matrix", (4, 4))
        turn = matrix[:3, :3]
        upright = np.abs(turn[2] - [0, 0, 1]).max() < 1e-3 and np.abs(matrix[3] - [0, 0, 0, 1]).max() < 1e-6
        if not upright or np.abs(turn @ turn.T - np.eye(3)).max() > 1e-3:
            raise entry.fail("axis_align_matrix is no turn about z and shift")
    masks = [_file_path(entry, path, "mask path") for path in (entry.instance, entry.semantic)]
    return _scene(entry, boxes, label, matrix, *masks)


def _sunrgbd_scene(entry: _Entry, notes: _Notes) -> tuple[InfoScene, np.ndarray]:
    """The scene with its yaw as stored, and how well both signs of the yaw fit the 2D boxes."""
    boxes, label = _boxes_and_labels(entry, SUNRGBD_CLASSES, 7, notes)
    scene = _scene(entry, boxes, label, np.eye(4))
    fit = np.zeros(2)
    if entry.image_from_depth is None or entry.boxes_2d is None or not len(boxes):
        return scene, fit
    if isinstance(entry.boxes_2d, list) and any(box is None for box in entry.boxes_2d):
        return scene, fit
    flat = _numbers(entry, entry.boxes_2d, "2D boxes", (len(boxes), 4))
    projection = _numbers(entry, entry.image_from_depth, "depth2img", None)[:3, :3]
    if projection.shape != (3, 3):
        raise entry.fail("depth2img is not 3 x 3")
    for column, sign in enumerate((1, -1)):
        corners = corners_from_boxes(boxes * [1, 1, 1, 1, 1, 1, sign]) @ projection.T
        ahead = (corners[..., 2] > 0.1).all(-1)
        pixels = corners[ahead][..., :2] / corners[ahead][..., 2:]
        fit[column] = _rectangle_iou(np.concatenate([pixels.min(1), pixels.max(1)], -1), flat[ahead]).sum()
    return scene, fit


def _rectangle_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of rows (left, top, right, bottom)."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = np.maximum(sides, 0).prod(1)
    areas = [np.maximum(box[:, 2:] - box[:, :2], 0).prod(1) for box in (a, b)]
    return shared / np.maximum(sum(areas) - shared, 1e-9)


def _boxes_and_labels(
    entry: _Entry, classes: tuple[str, ...], columns: int, notes: _Notes
) -> tuple[np.ndarray, np.ndarray]:
    count = len(entry.labels)
    if count > _MAX_BOXES:
        raise entry.fail(f"{count} boxes, more than {_MAX_BOXES}")
    boxes = _numbers(entry, entry.boxes, "boxes", (count, columns)) if count else np.zeros((0, columns))
    rows = {_plain(name): row for row, name in enumerate(classes)}
    rows |= {"showercurtrain": rows.get("showercurtain", -1)}  # so spelled by mmdetection3d
    label = np.full(count, -1, np.int32)
    for i, name in enumerate(entry.labels):
        if isinstance(name, str):
            label[i] = rows.get(_plain(name), -1)
        elif isinstance(name, int | np.integer) and 0 <= name < len(classes):
            label[i] = name
        if label[i] < 0:
            notes.say(f"boxes of class {describe_value(name)} were left out: the dataset has no such class")
    kept = label >= 0
    boxes, label = boxes[kept], label[kept]
    flat = (boxes[:, 3:6].astype(np.float32) <= 0).any(axis=1)  # float32, as which it is stored
    if flat.any():
        raise entry.fail(f"a box has the size {boxes[flat][0, 3:6].tolist()}")
    yaw = boxes[:, 6:7] if columns == 7 else np.zeros((len(boxes), 1))
    return np.concatenate([boxes[:, :6], yaw], axis=1), label


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _scene(entry: _Entry, boxes: np.ndarray, label: np.ndarray, matrix: np.ndarray, *masks: str) -> InfoScene:
    points = _file_path(entry, entry.points, "path of the points")
    columns = entry.num_columns
    if not isinstance(columns, int | np.integer) or not 3 <= columns <= 64:
        raise entry.fail(f"{describe_value(columns)} values per point; 3 to 64 can be read")
    name = pathlib.PurePosixPath(points).stem
    return InfoScene(name, entry.path, points, int(columns), boxes, label, matrix, *masks)


def _file_path(entry: _Entry, path: Any, what: str) -> str:
    """A path inside the data folder: an info file must not make us read anything else."""
    if not isinstance(path, str) or not path:
        raise entry.fail(f"the {what} is {describe_value(path)}")
    parts = pathlib.PurePosixPath(path).parts
    if (
        path.startswith("/")
        or ".." in parts
        or re.search(r"[\\:]", path)
        or not path.isprintable()
        or len(path) > 500
    ):
        raise entry.fail(f"the {what} {path[:60]!r} leads out of the folder")
    return str(pathlib.Path(entry.path).parent / pathlib.PurePosixPath(path))


def _numbers(entry: _Entry, values: Any, what: str, shape: tuple[int, ...] | None) -> np.ndarray:
    try:
        array = numbers_from_pickle(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise entry.fail(f"{what}: not made of numbers ({_short(error)})") from error
    if array.ndim != 2 if shape is None else array.shape != shape:
        raise entry.fail(f"{what} of shape {array.shape}, expected {shape or 'a matrix'}")
    if not (np.abs(array) <= _FAR).all():  # false for NaN, too
        raise entry.fail(f"{what} hold a value that is not finite or beyond 1e6")
    return array


def _add(table: dict[str, InfoScene], scene: InfoScene) -> None:
    if scene.name in table:
        raise InfoFileError(scene.info_path, f"has the scene {scene.name!r} twice", _REMEDY)
    table[scene.name] = scene


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:80]!a}"
