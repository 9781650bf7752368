"""What all samples of readers share: the reader, files of a folder, NumPy headers, hostile pickles, checks."""

import functools
import importlib.util
import io
import os
import pathlib
import pickle
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from fuzz import file_mutations

TESTS = pathlib.Path(__file__).resolve().parents[1]
MIB = 1 << 20


class Reader(NamedTuple):
    """A reader and the folder that it reads."""

    files: dict[str, bytes]  # relative path -> intact content
    read: Callable[[pathlib.Path], Any]  # of the folder
    targets: tuple[str, ...] = ()  # files to damage; all by default
    hostile: Mapping[
        str, dict[str, bytes | None]
    ] = {}  # hand-made cases: changed files, None removes one; those
    # whose name begins with "! " must be refused
    names_file: bool = True  # False for functions that are given no path; their caller adds it
    warm_up: bool = True  # read the intact files once before the limits hold, for the sake of imports
    memory: int = 96 * MIB  # bytes that a call may take at most on top of what is there


@functools.cache
def helpers(path: str) -> Any:
    """The module of another test file, for its sample makers."""
    spec = importlib.util.spec_from_file_location("samples_" + pathlib.Path(path).stem, TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickle looks classes up here
    spec.loader.exec_module(module)
    return module


def folder_files(make: Callable[[pathlib.Path], Any]) -> dict[str, bytes]:
    """What a sample maker writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        make(root)
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def npz_with(header: str, body: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    return file_mutations.write_zip([("points.npy", npy_with(header, body))], compression)


def npy_with(header: str, body: bytes) -> bytes:
    text = header.encode("latin-1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def npy_header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


class Evil:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def _evil() -> bytes:
    return pickle.dumps([Evil(os.system, ("touch MARK",)), Evil(open, ("MARK", "w"))])


EVIL = _evil()


def put(*keys):
    def place(content, value):
        node = content
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return place


def check_sample(sample: dict, classes: int) -> dict:
    """The reader's own invariants: what `data_prep.conversion` stores, checked before it does."""
    from data_prep.conversion import _check_sample

    _check_sample(sample, classes)
    return sample


def checked(sample: dict, classes: int) -> dict:
    try:
        return check_sample(sample, classes)
    except ValueError as error:
        raise AssertionError(f"the sample is invalid: {error}") from error


def check_message(text: str) -> None:
    """A message must be short, printable on any terminal, and hold no escape sequences."""
    assert len(text) < 2500, f"a message of {len(text)} characters: {text[:200]!a}"
    strange = [c for c in text if not c.isprintable()]
    assert not strange, f"the message holds {strange[:3]!a}: {text[:300]!a}"
