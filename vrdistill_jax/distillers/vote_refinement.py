"""The refinement module of VRDistill: attention among near votes that moves them and changes their features.

Source: "VRDistill: Vote Refinement Distillation for Efficient Indoor 3D Object Detection" (2024), section 3.3. The text leaves
open how coordinates are updated, what the cross-attention reads and where norms are; `distillers.vrdistill` lists the readings.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax.losses.box import squared_distances
from vrdistill_jax.nn.mlp import Dense
from vrdistill_jax.structs import PointSet

HIDDEN = -1e9  # attention bias of a vote that is not among the K nearest: its weight becomes exactly 0


class VoteRefinement(nn.Module):
    """L layers of masked self-attention, cross-attention to the initial votes and a feed-forward net, with residuals.

    Every residual branch ends in a map that starts at zero: before training, refined votes are the teacher's, bit for bit.

    Attributes:
      size: C, channels of the votes.
      layers, heads, neighbors, bias_sign, ffn_ratio, cross_query, stop_bias_gradient: entries of
        `vrdistill.default_config`.

    Source: VRDistill, equations 1 and 2 and figure 3.
    Differs: normalisation comes before each branch, not after it (pre-LN), which the zero start needs.
    """

    size: int
    layers: int = 4
    heads: int = 4
    neighbors: int = 5
    bias_sign: int = 1
    ffn_ratio: int = 2
    cross_query: str = "refined"
    stop_bias_gradient: bool = True

    @nn.compact
    def __call__(self, votes: PointSet) -> PointSet:
        """Moves votes and changes their features; masks and seeds stay."""
        bias = partial(
            attention_bias,
            neighbors=self.neighbors,
            sign=self.bias_sign,
            stop_gradient=self.stop_bias_gradient,
        )
        norm = partial(nn.LayerNorm, epsilon=1e-5)
        attention = partial(MultiHeadAttention, size=self.size, heads=self.heads)
        branch_end = partial(Dense, use_bias=False, kernel_init=nn.initializers.zeros)
        hidden = self.ffn_ratio * self.size
        xyz, features = votes.xyz, votes.features
        for n in range(self.layers):
            x = norm(name=f"self_norm{n}")(features)
            features = features + attention(name=f"self{n}")(x, x, bias(xyz, xyz, votes.mask))

            x = norm(name=f"cross_norm{n}")(features)
            start = norm(name=f"start_norm{n}")(votes.features)
            cross = attention(name=f"cross{n}")
            if self.cross_query == "refined":
                features = features + cross(x, start, bias(xyz, votes.xyz, votes.mask))
            else:
                features = features + cross(start, x, bias(votes.xyz, xyz, votes.mask))

            x = norm(name=f"ffn_norm{n}")(features)
            x = jax.nn.relu(Dense(self.size, hidden, name=f"ffn_in{n}")(x))
            features = features + branch_end(hidden, self.size, name=f"ffn_out{n}")(x)

            x = jax.nn.relu(Dense(self.size, self.size, name=f"offset_in{n}")(features))
            xyz = xyz + branch_end(self.size, 3, name=f"offset_out{n}")(x)
        return votes._replace(xyz=xyz, features=features)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with an additive bias; its output projection starts at zero.

    Attributes:
      size: C, channels in and out.
      heads: H.
    """

    size: int
    heads: int

    @nn.compact
    def __call__(
        self, query: Float[Array, "b m c"], memory: Float[Array, "b n c"], bias: Float[Array, "b m n"]
    ) -> Float[Array, "b m c"]:
        """Lets each query gather from the memory (keys and values).

        Raises:
          ValueError: if the channels do not divide into heads.
        """
        if self.size % self.heads:
            raise ValueError(
                f"{self.size} channels do not divide into {self.heads} heads; choose vrdistill.heads accordingly"
            )
        split = partial(_split_heads, heads=self.heads)
        queries = split(Dense(self.size, self.size, name="query")(query))
        keys = split(Dense(self.size, self.size, name="key")(memory))
        values = split(Dense(self.size, self.size, name="value")(memory))
        logits = jnp.einsum("bmhc,bnhc->bhmn", queries, keys) * (self.size / self.heads) ** -0.5
        weights = jax.nn.softmax(logits + bias[:, None], axis=-1)
        gathered = jnp.einsum("bhmn,bnhc->bmhc", weights, values).reshape(query.shape)
        return Dense(self.size, self.size, False, nn.initializers.zeros, name="out")(gathered)


def _split_heads(x: Float[Array, "b m c"], heads: int) -> Float[Array, "b m h d"]:
    return x.reshape(*x.shape[:-1], heads, -1)


def attention_bias(
    query_xyz: Float[Array, "b m 3"],
    key_xyz: Float[Array, "b n 3"],
    key_mask: Bool[Array, "b n"],
    neighbors: int,
    sign: int = 1,
    stop_gradient: bool = True,
) -> Float[Array, "b m n"]:
    """What is added to the attention logits: signed distances to the K nearest keys, a huge negative number elsewhere.

    Args:
      query_xyz: f32[B, M, 3] metres.
      key_xyz: f32[B, N, 3] metres.
      key_mask: bool[B, N]; pads are never among the nearest.
      neighbors: K; more than N means all. Of equally near keys the first ones are taken.
      sign: +1, 0 or -1, factor of the distance.
      stop_gradient: whether coordinates get no gradient.

    Returns:
      f32[B, M, N].

    Source: VRDistill, equation 1.
    """
    if stop_gradient:
        query_xyz, key_xyz = jax.lax.stop_gradient((query_xyz, key_xyz))
    squared = squared_distances(query_xyz, key_xyz)
    order = jnp.where(key_mask[:, None], -jax.lax.stop_gradient(squared), -jnp.inf)
    rows, index = jax.lax.top_k(order, min(neighbors, key_xyz.shape[1]))
    hit = jnp.where(
        jnp.isfinite(rows), index, key_xyz.shape[1]
    )  # fewer than K valid keys: out of range, dropped
    near = jnp.zeros(squared.shape, bool)
    near = jax.vmap(jax.vmap(lambda row, at: row.at[at].set(True, mode="drop")))(near, hit)
    return jnp.where(near, sign * safe_sqrt(squared), HIDDEN)


def safe_sqrt(squared: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Square root with gradient 0, not infinity, at 0."""
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
