"""itKD in NumPy, one scene, one seed and one object at a time, float64."""

import numpy as np


def dense(x, layer):
    return x @ np.asarray(layer["kernel"], float) + np.asarray(layer["bias"], float)


def chain(x, layers):
    for n in range(len(layers)):
        x = dense(np.maximum(x, 0) if n else x, layers[f"layer{n}"])
    return x


def attend(rows, slots):
    """rows [objects, D]: column-wise softmax of the channels' products."""
    size = rows.shape[1]
    out = np.zeros_like(rows)
    for j in range(size):
        logits = np.array([sum(rows[:, i] * rows[:, j]) for i in range(size)]) / np.sqrt(slots)
        weight = np.exp(logits - logits.max())
        out[:, j] = rows @ (weight / weight.sum())
    return out


def terms(seeds, head, scenes, params, groups, slots):
    """The unweighted terms.

    Args:
      seeds: per scene (student [M, Cs], teacher [M, Ct], xyz [M, 3]) of the valid seeds.
      head: per scene (student [Q, D], teacher [Q, D], xyz [Q, 3]) of the valid clusters.
      scenes: per scene the centres [g, 3] of the objects.
      params: of the module.
      groups: sizes of the head's groups.
      slots: Mo.
    """

    def lift(x):
        return dense(x, params["lift"]) if "lift" in params else x

    code, into_t, into_s, at_t, at_s = [], [], [], [], []
    attention, objects = 0.0, 0
    for (s, t, xyz), (ys, yt, cluster), centers in zip(seeds, head, scenes, strict=True):
        code_s, code_t = chain(lift(s), params["encoder"]), chain(t, params["encoder"])
        back_t, back_s = lift(chain(code_s, params["decoder"])), chain(code_t, params["decoder"])
        code += list(np.abs(code_s - code_t).mean(1))
        into_t += list(np.abs(back_t - t).mean(1))
        into_s += list(np.abs(back_s - s).mean(1))
        rows_s, rows_t = [], []
        for center in centers:
            i = np.argmin(((xyz - center) ** 2).sum(1))
            at_t.append(((back_t - t)[i] ** 2).mean())
            at_s.append(((back_s - s)[i] ** 2).mean())
            j = np.argmin(((cluster - center) ** 2).sum(1))
            rows_s.append(ys[j])
            rows_t.append(yt[j])
        if rows_s:
            mixed = []
            for rows in (np.array(rows_s), np.array(rows_t)):
                parts, start = [attend(rows, slots)], 0
                for size in groups:
                    parts.append(attend(rows[:, start : start + size], slots))
                    start += size
                mixed.append(dense(np.concatenate(parts, 1), params["mix"]))
            attention += np.abs(mixed[0] - mixed[1]).sum()
            objects += len(centers)

    def mean(values):
        return np.mean(values) if values else 0.0

    return {
        "code": mean(code),
        "interchange": mean(into_t) + mean(at_t) + mean(into_s) + mean(at_s),
        "attention": attention / (objects + 1e-4),
    }
