"""A self-contained web page of a cloud and its boxes: opens from disk in any browser and needs no network.

The page is `viewer.html` of this package with the data of one scene put into it: points as 16-bit integers
and colours as bytes, both in base64, so that 40,000 points take about half a megabyte.
"""

import base64
import html
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vrdistill_jax.visualization.layers import BoxSet, PointLayer, check_layer, heat_colors, value_range
from vrdistill_jax.visualization.ply import class_color

MAX_POINTS = 200_000  # shown; more than that makes the page slow to open and no clearer


def write_viewer(
    path: str | os.PathLike,
    xyz: np.ndarray,
    color: np.ndarray | None,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str],
    ground_truth: tuple[np.ndarray, np.ndarray] | None = None,
    title: str = "Detections",
    notes: Sequence[str] = (),
    max_points: int = MAX_POINTS,
    layers: Sequence[PointLayer] = (),
    more_boxes: Sequence[BoxSet] = (),
    boxes_name: str = "Boxes",
) -> pathlib.Path:
    """Writes the page.

    Args:
      path: the `.html` file to write; its folder is made.
      xyz: f32[n, 3] metres, z up.
      color: f32[n, 3] in [0, 1], or None to colour by height only.
      boxes: f32[d, 7] centre, full size, yaw.
      labels: i32[d] rows of `class_names`.
      scores: f32[d] in [0, 1], or None.
      class_names: name of each class.
      ground_truth: boxes f32[g, 7] and labels i32[g], or None.
      title: heading of the page.
      notes: remarks to show on the page, for instance the warnings of `check_points`.
      max_points: larger clouds are thinned to this many points for display, with a note that says so.
      layers: points drawn over cloud and boxes, such as votes; a legend shows and hides each of them, and the cloud.
      more_boxes: what other detectors found in the same cloud; the page then shows one set of boxes at a time, `boxes`
        first.
      boxes_name: what `boxes` are called where there are more.

    Returns:
      The path.

    Raises:
      ValueError: if shapes differ, a box or a layer is not finite or a label has no class name.
    """
    xyz = np.asarray(xyz, np.float64)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or (color is not None and np.asarray(color).shape != xyz.shape):
        got = None if color is None else np.asarray(color).shape
        raise ValueError(f"xyz {xyz.shape} and color {got} must both be [n, 3]")
    notes = [str(note) for note in notes]
    rows = _rows_to_show(xyz, max_points, notes)
    shown = xyz[rows]
    low, high = (shown.min(0), shown.max(0)) if len(shown) else (np.zeros(3), np.ones(3))
    step = np.maximum(high - low, 1e-6) / 65535
    quantised = np.rint((shown - low) / step - 32768).astype("<i2")
    names = [str(name) for name in class_names]
    box_sets = [BoxSet(boxes_name, boxes, labels, scores), *more_boxes]
    scene = {
        "title": title,
        "notes": notes,
        "points": {
            "count": len(rows),
            "total": len(xyz),
            "origin": _rounded(low + 32768 * step, 6),
            "step": [float(value) for value in step],
            "xyz": _base64(quantised),
            "rgb": None if color is None else _base64(_bytes_from_color(np.asarray(color)[rows])),
        },
        "classes": [{"name": name, "color": class_color(row)} for row, name in enumerate(names)],
        "sets": [str(group.name) for group in box_sets],
        "boxes": [
            record | {"set": number}
            for number, group in enumerate(box_sets)
            for record in _box_records(
                group.boxes, group.labels, group.scores, len(names), str(group.name).lower()
            )
        ],
        "truth": None
        if ground_truth is None
        else _box_records(*ground_truth, None, len(names), "ground_truth"),
        "layers": [_layer_record(check_layer(layer)) for layer in layers],
    }
    # "<" must not occur in a script element: it could close it.
    data = json.dumps(scene, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = pathlib.Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
    head, tail = template.split("{{data}}")
    page = head.replace("{{title}}", html.escape(title)) + data + tail
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _rows_to_show(xyz: np.ndarray, max_points: int, notes: list[str]) -> np.ndarray:
    """Leaves out what cannot be drawn, and says so."""
    rows = np.flatnonzero(np.isfinite(xyz).all(1))
    if len(rows) < len(xyz):
        notes.append(f"{len(xyz) - len(rows)} points with NaN or infinity are not shown")
    if len(rows):
        low, high = np.percentile(xyz[rows], [0.5, 99.5], axis=0)
        reach = 2 * (high - low).max() + 1e-6  # strays would cost the rest of the cloud its resolution
        near = ((xyz[rows] >= low - reach) & (xyz[rows] <= high + reach)).all(1)
        if not near.all():
            notes.append(f"{int((~near).sum())} stray points far outside the scan are not shown")
        rows = rows[near]
    if len(rows) > max_points:
        notes.append(f"{max_points:,} of {len(rows):,} points are shown; the detector saw its own sample")
        rows = np.sort(np.random.default_rng(0).choice(rows, max_points, replace=False))
    return rows


def _box_records(boxes, labels, scores, num_classes: int, what: str) -> list[dict]:
    boxes = np.asarray(boxes, np.float64).reshape(-1, 7)
    labels = np.asarray(labels).reshape(-1)
    if len(labels) != len(boxes) or (scores is not None and len(np.ravel(scores)) != len(boxes)):
        raise ValueError(
            f"{what}: {len(boxes)} boxes, {len(labels)} labels, {np.size(scores)} scores must be as many"
        )
    if not np.isfinite(boxes).all() or (scores is not None and not np.isfinite(scores).all()):
        raise ValueError(f"{what}: boxes or scores hold NaN or infinity; leave those rows out")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"{what}: labels {labels.min()}..{labels.max()}, but there are {num_classes} class names"
        )
    return [
        {
            "center": _rounded(box[:3], 4),
            "size": _rounded(box[3:6], 4),
            "yaw": round(float(box[6]), 5),
            "label": int(label),
            "score": None if scores is None else round(float(np.ravel(scores)[row]), 4),
        }
        for row, (box, label) in enumerate(zip(boxes, labels, strict=True))
    ]


def _layer_record(layer: PointLayer) -> dict:
    record = {
        "name": str(layer.name),
        "color": [int(value) for value in layer.color],
        "count": len(layer.xyz),
        "xyz": _base64(layer.xyz.astype("<f4")),
        "rgb": None,
        "scale": None,
    }
    if layer.values is not None:
        low, high = value_range(layer.values)
        record["rgb"] = _base64(heat_colors(layer.values, low, high))
        shades = heat_colors(np.linspace(low, high, 7), low, high)
        record["scale"] = {"low": round(low, 3), "high": round(high, 3), "colors": shades.tolist()}
    return record


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]


def _bytes_from_color(color: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(np.nan_to_num(color.astype(np.float64), nan=0.5), 0, 1) * 255).astype(np.uint8)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
