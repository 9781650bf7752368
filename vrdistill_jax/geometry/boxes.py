"""Box geometry on the device: corners, bounds, points in boxes.

A box row is (x, y, z, l, w, h, yaw): centre, full size along the box's own axes, yaw counter-clockwise about
+z. A box with any size <= 0 is empty. `geometry.host.boxes` holds the NumPy twins.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.host.boxes import CORNER_SIGNS, FACE_MARGIN

# Points tested at once by count_points_in_boxes: block * boxes tests stay in the CPU's cache.
_BLOCK = 1024


def join_boxes(
    center: Float[Array, "*b 3"], size: Float[Array, "*b 3"], yaw: Float[Array, "*b"]
) -> Float[Array, "*b 7"]:
    """Joins the fields of `structs.Boxes` or `structs.Predictions` into box rows.

    Args:
      center: [..., 3] metres.
      size: [..., 3] metres, full extents.
      yaw: [...] radians.

    Returns:
      f32[..., 7].
    """
    return jnp.concatenate([center, size, yaw[..., None]], axis=-1)


def corners_from_boxes(boxes: Float[Array, "*b 7"]) -> Float[Array, "*b 8 3"]:
    """Gives the eight corners of every box.

    The order is that of VoteNet's evaluation code (which stores them in a camera frame:
    `frames.camera_from_depth`); seen from above, in the box's own axes, bottom face / top face:

                y (w)
          3/7   ^    0/4
            +---|---+
            |   +---|--> x (l)
            +-------+
          2/6        1/5

    Args:
      boxes: [..., 7] metres and radians.

    Returns:
      f32[..., 8, 3] metres.
    """
    local = CORNER_SIGNS * (boxes[..., None, 3:6] / 2)
    cos, sin = jnp.cos(boxes[..., 6:7]), jnp.sin(boxes[..., 6:7])
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    return boxes[..., None, :3] + jnp.stack([x, y, local[..., 2]], axis=-1)


def axis_aligned_boxes(boxes: Float[Array, "*b 7"]) -> Float[Array, "*b 7"]:
    """Gives the smallest axis-aligned box around every box.

    Args:
      boxes: [..., 7] metres and radians.

    Returns:
      f32[..., 7] with the same centres, sizes >= 0 and yaw 0.
    """
    size = jnp.maximum(boxes[..., 3:6], 0)
    cos, sin = jnp.abs(jnp.cos(boxes[..., 6])), jnp.abs(jnp.sin(boxes[..., 6]))
    extent_x = cos * size[..., 0] + sin * size[..., 1]
    extent_y = sin * size[..., 0] + cos * size[..., 1]
    rest = jnp.stack([extent_x, extent_y, size[..., 2], jnp.zeros_like(extent_x)], axis=-1)
    return jnp.concatenate([boxes[..., :3], rest], axis=-1)


def axis_aligned_bounds(boxes: Float[Array, "*b 7"]) -> tuple[Float[Array, "*b 3"], Float[Array, "*b 3"]]:
    """Gives the lower and the upper corner of the smallest axis-aligned box around every box.

    Args:
      boxes: [..., 7] metres and radians.

    Returns:
      f32[..., 3] lowest and f32[..., 3] highest coordinates, metres.
    """
    aligned = axis_aligned_boxes(boxes)
    return aligned[..., :3] - aligned[..., 3:6] / 2, aligned[..., :3] + aligned[..., 3:6] / 2


def points_in_boxes(xyz: Float[Array, "n 3"], boxes: Float[Array, "g 7"]) -> Bool[Array, "n g"]:
    """Tells which points lie in which boxes; faces belong to the box, within `FACE_MARGIN`.

    Args:
      xyz: [n, 3] metres.
      boxes: [g, 7] metres and radians.

    Returns:
      bool[n, g]; pads are the caller's to mask.
    """
    cos, sin = jnp.cos(boxes[:, 6]), jnp.sin(boxes[:, 6])
    # An empty box gets a negative half size, which no distance is below.
    empty = (boxes[:, 3:6] <= 0).any(-1)
    half = jnp.where(empty[:, None], -1.0, boxes[:, 3:6] / 2 + FACE_MARGIN)
    x, y, z = (xyz[:, None, axis] - boxes[:, axis] for axis in range(3))
    return (
        (jnp.abs(cos * x + sin * y) <= half[:, 0])
        & (jnp.abs(cos * y - sin * x) <= half[:, 1])
        & (jnp.abs(z) <= half[:, 2])
    )


def count_points_in_boxes(
    xyz: Float[Array, "n 3"], boxes: Float[Array, "q 7"], mask: Bool[Array, "n"] | None = None
) -> Int[Array, "q"]:
    """Counts the points inside every box, a block of points at a time.

    Args:
      xyz: [n, 3] metres.
      boxes: [q, 7] metres and radians.
      mask: [n] True where a point is real, or None for all.

    Returns:
      i32[q].
    """
    count = xyz.shape[0]
    blocks = -(-count // _BLOCK)
    if mask is None:
        mask = jnp.ones(count, bool)
    padding = blocks * _BLOCK - count
    xyz = jnp.pad(xyz, ((0, padding), (0, 0))).reshape(blocks, _BLOCK, 3)
    mask = jnp.pad(mask, (0, padding)).reshape(blocks, _BLOCK)

    def add(total, block):
        points, real = block
        inside = points_in_boxes(points, boxes) & real[:, None]
        return total + inside.sum(0, dtype=jnp.int32), None

    return jax.lax.scan(add, jnp.zeros(boxes.shape[0], jnp.int32), (xyz, mask))[0]
