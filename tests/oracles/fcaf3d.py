"""FCAF3D in NumPy, float64, on dictionaries {voxel: feature}, with the names of the official state_dict.

A tensor is a list with one dictionary per scene, so that batch norm sees the whole batch.
"""

from types import SimpleNamespace

import numpy as np
from oracles import assigners, sparse
from oracles import boxes as geometry

STRIDES = (8, 16, 32, 64)


def random_state(num_classes=18, channels=6, size=4, input_size=3, blocks=(1, 1, 1, 1), seed=0):
    """A state_dict of one of the official networks in which every width is `size`."""
    rng, state = np.random.default_rng(seed), {}

    def kernel(name, *shape):
        fan = shape[0] * shape[-1] if len(shape) == 3 else shape[0]
        state[f"{name}.kernel"] = (rng.normal(size=shape) * (2 / fan) ** 0.5).astype(np.float32)

    def norm(name):
        state[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, size).astype(np.float32)
        state[f"{name}.bn.bias"] = rng.uniform(-0.5, 0.7, size).astype(np.float32)
        state[f"{name}.bn.running_mean"] = rng.uniform(-0.5, 0.5, size).astype(np.float32)
        state[f"{name}.bn.running_var"] = rng.uniform(0.7, 1.5, size).astype(np.float32)
        state[f"{name}.bn.num_batches_tracked"] = np.array(3)

    kernel("backbone.conv1", 27, input_size, size)
    state["backbone.norm1.weight"] = rng.uniform(0.5, 1.5, (1, size)).astype(np.float32)
    state["backbone.norm1.bias"] = rng.uniform(-0.5, 0.5, (1, size)).astype(np.float32)
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            name = f"backbone.layer{stage}.{block}"
            for n in (1, 2):
                kernel(f"{name}.conv{n}", 27, size, size)
                norm(f"{name}.norm{n}")
            if block == 0:
                kernel(f"{name}.downsample.0", 1, size, size)
                norm(f"{name}.downsample.1")
    for level in range(4):
        kernel(f"head.out_block_{level}.0", 27, size, size)
        norm(f"head.out_block_{level}.1")
        if level:
            kernel(f"head.up_block_{level}.0", 8, size, size)
            norm(f"head.up_block_{level}.1")
            kernel(f"head.up_block_{level}.3", 27, size, size)
            norm(f"head.up_block_{level}.4")
        state[f"head.scales.{level}.scale"] = np.array(rng.uniform(0.5, 0.9), np.float32)
    kernel("head.conv_center", size, 1)
    kernel("head.conv_reg", size, channels)
    kernel("head.conv_cls", size, num_classes)
    state["head.conv_cls.bias"] = rng.uniform(-8, -6, (1, num_classes)).astype(np.float32)
    for name in ("head.conv_reg.kernel", "head.conv_center.kernel"):
        state[name] = state[name] * np.float32(0.5)
    return state


def relu(x):
    return np.maximum(x, 0)


def elu(x):
    return np.where(x > 0, x, np.expm1(x))


def same(x):
    return x


class Network:
    """One pass; `after` collects the running statistics of a training pass."""

    def __init__(self, state, train=False):
        self.state, self.train, self.after = state, train, {}

    def kernel(self, name):
        return np.asarray(self.state[f"{name}.kernel"], np.float64)

    def norm(self, name, scenes, activation):
        weight, bias, mean, var = (
            np.asarray(self.state[f"{name}.bn.{leaf}"], np.float64)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        if self.train:
            rows = np.concatenate([sparse.rows_of(t, len(weight)) for t in scenes])
            batch_mean, batch_var = rows.mean(0), rows.var(0)
            self.after[f"{name}.bn.running_mean"] = 0.9 * mean + 0.1 * batch_mean
            self.after[f"{name}.bn.running_var"] = 0.9 * var + 0.1 * rows.var(0, ddof=1)
            mean, var = batch_mean, batch_var
        scale = weight / np.sqrt(var + 1e-5)
        return [{at: activation((x - mean) * scale + bias) for at, x in t.items()} for t in scenes]

    def conv(self, name, scenes, stride, out_stride=None):
        targets = [set(t) if out_stride is None else sparse.coarsen(t, out_stride) for t in scenes]
        return [
            sparse.convolve(t, self.kernel(name), at, stride) for t, at in zip(scenes, targets, strict=True)
        ]

    def residual(self, name, scenes, stride, strided):
        out = 2 * stride if strided else None
        y = self.norm(f"{name}.norm1", self.conv(f"{name}.conv1", scenes, stride, out), relu)
        y = self.norm(f"{name}.norm2", self.conv(f"{name}.conv2", y, out or stride), same)
        if strided:
            shortcut = self.conv(f"{name}.downsample.0", scenes, stride, out)
            scenes = self.norm(f"{name}.downsample.1", shortcut, same)
        return [{at: relu(a[at] + b[at]) for at in a} for a, b in zip(y, scenes, strict=True)]

    def backbone(self, scenes):
        """(stem, four stages)."""
        x = self.conv("backbone.conv1", scenes, 1, 2)
        for b, t in enumerate(x):
            rows = sparse.rows_of(t)
            scale = self.state["backbone.norm1.weight"][0] / np.sqrt(rows.var(0) + 1e-8)
            x[b] = {
                at: relu((v - rows.mean(0)) * scale + self.state["backbone.norm1.bias"][0])
                for at, v in t.items()
            }
        x = stem = [sparse.max_pool(t, 2, sparse.coarsen(t, 4), 2) for t in x]
        stages, stride = [], 4
        for stage in range(1, 5):
            block = 0
            while f"backbone.layer{stage}.{block}.conv1.kernel" in self.state:
                x = self.residual(f"backbone.layer{stage}.{block}", x, stride, block == 0)
                stride *= 2 if block == 0 else 1
                block += 1
            stages.append(x)
        return stem, stages

    def neck(self, stages, threshold):
        """(features of the levels, fine to coarse; what was pruned, coarse to fine)."""
        kernel, bias = self.kernel("head.conv_cls"), self.state["head.conv_cls.bias"][0]
        x, scores, outputs, prunings = stages[3], None, [], []
        for level in (3, 2, 1, 0):
            stride = STRIDES[level]
            if level < 3:
                up = f"head.up_block_{level + 1}"
                made = [sparse.generate(t, 2, stride) for t in x]
                x = [
                    sparse.convolve_transposed(t, self.kernel(f"{up}.0"), at, stride)
                    for t, at in zip(x, made, strict=True)
                ]
                x = self.norm(f"{up}.1", x, elu)
                x = self.norm(f"{up}.4", self.conv(f"{up}.3", x, stride), elu)
                x = [sparse.add(a, b) for a, b in zip(stages[level], x, strict=True)]
                pruning = SimpleNamespace(score=[], after=[])
                for b, t in enumerate(x):
                    score = {q: float(np.sum(sparse.interpolate(scores[b], 2 * stride, q))) for q in t}
                    order = sorted(t, key=lambda q, s=score: -s[q])
                    gap = [score[q] for q in order[threshold - 1 : threshold + 1]]
                    assert len(gap) < 2 or gap[0] - gap[1] > 1e-5, "the choice must not hang on rounding"
                    x[b] = {q: t[q] for q in order[:threshold]}
                    pruning.score.append(score)
                    pruning.after.append(set(x[b]))
                prunings.append(pruning)
            out = f"head.out_block_{level}"
            y = self.norm(f"{out}.1", self.conv(f"{out}.0", x, stride), elu)
            scores = [{at: np.max(v @ kernel + bias) for at, v in t.items()} for t in y]
            outputs.append(y)
        return outputs[::-1], prunings

    def head(self, levels, voxel_size):
        """Per level and scene: coords, points, bbox, cls, center, in the order of the sorted voxels."""
        found = []
        for n, scenes in enumerate(levels):
            found.append([])
            for t in scenes:
                rows, coords = sparse.rows_of(t), np.array(sorted(t)).reshape(-1, 3)
                box = rows @ self.kernel("head.conv_reg")
                distances = np.exp(box[:, :6] * float(self.state[f"head.scales.{n}.scale"]))
                found[-1].append(
                    SimpleNamespace(
                        coords=coords,
                        points=coords.astype(np.float32) * np.float32(voxel_size),
                        bbox=np.concatenate([distances, box[:, 6:]], 1),
                        cls=rows @ self.kernel("head.conv_cls") + self.state["head.conv_cls.bias"][0],
                        center=(rows @ self.kernel("head.conv_center"))[:, 0],
                    )
                )
        return found


def decode(points, channels):
    """Boxes f64[n, 7], one at a time."""
    boxes = []
    for (x, y, z), row in zip(np.asarray(points, np.float64), np.asarray(channels, np.float64), strict=True):
        a, b, c, d, e, f = row[:6]
        box = [x + (b - a) / 2, y + (d - c) / 2, z + (f - e) / 2, a + b, c + d, e + f, 0.0]
        if len(row) == 8:
            q = np.exp(np.hypot(row[6], row[7]))
            total = a + b + c + d
            box[3], box[4], box[6] = total / (1 + q), total / (1 + q) * q, 0.5 * np.arctan2(row[6], row[7])
        boxes.append(box)
    return np.array(boxes).reshape(-1, 7)


def assign(points, level, rows):
    """Box of each location, -1 none; `rows` f[g, 7]."""
    count = len(rows)
    anchors = SimpleNamespace(xyz=points, mask=np.ones(len(points), bool), level=level)
    boxes = SimpleNamespace(center=rows[:, :3], size=rows[:, 3:6], yaw=rows[:, 6], mask=np.ones(count, bool))
    return assigners.fcaf3d(anchors, boxes)


def losses(points, channels, cls, center, assigned, rows, labels):
    """(centre, box, class) of one scene."""
    positive = np.flatnonzero(assigned >= 0)
    count = max(len(positive), 1)
    label = np.where(assigned >= 0, np.asarray(labels)[np.maximum(assigned, 0)], -1)
    is_class = label[:, None] == np.arange(cls.shape[1])
    p = 1 / (1 + np.exp(-cls))
    p_t, alpha = np.where(is_class, p, 1 - p), np.where(is_class, 0.25, 0.75)
    classes = -np.sum(alpha * (1 - p_t) ** 2 * np.log(p_t)) / count
    boxes = decode(points[positive], channels[positive])
    entropy = weighted = total = 0.0
    for a, box in zip(positive, boxes, strict=True):
        true = np.asarray(rows[assigned[a]], np.float64)
        target, q = assigners.centerness(points[a], true), 1 / (1 + np.exp(-center[a]))
        entropy -= target * np.log(q) + (1 - target) * np.log(1 - q)
        weighted += target * (1 - geometry.iou(box, true, channels.shape[1] == 8))
        total += target
    return entropy / count, weighted / max(total, 1e-6), classes


def detect(levels, rotated, candidates=1000, threshold=0.01, nms_iou=0.5):
    """(boxes, scores, labels) of one scene from its levels; class by class, falling scores."""
    boxes, scores = [], []
    for level in levels:
        score = 1 / (1 + np.exp(-level.cls)) / (1 + np.exp(-level.center))[:, None]
        picked = np.argsort(-score.max(1), kind="stable")[:candidates]
        boxes.append(decode(level.points[picked], level.bbox[picked]))
        scores.append(score[picked])
    boxes, scores = np.concatenate(boxes), np.concatenate(scores)
    found = []

    def overlap(a, b):
        reach = (np.hypot(a[3], a[4]) + np.hypot(b[3], b[4])) / 2
        return geometry.bev_iou(a, b, rotated) if np.hypot(*(a - b)[:2]) < reach else 0.0

    for k in range(scores.shape[1]):
        rows = np.flatnonzero(scores[:, k] > threshold)
        kept = geometry.greedy_nms(boxes[rows], scores[rows, k], nms_iou, overlap)
        found += [(boxes[rows[i]], scores[rows[i], k], k) for i in kept]
    columns = list(zip(*found, strict=True)) or [[], [], []]
    return np.array(columns[0]).reshape(-1, 7), np.array(columns[1]), np.array(columns[2], np.int16)
