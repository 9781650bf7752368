"""Pointwise layers (1x1 convolutions) with the initialisation of the PyTorch references."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory

# PyTorch's kaiming_normal_ (fan_in, relu), used by the shared MLPs of PointNet++.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
# PyTorch's default for convolutions and linear layers, U(-1, 1) / sqrt(fan_in), used by heads.
torch_default = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


@jax.custom_vjp
def linear(x: Float[Array, "*n i"], kernel: Float[Array, "i o"]) -> Float[Array, "*n o"]:
    """Multiplies rows with a kernel; its gradient is one product of rows, too.

    XLA on a CPU transposes all rows for the gradient that JAX derives, and a training step of VoteNet takes twice as long.
    """
    return x @ kernel


def _linear_forward(x, kernel):
    return linear(x, kernel), (x, kernel)


def _linear_backward(residuals, gradient):
    x, kernel = residuals
    count = math.prod(x.shape[:-1])
    rows, gradients = x.reshape(count, x.shape[-1]), gradient.reshape(count, gradient.shape[-1])
    return gradient @ kernel.T, rows.T @ gradients


linear.defvjp(_linear_forward, _linear_backward)


class Dense(nn.Module):
    """A linear layer with an explicit input size, so that its kernel can be read before it is called.

    Attributes:
      input_size: channels in.
      size: channels out.
      use_bias: whether to add a bias, initialised U(-1, 1) / sqrt(input_size) as PyTorch's.
      kernel_init: initialiser of the kernel [input_size, size].
    """

    input_size: int
    size: int
    use_bias: bool = True
    kernel_init: Any = torch_default

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.kernel = self.param("kernel", self.kernel_init, (self.input_size, self.size))
        self.bias = self.param("bias", self._init_bias) if self.use_bias else None

    def _init_bias(self, key):
        bound = self.input_size**-0.5
        return jax.random.uniform(key, (self.size,), minval=-bound, maxval=bound)

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        """Applies the layer to the last axis."""
        y = linear(x, self.kernel)
        return y if self.bias is None else y + self.bias


class PointLayer(nn.Module):
    """Dense, batch norm, ReLU."""

    input_size: int
    size: int
    use_bias: bool = False
    kernel_init: Any = kaiming_normal
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        self.dense = Dense(self.input_size, self.size, self.use_bias, self.kernel_init)
        self.normalize = self.norm(size=self.size, name="norm")

    def __call__(self, x: Float[Array, "*n i"], mask: Bool[Array, "*m"] | None = None, *, train: bool):
        """Maps f32[..., input_size] to f32[..., size]; `mask` as in the norm layer."""
        return jax.nn.relu(self.normalize(self.dense(x), mask, train=train))

    def finish(self, y: Float[Array, "*n o"], mask: Bool[Array, "*m"] | None = None, *, train: bool):
        """Norm and ReLU for a `y` whose product with the kernel was made elsewhere."""
        return jax.nn.relu(self.normalize(y, mask, train=train))

    def folded(self) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
        """The layer at inference as one kernel and one bias (batch norm folded in), before the ReLU."""
        scale, shift = self.normalize.folded()
        if self.dense.bias is not None:
            shift = shift + self.dense.bias * scale
        return self.dense.kernel * scale, shift


class PointMLP(nn.Module):
    """A chain of point layers, named layer0, layer1, ...

    Attributes:
      input_size: channels in.
      sizes: channels of each layer.
      use_bias: whether the linear maps have a bias in front of the norm.
      kernel_init: initialiser of the kernels.
      norm: makes the norm layers, as norm(size=C).
    """

    input_size: int
    sizes: Sequence[int]
    use_bias: bool = False
    kernel_init: Any = kaiming_normal
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        inputs = (self.input_size, *self.sizes[:-1])
        self.layers = [
            PointLayer(i, o, self.use_bias, self.kernel_init, self.norm, name=f"layer{n}")
            for n, (i, o) in enumerate(zip(inputs, self.sizes, strict=True))
        ]

    def __call__(self, x: Float[Array, "*n i"], mask: Bool[Array, "*m"] | None = None, *, train: bool):
        """Maps f32[..., input_size] to f32[..., sizes[-1]]."""
        for layer in self.layers:
            x = layer(x, mask, train=train)
        return x


def scale_size(size: int, width: float) -> int:
    """Channels of a hidden layer at a width multiplier.

    Args:
      size: channels at width 1.
      width: multiplier, for example 1, 0.5 or 0.25.

    Returns:
      size * width.

    Raises:
      ValueError: if that is not a positive whole number.
    """
    scaled = size * width
    if scaled < 1 or scaled != int(scaled):
        raise ValueError(
            f"width {width} turns {size} channels into {scaled}; choose a width such as 1, 0.5 or 0.25"
        )
    return int(scaled)
