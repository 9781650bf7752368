"""Reads HDF5 files of strangers (Keras weights, Matlab 7.3) without following them out of the file or into a flood.

HDF5 is a small file system: a link or a data set may stand for another file or device, a data set may claim any
size, and groups and references may form loops. All of that is refused here.
"""

import math
from typing import Any

import numpy as np

from vrdistill_jax.data.point_tables import expansion_limit

# What h5py raises for damaged files, besides OSError.
HDF5_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)
_FEWEST_ITEMS = 4096
_BYTES_PER_ITEM = 16  # of the file; an item that the file holds only once takes more


class HDF5Walk:
    """Counts what one file has made us read."""

    def __init__(self, file_bytes: int):
        """Takes the file's size.

        Args:
          file_bytes: size of the file, from which the limits follow.
        """
        self._items = _FEWEST_ITEMS + file_bytes // _BYTES_PER_ITEM
        self._limit = self._bytes = expansion_limit(file_bytes)

    def members(self, group: Any) -> dict[str, Any]:
        """Gives the groups and data sets of a group by name.

        Raises:
          ValueError: if one of them lies in another place or file.
        """
        return {name: self.member(group, name) for name in group}

    def member(self, group: Any, name: str) -> Any:
        """Gives one group or data set of a group.

        Raises:
          ValueError: if it is a link to another place or file, or the file holds absurdly many.
        """
        import h5py

        self.count()
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name[:80]!a} is a link to another place or file, which is not followed")
        return group[name]

    def count(self) -> None:
        """Counts one more item.

        Raises:
          ValueError: if there were more than a file of this size can hold.
        """
        self._items -= 1
        if self._items < 0:
            raise ValueError("its groups and references repeat each other without end")

    def read(self, item: Any) -> np.ndarray:
        """Reads a data set.

        Args:
          item: an h5py.Dataset.

        Returns:
          Its values.

        Raises:
          ValueError: if they lie in another file, or take far more memory than the file.
        """
        if item.is_virtual or item.external:
            raise ValueError(f"{str(item.name)[:80]!a} lies in another file, which is not read")
        chunk = math.prod(item.chunks or ()) * item.dtype.itemsize
        if max(math.prod(item.shape or (0,)) * item.dtype.itemsize, chunk) > self._bytes:
            raise ValueError(
                f"{str(item.name)[:80]!a} of shape {item.shape} takes the file beyond {self._limit} bytes"
            )
        self._bytes -= math.prod(item.shape or (0,)) * item.dtype.itemsize
        self.count()
        return item[()]
