"""Foreground and background of a set of points, for distillers that treat them differently.

`inside` below is bool[B, M, G]: point i of scene b lies in box j. Padded points, padded boxes and padded scenes are in no
box. Nothing here is differentiated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.boxes import join_boxes, points_in_boxes
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.structs import Boxes, Scene


def points_inside_boxes(
    xyz: Float[Array, "b m 3"], mask: Bool[Array, "b m"], boxes: Boxes, margin: float = 0.0
) -> Bool[Array, "b m g"]:
    """Tells which points lie in which (turned) boxes; faces belong to the box.

    Args:
      xyz: f32[B, M, 3] metres.
      mask: bool[B, M] valid points.
      boxes: the ground truth.
      margin: metres that every face is moved outwards by; negative shrinks the boxes.

    Returns:
      bool[B, M, G].
    """
    rows = join_boxes(boxes.center, boxes.size + 2.0 * margin, boxes.yaw)
    inside = jax.vmap(points_in_boxes)(*jax.lax.stop_gradient((xyz, rows)))
    return inside & mask[:, :, None] & boxes.mask[:, None, :]


def points_on_instances(
    point_instance: Int[Array, "b n v"],
    seed_index: Int[Array, "b m"],
    mask: Bool[Array, "b m"],
    boxes_mask: Bool[Array, "b g"],
) -> Bool[Array, "b m g"]:
    """Tells which points belong to which objects by the labels of the cloud, instead of by their position.

    Args:
      point_instance: i32[B, N, V] rows of the boxes that hold each point of the cloud, -1 none.
      seed_index: i32[B, M] rows of the cloud.
      mask: bool[B, M] valid points.
      boxes_mask: bool[B, G].

    Returns:
      bool[B, M, G].
    """
    instance = gather_rows(point_instance, seed_index)
    row = jnp.arange(boxes_mask.shape[-1])
    inside = jnp.any(instance[..., None] == row, axis=2)
    return inside & mask[:, :, None] & boxes_mask[:, None, :]


def points_on_foreground(
    xyz: Float[Array, "b m 3"],
    seed_index: Int[Array, "b m"] | None,
    mask: Bool[Array, "b m"],
    scene: Scene,
    region: str = "boxes",
    margin: float = 0.0,
) -> Bool[Array, "b m g"]:
    """Tells which points lie on which objects, by boxes or by instance labels.

    Args:
      xyz: f32[B, M, 3] metres.
      seed_index: i32[B, M] rows of the cloud, or None where points are voxels.
      mask: bool[B, M] valid points.
      scene: with boxes, and with point_instance for region "instances".
      region: "boxes" or "instances".
      margin: metres, see `points_inside_boxes`; for region "boxes" only.

    Returns:
      bool[B, M, G].

    Raises:
      ValueError: for an unknown region, or a scene without the labels that it needs.
    """
    if region not in ("boxes", "instances"):
        raise ValueError(f"region must be boxes or instances, got {region!r}")
    if scene.boxes is None:
        raise ValueError("a foreground region needs scene.boxes; this scene has no labels")
    mask = mask & scene.mask[:, None]
    if region == "boxes":
        return points_inside_boxes(xyz, mask, scene.boxes, margin)
    if seed_index is None:
        raise ValueError(
            'region "instances" needs points of the cloud; this detector offers voxels, use region "boxes"'
        )
    if scene.point_instance is None:
        raise ValueError('region "instances" needs scene.point_instance; use "boxes" where there are none')
    return points_on_instances(scene.point_instance, seed_index, mask, scene.boxes.mask)


def foreground_weight(inside: Bool[Array, "b m g"]) -> Float[Array, "b m"]:
    """Weights that give every object the same say, however many points it holds.

    Args:
      inside: bool[B, M, G].

    Returns:
      f32[B, M]: max over the objects that hold the point of 1 / (number of points of that object), 0 outside all objects.
      The weights of an object that overlaps no other one sum to 1; where objects overlap the smaller one wins.

    Source: FGD, the scale mask, with numbers of points for areas.
    """
    count = jnp.sum(inside, axis=1, keepdims=True, dtype=jnp.float32)
    return jnp.max(jnp.where(inside, 1.0 / jnp.maximum(count, 1.0), 0.0), axis=-1, initial=0.0)


def background_weight(inside: Bool[Array, "b m g"], mask: Bool[Array, "b m"]) -> Float[Array, "b m"]:
    """Equal weights of the points outside all objects.

    Args:
      inside: bool[B, M, G].
      mask: bool[B, M] valid points.

    Returns:
      f32[B, M] that sums to 1 over each scene, or to 0 where every valid point lies on an object.
    """
    background = mask & ~jnp.any(inside, axis=-1)
    count = jnp.sum(background, axis=1, keepdims=True, dtype=jnp.float32)
    return background / jnp.maximum(count, 1.0)
