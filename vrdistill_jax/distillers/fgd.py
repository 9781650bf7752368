"""FGD: focal and global knowledge distillation, on a set of points.

Focal: squared feature differences, weighted by where the objects are and by the teacher's spatial and channel attention,
and the attentions themselves. Global: the features after a context block that adds a summary of the whole scene.

Source: Yang et al., "Focal and Global Knowledge Distillation for Detectors" (2022); formulas read from the repository
yzd-v/FGD, mmdet/distillation/losses/fgd.py. The step from image cells to points is ours: seeds are the cells, the number of
seeds in a box is its area, and the spatial softmax runs over the seeds of a scene.
Differs: the repository writes the scale mask of an H x W map at (x, y), that is transposed; here points are in their boxes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vrdistill_jax.distillers.matching import PointPairs, align_features, mean_over_points, pair_points
from vrdistill_jax.distillers.regions import background_weight, foreground_weight, points_on_foreground
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.nn.mlp import Dense, kaiming_normal
from vrdistill_jax.structs import DetectorOutput, Scene


class ContextBlock(nn.Module):
    """Adds a summary of all points to each of them; the identity at the start of training.

    Source: FGD, spatial_pool and channel_add_conv, after GCNet (Cao et al., 2019).
    """

    @nn.compact
    def __call__(self, features: Float[Array, "b m c"], mask: Bool[Array, "b m"]) -> Float[Array, "b m c"]:
        """Maps f32[B, M, C] to f32[B, M, C]; `mask` bool[B, M] says which points the summary sees."""
        size = features.shape[-1]
        logits = Dense(size, 1, kernel_init=kaiming_normal, name="attention")(features)[..., 0]
        context = jnp.einsum("bm,bmc->bc", masked_softmax(logits, mask), features)
        hidden = Dense(size, max(size // 2, 1), name="reduce")(context)
        hidden = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(hidden)
        # Kernel and bias start at 0: teacher and student features are first compared as they are.
        added = nn.Dense(size, kernel_init=nn.initializers.zeros, name="expand")(jax.nn.relu(hidden))
        return features + added[:, None]


class FGD(nn.Module):
    """The loss, its alignment layer and context blocks; attributes as in `default_config`, and the device axis or None."""

    tap: str = "seeds"
    weight: float = 1.0
    temperature: float = 0.5
    foreground: float = 1e-2
    background: float = 5e-3
    spatial_attention: float = 0.1
    channel_attention: float = 5e-3
    context: float = 1e-3
    region: str = "boxes"
    margin: float = 0.0
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
          scene: with boxes (and point_instance for region "instances").
          aligned: not used.
          train: not used.

        Returns:
          (scalar loss, its weighted terms "foreground", "background", "spatial_attention", "channel_attention" and
          "context", which add up to it).

        Raises:
          ValueError: if the scene has no labels.
        """
        pairs = pair_points(student, teacher, scene, self.tap)
        hint = align_features(pairs.student, pairs.teacher.shape[-1])
        pairs = pairs._replace(student=jnp.where(pairs.mask[..., None], hint, 0.0))
        inside = points_on_foreground(
            pairs.xyz, pairs.seed_index, pairs.mask, scene, self.region, self.margin
        )
        values = focal_terms(pairs, inside, self.temperature)
        values["context"] = sum_of_squares(
            ContextBlock(name="student_context")(pairs.student, pairs.mask)
            - ContextBlock(name="teacher_context")(pairs.teacher, pairs.mask),
            pairs.mask,
        )
        terms = {
            name: self.weight * getattr(self, name) * masked_mean(value, scene.mask, self.axis_name)
            for name, value in values.items()
        }
        return sum(terms.values()), terms


def focal_terms(
    pairs: PointPairs, inside: Bool[Array, "b m g"], temperature: float
) -> dict[str, Float[Array, " b"]]:
    """The unweighted focal terms of each scene.

    Args:
      pairs: with the student's features on the teacher's channels.
      inside: bool[B, M, G] which points lie on which objects.
      temperature: of both attentions.

    Returns:
      f32[B] each: "foreground" and "background" = sum_ic w_i S_i C_c (t_ic - s_ic)^2 with the teacher's attentions S and C
      and the region's weights w; "spatial_attention" = sum_i |S^t_i - S^s_i|; "channel_attention" = sum_c |C^t_c - C^s_c|.
    """
    mask = pairs.mask
    teacher_spatial = spatial_attention(pairs.teacher, mask, temperature)
    teacher_channel = channel_attention(pairs.teacher, mask, temperature)
    student_spatial = spatial_attention(pairs.student, mask, temperature)
    student_channel = channel_attention(pairs.student, mask, temperature)
    difference = jnp.square(pairs.teacher - pairs.student)
    distance = teacher_spatial * jnp.einsum("bmc,bc->bm", difference, teacher_channel)
    return {
        "foreground": jnp.sum(foreground_weight(inside) * distance, axis=1),
        "background": jnp.sum(background_weight(inside, mask) * distance, axis=1),
        "spatial_attention": jnp.sum(jnp.abs(teacher_spatial - student_spatial), axis=1),
        "channel_attention": jnp.sum(jnp.abs(teacher_channel - student_channel), axis=1),
    }


def spatial_attention(
    features: Float[Array, "b m c"], mask: Bool[Array, "b m"], temperature: float
) -> Float[Array, "b m"]:
    """How strongly each point fires: n softmax_i(mean_c |f_ic| / temperature) over the n valid points; sums to n."""
    strength = jnp.mean(jnp.abs(features), axis=-1)
    count = jnp.sum(mask, axis=1, keepdims=True, dtype=features.dtype)
    return count * masked_softmax(strength / temperature, mask)


def channel_attention(
    features: Float[Array, "b m c"], mask: Bool[Array, "b m"], temperature: float
) -> Float[Array, "b c"]:
    """How strongly each channel fires: C softmax_c(mean_i |f_ic| / temperature) over the valid points; sums to C."""
    strength = jax.vmap(mean_over_points, in_axes=(-1, None), out_axes=-1)(jnp.abs(features), mask)
    return features.shape[-1] * jax.nn.softmax(strength / temperature, axis=-1)


def masked_softmax(logits: Float[Array, "b m"], mask: Bool[Array, "b m"]) -> Float[Array, "b m"]:
    """Softmax over the valid points; 0 elsewhere, and everywhere in a scene without any."""
    return jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1), 0.0)


def sum_of_squares(difference: Float[Array, "b m c"], mask: Bool[Array, "b m"]) -> Float[Array, " b"]:
    """Squared norm of each scene's valid rows."""
    return jnp.sum(jnp.where(mask, jnp.sum(jnp.square(difference), axis=-1), 0.0), axis=1)


def default_config() -> ConfigDict:
    """Start values of one entry of `config.distiller.methods`.

    The repository's weights for one-stage image detectors (1e-3, 5e-4, 5e-4, 5e-6) are carried over: times 10 for
    VoteNet's loss scale, and those of sums over positions times 22, since a scene has about 1,000 seeds where an image has
    22,000 cells.

    Returns:
      A ConfigDict with
        tap: what is compared; its rows must be the same points in both networks,
        weight: multiplies everything (1),
        temperature: of the attentions (0.5),
        foreground: weight of the features on objects (1e-2; alpha of the paper),
        background: weight of the features elsewhere (5e-3; beta),
        spatial_attention: weight of the attention over points (0.1; gamma),
        channel_attention: weight of the attention over channels (5e-3; gamma),
        context: weight of the global term (1e-3; lambda),
        region: "boxes", or "instances" for the labels of the points,
        margin: metres added to every face of the boxes (0).
    """
    return ConfigDict(
        dict(
            tap="seeds",
            weight=1.0,
            temperature=0.5,
            foreground=1e-2,
            background=5e-3,
            spatial_attention=0.1,
            channel_attention=5e-3,
            context=1e-3,
            region="boxes",
            margin=0.0,
        )
    )


def build(config: Any, student: Any, teacher: Any, axis_name: str | None = None) -> FGD:
    """The distiller that one entry of `config.distiller.methods` describes; sizes are read off the taps.

    Raises:
      ValueError: if the temperature is not positive.
    """
    del student, teacher
    if not config.temperature > 0:
        raise ValueError(f"fgd.temperature is {config.temperature}; expected > 0 (the paper uses 0.5)")
    return FGD(**{name: config[name] for name in default_config()}, axis_name=axis_name)
