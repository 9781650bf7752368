"""Losses on class scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
