"""Sets of voxels in pure JAX: quantisation, coarser and generated sets, kernel maps, interpolation.

A set is a sorted i32[2, capacity] of key words; pads are last and hold PAD. The two words of 30 bits each hold three
coordinates of 20 bits, x highest, in units of the set's stride: without 64-bit integers, sorting by both words sorts by
(x, y, z), and z + 1 is the next key.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.host.voxels import (
    LIMIT,
    TILE_SIZE,
    TOO_MANY_PAIRS,
    reverse_slots,
    tap_range,
    tile_capacity,
)
from vrdistill_jax.structs import PairTiles

BITS = 20
BIAS = 1 << (BITS - 1)
HALF_BITS = BITS // 2  # of the y coordinate in either word
PAD = np.iinfo(np.int32).max


def quantize(
    xyz: Float[Array, "n 3"], mask: Bool[Array, "n"], voxel_size: float
) -> tuple[Int[Array, "n 3"], Bool[Array, ""]]:
    """Finds the voxel of each point.

    Args:
      xyz: f32[n, 3] metres; only valid rows need to be finite.
      mask: bool[n].
      voxel_size: metres.

    Returns:
      i32[n, 3], the floor of the float32 quotient, 0 for masked points; and whether all points lie less than LIMIT
      voxels from the origin (others are moved to voxel 0).

    Source: TR3D and FCAF3D (`coordinates / voxel_size`, floored by MinkowskiEngine).
    """
    xyz = jnp.where(mask[:, None], xyz, 0.0)
    # XLA turns a division by one number into a product with its inverse, which rounds differently; it cannot see that
    # this divisor is one number.
    size = voxel_size + 0.0 * xyz
    scaled = jnp.floor(xyz / size)
    inside = jnp.abs(scaled) < LIMIT
    return jnp.where(inside, scaled, 0.0).astype(jnp.int32), jnp.all(inside)


def keys_from_coords(coords: Int[Array, "*v 3"], mask: Bool[Array, "*#v"]) -> Int[Array, "2 *v"]:
    """Packs coordinates into two words that sort as (x, y, z); PAD where masked."""
    x, y, z = jnp.moveaxis(coords + BIAS, -1, 0)
    low_bits = (1 << HALF_BITS) - 1
    words = jnp.stack([(x << HALF_BITS) | (y >> HALF_BITS), ((y & low_bits) << BITS) | z])
    return jnp.where(mask, words, PAD)


def coords_from_keys(keys: Int[Array, "2 v"]) -> tuple[Int[Array, "v 3"], Bool[Array, "v"]]:
    """Unpacks keys: coordinates i32[v, 3], 0 in pads, and the mask bool[v]."""
    high, low = keys
    mask = high != PAD
    x, z = high >> HALF_BITS, low & ((1 << BITS) - 1)
    y = ((high & ((1 << HALF_BITS) - 1)) << HALF_BITS) | (low >> BITS)
    return jnp.where(mask[:, None], jnp.stack([x, y, z], -1) - BIAS, 0), mask


def unique_voxels(
    keys: Int[Array, "2 n"], capacity: int
) -> tuple[Int[Array, "2 v"], Int[Array, "v"], Int[Array, "n"], Int[Array, ""]]:
    """Collects the distinct keys.

    Args:
      keys: key words in any order; PAD for rows that do not count.
      capacity: v, rows of the result.

    Returns:
      Sorted keys i32[2, v]; the lowest row that holds each of them i32[v], -1 in pads; the row of the result for each
      given key i32[n], -1 for pads; and how many distinct keys there are. If that exceeds the capacity, the rest is
      missing here: the caller has to look.
    """
    count = keys.shape[1]
    row = jnp.arange(count, dtype=jnp.int32)
    high, low, order = jax.lax.sort((keys[0], keys[1], row), num_keys=3)
    valid = high != PAD
    changed = (high != jnp.roll(high, 1)) | (low != jnp.roll(low, 1)) | (row == 0)
    first = valid & changed
    group = jnp.cumsum(first, dtype=jnp.int32) - 1
    target = jnp.where(first, group, capacity)
    unique = jnp.full((2, capacity), PAD, jnp.int32).at[:, target].set(jnp.stack([high, low]), mode="drop")
    lowest = jnp.full(capacity, -1, jnp.int32).at[target].set(order, mode="drop")
    member = jnp.where(valid & (group < capacity), group, -1)
    return unique, lowest, jnp.zeros(count, jnp.int32).at[order].set(member), jnp.sum(first, dtype=jnp.int32)


def coarsen(keys: Int[Array, "2 v"], capacity: int) -> tuple[Int[Array, "2 w"], Int[Array, ""]]:
    """The set of twice the stride (coordinates halved, floor), and how many voxels it needs."""
    coords, mask = coords_from_keys(keys)
    unique, _, _, needed = unique_voxels(keys_from_coords(coords >> 1, mask), capacity)
    return unique, needed


def generate(
    keys: Int[Array, "2 v"], kernel_size: int, capacity: int
) -> tuple[Int[Array, "2 w"], Int[Array, ""]]:
    """The set of half the stride that a generative transposed convolution reaches, and how many voxels it needs.

    Args:
      keys: sorted key words.
      kernel_size: 3 for the fine voxels 2 c + {-1, 0, 1}^3, 2 for 2 c + {0, 1}^3.
      capacity: w.
    """
    coords, mask = coords_from_keys(keys)
    low, size = tap_range(kernel_size)
    offsets = low + np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1).reshape(-1, 3)
    reached = (2 * coords[:, None] + offsets).reshape(-1, 3)
    unique, _, _, needed = unique_voxels(keys_from_coords(reached, jnp.repeat(mask, size**3)), capacity)
    return unique, needed


def match_taps(
    keys: Int[Array, "2 v"], fine: Int[Array, "2 w"], kernel_size: int, stride: int
) -> Int[Array, "v k"]:
    """Finds the voxel under each tap of a kernel.

    Args:
      keys: sorted key words of the rows that the kernel is placed at.
      fine: sorted key words of the set that it reads; `keys` itself for stride 1.
      kernel_size: 2 or 3.
      stride: 1 or 2: tap o of the voxel c reads stride * c + o.

    Returns:
      i32[v, kernel_size^3] rows of `fine`, -1 none; x runs fastest over the taps.

    Source: MinkowskiEngine's order of the kernel.
    """
    coords, mask = coords_from_keys(keys)
    low, size = tap_range(kernel_size)
    columns = np.array([(ix, iy, 0) for iy in range(size) for ix in range(size)]) + low
    starts = keys_from_coords(stride * coords[:, None] + columns, mask[:, None])
    runs = _match_run(fine, starts.reshape(2, -1), size)
    return jnp.swapaxes(runs.reshape(len(mask), size * size, size), 1, 2).reshape(len(mask), size**3)


def _match_run(fine, start, size):
    """Rows of the `size` keys that follow each other along z from `start` on: i32[v, size], -1 none."""
    at = _lower_bound(fine, start)
    steps = jnp.arange(size)
    # The run's voxels are those of the next `size` rows that exist: each is looked for in each of these rows.
    rows = at[:, None] + steps
    words = fine.at[:, rows].get(mode="fill", fill_value=PAD)
    present = (words[0] == start[0][:, None]) & (start[0] != PAD)[:, None]
    gap = words[1] - start[1][:, None]
    hit = present[:, :, None] & (gap[:, :, None] == steps)
    return jnp.max(jnp.where(hit, rows[:, :, None], -1), axis=1)


def _lower_bound(keys, queries):
    """First row of the sorted keys that is not less than each query, by bisection: i32[m]."""
    count = keys.shape[1]

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        words = keys.at[:, middle].get(mode="clip")
        less = (words[0] < queries[0]) | ((words[0] == queries[0]) & (words[1] < queries[1]))
        searching = low < high
        return jnp.where(searching & less, middle + 1, low), jnp.where(searching & ~less, middle, high)

    bounds = jnp.zeros(queries.shape[1], jnp.int32), jnp.full(queries.shape[1], count, jnp.int32)
    return jax.lax.fori_loop(0, count.bit_length(), halve, bounds)[0]


def reverse_taps(index: Int[Array, "v k"], num_fine: int) -> Int[Array, "w r"]:
    """The pairs of a stride-2 map from the finer level's side: i32[w, r] of row * k + tap, -1 none.

    See `vrdistill_jax.geometry.host.voxels.reverse_taps`.
    """
    num_taps = index.shape[1]
    slots = reverse_slots(num_taps)
    width = int(slots.max()) + 1
    target = jnp.where(index >= 0, index * width + slots, num_fine * width)
    pair = jnp.arange(index.size, dtype=jnp.int32)
    reverse = jnp.full(num_fine * width, -1, jnp.int32).at[target.reshape(-1)].set(pair, mode="drop")
    return reverse.reshape(num_fine, width)


def tile_pairs(index: Int[Array, "v k"]) -> PairTiles:
    """Lists the pairs of a map tap by tap, in as many tiles as `tile_capacity` says; all TOO_MANY_PAIRS if they do not fit.

    See `vrdistill_jax.geometry.host.voxels.tile_pairs`.
    """
    num_rows, num_taps = index.shape
    room = tile_capacity(num_rows, num_taps)
    present = index >= 0
    used = -(-jnp.sum(present, axis=0, dtype=jnp.int32) // TILE_SIZE)  # tiles of each tap
    end = jnp.cumsum(used)
    fits = end[-1] <= room
    tile = jnp.arange(room, dtype=jnp.int32)
    tap = jnp.searchsorted(end, tile, side="right").astype(jnp.int32)
    tap = jnp.where(fits, jnp.where(tile < end[-1], tap, -1), TOO_MANY_PAIRS)
    place = (end - used) * TILE_SIZE + jnp.cumsum(present, axis=0, dtype=jnp.int32) - 1
    place = jnp.where(present & fits, place, room * TILE_SIZE)

    def fill(values):
        empty = jnp.full(room * TILE_SIZE, -1, jnp.int32)
        return empty.at[place].set(values, mode="drop").reshape(room, TILE_SIZE)

    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    return PairTiles(tap, fill(index), fill(jnp.broadcast_to(row, index.shape)))


def match_rows(keys: Int[Array, "2 v"], others: Int[Array, "2 w"]) -> Int[Array, "v"]:
    """The row of each key in another sorted set, -1 none and for pads: i32[v]."""
    return _match_run(others, keys, 1)[:, 0]


def find_corners(
    coords: Int[Array, "v 3"], mask: Bool[Array, "v"], stride: int, queries: Float[Array, "m 3"]
) -> tuple[Int[Array, "m 8"], Float[Array, "m 8"]]:
    """Finds the eight lattice points around each query and their trilinear weights.

    Args:
      coords: i32[v, 3] of a level: sorted multiples of the stride, pads last.
      mask: bool[v].
      stride: of the level.
      queries: f32[m, 3] in units of the input voxels, at most LIMIT from the origin.

    Returns:
      i32[m, 8] rows of the level, -1 where no voxel is; f32[m, 8] weights, which sum to one whether or not all eight
      voxels exist: absent ones count as zero.

    Source: MinkowskiEngine `features_at_coordinates`.
    """
    keys = keys_from_coords(coords // stride, mask)
    scaled = queries / stride
    corner = jnp.floor(scaled)
    columns = np.array([(bx, by, 0) for by in (0, 1) for bx in (0, 1)])
    starts = keys_from_coords(corner.astype(jnp.int32)[:, None] + columns, jnp.ones((len(queries), 1), bool))
    runs = _match_run(keys, starts.reshape(2, -1), 2)
    index = jnp.swapaxes(runs.reshape(len(queries), 4, 2), 1, 2).reshape(len(queries), 8)
    bits = np.array([[tap & 1, tap >> 1 & 1, tap >> 2] for tap in range(8)])
    fraction = (scaled - corner)[:, None]
    return index, jnp.prod(jnp.where(bits == 1, fraction, 1.0 - fraction), axis=-1)
