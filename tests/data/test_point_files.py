import io
import struct
import time
import zipfile

import numpy as np
import pytest

from vrdistill_jax.data.point_files import PointFileError, read_points

XYZ = np.array([[0.5, -1.25, 2.0], [3.0, 4.0, -5.5], [1e-3, 0, 7.75]], np.float32)
RGB = np.array([[255, 0, 51], [0, 102, 255], [153, 204, 0]], np.uint8)


def cloud(rows=300, seed=0):
    rng = np.random.default_rng(seed)
    xyz = rng.uniform([-3, -2, 0], [3, 2, 2.5], (rows, 3)).astype(np.float32)
    return xyz, rng.integers(0, 256, (rows, 3)).astype(np.float32)


def binary_ply(order="<", xyz=XYZ, rgb=RGB, *, before=b"", before_header="", tail_header="", tail=b""):
    """Written with struct alone; properties in an unusual order and of mixed types."""
    name = {"<": "binary_little_endian", ">": "binary_big_endian"}[order]
    header = (
        f"ply\nformat {name} 1.0\ncomment x\n{before_header}element vertex {len(xyz)}\n"
        "property uchar blue\nproperty float z\nproperty short quality\nproperty double x\n"
        f"property uchar red\nproperty float y\nproperty uchar green\n{tail_header}end_header\n"
    )
    rows = [
        struct.pack(order + "BfhdBfB", int(c[2]), p[2], -7, p[0], int(c[0]), p[1], int(c[1]))
        for p, c in zip(xyz, rgb, strict=True)
    ]
    return header.encode() + before + b"".join(rows) + tail


def ascii_ply(xyz=XYZ, rgb=RGB, newline="\n"):
    lines = ["ply", "format ascii 1.0", "obj_info test", f"element vertex {len(xyz)}"]
    lines += [f"property float {n}" for n in "xyz"] + [
        f"property uchar {n}" for n in ("red", "green", "blue")
    ]
    lines += ["element face 1", "property list uchar int vertex_indices", "end_header"]
    rows = zip(xyz, rgb, strict=True)
    lines += [f"{p[0]:.8g} {p[1]:.8g} {p[2]:.8g} {c[0]:.0f} {c[1]:.0f} {c[2]:.0f}" for p, c in rows]
    return newline.join([*lines, "3 0 1 2", ""]).encode()


def npy_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz_bytes(compressed=False, **arrays):
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


@pytest.fixture
def read(tmp_path):
    def run(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content)
        return read_points(path, **options)

    return run


def assert_is_the_cloud(result):
    assert result.xyz.dtype == result.color.dtype == np.float32
    np.testing.assert_allclose(result.xyz, XYZ, rtol=1e-6)
    np.testing.assert_allclose(result.color, RGB / 255, atol=1e-6)
    assert not result.warnings


FACES = "element face 2\nproperty list uchar int vertex_indices\n"
CAMERAS = "element camera 2\nproperty list ushort double values\nproperty float focal\n"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("placement", ["alone", "faces_after", "lists_before", "scalars_before"])
def test_binary_ply_of_any_layout(read, order, placement):
    faces = struct.pack(order + "BiiiBiiii", 3, 0, 1, 2, 4, 0, 1, 2, 0)
    cameras = struct.pack(order + "HddfHf", 2, 1.0, 2.0, 3.0, 0, 4.0)
    options = {
        "alone": {},
        "faces_after": {"tail_header": FACES, "tail": faces},
        "lists_before": {"before_header": CAMERAS + FACES, "before": cameras + faces},
        "scalars_before": {
            "before_header": "element a 2\nproperty ushort v\n",
            "before": struct.pack(order + "HH", 1, 2),
        },
    }[placement]
    assert_is_the_cloud(read("a.ply", binary_ply(order, **options)))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_ascii_ply(read, newline):
    assert_is_the_cloud(read("a.PLY", ascii_ply(newline=newline)))


def test_ply_vertices_with_a_list(read):
    header = "element vertex 2\nproperty list uchar short seen\n" + "".join(
        f"property float {n}\n" for n in "xyz"
    )
    body = struct.pack("<Bhhfff", 2, 5, 6, 1, 2, 3) + struct.pack("<Bfff", 0, 4, 5, 6)
    got = read("a.ply", f"ply\nformat binary_little_endian 1.0\n{header}end_header\n".encode() + body)
    np.testing.assert_array_equal(got.xyz, [[1, 2, 3], [4, 5, 6]])
    got = read("b.ply", f"ply\nformat ascii 1.0\n{header}end_header\n2 5 6 1 2 3\n0 4 5 6\n".encode())
    np.testing.assert_array_equal(got.xyz, [[1, 2, 3], [4, 5, 6]])
    assert got.color is None


@pytest.mark.parametrize(
    ("names", "kind", "values"),
    [
        ("diffuse_red diffuse_green diffuse_blue", "uchar", (255, 51, 0)),
        ("r g b", "float", (1.0, 0.2, 0.0)),
        ("red green blue", "float", (255.0, 51.0, 0.0)),
        ("red green blue", "ushort", (65535, 13107, 0)),
        ("Red Green Blue", "uint8", (255, 51, 0)),
    ],
)
def test_ply_colour_names_and_scales(read, names, kind, values):
    header = "".join(f"property float {n}\n" for n in "xyz") + "".join(
        f"property {kind} {n}\n" for n in names.split()
    )
    text = (
        f"ply\nformat ascii 1.0\nelement vertex 1\n{header}end_header\n1 2 3 {' '.join(map(str, values))}\n"
    )
    np.testing.assert_allclose(read("a.ply", text.encode()).color, [[1, 0.2, 0]], atol=1e-6)


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.dtype(">f4")])
def test_npy_six_columns(read, scale, dtype):
    xyz, rgb = cloud()
    got = read("a.npy", npy_bytes(np.c_[xyz, rgb / 255 * scale].astype(dtype)))
    np.testing.assert_allclose(got.xyz, xyz, rtol=1e-6)
    np.testing.assert_allclose(got.color, rgb / 255, atol=1e-6)
    assert not got.warnings


def test_npy_other_columns(read):
    xyz, rgb = cloud()
    assert read("a.npy", npy_bytes(np.asfortranarray(xyz))).color is None
    np.testing.assert_array_equal(read("a.npy", npy_bytes(np.asfortranarray(xyz))).xyz, xyz)
    got = read("a.npy", npy_bytes(np.c_[xyz, xyz[:, 2]]))
    assert got.color is None
    assert "columns 4 to 4" in got.warnings[0]
    got = read("a.npy", npy_bytes(np.c_[xyz, rgb, xyz]))
    assert got.color is not None
    assert "columns 7 to 9" in got.warnings[0]
    got = read("a.npy", npy_bytes(np.c_[xyz, xyz]))  # negative values are no colours
    assert got.color is None
    assert "normals" in got.warnings[0]
    record = np.zeros(len(xyz), [("z", "<f4"), ("x", "<f8"), ("y", "<f4")])
    for axis, name in enumerate("xyz"):
        record[name] = xyz[:, axis]
    np.testing.assert_allclose(read("a.npy", npy_bytes(record)).xyz, xyz, rtol=1e-6)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_keys(read, compressed):
    xyz, rgb = cloud()
    for key in ("points", "pc", "xyz", "point_cloud", "anything"):
        np.testing.assert_array_equal(read("a.npz", npz_bytes(compressed, **{key: xyz})).xyz, xyz)
    got = read("a.npz", npz_bytes(compressed, coord=xyz, color=rgb, label=np.arange(len(xyz))))
    np.testing.assert_allclose(got.color, rgb / 255, atol=1e-6)
    with pytest.raises(PointFileError, match=r"arrays: first, second.*points, pc"):
        read("a.npz", npz_bytes(compressed, first=xyz, second=xyz))
    got = read("a.npz", npz_bytes(compressed, pc=xyz, rgb=rgb[1:]))
    assert got.color is None
    assert "does not match" in got.warnings[0]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("columns", [3, 4, 5, 6])
def test_bin_columns_are_found(read, columns, positive):
    xyz, rgb = cloud(4200)
    xyz = xyz + (5 if positive else 0)
    extra = np.random.default_rng(1).uniform(0, 1, (len(xyz), 2)).astype(np.float32)
    table = {3: xyz, 4: np.c_[xyz, extra[:, 0]], 5: np.c_[xyz, extra], 6: np.c_[xyz, rgb]}[columns].astype(
        "<f4"
    )
    for content in (table, table[: 4200 - 7]):  # several divisors, and few
        got = read("a.bin", content.tobytes())
        np.testing.assert_array_equal(got.xyz, content[:, :3])
        assert (got.color is not None) == (columns == 6)
        assert ("--columns" in "".join(got.warnings)) == (columns != 6)


def test_bin_columns_given_or_ambiguous(read):
    xyz, _ = cloud(300)
    content = np.c_[xyz, xyz[:, :1]].astype("<f4").tobytes()
    np.testing.assert_array_equal(read("a.bin", content, columns=4).xyz, xyz)
    with pytest.raises(PointFileError, match="rows of 7 columns"):
        read("a.bin", content, columns=7)
    noise = np.random.default_rng(0).normal(size=3 * 4 * 5 * 6 * 20).astype("<f4").tobytes()
    with pytest.raises(PointFileError, match="--columns"):
        read("a.bin", noise)
    assert len(read("a.bin", noise, columns=5).xyz) == 3 * 4 * 6 * 20
    with pytest.raises(PointFileError, match="at least 3"):
        read("a.bin", noise, columns=2)


def ply_text(*lines):
    return ("\n".join(["ply", *lines, "end_header", ""])).encode()


VERTEX = ("element vertex 3", "property float x", "property float y", "property float z")
BINARY = "format binary_little_endian 1.0"
ASCII = "format ascii 1.0"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ply", b"", "empty"),
        ("a.ply", b"hello, this is a text file\n", "not a PLY"),
        ("a.ply", npy_bytes(XYZ), "NumPy"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 3\n", "no end_header"),
        ("a.ply", ply_text(*VERTEX), "no format"),
        ("a.ply", ply_text(ASCII, "element face 3", "property float x"), "no vertex element"),
        ("a.ply", ply_text(ASCII, "element vertex 3", "property float x"), "no x, y, z"),
        ("a.ply", ply_text(ASCII, "element vertex 0", *VERTEX[1:]), "0 points"),
        ("a.ply", ply_text(ASCII, "element vertex -3", *VERTEX[1:]), "line 3 of the PLY header"),
        ("a.ply", ply_text(BINARY, "element vertex 999999999999999", *VERTEX[1:]), "truncated"),
        ("a.ply", ply_text(ASCII, "element vertex 999999999999999", *VERTEX[1:]), "truncated"),
        ("a.ply", ply_text(BINARY, "element a 99999999999", "property int q", *VERTEX), "truncated"),
        ("a.ply", binary_ply()[:-1], r"need at least 63 bytes, 62 are left"),
        ("a.ply", ascii_ply()[:-40], "truncated|values"),
        ("a.ply", ascii_ply().replace(b"-1.25", b"abc"), "not made of numbers"),
        ("a.ply", ascii_ply().replace(b"-1.25", b""), "5 values, not 6"),
        ("a.npy", b"hello", "not a NumPy array"),
        ("a.npy", npy_bytes(XYZ)[:-1], "truncated"),
        ("a.npy", npy_bytes(np.zeros((0, 3))), "0 points"),
        ("a.npy", npy_bytes(np.zeros((5, 2))), r"\(5, 2\)"),
        ("a.npy", npy_bytes(np.zeros((3, 400))), "transpose"),
        ("a.npy", npy_bytes(np.array([{"a": 1}], object)), "Python objects"),
        ("a.npy", npy_bytes(np.array(["a", "b"])), "type"),
        ("a.npy", npy_bytes(XYZ).replace(b"(3, 3), }  ", b"(3, 9999)} "), "truncated"),
        ("a.npz", b"hello", "not an intact"),
        ("a.npz", npz_bytes(pc=XYZ)[:-30], "not an intact"),
        ("a.npz", npz_bytes(pc=np.array([{}], object)), "Python objects"),
        ("a.bin", b"\0" * 13, "13 bytes"),
        ("a.bin", npy_bytes(XYZ), "another format"),
        ("a.bin", b"this is a text file, not floats\n" * 600, "--columns"),
        ("a.txt", b"1 2 3\n", "unknown ending"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(read, name, content, message):
    with pytest.raises(PointFileError, match=message) as error:
        read(name, content)
    assert name in str(error.value)
    assert "; " in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PointFileError, match="does not exist"):
        read_points(tmp_path / "none.ply")
    (tmp_path / "folder.ply").mkdir()
    with pytest.raises(PointFileError, match="not a file"):
        read_points(tmp_path / "folder.ply")


def test_nothing_is_unpickled(read, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    for name, content in (
        ("a.npy", npy_bytes(np.array([Bomb()]))),
        ("a.npz", npz_bytes(points=np.array([Bomb()]))),
    ):
        with pytest.raises(PointFileError):
            read(name, content)
    assert not (tmp_path / "owned").exists()


def test_an_archive_that_claims_too_much_is_refused_before_it_is_unpacked(read):
    stream = io.BytesIO()
    header = npy_bytes(np.zeros((1, 3), np.float32))[:128].replace(b"(1, 3), }  ", b"(1, 3), }  ")
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", header + bytes(12))
    content = stream.getvalue()
    claim = struct.pack("<I", 0xFFFF0000)
    at = content.rindex(b"PK\x01\x02") + 24  # uncompressed size in the central directory
    with pytest.raises(PointFileError, match="more than"):
        read("a.npz", content[:at] + claim + content[at + 4 :])


def test_nan_infinity_and_overflow_are_kept_as_invalid(read):
    xyz = np.array([[1, 2, 3], [np.nan, 0, 0], [np.inf, 0, 0], [1e300, 0, 0]], np.float64)
    got = read("a.npy", npy_bytes(xyz))
    np.testing.assert_array_equal(np.isfinite(got.xyz).all(1), [True, False, False, False])
    got = read("a.npy", npy_bytes(np.c_[np.ones((2, 3)), [[0.5, np.nan, 1], [1, 1, 1]]]))
    assert "1 points have a NaN" in got.warnings[0]
    assert np.isfinite(got.color).all()


def test_far_coordinates_and_surplus_bytes_are_reported(read):
    xyz, rgb = cloud()
    far = xyz.astype(np.float64) + 4e6
    assert "float32" in read("a.npy", npy_bytes(far.astype(np.float32))).warnings[0]
    exact = read("a.npy", npy_bytes(far))  # kept, for float32 would destroy it
    assert exact.warnings == ()
    np.testing.assert_array_equal(exact.xyz, far)
    assert "12 bytes follow" in read("a.ply", binary_ply() + b"x" * 12).warnings[0]


SAMPLES = {
    "ascii.ply": ascii_ply(*cloud(20)),
    "little.ply": binary_ply(
        "<", *cloud(20), before_header=FACES, before=struct.pack("<BiiiBi", 3, 0, 1, 2, 1, 0)
    ),
    "big.ply": binary_ply(">", *cloud(20), tail_header=FACES, tail=struct.pack(">BiiiBi", 3, 0, 1, 2, 1, 0)),
    "six.npy": npy_bytes(np.c_[cloud(20)]),
    "record.npy": npy_bytes(np.zeros(20, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("t", "<i8")])),
    "plain.npz": npz_bytes(pc=np.c_[cloud(20)], other=np.arange(3)),
    "packed.npz": npz_bytes(True, coord=cloud(20)[0], color=cloud(20)[1]),
    "six.bin": np.c_[cloud(80)].astype("<f4").tobytes(),
}


def damage(content, rng):
    """Truncation, bit flips, and edits of a header such as a wrong digit or a lost line."""
    data = bytearray(content)
    head = min(len(data), 300)
    match int(rng.integers(0, 5)):
        case 0:
            return bytes(data[: rng.integers(0, len(data))])
        case 1:
            for at in rng.integers(0, len(data), rng.integers(1, 6)):
                data[at] ^= 1 << rng.integers(0, 8)
        case 2:
            for at in rng.integers(0, head, rng.integers(1, 3)):
                data[at] ^= 1 << rng.integers(0, 8)
        case 3:
            digits = [i for i in range(head) if data[i : i + 1].isdigit()] or [0]
            at = digits[rng.integers(0, len(digits))]
            word = [b"-1", b"999999999999", b"0", b"1e9", b"", b"\xff", b"9" * 5000][rng.integers(0, 7)]
            data[at : at + 1] = word
        case _:
            lines = bytes(data[:head]).split(b"\n")
            at = int(rng.integers(0, len(lines)))
            lines[at : at + 1] = [] if rng.random() < 0.5 else [lines[at], lines[at]]
            data[:head] = b"\n".join(lines)
    return bytes(data)


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_files_give_the_one_error_or_a_cloud(read, name):
    rng = np.random.default_rng(sum(name.encode()))
    failures = 0
    start = time.perf_counter()
    for _ in range(120):
        content = damage(SAMPLES[name], rng)
        try:
            got = read(name, content)
        except PointFileError:
            failures += 1
            continue
        assert got.xyz.shape[1] == 3
        assert 0 < len(got.xyz) <= 1000
        assert got.color is None or (got.color.shape == got.xyz.shape and np.isfinite(got.color).all())
    assert failures > 20
    assert time.perf_counter() - start < 20


@pytest.mark.data
def test_real_scans(shared):
    real = shared / "real"
    for path in sorted(real.glob("scannet/**/*_vert*.npy")):
        raw = np.load(path)
        got = read_points(path)
        np.testing.assert_allclose(got.xyz, raw[:, :3], rtol=1e-6)
        np.testing.assert_allclose(got.color, raw[:, 3:6] / 255, atol=1e-6)
    for path in sorted(real.glob("sunrgbd/prepared_*/*_pc.npz")):
        np.testing.assert_allclose(read_points(path).color, np.load(path)["pc"][:, 3:6], atol=1e-6)
    for path in sorted(real.glob("clouds/*.bin")):
        got = read_points(path)
        assert got.color is not None
        assert got.warnings == ()
        with pytest.raises(PointFileError):
            read_points(path, columns=7 if got.xyz.shape[0] % 7 else 11)
    for path in sorted(real.glob("sunrgbd/reference_evaluation/*_pc.ply")):
        assert read_points(path).xyz.shape == (20000, 3)
