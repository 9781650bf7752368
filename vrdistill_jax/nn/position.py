"""Positional codes of points and boxes for attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax.nn.attention import xavier_uniform
from vrdistill_jax.nn.mlp import Dense, PointLayer
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory

MIN_EXTENT = 0.1  # metres; flatter scenes are taken to be this large


class FourierPosition(nn.Module):
    """Sines and cosines of fixed random projections of a point.

    The projections (N(0, 1), drawn once) are no parameters, but belong to the trained network: they are kept in
    `batch_stats` as "frequencies", f32[input_size, size / 2].

    Attributes:
      size: C, channels out, even.
      input_size: coordinates in.

    Source: 3DETR, after Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions" (2020).
    """

    size: int
    input_size: int = 3

    def setup(self) -> None:
        """Draws the projections."""
        if self.size % 2:
            raise ValueError(f"a Fourier code has as many sines as cosines; {self.size} channels are odd")
        shape = (self.input_size, self.size // 2)
        self.frequencies = self.variable(
            "batch_stats", "frequencies", lambda: jax.random.normal(self.make_rng("params"), shape)
        )

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """Maps coordinates, in [0, 1] over the extent of a scene, to f32[..., C] (sines first); no gradients."""
        phase = jax.lax.stop_gradient(2 * jnp.pi * x) @ jax.lax.stop_gradient(self.frequencies.value)
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


class LearnedPosition(nn.Module):
    """A small network on coordinates: Dense, batch norm, ReLU, Dense.

    Attributes:
      input_size: numbers in: 3 for points, 6 for boxes (centre, size).
      size: channels out.
      norm: makes the norm layer.

    Source: Group-Free-3D (PositionEmbeddingLearned).
    """

    input_size: int
    size: int
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.hidden = PointLayer(self.input_size, self.size, True, xavier_uniform, self.norm)
        self.out = Dense(self.size, self.size, kernel_init=xavier_uniform)

    def __call__(
        self, x: Float[Array, "*n d"], mask: Bool[Array, "*m"] | None = None, *, train: bool
    ) -> Float[Array, "*n c"]:
        """Maps f32[..., input_size] to f32[..., size]; `mask` as in the norm layer."""
        return self.out(self.hidden(x, mask, train=train))


def find_bounds(
    xyz: Float[Array, "b n 3"], mask: Bool[Array, "b n"]
) -> tuple[Float[Array, "b 3"], Float[Array, "b 3"]]:
    """Smallest and largest coordinates of each cloud.

    Args:
      xyz: f32[B, N, 3] metres.
      mask: bool[B, N] valid points.

    Returns:
      (f32[B, 3], f32[B, 3]) metres, at least MIN_EXTENT apart; 0 and MIN_EXTENT for a cloud without points.

    Differs: 3DETR takes flat scenes to be thicker only where it predicts sizes, and divides by the true extent elsewhere.
    """
    mask = mask[..., None]
    occupied = jnp.any(mask, axis=1)
    low = jnp.where(occupied, jnp.min(jnp.where(mask, xyz, jnp.inf), axis=1), 0.0)
    high = jnp.where(occupied, jnp.max(jnp.where(mask, xyz, -jnp.inf), axis=1), 0.0)
    return low, jnp.where(high - low < MIN_EXTENT, low + MIN_EXTENT, high)


def normalize_coordinates(
    xyz: Float[Array, "b n 3"], low: Float[Array, "b 3"], high: Float[Array, "b 3"]
) -> Float[Array, "b n 3"]:
    """Maps [low, high] of each scene and axis to [0, 1].

    Args:
      xyz: f32[B, N, 3] metres.
      low: f32[B, 3] smallest coordinates of the scene.
      high: f32[B, 3] largest ones; must exceed `low`.

    Returns:
      f32[B, N, 3].
    """
    return (xyz - low[:, None]) / (high - low)[:, None]
