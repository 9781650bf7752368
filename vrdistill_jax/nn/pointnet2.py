"""PointNet++: set abstraction, feature propagation, and the four-level backbone of the VoteNet family.

All geometry (which points are centres, who their neighbours are) comes ready-made in a PointPyramid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.geometry.interpolation import interpolate
from vrdistill_jax.nn.mlp import PointMLP, linear, scale_size
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.structs import Interpolation, PointPyramid, Points, PointSet, PyramidLevel

CENTERS_PER_BLOCK = 128  # keeps the grouped activations of a block in the processor's cache (inference)


class SetAbstraction(nn.Module):
    """Max-pools an MLP over the neighbours of each centre.

    The MLP reads [(x_j - c_i) / radius, f_j]. The part of its first linear map that reads features is applied per point
    instead of per pair. (The coordinates could be split as well, W x_j / r - W c_i / r, but far from the origin that
    difference loses digits.)

    Attributes:
      input_size: F, feature channels of the source points (may be 0).
      sizes: channels of the MLP's layers.
      radius: metres; relative coordinates are divided by it.
      norm: makes the norm layers.

    Source: PointNet++ with VoteNet's options (normalised relative coordinates first, max pooling).
    """

    input_size: int
    sizes: Sequence[int]
    radius: float
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.mlp = PointMLP(3 + self.input_size, self.sizes, norm=self.norm, name="mlp")

    def __call__(
        self, xyz: Float[Array, "b n 3"], features: Float[Array, "b n f"], level: PyramidLevel, *, train: bool
    ) -> Float[Array, "b m c"]:
        """Pools source points into centres.

        Args:
          xyz: f32[B, N, 3] source points.
          features: f32[B, N, F] their features.
          level: centres and neighbour rows.
          train: batch statistics or running ones.

        Returns:
          f32[B, M, sizes[-1]].
        """
        if train:
            return self._pool_all(xyz, features, level)
        return jax.vmap(self._pool_blocked)(xyz, features, level.xyz, level.neighbor_index)

    def _pool_all(self, xyz, features, level):
        """All groups at once: batch norm needs the statistics of every group before it can go on.

        The last norm and ReLU are monotone in each channel, so they are applied after the pooling, to one value per
        centre instead of one per neighbour.
        """
        first, *middle, last = self.mlp.layers
        mask = level.mask[:, :, None]
        kernel = first.dense.kernel
        relative = (gather_rows(xyz, level.neighbor_index) - level.xyz[:, :, None]) / self.radius
        x = linear(relative, kernel[:3]) + gather_rows(linear(features, kernel[3:]), level.neighbor_index)
        x = first.finish(x, mask, train=True)
        for layer in middle:
            x = layer(x, mask, train=True)
        x = last.dense(x)
        pooled = pool_extremes(x, last.normalize.scale >= 0)
        return jax.nn.relu(last.normalize(pooled, mask, train=True, statistics_of=x))

    def _pool_blocked(self, xyz, features, centers, neighbor_index):
        """One cloud, block after block of centres, batch norm folded into the kernels."""
        (kernel, bias), *others = [layer.folded() for layer in self.mlp.layers]
        product = features @ kernel[3:] + bias

        def pool(block):
            centers, index = block
            relative = (xyz.at[index].get(mode="clip") - centers[:, None]) / self.radius
            x = relative @ kernel[:3] + product.at[index].get(mode="clip")
            x = jax.nn.relu(x).reshape(-1, x.shape[-1])
            for weight, shift in others:
                x = jax.nn.relu(x @ weight + shift)
            return jnp.max(x.reshape(*index.shape, -1), axis=1)

        return _map_blocks(pool, (centers, neighbor_index), CENTERS_PER_BLOCK)


@jax.custom_vjp
def pool_extremes(x: Float[Array, "b m s c"], rising: Bool[Array, " c"]) -> Float[Array, "b m c"]:
    """The largest (where `rising`) or smallest value of each channel over the neighbours.

    Args:
      x: f32[B, M, S, C].
      rising: bool[C].

    Returns:
      f32[B, M, C]. Its gradient is shared equally among equal extremes, as jnp.max does, in a form that costs a fifth of
      jnp.max's on a CPU.
    """
    sign = jnp.where(rising, 1.0, -1.0)
    return jnp.max(x * sign, axis=2) * sign


def _pool_forward(x, rising):
    pooled = pool_extremes(x, rising)
    return pooled, (x, pooled)


def _pool_backward(residuals, gradient):
    x, pooled = residuals
    # Written slot by slot: XLA's CPU back end turns the plain sum over the axis into something three times slower.
    ties = sum((x[:, :, slot] == pooled).astype(x.dtype) for slot in range(x.shape[2]))
    share = gradient / ties
    return jnp.where(x == pooled[:, :, None], share[:, :, None], 0.0), None


pool_extremes.defvjp(_pool_forward, _pool_backward)


def _map_blocks(function, arrays, block):
    """`function` over blocks of leading rows; a remainder that is no whole block is done by itself."""
    rows = arrays[0].shape[0]
    if rows <= block:
        return function(arrays)
    whole = rows // block * block
    blocks = [a[:whole].reshape(-1, block, *a.shape[1:]) for a in arrays]
    done = jax.lax.map(function, tuple(blocks))
    done = done.reshape(whole, *done.shape[2:])
    if whole == rows:
        return done
    return jnp.concatenate([done, function(tuple(a[whole:] for a in arrays))])


class FeaturePropagation(nn.Module):
    """Interpolates coarse features to finer points and mixes them with the features there.

    Attributes:
      coarse_size: channels of the coarse features.
      fine_size: channels of the fine (skip) features.
      sizes: channels of the MLP's layers.
      norm: makes the norm layers.
    """

    coarse_size: int
    fine_size: int
    sizes: Sequence[int]
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.mlp = PointMLP(self.coarse_size + self.fine_size, self.sizes, norm=self.norm, name="mlp")

    def __call__(
        self,
        coarse: Float[Array, "b k c"],
        fine: Float[Array, "b m f"],
        interpolation: Interpolation,
        mask,
        *,
        train: bool,
    ) -> Float[Array, "b m o"]:
        """Maps features of K coarse and M fine points to f32[B, M, sizes[-1]]; `mask` bool[B, M] of the fine points."""
        x = jnp.concatenate([interpolate(coarse, interpolation.index, interpolation.weight), fine], axis=-1)
        return self.mlp(x, mask, train=train)


class BackboneOutput(NamedTuple):
    """Seeds and what lies before them."""

    seeds: PointSet
    abstractions: tuple[Array, ...]  # f32[B, M_i, C_i] after each set abstraction
    propagations: tuple[Array, ...]  # after each feature propagation; the last is seeds.features


class PointNet2Backbone(nn.Module):
    """VoteNet's backbone: four set abstractions down, two feature propagations up, to the points of the second level.

    Attributes:
      input_size: F, feature channels of the cloud (0, or 1 with height, ...).
      radii: metres, one per level of the pyramid that it is given.
      width: multiplier of every hidden size.
      output_size: channels of the seeds at width 1.
      norm: makes the norm layers.

    Source: VoteNet (votenet/models/backbone_module.py).
    """

    input_size: int
    radii: Sequence[float]
    width: float = 1.0
    output_size: int = 256
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""

        def sizes(*channels):
            return tuple(scale_size(c, self.width) for c in channels)

        mlps = [sizes(64, 64, 128), *[sizes(128, 128, 256)] * 3]
        inputs = [self.input_size, *[mlp[-1] for mlp in mlps[:-1]]]
        self.abstractions = [
            SetAbstraction(i, mlp, radius, self.norm, name=f"sa{n + 1}")
            for n, (i, mlp, radius) in enumerate(zip(inputs, mlps, self.radii, strict=True))
        ]
        wide, out = sizes(256, self.output_size)
        self.propagations = [
            FeaturePropagation(wide, wide, (wide, wide), self.norm, name="fp1"),
            FeaturePropagation(wide, wide, (wide, out), self.norm, name="fp2"),
        ]

    def __call__(self, points: Points, pyramid: PointPyramid, *, train: bool) -> BackboneOutput:
        """Reads a cloud and its pyramid (four levels; interpolations from the fourth to the third to the second)."""
        xyz, x, down = points.xyz, points.features, []
        for abstraction, level in zip(self.abstractions, pyramid.levels, strict=True):
            x = abstraction(xyz, x, level, train=train)
            xyz = level.xyz
            down.append(x)
        up = []
        for propagation, interpolation, fine in zip(
            self.propagations, pyramid.interpolations, (2, 1), strict=True
        ):
            x = propagation(x, down[fine], interpolation, pyramid.levels[fine].mask, train=train)
            up.append(x)
        level = pyramid.levels[1]
        return BackboneOutput(PointSet(level.xyz, x, level.mask, level.source_index), tuple(down), tuple(up))
