"""The three products behind every sparse convolution, each in two forms.

With the pairs (v, k, u = index[v, k]) of a kernel map: the sum of x[u] @ kernel[k] for each v, the sum of x[v] @ kernel[k] for
each u, and the sum of x[u] y[v]' for each k. Forward and backward passes of a convolution and of its transpose are these.

The dense form multiplies all taps of all rows, absent ones with zeros, in a few large products. The form by pairs walks through
tiles of pairs that share a tap, and is faster on a CPU where few neighbours exist. Maps that list their tiles (see
structs.VoxelLevelConfig) get the second form on a CPU, unless there turn out to be too many pairs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vrdistill_jax.geometry.host.voxels import TOO_MANY_PAIRS
from vrdistill_jax.structs import KernelMap

# Gathered values of one block of rows. A CPU wants them in its cache, a GPU wants few, large products.
BLOCK_VALUES = {"cpu": 2**19}
BLOCK_VALUES_ELSEWHERE = 2**27


def gather_product(
    x: Float[Array, "b w c"], kernel: Float[Array, "k c d"], kernel_map: KernelMap
) -> Float[Array, "b v d"]:
    """y[v] = sum over k of x[index[v, k]] @ kernel[k]."""
    return _choose(
        kernel_map,
        lambda: _sum_pairs(x, kernel, kernel_map, kernel_map.index.shape[1], backwards=False),
        lambda: _gather_blocks(x, kernel, kernel_map.index),
    )


def scatter_product(
    x: Float[Array, "b v c"], kernel: Float[Array, "k c d"], kernel_map: KernelMap
) -> Float[Array, "b w d"]:
    """y[u] = sum over the pairs with u = index[v, k] of x[v] @ kernel[k]."""
    if kernel_map.reverse is None:
        return _choose(
            kernel_map,
            lambda: _sum_pairs(x, kernel, kernel_map, x.shape[1], backwards=True),
            lambda: _gather_blocks(x, kernel[::-1], kernel_map.index),
        )
    return _choose(
        kernel_map,
        lambda: _sum_pairs(x, kernel, kernel_map, kernel_map.reverse.shape[1], backwards=True),
        lambda: _collect_products(x, kernel, kernel_map.reverse),
    )


def kernel_gradient(
    x: Float[Array, "b w c"], y: Float[Array, "b v d"], kernel_map: KernelMap
) -> Float[Array, "k c d"]:
    """The sum over b and v of x[b, index[b, v, k], :, None] * y[b, v, None, :]."""
    return _choose(
        kernel_map,
        lambda: _multiply_pairs(x, y, kernel_map),
        lambda: _multiply_blocks(x, y, kernel_map.index),
    )


def _choose(kernel_map: KernelMap, by_pairs: Callable[[], Array], dense: Callable[[], Array]) -> Array:
    if kernel_map.tiles is None or jax.default_backend() != "cpu":
        return dense()
    return jax.lax.cond(jnp.any(kernel_map.tiles.tap == TOO_MANY_PAIRS), dense, by_pairs)


def _gather_blocks(x, kernel, index):
    """Block after block of rows: gathered neighbours [rows, K * C] times [K * C, D].

    One large product makes up for multiplying by the zeros of absent neighbours, and a block's neighbours fit into the
    processor's cache.
    """
    num_taps, channels, size = kernel.shape
    weight = kernel.reshape(num_taps * channels, size)
    source, blocks = _blocks(x, index)

    def product(block):
        taken = source.at[block].get(mode="promise_in_bounds").reshape(-1, num_taps * channels)
        return taken @ weight

    def product_if_needed(block):
        nothing = jnp.zeros((len(block), size), x.dtype)
        return jax.lax.cond(jnp.any(block < len(source) - 1), product, lambda _: nothing, block)

    y = jax.lax.map(product_if_needed, blocks) if len(blocks) > 1 else product(blocks[0])
    rows = index.shape[0] * index.shape[1]
    return y.reshape(-1, size)[:rows].reshape(*index.shape[:2], size)


def _multiply_blocks(x, y, index):
    num_taps, channels, size = index.shape[2], x.shape[2], y.shape[2]
    source, blocks = _blocks(x, index)
    y = y.reshape(-1, size)
    y = jnp.pad(y, ((0, blocks.shape[0] * blocks.shape[1] - len(y)), (0, 0)))

    def accumulate(total, block):
        block, y = block

        def add(total):
            taken = source.at[block].get(mode="promise_in_bounds").reshape(-1, num_taps * channels)
            return total + y.T @ taken  # a third faster on a CPU than the transpose of it

        return jax.lax.cond(jnp.any(block < len(source) - 1), add, lambda total: total, total), None

    total = jnp.zeros((size, num_taps * channels), x.dtype)
    total, _ = jax.lax.scan(accumulate, total, (blocks, y.reshape(*blocks.shape[:2], size)))
    return total.T.reshape(num_taps, channels, size)


def _blocks(x, index):
    """All scenes as one: rows with a row of zeros at the end, and the index in blocks, absent neighbours pointing there."""
    batch, rows, num_taps = index.shape
    channels, absent = x.shape[2], batch * x.shape[1]
    source = jnp.concatenate([x.reshape(absent, channels), jnp.zeros((1, channels), x.dtype)])
    first = (jnp.arange(batch, dtype=jnp.int32) * x.shape[1])[:, None, None]
    index = jnp.where(index >= 0, index + first, absent).reshape(batch * rows, num_taps)
    limit = BLOCK_VALUES.get(jax.default_backend(), BLOCK_VALUES_ELSEWHERE)
    count = max(1, -(-batch * rows * num_taps * channels // limit))
    size = -(-batch * rows // count)
    index = jnp.pad(index, ((0, count * size - batch * rows), (0, 0)), constant_values=absent)
    return source, index.reshape(count, size, num_taps)


def _collect_products(x, kernel, reverse):
    """Every row times every tap first, then each fine row collects its pairs, of which there are at most 8.

    Scene after scene: the products of one are K times as large as its features.
    """
    num_taps, channels, size = kernel.shape
    weight = jnp.swapaxes(kernel, 0, 1).reshape(channels, num_taps * size)

    def spread(scene):
        x, reverse = scene
        products = (_with_zeros(x) @ weight).reshape(-1, size)
        reverse = jnp.where(reverse >= 0, reverse, len(x) * num_taps)
        slots = [products.at[pair].get(mode="promise_in_bounds") for pair in reverse.T]
        return sum(slots[1:], slots[0])

    return _map_scenes(spread, (x, reverse))


def _sum_pairs(x, kernel, kernel_map, num_rows, backwards):
    """Tile after tile: gather one side of the pairs, multiply with the kernel of their tap, add to the other side."""

    def scene(arrays):
        x, (taps, fine, coarse) = arrays
        source = _with_zeros(x)
        read, write = (coarse, fine) if backwards else (fine, coarse)

        def add(tile, y):
            rows, target = _end_if_none(read[tile], len(x)), _end_if_none(write[tile], num_rows)
            product = source.at[rows].get(mode="promise_in_bounds") @ kernel[taps[tile]]
            # Pairs of one tap have distinct rows on both sides; only pads share the last row, and they add zeros.
            return y.at[target].add(product, mode="promise_in_bounds", unique_indices=True)

        y = jnp.zeros((num_rows + 1, kernel.shape[2]), x.dtype)
        return jax.lax.fori_loop(0, _count_tiles(taps), add, y)[:-1]

    return _map_scenes(scene, (x, kernel_map.tiles))


def _multiply_pairs(x, y, kernel_map):
    num_taps = kernel_map.index.shape[2]

    def scene(arrays):
        x, y, (taps, fine, coarse) = arrays
        fine_rows, coarse_rows = _with_zeros(x), _with_zeros(y)

        def add(tile, total):
            a = fine_rows.at[_end_if_none(fine[tile], len(x))].get(mode="promise_in_bounds")
            b = coarse_rows.at[_end_if_none(coarse[tile], len(y))].get(mode="promise_in_bounds")
            return total.at[taps[tile]].add(a.T @ b)

        total = jnp.zeros((num_taps, x.shape[1], y.shape[1]), x.dtype)
        return jax.lax.fori_loop(0, _count_tiles(taps), add, total)

    return jnp.sum(_map_scenes(scene, (x, y, kernel_map.tiles)), axis=0)


def _end_if_none(rows, end):
    return jnp.where(rows >= 0, rows, end)


def _count_tiles(taps):
    return jnp.sum(taps >= 0, dtype=jnp.int32)


def _with_zeros(x):
    return jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])


def _map_scenes(function, arrays):
    arrays = jax.tree.map(jnp.asarray, arrays)
    if len(arrays[0]) == 1:
        return function(jax.tree.map(lambda array: array[0], arrays))[None]
    return jax.lax.map(function, arrays)
