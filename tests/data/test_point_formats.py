import struct

import numpy as np
import pytest

from vrdistill_jax.data.point_files import PointFileError, read_points

RNG = np.random.default_rng(0)
XYZ = RNG.uniform([-3, -2, 0], [3, 2, 2.5], (400, 3)).astype(np.float32)
RGB = RNG.integers(0, 256, (400, 3)).astype(np.uint8)
PACKED = (RGB.astype(np.uint32) << [16, 8, 0]).sum(1).astype(np.uint32)


def pcd_header(data, count=400, **changes):
    lines = {
        "VERSION": "0.7",
        "FIELDS": "x y z _ rgb label",
        "SIZE": "4 4 4 1 4 2",
        "TYPE": "F F F U F U",
        "COUNT": "1 1 1 3 1 1",
        "WIDTH": count,
        "HEIGHT": "1",
        "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": count,
        "DATA": data,
    } | changes
    return (
        "# .PCD v0.7\n" + "".join(f"{key} {value}\n" for key, value in lines.items() if value is not None)
    ).encode()


def binary_pcd(**changes):
    rows = [
        struct.pack("<fff3sIH", *map(float, p), b"\x07\x08\x09", int(c), 9)
        for p, c in zip(XYZ, PACKED, strict=True)
    ]
    return pcd_header("binary", **changes) + b"".join(rows)


def ascii_pcd():
    values = PACKED.view(np.float32)
    rows = [f"{p[0]:.9g} {p[1]:.9g} {p[2]:.9g} 1 2 3 {c:.9g} 4\n" for p, c in zip(XYZ, values, strict=True)]
    return pcd_header("ascii") + "".join(rows).encode()


def pack_lzf(data):
    """A plain LZF writer: a reference where the last three bytes occurred before, else literals."""
    out, literals, seen, at = bytearray(), bytearray(), {}, 0

    def flush():
        for start in range(0, len(literals), 32):
            piece = literals[start : start + 32]
            out.append(len(piece) - 1)
            out.extend(piece)
        literals.clear()

    while at < len(data):
        key = bytes(data[at : at + 3])
        before = seen.get(key)
        seen[key] = at
        if len(key) == 3 and before is not None and at - before <= 8192:
            length = 3
            while at + length < len(data) and length < 264 and data[before + length] == data[at + length]:
                length += 1
            flush()
            back, coded = at - before - 1, length - 2
            out.append((min(coded, 7) << 5) | back >> 8)
            if coded >= 7:
                out.append(coded - 7)
            out.append(back & 255)
            at += length
        else:
            literals.append(data[at])
            at += 1
    flush()
    return bytes(out)


def compressed_pcd():
    columns = [XYZ[:, 0], XYZ[:, 1], XYZ[:, 2], np.tile(np.array([7, 7, 7], np.uint8), len(XYZ))]
    columns += [PACKED, np.full(len(XYZ), 9, np.uint16)]
    data = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
    packed = pack_lzf(data)
    assert len(packed) < len(data)  # references occur
    return pcd_header("binary_compressed") + struct.pack("<II", len(packed), len(data)) + packed


def las(form=2, minor=2, scale=0.001, offset=(100.0, 200.0, 0.0), color=True, extra=0, compressed=False):
    """Written with struct alone; `extra` bytes follow each record, as the format allows."""
    color_at = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30}.get(form)
    size = {0: 20, 1: 28, 2: 26, 3: 34, 4: 57, 5: 63, 6: 30, 7: 36, 8: 38}[form] + extra
    header = bytearray(375 if minor == 4 else 227)
    header[:4], header[24], header[25] = b"LASF", 1, minor
    struct.pack_into("<HII", header, 94, len(header), len(header) + 54, 1)
    struct.pack_into("<BH", header, 104, form | (0x80 if compressed else 0), size)
    struct.pack_into("<I", header, 107, 0 if minor == 4 else len(XYZ))
    struct.pack_into("<6d", header, 131, *[scale] * 3, *offset)
    if minor == 4:
        struct.pack_into("<Q", header, 247, len(XYZ))
    rows = bytearray()
    for p, c in zip(XYZ.astype(np.float64), RGB, strict=True):
        record = bytearray(size)
        struct.pack_into("<3i", record, 0, *np.rint((p - offset) / scale).astype(int))
        if color_at and color:
            struct.pack_into("<3H", record, color_at, *(int(v) * 257 for v in c))
        rows += record
    return bytes(header) + b"\0" * 54 + bytes(rows)


@pytest.fixture
def read(tmp_path):
    def function(name, data):
        (tmp_path / name).write_bytes(data)
        return read_points(tmp_path / name)

    return function


@pytest.mark.parametrize("make", [binary_pcd, ascii_pcd, compressed_pcd])
def test_pcd_files(read, make):
    cloud = read("a.pcd", make())
    np.testing.assert_allclose(cloud.xyz, XYZ, atol=1e-6)
    np.testing.assert_allclose(cloud.color, RGB / 255, atol=1e-6)
    assert cloud.warnings == ()


def test_pcd_colours_as_integers_fields_or_not_at_all(read):
    fields = {
        "FIELDS": "x y z rgba",
        "SIZE": "8 8 8 4",
        "TYPE": "F F F U",
        "COUNT": None,
        "VIEWPOINT": None,
        "POINTS": None,
    }
    table = np.zeros(len(XYZ), [("xyz", "<f8", 3), ("c", "<u4")])
    table["xyz"], table["c"] = XYZ, PACKED | 0xFF000000
    cloud = read("a.pcd", pcd_header("binary", **fields) + table.tobytes())
    np.testing.assert_allclose(cloud.color, RGB / 255, atol=1e-6)
    np.testing.assert_allclose(cloud.xyz, XYZ, atol=1e-6)

    rows = "".join(
        f"{x:.9g} {y:.9g} {z:.9g} {c}\n" for (x, y, z), c in zip(XYZ, PACKED, strict=True)
    ).encode()
    written = fields | {
        "SIZE": "4 4 4 4",
        "TYPE": "F F F F",
    }  # the word printed as a number under a float's name
    np.testing.assert_allclose(
        read("a.pcd", pcd_header("ascii", **written) + rows).color, RGB / 255, atol=1e-6
    )

    plain = fields | {"FIELDS": "x y z intensity", "SIZE": "4 4 4 4", "TYPE": "F F F F"}
    data = np.concatenate([XYZ, XYZ[:, :1]], 1).tobytes()
    cloud = read("a.pcd", pcd_header("binary", **plain) + data)
    assert cloud.color is None
    np.testing.assert_array_equal(cloud.xyz, XYZ)
    turned = read("a.pcd", pcd_header("binary", **(plain | {"VIEWPOINT": "1 0 0 1 0 0 0"})) + data)
    assert "viewpoint" in turned.warnings[0]


@pytest.mark.parametrize(
    ("form", "minor"), [(0, 2), (1, 2), (2, 2), (3, 3), (4, 3), (5, 3), (6, 4), (7, 4), (8, 4)]
)
def test_las_files(read, form, minor):
    cloud = read("a.las", las(form, minor, extra=form % 3))
    np.testing.assert_allclose(cloud.xyz, XYZ, atol=6e-4)
    if form in (2, 3, 5, 7, 8):
        np.testing.assert_allclose(cloud.color, RGB / 255, atol=1e-6)
    else:
        assert cloud.color is None


def test_las_without_colours_in_a_format_that_has_them(read):
    assert read("a.las", las(2, color=False)).color is None


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.laz", b"LASF" + bytes(400), "LAZ"),
        ("a.las", las(compressed=True), "LAZ"),
        ("a.las", b"ply\n" + bytes(300), "not a LAS"),
        ("a.las", las()[:-1], "truncated"),
        ("a.las", las()[:100], "not a LAS"),
        ("a.las", las(scale=0.001)[:131] + struct.pack("<d", float("nan")) + las()[139:], "scale"),
        ("a.pcd", b"ply\nformat ascii 1.0\n", "not a PCD"),
        ("a.pcd", binary_pcd()[:-1], "truncated"),
        ("a.pcd", ascii_pcd()[:-40], "truncated"),
        ("a.pcd", compressed_pcd()[:-1], "truncated"),
        ("a.pcd", binary_pcd(POINTS=7), "WIDTH x HEIGHT"),
        ("a.pcd", binary_pcd(WIDTH=-1), "no number"),
        ("a.pcd", binary_pcd(WIDTH=10**9, POINTS=10**9), "more than fit"),
        ("a.pcd", binary_pcd(FIELDS="a b z _ rgb label"), "no x, y, z"),
        ("a.pcd", binary_pcd(TYPE="F F F U Q U"), "type"),
        ("a.pcd", pcd_header("binary", 0), "0 points"),
        ("a.pcd", pcd_header("zip"), "DATA"),
    ],
)
def test_wrong_files_are_explained(read, name, data, reason):
    with pytest.raises(PointFileError, match=f"{name}.*{reason}"):
        read(name, data)


def test_a_reference_before_the_start_of_the_data_is_refused(read):
    size = len(XYZ) * 21
    packed = b"\x20\x05" + b"\x00\x00" * 20
    with pytest.raises(PointFileError, match="damaged"):
        read("a.pcd", pcd_header("binary_compressed") + struct.pack("<II", len(packed), size) + packed)


def problem_of(read, *arguments):
    try:
        read(*arguments)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a.pcd", binary_pcd()),
        ("b.pcd", ascii_pcd()),
        ("c.pcd", compressed_pcd()),
        ("d.las", las(7, 4)),
        ("e.las", las()),
    ],
)
def test_damaged_files_give_one_clear_error(read, name, good):
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        start = 300 if rng.random() < 0.7 else len(data)  # the header is where damage matters
        match rng.integers(3):
            case 0:
                data = data[: rng.integers(1, len(data))]
            case 1:
                for at in rng.integers(0, start, rng.integers(1, 6)):
                    data[at] = rng.integers(256)
            case 2:
                at = rng.integers(0, start)
                data[at : at + rng.integers(1, 20)] = b""
        problem = problem_of(read, name, bytes(data))
        assert problem is None or name in problem
        refused += problem is not None
    assert refused > 20
