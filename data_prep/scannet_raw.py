"""ScanNet v2 scans as their authors distribute them -> samples: mesh, segments, objects, axis alignment.

Files of a scan, all in its folder `sceneXXXX_XX`: `_vh_clean_2.ply` (vertices with colours),
`_vh_clean_2.0.010000.segs.json` (segment of every vertex), `.aggregation.json` (objects as lists of segments)
and `.txt` (the matrix that turns the scan so that walls follow the axes).

Source: https://github.com/facebookresearch/votenet, scannet/load_scannet_data.py, for what labels, instances
  and boxes are.
"""

import csv
import io
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from data_prep.conversion import check_scene_id, positive_sizes
from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SCANNET_NYU40_IDS
from vrdistill_jax.data.point_files import PointFileError, read_points
from vrdistill_jax.data.samples import middle_of_instances

SCENE_PATTERN = r"scene\d{4}_\d{2}"
LABEL_FILE = "scannetv2-labels.combined.tsv"
CLASS_ROW = {nyu40: row for row, nyu40 in enumerate(SCANNET_NYU40_IDS)}
# The largest scan's segments take about 4 MB; parsed, JSON takes some 20 times the room.
MAX_JSON_BYTES = 64 << 20
_MAX_TEXT_BYTES = 16 << 20
_MAX_OBJECTS = 5000  # of a scan; each costs a pass over the vertices
_FAR = 1e6  # metres
_AGAIN = "download the file again"


class Annotation(NamedTuple):
    """What the segments of a scan say about its vertices."""

    nyu40: np.ndarray  # i32[n] 0 unannotated
    object_id: np.ndarray  # i64[n] -1 none
    object_nyu40: dict[int, int]  # object -> class id, by rising object id
    notes: list[str]


def convert_scan(
    scans: str | os.PathLike, nyu40_from_category: Mapping[str, int], scene: str, split: str
) -> dict:
    """Reads one scan with all its vertices.

    Args:
      scans: the folder of scan folders.
      nyu40_from_category: of `read_label_map`.
      scene: such as "scene0000_00".
      split: not needed; the driver passes it.

    Returns:
      A sample as `conversion.convert_dataset` wants it: boxes are the bounds of all vertices of an object of
      the 18 classes, by rising object id; instance is the row of the vertex's box.

    Raises:
      ValueError: naming the file that is missing or malformed, and why.
    """
    check_scene_id(scene, SCENE_PATTERN)
    folder = pathlib.Path(scans) / scene
    mesh_path = folder / f"{scene}_vh_clean_2.ply"
    cloud = read_points(mesh_path)
    if cloud.color is None:
        raise PointFileError(mesh_path, "the vertices have no colours", _AGAIN)
    bad = int((~(np.abs(cloud.xyz) < _FAR)).any(axis=1).sum())
    if bad:
        raise PointFileError(mesh_path, f"{bad} vertices are not finite or beyond {_FAR:g} m", _AGAIN)
    matrix, notes = read_axis_alignment(folder / f"{scene}.txt")
    homogeneous = np.ones((len(cloud.xyz), 4))
    homogeneous[:, :3] = cloud.xyz
    xyz = (homogeneous @ matrix.T)[:, :3].astype(np.float32)
    segment = read_segments(folder / f"{scene}_vh_clean_2.0.010000.segs.json", len(xyz))
    annotation = read_annotation(folder / f"{scene}.aggregation.json", segment, nyu40_from_category)
    sample = sample_from_objects(xyz, cloud.color, annotation)
    sample["notes"] = [*cloud.warnings, *notes, *annotation.notes, *sample["notes"]]
    return {**sample, "name": scene}


def sample_from_objects(xyz: np.ndarray, color: np.ndarray, annotation: Annotation) -> dict:
    """Makes boxes of the objects of the 18 classes.

    Args:
      xyz: f32[n, 3] metres, axis-aligned.
      color: f32[n, 3] in [0, 1].
      annotation: of the same vertices.

    Returns:
      The sample without its name; `notes` says what was left out.
    """
    instance = np.full(len(xyz), -1, np.int32)
    low: list[np.ndarray] = []
    high: list[np.ndarray] = []
    label: list[int] = []
    names: list[str] = []
    notes: list[str] = []
    for object_id, nyu40 in annotation.object_nyu40.items():
        if nyu40 not in CLASS_ROW:
            continue
        mine = annotation.object_id == object_id
        name = f"{SCANNET_CLASSES[CLASS_ROW[nyu40]]} of object {object_id}"
        if not mine.any():  # all its segments also belong to later objects
            notes.append(f"the {name} has no vertices of its own and gets no box")
            continue
        instance[mine] = len(label)
        low.append(xyz[mine].min(axis=0))
        high.append(xyz[mine].max(axis=0))
        label.append(CLASS_ROW[nyu40])
        names.append(name)
    lower = np.array(low, np.float32).reshape(-1, 3)
    upper = np.array(high, np.float32).reshape(-1, 3)
    center = (lower + upper) / np.float32(2)
    size, flat_notes = positive_sizes(upper - lower, names)
    return {
        "xyz": xyz,
        "color": color,
        "instance": instance,
        "boxes_center": center,
        "boxes_size": size,
        "boxes_yaw": np.zeros(len(label), np.float32),
        "boxes_label": np.array(label, np.int32),
        "vote_center": middle_of_instances(xyz, instance, center),
        "notes": [*notes, *flat_notes],
    }


def read_segments(path: pathlib.Path, num_vertices: int) -> np.ndarray:
    """Reads the segment of every vertex.

    Args:
      path: the `.segs.json` file.
      num_vertices: of the mesh.

    Returns:
      i64[n].

    Raises:
      ValueError: naming the file and the reason.
    """
    content = _read_json(path)
    segment = content.get("segIndices") if isinstance(content, dict) else None
    if not isinstance(segment, list) or not _is_list_of_ids(segment):
        raise PointFileError(path, "segIndices is not a list of integers >= 0", _AGAIN)
    if len(segment) != num_vertices:
        problem = f"it labels {len(segment)} vertices but the mesh has {num_vertices}"
        raise PointFileError(path, problem, "both files must be of the same scan; download both again")
    return np.array(segment, np.int64)


def read_annotation(
    path: pathlib.Path, segment: np.ndarray, nyu40_from_category: Mapping[str, int]
) -> Annotation:
    """Reads the objects and spreads them over the vertices.

    Where objects share a segment the later one has it; likewise for classes, in the order in which the file
    first names them. An object's class is that of its first segment, which a later class may have taken.

    Args:
      path: the `.aggregation.json` file.
      segment: i64[n] of `read_segments`.
      nyu40_from_category: of `read_label_map`.

    Returns:
      The annotation.

    Raises:
      ValueError: naming the file and the reason.

    Differs: VoteNet's loader appends the segments of all objects of a class to the first one's by accident,
      which its later objects undo; here each object keeps its own.
    """
    ids, vertex_row = np.unique(segment, return_inverse=True)
    row_of_segment = {int(value): row for row, value in enumerate(ids)}
    segments_of_category: dict[str, list[int]] = {}
    segments_of_object: dict[int, list[int]] = {}
    notes = []
    for number, group in enumerate(_object_groups(path)):
        object_id, category, segments = group["objectId"], group["label"], group["segments"]
        if category not in nyu40_from_category:
            problem = f"object {object_id} is a {category[:60]!r}, which {LABEL_FILE} does not list"
            raise PointFileError(path, problem, f"use the {LABEL_FILE} of the same release")
        unknown = next((value for value in segments if value not in row_of_segment), None)
        if unknown is not None:
            problem = f"object {object_id} has segment {unknown}, which no vertex belongs to"
            raise PointFileError(path, problem, "aggregation and segs files must be of the same scan")
        if not segments:
            notes.append(f"object {object_id} ({category}) has no segments and was left out")
            continue
        if object_id in segments_of_object:
            notes.append(f"object {object_id} is listed again as entry {number}; the later list counts")
        rows = [row_of_segment[value] for value in segments]
        segments_of_category.setdefault(category, []).extend(rows)
        segments_of_object[object_id] = rows
    nyu40 = np.zeros(len(ids), np.int32)
    for category, rows in segments_of_category.items():
        nyu40[rows] = nyu40_from_category[category]
    owner = np.full(len(ids), -1, np.int64)
    for object_id, rows in segments_of_object.items():
        owner[rows] = object_id
    classes = {
        object_id: int(nyu40[segments_of_object[object_id][0]]) for object_id in sorted(segments_of_object)
    }
    return Annotation(nyu40[vertex_row], owner[vertex_row], classes, notes)


def read_axis_alignment(path: pathlib.Path) -> tuple[np.ndarray, list[str]]:
    """Reads the matrix that turns a scan's walls along the axes.

    Args:
      path: the scan's `.txt` file.

    Returns:
      f64[4, 4], and a note if the file has none (test scans), which means the identity.

    Raises:
      ValueError: naming the file and the reason.
    """
    text = _read_text(path)
    line = next((line for line in text.splitlines() if line.strip().startswith("axisAlignment")), None)
    if line is None and " = " not in text:
        raise PointFileError(path, "has none of the lines 'name = value' that describe a scan", _AGAIN)
    if line is None:
        return np.eye(4), [f"{path.name} has no axisAlignment; the scan is kept as it lies"]
    words = line.partition("=")[2].split()
    try:
        values = np.array([float(word) for word in words])
    except ValueError as error:
        raise PointFileError(path, f"axisAlignment is not made of numbers ({line[:80]!a})", _AGAIN) from error
    if values.shape != (16,) or not np.isfinite(values).all():
        raise PointFileError(path, f"axisAlignment has {len(words)} values, not 16 finite ones", _AGAIN)
    if np.abs(values).max() > _FAR:
        raise PointFileError(path, f"axisAlignment shifts the scan by more than {_FAR:g} m", _AGAIN)
    matrix = values.reshape(4, 4)
    turn = matrix[:3, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        rigid = (
            np.allclose(turn @ turn.T, np.eye(3), atol=1e-3)
            and np.linalg.det(turn) > 0
            and np.array_equal(matrix[3], [0, 0, 0, 1])
        )
    if not rigid:
        raise PointFileError(path, "axisAlignment is no rotation with a shift", _AGAIN)
    return matrix, []


def read_label_map(path: pathlib.Path) -> dict[str, int]:
    """Reads which nyu40 class each of ScanNet's free-text categories belongs to.

    Args:
      path: `scannetv2-labels.combined.tsv`.

    Returns:
      Class id 0..40 by category.

    Raises:
      ValueError: naming the file and the reason.
    """
    label_map: dict[str, int] = {}
    reader = csv.DictReader(io.StringIO(_read_text(path)), delimiter="\t")
    try:
        for row in reader:
            category, text = row.get("raw_category"), row.get("nyu40id")
            if not category or not text or not re.fullmatch("[0-9]{1,2}", text) or int(text) > 40:
                problem = f"line {reader.line_num} has raw_category {category!a:.60} and nyu40id {text!a:.20}"
                raise PointFileError(path, problem, "it needs both columns, the second with ids of 0 to 40")
            if label_map.setdefault(category, int(text)) != int(text):
                raise PointFileError(path, f"{category[:60]!a} is listed with two classes", _AGAIN)
    except csv.Error as error:
        raise PointFileError(path, f"line {reader.line_num} is damaged ({error})", _AGAIN) from error
    if not label_map:
        raise PointFileError(path, "it lists no categories", _AGAIN)
    return label_map


def read_split_list(path: pathlib.Path) -> list[str]:
    """Reads the scene ids of a split, one per line.

    Raises:
      ValueError: naming the file and the line that is no scene id.
    """
    scenes = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    for scene in scenes:
        if not re.fullmatch(SCENE_PATTERN, scene, re.ASCII):
            raise PointFileError(
                path, f"{scene[:60]!a} is no scene id", "list one id such as scene0000_00 per line"
            )
    if not scenes:
        raise PointFileError(path, "it lists no scenes", _AGAIN)
    return scenes


def _object_groups(path: pathlib.Path) -> list[dict[str, Any]]:
    content = _read_json(path)
    groups = content.get("segGroups") if isinstance(content, dict) else None
    if not isinstance(groups, list):
        raise PointFileError(path, "it has no list segGroups", _AGAIN)
    if len(groups) > _MAX_OBJECTS:
        raise PointFileError(path, f"it has {len(groups)} objects, more than {_MAX_OBJECTS}", _AGAIN)
    for number, group in enumerate(groups):
        good = (
            isinstance(group, dict)
            and _is_list_of_ids([group.get("objectId")])
            and isinstance(group.get("label"), str)
            and _is_list_of_ids(group.get("segments"))
        )
        if not good:
            problem = f"entry {number} of segGroups lacks a proper objectId, label or list of segments"
            raise PointFileError(path, problem, _AGAIN)
    return groups


def _is_list_of_ids(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _read_json(path: pathlib.Path) -> Any:
    text = _read_text(path, MAX_JSON_BYTES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PointFileError(path, f"is not intact JSON ({str(error)[:120]})", _AGAIN) from error


def _read_text(path: pathlib.Path, limit: int = _MAX_TEXT_BYTES) -> str:
    """Reads a text file of limited size; whatever goes wrong names the file."""
    try:
        if path.exists() and not path.is_file():
            raise PointFileError(path, "is not a file", "check the folder")
        size = path.stat().st_size
        data = path.read_bytes() if size <= limit else b""
    except OSError as error:
        raise PointFileError(
            path, f"cannot be read ({error.strerror or error})", "check the folder"
        ) from error
    if size > limit:
        raise PointFileError(path, f"takes {size} bytes, more than the {limit} of any intact one", _AGAIN)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PointFileError(path, f"is not text ({error.reason} at byte {error.start})", _AGAIN) from error
