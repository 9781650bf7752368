"""One scan of one's own and its .json as a sample of the stored form."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.annotations import AnnotationError, read_annotation, read_instance
from vrdistill_jax.data.point_checks import METERS_PER_UNIT, check_points
from vrdistill_jax.data.point_files import read_points
from vrdistill_jax.data.point_tables import PointFileError
from vrdistill_jax.data.samples import middle_of_instances
from vrdistill_jax.geometry.host.boxes import points_in_boxes


def read_scan(
    scan: str | os.PathLike,
    class_names: Sequence[str],
    unit: str = "m",
    columns: int | None = None,
) -> dict:
    """Reads a scan and its .json and makes the sample of them (fields as of `data.builders.open_split`).

    A point belongs to the instance that the .json gives for it, else to the smallest box that holds it.

    Args:
      scan: the scan's file.
      class_names: in label order.
      unit: of scan and boxes, one of METERS_PER_UNIT.
      columns: values per point of a .bin file; None guesses.

    Returns:
      The sample, with `notes` on what was assumed.

    Raises:
      ValueError: naming the file and the reason.
    """
    scan = pathlib.Path(scan)
    path = scan.with_suffix(".json")
    annotation = read_annotation(path)
    unknown = sorted(set(annotation.labels) - set(class_names))
    if unknown:
        known = ", ".join(class_names)
        raise AnnotationError(path, f"label {unknown[0]!r} is not among the classes ({known[:300]})")
    cloud = read_points(scan, columns)
    notes = list(cloud.warnings)
    total = len(cloud.xyz)
    instance = read_instance(path, annotation, total)
    keep = np.isfinite(cloud.xyz).all(1)
    if (cloud.xyz == 0).all(1).sum() > max(0.02 * total, 1):  # how depth cameras write missing pixels
        keep &= ~(cloud.xyz == 0).all(1)
    if not keep.all():
        notes.append(f"removed {total - int(keep.sum())} of {total} points that are invalid or at (0, 0, 0)")
    scale = METERS_PER_UNIT[unit]
    has_color = cloud.color is not None
    color = cloud.color[keep] if cloud.color is not None else np.full((int(keep.sum()), 3), 0.5, np.float32)
    cloud = cloud._replace(xyz=(cloud.xyz[keep] * scale).astype(np.float32), color=color, warnings=())
    try:
        guessed = check_points(cloud)
    except ValueError as error:
        raise PointFileError(scan, str(error), "check the scan") from error
    if not np.array_equal(guessed.scene_from_input[:3, :3], np.eye(3)):
        notes.append(f"the scan does not look like metres with z up: {'; '.join(guessed.warnings)}")
    else:
        notes += guessed.warnings
    if not has_color:
        notes.append("the scan has no colours; grey was stored")
    boxes = np.concatenate(
        [annotation.center * scale, annotation.size * scale, annotation.yaw[:, None]], axis=1
    )
    boxes = boxes.astype(np.float32)
    if instance is None:
        instance, vote_center = _smallest_box(cloud.xyz, boxes), boxes[:, :3]
    else:
        instance = instance[keep].astype(np.int32)
        vote_center = middle_of_instances(cloud.xyz, instance, boxes[:, :3])
    empty = len(boxes) - len(np.unique(instance[instance >= 0]))
    if empty:
        notes.append(f"{empty} of {len(boxes)} boxes hold no point of their own")
    return {
        "xyz": cloud.xyz,
        "color": color,
        "instance": instance,
        "boxes_center": boxes[:, :3],
        "boxes_size": boxes[:, 3:6],
        "boxes_yaw": boxes[:, 6],
        "boxes_label": np.array([list(class_names).index(name) for name in annotation.labels], np.int32),
        "vote_center": vote_center,
        "name": scene_id(scan),
        "notes": notes,
    }


def scene_id(scan: str | os.PathLike) -> str:
    """Gives the name of a scan in the dataset: the file's stem with anything unusual replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", pathlib.Path(scan).stem).lstrip("_-") or "scan"


def convert_scan(
    scans: Mapping[str, str],
    class_names: tuple[str, ...],
    unit: str,
    columns: int | None,
    name: str,
    split: str = "",
) -> dict:
    """Makes the sample of a name, for `conversion.convert_dataset`; arguments as of `read_scan`."""
    del split
    return read_scan(scans[name], class_names, unit, columns)


def _smallest_box(xyz: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    instance = np.full(len(xyz), -1, np.int32)
    order = np.argsort(-boxes[:, 3:6].prod(1), kind="stable")  # smaller boxes overwrite larger ones
    for start in range(0, len(order), 64):  # not all at once: the table takes points x boxes bytes
        rows = order[start : start + 64]
        for row, inside in zip(rows, points_in_boxes(xyz, boxes[rows]).T, strict=True):
            instance[inside] = row
    return instance
