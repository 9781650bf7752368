"""Batch normalisation over padded sets, and the running statistics that inference uses.

In training a norm layer writes the statistics *of this batch* to the `batch_stats` collection; `update_running` then
blends them into the running ones, outside the network. The momentum is therefore an ordinary (traced) number of the
training step, and a schedule such as VoteNet's costs no recompilation.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class MaskedBatchNorm(nn.Module):
    """Batch norm whose statistics see valid rows only.

    Attributes:
      size: C, number of channels.
      epsilon: added to the variance; PyTorch's default is 1e-5, Keras' 1e-3.
      axis_name: mapped axis over which statistics are shared (synchronised batch norm), or None.

    Source: running variance is unbiased (n / (n - 1)) while the batch is normalised by the biased one, as in PyTorch.
    Differs: a batch without any valid row leaves the running statistics as they are instead of producing NaN.
    """

    size: int
    epsilon: float = 1e-5
    axis_name: str | None = None

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.scale = self.param("scale", nn.initializers.ones, (self.size,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.size,))
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, (self.size,))
        self.var = self.variable("batch_stats", "var", jnp.ones, (self.size,))

    def __call__(
        self,
        x: Float[Array, "*n c"],
        mask: Bool[Array, "*m"] | None = None,
        *,
        train: bool,
        statistics_of: Float[Array, "*k c"] | None = None,
    ) -> Float[Array, "*n c"]:
        """Normalises each channel.

        Args:
          x: f32[..., C].
          mask: bool, broadcastable to the leading axes of what the statistics are taken of; None for all valid.
          train: whether to use (and record) this batch's statistics instead of the running ones.
          statistics_of: f32[..., C] to take the batch's statistics of, where that is not x itself (x may be a pooled form
            of it).

        Returns:
          f32[..., C]; rows that are masked out are normalised too but mean nothing.
        """
        if not train:
            scale, shift = self.folded()
            return x * scale + shift
        mean, var, count = self._moments(x if statistics_of is None else statistics_of, mask)
        if not self.is_initializing():
            unbiased = var * count / jnp.maximum(count - 1, 1)
            self.mean.value = jnp.where(count > 0, mean, self.mean.value)
            self.var.value = jnp.where(count > 0, unbiased, self.var.value)
        scale = self.scale * jax.lax.rsqrt(var + self.epsilon)
        return (x - mean) * scale + self.bias

    def folded(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """The layer at inference as a scale and a shift per channel."""
        scale = self.scale * jax.lax.rsqrt(self.var.value + self.epsilon)
        return scale, self.bias - self.mean.value * scale

    def _moments(self, x, mask):
        """Mean, biased variance and number of valid rows, over all devices when `axis_name` is set."""
        if mask is None:
            mask = jnp.ones((1,) * (x.ndim - 1), bool)
        rows = jnp.broadcast_shapes(x.shape[:-1], mask.shape)
        # Axes along which the mask is constant are summed before it is applied: the large array is read once, unmasked.
        constant = tuple(axis for axis, size in enumerate(mask.shape) if size == 1)
        rest = tuple(range(x.ndim - 1))

        def total(values):
            partial = jnp.sum(values, constant, keepdims=True)
            return self._over_devices(jnp.sum(jnp.where(mask[..., None], partial, 0.0), rest))

        repeats = math.prod(rows[axis] for axis in constant)
        count = self._over_devices(jnp.sum(mask, dtype=x.dtype) * repeats)
        safe = jnp.maximum(count, 1)
        mean = total(x) / safe
        var = total(jnp.square(x - mean)) / safe
        return mean, var, count

    def _over_devices(self, value):
        return value if self.axis_name is None else jax.lax.psum(value, self.axis_name)


NormFactory = Callable[..., nn.Module]  # called as norm(size=C)


def update_running(running: dict, batch: dict, momentum: float | Array) -> dict:
    """Blends the statistics of one batch into the running ones.

    Args:
      running: the `batch_stats` tree before the step.
      batch: the `batch_stats` tree that a training pass wrote.
      momentum: weight of the new statistics in [0, 1] (PyTorch's meaning; Flax's is one minus it).

    Returns:
      running + momentum * (batch - running): entries that are equal stay the same, bit for bit.
    """
    return jax.tree.map(lambda old, new: old + momentum * (new - old), running, batch)
