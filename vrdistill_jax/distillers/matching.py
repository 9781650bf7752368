"""Which teacher point a student point is compared with.

Seeds and votes of teacher and student belong together row by row (both read the same point pyramid). Clusters do not, unless
the student's are put at the teacher's: they are matched by distance, or by the seed that they come from.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.losses.box import nearest, squared_distances
from vrdistill_jax.structs import PointSet


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
    return nearest(squared_distances(xyz, target_xyz), target_mask)


def find_same_seed(
    seed_index: Int[Array, "b m"], target_seed_index: Int[Array, "b n"], target_mask: Bool[Array, "b n"]
) -> Int[Array, "b m"]:
    """Finds the valid target that comes from the same seed.

    Args:
      seed_index: i32[B, M] rows of the cloud (`PointSet.seed_index`).
      target_seed_index: i32[B, N] likewise.
      target_mask: bool[B, N].

    Returns:
      i32[B, M] rows of the targets, -1 where there is none.
    """
    same = (seed_index[:, :, None] == target_seed_index[:, None, :]) & target_mask[:, None, :]
    return jnp.where(jnp.any(same, -1), jnp.argmax(same, -1), -1)


def pair_rows(student: PointSet, teacher: PointSet) -> Bool[Array, "b m"]:
    """Pairs two taps row by row.

    Args:
      student: a tap of the student.
      teacher: the same tap of the teacher, on the same points.

    Returns:
      bool[B, M] rows that are valid in both.

    Raises:
      ValueError: if the taps have different numbers of points.
    """
    if student.mask.shape != teacher.mask.shape:
        raise ValueError(
            f"the student's tap has {student.mask.shape[-1]} points and the teacher's {teacher.mask.shape[-1]}; row by row "
            "they can be compared only if both networks use the same points (for proposals: at the teacher's clusters)"
        )
    return student.mask & teacher.mask


def gather_points(points: PointSet, index: Int[Array, "b m"]) -> PointSet:
    """Takes rows of a point set.

    Args:
      points: the set.
      index: i32[B, M] rows; negative ones give invalid points.

    Returns:
      A PointSet of M points.
    """
    rows = jnp.maximum(index, 0)
    taken = PointSet(*(gather_rows(field, rows) for field in points))
    return taken._replace(mask=taken.mask & (index >= 0))
