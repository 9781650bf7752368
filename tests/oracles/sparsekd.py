"""SparseKD in NumPy, one proposal and one object at a time, float64."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def class_heat(output, b, i):
    p = output.predictions
    return float(p.objectness[b, i]) * softmax(np.asarray(p.class_logits[b, i], float))


def object_heat(point, objects):
    """objects: (center, size, yaw) each."""
    best = 0.0
    for center, size, yaw in objects:
        offset = np.asarray(point, float) - center
        turn = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        best = max(best, np.exp(-0.5 * (((turn @ offset) / (size / 2)) ** 2).sum()))
    return best


def terms(student, teacher, scene, threshold=0.0, clip=1e-4, max_distance=0.3, keep=None):
    """The unweighted heat and box terms; `keep` [B, Q] restricts which proposals may be pivotal."""
    boxes, clusters = scene.boxes, teacher.taps["clusters"]
    num_bins = teacher.head["heading"].shape[-1] // 2
    weights, errors, gaps = [], [], []
    for b in np.flatnonzero(scene.mask):
        rows = np.flatnonzero(boxes.mask[b])
        objects = [
            (boxes.center[b, g].astype(float), boxes.size[b, g].astype(float), float(boxes.yaw[b, g]))
            for g in rows
        ]
        valid = np.flatnonzero(clusters.mask[b])
        for i in valid:
            t, s = class_heat(teacher, b, i), class_heat(student, b, i)
            weight = t.max() * (t.max() > threshold) * object_heat(clusters.xyz[b, i], objects)
            weights.append(weight if keep is None or keep[b, i] else 0.0)
            errors.append(((np.clip(s, clip, 1 - clip) - np.clip(t, clip, 1 - clip)) ** 2).sum())
        for center, _, _ in objects:
            distance = [np.linalg.norm(clusters.xyz[b, i] - center) for i in valid]
            if min(distance) >= max_distance:
                continue
            i = valid[int(np.argmin(distance))]
            k = int(np.argmax(teacher.head["heading"][b, i, :num_bins]))
            gap = 0.0
            for name in ("center", "size"):
                gap += np.abs(
                    np.asarray(getattr(student.predictions, name)[b, i], float)
                    - np.asarray(getattr(teacher.predictions, name)[b, i], float)
                ).sum()
            residual = [float(x.head["heading"][b, i, num_bins + k]) for x in (student, teacher)]
            gaps.append(gap + abs(residual[0] - residual[1]) * np.pi / num_bins)
    weights, errors = np.array(weights), np.array(errors)
    return {
        "heat": (weights * errors).sum() / (weights.sum() + 1e-6),
        "box": sum(gaps) / max(1, len(gaps)),
        "pivotal": weights.mean(),
        "objects": len(gaps),
    }
