"""MGD: masked generative distillation, on a set of points.

Most of the student's seeds are blanked, and a small generator has to restore all of the teacher's features from the rest.

Source: Yang et al., "Masked Generative Distillation" (2022); formula read from the repository yzd-v/MGD,
det/mmdet/distillation/losses/mgd.py. The step from image cells to points is ours. The generator's 3 x 3 convolutions become
means over the nine nearest seeds: a pointwise generator would see nothing but zeros at a blanked seed and could only put a
constant there.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.distillers.matching import align_features, pair_points
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.losses.box import squared_distances
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.nn.mlp import Dense
from vrdistill_jax.structs import DetectorOutput, Scene


class NeighborLayer(nn.Module):
    """y_i = W_0 f_i + mean over the neighbours j of W_1 [f_j; (x_j - x_i) / scale] + b."""

    size: int

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "b m c"],
        index: Int[Array, "b m k"],
        valid: Bool[Array, "b m k"],
        offset: Float[Array, "b m 3"],
    ) -> Float[Array, "b m o"]:
        """Mixes each point with its neighbours; `offset` is the mean of (x_j - x_i) / scale."""
        # The mean of linear maps is the linear map of the mean, so that neighbours are averaged before the product.
        around = jnp.concatenate([mean_over_neighbors(gather_rows(features, index), valid), offset], axis=-1)
        own = Dense(features.shape[-1], self.size, name="own")(features)
        return own + Dense(around.shape[-1], self.size, use_bias=False, name="around")(around)


class Generator(nn.Module):
    """Two neighbour layers with a ReLU between, as wide as their input.

    Attributes:
      num_neighbors: K, the point itself included.
      offset_scale: metres that offsets to neighbours are divided by.
    """

    num_neighbors: int = 9
    offset_scale: float = 0.4

    @nn.compact
    def __call__(
        self, features: Float[Array, "b m c"], xyz: Float[Array, "b m 3"], mask: Bool[Array, "b m"]
    ) -> Float[Array, "b m c"]:
        """Maps f32[B, M, C] to f32[B, M, C]; pads influence no other point."""
        xyz = jax.lax.stop_gradient(jnp.where(mask[..., None], xyz, 0.0))
        index, valid = find_neighbors(xyz, mask, self.num_neighbors)
        steps = (gather_rows(xyz, index) - xyz[:, :, None]) / self.offset_scale
        graph = index, valid, mean_over_neighbors(steps, valid)
        size = features.shape[-1]
        hidden = jax.nn.relu(NeighborLayer(size, name="layer0")(features, *graph))
        return NeighborLayer(size, name="layer1")(hidden, *graph)


class MGD(nn.Module):
    """The loss, its alignment layer and generator; attributes as in `default_config`, and the mapped device axis or None."""

    tap: str = "seeds"
    weight: float = 1.0
    generation: float = 4e-3
    mask_rate: float = 0.65
    num_neighbors: int = 9
    offset_scale: float = 0.4
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        scene: Scene,
        *,
        aligned: DetectorOutput | None = None,
        train: bool = True,
    ) -> tuple[Array, dict[str, Array]]:
        """Restores the teacher's seeds from a part of the student's; needs rngs={"distiller": key}.

        Args:
          student: the student's output.
          teacher: the teacher's output of the same clouds.
          scene: only its mask is read.
          aligned: not used.
          train: not used.

        Returns:
          (scalar loss, {"generation": the same}).
        """
        pairs = pair_points(student, teacher, scene, self.tap)
        hint = align_features(pairs.student, pairs.teacher.shape[-1])
        key = self.make_rng("distiller")
        if self.axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))  # devices draw different masks
        kept = draw_kept(key, self.mask_rate, pairs.mask.shape) & pairs.mask
        generator = Generator(self.num_neighbors, self.offset_scale, name="generator")
        restored = generator(jnp.where(kept[..., None], hint, 0.0), pairs.xyz, pairs.mask)
        # All seeds count, blanked or not, and the sum is not divided by their number.
        error = jnp.sum(jnp.square(restored - pairs.teacher), axis=-1)
        per_scene = jnp.sum(jnp.where(pairs.mask, error, 0.0), axis=1)
        loss = self.weight * self.generation * masked_mean(per_scene, scene.mask, self.axis_name)
        return loss, {"generation": loss}


def draw_kept(key: Array, mask_rate: float, shape: tuple[int, ...]) -> Bool[Array, "b m"]:
    """Draws which points stay: each is blanked with probability `mask_rate`, independently.

    A point's draw depends on its row and its scene's row only, so that padding changes nothing.
    """
    batch, count = shape
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    uniform = jax.vmap(lambda row_key: jax.random.uniform(row_key, (count,)))(keys)
    return uniform >= mask_rate


def find_neighbors(
    xyz: Float[Array, "b m 3"], mask: Bool[Array, "b m"], num_neighbors: int
) -> tuple[Int[Array, "b m k"], Bool[Array, "b m k"]]:
    """Finds the nearest valid points of each point, itself included, the lower row first among equals.

    Args:
      xyz: f32[B, M, 3] metres.
      mask: bool[B, M] valid points; others are never neighbours.
      num_neighbors: K; fewer where the set is smaller.

    Returns:
      (i32[B, M, K] rows, nearest first; bool[B, M, K] False where there are fewer than K valid points).
    """
    xyz = jax.lax.stop_gradient(xyz)
    distance = jnp.where(mask[:, None, :], squared_distances(xyz, xyz), jnp.inf)
    nearness, index = jax.lax.top_k(-distance, min(num_neighbors, xyz.shape[1]))
    return index, jnp.isfinite(nearness)


def mean_over_neighbors(
    values: Float[Array, "b m k c"], valid: Bool[Array, "b m k"]
) -> Float[Array, "b m c"]:
    """Mean over the valid neighbours; 0 where there are none."""
    count = jnp.sum(valid, axis=-1, keepdims=True, dtype=values.dtype)
    return jnp.sum(jnp.where(valid[..., None], values, 0.0), axis=2) / jnp.maximum(count, 1.0)


def default_config() -> ConfigDict:
    """Start values of one entry of `config.distiller.methods`.

    Returns:
      A ConfigDict with
        tap: what is restored; its rows must be the same points in both networks,
        weight: multiplies everything (1),
        generation: weight of the squared error, summed over points and channels (4e-3: the repository's 2e-5, times 10 for
          VoteNet's loss scale and times 22 since a scene has about 1,000 seeds where an image has 22,000 cells),
        mask_rate: probability that a point is blanked (0.65),
        num_neighbors: points that a generator layer averages, the point itself included (9),
        offset_scale: metres that offsets to neighbours are divided by (0.4).
    """
    return ConfigDict(
        dict(tap="seeds", weight=1.0, generation=4e-3, mask_rate=0.65, num_neighbors=9, offset_scale=0.4)
    )


def build(config: Any, student: Any, teacher: Any, axis_name: str | None = None) -> MGD:
    """The distiller that one entry of `config.distiller.methods` describes; sizes are read off the taps.

    Raises:
      ValueError: for a mask rate outside [0, 1], no neighbours, or a scale that is not positive.
    """
    del student, teacher
    if not 0 <= config.mask_rate <= 1:
        raise ValueError(f"mgd.mask_rate is {config.mask_rate}; expected a probability (the paper uses 0.65)")
    if config.num_neighbors < 1 or not config.offset_scale > 0:
        raise ValueError(
            f"mgd.num_neighbors is {config.num_neighbors} and offset_scale {config.offset_scale}; expected at least 1 "
            "and > 0 metres"
        )
    return MGD(**{name: config[name] for name in default_config()}, axis_name=axis_name)
