"""Info files of other projects (.pkl) as plain containers and NumPy arrays; nothing in them is executed."""

import io
import os
import pathlib
import re
from typing import Any

import numpy as np

from vrdistill_jax.data.point_tables import printable
from vrdistill_jax.interop.inert_pickle import (
    CheckpointFileError,
    Constructor,
    NumpyType,
    UnsafeCheckpointError,
    base_symbols,
    read_pickle,
)

MAX_FILE_BYTES = 2 << 30
MAX_ROWS = 16_000  # of a list of numbers
_TEXT = re.compile(r"[<>=|]?[US]\d{1,4}")


class InfoFileError(ValueError):
    """An info file that cannot be used: names the file, what is wrong and what to do."""

    def __init__(self, path: str | os.PathLike, problem: str, remedy: str):
        super().__init__(printable(f"{os.fspath(path)}: {problem}; {remedy}"))


def read_info_pickle(path: str | os.PathLike) -> Any:
    """Reads a pickle of dictionaries, lists, strings, numbers and arrays of numbers or text.

    Args:
      path: the .pkl file.

    Returns:
      The object.

    Raises:
      InfoFileError: if the file is missing, damaged, too large, or names anything but plain containers and
        NumPy arrays. None of its content is executed in any case.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InfoFileError(path, f"{size} bytes, more than {MAX_FILE_BYTES}", "it is no info file")
        data = path.read_bytes()
    except OSError as error:
        raise InfoFileError(path, f"cannot be read ({error.strerror or error})", "check the path") from error
    symbols = base_symbols()
    symbols["numpy", "dtype"] = Constructor("numpy.dtype", _numeric_or_text_type(symbols))
    try:
        return read_pickle(io.BytesIO(data), symbols)
    except UnsafeCheckpointError as error:
        reason = _reason(error).removesuffix(", which is not on the list of harmless types")
        raise InfoFileError(
            path, f"{reason}, which an info file does not need", "nothing of it was executed; make it again"
        ) from error
    except (CheckpointFileError, RecursionError, MemoryError) as error:
        reason = _reason(error)
        many = "opcodes" in reason or "memory" in reason
        remedy = "make it again without camera images" if many else "copy the info file again"
        raise InfoFileError(path, reason, remedy) from error


def numbers_from_pickle(values: Any) -> np.ndarray:
    """Makes an array of numbers in at most two levels of lists.

    NumPy would follow any nesting, and a pickle of a few bytes can hold a list that has no end or takes years to
    walk.

    Args:
      values: of a pickle: an array, a list of numbers, or a list of rows.

    Returns:
      f64 array; it may hold NaN and infinity.

    Raises:
      TypeError or ValueError: if they are anything else, or rows of different lengths.
    """
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiub":
            raise TypeError(f"values of type {values.dtype}")
    else:
        values = [row.tolist() if isinstance(row, np.ndarray) else row for row in _listed(values)]
        numbers = [
            number for row in values for number in (_listed(row) if isinstance(row, list | tuple) else [row])
        ]
        if not all(isinstance(number, int | float | np.number) for number in numbers):
            raise TypeError("nested too deep, or no numbers")
    with np.errstate(all="ignore"):  # damaged numbers
        return np.array(values, np.float64)


def describe_value(value: Any) -> str:
    """Shows a value of a pickle in a message: plain ones as they are, structures, which may be endless, by type."""
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, bool | float | np.number) or (isinstance(value, int) and value.bit_length() < 128):
        return repr(value)
    return f"<{type(value).__name__}>"


def _listed(values: Any) -> list | tuple:
    if not isinstance(values, list | tuple) or len(values) > MAX_ROWS:
        raise TypeError(f"a {type(values).__name__} instead of a list of at most {MAX_ROWS} numbers")
    return values


def _reason(error: BaseException) -> str:
    text = str(error).partition(";")[0] or type(error).__name__
    return text.replace("the checkpoint's pickle", "the pickle").replace("the checkpoint", "the file")


def _numeric_or_text_type(symbols: dict) -> Any:
    """Checkpoints hold numbers only; info files keep class names in arrays of text."""
    numeric = symbols["numpy", "dtype"].build

    def build(code: Any, *rest: Any) -> Any:
        if isinstance(code, str) and _TEXT.fullmatch(code):
            return NumpyType(code.lstrip("<>=|"))
        return numeric(code, *rest)

    return build
