"""Where each seed's vote should land, and how far off it is."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.indexing import gather_rows


def vote_targets(
    point_instance: Int[Array, "b n v"], vote_center: Float[Array, "b g 3"], seed_index: Int[Array, "b m"]
) -> tuple[Float[Array, "b m v 3"], Bool[Array, "b m"]]:
    """The points that the votes of each seed may aim at.

    Args:
      point_instance: i32[B, N, V] rows of the boxes that hold each point, -1 none; the first slot is the main one.
      vote_center: f32[B, G, 3] metres.
      seed_index: i32[B, M] rows of the cloud.

    Returns:
      (f32[B, M, V, 3] targets, bool[B, M] whether the seed lies on an object). An empty slot of a seed on an object
      repeats its first one.
    """
    instance = gather_rows(point_instance, seed_index)
    first = instance[..., :1]
    instance = jnp.where(instance < 0, first, instance)
    return gather_rows(vote_center, jnp.maximum(instance, 0)), first[..., 0] >= 0


def vote_distance(vote: Float[Array, "b m 3"], targets: Float[Array, "b m v 3"]) -> Float[Array, "b m"]:
    """L1 distance |dx| + |dy| + |dz| from each vote to the nearest of its targets, metres.

    Source: VoteNet, compute_vote_loss.
    """
    return jnp.min(jnp.sum(jnp.abs(vote[:, :, None] - targets), axis=-1), axis=-1)
