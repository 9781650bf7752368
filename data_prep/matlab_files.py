"""Reads Matlab files (.mat, versions 5 to 7 and the HDF5-based 7.3) as plain values without trusting them.

Versions 5 to 7 are read here and not by scipy.io.loadmat, which crashes the interpreter on some damaged
files.

Source: "MAT-File Level 5 File Format", The MathWorks.
"""

import io
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from vrdistill_jax.data.hdf5_files import HDF5_ERRORS, HDF5Walk
from vrdistill_jax.data.point_tables import expansion_limit, printable

MAX_FILE_BYTES = 1 << 30
MAX_EXPANDED_BYTES = 1 << 32  # variables are compressed; the metadata of SUN RGB-D expands about twentyfold
_MAX_DEPTH = 12  # nesting of structs and cells
_COMPRESSED, _MATRIX = 15, 14  # types of elements in version 5
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _CHAR = 1, 2, 4  # classes of arrays
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_READ_ERRORS = (*HDF5_ERRORS, struct.error, zlib.error)


def read_matlab(
    path: str | os.PathLike, names: Iterable[str], max_bytes: int = MAX_EXPANDED_BYTES
) -> dict[str, Any]:
    """Reads variables of a .mat file; a file holds data only, nothing of it is executed.

    Args:
      path: a file that Matlab or `scipy.io.savemat` wrote.
      names: the variables to read.
      max_bytes: refuses files whose variables take more than this once decompressed; files of which they take
        far more than data compresses to are refused in any case.

    Returns:
      Per name its value with axes of length 1 squeezed: numbers as arrays, text as str, a struct as dict,
      an array of structs or a cell array as list.

    Raises:
      ValueError: if the file is missing, damaged, too large, of another kind, or lacks one of the variables.
    """
    path, names = pathlib.Path(path), list(names)
    data = _read_bytes(path)
    try:
        if data.startswith(b"MATLAB 7.3") or data[512:520] == b"\x89HDF\r\n\x1a\n":
            found = _read_hdf5(data, names)
        elif data[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
            found = _read_version5(data, names, min(max_bytes, expansion_limit(len(data))))
        elif data.startswith(b"# Created by Octave"):
            raise ValueError("Octave saved it as text; save it again in Octave with the option -v7")
        else:
            raise ValueError("it has no header of a Matlab file (version 5 or later)")
    except _READ_ERRORS as error:
        reason = printable(" ".join(str(error).split()), 300) or type(error).__name__
        raise ValueError(f"{path} cannot be read as a Matlab file: {reason}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} holds no variable {missing[0]!r}; is it the right file?")
    return {name: found[name] for name in names}


def structs_from(value: Any) -> list[dict]:
    """Gives the structs of a struct array as `read_matlab` returns it, of one or no element, too.

    Raises:
      ValueError: if the value is something else.
    """
    if isinstance(value, dict):
        return [value]
    if isinstance(value, np.ndarray) and not value.size:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"expected structs, got {type(value).__name__}")
    return value


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path} has {size} bytes, more than {MAX_FILE_BYTES}; is it the right file?")
        if size < 128:
            raise ValueError(f"{path} has {size} bytes only; it is truncated, download it again")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); check the path") from error


def _read_version5(data: bytes, names: list[str], max_bytes: int) -> dict[str, Any]:
    """Reads the named variables, each of them an element of the file, perhaps compressed."""
    order = "<" if data[126:128] == b"IM" else ">"
    found, start, total = {}, 128, 0
    while start < len(data):
        kind, first, last, start = _element(data, start, len(data), order)
        if kind == _COMPRESSED:
            stream = zlib.decompressobj()  # within a limit: no small file may fill the memory
            variable = stream.decompress(data[first:last], max(max_bytes - total, 0) + 1)
            total += len(variable)
            if total > max_bytes:
                raise ValueError(f"its variables take more than {max_bytes} bytes")
            if not stream.eof:
                raise ValueError("a variable is truncated; download the file again")
            kind, first, last, _ = _element(variable, 0, len(variable), order)
        else:
            variable = data
        if kind != _MATRIX:
            raise ValueError(f"unknown element type {kind}")
        name, value = _matrix(variable, first, last, order, 0, names)
        if name in names:
            found[name] = value
    return found


def _element(data: bytes, start: int, end: int, order: str) -> tuple[int, int, int, int]:
    """Gives an element's type, where its data starts and ends, and where the next element starts."""
    if start + 8 > end:
        raise ValueError("the file is truncated or damaged; download it again")
    kind, size = struct.unpack_from(order + "II", data, start)
    if kind >> 16:  # the small form: four bytes of data stand where the size would
        kind, size = kind & 0xFFFF, kind >> 16
        first, following = start + 4, start + 8
        limit = following
    else:
        first, limit = start + 8, end
        padding = 0 if kind == _COMPRESSED else -size % 8
        following = min(start + 8 + size + padding, end)
    if first + size > limit:
        raise ValueError("the file is truncated or damaged; download it again")
    return kind, first, first + size, following


def _matrix(
    data: bytes, start: int, end: int, order: str, depth: int, names: list[str] | None = None
) -> tuple[str, Any]:
    """Reads an array of any class; its value is None if `names` does not hold its name."""
    if start == end:
        return "", np.zeros(0)
    if depth > _MAX_DEPTH:
        raise ValueError(f"structs are nested more than {_MAX_DEPTH} deep")
    parts = []
    for _ in range(3):  # flags, axis lengths, name
        _, first, last, start = _element(data, start, end, order)
        parts.append(data[first:last])
    flags, lengths, text = parts
    name = text.decode("latin-1")
    if names is not None and name not in names:
        return name, None
    class_id = struct.unpack_from(order + "I", flags)[0] & 0xFF
    shape = struct.unpack(f"{order}{len(lengths) // 4}i", lengths)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"an array has the shape {shape[:8]}")
    count = math.prod(shape)
    if class_id == _CELL:
        return name, _values(data, start, end, order, depth, count)
    if class_id == _STRUCT:
        _, first, _, start = _element(data, start, end, order)
        width = struct.unpack_from(order + "i", data, first)[0]
        _, first, last, start = _element(data, start, end, order)
        if not 0 < width <= 64:
            raise ValueError(f"field names of {width} bytes")
        words = (data[place : place + width] for place in range(first, last, width))
        fields = [word.split(b"\0")[0].decode("latin-1") for word in words]
        values = _values(data, start, end, order, depth, count * len(fields)) if fields else []
        rows = [values[place : place + len(fields)] for place in range(0, len(values), len(fields) or 1)]
        structs = [dict(zip(fields, row, strict=True)) for row in rows]
        return name, structs[0] if len(structs) == 1 else structs
    if class_id == _CHAR:
        kind, first, last, _ = _element(data, start, end, order)
        if kind not in _ENCODINGS:
            raise ValueError(f"text of the unknown type {kind}")
        encoding = _ENCODINGS[kind]
        if encoding in ("utf-16", "utf-32"):  # the names with a byte order expect no mark of it
            encoding += "-le" if order == "<" else "-be"
        # Of several rows of text, the columns follow each other: no variable read here has them.
        return name, data[first:last].decode(encoding)
    if class_id not in _CLASSES:
        raise ValueError(f"an array of class {class_id} holds no plain data")
    kind, first, last, _ = _element(data, start, end, order)
    if kind not in _NUMBERS:
        raise ValueError(f"numbers of the unknown type {kind}")
    numbers = np.frombuffer(data[first:last], np.dtype(order + np.dtype(_NUMBERS[kind]).str[1:]))
    if numbers.size != count:
        raise ValueError(f"an array of the shape {shape[:8]} has {numbers.size} values")
    with np.errstate(all="ignore"):  # damaged numbers
        return name, np.squeeze(numbers.astype(_CLASSES[class_id]).reshape(shape, order="F"))


def _values(data: bytes, start: int, end: int, order: str, depth: int, count: int) -> list:
    """Reads the arrays in a cell array or a struct array."""
    if count * 8 > end - start:
        raise ValueError(f"{count} values do not fit into {end - start} bytes")
    values = []
    for _ in range(count):
        kind, first, last, start = _element(data, start, end, order)
        if kind != _MATRIX:
            raise ValueError(f"unknown element type {kind}")
        values.append(_matrix(data, first, last, order, depth + 1)[1])
    return values


def _read_hdf5(data: bytes, names: list[str]) -> dict[str, Any]:
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            "reading .mat files of version 7.3 needs h5py: pip install 'vrdistill-jax[data]'"
        ) from error
    walk = HDF5Walk(len(data))
    with h5py.File(io.BytesIO(data), "r") as file:
        return {
            name: _plain_from_hdf5(file, walk.member(file, name), 0, walk) for name in names if name in file
        }


def _plain_from_hdf5(file: Any, item: Any, depth: int, walk: HDF5Walk) -> Any:
    """Converts a group (struct, struct array) or a data set (numbers, text, cells) of a version 7.3 file."""
    import h5py

    if depth > _MAX_DEPTH:
        raise ValueError(f"structs are nested more than {_MAX_DEPTH} deep")
    if isinstance(item, h5py.Group):
        # The fields of one struct say what they hold; those of a struct array are bare references, one per
        # element.
        fields = walk.members(item)
        if any("MATLAB_class" in field.attrs or isinstance(field, h5py.Group) for field in fields.values()):
            return {name: _plain_from_hdf5(file, field, depth + 1, walk) for name, field in fields.items()}
        columns = {name: _referred(file, field, depth, walk) for name, field in fields.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if item.attrs.get("MATLAB_empty", 0):
        return np.zeros(0)
    if item.dtype == object:
        return _referred(file, item, depth, walk)
    values = walk.read(item)
    if item.attrs.get("MATLAB_class", b"") == b"char":
        return "".join(map(chr, values.ravel().tolist()))
    return np.squeeze(np.transpose(values))  # Matlab stores columns first


def _referred(file: Any, item: Any, depth: int, walk: HDF5Walk) -> list:
    found = []
    for reference in np.ravel(walk.read(item), order="F"):
        walk.count()
        found.append(_plain_from_hdf5(file, file[reference], depth + 1, walk))
    return found
