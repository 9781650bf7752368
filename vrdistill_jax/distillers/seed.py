"""Seed distillation: the student's seed features are pulled towards the teacher's, seed by seed.

Source: named as the simplest baseline of VRDistill (2024), which does not define it, and no code of it is public. This is
the hint of FitNets (Romero et al., 2015) on the seeds of a point network: a linear layer to the teacher's channels and a
squared distance. Teacher and student read the same pyramid, so that their seeds are the same points in the same order and
need no matching.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vrdistill_jax.distillers.matching import align_features, mean_over_points, pair_points
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.structs import DetectorOutput, Scene


class SeedDistiller(nn.Module):
    """The loss and its alignment layer; attributes as in `default_config`, and the mapped device axis or None."""

    tap: str = "seeds"
    weight: float = 1.0
    normalize: bool = False
    rectify: bool = False
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
        """Compares the seeds.

        Args:
          student: the student's output.
          teacher: the teacher's output of the same clouds.
          scene: only its mask is read.
          aligned: not used.
          train: not used.

        Returns:
          (scalar loss, {"feature": the same}).
        """
        pairs = pair_points(student, teacher, scene, self.tap)
        hint, target = align_features(pairs.student, pairs.teacher.shape[-1]), pairs.teacher
        if self.rectify:
            hint = jax.nn.relu(hint)
        if self.normalize:
            hint, target = standardize(hint), standardize(target)
        distance = jnp.sum(jnp.square(hint - target), axis=-1)
        per_scene = mean_over_points(distance, pairs.mask)
        loss = self.weight * masked_mean(per_scene, scene.mask, self.axis_name)
        return loss, {"feature": loss}


def standardize(features: Float[Array, "*n c"], epsilon: float = 1e-5) -> Float[Array, "*n c"]:
    """Layer norm over the channels without parameters."""
    centered = features - jnp.mean(features, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + epsilon)


def default_config() -> ConfigDict:
    """Start values of one entry of `config.distiller.methods`.

    Returns:
      A ConfigDict with
        tap: what is compared; its rows must be the same points in both networks,
        weight: of the squared distance, summed over channels and averaged over points (1; a mean over 256 channels would
          take 256),
        normalize: variant; layer norm on both sides before the distance,
        rectify: variant; a ReLU after the alignment layer, as the teacher's seeds are never negative.
    """
    return ConfigDict(dict(tap="seeds", weight=1.0, normalize=False, rectify=False))


def build(config: Any, student: Any, teacher: Any, axis_name: str | None = None) -> SeedDistiller:
    """The distiller that one entry of `config.distiller.methods` describes; sizes are read off the taps."""
    del student, teacher
    return SeedDistiller(**{name: config[name] for name in default_config()}, axis_name=axis_name)
