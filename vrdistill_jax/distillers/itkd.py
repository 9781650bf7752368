"""itKD: interchange transfer between the teacher's and the student's features, and attention between head channels.

One channel autoencoder, shared by both, compresses the seed features of either network; the codes must agree, and what
is decoded from one network's code must look like the other's features. Separately, attention among the channels of the
proposal head, taken at the objects, must agree.

Source: Cho et al., "itKD: Interchange Transfer-based Knowledge Distillation for 3D Object Detection" (2023); formula as
the released code (hyeon-jo/interchange-transfer-KD) computes it, carried over from bird's-eye-view cells to seeds and
proposals. The convolutions there are 1 x 1, so the autoencoder is unchanged.
Differs: sizes follow the two networks (hard-coded there, and wrong for the half-width one); both heads' channels are
logits (the student's heat map enters after a sigmoid there); empty object slots do not dilute the object term unless
`literal_padding_mean` is set; the attention is scaled by a fixed number of slots, whatever the padding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vrdistill_jax.distillers.matching import pair_points
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.losses.box import nearest, squared_distances
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.nn.mlp import Dense
from vrdistill_jax.structs import HEAD_GROUPS, Boxes, DetectorOutput, Scene


def default_config() -> ConfigDict:
    """The start values, as one entry of `config.distiller.methods`.

    Returns:
      A ConfigDict with
        weight: multiplies everything (1 is the original's even blend of both losses),
        code_sizes: channels of the encoder's layers; the decoder mirrors them,
        code: weight of the agreement of the codes, a mean; 10 as VoteNet's own factor,
        interchange: weight of the interchange term, a mean; 10 as well,
        attention: weight of the head attention, a sum over channels per object: 1 (the head has some nine times the
          original's channels),
        attention_slots: Mo, the attention's logits are divided by its root,
        literal_padding_mean: whether the object term is a mean over all object slots, also empty ones.
    """
    return ConfigDict(
        dict(
            name="itkd",
            weight=1.0,
            code_sizes=(128, 64, 32),
            code=10.0,
            interchange=10.0,
            attention=1.0,
            attention_slots=64,
            literal_padding_mean=False,
        )
    )


def build(config: Any, student: Any, teacher: Any, axis_name: str | None = None) -> "ITKD":
    """The module that `config` describes; channel sizes are read off what it is first called with.

    Raises:
      ValueError: if there is no code.
    """
    del student, teacher
    if not config.code_sizes:
        raise ValueError(
            "itkd's code_sizes is empty; give the encoder at least one layer, such as (128, 64, 32)"
        )
    values = {key: config[key] for key in default_config() if key != "name"}
    return ITKD(**values | {"code_sizes": tuple(config.code_sizes), "axis_name": axis_name})


class ITKD(nn.Module):
    """The distiller; attributes as in `default_config`, and `axis_name`, the mapped device axis or None."""

    weight: float = 1.0
    code_sizes: tuple[int, ...] = (128, 64, 32)
    code: float = 10.0
    interchange: float = 10.0
    attention: float = 1.0
    attention_slots: int = 64
    literal_padding_mean: bool = False
    axis_name: str | None = None
    needs_aligned = True  # compares proposals one by one

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
        """Compares seeds with seeds, and the heads at the objects.

        Args:
          student: output whose seeds are compared.
          teacher: output of the same clouds.
          scene: with boxes.
          aligned: the student's output at the teacher's clusters, whose head is compared.
          train: not used.

        Returns:
          (scalar total, terms: the code, interchange and attention shares of it).

        Raises:
          ValueError: if `aligned` or the boxes are missing, or the heads have different channels.
        """
        del train
        if aligned is None or scene.boxes is None:
            raise ValueError("itkd needs scene.boxes and the student's output at the teacher's clusters")
        teacher = jax.lax.stop_gradient(teacher)
        code, interchange = self._seeds(student, teacher, scene, scene.boxes)
        terms = {
            "code": self.weight * self.code * code,
            "interchange": self.weight * self.interchange * interchange,
            "attention": self.weight * self.attention * self._head(aligned, teacher, scene, scene.boxes),
        }
        return sum(terms.values(), start=jnp.zeros(())), terms

    def _seeds(
        self, student: DetectorOutput, teacher: DetectorOutput, scene: Scene, boxes: Boxes
    ) -> tuple[Array, Array]:
        """How far the codes, and the decoded features, are from each other."""
        pairs = pair_points(student, teacher, scene, "seeds")
        fs, ft, valid = pairs.student, pairs.teacher, pairs.mask
        narrow, wide = fs.shape[-1], ft.shape[-1]
        lift = (lambda x: x) if narrow == wide else Dense(narrow, wide, name="lift")
        encode = Autocoder((wide, *self.code_sizes), name="encoder")
        decode = Autocoder((*reversed(self.code_sizes), narrow), name="decoder")
        code_s, code_t = encode(lift(fs)), encode(ft)
        into_teacher, into_student = lift(decode(code_s)), decode(code_t)

        _, cell = nearest(squared_distances(boxes.center, pairs.xyz), valid)
        present = boxes.mask & jnp.any(valid, -1, keepdims=True)

        def mean_gap(a, b):
            return masked_mean(jnp.mean(jnp.abs(a - b), -1), valid, self.axis_name)

        def object_gap(a, b):
            error = jnp.mean(jnp.square(gather_rows(a - b, cell)), -1)
            if not self.literal_padding_mean:
                return masked_mean(error, present, self.axis_name)
            error = jnp.mean(jnp.where(present, error, 0.0), -1)
            return masked_mean(error, scene.mask, self.axis_name)

        interchange = mean_gap(into_teacher, ft) + object_gap(into_teacher, ft)
        interchange += mean_gap(into_student, fs) + object_gap(into_student, fs)
        return mean_gap(code_s, code_t), interchange

    def _head(self, aligned: DetectorOutput, teacher: DetectorOutput, scene: Scene, boxes: Boxes) -> Array:
        """How far the head's channel attention is from the teacher's, per object."""
        clusters, groups = teacher.taps["clusters"], head_sizes(teacher)
        size = sum(groups)
        if head_sizes(aligned) != groups:
            raise ValueError(
                f"itkd compares heads channel by channel, but the student's groups {head_sizes(aligned)} are not the "
                f"teacher's {groups}; give both detectors the same classes, mean sizes and heading bins"
            )
        present = boxes.mask & jnp.any(clusters.mask, -1, keepdims=True) & scene.mask[:, None]
        _, row = nearest(squared_distances(boxes.center, clusters.xyz), clusters.mask)
        mix = Dense(2 * size, size, name="mix")

        def relate(output):
            parts = [gather_rows(group, row) for group in head_parts(output)]
            parts = [jnp.where(present[..., None], part, 0.0) for part in parts]
            parts = [jnp.concatenate(parts, -1), *parts]
            return mix(jnp.concatenate([channel_attention(x, self.attention_slots) for x in parts], -1))

        gap = jnp.sum(jnp.abs(relate(aligned) - relate(teacher)), -1)
        return masked_mean(gap, present, self.axis_name, epsilon=1e-4)


class Autocoder(nn.Module):
    """Half of the autoencoder: linear layers with ReLU between them, none at the end.

    Attributes:
      sizes: channels in, then out of each layer.
    """

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        """Maps f32[..., sizes[0]] to f32[..., sizes[-1]]."""
        for n, (i, o) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            x = Dense(i, o, name=f"layer{n}")(x if n == 0 else jax.nn.relu(x))
        return x


def head_parts(output: DetectorOutput) -> list[Array]:
    """The groups of channels of a head, in the order of HEAD_GROUPS.

    Raises:
      ValueError: if the detector does not offer them.
    """
    if output.head is None:
        raise ValueError(
            "itkd compares what heads say, group by group; a detector without output.head has none"
        )
    return [output.head[name] for name in HEAD_GROUPS if name in output.head]


def head_sizes(output: DetectorOutput) -> tuple[int, ...]:
    """Channels of each group."""
    return tuple(part.shape[-1] for part in head_parts(output))


def channel_attention(rows: Float[Array, "b g d"], slots: int) -> Float[Array, "b g d"]:
    """Mixes channels by how alike they are over the objects of a scene.

    Args:
      rows: f32[B, G, D] channels at each object, 0 in the rows of pads.
      slots: divisor of the logits, under a root.

    Returns:
      f32[B, G, D], rows @ S, where the columns of S [D, D] sum to 1.
    """
    logits = jnp.einsum("bgi,bgj->bij", rows, rows) / jnp.sqrt(jnp.asarray(slots, rows.dtype))
    return jnp.einsum("bgi,bij->bgj", rows, jax.nn.softmax(logits, axis=1))
