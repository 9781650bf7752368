"""Farthest point sampling on the host, index for index what the official CUDA kernel gives."""

import numba
import numpy as np
from jaxtyping import Bool, Float, Int

LEAF_SIZE = 64  # points of a bucket; 32-128 measure alike
MAX_DISTANCE = np.float32(1e10)  # the kernel's initial running minimum
NEAR_ORIGIN = 1e-3  # square metres; the kernel compares its float32 sum with this double
MAX_THREADS = 512  # block size of the kernel, which decides ties


def sample_farthest_points(
    xyz: Float[np.ndarray, "n 3"],
    num_samples: int,
    mask: Bool[np.ndarray, "n"] | None = None,
    *,
    skip_near_origin: bool = True,
) -> Int[np.ndarray, "m"]:
    """Picks points one by one, each the farthest from those before, starting with the first valid point.

    A masked cloud gives the same points as the cloud without its masked points. Where nothing can be picked,
    the first valid point is repeated. Among equally far points the kernel's order decides: with n valid
    points and T = clamp(2^floor(log2 n), 1, 512), the smallest bit-reversed (k mod T), then the smallest k.

    Args:
      xyz: f32[n, 3] metres; only valid rows need to be finite.
      num_samples: m, at least 1; may exceed n.
      mask: bool[n], None if all points are valid.
      skip_near_origin: never pick a point with x^2 + y^2 + z^2 <= 1e-3, except as the first.

    Returns:
      i32[m] rows of `xyz`; zeros if no point is valid.

    Raises:
      ValueError: if shapes disagree or a size is not positive.

    Source: pointnet2 `furthest_point_sampling_kernel` (VoteNet, Group-Free-3D, H3DNet, 3DETR).
    """
    xyz = check_cloud(xyz, mask)
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, must be at least 1")
    if mask is None or mask.all():
        return _sample(xyz, num_samples, skip_near_origin)
    valid = np.flatnonzero(mask).astype(np.int32)
    if not len(valid):
        return np.zeros(num_samples, np.int32)
    return valid[_sample(xyz[valid], num_samples, skip_near_origin)]


def check_cloud(xyz: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Returns a cloud as contiguous float32 [n, 3], or raises a ValueError that names what is wrong."""
    if xyz.ndim != 2 or xyz.shape[1] != 3 or not len(xyz):
        raise ValueError(f"a cloud has shape {xyz.shape}, expected (n, 3) with n >= 1")
    if mask is not None and (mask.shape != xyz.shape[:1] or mask.dtype != np.bool_):
        raise ValueError(f"a mask is {mask.dtype}{list(mask.shape)}, expected bool[{len(xyz)}]")
    return np.ascontiguousarray(xyz, np.float32)


@numba.njit(cache=True, nogil=True)
def _order_by_tie_priority(n):
    """Lists the rows in the order in which the kernel prefers them among equals.

    The kernel's threads scan k, k + T, ... and keep the first maximum; its tree reduction then keeps the
    lower slot of each pair, first of halves, last of neighbours, which ranks the threads by their
    bit-reversed number.
    """
    bits = 0
    while 2 << bits <= min(n, MAX_THREADS):
        bits += 1
    threads = 1 << bits
    order = np.empty(n, np.int32)
    filled = 0
    for slot in range(threads):
        thread = 0
        for bit in range(bits):
            thread |= ((slot >> bit) & 1) << (bits - 1 - bit)
        for k in range(thread, n, threads):
            order[filled] = k
            filled += 1
    return order


@numba.njit(cache=True, nogil=True)
def _split_into_buckets(xyz, rows):
    """Sorts `rows` in place into boxes of at most LEAF_SIZE points (more if they coincide), keeping order.

    Returns:
      start [buckets + 1], low [3, buckets] and high [3, buckets] of each box.
    """
    n = len(rows)
    start = np.empty(n + 1, np.int32)
    low, high = np.empty((3, n), np.float32), np.empty((3, n), np.float32)
    moved = np.empty(n, np.int32)
    stack = np.empty(n + 1, np.int32)  # ends of the open segments; each is the beginning of the one below it
    stack[0] = n
    depth, begin, count = 1, 0, 0
    corner_low, corner_high = np.empty(3, np.float32), np.empty(3, np.float32)
    while depth:
        end = stack[depth - 1]
        for axis in range(3):
            smallest = largest = xyz[rows[begin], axis]
            for i in range(begin + 1, end):
                value = xyz[rows[i], axis]
                smallest, largest = min(smallest, value), max(largest, value)
            corner_low[axis], corner_high[axis] = smallest, largest
        widest = np.argmax(corner_high - corner_low)
        if end - begin <= LEAF_SIZE or corner_low[widest] == corner_high[widest]:
            start[count], low[:, count], high[:, count] = begin, corner_low, corner_high
            count += 1
            begin = end
            depth -= 1
            continue
        middle = np.float32(0.5) * (corner_low[widest] + corner_high[widest])
        if (
            not middle > corner_low[widest]
        ):  # rounded onto the lower face, which would leave the left side empty
            middle = corner_high[widest]
        left, right = begin, 0
        for i in range(begin, end):
            row = rows[i]
            if xyz[row, widest] < middle:
                rows[left] = row
                left += 1
            else:
                moved[right] = row
                right += 1
        rows[left:end] = moved[:right]
        stack[depth] = left
        depth += 1
    start[count] = n
    return start[: count + 1], low[:, :count].copy(), high[:, :count].copy()


@numba.njit(cache=True, nogil=True)
def _sample(xyz, num_samples, skip_near_origin):
    """Exact sampling that looks only into buckets which the new point can change."""
    sample = np.zeros(num_samples, np.int32)
    rows = _order_by_tie_priority(len(xyz))
    rank = np.empty(len(xyz), np.int32)
    kept = 0
    for i in range(len(rows)):
        row = rows[i]
        rank[row] = i
        x, y, z = xyz[row]
        if not skip_near_origin or np.float64((x * x + y * y) + z * z) > NEAR_ORIGIN:
            rows[kept] = row
            kept += 1
    if kept == 0:
        return sample
    rows = rows[:kept]
    start, low, high = _split_into_buckets(xyz, rows)
    buckets = len(start) - 1
    px, py, pz = xyz[rows, 0], xyz[rows, 1], xyz[rows, 2]
    distance = np.full(kept, MAX_DISTANCE, np.float32)
    best = np.full(buckets, MAX_DISTANCE, np.float32)  # of each bucket
    best_at = start[:-1].copy()
    bound = np.empty(buckets, np.float32)
    zero = np.float32(0)
    for s in range(1, num_samples):
        x, y, z = xyz[sample[s - 1]]
        for b in range(buckets):
            # The nearest point of the box. Float32 rounding is monotone: with the same order of operations
            # this never exceeds the distance computed for a point inside, and needs no safety margin.
            dx = max(max(low[0, b] - x, x - high[0, b]), zero)
            dy = max(max(low[1, b] - y, y - high[1, b]), zero)
            dz = max(max(low[2, b] - z, z - high[2, b]), zero)
            bound[b] = (dx * dx + dy * dy) + dz * dz
        farthest = np.float32(-1)
        chosen = 0
        for b in range(buckets):
            if bound[b] < best[b]:
                begin, end = start[b], start[b + 1]
                for i in range(begin, end):
                    dx, dy, dz = px[i] - x, py[i] - y, pz[i] - z
                    d = (dx * dx + dy * dy) + dz * dz
                    distance[i] = d if d < distance[i] else distance[i]
                largest, at = distance[begin], begin
                for i in range(begin + 1, end):
                    if distance[i] > largest:
                        largest, at = distance[i], i
                best[b], best_at[b] = largest, at
            if best[b] > farthest:
                farthest, chosen = best[b], rows[best_at[b]]
            elif best[b] == farthest and rank[rows[best_at[b]]] < rank[chosen]:
                chosen = rows[best_at[b]]
        sample[s] = chosen
    return sample
