"""What a prepared dataset looks like in numbers, scene by scene and as a whole."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.conversion import hash_sample
from vrdistill_jax.data.builders import map_in_processes, open_split
from vrdistill_jax.data.class_tables import (
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
)
from vrdistill_jax.data.point_checks import measure_up_evidence
from vrdistill_jax.geometry.host.boxes import axis_aligned_bounds, points_in_boxes

FACE_CELLS = 10  # cells along each side of a box's face
NEAR_FACE = 0.05  # metres a point may lie off a face to show it, or a tenth of the box if that is more
OUTSIDE_MARGIN = 0.1  # metres between box and cloud that still count as touching
_SLACK = 0.05  # metres a labelled point may lie outside its box
_QUERIES = 256  # points whose nearest neighbour is searched
_LARGEST_SCAN = 200.0  # metres; beyond it the search for a floor makes no sense


class SceneStatistics(NamedTuple):
    """One scene; fields that need finite numbers are empty or 0 where the scene has others."""

    name: str
    content: str  # hash of the points
    stored: str  # hash as the manifest lists it
    num_points: int
    extent: tuple[float, ...]  # metres, between the 0.5th and 99.5th percentile
    height: tuple[float, ...]  # metres, those percentiles of z
    spacing: float  # metres, median distance to the nearest neighbour
    floor: dict[str, float]  # evidence that each of the six axes points up, see `measure_up_evidence`
    labels: tuple[int, ...]
    sizes: np.ndarray  # f64[g, 3]
    yaw: np.ndarray  # f64[g]
    points_in_box: np.ndarray  # i64[g]
    visible: np.ndarray  # f64[g] share of the faces' cells with points near
    outside: int  # boxes that touch no part of the cloud's bounds
    instance_range: tuple[int, int]
    instance_points: int  # points with an instance
    instance_points_outside: int  # of these, those that lie outside their box
    non_finite: tuple[str, ...]  # names of fields that hold NaN or infinity


def measure_scene(sample: dict) -> SceneStatistics:
    """Measures one scene.

    Args:
      sample: as `data.builders.open_split` gives it; its values may be wrong in any way, its shapes may not.

    Returns:
      The scene's statistics.
    """
    xyz = np.asarray(sample["xyz"], np.float64)
    boxes = np.concatenate(
        [sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"][:, None]], axis=1, dtype=np.float64
    )
    names = ("xyz", "color", "boxes_center", "boxes_size", "boxes_yaw", "vote_center")
    non_finite = tuple(name for name in names if not np.isfinite(sample[name]).all())
    instance = sample["instance"]
    found: dict[str, Any] = {
        "extent": (0.0, 0.0, 0.0),
        "height": (0.0, 0.0),
        "spacing": 0.0,
        "floor": {},
        "points_in_box": np.zeros(len(boxes), np.int64),
        "visible": np.zeros(len(boxes)),
        "outside": 0,
        "instance_points_outside": 0,
    }
    if not non_finite and len(xyz):
        low, high = np.percentile(xyz, [0.5, 99.5], axis=0)
        found["extent"], found["height"] = tuple(map(float, high - low)), (float(low[2]), float(high[2]))
        found["spacing"] = median_spacing(xyz)
        if np.ptp(xyz, axis=0).max() <= _LARGEST_SCAN:
            found["floor"] = measure_up_evidence(xyz).floor
        inside = points_in_boxes(xyz, boxes)
        found["points_in_box"] = inside.sum(0)
        found["visible"] = visible_share(xyz, boxes)
        lower, upper = axis_aligned_bounds(boxes)
        apart = (lower > xyz.max(0) + OUTSIDE_MARGIN) | (upper < xyz.min(0) - OUTSIDE_MARGIN)
        found["outside"] = int(apart.any(1).sum())
        grown = boxes + np.array([0, 0, 0, 2 * _SLACK, 2 * _SLACK, 2 * _SLACK, 0])
        mine = np.flatnonzero((instance >= 0) & (instance < len(boxes)))
        if len(mine):
            near = points_in_boxes(xyz[mine], grown)
            found["instance_points_outside"] = int((~near[np.arange(len(mine)), instance[mine]]).sum())
    return SceneStatistics(
        name=sample["name"],
        content=hashlib.sha256(np.ascontiguousarray(sample["xyz"]).tobytes()).hexdigest(),
        stored=hash_sample(sample) if not non_finite else "",
        num_points=len(xyz),
        labels=tuple(int(label) for label in sample["boxes_label"]),
        sizes=boxes[:, 3:6],
        yaw=boxes[:, 6],
        instance_range=(int(instance.min(initial=-1)), int(instance.max(initial=-1))),
        instance_points=int((instance >= 0).sum()),
        non_finite=non_finite,
        **found,
    )


def median_spacing(xyz: np.ndarray) -> float:
    """Gives the median distance from a point to its nearest neighbour, over a fixed random choice of points.

    Args:
      xyz: f64[n, 3] metres.

    Returns:
      Metres; 0 for fewer than two points.
    """
    if len(xyz) < 2:
        return 0.0
    rows = np.random.default_rng(0).permutation(len(xyz))[:_QUERIES]
    columns = np.ascontiguousarray(xyz.astype(np.float32).T)
    nearest = []
    for row in rows:
        x, y, z = columns - columns[:, row : row + 1]
        squared = x * x + y * y + z * z
        squared[row] = np.inf
        nearest.append(float(squared.min()))
    return float(np.sqrt(np.median(nearest)))


def visible_share(xyz: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Measures how much of each box's surface the scan shows.

    Each of the six faces is cut into 10 x 10 cells; a cell is visible if a point lies in it and not
    farther from the face than 5 cm or a tenth of the box, on either side.

    Args:
      xyz: f64[n, 3] metres.
      boxes: f64[g, 7] metres and radians.

    Returns:
      f64[g] visible cells out of 600.
    """
    shares = np.zeros(len(boxes))
    for row, box in enumerate(boxes):
        if (box[3:6] <= 0).any():
            continue
        margin = np.maximum(NEAR_FACE, 0.1 * box[3:6])
        reach = np.linalg.norm(box[3:6] / 2 + margin)
        offset = xyz[(np.abs(xyz - box[:3]) <= reach).all(1)] - box[:3]
        cos, sin = np.cos(box[6]), np.sin(box[6])
        local = np.stack(
            [cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0], offset[:, 2]],
            1,
        )
        cell = np.floor((local / box[3:6] + 0.5) * FACE_CELLS).astype(np.int64)
        cell[local == box[3:6] / 2] = FACE_CELLS - 1  # exactly on the far edge
        within = (cell >= 0) & (cell < FACE_CELLS)
        seen = 0
        for axis in range(3):
            a, b = (axis + 1) % 3, (axis + 2) % 3
            for side in (-1, 1):
                near = np.abs(local[:, axis] - side * box[3 + axis] / 2) <= margin[axis]
                on = near & within[:, a] & within[:, b]
                seen += len(np.unique(cell[on, a] * FACE_CELLS + cell[on, b]))
        shares[row] = seen / (6 * FACE_CELLS**2)
    return shares


def split_names(directory: str | os.PathLike) -> list[str]:
    """Lists the splits of a prepared dataset.

    Raises:
      ValueError: if the folder holds no prepared dataset.
    """
    path = pathlib.Path(directory) / "dataset_info.json"
    try:
        return [split["name"] for split in json.loads(path.read_text())["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} holds no prepared dataset (no readable {path.name})") from error


def measure_split(
    directory: str | os.PathLike, split: str, max_scenes: int = 0, workers: int | None = None, progress=True
) -> list[SceneStatistics]:
    """Measures the scenes of a split, in worker processes.

    Args:
      directory: the prepared dataset.
      split: its name.
      max_scenes: this many, evenly spaced; 0 for all.
      workers: processes; None for one per core, 0 for none.
      progress: whether to show a progress bar.

    Returns:
      The statistics, in the order of the rows.
    """
    from tqdm import tqdm

    count = len(open_split(directory, split))
    rows = scene_rows(count, max_scenes)
    calls = [(str(directory), split, int(row)) for row in rows]
    measured = map_in_processes(_measure_row, calls, workers)
    return list(tqdm(measured, total=len(calls), desc=split, unit="scene", disable=not progress))


def scene_rows(count: int, max_scenes: int) -> np.ndarray:
    """Gives up to `max_scenes` evenly spaced rows of `count`; all for 0."""
    chosen = min(count, max_scenes) if max_scenes else count
    return np.unique(np.linspace(0, count - 1, chosen).round().astype(int)) if chosen else np.zeros(0, int)


@functools.lru_cache(maxsize=4)
def _source(directory: str, split: str):
    return open_split(directory, split)


def _measure_row(directory: str, split: str, row: int) -> SceneStatistics:
    return measure_scene(_source(directory, split)[row])


def summarize(scenes: Sequence[SceneStatistics], class_names: Sequence[str]) -> dict[str, Any]:
    """Sums up scenes.

    Args:
      scenes: as `measure_split` gives them.
      class_names: in label order.

    Returns:
      Plain numbers, for JSON: what `verify` prints, with `classes` as a table by name.
    """
    counts = np.array([scene.num_points for scene in scenes])
    labels = np.array([label for scene in scenes for label in scene.labels], int)
    sizes = _joined([scene.sizes for scene in scenes], (0, 3))
    inside = _joined([scene.points_in_box for scene in scenes], (0,))
    visible = _joined([scene.visible for scene in scenes], (0,))
    yaw = _joined([scene.yaw for scene in scenes], (0,))
    boxes = np.array([len(scene.labels) for scene in scenes])
    classes = {}
    for row, name in enumerate(class_names):
        mine = labels == row
        classes[name] = {
            "boxes": int(mine.sum()),
            "mean_size": _rounded(sizes[mine].mean(0)) if mine.any() else None,
            "median_points": float(np.median(inside[mine])) if mine.any() else None,
            "visible_surface": _mean(visible[mine]),
        }
    return {
        "scenes": len(scenes),
        "points_per_scene": _spread(counts),
        "boxes": int(boxes.sum()),
        "boxes_per_scene": _spread(boxes),
        "scenes_without_boxes": _mean(boxes == 0),
        "turned_boxes": _mean(yaw != 0),
        "points_per_box": _spread(inside),
        "boxes_below_5_points": _mean(inside < 5),
        "boxes_below_20_points": _mean(inside < 20),
        "visible_surface": _mean(visible),
        "neighbour_distance": _median([scene.spacing for scene in scenes]),
        "length": _median([max(scene.extent[:2]) for scene in scenes]),
        "width": _median([min(scene.extent[:2]) for scene in scenes]),
        "height": _median([scene.extent[2] for scene in scenes]),
        "lowest_z": _median([scene.height[0] for scene in scenes]),
        "highest_z": _median([scene.height[1] for scene in scenes]),
        "points_with_instance": _mean_of_ratio(
            sum(scene.instance_points for scene in scenes), sum(scene.num_points for scene in scenes)
        ),
        "classes": classes,
    }


def reference_sizes(directory: str | os.PathLike, class_names: Sequence[str]) -> tuple[dict[str, list], str]:
    """Gives the mean sizes that a config for the dataset trains with, and where they are from."""
    try:
        summary = json.loads((pathlib.Path(directory) / "mean_sizes.json").read_text())
        return dict(zip(summary["class_names"], summary["mean_sizes"], strict=True)), "mean_sizes.json"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for names, sizes, where in (
        (SCANNET_CLASSES, SCANNET_MEAN_SIZES, "ScanNet's table"),
        (SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES, "SUN RGB-D's table"),
    ):
        if tuple(class_names) == names:
            return {name: _rounded(size) for name, size in zip(names, sizes, strict=True)}, where
    return {}, ""


def _joined(parts: list[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(empty)


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    low, median, high = np.percentile(values, [5, 50, 95])
    return {"mean": _round(values.mean()), "p5": _round(low), "median": _round(median), "p95": _round(high)}


def _mean(values: np.ndarray) -> float | None:
    return _round(np.mean(values)) if len(values) else None


def _median(values: Sequence[float]) -> float | None:
    return _round(np.median(values)) if len(values) else None


def _mean_of_ratio(part: int, whole: int) -> float | None:
    return _round(part / whole) if whole else None


def _round(value: Any) -> float:
    """Four digits are all that such statistics carry."""
    return float(f"{float(value):.4g}")


def _rounded(values: np.ndarray) -> list[float]:
    return [_round(value) for value in values]
