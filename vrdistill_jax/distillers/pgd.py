"""PGD: distil where the teacher's own predictions are good.

For every object the proposals that the teacher predicts best are picked, a Gaussian is fitted to where they lie, and the
student's features are drawn to the teacher's with that Gaussian as weight; a second, more box-minded choice weighs what
the regression reads.

Source: Yang et al., "Prediction-Guided Distillation for Dense Object Detection" (2022); formula and start values as the
released code (ChenhongyiYang/PGD) computes them, carried over from image cells to proposals.
Differs: anchors are proposals and the two towers' outputs are one, the head's last hidden features (VoteNet has a single
tower); distances in metres and a fixed regulariser instead of random jitter; a proposal of zero quality is no candidate
(the original fills up with arbitrary ones); an image's masks act on that image only (the released code broadcasts them
over the batch); the object term averages per scene.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vrdistill_jax.distillers.fgd import spatial_attention
from vrdistill_jax.distillers.matching import align_features, mean_over_points
from vrdistill_jax.geometry.boxes import join_boxes, points_in_boxes
from vrdistill_jax.geometry.iou import pairwise_iou
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.structs import Boxes, DetectorOutput, Scene


def default_config() -> ConfigDict:
    """The start values, as one entry of `config.distiller.methods`.

    Returns:
      A ConfigDict with
        weight: multiplies everything,
        num_candidates: K, proposals per object that the Gaussian is fitted to; at most 4 are degenerate in 3D,
        feature_iou_share: exponent of the IoU (the class score has one minus it) in the quality for the feature term,
        box_iou_share: the same for the box term,
        spread: metres; its square is added to the variances, in place of jitter,
        temperature: of the attention,
        foreground, background, box, attention: weights of the terms (10 times those of the original, as VoteNet's loss
          is).
    """
    return ConfigDict(
        dict(
            name="pgd",
            weight=1.0,
            num_candidates=9,
            feature_iou_share=0.8,
            box_iou_share=0.6,
            spread=0.05,
            temperature=0.8,
            foreground=0.8,
            background=0.4,
            box=1.28,
            attention=8e-3,
        )
    )


def build(config: Any, student: Any, teacher: Any, axis_name: str | None = None) -> "PGD":
    """The module that `config` describes; channel sizes are read off what it is first called with.

    Raises:
      ValueError: if `spread` or `num_candidates` is not positive.
    """
    del student, teacher
    if config.spread <= 0:
        raise ValueError(f"pgd's spread is {config.spread} m; it keeps the Gaussian regular and must be > 0")
    if config.num_candidates < 1:
        raise ValueError(f"pgd's num_candidates is {config.num_candidates}; it must be at least 1")
    return PGD(**{key: config[key] for key in default_config() if key != "name"}, axis_name=axis_name)


class PGD(nn.Module):
    """The distiller; attributes as in `default_config`, and `axis_name`, the mapped device axis or None."""

    weight: float = 1.0
    num_candidates: int = 9
    feature_iou_share: float = 0.8
    box_iou_share: float = 0.6
    spread: float = 0.05
    temperature: float = 0.8
    foreground: float = 0.8
    background: float = 0.4
    box: float = 1.28
    attention: float = 0.008
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
        """Compares the head's hidden features, proposal by proposal.

        Args:
          student: not used, `aligned` is.
          teacher: output of the same clouds.
          scene: with boxes.
          aligned: the student's output at the teacher's clusters.
          train: not used.

        Returns:
          (scalar total, terms: the foreground, background, attention, box and box_attention shares of it).

        Raises:
          ValueError: if `aligned` or the boxes are missing.
        """
        del student, train
        if aligned is None or scene.boxes is None:
            raise ValueError("pgd needs scene.boxes and the student's output at the teacher's clusters")
        teacher = jax.lax.stop_gradient(teacher)
        valid = teacher.predictions.mask
        # Masked rows are cleared first, so that what stands in them cannot reach a gradient.
        target, features = (
            jnp.where(valid[..., None], x.taps["proposals"].features, 0.0) for x in (teacher, aligned)
        )
        features = align_features(features, target.shape[-1])

        inside = jax.vmap(points_in_boxes)(teacher.taps["clusters"].xyz, _rows(scene.boxes))
        inside &= scene.boxes.mask[:, None, :]
        score, iou = teacher_scores(teacher, scene.boxes)
        candidate = valid[..., None] & scene.boxes.mask[:, None, :]

        def weights(share):
            quality = jnp.where(candidate, score ** (1 - share) * iou**share, 0.0)
            return jax.vmap(gaussian_weights, (0, 0, 0, None, None))(
                quality, teacher.taps["clusters"].xyz, inside, self.num_candidates, self.spread
            )

        for_features, for_box = jax.lax.stop_gradient(
            (weights(self.feature_iou_share), weights(self.box_iou_share))
        )
        elsewhere = valid & ~jnp.any(inside, -1)

        spatial_t, channel_t = attentions(target, valid, self.temperature)
        spatial_s, channel_s = attentions(features, valid, self.temperature)
        error = jnp.square(features - target) * channel_t
        channel_gap = jnp.sum(jnp.abs(channel_t - channel_s), -1)
        per_row = spatial_t * jnp.sum(error, -1)
        chosen = for_box > 0
        per_scene = {
            "foreground": self.foreground * mean_over_points(per_row * for_features, for_features > 0),
            "background": self.background * mean_over_points(per_row, elsewhere),
            "attention": self.attention
            * (mean_over_points(channel_gap, valid) + jnp.sum(jnp.abs(spatial_t - spatial_s), -1)),
            "box": self.box * mean_over_points(for_box * jnp.mean(error, -1), chosen),
            "box_attention": self.attention * mean_over_points(channel_gap, chosen),
        }
        terms = {
            name: masked_mean(self.weight * value, scene.mask, self.axis_name)
            for name, value in per_scene.items()
        }
        return sum(terms.values(), start=jnp.zeros(())), terms


def teacher_scores(
    teacher: DetectorOutput, boxes: Boxes
) -> tuple[Float[Array, "b q g"], Float[Array, "b q g"]]:
    """What each proposal is worth for each object.

    Args:
      teacher: the detector's output.
      boxes: padded ground truth; the rows of pads mean nothing.

    Returns:
      (f32[B, Q, G] objectness times the probability of the object's class, f32[B, Q, G] 3D IoU of the decoded box).
    """
    predictions = teacher.predictions
    probability = predictions.objectness[..., None] * jax.nn.softmax(predictions.class_logits, -1)
    label = jnp.maximum(boxes.label, 0)
    score = jnp.take_along_axis(probability, label[:, None, :], axis=-1)
    predicted = join_boxes(predictions.center, predictions.size, predictions.yaw)
    return score, pairwise_iou(predicted, _rows(boxes))


def gaussian_weights(
    quality: Float[Array, "q g"],
    xyz: Float[Array, "q 3"],
    inside: Bool[Array, "q g"],
    count: int,
    spread: float,
) -> Float[Array, " q"]:
    """How much each proposal counts: a Gaussian around the best ones of an object.

    Args:
      quality: f32[Q, G] >= 0; 0 where a proposal is no candidate for an object.
      xyz: f32[Q, 3] metres.
      inside: bool[Q, G] whether the proposal's position lies in the object's box.
      count: K, candidates per object.
      spread: metres, its square is added to the variances.

    Returns:
      f32[Q] in [0, 1]: the largest value over objects of which the proposal is a candidate and inside; 0 elsewhere. A
      Gaussian is not normalised: it is 1 at its mean.
    """
    best, row = jax.lax.top_k(quality.T, min(count, quality.shape[0]))  # [G, K]
    taken = best > 0
    offset, cov = _fit(xyz[row], taken)
    # Solved with the covariance's explicit size (3 x 3), one right-hand side per candidate.
    scaled = jnp.linalg.solve(cov + spread**2 * jnp.eye(3), jnp.swapaxes(offset, 1, 2))
    distance = jnp.sum(offset * jnp.swapaxes(scaled, 1, 2), -1)
    object_row = jnp.arange(quality.shape[1])[:, None]
    value = jnp.where(taken & inside[row, object_row], jnp.exp(-0.5 * distance), 0.0)
    return jnp.zeros(quality.shape[0]).at[row].max(value)


def _fit(xyz: Float[Array, "g k 3"], taken: Bool[Array, "g k"]):
    """Offsets from the mean and the maximum-likelihood covariance of the points that are taken."""
    weight = taken / jnp.maximum(jnp.sum(taken, -1, keepdims=True), 1)
    offset = xyz - jnp.sum(weight[..., None] * xyz, 1, keepdims=True)
    return offset, jnp.einsum("gk,gki,gkj->gij", weight, offset, offset)


def attentions(
    features: Float[Array, "b q c"], mask: Bool[Array, "b q"], temperature: float
) -> tuple[Float[Array, "b q"], Float[Array, "b q c"]]:
    """Where, and in which channels of each row, features are large.

    Args:
      features: f32[B, Q, C].
      mask: bool[B, Q].
      temperature: of the two softmaxes.

    Returns:
      (f32[B, Q] over rows, summing to the number of valid rows and 0 elsewhere; f32[B, Q, C] over the channels of each
      row, summing to C).
    """
    channel = features.shape[-1] * jax.nn.softmax(jnp.abs(features) / temperature, -1)
    return spatial_attention(features, mask, temperature), channel


def _rows(boxes: Boxes) -> Float[Array, "b g 7"]:
    return join_boxes(boxes.center, boxes.size, boxes.yaw)
