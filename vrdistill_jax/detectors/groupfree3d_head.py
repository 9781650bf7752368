"""The heads of Group-Free-3D, and how several of them are joined.

Source: Group-Free-3D, models/modules.py (PredictHead, ClsAgnosticPredictHead) and eval_avg.py.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vrdistill_jax.geometry.frames import yaw_from_votenet_heading
from vrdistill_jax.losses.bins import angle_from_bin
from vrdistill_jax.nn.mlp import Dense, PointMLP, torch_default
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.structs import Predictions

MERGED_HEADS = ("proposal", "last", "last_three", "all")


class HeadOutput(NamedTuple):
    """What a head says; the leading axis of L + 1 (proposal head, then one per decoder layer) where heads are stacked."""

    objectness_logit: Array  # f32[B, Q]
    center: Array  # f32[B, Q, 3] metres
    heading_logits: Array  # f32[B, Q, H]
    heading_residual: Array  # f32[B, Q, H] in units of pi / H
    size_logits: Array | None  # f32[B, Q, S]; None where sizes do not go by class
    size_residual: Array | None  # f32[B, Q, S, 3] in units of the class's mean size
    size: Array  # f32[B, Q, 3] metres, of the likeliest size class
    class_logits: Array  # f32[B, Q, K]


class PredictionHead(nn.Module):
    """Two point layers, then a linear layer for each part of a box.

    Attributes:
      input_size: C, channels in and between.
      num_classes: K.
      num_heading_bins: H.
      mean_sizes: S rows in metres, or none to predict sizes in metres whatever the class.
      norm: makes the norm layers.
    """

    input_size: int
    num_classes: int
    num_heading_bins: int
    mean_sizes: tuple[tuple[float, float, float], ...] = ()
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        sizes, count = (self.input_size,) * 2, len(self.mean_sizes)
        self.mlp = PointMLP(self.input_size, sizes, True, torch_default, self.norm)
        out = partial(Dense, self.input_size)
        self.objectness_out, self.center_out = out(1), out(3)
        self.heading_out, self.heading_residual_out = out(self.num_heading_bins), out(self.num_heading_bins)
        if count:
            self.size_class_out, self.size_residual_out = out(count), out(3 * count)
        else:
            self.size_out = out(3)
        self.class_out = out(self.num_classes)

    def __call__(
        self,
        features: Float[Array, "b q c"],
        base: Float[Array, "b q 3"],
        mask: Bool[Array, "b q"],
        *,
        train: bool,
    ) -> tuple[HeadOutput, Float[Array, "b q c"]]:
        """Reads boxes off features.

        Args:
          features: f32[B, Q, C].
          base: f32[B, Q, 3] metres, what the predicted offset is added to.
          mask: bool[B, Q], as in the norm layers.
          train: batch statistics or running ones.

        Returns:
          (HeadOutput, f32[B, Q, C] what the linear layers read).
        """
        hidden = self.mlp(features, mask, train=train)
        size_logits = size_residual = None
        if self.mean_sizes:
            mean = jnp.asarray(self.mean_sizes, jnp.float32)
            size_logits = self.size_class_out(hidden)
            size_residual = self.size_residual_out(hidden).reshape(*size_logits.shape, 3)
            likeliest = jnp.argmax(size_logits, -1)
            size = mean[likeliest] * (1 + pick_entries(size_residual, likeliest[..., None], axis=-2))
        else:
            size = self.size_out(hidden)
        head = HeadOutput(
            objectness_logit=self.objectness_out(hidden)[..., 0],
            center=base + self.center_out(hidden),
            heading_logits=self.heading_out(hidden),
            heading_residual=self.heading_residual_out(hidden),
            size_logits=size_logits,
            size_residual=size_residual,
            size=size,
            class_logits=self.class_out(hidden),
        )
        return head, hidden


def group_channels(head: HeadOutput, base: Float[Array, "b q 3"]) -> dict[str, Array]:
    """What one head says, by HEAD_GROUPS of the data contract: f32[B, Q, *]."""
    size = head.size
    if head.size_logits is not None and head.size_residual is not None:
        residual = head.size_residual.reshape(*head.size_logits.shape[:-1], -1)
        size = jnp.concatenate([head.size_logits, residual], -1)
    return {
        "objectness": head.objectness_logit[..., None],
        "center": head.center - base,
        "heading": jnp.concatenate([head.heading_logits, head.heading_residual], -1),
        "size": size,
        "class": head.class_logits,
    }


def predictions_from_head(head: HeadOutput, mask: Bool[Array, "b q"]) -> Predictions:
    """Decodes the likeliest heading bin of one head, or of several joined ones, into the contract's frame."""
    num_bins = head.heading_logits.shape[-1]
    heading_bin = jnp.argmax(head.heading_logits, -1)
    residual = pick_entries(head.heading_residual, heading_bin) * (jnp.pi / num_bins)
    heading = angle_from_bin(heading_bin, residual, num_bins)
    if num_bins == 1:  # axis-aligned data: the reference ignores the heading
        heading = jnp.zeros_like(heading)
    objectness, yaw = jax.nn.sigmoid(head.objectness_logit), yaw_from_votenet_heading(heading)
    return Predictions(head.center, head.size, yaw, head.class_logits, objectness, mask)


def merge_heads(head: HeadOutput, mask: Bool[Array, "b q"], which: str) -> Predictions:
    """Joins what several heads predict.

    Args:
      head: f32[L + 1, B, Q, ...] of all heads, stacked.
      mask: bool[B, Q] of the candidates.
      which: of MERGED_HEADS; "last_three" ends earlier where there are fewer.

    Returns:
      Predictions of Q candidates per head, the last head first.

    Raises:
      ValueError: for an unknown name.
    """
    if which not in MERGED_HEADS:
        raise ValueError(f"merged_heads must be one of {', '.join(MERGED_HEADS)}, got {which!r}")
    count = {"proposal": 1, "last": 1, "last_three": 3, "all": None}[which]
    chosen = jax.tree.map(lambda x: x[:1] if which == "proposal" else x[::-1][:count], head)
    number = chosen.center.shape[0]

    def join(values):  # [n, B, Q, ...] -> [B, n Q, ...]
        values = jnp.moveaxis(values, 0, 1)
        return values.reshape(values.shape[0], -1, *values.shape[3:])

    return predictions_from_head(jax.tree.map(join, chosen), jnp.tile(mask, (1, number)))


def pick_entries(values: Array, index: Array, axis: int = -1) -> Array:
    """The entries `index` along an axis, which goes."""
    return jnp.take_along_axis(values, jnp.expand_dims(index, axis), axis=axis).squeeze(axis)
