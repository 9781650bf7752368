"""Gathering rows of padded sets."""

import jax
from jaxtyping import Array, Int, Shaped


def gather_rows(values: Shaped[Array, "b n *c"], index: Int[Array, "b *m"]) -> Shaped[Array, "b *m_c"]:
    """Takes rows of each batch entry.

    Args:
      values: [B, N, ...] rows.
      index: i32[B, ...] row numbers in [0, N); out-of-range ones are clipped.

    Returns:
      [B, ..., ...]: for index [B, M, S] and values [B, N, C], [B, M, S, C].
    """
    return jax.vmap(lambda rows, i: rows.at[i].get(mode="clip"))(values, index)
