"""Losses on class scores."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*n k"], label: Int[Array, "*n"], class_weight: Float[Array, " k"] | None = None
) -> Float[Array, "*n"]:
    """Softmax cross entropy per entry.

    Args:
      logits: f32[..., K].
      label: i32[...] in [0, K); negative labels are read as 0, mask them afterwards.
      class_weight: f32[K] factor of the label's class, not renormalised (PyTorch's reduction="none").

    Returns:
      f32[...], unreduced.
    """
    label = jnp.maximum(label, 0)
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    loss = -jnp.take_along_axis(log_probability, label[..., None], axis=-1)[..., 0]
    return loss if class_weight is None else loss * class_weight[label]


def class_targets(label: Int[Array, "*n"], num_classes: int) -> Bool[Array, "*n k"]:
    """One-hot rows; a label of -1 (background) has no class."""
    return label[..., None] == jnp.arange(num_classes)


def focal_loss(
    logits: Float[Array, "*n k"], label: Int[Array, "*n"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "*n k"]:
    """Sigmoid focal loss per entry and class.

    Args:
      logits: f32[..., K].
      label: i32[...] class, -1 for background.
      alpha: weight of the positive class; the others weigh 1 - alpha.
      gamma: how strongly easy entries count less.

    Returns:
      f32[..., K], unreduced.

    Source: Lin et al., "Focal Loss for Dense Object Detection" (2017).
    """
    is_class = class_targets(label, logits.shape[-1])
    towards_truth = jnp.where(is_class, logits, -logits)
    weight = jnp.where(is_class, alpha, 1 - alpha)
    return -weight * jax.nn.sigmoid(-towards_truth) ** gamma * jax.nn.log_sigmoid(towards_truth)


def quality_focal_loss(
    logits: Float[Array, "*n k"], label: Int[Array, "*n"], quality: Float[Array, "*n"], beta: float = 2.0
) -> Float[Array, "*n k"]:
    """Quality focal loss: binary cross entropy against the quality of the box, times |quality - score|^beta.

    Args:
      logits: f32[..., K].
      label: i32[...] class, -1 for background.
      quality: f32[...] in [0, 1], IoU of the predicted box; the target at the labelled class.
      beta: strength of the modulation.

    Returns:
      f32[..., K], unreduced.

    Source: Li et al., "Generalized Focal Loss" (2020), equation 2.
    """
    target = jnp.where(class_targets(label, logits.shape[-1]), quality[..., None], 0.0)
    gap = jnp.abs(target - jax.nn.sigmoid(logits))
    return gap**beta * optax.sigmoid_binary_cross_entropy(logits, target)


def varifocal_loss(
    logits: Float[Array, "*n k"],
    label: Int[Array, "*n"],
    quality: Float[Array, "*n"],
    alpha: float = 0.75,
    gamma: float = 2.0,
) -> Float[Array, "*n k"]:
    """Varifocal loss: entropy against the quality, weighted by it at positives and by the focal term elsewhere.

    Args:
      logits: f32[..., K].
      label: i32[...] class, -1 for background.
      quality: f32[...] in [0, 1], IoU of the predicted box; the target at the labelled class.
      alpha: weight of negatives.
      gamma: how strongly easy negatives count less.

    Returns:
      f32[..., K], unreduced.

    Source: Zhang et al., "VarifocalNet" (2021), equation 2.
    """
    target = jnp.where(class_targets(label, logits.shape[-1]), quality[..., None], 0.0)
    weight = jnp.where(target > 0, target, alpha * jax.nn.sigmoid(logits) ** gamma)
    return weight * optax.sigmoid_binary_cross_entropy(logits, target)


def sum_per_positive(
    values: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    positive: Bool[Array, "*n"],
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Sum of a loss over all valid entries, divided by the number of positive ones (at least 1).

    Args:
      values: f32[...]; ignored where the mask is False, even NaN.
      mask: bool[...] valid entries.
      positive: bool[...] those that count in the divisor.
      axis_name: mapped device axis, or None; the mean over devices of the results (and gradients) is that of the whole
        batch, as in `losses.reduction.masked_mean`.

    Returns:
      Scalar.
    """
    total = jnp.sum(jnp.where(mask, values, 0.0))
    count = jnp.sum(positive & mask).astype(values.dtype)
    if axis_name is not None:
        total, count = total * jax.lax.psum(1, axis_name), jax.lax.psum(count, axis_name)
    return total / jnp.maximum(count, 1.0)
