"""Soft ranks and RAS in NumPy, float64, one group and one anchor at a time."""

import numpy as np


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def soft_rank(values, group, temperature, normalizer="count"):
    result = np.zeros(len(values))
    for i, g in enumerate(group):
        if g < 0:
            continue
        others = [j for j in range(len(values)) if group[j] == g and j != i]
        ahead = sum(sigmoid((float(values[j]) - float(values[i])) / temperature) for j in others)
        if normalizer == "count":
            result[i] = ahead / (len(others) + 1)
        elif normalizer == "others":
            result[i] = ahead / max(len(others), 1)
        else:
            result[i] = (ahead + 1) / (len(others) + 1)
    return result


def focal(logit, is_class, alpha=0.25, gamma=2.0):
    p = float(sigmoid(logit))
    return -alpha * (1 - p) ** gamma * np.log(p) if is_class else -(1 - alpha) * p**gamma * np.log(1 - p)


def distillation(s, q, rank, soft, beta, variant):
    if variant == "printed":
        return -((1 - soft) ** beta * q * np.log(s) + q * (1 - q) * np.log(1 - s))
    if variant == "rank_pos":
        return -(soft**beta * q * np.log(s) + q * (1 - q) * np.log(1 - s))
    if variant == "R_pos":
        return -((1 - rank) ** beta * q * np.log(s) + q * (1 - q) * np.log(1 - s))
    return -(q * q * np.log(s) + (1 - soft) ** beta * q * (1 - q) * np.log(1 - s))


def rank_aware(logits, label, quality, gt_index, config):
    """f64[A, K] of one scene."""
    score = np.array([sigmoid(row[k]) if k >= 0 else 0.0 for row, k in zip(logits, label, strict=True)])
    by_scene = np.minimum(gt_index, 0) if config.score_group == "scene" else gt_index
    box_rank = soft_rank(quality, gt_index, config.temperature, config.rank_normalizer)
    score_rank = soft_rank(score, by_scene, config.temperature, config.rank_normalizer)
    result = np.zeros(logits.shape)
    for a, row in enumerate(logits):
        for k, z in enumerate(row):
            result[a, k] = focal(z, k == label[a])
            if gt_index[a] < 0:
                continue
            r_cls = np.exp(-config.rank_scale * score_rank[a])
            if k == label[a]:
                r_reg = np.exp(-config.rank_scale * box_rank[a])
                rdl = distillation(
                    score[a], float(quality[a]), box_rank[a], r_reg, config.beta, config.rdl_variant
                )
                result[a, k] = (1 - r_cls) * result[a, k] + r_cls * rdl
            elif config.scale_other_classes:
                result[a, k] *= 1 - r_cls
    return result
