"""Prediction heads: small networks from the features of a candidate to numbers."""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from vrdistill_jax.nn.mlp import Dense, PointLayer, torch_default
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory


class DropoutHead(nn.Module):
    """Twice Dense, batch norm, ReLU and dropout; then Dense.

    Attributes:
      size: channels in and between.
      output_size: channels out.
      dropout_rate: in training.
      norm: makes the norm layers.

    Source: 3DETR (GenericMLP).
    """

    size: int
    output_size: int
    dropout_rate: float = 0.0
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        layer = partial(PointLayer, self.size, self.size, kernel_init=torch_default, norm=self.norm)
        self.layer0, self.layer1 = layer(), layer()
        self.out = Dense(self.size, self.output_size)
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(
        self, x: Float[Array, "*n c"], mask: Bool[Array, "*m"] | None = None, *, train: bool
    ) -> Float[Array, "*n o"]:
        """Maps f32[..., size] to f32[..., output_size]; `mask` as in the norm layer."""
        for layer in (self.layer0, self.layer1):
            x = self.dropout(layer(x, mask, train=train), deterministic=not train)
        return self.out(x)
