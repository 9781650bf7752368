"""Naive float64 FGD of one scene, point by point: the oracle of the FGD tests."""

import numpy as np
from oracles.boxes import signed_depth


def softmax(values):
    exponential = np.exp(values - np.max(values))
    return exponential / exponential.sum()


def attentions(features, temperature):
    """(per point, per channel) of f64[m, c]."""
    count, size = features.shape
    spatial = count * softmax(np.abs(features).mean(1) / temperature)
    channel = size * softmax(np.abs(features).mean(0) / temperature)
    return spatial, channel


def region_weights(inside):
    """(foreground, background) weights of bool[m, g], one point and one box at a time."""
    count, num_boxes = inside.shape
    foreground, outside = np.zeros(count), []
    for i in range(count):
        for j in range(num_boxes):
            if inside[i, j]:
                foreground[i] = max(foreground[i], 1 / sum(inside[:, j]))
        if not any(inside[i]):
            outside.append(i)
    background = np.zeros(count)
    for i in outside:
        background[i] = 1 / len(outside)
    return foreground, background


def inside_boxes(xyz, boxes):
    """bool[m, g] for box rows [g, 7]."""
    return np.array([[signed_depth(p, box) >= 0 for box in boxes] for p in xyz]).reshape(len(xyz), len(boxes))


def context(features, params):
    """The features plus a summary of all of them."""
    logits = features @ params["attention"]["kernel"] + params["attention"]["bias"]
    summary = softmax(logits[:, 0]) @ features
    hidden = summary @ params["reduce"]["kernel"] + params["reduce"]["bias"]
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
    hidden = np.maximum(hidden * params["norm"]["scale"] + params["norm"]["bias"], 0)
    return features + hidden @ params["expand"]["kernel"] + params["expand"]["bias"]


def fgd(student, teacher, xyz, boxes, params, temperature=0.5):
    """Unweighted terms of one scene; all rows are valid."""
    if "align" in params:
        student = student @ params["align"]["kernel"] + params["align"]["bias"]
    foreground, background = region_weights(inside_boxes(xyz, boxes))
    spatial_t, channel_t = attentions(teacher, temperature)
    spatial_s, channel_s = attentions(student, temperature)
    terms = {"foreground": 0.0, "background": 0.0}
    for i in range(len(xyz)):
        for c in range(teacher.shape[1]):
            error = spatial_t[i] * channel_t[c] * (teacher[i, c] - student[i, c]) ** 2
            terms["foreground"] += foreground[i] * error
            terms["background"] += background[i] * error
    terms["spatial_attention"] = np.abs(spatial_t - spatial_s).sum()
    terms["channel_attention"] = np.abs(channel_t - channel_s).sum()
    difference = context(student, params["student_context"]) - context(teacher, params["teacher_context"])
    terms["context"] = (difference**2).sum()
    return terms
