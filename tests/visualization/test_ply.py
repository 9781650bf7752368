import numpy as np
import pytest

from vrdistill_jax.data.point_files import read_points
from vrdistill_jax.visualization.ply import box_corners, class_color, write_boxes_ply, write_points_ply

BOXES = np.array([[1, 2, 0.5, 2.0, 1.0, 0.8, 0.6], [-3, 0, 1, 0.4, 0.3, 2.0, -2.5]])


def to_local(points, box):
    local = points - box[:3]
    c, s = np.cos(box[6]), np.sin(box[6])
    return np.c_[c * local[:, 0] + s * local[:, 1], -s * local[:, 0] + c * local[:, 1], local[:, 2]]


def faces_of(path):
    """An independent reading of the triangles that follow the vertices."""
    header, body = path.read_bytes().split(b"end_header\n", 1)
    sizes = {b"float": 4, b"uchar": 1, b"int": 4}
    words = [line.split() for line in header.splitlines()]
    counts = {row[1]: int(row[2]) for row in words if row[:1] == [b"element"]}
    stride = sum(sizes[row[1]] for row in words if row[:1] == [b"property"] and row[1] != b"list")
    rows = np.frombuffer(body[counts[b"vertex"] * stride :], [("n", "u1"), ("index", "<i4", 3)])
    assert len(rows) == counts[b"face"]
    assert (rows["n"] == 3).all()
    return rows["index"]


def test_points_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    xyz, color = rng.normal(size=(50, 3)).astype(np.float32), rng.uniform(size=(50, 3)).astype(np.float32)
    got = read_points(write_points_ply(tmp_path / "new" / "a.ply", xyz, color))
    np.testing.assert_array_equal(got.xyz, xyz)
    np.testing.assert_allclose(got.color, color, atol=0.5 / 255 + 1e-6)
    assert got.warnings == ()
    got = read_points(write_points_ply(tmp_path / "b.ply", xyz))
    assert got.color is None


def test_corners():
    square = box_corners(np.array([[0, 0, 0, 2, 4, 6, np.pi / 2]]))[0]
    np.testing.assert_allclose(
        square[0], [2, -1, -3], atol=1e-12
    )  # -x, -y, -z of the box, turned by a quarter
    np.testing.assert_allclose(square[1], [2, 1, -3], atol=1e-12)
    np.testing.assert_allclose(square[7], [-2, 1, 3], atol=1e-12)


def test_box_mesh_lies_on_the_edges(tmp_path):
    path = write_boxes_ply(tmp_path / "boxes.ply", BOXES, np.array([3, 25]), np.array([0.9, 0.4]))
    got = read_points(path)
    assert got.warnings == ()
    triangles = faces_of(path)
    assert len(triangles) == 2 * 12 * 12
    assert np.array_equal(np.unique(triangles), np.arange(len(got.xyz)))
    for row, (box, label) in enumerate(zip(BOXES, (3, 25), strict=True)):
        rows = slice(96 * row, 96 * (row + 1))
        local = to_local(got.xyz[rows].astype(np.float64), box)
        np.testing.assert_allclose(local.max(0), box[3:6] / 2, atol=1e-5)
        np.testing.assert_allclose(local.min(0), -box[3:6] / 2, atol=1e-5)
        inside = (np.abs(local) < box[3:6] / 2 - 0.021).sum(1)
        assert (inside == 0).all()  # bars of 2 cm end in the corners, nothing in the middle
        np.testing.assert_allclose(got.color[rows] * 255, np.tile(class_color(label), (96, 1)), atol=1e-3)
        assert ((triangles[144 * row : 144 * (row + 1)] // 96) == row).all()


def test_bars_are_closed_and_face_outwards(tmp_path):
    path = write_boxes_ply(tmp_path / "boxes.ply", BOXES[:1], np.array([0]), bar=0.1)
    xyz, triangles = read_points(path).xyz.astype(np.float64), faces_of(path)
    a, b, c = (xyz[triangles[:, k]] for k in range(3))
    volume = (np.einsum("ij,ij->i", a, np.cross(b, c)) / 6).sum()
    size = BOXES[0, 3:6]
    np.testing.assert_allclose(
        volume, 4 * size.sum() * 0.1**2, rtol=1e-4
    )  # signed: positive only if faces look out
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    assert len(np.unique(edges, axis=0)) == len(edges)
    assert {tuple(edge) for edge in edges} == {tuple(edge[::-1]) for edge in edges}


def test_edge_cases(tmp_path):
    path = write_boxes_ply(tmp_path / "none.ply", np.zeros((0, 7)), np.zeros(0, int))
    assert b"element vertex 0" in path.read_bytes()
    assert len(faces_of(path)) == 0
    thin = np.array([[0, 0, 0, 1.0, 0.01, 1.0, 0.0]])
    xyz = read_points(write_boxes_ply(tmp_path / "thin.ply", thin, np.array([0]))).xyz
    np.testing.assert_allclose(np.abs(xyz).max(0), [0.5, 0.005, 0.5], atol=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        write_boxes_ply(tmp_path / "a.ply", thin * np.nan, np.array([0]))
    with pytest.raises(ValueError, match="2 boxes, 1 labels"):
        write_boxes_ply(tmp_path / "a.ply", BOXES, np.array([0]))
    with pytest.raises(ValueError, match="1 scores"):
        write_boxes_ply(tmp_path / "a.ply", BOXES, np.array([0, 1]), np.array([0.5]))
    with pytest.raises(ValueError, match=r"\[n, 3\]"):
        write_points_ply(tmp_path / "a.ply", np.zeros((4, 3)), np.zeros((3, 3)))
