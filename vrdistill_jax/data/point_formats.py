"""PCD and LAS files as raw tables, read without trust; `point_tables` reads PLY and NumPy files likewise.

Source: the PCD format of the Point Cloud Library, version 0.7; ASPRS LAS specification 1.2 to 1.4.
"""

import pathlib
import struct
from typing import BinaryIO

import numpy as np

from vrdistill_jax.data.point_tables import MAX_ARRAY_BYTES, MAX_HEADER_BYTES, PlyTable, PointFileError

_PCD_KINDS = {"F": (4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8)}
_PCD_LINES = {
    *(
        "VERSION",
        "FIELDS",
        "COLUMNS",
        "SIZE",
        "TYPE",
        "COUNT",
        "WIDTH",
        "HEIGHT",
        "VIEWPOINT",
        "POINTS",
        "DATA",
    )
}
_PCD_REMEDY = "export the scan again as PCD or PLY"
_LAS_REMEDY = "export the scan again as LAS 1.2 or PLY"
_LAS_COLOR_AT = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30}  # point format -> byte of red in a record
_LAS_RECORD_BYTES = {0: 20, 1: 28, 2: 26, 3: 34, 4: 57, 5: 63, 6: 30, 7: 36, 8: 38}
_MAX_POINTS = 1 << 30


def read_pcd_table(path: pathlib.Path, stream: BinaryIO, size: int) -> PlyTable:
    """Reads x, y, z and the colours of a PCD file: ascii, binary or binary_compressed.

    Args:
      path: the file's name, for messages.
      stream: the file, at its start.
      size: bytes in the file.

    Returns:
      Columns x, y, z and, where the file has them, red, green, blue.

    Raises:
      PointFileError: if the file is not a PCD, is truncated or contradicts its header.
    """
    fields, count, viewpoint, form = _read_pcd_header(path, stream)
    row_bytes = sum(repeat * int(kind[2:]) for _, kind, repeat in fields)  # NumPy's own sum may overflow
    if count * row_bytes > MAX_ARRAY_BYTES:
        problem = f"announces {count} points of {row_bytes} bytes, more than fit"
        raise PointFileError(path, problem, "thin the cloud first")
    dtype = np.dtype([(f"f{i}", kind, (repeat,)) for i, (_, kind, repeat) in enumerate(fields)])
    left = size - stream.tell()
    if form == "ascii":
        table = _read_pcd_ascii(path, stream, left, dtype, count)
    elif form == "binary":
        needed = count * dtype.itemsize
        if needed > left:
            raise _truncated(path, f"{count} points", needed, left)
        table = np.frombuffer(stream.read(needed), dtype)
    else:
        table = _read_pcd_compressed(path, stream, left, dtype, count)
    rows = {name: i for i, (name, _, repeat) in reversed(list(enumerate(fields))) if repeat == 1}
    columns = {name: table[f"f{rows[name]}"][:, 0] for name in "xyz"}
    kinds = {name: fields[rows[name]][1][1:] for name in "xyz"}
    for name in ("rgb", "rgba"):
        if name in rows and table[f"f{rows[name]}"].dtype.itemsize == 4 and "red" not in columns:
            # One 32-bit word 0x00RRGGBB, which the format also stores under the name of a float.
            packed = np.ascontiguousarray(table[f"f{rows[name]}"][:, 0])
            if form == "ascii" and packed.dtype.kind == "f" and (packed >= 1).any():
                packed = packed.astype(np.float64)  # some writers print the word as a whole number
                packed = np.where(np.isfinite(packed) & (packed < 2**32), packed, 0).astype("<u4")
            packed = packed.view("<u4")
            for color, shift in (("red", 16), ("green", 8), ("blue", 0)):
                columns[color] = (packed >> np.uint32(shift) & np.uint32(255)).astype(np.uint8)
                kinds[color] = "u1"
    for triple in (("red", "green", "blue"), ("r", "g", "b")):
        if set(triple) <= rows.keys() and "red" not in columns:
            for color, name in zip(("red", "green", "blue"), triple, strict=True):
                columns[color] = table[f"f{rows[name]}"][:, 0]
                kinds[color] = fields[rows[name]][1][1:]
    warnings = []
    if viewpoint not in ((0, 0, 0, 1, 0, 0, 0), ()):
        warnings.append("the PCD header gives a viewpoint, which was ignored: points are taken as stored")
    return PlyTable(columns, kinds, form, warnings)


def _read_pcd_header(path: pathlib.Path, stream: BinaryIO) -> tuple[list, int, tuple[float, ...], str]:
    start = stream.read(MAX_HEADER_BYTES)
    words: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in words:
        end = start.find(b"\n", position)
        if end < 0:
            raise PointFileError(path, "is not a PCD file: its header has no DATA line", _PCD_REMEDY)
        line = start[position:end].decode("latin-1").split("#")[0].split()
        position = end + 1
        if not line:
            continue
        name = line[0].upper()
        if name not in _PCD_LINES:
            raise PointFileError(path, f"is not a PCD file: header line {name[:40]!a}", _PCD_REMEDY)
        words["FIELDS" if name == "COLUMNS" else name] = line[1:]
    stream.seek(position)
    names = [name.lower() for name in words.get("FIELDS", ())]
    repeats = words.get("COUNT") or ["1"] * len(names)
    sizes, types = words.get("SIZE", []), words.get("TYPE", [])
    try:
        if not (len(names) == len(sizes) == len(types) == len(repeats)):
            raise ValueError(f"{len(names)} fields, {len(sizes)} sizes, {len(types)} types")
        fields = [
            (name, _pcd_kind(kind, _whole(width, 8)), _whole(repeat, 65536))
            for name, width, kind, repeat in zip(names, sizes, types, repeats, strict=True)
        ]
        extent = _whole(words["WIDTH"][0], _MAX_POINTS) * _whole(
            (words.get("HEIGHT") or ["1"])[0], _MAX_POINTS
        )
        count = _whole(words["POINTS"][0], _MAX_POINTS) if words.get("POINTS") else extent
        viewpoint = tuple(float(word) for word in words.get("VIEWPOINT", ()))
        form = words["DATA"][0].lower()
        if form not in ("ascii", "binary", "binary_compressed"):
            raise ValueError(f"DATA {form[:40]!a}")
        if count != extent:
            raise ValueError(f"POINTS {count} is not WIDTH x HEIGHT = {extent}")
    except (ValueError, KeyError, IndexError) as error:
        raise PointFileError(path, f"the PCD header is damaged ({str(error)[:100]})", _PCD_REMEDY) from error
    scalars = [name for name, _, repeat in fields if repeat == 1]
    if not {"x", "y", "z"} <= set(scalars):
        has = ascii(", ".join(names[:20]))
        raise PointFileError(
            path, f"the points have no x, y, z (they have: {has})", "export it with positions"
        )
    if count == 0:
        raise PointFileError(path, "holds 0 points", "export it again")
    return fields, count, viewpoint, form


def _pcd_kind(kind: str, width: int) -> str:
    if width not in _PCD_KINDS.get(kind.upper(), ()):
        raise ValueError(f"type {kind[:10]!a} of {width} bytes")
    return f"<{kind.lower()}{width}"


def _whole(word: str, largest: int) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= 18 and int(word) <= largest):
        raise ValueError(f"{word[:40]!a} is no number up to {largest}")
    return int(word)


def _read_pcd_ascii(path, stream, left: int, dtype: np.dtype, count: int) -> np.ndarray:
    width = sum(int(np.prod(dtype[name].shape)) for name in dtype.names or ())
    if count * width * 2 - 1 > left:  # a digit and a separator each
        raise _truncated(path, f"{count} points", count * width * 2 - 1, left)
    words = stream.read(min(left, MAX_ARRAY_BYTES)).split()
    if len(words) < count * width:
        raise PointFileError(path, f"is truncated: {len(words)} of {count * width} values", _PCD_REMEDY)
    table = np.zeros(count, dtype)
    column = 0
    try:
        for name in dtype.names or ():
            base = dtype[name].base
            for slot in range(int(np.prod(dtype[name].shape))):
                mine = words[column : count * width : width]
                column += 1
                numbers = [float(word) for word in mine] if base.kind == "f" else [int(word) for word in mine]
                with np.errstate(over="ignore"):
                    table[name][:, slot] = np.array(numbers, np.float64 if base.kind == "f" else base)
    except (ValueError, OverflowError) as error:
        raise PointFileError(path, f"a value is not a number ({str(error)[:80]})", _PCD_REMEDY) from error
    return table


def _read_pcd_compressed(path, stream, left: int, dtype: np.dtype, count: int) -> np.ndarray:
    """Inflates a file whose points are stored field by field."""
    head = stream.read(8)
    packed_size, full_size = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
    if len(head) < 8 or packed_size > left - 8:
        raise _truncated(path, "the compressed points", packed_size + 8, left)
    if full_size != count * dtype.itemsize:
        problem = f"{count} points take {count * dtype.itemsize} bytes, not {full_size}"
        raise PointFileError(path, problem, _PCD_REMEDY)
    data = _inflate_lzf(path, stream.read(packed_size), full_size)
    table, position = np.zeros(count, dtype), 0
    for name in dtype.names or ():
        part = dtype[name]
        block = np.frombuffer(data, part.base, count * int(np.prod(part.shape)), position)
        table[name] = block.reshape(count, -1)
        position += block.nbytes
    return table


def _inflate_lzf(path: pathlib.Path, packed: bytes, size: int) -> bytes:
    """Undoes LZF: runs of literal bytes, and references to bytes that came before.

    Source: the format of LibLZF.
    """
    out = bytearray()
    position = 0
    try:
        while position < len(packed):
            control = packed[position]
            position += 1
            if control < 32:
                out += packed[position : position + control + 1]
                position += control + 1
            else:
                length = control >> 5
                if length == 7:
                    length += packed[position]
                    position += 1
                at = len(out) - ((control & 31) << 8) - packed[position] - 1
                position += 1
                if at < 0:
                    raise IndexError
                length += 2
                piece = bytes(out[at : at + length])
                # A reference may reach into what it writes itself: then the piece repeats.
                out += (piece * (length // len(piece) + 1))[:length]
            if len(out) > size:
                raise IndexError
    except IndexError:
        out.clear()
    if len(out) != size or position > len(packed):
        raise PointFileError(path, "the compressed points are damaged", "copy the file again")
    return bytes(out)


def read_las_table(path: pathlib.Path, stream: BinaryIO, size: int) -> PlyTable:
    """Reads x, y, z and the colours of an uncompressed LAS file, version 1.2 to 1.4, point formats 0 to 8.

    Args:
      path: the file's name, for messages.
      stream: the file, at its start.
      size: bytes in the file.

    Returns:
      Columns x, y, z and, where the point format has them, red, green, blue.

    Raises:
      PointFileError: if the file is not a LAS, is compressed, truncated or contradicts its header.
    """
    header = stream.read(375)
    if header[:4] != b"LASF" or len(header) < 227:
        raise PointFileError(path, f"is not a LAS file (it starts with {header[:8]!r})", _LAS_REMEDY)
    version = (header[24], header[25])
    if version[0] != 1 or version[1] > 4:
        raise PointFileError(path, f"is of LAS version {version[0]}.{version[1]}", _LAS_REMEDY)
    start, (form, record) = struct.unpack_from("<I", header, 96)[0], struct.unpack_from("<BH", header, 104)
    if form & 0xC0:
        raise PointFileError(path, "is compressed (LAZ)", "unpack it to .las, for example with laszip")
    least = _LAS_RECORD_BYTES.get(form)
    if least is None or record < least:
        problem = f"has point format {form} in records of {record} bytes; formats 0 to 8 can be read"
        raise PointFileError(path, problem, _LAS_REMEDY)
    (count,) = struct.unpack_from("<I", header, 107)
    if version == (1, 4) and len(header) >= 375:
        (count,) = struct.unpack_from("<Q", header, 247)
    if count == 0:
        raise PointFileError(path, "holds 0 points", "export it again")
    if start < 227 or start + count * record > size:
        raise _truncated(path, f"{count} points from byte {start}", start + count * record, size)
    if count * record > MAX_ARRAY_BYTES:
        raise PointFileError(
            path, f"{count * record} bytes, more than {MAX_ARRAY_BYTES}", "thin the cloud first"
        )
    scale, offset = np.array(struct.unpack_from("<6d", header, 131)).reshape(2, 3)
    if not (np.isfinite(scale).all() and np.isfinite(offset).all() and (scale != 0).all()):
        raise PointFileError(path, f"has the scale {scale.tolist()}, offset {offset.tolist()}", _LAS_REMEDY)
    layout: dict = {"names": ["xyz"], "formats": [("<i4", (3,))], "offsets": [0], "itemsize": record}
    if form in _LAS_COLOR_AT:
        layout["names"].append("rgb")
        layout["formats"].append(("<u2", (3,)))
        layout["offsets"].append(_LAS_COLOR_AT[form])
    stream.seek(start)
    dtype: np.dtype = np.dtype(layout)  # type: ignore[call-overload]
    table: np.ndarray = np.frombuffer(stream.read(count * record), dtype, count)
    with np.errstate(over="ignore"):
        xyz = table["xyz"] * scale + offset
    columns = {name: xyz[:, i] for i, name in enumerate("xyz")}
    kinds = dict.fromkeys("xyz", "f8")
    if "rgb" in layout["names"] and table["rgb"].any():  # writers without colours leave zeros
        columns |= {name: table["rgb"][:, i] for i, name in enumerate(("red", "green", "blue"))}
        kinds |= dict.fromkeys(("red", "green", "blue"), "u2")
    return PlyTable(columns, kinds, f"version 1.{version[1]}, point format {form}", [])


def _truncated(path: pathlib.Path, what: str, expected: int, found: int) -> PointFileError:
    problem = f"is truncated or its header is wrong: {what} need {expected} bytes, {found} are there"
    return PointFileError(path, problem, "copy or export the file again")
