"""Sparse convolutions, pooling, norms and pruning over the voxels of a VoxelPyramid.

Features are f32[B, V, C], row by row those of a level; which rows a kernel reads comes ready-made in KernelMaps. Rows of
padding are never read, and stay zero in what the functions here return.

Semantics are MinkowskiEngine's (order of the taps, strided and generative coordinates, see structs.KernelMap), so that its
kernels [taps, in, out] can be used as they are.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.nn.sparse_products import gather_product, kernel_gradient, scatter_product
from vrdistill_jax.structs import KernelMap, VoxelPyramid

# He's initialiser by the fan-out, PyTorch's kaiming_normal_(mode="fan_out") of a kernel [taps, in, out].
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal", in_axis=1, out_axis=2)
# MinkowskiEngine's defaults, U(-1, 1) / sqrt(fan): of what a convolution reads, of what a transposed one writes.
minkowski_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=2)
minkowski_transposed = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform", in_axis=1, out_axis=2)


def require_map(kernel_map: KernelMap | None) -> KernelMap:
    """The map, or a ValueError where the level was built without it."""
    if kernel_map is None:
        raise ValueError("this level of the pyramid has no such map; ask for it in the VoxelPyramidConfig")
    return kernel_map


@jax.custom_vjp
def convolve(
    x: Float[Array, "b w c"], kernel: Float[Array, "k c d"], kernel_map: KernelMap | None
) -> Float[Array, "b v d"]:
    """Sums a kernel over the voxels under its taps: y[v] = sum over k of x[index[v, k]] @ kernel[k].

    Args:
      x: f32[B, W, C] of the level that the map reads.
      kernel: f32[K, C, D].
      kernel_map: `same3`, `down2` or `down3` of the level of the result, or `center_tap` of one of them.

    Returns:
      f32[B, V, D]; zero for voxels without any neighbour, and in pads.

    Raises:
      ValueError: if the map belongs to other levels or another kernel.
    """
    kernel_map = require_map(kernel_map)
    _check(kernel, kernel_map, x.shape[1], _fine_rows(kernel_map), "convolve")
    return gather_product(x, kernel, kernel_map)


def _convolve_forward(x, kernel, kernel_map):
    return convolve(x, kernel, kernel_map), (x, kernel, kernel_map)


def _convolve_backward(residuals, gradient):
    x, kernel, kernel_map = residuals
    dx = scatter_product(gradient, jnp.swapaxes(kernel, 1, 2), kernel_map)
    return dx, kernel_gradient(x, gradient, kernel_map), None


convolve.defvjp(_convolve_forward, _convolve_backward)


@jax.custom_vjp
def convolve_transposed(
    x: Float[Array, "b v c"], kernel: Float[Array, "k c d"], kernel_map: KernelMap | None
) -> Float[Array, "b w d"]:
    """Spreads coarse features to a finer level: y[index[v, k]] += x[v] @ kernel[k].

    Args:
      x: f32[B, V, C] of the coarser level.
      kernel: f32[K, C, D].
      kernel_map: `up` of a generated level, or `down2` or `down3` of the coarser level to return to the encoder's level
        before it.

    Returns:
      f32[B, W, D] of the finer level.

    Raises:
      ValueError: if the map belongs to other levels or another kernel.
    """
    kernel_map = require_map(kernel_map)
    _check(kernel, kernel_map, x.shape[1], kernel_map.index.shape[1], "convolve_transposed")
    if kernel_map.reverse is None:
        raise ValueError("convolve_transposed needs a map of stride 2 (up, down2, down3)")
    return scatter_product(x, kernel, kernel_map)


def _transposed_forward(x, kernel, kernel_map):
    return convolve_transposed(x, kernel, kernel_map), (x, kernel, kernel_map)


def _transposed_backward(residuals, gradient):
    x, kernel, kernel_map = residuals
    dx = gather_product(gradient, jnp.swapaxes(kernel, 1, 2), kernel_map)
    return dx, jnp.swapaxes(kernel_gradient(gradient, x, kernel_map), 1, 2), None


convolve_transposed.defvjp(_transposed_forward, _transposed_backward)


def center_tap(kernel_map: KernelMap | None) -> KernelMap:
    """The map of a 1^3 kernel of stride 2: only the voxel exactly at the coarse one's corner.

    Args:
      kernel_map: `down2` or `down3`.

    Returns:
      A map with one tap; voxels without that child get no input at all.

    Source: MinkowskiEngine, kernel size 1 and stride 2 (the downsampling of residual blocks).
    """
    kernel_map = require_map(kernel_map)
    num_taps = kernel_map.index.shape[-1]
    tap = {8: 0, 27: 13}[num_taps]
    pair = kernel_map.reverse[..., :1]  # the slot of the parent itself
    reverse = jnp.where((pair >= 0) & (pair % num_taps == tap), pair // num_taps, -1)
    return KernelMap(kernel_map.index[..., tap : tap + 1], reverse)


@jax.custom_vjp
def max_pool(x: Float[Array, "b w c"], kernel_map: KernelMap | None) -> Float[Array, "b v c"]:
    """The largest value of each channel over the voxels that exist under the taps.

    Args:
      x: f32[B, W, C] of the level that the map reads.
      kernel_map: `down2`, `down3` or `same3`.

    Returns:
      f32[B, V, C]; zero in pads. Of equal maxima the first tap gets the gradient.
    """
    return _pool(x, require_map(kernel_map).index)[0]


def _pool_forward(x, kernel_map):
    largest, winner = _pool(x, kernel_map.index)
    return largest, (winner, kernel_map)


def _pool(x, index):
    """Maxima, and the taps they came from."""
    largest = jnp.full((*index.shape[:2], x.shape[2]), -jnp.inf, x.dtype)
    winner = jnp.zeros(largest.shape, jnp.int8)
    for tap in range(index.shape[2]):
        value = _take(x, index[..., tap], -jnp.inf)
        winner = jnp.where(value > largest, jnp.int8(tap), winner)
        largest = jnp.maximum(largest, value)
    return jnp.where(jnp.any(index >= 0, axis=2)[..., None], largest, 0.0), winner


def _pool_backward(residuals, gradient):
    winner, kernel_map = residuals
    num_taps = kernel_map.index.shape[2]
    pairs = kernel_map.reverse
    if pairs is None:
        flipped = kernel_map.index[..., ::-1]
        pairs = jnp.where(flipped >= 0, flipped * num_taps + jnp.arange(num_taps), -1)
    dx = jnp.zeros((*pairs.shape[:2], gradient.shape[2]), gradient.dtype)
    for slot in range(pairs.shape[2]):
        pair = pairs[..., slot]
        row = jnp.where(pair >= 0, pair // num_taps, -1)
        won = gather_rows(winner, row) == (pair % num_taps)[..., None]
        dx = dx + jnp.where(won, _take(gradient, row, 0.0), 0.0)
    return dx, None


max_pool.defvjp(_pool_forward, _pool_backward)


@jax.custom_vjp
def take_skip(x: Float[Array, "b w c"], skip: KernelMap | None) -> Float[Array, "b v c"]:
    """Carries the encoder's features to the generated level of the same stride, zero where it has no voxel.

    `generated + take_skip(encoder, skip)` is the sum over the union of both sets, since the generated one holds the other.

    Args:
      x: f32[B, W, C] of the encoder's level.
      skip: `skip` of the generated level.

    Returns:
      f32[B, V, C].
    """
    return _take(x, require_map(skip).index[..., 0], 0.0)


take_skip.defvjp(
    lambda x, skip: (take_skip(x, skip), skip),
    lambda skip, gradient: (_take(gradient, skip.reverse[..., 0], 0.0), None),
)


def voxel_features(
    features: Float[Array, "b n f"], pyramid: VoxelPyramid, reduction: str = "first"
) -> Float[Array, "b v f"]:
    """What the first level of a network reads.

    Args:
      features: f32[B, N, F] of the points.
      pyramid: of the same clouds.
      reduction: "first" for the point with the lowest row in the voxel, "mean" over its points.

    Returns:
      f32[B, V, F], zero in pads.

    Raises:
      ValueError: for another reduction.
    """
    if reduction == "first":
        return _take(features, pyramid.point_index, 0.0)
    if reduction != "mean":
        raise ValueError(f'reduction is {reduction!r}; "first" and "mean" exist')
    capacity = pyramid.point_index.shape[1]

    def average(features, voxel):
        voxel = jnp.where(voxel >= 0, voxel, capacity)
        total = jnp.zeros((capacity, features.shape[1]), features.dtype).at[voxel].add(features, mode="drop")
        count = jnp.zeros(capacity, features.dtype).at[voxel].add(1.0, mode="drop")
        return total / jnp.maximum(count, 1.0)[:, None]

    # Masked points may hold anything, also NaN, and are dropped above before they are added.
    return jax.vmap(average)(features, pyramid.voxel_index)


def point_features(x: Float[Array, "b v c"], pyramid: VoxelPyramid) -> Float[Array, "b n c"]:
    """The features of each point's voxel, for segmentation: f32[B, N, C], zero for masked points."""
    return _take(x, pyramid.voxel_index, 0.0)


def interpolate_corners(
    x: Float[Array, "b v c"], index: Int[Array, "b m 8"], weight: Float[Array, "b m 8"]
) -> Float[Array, "b m c"]:
    """Trilinear interpolation with the corners of `geometry.voxels.find_corners`; absent corners count as zero."""
    return sum(_take(x, index[..., k], 0.0) * weight[..., k, None] for k in range(8))


def interpolate_to_children(
    x: Float[Array, "b v c"], up: KernelMap | None, same3: KernelMap | None
) -> Float[Array, "b w c"]:
    """Trilinear interpolation of a level at the voxels that a 2^3 kernel generated from it.

    A child at its parent's corner takes the parent's value; one half way between two, four or eight voxels of the
    coarser level takes their mean, absent ones counting as zero.

    Args:
      x: f32[B, V, C] of the source level, zero where voxels are pruned.
      up: the map of the generated level (8 taps).
      same3: the map of the source level.

    Returns:
      f32[B, W, C].
    """
    up, same3 = require_map(up), require_map(same3)
    pair = up.reverse[..., 0]
    parent, octant = jnp.where(pair >= 0, pair // 8, -1), pair % 8
    around = gather_rows(same3.index[..., [13, 14, 16, 17, 22, 23, 25, 26]], parent)  # parent + {0, 1}^3
    share = jnp.exp2(-jax.lax.population_count(octant).astype(x.dtype))
    total = jnp.zeros((*pair.shape, x.shape[2]), x.dtype)
    for corner in range(8):  # only those that differ from the parent where the child does
        reached = (pair >= 0) & (corner & ~octant == 0)
        total += _take(x, jnp.where(reached, around[..., corner], -1), 0.0)
    return total * share[..., None]


def keep_highest(score: Float[Array, "b v"], mask: Bool[Array, "b v"], count: int) -> Bool[Array, "b v"]:
    """The `count` valid rows with the highest scores of each scene, the lower row first among equals: bool[B, V]."""
    if count >= mask.shape[1]:
        return mask
    _, kept = jax.lax.top_k(jnp.where(mask, score, -jnp.inf), count)
    chosen = jax.vmap(lambda rows: jnp.zeros(mask.shape[1], bool).at[rows].set(True))(kept)
    return chosen & mask


class SparseConv(nn.Module):
    """A convolution without bias; which one it is (stride 1 or 2) is up to the map that it is called with.

    Attributes:
      input_size: channels in.
      size: channels out.
      num_taps: 27, 8 or 1.
      kernel_init: initialiser of the kernel [num_taps, input_size, size].
    """

    input_size: int
    size: int
    num_taps: int = 27
    kernel_init: Any = minkowski_default

    def setup(self) -> None:
        """Makes the parameters."""
        self.kernel = self.param("kernel", self.kernel_init, (self.num_taps, self.input_size, self.size))

    def __call__(self, x: Float[Array, "b w i"], kernel_map: KernelMap | None) -> Float[Array, "b v o"]:
        """See `convolve`."""
        return convolve(x, self.kernel, kernel_map)


class SparseConvTransposed(SparseConv):
    """A transposed convolution of stride 2 without bias, onto a generated or an existing finer level."""

    kernel_init: Any = minkowski_transposed

    def __call__(self, x: Float[Array, "b v i"], kernel_map: KernelMap | None) -> Float[Array, "b w o"]:
        """See `convolve_transposed`."""
        return convolve_transposed(x, self.kernel, kernel_map)


class MaskedInstanceNorm(nn.Module):
    """Instance norm over the valid voxels of each scene; no running statistics.

    Attributes:
      size: C, number of channels.
      epsilon: added to the (biased) variance.

    Source: MinkowskiEngine `MinkowskiInstanceNorm` (FCAF3D's stem).
    """

    size: int
    epsilon: float = 1e-8

    def setup(self) -> None:
        """Makes the parameters."""
        self.scale = self.param("scale", nn.initializers.ones, (self.size,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.size,))

    def __call__(
        self, x: Float[Array, "b v c"], mask: Bool[Array, "b v"], *, train: bool
    ) -> Float[Array, "b v c"]:
        """Normalises each channel of each scene; `train` is there for the sake of batch norm and changes nothing."""
        del train
        valid = mask[..., None]
        count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True, dtype=x.dtype), 1)
        x = jnp.where(valid, x, 0.0)
        centered = x - jnp.sum(x, axis=1, keepdims=True) / count
        var = jnp.sum(jnp.where(valid, jnp.square(centered), 0.0), axis=1, keepdims=True) / count
        return centered * jax.lax.rsqrt(var + self.epsilon) * self.scale + self.bias


def _take(x, index, missing: float):
    """x[b, index[b, m]], `missing` where the index is -1."""
    return jnp.where((index >= 0)[..., None], gather_rows(x, index), missing)


def _fine_rows(kernel_map: KernelMap) -> int:
    rows = kernel_map.index if kernel_map.reverse is None else kernel_map.reverse
    return rows.shape[1]


def _check(kernel, kernel_map: KernelMap, rows: int, expected: int, name: str) -> None:
    if kernel.shape[0] != kernel_map.index.shape[2] or rows != expected:
        raise ValueError(
            f"{name} got {rows} rows and a kernel of {kernel.shape[0]} taps, but the map is of {expected} rows and"
            f" {kernel_map.index.shape[2]} taps; is it the map of this level?"
        )
