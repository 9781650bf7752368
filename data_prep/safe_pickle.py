"""Info files of other projects (.pkl) as plain containers and NumPy arrays; nothing in them is executed."""

import io
import os
import pathlib
import re
from typing import Any

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
