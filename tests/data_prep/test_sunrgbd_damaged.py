"""Damaged, hostile and unusual files of SUN RGB-D: a ValueError that names the file, never anything else."""

import struct
import time
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
from oracles.sunrgbd_raw import INTRINSICS, PublishedTree, encode
from PIL import Image

from data_prep.matlab_files import read_matlab, structs_from
from data_prep.sunrgbd_annotations import boxes_from_annotations, read_label_file
from data_prep.sunrgbd_metadata import Frame, read_frames, read_split
from data_prep.sunrgbd_raw import read_color_image, read_depth_image
from data_prep.sunrgbd_trainval import read_calibration, read_extracted_points


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Cuts a file short, flips some of its bits, repeats, drops or overwrites a piece."""
    kind = rng.integers(5)
    out = bytearray(data)
    start = int(rng.integers(len(out)))
    stop = min(len(out), start + int(rng.integers(1, 40)))
    if kind == 0:
        return bytes(out[:start])
    if kind == 1:
        for place in rng.integers(len(out), size=rng.integers(1, 6)):
            out[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        out[start:start] = out[start:stop]
    elif kind == 3:
        del out[start:stop]
    else:
        out[start:stop] = rng.bytes(stop - start)
    return bytes(out)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Per kind of file: its bytes and what reads it."""
    root = tmp_path_factory.mktemp("originals")
    tree = PublishedTree(root)
    rng = np.random.default_rng(0)
    encoded = encode(rng.integers(500, 6000, (12, 15)))
    Image.fromarray(encoded).save(root / "d.png")
    points = rng.random((50, 6)).astype(np.float32)
    for compressed in (False, True):
        scipy.io.savemat(root / f"points{compressed:d}.mat", {"instance": points}, do_compression=compressed)
        meta = scipy.io.loadmat(tree.root / "SUNRGBDMeta3DBB_v2.mat")["SUNRGBDMeta"]
        scipy.io.savemat(root / f"meta{compressed:d}.mat", {"SUNRGBDMeta": meta}, do_compression=compressed)
        split = {name: np.array([paths], object) for name, paths in tree.splits.items()}
        scipy.io.savemat(root / f"split{compressed:d}.mat", split, do_compression=compressed)
    (root / "label.txt").write_text(
        "chair 1 2 3 4 0.5 1 -1 0.2 0.4 0.6 0 1\nbed 1 2 3 4 1 2 3 .1 .2 .3 -1 0\n"
    )
    calibration = [" ".join(map(str, matrix.ravel(order="F"))) for matrix in (np.eye(3), INTRINSICS)]
    (root / "calib.txt").write_text("\n".join(calibration))
    readers = {
        "d.png": read_depth_image,
        "c.jpg": read_color_image,
        "points0.mat": read_extracted_points,
        "points1.mat": read_extracted_points,
        "meta0.mat": lambda path: read_frames(path, all_boxes=True),
        "meta1.mat": lambda path: read_frames(path, all_boxes=True),
        "split0.mat": read_split,
        "split1.mat": read_split,
        "label.txt": lambda path: boxes_from_annotations(read_label_file(path)),
        "calib.txt": read_calibration,
    }
    (root / "c.jpg").write_bytes((tree.depth_path(1).parents[1] / "image" / "c.jpg").read_bytes())
    return {name: ((root / name).read_bytes(), reader) for name, reader in readers.items()}


@pytest.mark.parametrize("seed", range(250))
def test_damaged_files(originals, tmp_path, seed):
    names = sorted(originals)
    rng = np.random.default_rng(seed)
    name = names[seed % len(names)]
    data, read = originals[name]
    path = tmp_path / name
    path.write_bytes(damage(data, rng))
    start = time.monotonic()
    try:
        result, message = read(path), None
    except ValueError as error:
        result, message = None, str(error)
    assert time.monotonic() - start < 5
    if message is not None:
        assert name in message
        assert len(message) < 600
    elif name.startswith("meta"):
        for item in result:  # entries that are unusable say why
            assert isinstance(item, Frame) or name in item
    elif name == "d.png":  # a PNG carries checksums: what is read is what was written
        (tmp_path / "intact.png").write_bytes(data)
        np.testing.assert_array_equal(result, read_depth_image(tmp_path / "intact.png"))
    elif name.startswith("points"):
        assert np.isfinite(result).all()


def png(width, height, data=b"", extra=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (60000, 60000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_huge_images_are_refused_before_they_are_allocated(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"bomb\.png .*(pixels|image)"):
            read_depth_image(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_variables_that_expand_beyond_the_limit_are_refused(tmp_path):
    path = tmp_path / "bomb.mat"
    scipy.io.savemat(path, {"instance": np.zeros((200_000, 6))}, do_compression=True)
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"bomb\.mat cannot be read .*more than 1000000 bytes"):
            read_matlab(path, ["instance"], 1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert read_matlab(path, ["instance"])["instance"].shape == (200_000, 6)


@pytest.mark.parametrize("compressed", [False, True])
def test_values_equal_those_of_scipy(tmp_path, compressed):
    rng = np.random.default_rng(0)
    values = {
        f"n_{kind}_{row}": (rng.random(shape) * 100).astype(kind)
        for kind in ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
        for row, shape in enumerate(((1, 1), (3, 2), (2, 3, 4), (0, 3)))
    }
    values |= {
        "text": "SUNRGBD/kv2",
        "accents": "d\u00e9j\u00e0 \u4e2d",
        "none": "",
        "long_variable_name": 1.5,
    }
    scipy.io.savemat(tmp_path / "x.mat", values, do_compression=compressed)
    got = read_matlab(tmp_path / "x.mat", values)
    want = scipy.io.loadmat(tmp_path / "x.mat", squeeze_me=True)
    for name in values:
        if isinstance(values[name], str):
            assert (got[name] if np.size(want[name]) else "") == values[name]
            continue
        assert got[name].size == np.size(want[name])
        if got[name].size:  # scipy squeezes empty arrays to one axis
            np.testing.assert_array_equal(got[name], want[name])
            assert got[name].shape == np.shape(want[name])
        assert got[name].dtype == np.asarray(values[name]).dtype


def test_nested_values_and_values_of_no_interest(tmp_path):
    cells = np.empty((1, 2), object)
    cells[0, :] = ["a", np.eye(2)]
    nested = {"one": {"deep": {"x": 1.0}}, "cells": cells, "empty": np.zeros((0, 0)), "field_name": "b"}
    scipy.io.savemat(tmp_path / "x.mat", {"other": cells, "s": nested})
    (value,) = read_matlab(tmp_path / "x.mat", ["s"]).values()
    assert value["one"] == {"deep": {"x": 1.0}}
    assert value["field_name"] == "b"
    assert value["cells"][0] == "a"
    np.testing.assert_array_equal(value["cells"][1], np.eye(2))
    assert value["empty"].shape == (0, 0)
    deep = 1.0
    for _ in range(20):
        deep = {"x": deep}
    scipy.io.savemat(tmp_path / "deep.mat", {"s": deep})
    with pytest.raises(ValueError, match="nested more than 12 deep"):
        read_matlab(tmp_path / "deep.mat", ["s"])


def test_a_file_of_the_other_byte_order(tmp_path):
    def element(kind, body):
        return struct.pack(">II", kind, len(body)) + body.ljust(-(-len(body) // 8) * 8, b"\0")

    flags = element(6, struct.pack(">II", 6, 0))
    numbers = struct.pack(">4d", 1, 2, 3, 4)
    array = (
        flags + element(5, struct.pack(">2i", 2, 2)) + struct.pack(">HH4s", 1, 1, b"m") + element(9, numbers)
    )
    (tmp_path / "x.mat").write_bytes(b"MATLAB 5.0".ljust(124) + b"\x01\x00MI" + element(14, array))
    np.testing.assert_array_equal(read_matlab(tmp_path / "x.mat", ["m"])["m"], [[1, 3], [2, 4]])


def test_sizes_beyond_the_file_are_refused_before_they_are_allocated(tmp_path):
    cells = np.empty((1, 2), object)
    cells[0, :] = [1.0, 2.0]
    scipy.io.savemat(tmp_path / "x.mat", {"c": cells, "n": np.zeros((1, 2))})
    data = (tmp_path / "x.mat").read_bytes()
    shape = struct.pack("<II2i", 5, 8, 1, 2)
    assert data.count(shape) == 2
    for name in ("c", "n"):
        (tmp_path / "y.mat").write_bytes(data.replace(shape, struct.pack("<II2i", 5, 8, 2**30, 2**30)))
        with pytest.raises(ValueError, match=r"y\.mat cannot .*(do not fit|has 2 values)"):
            read_matlab(tmp_path / "y.mat", [name])


def test_files_that_are_no_matlab_files(tmp_path):
    path = tmp_path / "x.mat"
    octave = b"# Created by Octave 5.2.0, Thu Jan 01 00:00:00 2020 UTC\n# name: instance\n"
    for data, reason in (
        (b"", "has 0 bytes only"),
        (octave.ljust(200), "save it again in Octave"),
        (bytes(500), "no header of a Matlab file"),
        (b"MATLAB 7.3 MAT-file".ljust(600), "cannot be read as a Matlab file"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"x\.mat.*{reason}"):
            read_matlab(path, ["instance"])
    scipy.io.savemat(path, {"other": 1})
    with pytest.raises(ValueError, match=r"x\.mat holds no variable 'instance'"):
        read_matlab(path, ["instance"])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.zeros((3, 5)), "expected points of six numbers"),
        (np.full((3, 6), np.nan), "must be finite"),
        (np.full((3, 6), 2.0), r"colours must lie in \[0, 1\]"),
        ("text", "expected points of six numbers"),
    ],
)
def test_extracted_points_of_another_kind(tmp_path, value, reason):
    scipy.io.savemat(tmp_path / "1.mat", {"instance": value})
    with pytest.raises(ValueError, match=rf"1\.mat: .*{reason}"):
        read_extracted_points(tmp_path / "1.mat")


def write_version_73(path, entries):
    """The layout of Matlab's -v7.3: an HDF5 file whose struct arrays are groups of references."""

    def put(parent, name, value):
        if isinstance(value, str):
            item = parent.create_dataset(name, data=np.array([[ord(c)] for c in value], np.uint16))
            item.attrs["MATLAB_class"] = np.bytes_("char")
        elif isinstance(value, list) and not value:
            item = parent.create_dataset(name, data=np.zeros(2, np.uint64))
            item.attrs["MATLAB_class"], item.attrs["MATLAB_empty"] = np.bytes_("struct"), np.uint8(1)
        elif isinstance(value, list) and isinstance(value[0], dict) and len(value) == 1:
            item = parent.create_group(name)
            item.attrs["MATLAB_class"] = np.bytes_("struct")
            for field, content in value[0].items():
                put(item, field, content)
        elif isinstance(value, list) and isinstance(value[0], dict):
            item = parent.create_group(name)
            item.attrs["MATLAB_class"] = np.bytes_("struct")
            for field in value[0]:
                references = [[keep(entry[field])] for entry in value]
                item.create_dataset(field, data=np.array(references, h5py.ref_dtype), dtype=h5py.ref_dtype)
        elif isinstance(value, list):
            references = np.array([[keep(element)] for element in value], h5py.ref_dtype)
            item = parent.create_dataset(name, data=references, dtype=h5py.ref_dtype)
            item.attrs["MATLAB_class"] = np.bytes_("cell")
        else:
            item = parent.create_dataset(name, data=np.atleast_2d(np.asarray(value, float)).T)
            item.attrs["MATLAB_class"] = np.bytes_("double")
        return item

    def keep(value):
        return put(others, f"x{len(others)}", value).ref

    with h5py.File(path, "w", userblock_size=512) as file:
        others = file.create_group("#refs#")
        for name, value in entries.items():
            put(file, name, value)
    with open(path, "r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def test_version_73_gives_the_same_as_version_5(tmp_path):
    tree = PublishedTree(tmp_path / "raw")
    path = tree.root / "SUNRGBDMeta3DBB_v2.mat"
    want = read_frames(path, all_boxes=True)
    write_version_73(tmp_path / "new.mat", {"SUNRGBDMeta": tree.entries})
    got = read_frames(tmp_path / "new.mat", all_boxes=True)
    assert len(want) == len(got) == 4
    for a, b in zip(want, got, strict=True):
        assert a[:3] == b[:3]
        np.testing.assert_array_equal(a.intrinsics, b.intrinsics)
        np.testing.assert_array_equal(a.tilt, b.tilt)
        np.testing.assert_array_equal(a.boxes.boxes, b.boxes.boxes)
        np.testing.assert_array_equal(a.boxes.label, b.boxes.label)
        assert a.boxes.other_classes == b.boxes.other_classes
    write_version_73(tmp_path / "split.mat", tree.splits)
    assert read_split(tmp_path / "split.mat") == read_split(
        tree.root / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat"
    )
    matrix = np.arange(6.0).reshape(2, 3)
    write_version_73(tmp_path / "matrix.mat", {"m": matrix})
    np.testing.assert_array_equal(read_matlab(tmp_path / "matrix.mat", ["m"])["m"], matrix)
    (tmp_path / "cut.mat").write_bytes((tmp_path / "new.mat").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.mat cannot be read as a Matlab file"):
        read_matlab(tmp_path / "cut.mat", ["SUNRGBDMeta"])


def test_structs_of_any_count():
    one = {"a": 1}
    assert structs_from(one) == [one]
    assert structs_from([one, one]) == [one, one]
    assert structs_from(np.zeros((0, 0))) == structs_from([]) == []
    for value in (3.0, "text", np.zeros(2), np.array(3.0), [1], None):
        with pytest.raises(ValueError, match="expected structs"):
            structs_from(value)
