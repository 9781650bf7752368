"""Naive NumPy transcriptions of the point operations: slow, literal, sharing nothing with the package."""

import numpy as np


def sample_farthest_points(xyz, num_samples, mask=None, skip_near_origin=True):
    """The CUDA kernel's threads and tree reduction, step by step, on the cloud without its masked points."""
    xyz = np.asarray(xyz, np.float32)
    valid = np.arange(len(xyz)) if mask is None else np.flatnonzero(mask)
    if not len(valid):
        return np.zeros(num_samples, np.int32)
    points = xyz[valid]
    n = len(points)
    threads = min(max(2 ** int(np.floor(np.log2(n))), 1), 512)
    norm = (points[:, 0] * points[:, 0] + points[:, 1] * points[:, 1]) + points[:, 2] * points[:, 2]
    usable = norm.astype(np.float64) > 1e-3 if skip_near_origin else np.ones(n, bool)
    running = np.full(n, 1e10, np.float32)
    chosen = [0]
    for _ in range(1, num_samples):
        distance = squared_distance(points[chosen[-1]][None], points)[0]
        running = np.where(usable, np.minimum(distance, running), running)
        best = np.full(threads, -1, np.float32)
        index = np.zeros(threads, np.int64)
        for begin in range(0, n, threads):  # every thread scans its own points, lowest first
            rows = np.arange(begin, min(begin + threads, n))
            slot = rows - begin
            better = usable[rows] & (running[rows] > best[slot])
            best[slot[better]], index[slot[better]] = running[rows[better]], rows[better]
        stride = threads // 2
        while stride:
            for t in range(stride):
                if best[t + stride] > best[t]:
                    best[t], index[t] = best[t + stride], index[t + stride]
            stride //= 2
        chosen.append(index[0])
    return valid[np.asarray(chosen)].astype(np.int32)


def query_ball(centers, xyz, radius, num_neighbors, mask=None):
    """The first hits in index order, padded by the first one; the first valid point where there is none."""
    valid = np.arange(len(xyz)) if mask is None else np.flatnonzero(mask)
    out = np.zeros((len(centers), num_neighbors), np.int32)
    if not len(valid):
        return out
    limit = np.float32(radius) * np.float32(radius)
    for row, center in enumerate(centers):
        hits = valid[squared_distance(center[None], xyz[valid])[0] < limit][:num_neighbors]
        out[row] = hits[0] if len(hits) else valid[0]
        out[row, : len(hits)] = hits
    return out


def find_three_nearest(queries, sources, mask=None):
    """The nearest, lower rows first; the first valid source at infinity where there are fewer than three."""
    valid = np.arange(len(sources)) if mask is None else np.flatnonzero(mask)
    index = np.full((len(queries), 3), valid[0] if len(valid) else 0, np.int32)
    distance = np.full((len(queries), 3), np.inf, np.float32)
    for row, query in enumerate(queries):
        d = squared_distance(query[None], sources[valid])[0]
        nearest = np.argsort(d, kind="stable")[:3]
        index[row, : len(nearest)], distance[row, : len(nearest)] = valid[nearest], d[nearest]
    return index, distance


def three_nearest_weight(squared):
    """Inverse distances that sum to one."""
    inverse = 1 / (np.sqrt(squared.astype(np.float64)) + 1e-8)
    total = inverse.sum(-1, keepdims=True)
    return np.divide(inverse, total, out=np.zeros_like(inverse), where=total > 0).astype(np.float32)


def squared_distance(a, b):
    """f32[len(a), len(b)] in the kernels' order of operations, each rounded to float32."""
    d = np.asarray(b, np.float32)[None] - np.asarray(a, np.float32)[:, None]
    return (d[..., 0] * d[..., 0] + d[..., 1] * d[..., 1]) + d[..., 2] * d[..., 2]


def example_clouds(seed=0, sizes=(1, 2, 3, 5, 17, 50, 200, 700)):
    """Yields (name, xyz f32[n, 3]): generic clouds and those on which a careless implementation breaks."""
    random = np.random.default_rng(seed)
    for n in sizes:
        distinct = random.normal(size=(max(n // 4, 1), 3))
        clouds = {
            "random": random.normal(size=(n, 3)),
            "lattice": random.integers(-3, 4, (n, 3)) * 0.25,  # exact ties, distances exactly on a radius
            "duplicated": distinct[random.integers(0, len(distinct), n)],
            "near_origin": random.normal(size=(n, 3)) * 0.03,
            "all_near_origin": random.uniform(-0.01, 0.01, (n, 3)),
            "plane": random.uniform(-4, 4, (n, 3)) * (1, 1, 0),
            "outlier": np.where(np.arange(n)[:, None] == n // 2, 3e4, random.normal(size=(n, 3))),
        }
        for name, xyz in clouds.items():
            yield f"{name}{n}", xyz.astype(np.float32)


def hide_in_garbage(xyz, seed=0, capacity=None):
    """Scatters a cloud over more rows; gives (xyz with NaN and huge pads, mask, row of each point)."""
    random = np.random.default_rng(seed)
    capacity = capacity or 2 * len(xyz) + 5
    rows = np.sort(random.choice(capacity, len(xyz), replace=False))
    padded = np.where(random.random((capacity, 3)) < 0.5, np.nan, 1e20).astype(np.float32)
    padded[rows] = xyz
    mask = np.zeros(capacity, bool)
    mask[rows] = True
    return padded, mask, rows
