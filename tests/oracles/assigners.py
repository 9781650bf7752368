"""Assigners in NumPy, float64, one pair at a time and without padding: i[A] box of each anchor, -1 none."""

import math

import numpy as np
from oracles import boxes as geometry


def rows_of(boxes):
    return np.concatenate([boxes.center, boxes.size, boxes.yaw[:, None]], -1).astype(np.float64)


def real_rows(mask):
    return [int(i) for i in np.flatnonzero(mask)]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def squared_distance(anchors, boxes, g, a):
    return float(((anchors.xyz[a].astype(np.float64) - boxes.center[g]) ** 2).sum())


def iou(anchors, boxes, g, a, rotated=True):
    return geometry.iou(rows_of(boxes)[g], anchors.boxes[a].astype(np.float64), rotated)


def pair_table(anchors, boxes, pair, fill=np.inf):
    """f64[G, A] of pair(g, a) at real pairs."""
    table = np.full((len(boxes.mask), len(anchors.mask)), fill)
    for g in real_rows(boxes.mask):
        for a in real_rows(anchors.mask):
            table[g, a] = pair(g, a)
    return table


def top_k(anchors, boxes, levels, k=6, nearest_of_all=True):
    result = np.full(len(anchors.mask), -1)
    claims: dict[int, list[int]] = {}
    for g in real_rows(boxes.mask):
        near = [
            (squared_distance(anchors, boxes, g, a), a)
            for a in real_rows(anchors.mask)
            if anchors.level[a] == levels[boxes.label[g]]
        ]
        near.sort()
        limit = near[k][0] if len(near) > k else math.inf
        for distance, a in near:
            if distance < limit:
                claims.setdefault(a, []).append(g)
    for a, owners in claims.items():
        owner = min(owners, key=lambda g: squared_distance(anchors, boxes, g, a))
        nearest = min(real_rows(boxes.mask), key=lambda g: squared_distance(anchors, boxes, g, a))
        if owner == nearest or not nearest_of_all:
            result[a] = owner
    return result


def select(cost, counts, conflict="claimants"):
    """Each box claims its cheapest anchors; contested ones go to the cheapest claimant (or box)."""
    claims: dict[int, list[int]] = {}
    for g, row in enumerate(cost):
        possible = sorted((c, a) for a, c in enumerate(row) if np.isfinite(c))
        for _, a in possible[: counts[g]]:
            claims.setdefault(a, []).append(g)
    result = np.full(cost.shape[1], -1)
    for a, owners in claims.items():
        rivals = range(len(cost)) if conflict == "all" and len(owners) > 1 else owners
        result[a] = min(rivals, key=lambda g: (cost[g, a], g))
    return result


def dynamic_count(ious, top):
    return max(int(sum(sorted(ious, reverse=True)[:top])), 1)


def vertices_of(box):
    """Two opposite vertices by their polar form about the centre."""
    x, y, z, w, d, h, yaw = map(float, box)
    radius, angle = 0.5 * math.hypot(w, d), math.atan2(d, w) + yaw
    shift = np.array([radius * math.cos(angle), radius * math.sin(angle), h / 2])
    return np.array([x, y, z]) - shift, np.array([x, y, z]) + shift


def namings_of(box):
    x, y, z, w, d, h, yaw = map(float, box)
    return [
        [x, y, z, w, d, h, yaw],
        [x, y, z, d, w, h, yaw + math.pi / 2],
        [x, y, z, w, d, h, yaw + math.pi],
        [x, y, z, d, w, h, yaw - math.pi / 2],
    ]


def vertex_distance(predicted, true, rotated=True, match="fixed", frame="world"):
    if not rotated or frame == "canonical":
        predicted, true = [*predicted[:6], 0.0], [*true[:6], 0.0]
    names = namings_of(predicted) if match == "min" and rotated and frame != "canonical" else [predicted]
    distances = []
    for box in names:
        ends = zip(vertices_of(box), vertices_of(true), strict=True)
        distances.append(sum(np.linalg.norm(p - t) for p, t in ends))
    if frame == "box":
        x, y = geometry.rotate((predicted[0] - true[0], predicted[1] - true[1]), -true[6])
        predicted = [x, y, predicted[2] - true[2], *predicted[3:6], predicted[6] - true[6]]
        true = [0, 0, 0, *true[3:6], 0]
    return min(distances) / (2 * np.linalg.norm(geometry.enclosing_size(predicted, true)))


def vertex_distance_of_all(predicted, true):
    """Mean over all eight corners."""
    apart = np.linalg.norm(geometry.corners(predicted) - geometry.corners(true), axis=-1).mean()
    return apart / np.linalg.norm(geometry.enclosing_size(predicted, true))


def spota_cost(anchors, boxes, rotated=True, mu=1.0, vertex=True):
    rows = rows_of(boxes)

    def pair(g, a):
        box = anchors.boxes[a].astype(np.float64)
        cost = 1 - geometry.iou(rows[g], box, rotated)
        if vertex:
            cost += vertex_distance(box, rows[g], rotated)
        return (1 - math.exp(-mu * squared_distance(anchors, boxes, g, a))) * cost

    return pair_table(anchors, boxes, pair)


def inside_and_central(anchors, boxes, g, a, radius=2.5):
    point = anchors.xyz[a].astype(np.float64)
    inside = geometry.signed_depth(point, rows_of(boxes)[g]) >= 0
    central = np.abs(point - boxes.center[g]).max() < radius * anchors.stride[a]
    return inside, central


def focal(logit, target, alpha=0.25):
    p = sigmoid(logit)
    return -alpha * (1 - p) ** 2 * np.log(p) if target else -(1 - alpha) * p**2 * np.log(1 - p)


def entropy(logit, target):
    p, target = sigmoid(logit), float(target)
    return -target * np.log(p) - (1 - target) * np.log(1 - p)


def class_cost(anchors, boxes, g, a, loss):
    return sum(loss(z, k == boxes.label[g]) for k, z in enumerate(anchors.class_logits[a]))


def simota(anchors, boxes, align=False, rotated=True):
    place = {
        (g, a): inside_and_central(anchors, boxes, g, a)
        for g in real_rows(boxes.mask)
        for a in real_rows(anchors.mask)
    }
    candidates = {a for (_, a), where in place.items() if any(where)}

    def pair(g, a):
        if a not in candidates:
            return np.inf
        overlap = iou(anchors, boxes, g, a, rotated)
        if align:
            cost = 0.0
            for k, z in enumerate(anchors.class_logits[a]):
                target = overlap if k == boxes.label[g] else 0.0
                cost += (target - sigmoid(z)) ** 2 * entropy(z, target)
        else:
            cost = class_cost(anchors, boxes, g, a, entropy)
        cost -= 3 * math.log(overlap + (1e-7 if align else 1e-8))
        return cost if all(place[g, a]) else cost + 1e3

    cost = pair_table(anchors, boxes, pair)
    counts = np.zeros(len(cost), int)
    for g in real_rows(boxes.mask):
        counts[g] = dynamic_count([iou(anchors, boxes, g, a, rotated) for a in sorted(candidates)], 10)
    return select(cost, counts, "all")


def sinkhorn(cost, supplies, demands, epsilon, iterations):
    """Log-domain Sinkhorn; columns first, so that the rows' marginals hold exactly at the end."""
    f, g = np.zeros(len(supplies)), np.zeros(len(demands))

    def log_sum(table, axis):
        top = table.max(axis, keepdims=True)
        return (top + np.log(np.exp(table - top).sum(axis, keepdims=True))).squeeze(axis)

    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(supplies), np.log(demands)
    for _ in range(iterations):
        g = epsilon * (log_b - log_sum((f[:, None] - cost) / epsilon, 0))
        f = epsilon * (log_a - log_sum((g[None] - cost) / epsilon, 1))
    return np.exp((f[:, None] + g[None] - cost) / epsilon)


def ota(anchors, boxes, epsilon=0.1, iterations=50, rotated=True):
    gts, real = real_rows(boxes.mask), real_rows(anchors.mask)
    cost, counts = np.zeros((len(gts) + 1, len(real))), []
    for i, g in enumerate(gts):
        overlaps = []
        for j, a in enumerate(real):
            overlap = iou(anchors, boxes, g, a, rotated)
            inside = all(inside_and_central(anchors, boxes, g, a))
            cost[i, j] = class_cost(anchors, boxes, g, a, focal)
            cost[i, j] -= 1.5 * math.log(max(overlap, np.finfo(np.float32).eps))
            cost[i, j] += 0 if inside else 1e3
            overlaps.append(overlap * inside)
        counts.append(dynamic_count(overlaps, 20))
    for j, a in enumerate(real):
        cost[-1, j] = sum(focal(z, 0) for z in anchors.class_logits[a])
    supplies = np.array([*counts, len(real) - sum(counts)], np.float64)
    plan = sinkhorn(cost, supplies, np.ones(len(real)), epsilon, iterations)
    owner = (plan / plan.max(1, keepdims=True)).argmax(0)
    result = np.full(len(anchors.mask), -1)
    for j, a in enumerate(real):
        result[a] = gts[owner[j]] if owner[j] < len(gts) else -1
    return result


def centerness(point, box):
    """0 outside; inside the root of the product of smaller over larger face distance, axis by axis."""
    offset = np.asarray(point, np.float64) - box[:3]
    x, y = geometry.rotate(offset[:2], -box[6])
    value = 1.0
    for at, size in zip((x, y, offset[2]), box[3:6], strict=True):
        low, high = size / 2 + at, size / 2 - at
        if min(low, high) <= 0:
            return 0.0
        value *= min(low, high) / max(low, high)
    return math.sqrt(value)


def fcaf3d(anchors, boxes, k=18, min_inside=27):
    claims: dict[int, list[int]] = {}
    rows, levels = rows_of(boxes), sorted({int(n) for n in anchors.level})
    for g in real_rows(boxes.mask):
        inside = {a: centerness(anchors.xyz[a], rows[g]) for a in real_rows(anchors.mask)}
        by_level = [[(c, a) for a, c in inside.items() if c > 0 and anchors.level[a] == n] for n in levels]
        chosen = 0
        while chosen + 1 < len(levels) and min(map(len, by_level[: chosen + 2])) >= min_inside:
            chosen += 1
        best = sorted(by_level[chosen], reverse=True)
        limit = best[k][0] if len(best) > k else -1.0
        for c, a in best:
            if c > limit:
                claims.setdefault(a, []).append(g)
    result = np.full(len(anchors.mask), -1)
    for a, owners in claims.items():
        result[a] = min(owners, key=lambda g: np.prod(rows[g][3:6]))
    return result
