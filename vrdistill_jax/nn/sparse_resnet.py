"""The sparse residual backbone of TR3D and FCAF3D, and their necks.

All geometry comes ready-made in a VoxelPyramid, built with `tr3d_pyramid_config` or `fcaf3d_pyramid_config`.

Source: Rukhovich et al., "TR3D: Towards Real-Time Indoor 3D Object Detection" (2023) and "FCAF3D: Fully Convolutional
Anchor-Free 3D Object Detection" (2022), their repositories and mmdetection3d's projects.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.nn.sparse_conv import (
    MaskedInstanceNorm,
    SparseConv,
    SparseConvTransposed,
    center_tap,
    interpolate_to_children,
    kaiming_fan_out,
    keep_highest,
    max_pool,
    require_map,
    take_skip,
)
from vrdistill_jax.structs import (
    GeneratedLevelConfig,
    KernelMap,
    VoxelLevel,
    VoxelLevelConfig,
    VoxelPyramid,
    VoxelPyramidConfig,
)

NUM_STAGES = 4
FIRST_STAGE = 3  # the row of the pyramid's levels that the first stage writes: stride 8
NUM_ENCODER_LEVELS = FIRST_STAGE + NUM_STAGES
TR3D_LEVELS = (8, 7)  # rows of the pyramid's levels that TR3D's neck writes: strides 16, 32
FCAF3D_LEVELS = (9, 8, 7, 6)  # FCAF3D's: strides 8, 16, 32, 64


class VoxelFeatures(NamedTuple):
    """One level of a neck's output."""

    coords: Array  # i32[B, V, 3] lower corners in units of the input voxels
    features: Array  # f32[B, V, C] zero in pads
    mask: Array  # bool[B, V] False in pads and where pruned


class PrunedFeatures(NamedTuple):
    """One level of a neck's output, and how it was pruned."""

    coords: Array  # i32[B, V, 3] lower corners in units of the input voxels
    features: Array  # f32[B, V, C] zero in pads
    mask: Array  # bool[B, V] False in pads and where pruned
    candidates: (
        Array | None
    )  # bool[B, V] what there was before pruning; None for the coarsest level, which is never pruned
    score: Array | None  # f32[B, V] what decided who is kept


def tr3d_pyramid_config(
    voxel_size: float = 0.01, capacities: tuple[tuple[int, ...], ...] = (), tiles: bool = False
) -> VoxelPyramidConfig:
    """The pyramid that SparseResNet and TR3DNeck read.

    Args:
      voxel_size: metres.
      capacities: rungs of nine numbers, see `geometry.host.voxel_pyramid.make_capacities`.
      tiles: whether the first stage's maps also list their pairs, which is faster on a CPU: its voxels have few neighbours.
    """
    made = (GeneratedLevelConfig(6, 3), GeneratedLevelConfig(7, 3))
    levels = list(_encoder_levels())
    levels[FIRST_STAGE] = levels[FIRST_STAGE]._replace(tiles=tiles)
    return VoxelPyramidConfig(voxel_size, tuple(levels), made, capacities)


def fcaf3d_pyramid_config(
    voxel_size: float = 0.01, capacities: tuple[tuple[int, ...], ...] = ()
) -> VoxelPyramidConfig:
    """The pyramid that SparseResNet and FCAF3DNeck read; ten levels."""
    made = tuple(GeneratedLevelConfig(source, 2) for source in (6, 7, 8))
    return VoxelPyramidConfig(voxel_size, _encoder_levels(), made, capacities)


def _encoder_levels() -> tuple[VoxelLevelConfig, ...]:
    stem = (VoxelLevelConfig(), VoxelLevelConfig(down3=True), VoxelLevelConfig(down2=True))
    return (*stem, *[VoxelLevelConfig(same3=True, down3=True)] * NUM_STAGES)


class ResidualBlock(nn.Module):
    """Two 3^3 convolutions with norms around a shortcut.

    Attributes:
      input_size: channels in.
      size: channels out.
      strided: whether the first convolution comes from the level before; the shortcut is then a 1^3 convolution, which
        reads the child at a voxel's corner and nothing where there is none.
      norm: makes the norm layers.
    """

    input_size: int
    size: int
    strided: bool = False
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.conv1 = SparseConv(self.input_size, self.size, kernel_init=kaiming_fan_out)
        self.norm1 = self.norm(size=self.size)
        self.conv2 = SparseConv(self.size, self.size, kernel_init=kaiming_fan_out)
        self.norm2 = self.norm(size=self.size)
        if self.strided:
            self.downsample_conv = SparseConv(self.input_size, self.size, 1, kaiming_fan_out)
            self.downsample_norm = self.norm(size=self.size)

    def __call__(self, x: Float[Array, "b w i"], level: VoxelLevel, *, train: bool) -> Float[Array, "b v o"]:
        """Maps features of `level` (of the level before it, if strided) to f32[B, V, size]."""
        mask = level.mask
        kernel_map = level.down3 if self.strided else level.same3
        y = _mask_rows(jax.nn.relu(self.norm1(self.conv1(x, kernel_map), mask, train=train)), mask)
        y = self.norm2(self.conv2(y, level.same3), mask, train=train)
        if self.strided:
            x = self.downsample_norm(self.downsample_conv(x, center_tap(level.down3)), mask, train=train)
        return _mask_rows(jax.nn.relu(y + x), mask)


class BackboneOutput(NamedTuple):
    """Features before and after the stages."""

    stem: Array  # f32[B, V, stem_size] of the pyramid's level 2, stride 4
    stages: tuple[Array, ...]  # f32[B, V_i, C_i] of its levels 3 to 6, strides 8, 16, 32, 64


class SparseResNet(nn.Module):
    """The backbone of TR3D and FCAF3D (ResNet-34's numbers of blocks).

    Attributes:
      input_size: feature channels of the voxels.
      stem_size: channels of the first convolution.
      sizes: channels of the four stages; see `stage_sizes`.
      num_blocks: residual blocks of each stage.
      stem_norm: "batch" (TR3D) or "instance" (FCAF3D).
      norm: makes the batch norm layers.
    """

    input_size: int = 3
    stem_size: int = 64
    sizes: Sequence[int] = (64, 128, 128, 128)
    num_blocks: Sequence[int] = (3, 4, 6, 3)
    stem_norm: str = "batch"
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        if self.stem_norm not in ("batch", "instance"):
            raise ValueError(f'stem_norm is {self.stem_norm!r}; "batch" and "instance" exist')
        self.conv1 = SparseConv(self.input_size, self.stem_size, kernel_init=kaiming_fan_out)
        self.norm1 = (self.norm if self.stem_norm == "batch" else MaskedInstanceNorm)(size=self.stem_size)
        stages, inputs = [], self.stem_size
        for stage, (size, count) in enumerate(zip(self.sizes, self.num_blocks, strict=True), 1):
            blocks = []
            for number in range(count):
                name = f"layer{stage}_{number}"
                blocks.append(ResidualBlock(inputs, size, number == 0, self.norm, name=name))
                inputs = size
            stages.append(blocks)
        self.stages = stages

    def __call__(
        self, features: Float[Array, "b v f"], pyramid: VoxelPyramid, *, train: bool
    ) -> BackboneOutput:
        """Reads the features of the pyramid's first level (see `sparse_conv.voxel_features`)."""
        _, first, second, *levels = pyramid.levels[:NUM_ENCODER_LEVELS]
        x = self.norm1(self.conv1(features, first.down3), first.mask, train=train)
        x = stem = max_pool(_mask_rows(jax.nn.relu(x), first.mask), second.down2)
        outputs = []
        for blocks, level in zip(self.stages, levels, strict=True):
            for block in blocks:
                x = block(x, level, train=train)
            outputs.append(x)
        return BackboneOutput(stem, tuple(outputs))


def stage_sizes(max_size: int | None = None, stem_size: int = 64) -> tuple[int, ...]:
    """Channels of the stages: doubling from the stem's, up to `max_size` (TR3D: 128; FCAF3D: None)."""
    sizes = tuple(stem_size * 2**stage for stage in range(NUM_STAGES))
    return sizes if max_size is None else tuple(min(size, max_size) for size in sizes)


class ConvBlock(nn.Module):
    """A convolution, batch norm and an activation.

    Attributes:
      input_size: channels in.
      size: channels out.
      transposed_taps: 0 for a submanifold 3^3 convolution; 27 or 8 for the generative one of that many taps.
      kernel_init: initialiser of the kernel, None for the layer's own.
      activation: after the norm.
      norm: makes the norm layer.
    """

    input_size: int
    size: int
    transposed_taps: int = 0
    kernel_init: Any = None
    activation: Callable = jax.nn.relu
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        layer: type[SparseConv] = SparseConvTransposed if self.transposed_taps else SparseConv
        init = {} if self.kernel_init is None else {"kernel_init": self.kernel_init}
        self.conv = layer(self.input_size, self.size, self.transposed_taps or 27, **init)
        self.normalize = self.norm(size=self.size, name="norm")

    def __call__(
        self, x: Float[Array, "b w i"], kernel_map: KernelMap | None, mask: Bool[Array, "b v"], *, train: bool
    ) -> Float[Array, "b v o"]:
        """Maps features through `kernel_map` to f32[B, V, size], zero where masked."""
        y = self.activation(self.normalize(self.conv(x, kernel_map), mask, train=train))
        return _mask_rows(y, mask)


class TR3DNeck(nn.Module):
    """TR3D's neck: twice a generative 3^3 upsampling, the encoder's features added; nothing is pruned.

    Attributes:
      input_sizes: channels of the backbone's stages 2, 3 and 4 (strides 16, 32, 64).
      size: channels of both outputs.
      norm: makes the norm layers.
    """

    input_sizes: Sequence[int] = (128, 128, 128)
    size: int = 128
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        fine, middle, coarse = self.input_sizes

        def block(inputs, size):
            return ConvBlock(inputs, size, kernel_init=kaiming_fan_out, norm=self.norm)

        # The reference initialises its plain convolutions only, so that these two keep MinkowskiEngine's default.
        self.up_block_2 = ConvBlock(coarse, middle, transposed_taps=27, norm=self.norm)
        self.up_block_1 = ConvBlock(middle, fine, transposed_taps=27, norm=self.norm)
        self.lateral_block_1, self.out_block_1 = block(middle, middle), block(middle, self.size)
        self.lateral_block_0, self.out_block_0 = block(fine, fine), block(fine, self.size)

    def __call__(
        self, stages: Sequence[Array], pyramid: VoxelPyramid, *, train: bool
    ) -> tuple[VoxelFeatures, VoxelFeatures]:
        """Merges the stages.

        Args:
          stages: of SparseResNet; the first one is not used.
          pyramid: of the same clouds.
          train: batch statistics or running ones.

        Returns:
          Levels of strides 16 and 32 (rows TR3D_LEVELS of the pyramid), f32[B, V, size] each.
        """
        _, fine, middle, x = stages
        levels = pyramid.levels[TR3D_LEVELS[0]], pyramid.levels[TR3D_LEVELS[1]]
        x = self.up_block_2(x, levels[1].up, levels[1].mask, train=train)
        x = x + take_skip(middle, levels[1].skip)
        x = self.lateral_block_1(x, levels[1].same3, levels[1].mask, train=train)
        coarse_out = self.out_block_1(x, levels[1].same3, levels[1].mask, train=train)
        x = self.up_block_1(x, levels[0].up, levels[0].mask, train=train)
        x = x + take_skip(fine, levels[0].skip)
        x = self.lateral_block_0(x, levels[0].same3, levels[0].mask, train=train)
        fine_out = self.out_block_0(x, levels[0].same3, levels[0].mask, train=train)
        return (
            VoxelFeatures(levels[0].coords, fine_out, levels[0].mask),
            VoxelFeatures(levels[1].coords, coarse_out, levels[1].mask),
        )


class FCAF3DNeck(nn.Module):
    """FCAF3D's neck: three generative 2^3 upsamplings, each followed by pruning with the scores of the level above.

    The pyramid holds what would be there if nothing were ever pruned. Pruning is a mask on it: masked voxels have zero
    features and enter no statistics, so that all others come out as if they did not exist.

    Attributes:
      input_sizes: channels of the backbone's four stages.
      size: channels of the outputs.
      prune_threshold: voxels that are kept per scene and level.
      norm: makes the norm layers.
    """

    input_sizes: Sequence[int] = (64, 128, 256, 512)
    size: int = 128
    prune_threshold: int = 100_000
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        block = partial(ConvBlock, activation=jax.nn.elu, norm=self.norm)
        ups = [(i, self.input_sizes[i], self.input_sizes[i - 1]) for i in range(1, NUM_STAGES)]
        self.up_blocks = [
            block(coarse, fine, transposed_taps=8, name=f"up_block_{i}_generate") for i, coarse, fine in ups
        ]
        self.refine_blocks = [block(fine, fine, name=f"up_block_{i}_refine") for i, _, fine in ups]
        self.out_blocks = [
            block(size, self.size, name=f"out_block_{i}") for i, size in enumerate(self.input_sizes)
        ]

    def __call__(
        self,
        stages: Sequence[Array],
        pyramid: VoxelPyramid,
        score: Callable[[Float[Array, "b v c"]], Float[Array, "b v"]],
        *,
        train: bool,
        kept: Sequence[Bool[Array, "b v"]] | None = None,
    ) -> tuple[PrunedFeatures, ...]:
        """Merges the stages.

        Args:
          stages: of SparseResNet.
          pyramid: of the same clouds.
          score: from a level's output f32[B, V, size] to what decides about pruning the next finer level, f32[B, V]: the
            reference takes the highest class logit. No gradient flows through it.
          train: batch statistics or running ones.
          kept: voxels of strides 8, 16 and 32 that are kept, whatever their scores; None for those with the highest scores.

        Returns:
          Levels of strides 8, 16, 32 and 64 (rows FCAF3D_LEVELS of the pyramid); the masks leave out what was pruned.
        """
        x, outputs = stages[-1], []
        level = pyramid.levels[FCAF3D_LEVELS[-1]]
        mask, scores = level.mask, jnp.zeros(level.mask.shape)
        candidates = prune_score = None
        for stage in reversed(range(NUM_STAGES)):
            if stage < NUM_STAGES - 1:
                above, level = level, pyramid.levels[FCAF3D_LEVELS[stage]]
                made = _take_parents(mask, level.up)
                x = self.up_blocks[stage](x, level.up, made, train=train)
                x = self.refine_blocks[stage](x, level.same3, made, train=train)
                x = x + take_skip(stages[stage], level.skip)
                prune_score = interpolate_to_children(scores[..., None], level.up, above.same3)[..., 0]
                candidates = made | (require_map(level.skip).index[..., 0] >= 0)
                best = keep_highest(prune_score, candidates, self.prune_threshold)
                mask = best if kept is None else candidates & kept[stage]
                x = _mask_rows(x, mask)
            y = self.out_blocks[stage](x, level.same3, mask, train=train)
            scores = jnp.where(mask, jax.lax.stop_gradient(score(y)), 0.0)
            outputs.append(PrunedFeatures(level.coords, y, mask, candidates, prune_score))
        return tuple(reversed(outputs))


def _take_parents(mask, up: KernelMap | None):
    """Whether the parent of each generated voxel is there."""
    pair = require_map(up).reverse[..., 0]
    return jax.vmap(lambda mask, parent: mask[parent])(mask, pair // 8) & (pair >= 0)


def _mask_rows(x, mask):
    return jnp.where(mask[..., None], x, 0.0)
