import numpy as np
import pytest

from vrdistill_jax.data.point_checks import (
    UP_AXES,
    PointCheckError,
    check_points,
    input_from_scene_boxes,
    measure_up_evidence,
)
from vrdistill_jax.data.point_files import PointCloud, read_points

# Rows are the scene's axes in the input's: what a file with that axis up holds for a z-up scene (x, y, z).
INPUT_FROM_SCENE = {
    "z": np.eye(3),
    "y": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "-y": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "x": np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]]),
    "-x": np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]]),
    "-z": np.array([[1, 0, 0], [0, -1, 0], [0, 0, -1]]),
}


def surface(rng, low, high, count):
    """Points on the faces of a box, sides and top."""
    low, high = np.array(low, float), np.array(high, float)
    points = rng.uniform(low, high, (count, 3))
    face = rng.integers(0, 5, count)
    for number, (axis, value) in enumerate(
        [(0, low[0]), (0, high[0]), (1, low[1]), (1, high[1]), (2, high[2])]
    ):
        points[face == number, axis] = value
    return points


def make_room(seed=0, count=20000, yaw=0.4, ceiling=False):
    """Floor, four walls and furniture, z up, with a floor at height 0."""
    rng = np.random.default_rng(seed)
    lx, ly, lz = rng.uniform(3.5, 6), rng.uniform(3, 5), 2.5
    parts = [rng.uniform([0, 0, 0], [lx, ly, 0], (count // 4, 3))]
    for axis, value in ((0, 0), (0, lx), (1, 0), (1, ly)):
        wall = rng.uniform([0, 0, 0], [lx, ly, lz], (count // 10, 3))
        wall[:, axis] = value
        parts.append(wall)
    for _ in range(4):
        corner = rng.uniform([0.3, 0.3, 0], [lx - 1.5, ly - 1.5, 0])
        parts.append(
            surface(rng, corner, corner + rng.uniform([0.5, 0.5, 0.4], [1.2, 1.2, 1.0]), count // 12)
        )
    if ceiling:
        parts.append(rng.uniform([0, 0, lz], [lx, ly, lz], (count // 4, 3)))
    points = np.concatenate(parts) + rng.normal(0, 0.008, (sum(map(len, parts)), 3))
    c, s = np.cos(yaw), np.sin(yaw)
    return (points - [lx / 2, ly / 2, 0]) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def cloud_of(xyz, color=None, **fields):
    return PointCloud(np.asarray(xyz, np.float32), color, "test", **fields)


def test_a_clean_scan_passes_unchanged():
    xyz = make_room().astype(np.float32)
    color = np.random.default_rng(0).uniform(size=xyz.shape).astype(np.float32)
    checked = check_points(cloud_of(xyz, color, warnings=("from the reader",)))
    assert checked.warnings == ["from the reader"]
    np.testing.assert_array_equal(checked.cloud.xyz, xyz)
    np.testing.assert_array_equal(checked.cloud.color, color)
    assert checked.cloud.xyz.dtype == np.float32
    np.testing.assert_array_equal(checked.scene_from_input, np.eye(4))


@pytest.mark.parametrize(("unit", "factor"), [("centimetres", 100), ("millimetres", 1000)])
@pytest.mark.parametrize("seed", range(3))
def test_units_are_inferred_with_a_warning(unit, factor, seed):
    xyz = make_room(seed)
    checked = check_points(cloud_of(xyz * factor))
    assert len(checked.warnings) == 1
    assert unit in checked.warnings[0]
    assert "--units" in checked.warnings[0]
    np.testing.assert_allclose(checked.cloud.xyz, xyz, atol=1e-4)
    np.testing.assert_allclose(checked.scene_from_input, np.diag([1 / factor] * 3 + [1]), rtol=1e-12)


@pytest.mark.parametrize(
    ("unit", "per_meter"), [("m", 1), ("cm", 100), ("mm", 1000), ("in", 39.37008), ("ft", 3.28084)]
)
def test_units_given_are_obeyed_without_a_warning(unit, per_meter):
    xyz = make_room()
    checked = check_points(cloud_of(xyz * per_meter), units=unit)
    assert checked.warnings == []
    np.testing.assert_allclose(checked.cloud.xyz, xyz, atol=1e-4)


def test_sizes_that_no_room_has_are_reported():
    xyz = make_room()
    assert "more than any room" in check_points(cloud_of(xyz * 100), units="m").warnings[0]
    assert "less than a piece of furniture" in check_points(cloud_of(xyz), units="cm").warnings[0]
    assert (
        "tall" in check_points(cloud_of(xyz * 3.28)).warnings[0]
    )  # feet are not inferred, but not silent either
    assert "from the origin" in check_points(cloud_of(xyz + [500, 0, 0])).warnings[0]
    far = np.concatenate([xyz, [[400, 0, 1.0]]])
    assert "1 stray" in check_points(cloud_of(far)).warnings[0]


@pytest.mark.parametrize("yaw", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("up", ["y", "-y"])
def test_y_up_is_inferred_with_a_warning(up, seed, yaw):
    xyz = make_room(seed, yaw=yaw)
    checked = check_points(cloud_of(xyz @ INPUT_FROM_SCENE[up].T))
    assert len(checked.warnings) == 1
    assert f"assumed that {up} points up" in checked.warnings[0]
    assert "--up" in checked.warnings[0]
    np.testing.assert_allclose(checked.cloud.xyz, xyz, atol=1e-5)
    np.testing.assert_allclose(checked.scene_from_input[:3, :3], INPUT_FROM_SCENE[up].T, atol=1e-12)


@pytest.mark.parametrize("up", UP_AXES)
def test_up_given_is_obeyed(up):
    xyz = make_room()
    checked = check_points(cloud_of(xyz @ INPUT_FROM_SCENE[up].T * 1000), up=up, units="mm")
    assert checked.warnings == []
    np.testing.assert_allclose(checked.cloud.xyz, xyz, atol=1e-4)
    assert np.linalg.det(checked.scene_from_input[:3, :3]) > 0


@pytest.mark.parametrize("up", ["x", "-x", "-z"])
def test_unlikely_axes_are_only_suspected(up):
    xyz = make_room() @ INPUT_FROM_SCENE[up].T
    checked = check_points(cloud_of(xyz))
    np.testing.assert_allclose(checked.cloud.xyz, xyz, atol=1e-5)
    assert f"--up={up}" in checked.warnings[0]


def test_a_room_with_a_ceiling():
    xyz = make_room(ceiling=True)
    assert check_points(cloud_of(xyz)).warnings == []
    turned = xyz @ INPUT_FROM_SCENE["y"].T  # floor and ceiling are alike, so that nothing can be concluded
    checked = check_points(cloud_of(turned))
    np.testing.assert_allclose(checked.cloud.xyz, turned, atol=1e-5)
    assert "--up=y" in checked.warnings[0]


def test_a_view_along_an_axis_rules_that_axis_out():
    rng = np.random.default_rng(0)
    wall = np.c_[rng.uniform(-2, 2, 9000), rng.normal(3, 0.005, 9000), rng.uniform(-1, 1.2, 9000)]
    evidence = measure_up_evidence(wall)
    assert evidence.looks_along == "y"
    assert evidence.floor["y"] == evidence.floor["-y"] == 0
    assert check_points(cloud_of(wall)).warnings == []
    np.testing.assert_allclose(check_points(cloud_of(wall)).cloud.xyz, wall, atol=1e-5)


def test_invalid_rows_are_removed_and_counted():
    xyz = make_room().astype(np.float32)
    color = np.random.default_rng(0).uniform(size=xyz.shape).astype(np.float32)
    bad = xyz.copy()
    bad[3, 0], bad[10, 1], bad[12] = np.nan, np.inf, -np.inf
    checked = check_points(cloud_of(bad, color))
    assert checked.warnings == [f"removed 3 of {len(xyz)} points with NaN or infinite coordinates"]
    keep = np.delete(np.arange(len(xyz)), [3, 10, 12])
    np.testing.assert_array_equal(checked.cloud.xyz, xyz[keep])
    np.testing.assert_array_equal(checked.cloud.color, color[keep])
    bad = xyz.copy()
    bad[::3] = 0
    checked = check_points(cloud_of(bad, color))
    assert "(0, 0, 0)" in checked.warnings[0]
    assert len(checked.cloud.xyz) == len(checked.cloud.color) == len(xyz) - len(xyz[::3])


def test_too_few_points():
    xyz = make_room()
    rows = np.random.default_rng(0).permutation(len(xyz))
    assert "only 100 points" in check_points(cloud_of(xyz[rows[:100]])).warnings[0]
    assert check_points(cloud_of(xyz[rows[:500]])).warnings == []
    few = xyz[rows[:40]].copy()
    few[:10] = np.nan
    for content in (xyz[rows[:31]], few, np.full((100, 3), np.nan), np.zeros((0, 3))):
        with pytest.raises(PointCheckError, match="only|0 points"):
            check_points(cloud_of(content))
    assert len(check_points(cloud_of(xyz[rows[:32]])).cloud.xyz) == 32


def test_degenerate_clouds():
    rng = np.random.default_rng(0)
    with pytest.raises(PointCheckError, match="the same"):
        check_points(cloud_of(np.full((1000, 3), 2.5)))
    with pytest.raises(PointCheckError, match="line"):
        check_points(cloud_of(rng.uniform(size=(1000, 1)) * [1.0, 2.0, 3.0]))
    flat = rng.uniform(size=(1000, 3)) * [3, 3, 0]
    assert any("plane" in warning for warning in check_points(cloud_of(flat)).warnings)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(ValueError, match="auto, m, cm, mm, in, ft"):
        check_points(cloud_of(make_room()), units="km")
    with pytest.raises(ValueError, match="auto, x, y, z"):
        check_points(cloud_of(make_room()), up="w")


@pytest.mark.parametrize("up", UP_AXES)
def test_boxes_map_back_to_the_file(up):
    rng = np.random.default_rng(1)
    xyz = make_room() @ INPUT_FROM_SCENE[up].T * 1000
    checked = check_points(cloud_of(xyz), up=up)
    boxes = np.c_[rng.normal(size=(5, 3)), rng.uniform(0.5, 2, (5, 3)), rng.uniform(-3, 3, 5)]
    center, corners = input_from_scene_boxes(boxes, checked.scene_from_input)
    np.testing.assert_allclose(corners.mean(1), center, atol=1e-9)
    forward = corners @ checked.scene_from_input[:3, :3].T + checked.scene_from_input[:3, 3]
    for box, points in zip(boxes, forward, strict=True):
        local = points - box[:3]
        c, s = np.cos(-box[6]), np.sin(-box[6])
        local = np.c_[c * local[:, 0] - s * local[:, 1], s * local[:, 0] + c * local[:, 1], local[:, 2]]
        np.testing.assert_allclose(np.abs(local), np.tile(box[3:6] / 2, (8, 1)), atol=1e-9)
        assert len(np.unique(np.sign(local), axis=0)) == 8


def real_scans(real):
    patterns = ("scannet/**/*_vert*.npy", "sunrgbd/prepared_*/*_pc.npz", "clouds/*.bin")
    patterns += ("sunrgbd/reference_evaluation/*_pc.ply",)
    return [path for pattern in patterns for path in sorted(real.glob(pattern))]


@pytest.mark.data
def test_real_scans_are_left_alone_and_turned_ones_are_found(shared):
    paths = real_scans(shared / "real")
    assert len(paths) >= 20
    found = {"y": 0, "-y": 0}
    silent = 0
    for path in paths:
        cloud = read_points(path)
        checked = check_points(cloud)
        assert checked.warnings == [], path
        np.testing.assert_array_equal(checked.cloud.xyz, cloud.xyz)
        for up in found:
            turned = cloud._replace(xyz=(cloud.xyz @ INPUT_FROM_SCENE[up].T * 1000).astype(np.float32))
            checked = check_points(turned)
            assert "millimetres" in checked.warnings[0]
            right = np.allclose(checked.cloud.xyz, cloud.xyz, atol=0.01)
            kept = np.allclose(checked.cloud.xyz, turned.xyz / 1000, atol=0.01)
            assert right or kept, path  # never a third orientation
            found[up] += right
            silent += kept and len(checked.warnings) == 1
    assert min(found.values()) >= 0.5 * len(paths), found
    assert silent <= 0.1 * 2 * len(paths)
