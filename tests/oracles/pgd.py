"""PGD in NumPy, one scene, one proposal and one object at a time, float64."""

import numpy as np


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def inside(point, center, size, yaw):
    dx, dy, dz = point - center
    along, across = np.cos(yaw) * dx + np.sin(yaw) * dy, -np.sin(yaw) * dx + np.cos(yaw) * dy
    return abs(along) <= size[0] / 2 and abs(across) <= size[1] / 2 and abs(dz) <= size[2] / 2


def gaussian_weights(quality, xyz, in_box, count, spread):
    """quality [Q, G], in_box [Q, G] -> [Q]."""
    weight = np.zeros(len(xyz))
    for g in range(quality.shape[1]):
        ranked = sorted(range(len(xyz)), key=lambda i: -quality[i, g])[:count]
        ranked = [i for i in ranked if quality[i, g] > 0]
        if not ranked:
            continue
        points = xyz[ranked]
        mean = points.mean(0)
        cov = (points - mean).T @ (points - mean) / len(ranked) + spread**2 * np.eye(3)
        inverse = np.linalg.inv(cov)
        for i in ranked:
            if in_box[i, g]:
                weight[i] = max(weight[i], np.exp(-0.5 * (xyz[i] - mean) @ inverse @ (xyz[i] - mean)))
    return weight


def scene_terms(s, t, mask, w_feature, w_box, background, config):
    """s, t [Q, C] aligned features; returns the weighted terms of one scene."""
    s, t = s[mask], t[mask]
    w_feature, w_box, background = w_feature[mask], w_box[mask], background[mask]
    n, c = t.shape

    def spatial(f):
        return n * softmax(np.abs(f).mean(1) / config["temperature"])

    def channel(f):
        return c * softmax(np.abs(f) / config["temperature"], axis=1)

    fg = bg = box = box_att = 0.0
    for i in range(n):
        error = sum(channel(t)[i, k] * (s[i, k] - t[i, k]) ** 2 for k in range(c))
        gap = np.abs(channel(t)[i] - channel(s)[i]).sum()
        fg += w_feature[i] / max((w_feature > 0).sum(), 1) * spatial(t)[i] * error
        bg += background[i] / max(background.sum(), 1) * spatial(t)[i] * error
        if w_box[i] > 0:
            box += w_box[i] * error / c / (w_box > 0).sum()
            box_att += gap / (w_box > 0).sum()
    att = np.abs(channel(t) - channel(s)).sum() / n + np.abs(spatial(t) - spatial(s)).sum()
    return {
        "foreground": config["foreground"] * fg,
        "background": config["background"] * bg,
        "attention": config["attention"] * att,
        "box": config["box"] * box,
        "box_attention": config["attention"] * box_att,
    }
