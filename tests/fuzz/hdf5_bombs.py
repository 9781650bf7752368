"""HDF5 files that flood, loop, or stand for other files; each makes the variable `instance` of a file."""

import numpy as np


def _unwritten(file):
    file.create_dataset("instance", shape=(1 << 26, 6), dtype="f8", chunks=(1 << 16, 6))


def _absurd(file):
    file.create_dataset("instance", shape=(1 << 40, 6), dtype="f8", chunks=(1 << 16, 6))


def _zipped(file):
    file.create_dataset("instance", data=np.zeros((1 << 20, 6)), compression="gzip", compression_opts=9)


def _external(path):
    def make(file):
        file.create_dataset("instance", shape=(20, 6), dtype="u1", external=[(path, 0, 120)])

    return make


def _linked(file):
    import h5py

    file["instance"] = h5py.ExternalLink("/proc/self/exe", "/")


def _virtual(file):
    import h5py

    layout = h5py.VirtualLayout(shape=(6, 50), dtype="f8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(6, 50))
    file.create_virtual_dataset("instance", layout)


def _doubling_groups(file):
    import h5py

    below = file.create_group("#refs#/0")
    below["x"] = np.zeros((1, 1))
    below["x"].attrs["MATLAB_class"] = np.bytes_("double")
    for depth in range(1, 12):
        here = file.create_group(f"#refs#/{depth}")
        for name in "abcdefghij":
            here[name] = below
        below = here
    file["instance"] = below
    assert isinstance(below, h5py.Group)


def _doubling_references(file):
    import h5py

    below = file.create_dataset("#refs#/0", data=np.zeros((1, 1)))
    for depth in range(1, 12):
        rows = np.array([below.ref] * 20, h5py.ref_dtype)
        below = file.create_dataset(f"#refs#/{depth}", data=rows, dtype=h5py.ref_dtype)
    file["instance"] = below


def _empty_reference(file):
    import h5py

    file.create_dataset("instance", data=np.array([h5py.Reference()], h5py.ref_dtype), dtype=h5py.ref_dtype)


def _large_characters(file):
    item = file.create_dataset("instance", data=np.full((1, 1 << 12), -5, np.int64))
    item.attrs["MATLAB_class"] = np.bytes_("char")


def _texts(file):
    file.create_dataset("instance", data=[b"abc", b"d"])


HDF5_BOMBS = {
    "! unwritten chunks": _unwritten,
    "! absurd shape": _absurd,
    "! zeros, compressed": _zipped,
    "! external storage": _external("/etc/passwd"),
    "! external device": _external("/dev/zero"),
    "! external link": _linked,
    "! virtual data": _virtual,
    "! doubling groups": _doubling_groups,
    "! doubling references": _doubling_references,
    "empty reference": _empty_reference,
    "negative characters": _large_characters,
    "texts": _texts,
}


HDF5_BOMBS = {
    "! unwritten chunks": _unwritten,
    "! absurd shape": _absurd,
    "! zeros, compressed": _zipped,
    "! external storage": _external("/etc/passwd"),
    "! external device": _external("/dev/zero"),
    "! external link": _linked,
    "! virtual data": _virtual,
    "! doubling groups": _doubling_groups,
    "! doubling references": _doubling_references,
    "empty reference": _empty_reference,
    "negative characters": _large_characters,
    "texts": _texts,
}
