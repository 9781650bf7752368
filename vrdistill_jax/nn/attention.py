"""Multi-head attention and transformer layers with the conventions of the PyTorch references."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax.nn.mlp import Dense, linear

LAYER_NORM_EPSILON = 1e-5  # PyTorch's; Flax's default is 1e-6
QUERIES_PER_BLOCK = 512  # bounds the memory of the attention weights: a block of them exists at a time
xavier_uniform = nn.initializers.xavier_uniform()


def layer_norm(name: str | None = None) -> nn.LayerNorm:
    """A layer norm as PyTorch's: epsilon 1e-5, variance by differences."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, name=name)


def attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Bool[Array, "b #q k"] | None = None,
    dropout_rate: float = 0.0,
    rng: Array | None = None,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention, softmax(q k / sqrt(d)) v.

    Args:
      query: f32[B, Q, H, D].
      key: f32[B, K, H, D].
      value: f32[B, K, H, D].
      mask: bool[B, Q, K] or bool[B, 1, K], True where a query may look at a key; None for everywhere. A query that may look
        at none sees the mean of all.
      dropout_rate: share of the weights that is set to 0 (the others grow to make up for it).
      rng: key for the dropout; None for none.

    Returns:
      f32[B, Q, H, D].
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if rng is not None and dropout_rate > 0:
        weights = jnp.where(draw_kept(rng, dropout_rate, weights.shape), weights / (1 - dropout_rate), 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def draw_kept(rng: Array, dropout_rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Which of many attention weights a dropout keeps; each with probability 1 - dropout_rate.

    Threefry, behind jax.random.bernoulli, takes nearly as long as all else that an encoder layer does on a CPU (suite
    attention of the verb benchmark). Here it draws one pair of numbers, and an integer hash mixes them with each weight's
    position: good enough to drop weights, not to sample from.

    Args:
      rng: key.
      dropout_rate: in [0, 1).
      shape: of the result; fewer than 2^32 entries.

    Returns:
      bool of that shape.

    Source of the hash's constants: C. Wellons, hash-prospector, "lowbias32".
    """
    first, second = jax.random.bits(rng, (2,), jnp.uint32)
    position = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _hash(_hash(position ^ first) + second) >= jnp.uint32(int(dropout_rate * 2**32))


def _hash(bits: Array) -> Array:
    """Mixes the bits of each uint32; one to one."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def attend_in_blocks(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    mask: Bool[Array, "b #q k"] | None = None,
    dropout_rate: float = 0.0,
    rng: Array | None = None,
    block: int = QUERIES_PER_BLOCK,
) -> Float[Array, "b q h d"]:
    """`attend`, a block of queries after the other; the backward pass computes a block's weights again.

    Arguments as in `attend`; `block` is the number of queries in one. A number of queries that is no multiple of it is done
    at once.
    """
    count = query.shape[1]
    if count <= block or count % block:
        return attend(query, key, value, mask, dropout_rate, rng)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*query.shape[:2], key.shape[1]))

    @jax.checkpoint
    def one(number):
        def part(rows):
            return jax.lax.dynamic_slice_in_dim(rows, number * block, block, axis=1)

        own_rng = None if rng is None else jax.random.fold_in(rng, number)
        own_mask = None if mask is None else part(mask)
        return attend(part(query), key, value, own_mask, dropout_rate, own_rng)

    blocks = jax.lax.map(one, jnp.arange(count // block))
    return jnp.moveaxis(blocks, 0, 1).reshape(query.shape)


class MultiHeadAttention(nn.Module):
    """Attention between projections of queries, keys and values; heads are consecutive channels.

    Attributes:
      size: C, channels in and out.
      num_heads: H; divides C.
      dropout_rate: of the attention weights, in training.

    Source: torch.nn.MultiheadAttention. The three input projections lie in one kernel [C, 3 C], query first, which is what
      its initialisation goes by.
    """

    size: int
    num_heads: int
    dropout_rate: float = 0.0

    def setup(self) -> None:
        """Makes the parameters and layers."""
        if self.size % self.num_heads:
            raise ValueError(
                f"{self.size} channels cannot be split over {self.num_heads} heads of equal size"
            )
        self.in_kernel = self.param("in_kernel", xavier_uniform, (self.size, 3 * self.size))
        self.in_bias = self.param("in_bias", nn.initializers.zeros, (3 * self.size,))
        self.out_kernel = self.param("out_kernel", xavier_uniform, (self.size, self.size))
        self.out_bias = self.param("out_bias", nn.initializers.zeros, (self.size,))

    def __call__(
        self,
        query: Float[Array, "b q c"],
        key: Float[Array, "b k c"],
        value: Float[Array, "b k c"],
        mask: Bool[Array, "b #q k"] | None = None,
        *,
        train: bool,
    ) -> Float[Array, "b q c"]:
        """Lets each query gather values; `mask` as in `attend`, `train` switches the dropout on."""
        kernels, biases = jnp.split(self.in_kernel, 3, axis=1), jnp.split(self.in_bias, 3)
        heads = (self.num_heads, self.size // self.num_heads)
        query, key, value = (
            (linear(x, kernel) + bias).reshape(*x.shape[:2], *heads)
            for x, kernel, bias in zip((query, key, value), kernels, biases, strict=True)
        )
        rng = self.make_rng("dropout") if train and self.dropout_rate > 0 else None
        gathered = attend_in_blocks(query, key, value, mask, self.dropout_rate, rng)
        joined = gathered.reshape(*gathered.shape[:2], self.size)
        return linear(joined, self.out_kernel) + self.out_bias


class FeedForward(nn.Module):
    """Dense, ReLU, dropout, Dense.

    Attributes:
      size: channels in and out.
      hidden_size: channels between.
      dropout_rate: of the hidden channels.
    """

    size: int
    hidden_size: int
    dropout_rate: float = 0.0

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.hidden = Dense(self.size, self.hidden_size, kernel_init=xavier_uniform)
        self.out = Dense(self.hidden_size, self.size, kernel_init=xavier_uniform)
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(self, x: Float[Array, "*n c"], *, train: bool) -> Float[Array, "*n c"]:
        """Maps each row."""
        return self.out(self.dropout(jax.nn.relu(self.hidden(x)), deterministic=not train))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward layer, each behind a layer norm and added to its input.

    Attributes:
      size: C.
      num_heads: of the attention.
      hidden_size: of the feed-forward layer.
      dropout_rate: of attention weights, feed-forward layer and both branches.
    """

    size: int
    num_heads: int
    hidden_size: int
    dropout_rate: float = 0.0

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.attention = MultiHeadAttention(self.size, self.num_heads, self.dropout_rate)
        self.feed_forward = FeedForward(self.size, self.hidden_size, self.dropout_rate)
        self.norm1, self.norm2 = layer_norm(), layer_norm()
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(
        self, x: Float[Array, "b n c"], mask: Bool[Array, "b #n n"] | None = None, *, train: bool
    ) -> Float[Array, "b n c"]:
        """Maps N tokens; `mask` as in `attend`."""
        normed = self.norm1(x)
        branch = self.attention(normed, normed, normed, mask, train=train)
        x = x + self.dropout(branch, deterministic=not train)
        branch = self.feed_forward(self.norm2(x), train=train)
        return x + self.dropout(branch, deterministic=not train)


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to a memory, and a feed-forward layer.

    Attributes:
      size: C.
      num_heads: of both attentions.
      hidden_size: of the feed-forward layer.
      dropout_rate: of attention weights, feed-forward layer and the three branches.
      norm_first: whether each branch reads a normed input (3DETR), or the sum with its input is normed (Group-Free).
      position_in_value: whether positions are added to the values too (Group-Free) or to queries and keys only (3DETR).
    """

    size: int
    num_heads: int
    hidden_size: int
    dropout_rate: float = 0.0
    norm_first: bool = True
    position_in_value: bool = False

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.self_attention = MultiHeadAttention(self.size, self.num_heads, self.dropout_rate)
        self.cross_attention = MultiHeadAttention(self.size, self.num_heads, self.dropout_rate)
        self.feed_forward = FeedForward(self.size, self.hidden_size, self.dropout_rate)
        self.norm1, self.norm2, self.norm3 = layer_norm(), layer_norm(), layer_norm()
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "b q c"],
        memory: Float[Array, "b k c"],
        position: Float[Array, "b q c"],
        memory_position: Float[Array, "b k c"],
        mask: Bool[Array, "b #q q"] | None = None,
        memory_mask: Bool[Array, "b #q k"] | None = None,
        *,
        train: bool,
    ) -> Float[Array, "b q c"]:
        """Maps Q queries.

        Args:
          x: f32[B, Q, C] content of the queries.
          memory: f32[B, K, C] content that they look at.
          position: f32[B, Q, C] positional code of the queries.
          memory_position: f32[B, K, C] positional code of the memory.
          mask: which queries see which, as in `attend`.
          memory_mask: which queries see which rows of the memory.
          train: switches dropout on.

        Returns:
          f32[B, Q, C].
        """
        keys = memory + memory_position

        def among_queries(x):
            placed = x + position
            return self.self_attention(
                placed, placed, placed if self.position_in_value else x, mask, train=train
            )

        def to_memory(x):
            values = keys if self.position_in_value else memory
            return self.cross_attention(x + position, keys, values, memory_mask, train=train)

        def row_by_row(x):
            return self.feed_forward(x, train=train)

        branches = (
            (among_queries, self.norm1),
            (to_memory, self.norm2),
            (row_by_row, self.norm3),
        )
        for branch, norm in branches:
            if self.norm_first:
                x = x + self.dropout(branch(norm(x)), deterministic=not train)
            else:
                x = norm(x + self.dropout(branch(x), deterministic=not train))
        return x
