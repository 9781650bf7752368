"""Scans of every format, and folders of one's own scans with their annotations."""

import io
import json
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np
from fuzz import file_mutations, mutations
from fuzz.samples import EVIL, Reader, checked, folder_files, helpers, npy_header, npy_with, npz_with, put


def scan(
    name: str, content: bytes, hostile: Mapping[str, bytes] | None = None, columns: int | None = None
) -> Reader:
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

    return Reader(
        {name: content}, read, hostile={key: {name: value} for key, value in (hostile or {}).items()}
    )


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
    lzma_entry = bytearray(file_mutations.write_zip([("points.npy", samples["six.npy"])], zipfile.ZIP_LZMA))
    lzma_entry[60] ^= 0xFF
    npz = {
        "! bomb": bomb,
        "damaged LZMA entry": bytes(lzma_entry),
        "upward names": file_mutations.write_zip([("../../etc/points.npy", samples["six.npy"])]),
        "escapes in names": file_mutations.write_zip([("\x1b[31m.npy", b"x"), ("b\n.npy", b"x")]),
        "! object array": file_mutations.write_zip(
            [("points.npy", npy_with(npy_header("(1,)", "'|O'"), EVIL))]
        ),
    }
    npy = {
        "! object array": npy_with(npy_header("(1,)", "'|O'"), EVIL),
        "empty and huge": npy_with(npy_header("(0, 999999999999999999, 999999999999999999)"), b""),
        "! huge": npy_with(npy_header("(999999999999999999, 3)"), bytes(12)),
        "no columns": npy_with(npy_header("(999999999999999999, 0)"), b""),
        "of Python 2": npy_with(npy_header("(2L, 3L)"), bytes(24)),
        "! header of no length": b"\x93NUMPY\x01\x00\x00\x00" + bytes(20),
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
        f"center {depth} deep": {"room.json": mutations.nested_json(good, depth, put("boxes", 0, "center"))}
        for depth in (*range(930, 1000, 3), 5000, 100_000)
    }
    hostile |= {
        f"label {depth} deep": {"room.json": mutations.nested_json(good, depth, put("boxes", 0, "label"))}
        for depth in range(930, 1000, 3)
    }
    hostile |= {
        "ten thousand boxes": {"room.json": json.dumps({"boxes": boxes}).encode()},
        "escapes in a label": {"room.json": _label("\x1b[31mchair")},
        "! size that float32 cannot hold": {
            "room.json": _label("chair").replace(b"[1, 1, 1]}", b"[1, 1e-320, 1]}")
        },
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


def _label(text: str) -> bytes:
    return json.dumps({"boxes": [{"label": text, "center": [1, 1, 1], "size": [1, 1, 1]}]}).encode()
