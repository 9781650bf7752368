"""Writes files in PyTorch's checkpoint formats with the standard library: for the tests of the reader."""

import collections
import contextlib
import io
import pickle
import struct
import sys
import types
import zipfile
from unittest import mock

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
}


class Storage:
    """Flat memory: `raw` is what lies in the file (uint16 for bfloat16)."""

    def __init__(self, raw, kind=None):
        self.raw, self.kind = np.ascontiguousarray(raw).reshape(-1), kind or str(np.asarray(raw).dtype)


class Tensor:
    """A view of a storage; by default all of it."""

    def __init__(self, storage, shape=None, stride=None, offset=0):
        self.storage, self.offset = storage, offset
        self.shape = (storage.raw.size,) if shape is None else tuple(shape)
        if stride is None:
            stride = [int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape))]
        self.stride = tuple(stride)


def tensor(array, kind=None):
    """A contiguous tensor."""
    array = np.asarray(array)
    return Tensor(Storage(array, kind), array.shape)


def _named(module, name, base=object):
    return type(name, (base,), {"__module__": module, "__qualname__": name})


def _function(module, name):
    def rebuild(*_):
        raise AssertionError("nothing of the file may be called")

    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = module, name, name
    return rebuild


@contextlib.contextmanager
def fake_torch():
    """Modules with the names that torch's pickles refer to; the pickler looks them up."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, _named("torch", name))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(utils, name, _function("torch._utils", name))
    torch._utils = utils
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        yield torch


class _Pickler(pickle.Pickler):
    def __init__(self, stream, torch, legacy, protocol):
        super().__init__(stream, protocol)
        self.torch, self.legacy, self.storages = torch, legacy, {}

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key = next((k for k, s in self.storages.items() if s is obj), str(len(self.storages)))
        self.storages[key] = obj
        parts = ("storage", getattr(self.torch, STORAGES[obj.kind]), key, "cpu", obj.raw.size)
        return (*parts, None) if self.legacy else parts

    def reducer_override(self, obj):
        if not isinstance(obj, Tensor):
            return NotImplemented
        hooks = collections.OrderedDict()
        arguments = (obj.storage, obj.offset, obj.shape, obj.stride, False, hooks)
        return self.torch._utils._rebuild_tensor_v2, arguments


def pickle_of(obj, legacy=False, protocol=2):
    """The object's pickle and its storages by key."""
    with fake_torch() as torch:
        stream = io.BytesIO()
        pickler = _Pickler(stream, torch, legacy, protocol)
        pickler.dump(obj)
        return stream.getvalue(), pickler.storages


def zip_bytes(obj, root="archive", order="little", protocol=2):
    """The file that torch 1.6 and later write; `order` None leaves the byteorder entry out."""
    data, storages = pickle_of(obj, protocol=protocol)
    swap = ">" if order == "big" else "<"
    entries = {
        f"data/{key}": s.raw.astype(s.raw.dtype.newbyteorder(swap)).tobytes() for key, s in storages.items()
    }
    return zip_of(data, entries, root, order)


def zip_of(data, entries=None, root="archive", order="little", compression=zipfile.ZIP_STORED):
    """A torch archive around any data.pkl."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        if order:
            archive.writestr(f"{root}/byteorder", order)
            archive.writestr(f"{root}/.data/serialization_id", "0" * 40)
        for name, content in (entries or {}).items():
            archive.writestr(f"{root}/{name}", content)
        archive.writestr(f"{root}/version", "3\n")
    return stream.getvalue()


def legacy_bytes(obj):
    """The file that torch before 1.6 wrote."""
    data, storages = pickle_of(obj, legacy=True)
    head = [
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}},
    ]
    parts = [pickle.dumps(item, 2) for item in head] + [data, pickle.dumps(sorted(storages), 2)]
    parts += [
        struct.pack("<q", storages[key].raw.size) + storages[key].raw.tobytes() for key in sorted(storages)
    ]
    return b"".join(parts)
