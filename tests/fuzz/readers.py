"""Every reader of files that strangers bring: an intact sample, how to call it, and what its results must satisfy."""

import functools
import importlib.util
import io
import json
import lzma
import os
import pathlib
import pickle
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from fuzz import mutations
from oracles import torch_writer

TESTS = pathlib.Path(__file__).resolve().parents[1]
MIB = 1 << 20


class Reader(NamedTuple):
    """A reader and the folder that it reads."""

    files: dict[str, bytes]  # relative path -> intact content
    read: Callable[[pathlib.Path], Any]  # of the folder
    targets: tuple[str, ...] = ()  # files to damage; all by default
    hostile: Mapping[str, dict[str, bytes | None]] = {}  # hand-made cases: changed files, None removes one; those
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


# ---- Scans


def scan(name: str, content: bytes, hostile: Mapping[str, bytes] | None = None, columns: int | None = None) -> Reader:
    def read(folder: pathlib.Path):
        from vrdistill_jax.data.point_files import read_points

        cloud = read_points(folder / name, columns)
        assert cloud.xyz.ndim == 2
        assert cloud.xyz.shape[1] == 3
        assert len(cloud.xyz) > 0
        assert not np.isinf(cloud.xyz).any()
        if cloud.color is not None:
            assert cloud.color.shape == cloud.xyz.shape
            assert 0 <= cloud.color.min() <= cloud.color.max() <= 1
        return cloud

    return Reader({name: content}, read, hostile={key: {name: value} for key, value in (hostile or {}).items()})


def npz_with(header: str, body: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    return mutations.write_zip([("points.npy", npy_with(header, body))], compression)


def npy_with(header: str, body: bytes) -> bytes:
    text = header.encode("latin-1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def npy_header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def scans() -> dict[str, Reader]:
    plain, other = helpers("data/test_point_files.py"), helpers("data/test_point_formats.py")
    samples = plain.SAMPLES
    ply = {
        "escapes in names": b"ply\nformat ascii 1.0\nelement \x1b[31m 1\nproperty float x\nend_header\n1\n",
        "element without properties": b"ply\nformat binary_little_endian 1.0\nelement a 999999999999999999\n"
        b"element vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n" + bytes(12),
        "negative list in ASCII": b"ply\nformat ascii 1.0\nelement vertex 1\nproperty list char int a\n"
        b"property float x\nproperty float y\nproperty float z\nend_header\n-3 1 2 3\n",
        "ten thousand properties": b"ply\nformat ascii 1.0\nelement vertex 1\n"
        + b"property float x\nproperty float y\nproperty float z\n"
        + b"property float q\n" * 10000
        + b"end_header\n"
        + b"1 " * 10003,
        "ten thousand elements": b"ply\nformat ascii 1.0\n" + b"element a 0\n" * 10000 + b"end_header\n",
    }
    bomb = npz_with(npy_header("(6000000, 3)"), bytes(72_000_000))
    lzma_entry = bytearray(mutations.write_zip([("points.npy", samples["six.npy"])], zipfile.ZIP_LZMA))
    lzma_entry[60] ^= 0xFF
    npz = {
        "! bomb": bomb,
        "damaged LZMA entry": bytes(lzma_entry),
        "upward names": mutations.write_zip([("../../etc/points.npy", samples["six.npy"])]),
        "escapes in names": mutations.write_zip([("\x1b[31m.npy", b"x"), ("b\n.npy", b"x")]),
        "! object array": mutations.write_zip([("points.npy", npy_with(npy_header("(1,)", "'|O'"), EVIL))]),
    }
    npy = {
        "! object array": npy_with(npy_header("(1,)", "'|O'"), EVIL),
        "empty and huge": npy_with(npy_header("(0, 999999999999999999, 999999999999999999)"), b""),
        "! huge": npy_with(npy_header("(999999999999999999, 3)"), bytes(12)),
        "no columns": npy_with(npy_header("(999999999999999999, 0)"), b""),
        "of Python 2": npy_with(npy_header("(2L, 3L)"), bytes(24)),
        "leading zeros": npy_with(npy_header("(02, 3)"), bytes(24)),
        "thousands of fields": npy_with(
            npy_header("(1,)", "[" + ", ".join(f"('a{i}', '<f4')" for i in range(2000)) + "]"), bytes(8000)
        ),
    }
    many_fields = "x y z " + "q " * 5000
    huge_row = {
        "FIELDS": many_fields, "SIZE": "4 4 4 " + "8 " * 5000, "TYPE": "F F F " + "F " * 5000,
        "COUNT": "1 1 1 " + "65536 " * 5000, "WIDTH": 1, "HEIGHT": "1", "POINTS": 1,
    }  # fmt: skip
    pcd = {
        "! rows of 2.6 GB": other.pcd_header("binary", 1, **huge_row),
        "escapes in names": other.pcd_header("binary", 1, FIELDS="\x1b[31m a b _ rgb label"),
        "no COUNT": other.pcd_header("binary", 1, COUNT="0 0 0 0 0 0"),
    }
    table = {
        "ply_ascii": scan("a.ply", samples["ascii.ply"], ply),
        "ply_little": scan("a.ply", samples["little.ply"], ply),
        "ply_big": scan("a.ply", samples["big.ply"]),
        "npy": scan("a.npy", samples["six.npy"], npy),
        "npy_record": scan("a.npy", samples["record.npy"], npy),
        "npz": scan("a.npz", samples["plain.npz"], npz),
        "npz_packed": scan("a.npz", samples["packed.npz"]),
        "bin": scan("a.bin", samples["six.bin"]),
        "bin_columns": scan("a.bin", samples["six.bin"], columns=6),
        "pcd_binary": scan("a.pcd", other.binary_pcd(), pcd),
        "pcd_ascii": scan("a.pcd", other.ascii_pcd()),
        "pcd_compressed": scan("a.pcd", other.compressed_pcd()),
        "las_12": scan("a.las", other.las()),
        "las_14": scan("a.las", other.las(7, 4)),
    }
    return {f"points_{name}": reader for name, reader in table.items()}


# ---- Samples of datasets


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


class Evil:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def _evil() -> bytes:
    return pickle.dumps([Evil(os.system, ("touch MARK",)), Evil(open, ("MARK", "w"))])


EVIL = _evil()


def custom() -> dict[str, Reader]:
    rooms = helpers("data_prep/test_custom.py")
    cloud, annotation = rooms.make_room(0)
    cloud = cloud[::5]
    classes = list(rooms.SIZES)
    rows = np.full(len(cloud), -1)
    rows[10:20] = 1
    stream = io.BytesIO()
    np.save(stream, rows.astype(np.int16))

    def make(root):
        rooms.write_ply(root / "room.ply", cloud)
        (root / "room.json").write_text(json.dumps({**annotation, "instance": "rows.npy"}))
        (root / "rows.npy").write_bytes(stream.getvalue())

    files = folder_files(make)
    (sizes,) = [json.loads(files["room.json"])]
    sizes["instance"] = rows.tolist()
    listed = {**files, "room.json": json.dumps(sizes).encode()}
    good = files["room.json"]
    boxes = [{"label": "chair", "center": [1, 1, 1], "size": [1, 1, 1]}] * 10_000
    hostile = {
        f"center {depth} deep": {"room.json": mutations.nested_json(good, depth, _put("boxes", 0, "center"))}
        for depth in (*range(930, 1000, 3), 5000, 100_000)
    }
    hostile |= {
        f"label {depth} deep": {"room.json": mutations.nested_json(good, depth, _put("boxes", 0, "label"))}
        for depth in range(930, 1000, 3)
    }
    hostile |= {
        "ten thousand boxes": {"room.json": json.dumps({"boxes": boxes}).encode()},
        "escapes in a label": {"room.json": _label("\x1b[31mchair")},
        "half a surrogate": {"room.json": _label("\ud800")},
        "! traversal": {"room.json": json.dumps({**annotation, "instance": "../rows.npy"}).encode()},
        "! object array": {"rows.npy": npy_with(npy_header(f"({len(cloud)},)", "'|O'"), EVIL)},
    }

    def read(folder):
        from data_prep.own_scans import read_scan

        return checked(read_scan(folder / "room.ply", classes), len(classes))

    def split(folder):
        from data_prep.custom import find_scans, split_scans

        return split_scans(list(find_scans(folder)), split_file=folder / "split.list")

    def find(root):
        for name in ("a.ply", "b.npy", "c.bin"):
            (root / name).write_bytes(b"x")
        for name in "abc":
            (root / f"{name}.json").write_text(json.dumps({"boxes": [], "instance": "rows.npy"}))
        (root / "rows.npy").write_bytes(b"x")
        (root / "split.list").write_text('{"train": ["a", "b"], "val": ["c"]}')

    lists = {
        "missing list": {"split.list": None},
        "surrogate": {"split.list": b'{"train": ["\\ud800"], "val": ["a"]}'},
        "escapes": {"split.list": b'{"train": ["\\u001b[31m"], "val": ["a"]}'},
        "deep": {"split.list": b'{"train": ' + b"[" * 990 + b"]" * 990 + b"}"},
    }
    return {
        "custom": Reader(files, read, hostile=hostile),
        "custom_listed": Reader(listed, read, targets=("room.json", "room.ply")),
        "custom_split": Reader(folder_files(find), split, targets=("split.list", "a.json"), hostile=lists),
    }


def _put(*keys):
    def place(content, value):
        node = content
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return place


def _label(text: str) -> bytes:
    return json.dumps({"boxes": [{"label": text, "center": [1, 1, 1], "size": [1, 1, 1]}]}).encode()


def scannet() -> dict[str, Reader]:
    raw, prepared = helpers("data_prep/test_scannet_raw.py"), helpers("data_prep/test_votenet_prepared.py")
    tsv = "scannetv2-labels.combined.tsv"

    def make(root):
        raw.write_label_map(root / tsv)
        raw.made_scan(root / "scans" / raw.SCENE)
        (root / "train.txt").write_text("scene0000_00\nscene0000_01\n")

    files = folder_files(make)
    start = f"scans/{raw.SCENE}/{raw.SCENE}"
    aggregation = json.loads(files[f"{start}.aggregation.json"])
    segment = aggregation["segGroups"][0]["segments"][:1]
    groups = [{"id": i, "objectId": i, "segments": segment, "label": "thing 5a"} for i in range(100_000)]
    shift = "axisAlignment = 1 0 0 1e308 0 1 0 0 0 0 1 0 0 0 0 1\n"
    hostile = {
        "! 100,000 objects": {f"{start}.aggregation.json": json.dumps({"segGroups": groups}).encode()},
        "! shift of 1e308": {f"{start}.txt": shift.encode()},
        "label with escapes": {
            f"{start}.aggregation.json": files[f"{start}.aggregation.json"].replace(b"thing 5a", b"\\u001b[31m\\ud800")
        },
    }

    def read(folder):
        return checked(raw.convert(folder), 18)

    def read_list(folder):
        from data_prep.scannet_raw import read_split_list

        return read_split_list(folder / "train.txt")

    box_files = folder_files(prepared.made_scannet)
    count = len(np.load(io.BytesIO(box_files["scene0000_00_ins_label.npy"])))
    many = 20_000
    vert = np.zeros((many, 6), np.float32)
    floods = {
        "! every point an instance": {
            "scene0000_00_vert.npy": _npy(vert),
            "scene0000_00_ins_label.npy": _npy(np.arange(1, many + 1)),
            "scene0000_00_sem_label.npy": _npy(np.full(many, 5)),
            "scene0000_00_bbox.npy": _npy(np.tile([0, 0, 0, 1, 1, 1, 5.0], (1000, 1))),
        },
        "classes of 2^62": {"scene0000_00_sem_label.npy": _npy(np.full(count, 1 << 62))},
        "! object array": {"scene0000_00_bbox.npy": npy_with(npy_header("(1,)", "'|O'"), EVIL)},
    }

    def read_votenet(folder):
        from data_prep.votenet_prepared import convert_votenet_scannet

        return checked(convert_votenet_scannet(folder, "scene0000_00", "train"), 18)

    def read_votenet_sunrgbd(folder):
        from data_prep.votenet_prepared import convert_votenet_sunrgbd

        return checked(convert_votenet_sunrgbd({"val": folder}, prepared.SCAN, "val"), 10)

    return {
        "scannet_raw": Reader(files, read, tuple(n for n in files if n != "train.txt"), hostile),
        "scannet_list": Reader({"train.txt": files["train.txt"]}, read_list),
        "votenet_scannet": Reader(box_files, read_votenet, hostile=floods),
        "votenet_sunrgbd": Reader(folder_files(prepared.made_sunrgbd), read_votenet_sunrgbd),
    }


def _npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


# ---- SUN RGB-D


def sunrgbd() -> dict[str, Reader]:
    import h5py
    import scipy.io
    from oracles.sunrgbd_raw import INTRINSICS, PublishedTree
    from PIL import Image

    damaged = helpers("data_prep/test_sunrgbd_damaged.py")
    frames, flat, v1 = "SUNRGBDMeta3DBB_v2.mat", "SUNRGBDMeta2DBB_v2.mat", "v1.mat"

    def frame_folder(root):
        rng = np.random.default_rng(0)
        for name in ("depth_bfx", "image", "extrinsics"):
            (root / name).mkdir()
        Image.fromarray((rng.integers(500, 8000, (17, 23)) << 3).astype(np.uint16)).save(root / "depth_bfx/d.png")
        Image.fromarray(rng.integers(0, 255, (17, 23, 3)).astype(np.uint8)).save(root / "image/c.jpg")
        (root / "intrinsics.txt").write_text(" ".join(map(str, INTRINSICS.ravel())))
        (root / "extrinsics/e.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n")

    def read_folder(folder):
        from data_prep.sunrgbd_raw import read_frame_folder

        xyz, color = read_frame_folder(folder)
        assert np.isfinite(xyz).all()
        assert xyz.shape == color.shape
        return xyz, color

    def metadata(root):
        tree = PublishedTree(root / "tree")
        (root / frames).write_bytes((tree.root / frames).read_bytes())
        (root / flat).write_bytes((tree.root / flat).read_bytes())
        (root / v1).write_bytes((tree.root / "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat").read_bytes())
        (root / "split.mat").write_bytes((tree.root / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat").read_bytes())
        damaged.write_version_73(root / "new.mat", {"SUNRGBDMeta": tree.entries})
        damaged.write_version_73(root / "split73.mat", tree.splits)
        damaged.write_version_73(root / "points73.mat", {"instance": np.random.default_rng(0).random((50, 6))})

    files = {n: d for n, d in folder_files(metadata).items() if not n.startswith("tree")}
    plain = folder_files(lambda root: _uncompressed(scipy.io, files, root))

    def check_frames(found):
        for item in found:
            if not isinstance(item, str):
                assert not item.depth_path.startswith("/")
                assert ".." not in item.depth_path + item.color_path
                assert np.isfinite(item.boxes.boxes).all()
                assert (item.boxes.boxes[:, 3:6] > 0).all()
            else:
                check_message(item)
        return found

    def read_meta(folder):
        from data_prep.sunrgbd_metadata import read_frames

        return check_frames(read_frames(folder / frames, boxes2d_path=folder / flat))

    def read_v1(folder):
        from data_prep.sunrgbd_metadata import read_frames

        return check_frames(read_frames(folder / frames, labels_v1_path=folder / v1))

    def read_new(folder):
        from data_prep.sunrgbd_metadata import read_frames

        return check_frames(read_frames(folder / "new.mat", all_boxes=True))

    def read_split(name):
        def read(folder):
            from data_prep import sunrgbd_metadata

            split = sunrgbd_metadata.read_split(folder / name)
            assert all(path.startswith("SUNRGBD/") and ".." not in path for path in split)
            return split

        return read

    def read_points(name):
        def read(folder):
            from data_prep.sunrgbd_trainval import read_extracted_points

            points = read_extracted_points(folder / name)
            assert np.isfinite(points).all()
            return points

        return read

    def extracted(root):
        for name in ("depth", "label_v1", "calib"):
            (root / name).mkdir()
        points = np.random.default_rng(0).random((50, 6)).astype(np.float32)
        scipy.io.savemat(root / "depth/000001.mat", {"instance": points}, do_compression=True)
        scipy.io.savemat(root / "depth/000002.mat", {"instance": points})
        label = "chair 1 2 3 4 0.5 1 -1 0.2 0.4 0.6 0 1\nbed 1 2 3 4 1 2 3 .1 .2 .3 -1 0\n"
        (root / "label_v1/000001.txt").write_text(label)
        (root / "label_v1/000002.txt").write_text(label)
        rows = [" ".join(map(str, matrix.ravel(order="F"))) for matrix in (np.eye(3), INTRINSICS)]
        (root / "calib/000001.txt").write_text("\n".join(rows))
        (root / "train_data_idx.txt").write_text("1\n2\n")

    def read_extracted(folder):
        from data_prep.sunrgbd_trainval import convert_extracted, list_scenes, read_calibration

        for matrix in read_calibration(folder / "calib/000001.txt"):
            assert np.isfinite(matrix).all()
        scenes = list_scenes(folder)
        samples = [
            checked(convert_extracted(scene, "train", folder, "v1", 20), 10)
            for scene in ("000001", "000002")
            if scene in scenes["train"] or scene in scenes["val"]
        ]
        return scenes, samples

    def hdf5(change) -> bytes:
        def make(root):
            with h5py.File(root / "x.mat", "w", userblock_size=512) as file:
                change(file)
            data = bytearray((root / "x.mat").read_bytes())
            data[:128] = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
            (root / "x.mat").write_bytes(data)

        return folder_files(make)["x.mat"]

    hostile_hdf5 = {name: hdf5(change) for name, change in HDF5_BOMBS.items()}
    png = mutations.png_chunk

    def image(width, height, body=b"", depth=16, kind=0):
        header = png(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + png(b"IDAT", body) + png(b"IEND", b"")

    images = {
        "! huge": {"depth_bfx/d.png": image(2**31 - 1, 2**31 - 1)},
        "palette": {"depth_bfx/d.png": image(5, 5, depth=8, kind=3)},
        "missing": {"image/c.jpg": None},
        "PNG for JPEG": {"image/c.jpg": image(23, 17)},
        "huge focal length": {"intrinsics.txt": b"1e308 0 1e308 0 1e308 1e308 0 0 1"},
    }
    compressed = {name: data for name, data in files.items() if not name.endswith("73.mat") and name != "new.mat"}
    bomb = folder_files(lambda root: scipy.io.savemat(root / "x.mat", {"instance": np.zeros((1_200_000, 6))}, do_compression=True))
    extracted_files = folder_files(extracted)
    return {
        "sunrgbd_folder": Reader(folder_files(frame_folder), read_folder, hostile=images),
        "sunrgbd_meta": Reader(compressed, read_meta, (frames, flat), memory=256 * MIB),
        "sunrgbd_meta_plain": Reader({**compressed, **plain}, read_meta, (frames, flat), memory=256 * MIB),
        "sunrgbd_meta_v1": Reader(compressed, read_v1, (v1,), memory=256 * MIB),
        "sunrgbd_split": Reader({"split.mat": files["split.mat"]}, read_split("split.mat"), memory=256 * MIB),
        "sunrgbd_extracted": Reader(
            extracted_files, read_extracted, memory=256 * MIB, hostile={"! bomb": {"depth/000001.mat": bomb["x.mat"]}}
        ),
        "sunrgbd_meta_73": Reader({"new.mat": files["new.mat"]}, read_new),
        "sunrgbd_split_73": Reader({"split73.mat": files["split73.mat"]}, read_split("split73.mat")),
        "sunrgbd_points_73": Reader(
            {"points73.mat": files["points73.mat"]},
            read_points("points73.mat"),
            hostile={name: {"points73.mat": data} for name, data in hostile_hdf5.items()},
        ),
    }


def _uncompressed(scipy_io, files, root):
    for name, variable in (("SUNRGBDMeta3DBB_v2.mat", "SUNRGBDMeta"), ("SUNRGBDMeta2DBB_v2.mat", "SUNRGBDMeta2DBB")):
        content = scipy_io.loadmat(io.BytesIO(files[name]))[variable]
        scipy_io.savemat(root / name, {variable: content})


# Of an HDF5 file with the variable `instance`.
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


# ---- mmdetection3d


def mmdet3d() -> dict[str, Reader]:
    maker = helpers("data_prep/test_mmdet3d.py")

    def reader(write, read_name, split, version, extra=None):
        info = f"{read_name.split('_')[1]}_infos_{split}.pkl"
        files = folder_files(lambda root: write(root, version))

        def read(folder):
            import data_prep.mmdet3d

            found = getattr(data_prep.mmdet3d, read_name)(folder, split)
            for note in found.notes:
                check_message(note)
            return [checked(found.convert(name), 18) for name in found.names]

        hostile = {name: {info: data} for name, data in info_bombs(files[info]).items()} | (extra or {})
        return Reader(files, read, hostile=hostile, memory=300 * MIB)

    points = folder_files(lambda root: maker.write_scannet(root, "list"))
    count = len(points["instance_mask/scene0001_00.bin"]) // 8
    masks = {
        "! classes of 2^40": {"semantic_mask/scene0001_00.bin": np.full(count, 1 << 40).tobytes()},
        "! every point an instance": {
            "points/scene0001_00.bin": np.random.default_rng(0).random((30_000, 6)).astype("<f4").tobytes(),
            "semantic_mask/scene0001_00.bin": np.full(30_000, 5).tobytes(),
            "instance_mask/scene0001_00.bin": np.arange(1, 30_001).tobytes(),
        },
    }
    return {
        "mmdet3d_scannet_list": reader(maker.write_scannet, "read_scannet_infos", "train", "list", masks),
        "mmdet3d_scannet_11": reader(maker.write_scannet, "read_scannet_infos", "train", "1.1"),
        "mmdet3d_sunrgbd_list": reader(maker.write_sunrgbd, "read_sunrgbd_infos", "val", "list"),
        "mmdet3d_sunrgbd_11": reader(maker.write_sunrgbd, "read_sunrgbd_infos", "val", "1.1"),
    }


def info_bombs(data: bytes) -> dict[str, bytes]:
    """Info files with one field replaced by what is slow, huge or hostile."""
    content = pickle.loads(data)
    is_list = isinstance(content, list)
    values = {
        "doubling tuple": mutations.doubling(),
        "doubling list": mutations.doubling(list),
        "endless list": mutations.endless_list(),
        "infinite": float("inf"),
        "wide integer": 1 << 100_000,
        "surrogate": "\ud800.bin",
        "escapes": "\x1b[31m.bin",
        "traversal": "../../etc/passwd",
        "number": 7,
        "deep list": mutations.deep_list(20_000),
        "! os.system": Evil(os.system, ("touch MARK",)),
        "! open": Evil(open, ("MARK", "w")),
    }
    places: list[tuple] = []

    def visit(node, keys, depth):
        if isinstance(node, dict | list) and len(node):
            keys_here = list(node) if isinstance(node, dict) else [0]
            if len(keys_here) > 9:  # the classes
                keys_here = keys_here[:1]
            for key in keys_here:
                places.append((*keys, key))
                visit(node[key], (*keys, key), depth + 1)

    visit(content, (), 0)
    bombs = {}
    for keys in places:
        for name, value in values.items():
            changed = pickle.loads(data)
            _put(*keys)(changed, value)
            try:
                bombs[f"{name} at {'.'.join(map(str, keys))}"] = pickle.dumps(changed, 4)
            except RecursionError:  # the deep list, by hand
                holder = pickle.loads(data)
                _put(*keys)(holder, "@@@@")
                text = pickle.dumps(holder, 2)
                at = text.index(b"X\x04\x00\x00\x00@@@@")
                bombs[f"{name} at {'.'.join(map(str, keys))}"] = text[:at] + _deep_program() + text[at + 9 :]
    assert is_list or "data_list" in content
    return bombs


def _deep_program(depth: int = 20_000) -> bytes:
    return b"]" * (depth + 1) + b"a" * depth


# ---- Checkpoints


def checkpoints() -> dict[str, Reader]:
    maker = helpers("interop/test_torch_file.py")
    obj = maker.checkpoint()

    def read(folder):
        from vrdistill_jax.interop.torch_file import read_torch_file

        return read_torch_file(folder / "file.pth")

    def state(folder):
        from vrdistill_jax.interop.name_map import find_state_dict
        from vrdistill_jax.interop.torch_file import read_torch_file

        return find_state_dict(read_torch_file(folder / "file.pth"), ("model_state_dict", "model"))

    bombs = maker.bombs()
    bombs |= {f"! malicious: {name}": _archive(program) for name, program in maker.malicious("MARK").items()}
    bombs |= checkpoint_bombs(maker)
    hostile = {name: {"file.pth": data} for name, data in bombs.items()}

    def reader(data, **options):
        return Reader({"file.pth": data}, read, memory=300 * MIB, **options)

    big = torch_writer.zip_bytes(obj, order="big", protocol=4)
    return {
        "torch_zip": reader(torch_writer.zip_bytes(obj), hostile=hostile),
        "torch_zip_big": reader(big),
        "torch_legacy": reader(torch_writer.legacy_bytes(obj)),
        "torch_xz": reader(lzma.compress(torch_writer.zip_bytes(obj))),
        "torch_state": Reader({"file.pth": torch_writer.zip_bytes(obj)}, state, names_file=False, memory=300 * MIB),
    }


def _archive(program) -> bytes:
    return torch_writer.zip_of(program if isinstance(program, bytes) else program.encode("latin-1"))


def checkpoint_bombs(maker) -> dict[str, bytes]:
    megabyte = bytes(MIB)
    untyped = b"(S'storage'\nctorch\nUntypedStorage\nS'0'\nS'cpu'\nI1048576\ntQq\x000"
    call = b"ctorch._utils\n_rebuild_tensor_v3\n(h\x00I0\n(I1\nt(I1\ntI00\nNctorch\nfloat64\ntR"
    empties = b"(" + b"X\x00\x00\x00\x00" + b"2" * 60_000 + b"tq\x010"
    wide_key = b"\x8b" + struct.pack("<i", MIB) + b"\x7f" * MIB + b"q\x000}q\x01"
    return {
        "a storage decoded 2000 times": torch_writer.zip_of(
            b"(" + untyped + call * 2000 + b"l.", {"data/0": megabyte}
        ),
        "a path of 60,000 parts 4000 times": _archive(empties + b"(" + b"cpathlib\nPosixPath\nh\x01R0" * 4000 + b"l."),
        "a wide integer hashed 20,000 times": _archive(wide_key + b"h\x01h\x00Ns0" * 20_000 + b"h\x01."),
        "! xz bomb": lzma.compress(torch_writer.zip_of(b"N.", {"data/0": bytes(64 * MIB)}), preset=0),
        "xz dictionary of 1 GB": _xz_with_large_dictionary(),
        "! zip bomb": mutations.write_zip([("a/data.pkl", bytes(64 * MIB))], zipfile.ZIP_DEFLATED),
        "upward names": mutations.write_zip([("../../data.pkl", b"N."), ("../../data/0", b"x")]),
        "escapes in a class": _archive(b"c\x1b[31mmodels\nVote\x07Net\n)\x81."),
        "a storage called ../x": torch_writer.zip_of(
            maker.rebuild(6, 0, (2,), (1,)).replace(b"S'0'", b"S'../../x'"), {"data/0": bytes(24)}
        ),
        "an escape as a storage": torch_writer.zip_of(
            maker.rebuild(6, 0, (2,), (1,)).replace(b"S'0'", b"S'\\x1b[31m'"), {"data/0": bytes(24)}
        ),
    }


def _xz_with_large_dictionary() -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    data = bytearray(lzma.compress(torch_writer.zip_of(b"N."), filters=filters))
    at = data.index(b"\x21\x01") + 2  # the dictionary's size of the LZMA2 filter
    data[at] = 36  # 1 GiB
    head = data[12:]
    size = (head[0] + 1) * 4
    data[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(bytes(head[: size - 4])))
    return bytes(data)


def keras() -> dict[str, Reader]:
    import h5py

    maker = helpers("interop/test_keras_votenet.py")
    data = folder_files(lambda root: maker.write(root / "w.h5"))

    def small(root):
        with h5py.File(root / "w.h5", "w") as file:
            for n in range(3):
                file[f"conv2d_{n}/conv2d_{n}/kernel:0"] = np.ones((1, 1, 4, 5), np.float32)
                file.create_dataset(f"bn_{n}/bn_{n}/gamma:0", data=np.ones(50, np.float32), compression="gzip")
            file.attrs["layer_names"] = [b"conv2d_0", b"bn_0"]

    def hdf5(change):
        def make(root):
            with h5py.File(root / "w.h5", "w") as file:
                change(file)

        return folder_files(make)

    def read(folder):
        from vrdistill_jax.interop.keras_votenet import read_keras_file

        return read_keras_file(folder / "w.h5")

    def variables(folder):
        from vrdistill_jax.interop.keras_votenet import variables_from_keras

        return variables_from_keras(folder / "w.h5")[0]

    hostile = {name: hdf5(change) for name, change in HDF5_BOMBS.items()}
    hostile["doubling references"] = hostile.pop("! doubling references")  # which Keras files do not follow
    return {
        "keras_h5": Reader(folder_files(small), read, hostile=hostile),
        "keras_votenet": Reader(data, variables, names_file=False),
    }


def check_message(text: str) -> None:
    """A message must be short, printable on any terminal, and hold no escape sequences."""
    assert len(text) < 2500, f"a message of {len(text)} characters: {text[:200]!a}"
    strange = [c for c in text if not c.isprintable()]
    assert not strange, f"the message holds {strange[:3]!a}: {text[:300]!a}"


# ---- Readers that break the rules: what watches over the others must notice


def broken() -> dict[str, Reader]:
    def unpickle(folder):
        return pickle.loads((folder / "a.bin").read_bytes())

    def evaluate(folder):
        return eval("__import__('os').system('true')")

    def loop(folder):
        while True:
            pass

    def hoard(folder):
        return len(b"x" * (400 * MIB))

    def ask_for_everything(folder):
        try:
            return np.ones(1 << 45)
        except MemoryError as error:
            raise ValueError(f"{folder}: too large") from error

    def stumble(folder):
        raise KeyError(folder)

    def crash(folder):
        os.kill(os.getpid(), signal.SIGSEGV)

    def leave(folder):
        os._exit(0)

    def stay_vague(folder):
        raise ValueError("the file is damaged")

    def paint(folder):
        raise ValueError(f"{folder}: \x1b[31m")

    def warn(folder):
        return np.array([1e300]).astype(np.float32)

    def write(folder):
        (folder / "new").write_text("x")

    def wander(folder):
        return pathlib.Path("/etc/passwd").read_bytes()

    def inflate(folder):
        return np.zeros(10 * MIB, np.uint8)

    def accept(folder):
        return None

    table = [unpickle, evaluate, loop, hoard, ask_for_everything, stumble, crash, leave, stay_vague, paint, warn]
    table += [write, wander, inflate, accept]
    hostile: dict[str, dict[str, bytes | None]] = {"! anything": {"a.bin": EVIL}}
    return {read.__name__: Reader({"a.bin": EVIL}, read, hostile=hostile, warm_up=False) for read in table}


GROUPS = {
    "points": scans,
    "custom": custom,
    "scannet": scannet,
    "sunrgbd": sunrgbd,
    "mmdet3d": mmdet3d,
    "torch": checkpoints,
    "keras": keras,
}


@functools.cache
def make_group(name: str) -> dict[str, Reader]:
    """The readers of a group by name."""
    return broken() if name == "broken" else GROUPS[name]()
