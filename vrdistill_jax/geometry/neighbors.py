"""Ball query and three nearest neighbours in pure JAX, with the semantics of the official CUDA kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.sampling import sum_of_squares

BLOCK_SIZE = 128  # centres or queries at a time: bounds the memory to BLOCK_SIZE x n
WORD_SIZE = 32  # bits


def query_ball(
    centers: Float[Array, "m 3"],
    xyz: Float[Array, "n 3"],
    radius: float,
    num_neighbors: int,
    mask: Bool[Array, "n"] | None = None,
) -> Int[Array, "m s"]:
    """Finds for each centre the first points, in index order, that lie strictly inside its ball.

    Args:
      centers: f32[m, 3] metres.
      xyz: f32[n, 3] metres; only valid rows need to be finite.
      radius: metres, positive; squared in float32.
      num_neighbors: s, at least 1.
      mask: bool[n], None if all points are valid; others are never found.

    Returns:
      i32[m, s] rows of `xyz`, rising; a ball with fewer points repeats its first one, an empty ball the first
      valid point of the cloud (row 0 where there is none).

    Raises:
      ValueError: if the cloud has no rows or a size is not positive.

    Source: pointnet2 `query_ball_point_kernel`.
    """
    if not radius > 0 or num_neighbors < 1 or not len(xyz):
        raise ValueError(
            f"radius is {radius}, num_neighbors {num_neighbors}, the cloud has {len(xyz)} rows: expected > 0"
        )
    mask = jnp.ones(len(xyz), bool) if mask is None else mask
    centers, xyz = jax.lax.stop_gradient((centers, jnp.where(mask[:, None], xyz, jnp.inf)))
    limit = np.float32(radius) * np.float32(radius)
    words = -(-len(xyz) // WORD_SIZE)
    xyz = jnp.pad(xyz, ((0, words * WORD_SIZE - len(xyz)), (0, 0)), constant_values=jnp.inf)
    x, y, z = xyz.reshape(words, WORD_SIZE, 3).transpose(2, 1, 0)
    bit = jnp.arange(WORD_SIZE, dtype=jnp.uint32)[:, None]
    first_valid = jnp.argmax(mask).astype(jnp.int32)

    def query(center):
        # The hits as a bit set in index order: the k-th hit is found by counting, without a sort.
        hit = sum_of_squares(x - center[0], y - center[1], z - center[2]) < limit
        word = jnp.sum(hit.astype(jnp.uint32) << bit, axis=0, dtype=jnp.uint32)
        hits_in_word = jax.lax.population_count(word).astype(jnp.int32)
        hits_so_far = jnp.cumsum(hits_in_word)
        slot = jnp.arange(num_neighbors)
        slot = jnp.where(slot < hits_so_far[-1], slot, 0)
        row = jnp.searchsorted(hits_so_far, slot, side="right", method="scan_unrolled").astype(jnp.int32)
        row = jnp.minimum(row, words - 1)
        index = row * WORD_SIZE + _find_set_bit(word[row], slot - (hits_so_far - hits_in_word)[row])
        return jnp.where(hits_so_far[-1] > 0, index, first_valid)

    return map_blocks(query, centers)


def find_three_nearest(
    queries: Float[Array, "m 3"],
    sources: Float[Array, "n 3"],
    mask: Bool[Array, "n"] | None = None,
) -> tuple[Int[Array, "m 3"], Float[Array, "m 3"]]:
    """Finds the three nearest sources of each query, the lower row first among equals.

    Args:
      queries: f32[m, 3] metres.
      sources: f32[n, 3] metres; only valid rows need to be finite.
      mask: bool[n], None if all sources are valid; others are never found.

    Returns:
      i32[m, 3] rows of `sources` and f32[m, 3] squared distances, rising. Where there are fewer than three
      valid sources, the rest is the first valid one (row 0 if there is none) at infinite distance.

    Source: pointnet2 `three_nn_kernel`.
    """
    mask = jnp.ones(len(sources), bool) if mask is None else mask
    queries, sources = jax.lax.stop_gradient((queries, jnp.where(mask[:, None], sources, 0.0)))
    first_valid = jnp.argmax(mask).astype(jnp.int32)
    row = jnp.arange(len(sources), dtype=jnp.int32)

    def query(point):
        distance = jnp.where(mask, sum_of_squares(*(sources - point).T), jnp.inf)
        index, squared = [], []
        for _ in range(3):
            nearest = jnp.argmin(distance).astype(jnp.int32)
            squared.append(distance[nearest])
            index.append(jnp.where(jnp.isfinite(squared[-1]), nearest, first_valid))
            distance = jnp.where(row == nearest, jnp.inf, distance)
        return jnp.stack(index), jnp.stack(squared)

    return map_blocks(query, queries)


def map_blocks(function: Callable, rows: Array):
    """Applies a function to every row, BLOCK_SIZE rows at a time.

    Args:
      function: from one row to a pytree of arrays.
      rows: [m, ...].

    Returns:
      The function's pytree, with a leading axis m.
    """
    count = len(rows)
    blocks = -(-count // BLOCK_SIZE)
    size = -(-count // blocks)  # even blocks: little padding
    padded = jnp.pad(rows, ((0, blocks * size - count),) + ((0, 0),) * (rows.ndim - 1))
    out = jax.lax.map(jax.vmap(function), padded.reshape(blocks, size, *rows.shape[1:]))
    return jax.tree.map(lambda leaf: leaf.reshape(blocks * size, *leaf.shape[2:])[:count], out)


def _find_set_bit(word: Int[Array, "*s"], k: Int[Array, "*s"]) -> Int[Array, "*s"]:
    """Finds the position of the k-th set bit (from 0, lowest first), halving the part that holds it."""
    position = jnp.zeros_like(k)
    for width in (16, 8, 4, 2, 1):
        low = word & np.uint32((1 << width) - 1)
        below = jax.lax.population_count(low).astype(jnp.int32)
        above = k >= below
        word = jnp.where(above, word >> width, low)
        k = jnp.where(above, k - below, k)
        position = position + jnp.where(above, width, 0)
    return position
