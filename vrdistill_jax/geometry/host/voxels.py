"""Sets of voxels on the host: quantisation, coarser and generated sets, kernel maps.

A set is a sorted array of int64 keys, 21 bits per axis, x highest: sorting by key sorts by (x, y, z). All sets are in
units of their own stride, so that neighbours differ by one. Since the rows of every set are sorted, a kernel map is
found by walking two sets side by side; there is no hash table.
"""

import numba
import numpy as np
from jaxtyping import Bool, Float, Int

from vrdistill_jax.structs import PairTiles

BITS = 21
BIAS = np.int64(1) << (BITS - 1)
FIELD = (np.int64(1) << BITS) - 1
TILE_SIZE = 512  # pairs
TOO_MANY_PAIRS = -2  # the tap of all tiles, where they do not fit
LIMIT = 2**18  # voxels from the origin along an axis; the device version packs 20 bits and needs guard cells


def quantize(
    xyz: Float[np.ndarray, "n 3"], mask: Bool[np.ndarray, "n"], voxel_size: float
) -> Int[np.ndarray, "n 3"]:
    """Finds the voxel of each point.

    Args:
      xyz: f32[n, 3] metres; only valid rows need to be finite.
      mask: bool[n].
      voxel_size: metres.

    Returns:
      i32[n, 3], the floor of the float32 quotient; 0 for masked points.

    Raises:
      ValueError: for a point 2^18 voxels or more from the origin, or one that is not finite.

    Source: TR3D and FCAF3D (`coordinates / voxel_size`, floored by MinkowskiEngine).
    """
    scaled = np.floor(np.where(mask[:, None], xyz, np.float32(0)) / np.float32(voxel_size))
    if not (np.abs(scaled) < LIMIT).all():  # also catches NaN
        raise ValueError(
            f"a point lies {np.abs(scaled).max():g} voxels of {voxel_size} m from the origin, the limit is {LIMIT};"
            " move the cloud towards the origin, remove stray points, or use larger voxels"
        )
    return scaled.astype(np.int32)


def keys_from_coords(coords: Int[np.ndarray, "v 3"]) -> Int[np.ndarray, "v"]:
    """Packs coordinates into keys that sort as (x, y, z)."""
    x, y, z = coords.astype(np.int64).T + BIAS
    return (x << 2 * BITS) | (y << BITS) | z


def coords_from_keys(keys: Int[np.ndarray, "v"]) -> Int[np.ndarray, "v 3"]:
    """Unpacks keys: i32[v, 3]."""
    fields = np.stack([keys >> 2 * BITS, (keys >> BITS) & FIELD, keys & FIELD], axis=1)
    return (fields - BIAS).astype(np.int32)


def unique_voxels(
    coords: Int[np.ndarray, "n 3"], mask: Bool[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "v"], Int[np.ndarray, "v"], Int[np.ndarray, "n"]]:
    """Collects the voxels that hold valid points.

    Args:
      coords: i32[n, 3] voxel of each point.
      mask: bool[n].

    Returns:
      Sorted keys i64[v], the lowest row among the points of each voxel i32[v], and the voxel of each point i32[n]
      (-1 for masked ones).
    """
    rows = np.flatnonzero(mask)
    keys = keys_from_coords(coords[rows])
    order = np.argsort(keys)  # not stable, which is faster; the lowest row is searched for below
    return _group(keys, rows, order, len(coords))


@numba.njit(cache=True, nogil=True)
def _group(keys, rows, order, num_points):
    unique = np.empty(len(keys), np.int64)
    lowest = np.empty(len(keys), np.int32)
    voxel_index = np.full(num_points, np.int32(-1), np.int32)
    count = 0
    for i in order:
        if count == 0 or keys[i] != unique[count - 1]:
            unique[count] = keys[i]
            lowest[count] = rows[i]
            count += 1
        lowest[count - 1] = min(lowest[count - 1], rows[i])
        voxel_index[rows[i]] = count - 1
    return unique[:count].copy(), lowest[:count].copy(), voxel_index


def coarsen(keys: Int[np.ndarray, "v"]) -> Int[np.ndarray, "w"]:
    """The set of twice the stride: coordinates halved (floor), each once."""
    return _drop_repeats(np.sort(_halve(keys)))


def generate(keys: Int[np.ndarray, "v"], kernel_size: int) -> Int[np.ndarray, "w"]:
    """The set of half the stride that a generative transposed convolution reaches.

    Args:
      keys: sorted i64[v].
      kernel_size: 3 for the fine voxels 2 c + {-1, 0, 1}^3, 2 for 2 c + {0, 1}^3.

    Returns:
      Sorted keys i64[w].
    """
    return _drop_repeats(np.sort(_spread(keys, *tap_range(kernel_size))))


def tap_range(kernel_size: int) -> tuple[int, int]:
    """Lowest offset and number of offsets along an axis: (-1, 3) or (0, 2).

    Source: MinkowskiEngine: odd kernels are centred, even ones start at the voxel itself.
    """
    if kernel_size not in (2, 3):
        raise ValueError(f"kernel_size is {kernel_size}; 2 and 3 exist")
    return (-1, 3) if kernel_size == 3 else (0, 2)


@numba.njit(cache=True, nogil=True)
def _halve(keys):
    """Coordinates halved; runs of equal results (neighbours along z) are written once."""
    out = np.empty(len(keys), np.int64)
    count = 0
    half = BIAS >> 1  # (c + BIAS) >> 1 is floor(c / 2) + BIAS / 2
    for key in keys:
        x, y, z = key >> (2 * BITS), (key >> BITS) & FIELD, key & FIELD
        parent = (((x >> 1) + half) << (2 * BITS)) | (((y >> 1) + half) << BITS) | ((z >> 1) + half)
        if count == 0 or out[count - 1] != parent:
            out[count] = parent
            count += 1
    return out[:count]


@numba.njit(cache=True, nogil=True)
def _spread(keys, low, size):
    out = np.empty(len(keys) * size**3, np.int64)
    count = 0
    for key in keys:
        corner = _doubled(key, low, low, low)
        for ox in range(size):
            for oy in range(size):
                start = corner + (np.int64(ox) << (2 * BITS)) + (np.int64(oy) << BITS)
                for oz in range(size):
                    out[count] = start + oz
                    count += 1
    return out


@numba.njit(cache=True, nogil=True, inline="always")
def _doubled(key, ox, oy, oz):
    """The key at 2 c + o."""
    x, y, z = key >> (2 * BITS), (key >> BITS) & FIELD, key & FIELD
    x, y, z = 2 * x - BIAS + ox, 2 * y - BIAS + oy, 2 * z - BIAS + oz
    return (x << (2 * BITS)) | (y << BITS) | z


@numba.njit(cache=True, nogil=True)
def _drop_repeats(keys):
    count = 0
    for key in keys:
        if count == 0 or key != keys[count - 1]:
            keys[count] = key
            count += 1
    return keys[:count].copy()


def match_taps(
    keys: Int[np.ndarray, "v"], fine: Int[np.ndarray, "w"], kernel_size: int, stride: int
) -> Int[np.ndarray, "v k"]:
    """Finds the voxel under each tap of a kernel.

    Args:
      keys: sorted keys of the rows that the kernel is placed at.
      fine: sorted keys of the set that it reads; `keys` itself for stride 1.
      kernel_size: 2 or 3.
      stride: 1 or 2: tap o of the voxel c reads stride * c + o.

    Returns:
      i32[v, kernel_size^3] rows of `fine`, -1 none; x runs fastest over the taps.

    Source: MinkowskiEngine's order of the kernel.
    """
    return _match_taps(keys, fine, *tap_range(kernel_size), stride == 2)


@numba.njit(cache=True, nogil=True)
def _match_taps(keys, fine, low, size, double):
    count = len(fine)
    index = np.full((len(keys), size**3), np.int32(-1), np.int32)
    for ix in range(size):
        for iy in range(size):
            shift = (np.int64(ix + low) << (2 * BITS)) + (np.int64(iy + low) << BITS) + low
            first = ix + size * iy
            at = 0
            for row in range(len(keys)):
                # The taps along z lie one after another; those of the next row come later, for keys rise.
                key = (_doubled(keys[row], 0, 0, 0) if double else keys[row]) + shift
                while at < count and fine[at] < key:
                    at += 1
                hit = at
                while hit < count and fine[hit] < key + size:
                    index[row, first + size * size * (fine[hit] - key)] = hit
                    hit += 1
    return index


def reverse_taps(index: Int[np.ndarray, "v k"], num_fine: int) -> Int[np.ndarray, "w r"]:
    """The pairs of a stride-2 map from the finer level's side.

    A fine voxel is under one tap of a 2^3 kernel, and under at most two per axis of a 3^3 one: under the taps 0 or +1 of
    its parent and, where its coordinate is odd, under the tap -1 of the next voxel.

    Args:
      index: i32[v, k] of `match_taps` with stride 2.
      num_fine: w.

    Returns:
      i32[w, r] of row * k + tap, -1 none; r is 1 for k = 8 and 8 for k = 27. Slot jx + 2 jy + 4 jz belongs to the
      coarse voxel that lies j further than the parent.
    """
    return _reverse_taps(index, num_fine, reverse_slots(index.shape[1]))


def reverse_slots(num_taps: int) -> Int[np.ndarray, "k"]:
    """The slot of each tap in `reverse_taps`: i32[k]."""
    if num_taps == 8:
        return np.zeros(8, np.int32)
    tap = np.arange(27)
    return ((tap % 3 == 0) + 2 * (tap // 3 % 3 == 0) + 4 * (tap // 9 == 0)).astype(np.int32)


@numba.njit(cache=True, nogil=True)
def _reverse_taps(index, num_fine, slots):
    num_taps = index.shape[1]
    reverse = np.full((num_fine, slots.max() + 1), np.int32(-1), np.int32)
    for row in range(len(index)):
        for tap in range(num_taps):
            if index[row, tap] >= 0:
                reverse[index[row, tap], slots[tap]] = row * num_taps + tap
    return reverse


def match_rows(keys: Int[np.ndarray, "v"], others: Int[np.ndarray, "w"]) -> Int[np.ndarray, "v"]:
    """The row of each key in another sorted set, -1 none: i32[v]."""
    at = np.searchsorted(others, keys)
    found = at < len(others)
    found[found] = others[at[found]] == keys[found]
    return np.where(found, at, -1).astype(np.int32)


def tile_pairs(index: Int[np.ndarray, "v k"]) -> PairTiles:
    """Lists the pairs of a map tap by tap.

    Args:
      index: i32[v, k] of `match_taps`.

    Returns:
      PairTiles without a batch axis: i32[s], i32[s, TILE_SIZE] twice; rows rise within a tap, and the pads (-1) of a tap
      come at its end.
    """
    return PairTiles(*_tile_pairs(index, TILE_SIZE))


@numba.njit(cache=True, nogil=True)
def _tile_pairs(index, tile_size):
    num_rows, num_taps = index.shape
    first = np.zeros(num_taps + 1, np.int64)  # tiles of the taps before
    for row in range(num_rows):
        for tap in range(num_taps):
            first[tap + 1] += index[row, tap] >= 0
    for tap in range(num_taps):
        first[tap + 1] = first[tap] + (first[tap + 1] + tile_size - 1) // tile_size
    tap_of_tile = np.empty(first[num_taps], np.int32)
    for tap in range(num_taps):
        tap_of_tile[first[tap] : first[tap + 1]] = tap
    fine = np.full(first[num_taps] * tile_size, np.int32(-1), np.int32)
    coarse = np.full(first[num_taps] * tile_size, np.int32(-1), np.int32)
    end = first[:-1] * tile_size
    for row in range(num_rows):
        for tap in range(num_taps):
            if index[row, tap] >= 0:
                fine[end[tap]] = index[row, tap]
                coarse[end[tap]] = row
                end[tap] += 1
    return tap_of_tile, fine.reshape(-1, tile_size), coarse.reshape(-1, tile_size)


def tile_capacity(num_rows: int, num_taps: int) -> int:
    """Tiles that a level of so many rows (pads included) has room for: a third of all taps may be present."""
    return -(-num_rows * num_taps // (3 * TILE_SIZE)) + num_taps
