"""Data parallelism: the only file that names pmap.

The state has no device axis: it goes in whole (`in_axes=None`) and comes out whole (`out_axes=None`), so that it can be
saved, restored and inspected without unreplicating, on any number of devices. Several hosts work the same way after
`jax.distributed.initialize`.
"""

from collections.abc import Callable
from typing import Any

import jax

AXIS = "devices"


def map_train_step(step: Callable, devices: list | None = None, num_constants: int = 0) -> Callable:
    """Runs a per-device train step on all devices at once.

    Args:
      step: step(state, batch, key, *constants), built with axis_name=AXIS.
      devices: the devices to use; None for all.
      num_constants: how many further arguments, the same on all devices, the step takes (a teacher's weights).

    Returns:
      The same function of a whole batch; the leading axis of each array in it must divide by the number of devices.
    """
    in_axes = (None, 0, None, *[None] * num_constants)
    mapped = jax.pmap(
        step, axis_name=AXIS, in_axes=in_axes, out_axes=None, donate_argnums=(0,), devices=devices
    )
    count = len(devices) if devices is not None else jax.local_device_count()
    return lambda state, batch, key, *constants: mapped(state, split_batch(batch, count), key, *constants)


def split_batch(batch: Any, count: int) -> Any:
    """Reshapes [B, ...] to [count, B / count, ...].

    Raises:
      ValueError: if the batch does not divide.
    """

    def split(x):
        if x.shape[0] % count:
            raise ValueError(
                f"a batch of {x.shape[0]} scenes does not divide over {count} devices; choose config.train.batch_size as a "
                f"multiple of {count}"
            )
        return x.reshape(count, x.shape[0] // count, *x.shape[1:])

    return jax.tree.map(split, batch)
