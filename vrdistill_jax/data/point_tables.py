"""PLY and NumPy files as raw tables, read without trust.

Nothing is unpickled, and the sizes that a header claims are compared with the size of the file before
memory is allocated. Whatever is wrong comes out as one `PointFileError` that says what to do. What the
columns mean is decided in `point_files`.
"""

import itertools
import os
import pathlib
import re
import struct
import warnings
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

MAX_ARRAY_BYTES = 2 << 30  # a compressed archive of a few kB can claim any size
MAX_HEADER_BYTES = 1 << 20

_PLY_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "long": "i8",
    "ulong": "u8",
    "float": "f4",
    "double": "f8",
    **{f"{name}{8 * size}": f"{name[0]}{size}" for name in ("int", "uint") for size in (1, 2, 4, 8)},
    **{f"float{8 * size}": f"f{size}" for size in (4, 8)},
}
_STRUCT_CODES = dict(
    zip(("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"), "bBhHiIqQfd", strict=True)
)
_NPY_HEADER = re.compile(
    r"\{\s*'descr':\s*(?P<descr>'[^']*'|\[.*\]),\s*'fortran_order':\s*(?P<fortran>True|False),"
    r"\s*'shape':\s*\((?P<shape>[0-9L, ]*)\),?\s*\}\s*",
    re.ASCII,
)
_NPY_SCALAR = re.compile(r"[<>=|]?[biuf][1248]", re.ASCII)
_NPY_FIELD = re.compile(r"\(\s*'(\w+)',\s*'([<>=|]?[biuf][1248])'\s*\)", re.ASCII)


class PointFileError(ValueError):
    """A scan that cannot be read: names the file, what is wrong and what to do."""

    def __init__(self, path: str | os.PathLike, problem: str, remedy: str):
        super().__init__(printable(f"{os.fspath(path)}: {problem}; {remedy}"))


def printable(text: str, longest: int = 2000) -> str:
    """Makes a message out of text that a stranger's file may have a part in.

    Args:
      text: may hold control characters (which a terminal would obey) and halves of surrogate pairs (which cannot
        be printed at all).
      longest: characters; longer text loses its middle.

    Returns:
      One line in which both are written as escapes.
    """
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} ... {text[-longest // 4 :]}"
    if text.isprintable():
        return text
    shown = (c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
    return "".join(shown)


def expansion_limit(packed_bytes: int) -> int:
    """How many bytes a compressed file may take once unpacked.

    Args:
      packed_bytes: size of the file.

    Returns:
      32 MiB and 64 times the file: measured data packs to a tenth at best, and only bombs to a thousandth.
    """
    return (32 << 20) + 64 * packed_bytes


class _PlyElement(NamedTuple):
    name: str
    rows: int
    properties: list[
        tuple[str, str, str | None]
    ]  # name, type, type of the list's length or None for a scalar

    @property
    def has_list(self) -> bool:
        return any(length is not None for _, _, length in self.properties)

    def dtype(self, order: str) -> np.dtype:
        # Fields are numbered, because a file may use a name twice.
        return np.dtype([(f"p{i}", order + kind) for i, (_, kind, _) in enumerate(self.properties)])


class PlyTable(NamedTuple):
    """The vertices of a PLY file."""

    columns: dict[str, np.ndarray]  # of the names asked for, those that the file has
    kinds: dict[str, str]  # the type that the header gives them, such as "u1"
    layout: str
    warnings: list[str]


def read_ply_table(path: pathlib.Path, stream: BinaryIO, size: int, names: tuple[str, ...]) -> PlyTable:
    """Reads scalar properties of the `vertex` element of a PLY file, ASCII or binary of either byte order.

    Args:
      path: the file's name, for messages.
      stream: the file, at its start.
      size: bytes in the file.
      names: lower-case properties to return; others are passed over.

    Returns:
      The columns, each of as many rows as there are vertices.

    Raises:
      PointFileError: if the file is not a PLY, is truncated or contradicts its header.
    """
    order, elements = _read_ply_header(path, stream)
    found = [element.name for element in elements]
    if "vertex" not in found:
        has = ", ".join(found[:20]) or "none"
        raise PointFileError(
            path, f"has no vertex element (it has: {has})", "export it as a point cloud or mesh"
        )
    row = found.index("vertex")
    vertex = elements[row]
    wanted = {
        name: i for i, (name, _, length) in enumerate(vertex.properties) if name in names and length is None
    }
    if not {"x", "y", "z"} <= wanted.keys():
        has = ", ".join(name for name, _, _ in vertex.properties[:20]) or "nothing"
        raise PointFileError(
            path, f"the vertices have no x, y, z (they have: {has})", "export it with positions"
        )
    if vertex.rows == 0:
        raise PointFileError(path, "holds 0 points", "export it again")
    notes: list[str] = []
    if order == "ascii":
        values = _read_ply_ascii(path, stream, size, elements[:row], vertex, list(wanted.values()))
    else:
        for element in elements[:row]:
            _skip_ply_rows(path, stream, size, element, order)
        values = _read_ply_binary(path, stream, size, vertex, list(wanted.values()), order)
        after = elements[row + 1 :]
        left = size - stream.tell() - sum(element.rows * element.dtype(order).itemsize for element in after)
        if left > 0 and not any(element.has_list for element in after):
            notes.append(f"{left} bytes follow the data that the header announces; its counts may be wrong")
    return PlyTable(
        columns=dict(zip(wanted, values, strict=True)),
        kinds={name: vertex.properties[i][1] for name, i in wanted.items()},
        layout={"ascii": "ASCII", "<": "binary little endian", ">": "binary big endian"}[order],
        warnings=notes,
    )


def _read_ply_header(path: pathlib.Path, stream: BinaryIO) -> tuple[str, list[_PlyElement]]:
    remedy = "export the scan again as PLY"
    start = stream.read(16)
    if not re.match(rb"ply[ \t]*\r?\n", start):
        known = {
            b"\x93NUMPY": " but a NumPy .npy",
            b"PK": " but a .npz or zip archive",
            b"# .PCD": " but a PCD",
            b"version ": " but a git-lfs pointer",
        }
        what = next((text for magic, text in known.items() if start.startswith(magic)), "")
        raise PointFileError(path, f"is not a PLY file{what} (it starts with {start[:12]!r})", remedy)
    stream.seek(0)
    header = stream.read(MAX_HEADER_BYTES)
    end = re.search(rb"(?:^|\n)end_header[ \t]*\r?\n", header)
    if end is None:
        raise PointFileError(path, "the PLY header has no end_header line (truncated?)", remedy)
    stream.seek(end.end())
    order, elements = "", []
    for number, line in enumerate(header[: end.start()].decode("latin-1").splitlines(), 1):
        words = line.split()
        match words:
            case [] | ["ply"] | ["comment" | "obj_info", *_]:
                continue
            case ["format", "ascii" | "binary_little_endian" | "binary_big_endian" as name, _]:
                order = {"ascii": "ascii", "binary_little_endian": "<", "binary_big_endian": ">"}[name]
                continue
            case ["element", name, count] if count.isascii() and count.isdigit() and len(count) <= 18:
                elements.append(_PlyElement(name, int(count), []))
                continue
            case ["property", "list", length, kind, name] if (
                elements and {length, kind} <= _PLY_TYPES.keys() and _PLY_TYPES[length][0] != "f"
            ):
                elements[-1].properties.append((name.lower(), _PLY_TYPES[kind], _PLY_TYPES[length]))
                continue
            case ["property", kind, name] if elements and kind in _PLY_TYPES:
                elements[-1].properties.append((name.lower(), _PLY_TYPES[kind], None))
                continue
        raise PointFileError(
            path, f"line {number} of the PLY header is not understood: {line[:60]!a}", remedy
        )
    if not order:
        raise PointFileError(path, "the PLY header has no format line", remedy)
    return order, elements


def _truncated(path: pathlib.Path, what: str, expected: int, found: int) -> PointFileError:
    problem = f"is truncated or its header is wrong: {what} need at least {expected} bytes, {found} are left"
    return PointFileError(path, problem, "copy or export the file again")


def _read_ply_ascii(path, stream, size, before, vertex, wanted) -> list[np.ndarray]:
    left = size - stream.tell()
    needed = sum(element.rows for element in before) + vertex.rows * (2 * len(vertex.properties) - 1)
    if needed > left:  # a number and a separator each
        raise _truncated(path, f"{vertex.rows} vertices", needed, left)
    lines = (line for line in stream if line.strip())
    for _ in itertools.islice(lines, sum(element.rows for element in before)):
        pass
    blocks = []
    for start in range(0, vertex.rows, 65536):  # in blocks, because Python's floats take ten times the room
        count = min(65536, vertex.rows - start)
        rows = [line.split() for line in itertools.islice(lines, count)]
        if len(rows) < count:
            raise PointFileError(
                path,
                f"is truncated: {vertex.rows} vertices announced, {start + len(rows)} found",
                "copy or export the file again",
            )
        ragged = next(
            (i for i, row in enumerate(rows) if not vertex.has_list and len(row) != len(vertex.properties)),
            None,
        )
        if ragged is not None:
            problem = f"vertex {start + ragged} has {len(rows[ragged])} values, not {len(vertex.properties)}"
            raise PointFileError(path, problem, "export it again")
        try:
            numbers = _ascii_columns(rows, vertex, wanted)
        except (ValueError, IndexError, OverflowError) as error:
            problem = f"a vertex of {start} to {start + count} is not made of numbers ({str(error)[:80]})"
            raise PointFileError(path, problem, "export it again") from error
        blocks.append(numbers)
    return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]


def _ascii_columns(rows: list[list[bytes]], vertex: _PlyElement, wanted: list[int]) -> list[np.ndarray]:
    if not vertex.has_list:
        return [np.array([float(row[i]) for row in rows]) for i in wanted]
    columns: list[list[float]] = [[] for _ in wanted]
    for row in rows:
        position, at = 0, []
        for _, _, length in vertex.properties:
            at.append(position)
            if length is not None and int(row[position]) < 0:
                raise ValueError(f"a list of length {int(row[position])}")
            position += 1 if length is None else 1 + int(row[position])
        for column, i in zip(columns, wanted, strict=True):
            column.append(float(row[at[i]]))
    return [np.array(column) for column in columns]


def _read_ply_binary(path, stream, size, vertex, wanted, order) -> list[np.ndarray]:
    if vertex.has_list:
        rows = [[row[i] for i in wanted] for row in _list_rows(path, stream, size, vertex, order)]
        return list(np.array(rows, np.float64).T)
    dtype = vertex.dtype(order)
    left = size - stream.tell()
    if vertex.rows * dtype.itemsize > left:
        raise _truncated(
            path, f"{vertex.rows} vertices of {dtype.itemsize} bytes", vertex.rows * dtype.itemsize, left
        )
    table = np.frombuffer(stream.read(vertex.rows * dtype.itemsize), dtype, vertex.rows)
    return [table[f"p{i}"] for i in wanted]


def _skip_ply_rows(path, stream, size, element, order) -> None:
    """Passes over an element that comes before the vertices."""
    left = size - stream.tell()
    if not element.has_list:
        needed = element.rows * element.dtype(order).itemsize
        if needed > left:
            raise _truncated(path, f"{element.rows} rows of '{element.name}'", needed, left)
        stream.seek(needed, os.SEEK_CUR)
        return
    for _ in _list_rows(path, stream, size, element, order):
        pass


def _list_rows(path, stream, size, element, order) -> Iterator[list]:
    """Walks rows that hold lists, whose sizes are known only one after the other."""
    left = size - stream.tell()
    least = sum(np.dtype(length or kind).itemsize for _, kind, length in element.properties)
    if element.rows * least > left:
        raise _truncated(path, f"{element.rows} rows of '{element.name}'", element.rows * least, left)
    data, position = stream.read(left), 0
    start = stream.tell() - left
    readers = [
        (struct.Struct(order + _STRUCT_CODES[length or kind]), np.dtype(kind).itemsize if length else 0)
        for _, kind, length in element.properties
    ]
    for number in range(element.rows):
        row = []
        for reader, item_bytes in readers:
            if position + reader.size > len(data):
                raise _truncated(
                    path, f"row {number} of '{element.name}' and those before", position + reader.size, left
                )
            value = reader.unpack_from(data, position)[0]
            position += reader.size
            if item_bytes:
                if value < 0:
                    problem = f"row {number} of '{element.name}' has a list of length {value}"
                    raise PointFileError(path, problem, "export it again")
                position += item_bytes * value
            row.append(value)
        if position > len(data):
            raise _truncated(path, f"row {number} of '{element.name}' and those before", position, left)
        yield row
    stream.seek(start + position)


def read_npy_table(path: pathlib.Path, stream: BinaryIO, size: int, inside: str = "") -> np.ndarray:
    """Reads one NumPy array after checking its header against a strict pattern.

    Args:
      path: the file's name, for messages.
      stream: the array's bytes, at their start.
      size: how many bytes there are.
      inside: names the member of an archive, for messages.

    Returns:
      The array, of numbers or of plain records of numbers.

    Raises:
      PointFileError: if the header is damaged, the type holds objects, or the data is shorter than announced.
    """
    start = stream.read(12)
    if start[:6] != b"\x93NUMPY":
        raise PointFileError(
            path, f"{inside}is not a NumPy array (it starts with {start[:8]!r})", "save it with numpy.save"
        )
    remedy = "save it again with numpy.save as a plain [n, 3] or [n, 6] float32 array"
    wide = start[6:7] != b"\x01"  # version 1 has a 2-byte length, 2 and 3 a 4-byte one
    begin = 12 if wide else 10
    length = int.from_bytes(start[8:begin], "little")
    if start[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00") or len(start) < 12 or length > 65536:
        raise PointFileError(path, f"{inside}the NumPy header is damaged", remedy)
    if length < 2:  # less than what has been read already
        raise PointFileError(path, f"{inside}the NumPy header is damaged", remedy)
    header = ((b"" if wide else start[10:]) + stream.read(length - (0 if wide else 2))).decode("latin-1")
    found = _NPY_HEADER.fullmatch(header)
    if len(header) < length or found is None:
        raise PointFileError(
            path, f"{inside}the NumPy header is damaged or truncated: {header[:60]!a}", remedy
        )
    descr = found["descr"].strip("'")
    fields = _NPY_FIELD.findall(descr) if descr.startswith("[") else []
    simple = _NPY_SCALAR.fullmatch(descr) or (
        fields
        and not _NPY_FIELD.sub("", descr).strip("[], ")
        and len({name for name, _ in fields}) == len(fields)
    )
    if not simple:
        what = (
            "Python objects, which could run code when loaded"
            if "O" in descr
            else f"values of type {descr[:40]!a}"
        )
        raise PointFileError(path, f"{inside}the array holds {what}", remedy)
    try:
        dtype = np.dtype([(name, kind) for name, kind in fields] if fields else descr)
    except (TypeError, ValueError) as error:
        raise PointFileError(
            path, f"{inside}the array has an impossible type {descr[:40]!a}", remedy
        ) from error
    digits = [word.strip(" L") for word in found["shape"].split(",") if word.strip(" L")]
    if len(digits) > 8 or any(len(word) > 18 or not word.isdigit() for word in digits):
        raise PointFileError(
            path, f"{inside}the array has an impossible shape ({found['shape'][:60]})", remedy
        )
    shape = tuple(int(word) for word in digits)
    expected = dtype.itemsize
    for extent in shape:
        expected *= extent
    left = size - begin - length
    if expected > left:
        raise _truncated(path, f"{inside}{dtype} values of shape {shape}", expected, left)
    if expected > MAX_ARRAY_BYTES:
        raise PointFileError(
            path,
            f"{inside}the array takes {expected} bytes, more than {MAX_ARRAY_BYTES}",
            "thin the cloud first",
        )
    stream.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Python 2 wrote it
            return np.load(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise PointFileError(
            path, f"{inside}NumPy cannot read the array ({str(error)[:200]})", remedy
        ) from error
