"""VRDistill in loops, written from the paper's equations."""

import numpy as np


def attention(query, memory, query_xyz, key_xyz, key_mask, params, heads, neighbors, sign):
    """One masked multi-head attention (equations 1 and 2) of one scene, and its weights [heads, M, N]."""

    def project(x, name):
        return x @ params[name]["kernel"] + params[name].get("bias", 0.0)

    q, k, v = project(query, "query"), project(memory, "key"), project(memory, "value")
    size = q.shape[1] // heads
    out, weights = np.zeros_like(q), np.zeros((heads, len(q), len(k)))
    for a in range(len(q)):
        distance = np.array([np.linalg.norm(query_xyz[a] - x) for x in key_xyz])
        valid = [b for b in range(len(k)) if key_mask[b]]
        near = sorted(valid, key=lambda b: (distance[b], b))[:neighbors]
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            logits = np.array([q[a, part] @ k[b, part] / np.sqrt(size) + sign * distance[b] for b in near])
            share = np.exp(logits - logits.max())
            share /= share.sum()
            weights[h, a, near] = share
            out[a, part] = sum(s * v[b, part] for s, b in zip(share, near, strict=True))
    return project(out, "out"), weights


def soft_mask(xyz, center, size, yaw, box_mask, sigma, rotate=True):
    """Equation 3 of one scene."""
    out = np.zeros(len(xyz))
    boxes = [j for j in range(len(center)) if box_mask[j]]
    for i, x in enumerate(xyz):
        if not boxes:
            continue
        j = min(boxes, key=lambda j: (np.sum((x - center[j]) ** 2), j))
        offset = x - center[j]
        if rotate:
            axis = np.array([np.cos(yaw[j]), np.sin(yaw[j])])
            normal = np.array([-axis[1], axis[0]])
            offset = np.array([offset[:2] @ axis, offset[:2] @ normal, offset[2]])
        out[i] = 1.0 / (np.sum((offset / size[j]) ** 2) + sigma)
    return out


def consistency(student_xyz, student_features, student_mask, xyz, features, mask, weight):
    """Equation 5 of one scene: the printed sum, and the number of valid student votes."""
    total, count = 0.0, 0
    rows = [i for i in range(len(xyz)) if mask[i]]
    for j in range(len(student_xyz)):
        if student_mask[j]:
            i = min(rows, key=lambda i: (np.sum((student_xyz[j] - xyz[i]) ** 2), i))
            total += np.sum((student_features[j] - features[i]) ** 2) * weight[i]
            count += 1
    return total, count


def refinement(xyz, mask, seed_index, point_instance, center):
    """Sum of distances of equation 6 and the number of votes on objects, of one scene."""
    total, count = 0.0, 0
    for i in range(len(xyz)):
        rows = [g for g in point_instance[seed_index[i]] if g >= 0]
        if mask[i] and point_instance[seed_index[i]][0] >= 0:
            total += min(np.linalg.norm(xyz[i] - center[g]) for g in rows)
            count += 1
    return total, count
