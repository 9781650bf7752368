"""Farthest point sampling in pure JAX, index for index what the official CUDA kernel gives."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MAX_DISTANCE = 1e10  # the kernel's initial running minimum
# The kernel skips points whose float32 sum is <= the double 1e-3. float32(1e-3) is the next float above it.
NEAR_ORIGIN = np.float32(1e-3)
MAX_THREADS = 512  # block size of the kernel, which decides ties
COLUMN_SIZE = 128  # for speed only


def sample_farthest_points(
    xyz: Float[Array, "n 3"],
    num_samples: int,
    mask: Bool[Array, "n"] | None = None,
    *,
    skip_near_origin: bool = True,
) -> Int[Array, "m"]:
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
      ValueError: if the cloud has no rows or num_samples is not positive.

    Source: pointnet2 `furthest_point_sampling_kernel` (VoteNet, Group-Free-3D, H3DNet, 3DETR).
    """
    if num_samples < 1 or not len(xyz):
        raise ValueError(
            f"num_samples is {num_samples} and the cloud has {len(xyz)} rows; both must be at least 1"
        )
    mask = jnp.ones(len(xyz), bool) if mask is None else mask
    xyz = jax.lax.stop_gradient(jnp.where(mask[:, None], xyz, 0.0))
    # In the order of the kernel's preference, the first maximum is the right one of equals and row 0 the
    # first valid point, where sampling starts and where it returns when every candidate is excluded.
    order = _order_by_tie_priority(mask)
    # Folded to columns of consecutive rows: a maximum per column and an argmax among the columns compile to
    # vector code, and the loop runs over ten times as fast as with an argmax over the flat array.
    columns = -(-len(xyz) // COLUMN_SIZE)
    padding = columns * COLUMN_SIZE - len(xyz)
    points = jnp.pad(xyz[order], ((0, padding), (0, 0)))
    x, y, z = points.reshape(columns, COLUMN_SIZE, 3).transpose(2, 1, 0)
    usable = jnp.pad(mask[order], (0, padding)).reshape(columns, COLUMN_SIZE).T
    if skip_near_origin:
        usable &= sum_of_squares(x, y, z) >= NEAR_ORIGIN
    distance = jnp.where(usable, jnp.float32(MAX_DISTANCE), jnp.float32(-1))

    def pick(step, state):
        distance, last, sample = state
        here = points[last]
        distance = jnp.minimum(distance, sum_of_squares(x - here[0], y - here[1], z - here[2]))
        column = jnp.argmax(distance.max(axis=0))
        last = (column * COLUMN_SIZE + jnp.argmax(distance[:, column])).astype(jnp.int32)
        return distance, last, sample.at[step].set(last)

    start = (distance, jnp.int32(0), jnp.zeros(num_samples, jnp.int32))
    return order[jax.lax.fori_loop(1, num_samples, pick, start)[2]]


def sum_of_squares(x: Float[Array, "*s"], y: Float[Array, "*s"], z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Adds squares as (x^2 + y^2) + z^2, each step rounded to float32.

    XLA's CPU and GPU compilers fuse a product and a sum into one rounding, which moves neighbours over the
    edge of a ball and breaks exact ties. A minimum that never changes a finite value stands between the two
    and prevents it.

    Args:
      x: f32 of any shape.
      y: f32, likewise.
      z: f32, likewise.

    Returns:
      f32 of the same shape.
    """
    largest = np.finfo(np.float32).max
    return (jnp.minimum(x * x, largest) + jnp.minimum(y * y, largest)) + jnp.minimum(z * z, largest)


def _order_by_tie_priority(mask: Bool[Array, "n"]) -> Int[Array, "n"]:
    """Lists the rows in the order in which the kernel prefers them among equals; invalid ones last."""
    rank = jnp.cumsum(mask, dtype=jnp.int32) - 1  # the row in the cloud without masked points
    count = jnp.maximum(rank[-1] + 1, 1)
    threads = jnp.minimum(jnp.int32(1) << (31 - jax.lax.clz(count)), MAX_THREADS)
    thread = rank & (threads - 1)
    # Reversed within nine bits for any T: a factor of 512 / T does not change the order.
    bits = MAX_THREADS.bit_length() - 1
    reversed_thread = sum(((thread >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    return jnp.argsort(jnp.where(mask, reversed_thread, MAX_THREADS), stable=True).astype(jnp.int32)
