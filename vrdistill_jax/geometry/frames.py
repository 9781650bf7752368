"""Conversions between the contract's frame and the frames of other projects.

The contract (see `structs`): right-handed, z up, metres; a box row is (x, y, z, l, w, h, yaw) = centre, full
size along the box's own axes, yaw counter-clockwise about +z from +x, in [-pi, pi).

| project | box rows | heading |
|---|---|---|
| VoteNet, Group-Free, H3DNet, 3DETR: networks | centre, full size | clockwise seen from above: -yaw |
| VoteNet: SUN RGB-D label files | centre, HALF size | clockwise |
| mmdetection3d depth boxes, version 1.0 on | centre of the BOTTOM face, full size | counter-clockwise: yaw |
| the corners of VoteNet's evaluation code | upright camera frame: x right, y DOWN, z forward | clockwise |

All functions take NumPy and JAX arrays alike (the module imports no JAX) and work under jit, vmap and grad.
"""

import math
from typing import Any

from jaxtyping import Float, Shaped

Array = Any  # a NumPy or a JAX array


def wrap_yaw(yaw: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Wraps angles to [-pi, pi) and leaves those already inside bit for bit as they are.

    Args:
      yaw: [...] radians, any finite value.

    Returns:
      The same angles in [-pi, pi), in the array's own precision.
    """
    turns = (yaw + math.pi) // (2 * math.pi)
    wrapped = yaw - 2 * math.pi * turns
    # Rounding may leave the result one step outside either end.
    wrapped = wrapped + 2 * math.pi * (wrapped < -math.pi).astype(yaw.dtype)
    return wrapped - 2 * math.pi * (wrapped >= math.pi).astype(yaw.dtype)


def yaw_from_votenet_heading(heading: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Turns VoteNet's heading (clockwise seen from above, from +x towards -y) into yaw.

    Args:
      heading: [...] radians.

    Returns:
      Yaw, counter-clockwise, in [-pi, pi).
    """
    return wrap_yaw(-heading)


def votenet_heading_from_yaw(yaw: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Turns yaw into VoteNet's heading, see `yaw_from_votenet_heading`.

    Args:
      yaw: [...] radians.

    Returns:
      Heading, clockwise seen from above, in [-pi, pi).
    """
    return wrap_yaw(-yaw)


def boxes_from_votenet(boxes: Float[Array, "*b 7"], sizes: str) -> Float[Array, "*b 7"]:
    """Converts VoteNet's boxes (centre, full or half size, clockwise heading) to the contract.

    Args:
      boxes: [..., 7] in the depth frame, metres and radians.
      sizes: "half" for rows of VoteNet's SUN RGB-D label files, "full" for decoded network outputs and for
        ScanNet.

    Returns:
      [..., 7] centre, full size, yaw.

    Raises:
      ValueError: if `sizes` is neither "full" nor "half".
    """
    scale = _scale_of(sizes)
    return _join(boxes[..., :3], boxes[..., 3:6] * scale, yaw_from_votenet_heading(boxes[..., 6:]))


def votenet_from_boxes(boxes: Float[Array, "*b 7"], sizes: str) -> Float[Array, "*b 7"]:
    """Inverse of `boxes_from_votenet`.

    Args:
      boxes: [..., 7] centre, full size, yaw.
      sizes: "full" or "half", what the result holds.

    Returns:
      [..., 7] centre, size, clockwise heading.

    Raises:
      ValueError: if `sizes` is neither "full" nor "half".
    """
    scale = _scale_of(sizes)
    return _join(boxes[..., :3], boxes[..., 3:6] / scale, votenet_heading_from_yaw(boxes[..., 6:]))


def boxes_from_mmdet3d(boxes: Float[Array, "*b 7"], origin: str) -> Float[Array, "*b 7"]:
    """Converts mmdetection3d depth boxes (yaw counter-clockwise, full sizes) to the contract.

    Args:
      boxes: [..., 7] metres and radians.
      origin: "bottom" if the rows hold the centre of the bottom face (the `tensor` of a depth box object),
        "gravity" if they hold the box centre (its info files).

    Returns:
      [..., 7] centre, full size, yaw.

    Raises:
      ValueError: if `origin` is neither "bottom" nor "gravity".
    """
    lift = _lift_of(origin) * boxes[..., 5:6]
    return _join(boxes[..., :2], boxes[..., 2:3] + lift, boxes[..., 3:6], wrap_yaw(boxes[..., 6:]))


def mmdet3d_from_boxes(boxes: Float[Array, "*b 7"], origin: str) -> Float[Array, "*b 7"]:
    """Inverse of `boxes_from_mmdet3d`.

    Args:
      boxes: [..., 7] centre, full size, yaw.
      origin: "bottom" or "gravity", what the result holds.

    Returns:
      [..., 7] origin, full size, yaw counter-clockwise.

    Raises:
      ValueError: if `origin` is neither "bottom" nor "gravity".
    """
    lift = _lift_of(origin) * boxes[..., 5:6]
    return _join(boxes[..., :2], boxes[..., 2:3] - lift, boxes[..., 3:6], wrap_yaw(boxes[..., 6:]))


def camera_from_depth(xyz: Shaped[Array, "*b 3"]) -> Shaped[Array, "*b 3"]:
    """Maps the contract's frame to the upright camera frame: (x, y, z) -> (x, -z, y).

    The corners of VoteNet's evaluation code are the result of this map on
    `geometry.boxes.corners_from_boxes`: that function keeps the reference's corner order.

    Args:
      xyz: [..., 3] metres, z up.

    Returns:
      [..., 3] metres, x right, y down, z forward.
    """
    return _join(xyz[..., 0:1], -xyz[..., 2:3], xyz[..., 1:2])


def depth_from_camera(xyz: Shaped[Array, "*b 3"]) -> Shaped[Array, "*b 3"]:
    """Inverse of `camera_from_depth`: (x, y, z) -> (x, z, -y).

    Args:
      xyz: [..., 3] metres, y down.

    Returns:
      [..., 3] metres, z up.
    """
    return _join(xyz[..., 0:1], xyz[..., 2:3], -xyz[..., 1:2])


def _scale_of(sizes: str) -> float:
    if sizes not in ("full", "half"):
        raise ValueError(f"sizes={sizes!r}; say 'full' or 'half', as the rows hold")
    return 2.0 if sizes == "half" else 1.0


def _lift_of(origin: str) -> float:
    if origin not in ("bottom", "gravity"):
        raise ValueError(f"origin={origin!r}; say 'bottom' or 'gravity', as the rows hold")
    return 0.5 if origin == "bottom" else 0.0


def _join(*parts: Array) -> Array:
    """Concatenates along the last axis with the arrays' own library."""
    return parts[0].__array_namespace__().concat(parts, axis=-1)
