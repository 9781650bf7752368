"""Ball query and three nearest neighbours on the host, with the semantics of the official CUDA kernels."""

import numba
import numpy as np
from jaxtyping import Bool, Float, Int

from vrdistill_jax.geometry.host.sampling import check_cloud

# Cells are a little wider than the radius, so that rounding never puts a neighbour two cells away.
CELL_MARGIN = 1.001


def query_ball(
    centers: Float[np.ndarray, "m 3"],
    xyz: Float[np.ndarray, "n 3"],
    radius: float,
    num_neighbors: int,
    mask: Bool[np.ndarray, "n"] | None = None,
) -> Int[np.ndarray, "m s"]:
    """Finds for each centre the first points, in index order, that lie strictly inside its ball.

    Args:
      centers: f32[m, 3] metres, finite.
      xyz: f32[n, 3] metres; only valid rows need to be finite.
      radius: metres, positive; squared in float32.
      num_neighbors: s, at least 1.
      mask: bool[n], None if all points are valid; others are never found.

    Returns:
      i32[m, s] rows of `xyz`, rising; a ball with fewer points repeats its first one, an empty ball the first
      valid point of the cloud (row 0 where there is none).

    Raises:
      ValueError: if shapes disagree or a size is not positive.

    Source: pointnet2 `query_ball_point_kernel`.
    """
    centers, xyz = check_cloud(centers), check_cloud(xyz, mask)
    if not radius > 0 or num_neighbors < 1:
        raise ValueError(f"radius is {radius} and num_neighbors {num_neighbors}, both must be positive")
    if mask is None or mask.all():
        return _query_ball(centers, xyz, np.float32(radius), num_neighbors)
    valid = np.flatnonzero(mask).astype(np.int32)
    if not len(valid):
        return np.zeros((len(centers), num_neighbors), np.int32)
    return valid[_query_ball(centers, xyz[valid], np.float32(radius), num_neighbors)]


def find_three_nearest(
    queries: Float[np.ndarray, "m 3"],
    sources: Float[np.ndarray, "n 3"],
    mask: Bool[np.ndarray, "n"] | None = None,
) -> tuple[Int[np.ndarray, "m 3"], Float[np.ndarray, "m 3"]]:
    """Finds the three nearest sources of each query, the lower row first among equals.

    Args:
      queries: f32[m, 3] metres, finite.
      sources: f32[n, 3] metres; only valid rows need to be finite.
      mask: bool[n], None if all sources are valid; others are never found.

    Returns:
      i32[m, 3] rows of `sources` and f32[m, 3] squared distances, rising. Where there are fewer than three
      valid sources, the rest is the first valid one (row 0 if there is none) at infinite distance.

    Raises:
      ValueError: if shapes disagree.

    Source: pointnet2 `three_nn_kernel`.
    """
    queries, sources = check_cloud(queries), check_cloud(sources, mask)
    if mask is None or mask.all():
        return _find_three_nearest(queries, sources)
    valid = np.flatnonzero(mask).astype(np.int32)
    if not len(valid):
        return np.zeros((len(queries), 3), np.int32), np.full((len(queries), 3), np.inf, np.float32)
    index, squared = _find_three_nearest(queries, sources[valid])
    return valid[index], squared


@numba.njit(cache=True, nogil=True)
def _sort_into_cells(xyz, edge):
    """Sorts points by the cell of a uniform grid, x fastest, index order inside a cell.

    Returns:
      rows i32[n], start i32[cells + 1], the grid's corner f64[3], its size i64[3], the cell's edge.
    """
    n = len(xyz)
    corner, extent = np.empty(3), np.empty(3)
    for axis in range(3):
        corner[axis] = xyz[:, axis].min()
        extent[axis] = xyz[:, axis].max() - corner[axis]
    # A few far points would ask for a huge, empty grid: wider cells are right as well, only slower.
    while np.prod(np.floor(extent / edge) + 1) > 8 * n + 64:
        edge *= 1.5
    size = (np.floor(extent / edge) + 1).astype(np.int64)
    cell = np.empty(n, np.int64)
    start = np.zeros(size[0] * size[1] * size[2] + 1, np.int32)
    for i in range(n):
        cx = np.int64((xyz[i, 0] - corner[0]) / edge)
        cy = np.int64((xyz[i, 1] - corner[1]) / edge)
        cz = np.int64((xyz[i, 2] - corner[2]) / edge)
        cell[i] = (cz * size[1] + cy) * size[0] + cx
        start[cell[i] + 1] += 1
    start = np.cumsum(start).astype(np.int32)
    end = start[:-1].copy()
    rows = np.empty(n, np.int32)
    for i in range(n):
        rows[end[cell[i]]] = i
        end[cell[i]] += 1
    return rows, start, corner, size, edge


@numba.njit(cache=True, nogil=True)
def _query_ball(centers, xyz, radius, num_neighbors):
    """Marks the hits of the 27 cells around a centre in a bit set, then reads them off in index order."""
    limit = radius * radius
    rows, start, corner, size, edge = _sort_into_cells(xyz, np.float64(radius) * CELL_MARGIN)
    px, py, pz = xyz[rows, 0], xyz[rows, 1], xyz[rows, 2]
    index = np.zeros((len(centers), num_neighbors), np.int32)
    bits = np.zeros((len(xyz) + 63) // 64, np.uint64)
    # An isolated bit times this de Bruijn number has a different top six bits for each of the 64 positions.
    de_bruijn = np.uint64(0x03F79D71B4CB0A89)
    position = np.empty(64, np.int32)
    for bit in range(64):
        position[(de_bruijn << np.uint64(bit)) >> np.uint64(58)] = bit
    first, last = np.empty(3, np.int64), np.empty(3, np.int64)
    for c in range(len(centers)):
        x, y, z = centers[c]
        for axis in range(3):
            # Clamped while still a float: a centre may lie far outside of the cloud.
            at = np.floor((centers[c, axis] - corner[axis]) / edge)
            first[axis] = np.int64(min(max(at - 1.0, 0.0), np.float64(size[axis])))
            last[axis] = np.int64(max(min(at + 1.0, size[axis] - 1.0), -1.0))
        if first[0] <= last[0]:
            for cz in range(first[2], last[2] + 1):
                for cy in range(first[1], last[1] + 1):
                    row = (cz * size[1] + cy) * size[0]
                    for i in range(start[row + first[0]], start[row + last[0] + 1]):
                        dx, dy, dz = px[i] - x, py[i] - y, pz[i] - z
                        hit = np.uint64((dx * dx + dy * dy) + dz * dz < limit)
                        bits[rows[i] >> 6] |= hit << np.uint64(rows[i] & 63)
        found = 0
        for w in range(len(bits)):
            word = bits[w]
            if word == 0:
                continue
            bits[w] = 0
            while word != 0 and found < num_neighbors:
                lowest = word & (~word + np.uint64(1))
                index[c, found] = 64 * w + position[(lowest * de_bruijn) >> np.uint64(58)]
                word ^= lowest
                found += 1
        for s in range(found, num_neighbors):
            index[c, s] = index[c, 0]
    return index


@numba.njit(cache=True, nogil=True)
def _find_three_nearest(queries, sources):
    index = np.zeros((len(queries), 3), np.int32)
    squared = np.full((len(queries), 3), np.inf, np.float32)
    px, py, pz = sources[:, 0].copy(), sources[:, 1].copy(), sources[:, 2].copy()
    infinity = np.float32(np.inf)
    for q in range(len(queries)):
        x, y, z = queries[q]
        d0 = d1 = d2 = infinity
        i0 = i1 = i2 = 0
        for k in range(len(sources)):
            dx, dy, dz = px[k] - x, py[k] - y, pz[k] - z
            d = (dx * dx + dy * dy) + dz * dz
            if d < d2:
                if d < d0:
                    d2, i2, d1, i1, d0, i0 = d1, i1, d0, i0, d, k
                elif d < d1:
                    d2, i2, d1, i1 = d1, i1, d, k
                else:
                    d2, i2 = d, k
        squared[q, 0], squared[q, 1], squared[q, 2] = d0, d1, d2
        index[q, 0], index[q, 1], index[q, 2] = i0, i1, i2
    return index, squared
