"""Soft ranks within groups, and SR3D's rank-aware adaptive self-distillation of class scores (RAS).

Source: "Real-Time 3D Object Detection with Inference-Aligned Learning" (SR3D, 2026), equations 6, 7, 9 and 10. No code was
released; what the text leaves open is an entry of `default_config`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.losses.classification import class_targets, focal_loss

RDL_VARIANTS = ("printed", "rank_pos", "R_pos", "rank_neg")


def default_config() -> ConfigDict:
    """The entries of config.detector.ras.

    Entries:
      beta: strength of the modulation by rank in equation 6.
      temperature: tau of the soft rank, in units of IoU and of class probability. The text ends with 0.01; notes on the
        paper name 0.1.
      rdl_variant: equation 6 with q the IoU, s the score, r the soft rank (high = well localised), R its position (0 =
        best), each negated:
          "printed":  (1 - r)^beta q log s + q (1 - q) log(1 - s). Its optimum s falls with r, against the sentence beside
                      it;
          "rank_pos": r^beta q log s + q (1 - q) log(1 - s);
          "R_pos":    (1 - R)^beta q log s + q (1 - q) log(1 - s);
          "rank_neg": q q log s + (1 - r)^beta q (1 - q) log(1 - s): the varifocal loss with its suppression scaled by rank.
      rank_normalizer: what equation 9 divides by: "count" N, "others" N - 1, or "inclusive": (1 + sum) / N.
      rank_scale: r = exp(-rank_scale R).
      score_group: among whom scores are ranked for equation 7: the positives of the same "box" or of the whole "scene".
      scale_other_classes: whether a positive's other classes are weighted by 1 - r_cls, like its focal loss.
      detach: whether q, r_reg and r_cls are constants.
    """
    return ConfigDict(
        dict(
            beta=1.0,
            temperature=0.01,
            rdl_variant="printed",
            rank_normalizer="count",
            rank_scale=1.0,
            score_group="box",
            scale_other_classes=False,
            detach=True,
        )
    )


def soft_rank(
    values: Float[Array, " a"], group: Int[Array, " a"], temperature: float, normalizer: str = "count"
) -> Float[Array, " a"]:
    """Normalised descending rank of each value among those of its group, smoothed: 0 is the highest.

    Args:
      values: f32[A].
      group: i32[A], -1 for entries that belong to none.
      temperature: towards 0 the rank becomes the hard one.
      normalizer: "count": sum / N, for a group of N; "others": sum / (N - 1); "inclusive": (1 + sum) / N.

    Returns:
      f32[A]: sum over the others of the group of sigmoid((theirs - mine) / temperature), normalised; 0 where there is no
      group. Differentiable in `values`.

    Raises:
      ValueError: for an unknown normalizer.

    Source: SR3D, equation 9, after Qin, Liu and Li, "A general approximation framework for direct optimization of
      information retrieval measures" (2010).
    """
    if normalizer not in ("count", "others", "inclusive"):
        raise ValueError(f"rank_normalizer is {normalizer!r}; expected one of count, others, inclusive")
    values, group = jnp.asarray(values), jnp.asarray(group)
    order = jnp.argsort(jnp.where(group < 0, jnp.iinfo(jnp.int32).max, group), stable=True)
    sorted_group = group[order]
    ahead = _count_ahead(values[order], sorted_group, temperature)
    others = _sum_over_group(lambda mine, theirs: jnp.ones_like(mine), jnp.zeros_like(values), sorted_group)
    rank = {
        "count": ahead / (others + 1),
        "others": ahead / jnp.maximum(others, 1),
        "inclusive": (ahead + 1) / (others + 1),
    }[normalizer]
    rank = jnp.where(sorted_group < 0, 0.0, rank)
    return jnp.zeros_like(rank).at[order].set(rank)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _count_ahead(values, group, temperature):
    """How many of its group are ahead of each value, smoothed; rows sorted by group."""
    return _sum_over_group(lambda mine, theirs: jax.nn.sigmoid((theirs - mine) / temperature), values, group)


def _count_ahead_forward(values, group, temperature):
    return _count_ahead(values, group, temperature), (values, group)


def _count_ahead_backward(temperature, residuals, cotangent):
    values, group = residuals

    def slope(mine, theirs):  # the derivative of a sigmoid is even, so both directions of a pair share it
        steep = jax.nn.sigmoid((theirs[0] - mine[0]) / temperature)
        return (theirs[1] - mine[1]) * steep * (1 - steep) / temperature

    return _sum_over_group(slope, jnp.stack([values, cotangent]), group), None


_count_ahead.defvjp(_count_ahead_forward, _count_ahead_backward)


def _sum_over_group(
    pair: Callable, values: Float[Array, "*c a"], group: Int[Array, " a"]
) -> Float[Array, " a"]:
    """Sum over all others of the same group of pair(mine, theirs), for rows sorted by group (-1 last, without partners).

    Groups have a handful of rows among tens of thousands, but no known largest size: rows are compared with the one
    `shift` places on, for shift = 1, 2, ... until no group reaches that far.
    """
    rows = jnp.arange(group.shape[0])

    def compare(state):
        shift, total, _ = state
        theirs, their_group = jnp.roll(values, -shift, axis=-1), jnp.roll(group, -shift)
        same = (group == their_group) & (group >= 0) & (rows + shift < len(rows))
        total = total + jnp.where(same, pair(values, theirs), 0.0)
        total = total + jnp.roll(jnp.where(same, pair(theirs, values), 0.0), shift)
        return shift + 1, total, jnp.any(same)

    start = jnp.ones((), jnp.int32), jnp.zeros(group.shape, values.dtype), jnp.any(group >= 0)
    return jax.lax.while_loop(lambda state: state[2], compare, start)[1]


def rank_distillation_loss(
    logit: Float[Array, "*n"],
    quality: Float[Array, "*n"],
    rank: Float[Array, "*n"],
    soft: Float[Array, "*n"],
    beta: float = 1.0,
    variant: str = "printed",
) -> Float[Array, "*n"]:
    """Rank-aware self-distillation loss of positives.

    Args:
      logit: f32[...] of the labelled class.
      quality: f32[...] q, IoU of the predicted box.
      rank: f32[...] R of q (0 = best).
      soft: f32[...] r of q (1 = best).
      beta: strength of the modulation.
      variant: see `default_config`.

    Returns:
      f32[...], unreduced.

    Raises:
      ValueError: for an unknown variant.

    Source: SR3D, equation 6, with the leading minus that a loss needs.
    """
    if variant not in RDL_VARIANTS:
        raise ValueError(f"rdl_variant is {variant!r}; expected one of {', '.join(RDL_VARIANTS)}")
    towards, away = quality, quality * (1 - quality)
    if variant == "rank_neg":
        towards, away = towards * quality, away * (1 - soft) ** beta
    else:
        towards = towards * {"printed": 1 - soft, "rank_pos": soft, "R_pos": 1 - rank}[variant] ** beta
    return -(towards * jax.nn.log_sigmoid(logit) + away * jax.nn.log_sigmoid(-logit))


def rank_aware_loss(
    logits: Float[Array, "b a k"],
    label: Int[Array, "b a"],
    quality: Float[Array, "b a"],
    gt_index: Int[Array, "b a"],
    config: Any,
) -> Float[Array, "b a k"]:
    """RAS: focal loss, blended at positives with the rank-aware distillation loss, by the rank of their score.

    Args:
      logits: f32[B, A, K].
      label: i32[B, A] class of the assigned box, -1 for background.
      quality: f32[B, A] IoU of the predicted with the assigned box.
      gt_index: i32[B, A] row of the assigned box, -1 for background.
      config: as `default_config`.

    Returns:
      f32[B, A, K], unreduced. Its labelled class at a positive holds (1 - r_cls) focal + r_cls RDL.

    Raises:
      ValueError: for an unknown choice in the config.

    Source: SR3D, equation 7.
    """
    if config.score_group not in ("box", "scene"):
        raise ValueError(f"score_group is {config.score_group!r}; expected box or scene")
    own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[..., None], -1)[..., 0]
    ranked = quality, jax.nn.sigmoid(own)
    if config.detach:
        quality, ranked = jax.lax.stop_gradient((quality, ranked))
    groups = gt_index, (gt_index if config.score_group == "box" else jnp.minimum(gt_index, 0))
    rank = jax.vmap(lambda v, g: soft_rank(v, g, config.temperature, config.rank_normalizer))
    box_rank, score_rank = (rank(v, g) for v, g in zip(ranked, groups, strict=True))
    box_soft, score_soft = (jnp.exp(-config.rank_scale * r) for r in (box_rank, score_rank))

    positive = gt_index >= 0
    focal = focal_loss(logits, label)
    distilled = rank_distillation_loss(own, quality, box_rank, box_soft, config.beta, config.rdl_variant)
    labelled = class_targets(label, logits.shape[-1]) & positive[..., None]
    keep = (1 - score_soft)[..., None]
    others = focal * keep if config.scale_other_classes else focal
    blended = focal * keep + (score_soft * distilled)[..., None]
    return jnp.where(positive[..., None], jnp.where(labelled, blended, others), focal)


def labelled_scores(logits: Float[Array, "b a k"], label: Int[Array, "b a"]) -> Float[Array, "b a"]:
    """Score of the labelled class per anchor, in [0, 1], without gradients; of class 0 where the label is -1."""
    own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[..., None], -1)[..., 0]
    return jax.lax.stop_gradient(jax.nn.sigmoid(own))
