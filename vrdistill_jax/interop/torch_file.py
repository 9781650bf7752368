"""Reads PyTorch checkpoint files into NumPy arrays, without PyTorch and without running what they hold."""

import io
import lzma
import math
import pathlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from vrdistill_jax.data.point_tables import expansion_limit, printable
from vrdistill_jax.interop.inert_pickle import (
    CheckpointFileError,
    Constant,
    Constructor,
    UnsafeCheckpointError,
    base_symbols,
    checked_shape,
    read_pickle,
)

__all__ = ["CheckpointFileError", "UnsafeCheckpointError", "read_torch_file"]

MAX_DECOMPRESSED_BYTES = 4 << 30
MAX_XZ_DICTIONARY_BYTES = 1 << 28  # xz -9 needs 2^26
MAX_PICKLE_BYTES = 64 << 20  # data.pkl holds names and shapes, not weights
MAX_EXPANDED_ELEMENTS = 1 << 24  # a tensor expanded by stride 0 may be larger than its storage, up to this

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_MAGIC, _XZ_MAGIC, _HDF5_MAGIC = b"PK\x03\x04", b"\xfd7zXZ\x00", b"\x89HDF\r\n\x1a\n"

_DTYPES = {
    "float64": "f8", "double": "f8", "float32": "f4", "float": "f4", "float16": "f2", "half": "f2",
    "bfloat16": "bfloat16", "int64": "i8", "long": "i8", "int32": "i4", "int": "i4", "int16": "i2",
    "short": "i2", "int8": "i1", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8",
    "bool": "bool", "complex64": "c8", "complex128": "c16",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "bool", "ComplexFloatStorage": "c8", "ComplexDoubleStorage": "c16",
    "UntypedStorage": "u1", "_UntypedStorage": "u1",
}  # fmt: skip


class _Storage(NamedTuple):
    """The flat memory that tensors are views of; `array` is None while only the names are collected."""

    array: np.ndarray | None
    decoded: dict[str, np.ndarray] | None = (
        None  # an untyped storage as numbers, by type: each is decoded once
    )


class _StorageName(NamedTuple):
    """What a persistent id says about a storage."""

    kind: str
    key: str
    size: int
    view: tuple[int, int] | None


def read_torch_file(path: str | pathlib.Path) -> Any:
    """Reads a file written by torch.save.

    Supports the zip format (torch 1.6 and later), the older stream of pickles, and either of them inside xz.

    Args:
      path: the file.

    Returns:
      The saved object: dictionaries, lists, tuples, strings, numbers, and NumPy arrays for tensors (read-only
      views that share memory where the tensors did; bfloat16 becomes float32). An argparse.Namespace becomes
      a dictionary; a device, dtype or path becomes a string.

    Raises:
      UnsafeCheckpointError: if the file asks for any class or function that weights do not need.
      CheckpointFileError: if the file is missing, damaged, truncated, or of another format.
    """
    path = pathlib.Path(path)
    try:
        if not path.is_file():
            raise CheckpointFileError("it is no file" if path.exists() else "it does not exist")
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith(_XZ_MAGIC):
            data = _decompress(path)
            return (
                _read_zip(io.BytesIO(data), len(data)) if data.startswith(_ZIP_MAGIC) else _read_legacy(data)
            )
        if head.startswith(_ZIP_MAGIC):
            with path.open("rb") as file:
                return _read_zip(file, path.stat().st_size)
        if not head:
            raise CheckpointFileError("it is empty")
        if head.startswith(_HDF5_MAGIC):
            raise CheckpointFileError("it is an HDF5 file (Keras weights?), no PyTorch checkpoint")
        if head[257:262] == b"ustar":
            raise CheckpointFileError(
                "it is in the tar format of PyTorch 0.1, which is too old; save it again with a newer torch"
            )
        return _read_legacy(path.read_bytes())
    except (CheckpointFileError, UnsafeCheckpointError) as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointFileError(f"{path}: it cannot be read ({error.strerror or error})") from error


def _decompress(path: pathlib.Path) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_DICTIONARY_BYTES)
    limit = min(MAX_DECOMPRESSED_BYTES, expansion_limit(path.stat().st_size))
    parts, total = [], 0
    with path.open("rb") as file:
        try:
            while not decompressor.eof:
                block = file.read(1 << 20) if decompressor.needs_input else b""
                if decompressor.needs_input and not block:
                    raise CheckpointFileError("its xz compression ends early; copy or download it again")
                parts.append(decompressor.decompress(block, max_length=1 << 24))
                total += len(parts[-1])
                if total > limit:
                    raise CheckpointFileError(
                        f"it unpacks to more than {limit} bytes; unpack it with xz yourself"
                    )
        except lzma.LZMAError as error:
            raise CheckpointFileError(
                f"its xz compression is damaged ({error}); copy or download it again"
            ) from error
    return b"".join(parts)


def _read_zip(file: Any, size: int) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive, size)
    except (CheckpointFileError, UnsafeCheckpointError):
        raise
    except (
        *(zipfile.BadZipFile, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError),
        *(ValueError, KeyError, struct.error),
    ) as error:
        raise CheckpointFileError(
            f"its zip archive is damaged or incomplete ({printable(str(error), 200)}); copy or download it again"
        ) from error


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name[: -len("data.pkl")] for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1 or len(entries) != len(archive.infolist()):
        raise CheckpointFileError(
            "it is a zip archive, but not one that torch.save writes (one data.pkl, no name twice)"
        )
    root = roots[0]
    if f"{root}constants.pkl" in entries:
        raise CheckpointFileError("it is a TorchScript program; save the model's state_dict() instead")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
        raise CheckpointFileError(
            "its entries are compressed or encrypted, which torch.save never does; save it again with torch"
        )
    if sum(entry.file_size for entry in entries.values()) > size:
        raise CheckpointFileError("its zip entries claim more bytes than the file has")
    if entries[f"{root}data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise CheckpointFileError(
            f"its data.pkl is larger than {MAX_PICKLE_BYTES} bytes; save only the model's state_dict()"
        )
    order: Literal["<", ">"] = "<"
    if f"{root}byteorder" in entries:
        text = archive.read(f"{root}byteorder").strip()
        if text not in (b"little", b"big"):
            raise CheckpointFileError("its byteorder entry is neither 'little' nor 'big'")
        order = "<" if text == b"little" else ">"
    loaded: dict[str, tuple[str, int, _Storage]] = {}

    def load_storage(key: Any) -> _Storage:
        wanted = _storage_id(key)
        if wanted.key not in loaded:
            name = f"{root}data/{wanted.key}"
            if name not in entries:
                raise CheckpointFileError(f"it lacks the entry {name}; copy or download it again")
            _check_bytes(wanted, entries[name].file_size)
            loaded[wanted.key] = (
                wanted.kind,
                wanted.size,
                _Storage(_decode(archive.read(name), wanted.kind, order), {}),
            )
        return _known_storage(loaded, wanted)

    return read_pickle(io.BytesIO(archive.read(f"{root}data.pkl")), _symbols(), load_storage)


def _read_legacy(data: bytes) -> Any:
    """Five pickles (magic, protocol, system, object, storage keys), then each storage after its length."""
    stream = io.BytesIO(data)
    foreign = "it is no PyTorch checkpoint (neither a zip archive nor the older stream of pickles)"
    try:
        if read_pickle(stream, {}) != _LEGACY_MAGIC:
            raise CheckpointFileError(foreign)
    except UnsafeCheckpointError:
        raise
    except CheckpointFileError as error:
        raise CheckpointFileError(foreign) from error
    if read_pickle(stream, {}) != _LEGACY_PROTOCOL:
        raise CheckpointFileError(f"its protocol is not {_LEGACY_PROTOCOL}; save it again with a newer torch")
    system = read_pickle(stream, {})
    order: Literal["<", ">"] = (
        "<" if not isinstance(system, dict) or system.get("little_endian", True) else ">"
    )
    start = stream.tell()

    # The tensors come before their storages: read names and types first, the storages next, then all again.
    wanted: dict[str, _StorageName] = {}

    def note_storage(key: Any) -> _Storage:
        item = _storage_id(key)
        wanted.setdefault(item.key, item)
        return _Storage(None)

    read_pickle(stream, _symbols(), note_storage)
    keys = read_pickle(stream, {})
    if not isinstance(keys, list) or any(type(key) is not str for key in keys) or set(keys) != set(wanted):
        raise CheckpointFileError(
            "its list of storages does not match its tensors; copy or download it again"
        )
    loaded: dict[str, tuple[str, int, _Storage]] = {}
    position = stream.tell()
    for key in keys:
        count = int.from_bytes(data[position : position + 8], "little" if order == "<" else "big")
        if count != wanted[key].size:
            raise CheckpointFileError(
                f"its storage {key!r} is cut off or has another size than its tensors say"
            )
        end = position + 8 + count * _item_bytes(wanted[key].kind)
        _check_bytes(wanted[key], min(end, len(data)) - position - 8)
        loaded[key] = (
            wanted[key].kind,
            count,
            _Storage(_decode(data[position + 8 : end], wanted[key].kind, order), {}),
        )
        position = end
    stream.seek(start)
    return read_pickle(stream, _symbols(), lambda key: _known_storage(loaded, _storage_id(key)))


def _storage_id(key: Any) -> _StorageName:
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage":
        raise UnsafeCheckpointError.naming(
            "an object outside its pickle that is no tensor storage (a whole module?)"
        )
    kind, name, count, view = key[1], key[2], key[4], key[5] if len(key) == 6 else None
    storage_name = kind.name.rpartition(".")[2] if type(kind) is Constructor else ""
    if storage_name not in _STORAGES or type(name) is not str or type(count) is not int or count < 0:
        raise CheckpointFileError("one of its storages has no type, name or size")
    if view is not None:
        if (
            not isinstance(view, tuple)
            or len(view) != 3
            or any(type(n) is not int or n < 0 for n in view[1:])
        ):
            raise CheckpointFileError("one of its storage views has no offset and size")
        view = (view[1], view[2])
    return _StorageName(_STORAGES[storage_name], name, count, view)


def _known_storage(loaded: dict[str, tuple[str, int, _Storage]], wanted: _StorageName) -> _Storage:
    kind, count, storage = loaded[wanted.key]
    if (kind, count) != (wanted.kind, wanted.size):
        raise CheckpointFileError(f"its storage {wanted.key!r} is said to have two types or sizes")
    if wanted.view is None:
        return storage
    offset, size = wanted.view
    if offset + size > count:
        raise CheckpointFileError(
            f"a view of its storage {wanted.key!r} ends at {offset + size} of {count} elements"
        )
    assert storage.array is not None
    return _Storage(storage.array[offset : offset + size])


def _item_bytes(kind: str) -> int:
    return 2 if kind == "bfloat16" else np.dtype(kind).itemsize


def _check_bytes(wanted: _StorageName, size: int) -> None:
    expected = wanted.size * _item_bytes(wanted.kind)
    if size != expected:
        raise CheckpointFileError(
            f"its storage {wanted.key!r} has {size} bytes instead of {expected} ({wanted.size} elements); "
            "copy or download it again"
        )


def _decode(data: bytes, kind: str, order: Literal["<", ">"]) -> np.ndarray:
    if kind == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(data, f"{order}u2").astype(np.uint32) << 16).view(np.float32)
    if kind == "bool":
        return np.frombuffer(data, np.uint8) != 0
    array = np.frombuffer(data, np.dtype(kind).newbyteorder(order))
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> np.ndarray | None:
    """A view of a storage; every element that it can reach is checked to lie inside."""
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise CheckpointFileError("one of its tensors has no storage or a negative offset")
    shape = checked_shape(shape)
    stride = checked_shape(stride)
    if len(stride) != len(shape):
        raise CheckpointFileError(f"one of its tensors has {len(shape)} sizes and {len(stride)} strides")
    if storage.array is None:
        return None
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, storage.array.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if last >= storage.array.size:
        raise CheckpointFileError(
            f"one of its tensors reaches element {last} of a storage of {storage.array.size}"
        )
    if count > max(storage.array.size, MAX_EXPANDED_ELEMENTS):
        raise CheckpointFileError(
            f"one of its tensors repeats {storage.array.size} stored elements as {count}; save it contiguous"
        )
    item = storage.array.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage.array[offset:], shape, tuple(step * item for step in stride)
    )
    view.flags.writeable = False
    return view


def _check_metadata(metadata: Any) -> None:
    """Refuses tensors whose stored numbers are still to be conjugated or negated."""
    if metadata is not None and (not isinstance(metadata, dict) or any(metadata.values())):
        raise CheckpointFileError(
            "one of its tensors is a lazy conjugate or negative; call resolve_conj() on it"
        )


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _requires_grad: Any = 0,
    _hooks: Any = None,
    metadata: Any = None,
) -> np.ndarray | None:
    _check_metadata(metadata)
    return _tensor(storage, offset, shape, stride)


def _rebuild_untyped(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _requires_grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> np.ndarray | None:
    """_rebuild_tensor_v3: the storage is bytes and the type is given apart."""
    _check_metadata(metadata)
    kind = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else None
    if kind is None or not isinstance(storage, _Storage):
        raise CheckpointFileError("one of its tensors has no type or storage")
    if storage.array is not None:
        if storage.array.size % _item_bytes(kind):
            raise CheckpointFileError("one of its tensors has a storage of a fraction of an element")
        if storage.decoded is None:
            raise CheckpointFileError("one of its tensors gives another type to a part of a storage")
        if kind not in storage.decoded:
            storage.decoded[kind] = _decode(storage.array.tobytes(), kind, "<")
        storage = _Storage(storage.decoded[kind])
    return _tensor(storage, offset, shape, stride)


def _rebuild_parameter(data: Any, *_: Any) -> np.ndarray | None:
    return data


def _rebuild_subclass(function: Any, _type: Any, arguments: Any, *_: Any) -> np.ndarray | None:
    """_rebuild_from_type_v2: a tensor with attributes, which are not kept."""
    builders: tuple[Callable[..., Any], ...] = (_rebuild_tensor, _rebuild_untyped)
    if (
        type(function) is not Constructor
        or function.build not in builders
        or not isinstance(arguments, tuple)
    ):
        raise UnsafeCheckpointError.naming("a tensor subclass with its own construction")
    return function.build(*arguments)  # type: ignore[misc]


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not (index is None or type(index) is int):
        raise CheckpointFileError("one of its devices has no name")
    return kind if index is None else f"{kind}:{index}"


def _symbols() -> dict[tuple[str, str], Constructor | Constant]:
    table = base_symbols()
    for name in _STORAGES:
        for module in ("torch", "torch.cuda", "torch.storage"):
            table[module, name] = Constructor(f"{module}.{name}")
    for name in _DTYPES:
        table["torch", name] = Constant(f"torch.{name}")
    for name in ("strided", "contiguous_format", "preserve_format", "channels_last"):
        table["torch", name] = Constant(f"torch.{name}")
    for module, name, build in (
        ("torch._utils", "_rebuild_tensor", _rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v2", _rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v3", _rebuild_untyped),
        ("torch._utils", "_rebuild_parameter", _rebuild_parameter),
        ("torch._utils", "_rebuild_parameter_with_state", _rebuild_parameter),
        ("torch._tensor", "_rebuild_from_type_v2", _rebuild_subclass),
        ("torch", "Tensor", None),
        ("torch.nn.parameter", "Parameter", None),
        ("torch", "Size", lambda sizes=(): checked_shape(sizes)),
        ("torch", "device", _device),
    ):
        table[module, name] = Constructor(f"{module}.{name}", build)
    return table
