"""Which teacher point a student point is compared with, and in how many channels.

Seeds and votes of a teacher and a student that read the same point pyramid belong together row by row. Clusters do not, unless
the student's are put at the teacher's, and nothing does where the two read other geometry (another family): then points are
matched by distance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.geometry.neighbors import map_blocks
from vrdistill_jax.losses.box import nearest, squared_distances
from vrdistill_jax.nn.mlp import Dense
from vrdistill_jax.structs import DetectorOutput, PointSet, Scene

LARGE = 2**21  # pairs of points per scene above which distances are computed a block of points at a time


class PointPairs(NamedTuple):
    """Points as student and teacher see them; features and coordinates of pads are 0."""

    student: Array  # f32[B, M, Cs]
    teacher: Array  # f32[B, M, Ct], no gradient
    xyz: Array  # f32[B, M, 3] metres, no gradient
    seed_index: Array  # i32[B, M] rows of the cloud; None for voxels
    mask: Array  # bool[B, M]; False in padded scenes, too


def find_nearest(
    xyz: Float[Array, "b m 3"], target_xyz: Float[Array, "b n 3"], target_mask: Bool[Array, "b n"]
) -> tuple[Float[Array, "b m"], Int[Array, "b m"]]:
    """Finds the nearest valid target of each point; many points may share one.

    Args:
      xyz: f32[B, M, 3] metres.
      target_xyz: f32[B, N, 3] metres.
      target_mask: bool[B, N]; pads are never found.

    Returns:
      (f32[B, M] squared distances, i32[B, M] rows of the targets), without gradients. Among equally near ones the first; in
      a scene without any valid target a large finite distance and row 0.
    """
    xyz, target_xyz = jax.lax.stop_gradient((xyz, target_xyz))
    if xyz.shape[1] * target_xyz.shape[1] <= LARGE:
        return nearest(squared_distances(xyz, target_xyz), target_mask)

    def search(xyz, target_xyz, target_mask):
        def search_one(point):
            distance, index = nearest(squared_distances(point[None], target_xyz), target_mask)
            return distance[0], index[0]

        return map_blocks(search_one, xyz)

    return jax.vmap(search)(xyz, target_xyz, target_mask)


def gather_points(points: PointSet, index: Int[Array, "b m"]) -> PointSet:
    """Takes rows of a point set.

    Args:
      points: the set.
      index: i32[B, M] rows; negative ones give invalid points.

    Returns:
      A PointSet of M points.
    """
    rows = jnp.maximum(index, 0)
    taken = PointSet(*(None if field is None else gather_rows(field, rows) for field in points))
    return taken._replace(mask=taken.mask & (index >= 0))


def pair_points(student: DetectorOutput, teacher: DetectorOutput, scene: Scene, tap: str) -> PointPairs:
    """Pairs the points of a tap of both networks.

    Rows that go back to the same points of the cloud, in the same order, are paired as they are. Otherwise each student point
    has the nearest of the teacher's; several may share one.

    Args:
      student: the student's output.
      teacher: the teacher's output; its tensors leave under stop_gradient.
      scene: its mask takes padded scenes out.
      tap: name of the tap, such as "seeds".

    Returns:
      PointPairs; positions and seeds are the student's where points are matched by distance.

    Raises:
      ValueError: if a network lacks the tap.
    """
    for name, output in (("student", student), ("teacher", teacher)):
        if tap not in output.taps:
            known = ", ".join(sorted(output.taps)) or "none"
            raise ValueError(f"the {name} has no tap {tap!r}; it offers: {known}")
    a = student.taps[tap]
    b = _in_order_of(a, jax.lax.stop_gradient(teacher.taps[tap]))
    mask = a.mask & b.mask & scene.mask[:, None]

    def without_pads(values):
        return jnp.where(mask[..., None], values, 0.0)

    features = without_pads(a.features), without_pads(b.features)
    return PointPairs(*features, without_pads(b.xyz), b.seed_index, mask)


def _in_order_of(student: PointSet, teacher: PointSet) -> PointSet:
    """The teacher's points in the order of the student's."""

    def by_distance() -> PointSet:
        _, index = find_nearest(student.xyz, teacher.xyz, teacher.mask)
        found = gather_points(teacher, index)
        return found._replace(xyz=jax.lax.stop_gradient(student.xyz), seed_index=student.seed_index)

    voxels = student.seed_index is None  # which go back to no row of the cloud
    if student.mask.shape != teacher.mask.shape or voxels != (teacher.seed_index is None):
        return by_distance()
    ours, theirs = (points.xyz if voxels else points.seed_index for points in (student, teacher))
    return jax.lax.cond(jnp.all(ours == theirs), lambda: teacher, by_distance)


def align_features(features: Float[Array, "b m s"], size: int) -> Float[Array, "b m t"]:
    """Maps features to `size` channels by a linear layer "align", or leaves them alone if they have as many already.

    To be called inside the compact method of a module, which gets the layer's parameters.
    """
    if features.shape[-1] == size:
        return features
    return Dense(features.shape[-1], size, name="align")(features)


def mean_over_points(values: Float[Array, "b m"], mask: Bool[Array, "b m"]) -> Float[Array, " b"]:
    """Mean over the valid points of each scene; 0 where there are none."""
    count = jnp.sum(mask, axis=1, dtype=values.dtype)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=1) / jnp.maximum(count, 1.0)
