"""Faces and edges of labelled boxes that a cloud's points lie on: H3DNet's ground truth, box by box and face by face.

The NumPy twin of `detectors.h3dnet_targets`, which finds the same on the device for the seeds of a batch and says what the
rules mean. This one serves to look at a scene's primitives, and a test holds the two equal.

The reference's preparation scripts for ScanNet are not published; what it stores per vertex (the box of the vertex's instance)
is what a sample of `data.sources` holds.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

KINDS = {"z": 2, "xy": 1, "line": 0}  # kind -> sizes: length and width, height, none

# The faces of a box as (axis, sign), and for each the faces beside it that it is searched for edges with.
_FACES = {
    (2, -1): ((0, -1), (0, 1), (1, -1), (1, 1)),
    (2, 1): ((0, -1), (0, 1), (1, -1), (1, 1)),
    (0, -1): ((1, -1), (1, 1)),
    (0, 1): ((1, -1), (1, 1)),
    (1, -1): (),
    (1, 1): (),
}


class PointPrimitives(NamedTuple):
    """One kind of primitive, for every point of a cloud."""

    mask: Bool[np.ndarray, " n"]  # whether the point lies on one
    center: Float[np.ndarray, "n 3"]  # metres; 0 where it does not
    size: Float[np.ndarray, "n d"]  # metres, as in KINDS
    label: Int[np.ndarray, " n"]  # class of the object, -1 where there is none


def find_primitives(
    xyz: Float[np.ndarray, "n 3"],
    point_instance: Int[np.ndarray, "n v"],
    boxes: Float[np.ndarray, "g 7"],
    label: Int[np.ndarray, " g"],
    rules: Any,
) -> dict[str, PointPrimitives]:
    """Finds the primitives that points lie on.

    Args:
      xyz: f32[n, 3] metres.
      point_instance: i32[n, v] rows of the boxes that hold each point, -1 none, as in `structs.Scene`.
      boxes: f32[g, 7] centre, full size, yaw.
      label: i32[g] classes.
      rules: has face_distance (metres), face_points, face_variance (square metres), edge_distance (metres), edge_points and
        edge_of_box; H3DNet's config.detector.primitives.

    Returns:
      PointPrimitives by kind. Where a point lies on several of a kind, the last face or edge of the last box counts.

    Raises:
      ValueError: if a point belongs to a box that does not exist.

    Source: H3DNet, scannet_detection_dataset_hd.py and sunrgbd_detection_dataset_hd.py.
    """
    count = len(xyz)
    if np.max(point_instance, initial=-1) >= len(boxes):
        raise ValueError(
            f"a point belongs to box {np.max(point_instance)} but there are {len(boxes)}; point_instance names rows of them"
        )
    found = {
        kind: PointPrimitives(
            np.zeros(count, bool),
            np.zeros((count, 3), np.float32),
            np.zeros((count, sizes), np.float32),
            np.full(count, -1, np.int32),
        )
        for kind, sizes in KINDS.items()
    }
    for row, box in enumerate(np.asarray(boxes, np.float64)):
        points = np.flatnonzero((point_instance == row).any(1))
        if not len(points):
            continue
        # The box's own axes; the reference turns boxes by at most a quarter, which decides about the order of the sides.
        yaw = box[6] - np.pi * np.round(box[6] / np.pi)
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        local = (np.asarray(xyz[points], np.float64) - box[:3]) @ turn
        for kind, on, center in _search(local, box[3:6], rules):
            own = found[kind]
            own.mask[points[on]] = True
            own.center[points[on]] = box[:3] + turn @ center
            own.size[points[on]] = {"z": box[3:5], "xy": box[5:6], "line": box[:0]}[kind]
            own.label[points[on]] = label[row]
    return found


def _search(local: np.ndarray, size: np.ndarray, rules: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields (kind, rows of the points, centre in the box's frame) for each primitive of one box, in order."""
    for (axis, sign), sides in _FACES.items():
        off = np.abs(local[:, axis] - sign * size[axis] / 2)
        on = np.flatnonzero(np.abs(off - off.min()) < rules.face_distance)
        for side_axis, side_sign in sides:
            to_side = np.abs(local[on, side_axis] - side_sign * size[side_axis] / 2)
            distance = np.hypot(off[on], to_side) if rules.edge_of_box else to_side
            edge = on[distance < rules.edge_distance]
            if len(edge) <= rules.edge_points:
                continue
            center = np.zeros(3) if rules.edge_of_box else local[edge].mean(0)
            along = ({0, 1, 2} - {axis, side_axis}).pop()
            center[along] = 0
            if rules.edge_of_box:
                center[axis], center[side_axis] = sign * size[axis] / 2, side_sign * size[side_axis] / 2
            yield "line", edge, center
        if len(on) <= rules.face_points or np.var(off[on]) >= rules.face_variance:
            continue
        middle = local[on].mean(0)
        if axis == 2:
            yield "z", on, np.array([0, 0, middle[2]])
        else:
            yield "xy", on, np.array([middle[0], middle[1], 0])
