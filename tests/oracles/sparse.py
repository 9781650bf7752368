"""Naive sparse convolutions on dictionaries {(x, y, z): feature}, sharing nothing with the package.

Coordinates are in units of the input voxels; a tensor of stride s holds multiples of s.
"""

import itertools

import numpy as np


def offsets(kernel_size):
    """Taps in MinkowskiEngine's order: x fastest; odd kernels centred, even ones from 0 on."""
    low = -(kernel_size // 2) if kernel_size % 2 else 0
    axis = range(low, low + kernel_size)
    return [(x, y, z) for z, y, x in itertools.product(axis, axis, axis)]


def voxelize(xyz, mask, voxel_size):
    """{voxel: rows of its points}, rows rising."""
    voxels = {}
    for row in np.flatnonzero(mask):
        scaled = np.asarray(xyz[row], np.float32) / np.float32(voxel_size)
        voxels.setdefault(tuple(int(v) for v in np.floor(scaled)), []).append(int(row))
    return voxels


def coarsen(coords, stride):
    """Coordinates floored to multiples of a stride."""
    return {tuple(int(np.floor(c / stride)) * stride for c in at) for at in coords}


def generate(coords, kernel_size, stride):
    """All that a generative transposed convolution from `coords` to `stride` reaches."""
    return {_plus(at, tap, stride) for at in coords for tap in offsets(kernel_size)}


def convolve(tensor, kernel, targets, stride):
    """`stride` is that of the input; kernel [K, C, D]."""
    kernel_size = round(len(kernel) ** (1 / 3))
    out = {}
    for at in targets:
        total = np.zeros(kernel.shape[2])
        for tap, weight in zip(offsets(kernel_size), kernel, strict=True):
            source = tensor.get(_plus(at, tap, stride))
            if source is not None:
                total += source @ weight
        out[at] = total
    return out


def convolve_transposed(tensor, kernel, targets, stride):
    """`stride` is that of the output."""
    kernel_size = round(len(kernel) ** (1 / 3))
    out = {at: np.zeros(kernel.shape[2]) for at in targets}
    for at, feature in tensor.items():
        for tap, weight in zip(offsets(kernel_size), kernel, strict=True):
            target = _plus(at, tap, stride)
            if target in out:
                out[target] = out[target] + feature @ weight
    return out


def max_pool(tensor, kernel_size, targets, stride):
    """Over the voxels that exist."""
    out = {}
    for at in targets:
        present = [tensor[p] for p in (_plus(at, tap, stride) for tap in offsets(kernel_size)) if p in tensor]
        out[at] = np.max(present, axis=0)
    return out


def add(a, b):
    """Union of the voxels, missing ones count as zero."""
    return {at: a.get(at, 0) + b.get(at, 0) for at in a.keys() | b.keys()}


def interpolate(tensor, stride, query):
    """Trilinear between the eight lattice points; absent ones count as zero."""
    corner = np.floor(np.asarray(query, np.float64) / stride)
    total = 0.0
    for bits in itertools.product((0, 1), repeat=3):
        weight = np.prod([abs(1 - b - (q / stride - c)) for b, q, c in zip(bits, query, corner, strict=True)])
        at = tuple(int(c + b) * stride for c, b in zip(corner, bits, strict=True))
        if at in tensor:
            total = total + weight * tensor[at]
    return total


def kernel_map(targets, sources, kernel_size, stride):
    """i32[len(targets), K] rows of the sorted sources; `stride` is that of the sources."""
    row = {at: i for i, at in enumerate(sorted(sources))}
    taps = offsets(kernel_size)
    found = [[row.get(_plus(at, tap, stride), -1) for tap in taps] for at in sorted(targets)]
    return np.array(found, np.int32).reshape(-1, len(taps))


def rows_of(tensor, width=None):
    """Features in the order of the sorted coordinates."""
    rows = [tensor[at] for at in sorted(tensor)]
    return np.array(rows) if rows else np.zeros((0, width or 1))


def example_clouds(seed=0):
    """Yields (name, xyz f32[n, 3] metres): generic clouds and awkward ones, all around the origin."""
    random = np.random.default_rng(seed)
    yield "one", np.array([[-0.01, 0.26, -3.0]], np.float32)
    for n in (2, 40, 300):
        yield f"random{n}", random.normal(size=(n, 3)).astype(np.float32)
        yield f"dense{n}", random.uniform(-0.25, 0.2, (n, 3)).astype(np.float32)
        yield f"on_faces{n}", (random.integers(-6, 6, (n, 3)) * 0.1).astype(np.float32)
        yield f"plane{n}", (random.uniform(-2, 2, (n, 3)) * (1, 1, 0)).astype(np.float32)
        yield f"apart{n}", (random.normal(size=(n, 3)) * 500).astype(np.float32)
    line = np.zeros((30, 3), np.float32)
    line[:, 2] = np.arange(30) * 0.1 - 1.5
    yield "line", line


def _plus(at, tap, stride):
    return tuple(int(c) + t * stride for c, t in zip(at, tap, strict=True))
