import numpy as np
import pytest

from vrdistill_jax.data.class_tables import (
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
)
from vrdistill_jax.data.rooms.depth_camera import CameraConfig, RayScene
from vrdistill_jax.data.rooms.layout import furnish_room
from vrdistill_jax.data.synthrooms import (
    SCAN_CAMERA,
    VIEW_CAMERA,
    SynthRoomsConfig,
    build_room_mesh,
    class_names,
    generate_scene,
    split_seed,
)

# Fewer rays than by default: the statistics of the boxes barely feel it, and the tests run three times as
# fast.
SMALL_SCAN = SynthRoomsConfig(camera=SCAN_CAMERA._replace(width=56, height=42), min_object_points=15)
SMALL_VIEW = SynthRoomsConfig(style="view", camera=VIEW_CAMERA._replace(width=100, height=75))


@pytest.fixture(scope="module")
def scans():
    return [generate_scene(11, index, SMALL_SCAN) for index in range(240)]


@pytest.fixture(scope="module")
def views():
    return [generate_scene(11, index, SMALL_VIEW) for index in range(200)]


def test_a_room_depends_on_seed_and_index_alone():
    for config in (SMALL_SCAN, SMALL_VIEW):
        first, again = generate_scene(3, 7, config), generate_scene(3, 7, config)
        for name, value in first.items():
            np.testing.assert_array_equal(value, again[name], err_msg=name)
        for seed, index in ((3, 8), (4, 7)):
            other = generate_scene(seed, index, config)
            assert len(other["xyz"]) != len(first["xyz"]) or not np.allclose(other["xyz"], first["xyz"])


def test_fields_shapes_and_ranges(scans, views):
    for sample in (*scans[:20], *views[:20]):
        n, g = len(sample["xyz"]), len(sample["boxes_label"])
        shapes = {
            "xyz": (n, 3),
            "color": (n, 3),
            "instance": (n,),
            "boxes_center": (g, 3),
            "boxes_size": (g, 3),
        }
        shapes |= {"boxes_yaw": (g,), "boxes_label": (g,), "vote_center": (g, 3)}
        assert set(sample) == {*shapes, "name"}
        for name, shape in shapes.items():
            assert sample[name].shape == shape, name
            whole = name in ("instance", "boxes_label")
            assert sample[name].dtype == (np.int32 if whole else np.float32), name
        assert np.isfinite(sample["xyz"]).all()
        assert sample["color"].min() >= 0
        assert sample["color"].max() <= 1
        assert sample["instance"].min() >= -1
        assert sample["instance"].max() < g
        assert (sample["boxes_size"] > 0).all()
        assert (np.abs(sample["boxes_yaw"]) <= np.pi).all()


def test_scan_boxes_are_the_bounds_of_their_visible_points(scans):
    for sample in scans[:40]:
        assert (sample["boxes_yaw"] == 0).all()
        for row in range(len(sample["boxes_label"])):
            points = sample["xyz"][sample["instance"] == row]
            assert len(points) >= SMALL_SCAN.min_object_points
            np.testing.assert_allclose(
                sample["boxes_center"][row], (points.min(0) + points.max(0)) / 2, atol=1e-5
            )
            np.testing.assert_allclose(sample["boxes_size"][row], points.max(0) - points.min(0), atol=1e-5)
        np.testing.assert_array_equal(sample["vote_center"], sample["boxes_center"])


def test_scans_stand_on_the_floor_near_the_origin_with_scannet_like_density():
    for index in range(3):
        sample = generate_scene(0, index)
        assert 15_000 <= len(sample["xyz"]) <= 50_000
        assert abs(np.percentile(sample["xyz"][:, 2], 1)) < 0.1
        assert np.abs(sample["xyz"][:, :2].max(0) + sample["xyz"][:, :2].min(0)).max() < 1.5


def test_points_lie_on_the_surfaces_they_are_labelled_with():
    # Points of a noise-free scan lie on a triangle of their own object: its plane holds them.
    from vrdistill_jax.data.rooms.depth_camera import capture, look_at

    rng = np.random.default_rng(0)
    room = furnish_room(rng, "office")
    mesh, owner = build_room_mesh(rng, room)
    clean = CameraConfig(noise_scale=0.0, hole_patches=0.0)
    shot = capture(
        RayScene(mesh), [look_at([0, 0, 1.5], [1, 1, 0.5]), look_at([0, 0, 1.5], [-1, 0, 0.8])], clean, rng
    )
    corner = mesh.vertices[mesh.faces[shot.face]]
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    assert np.abs(((shot.xyz - corner[:, 0]) * normal).sum(1)).max() < 1e-3
    hit = owner[shot.face]
    assert (hit >= 0).any()
    for row in np.unique(hit[hit >= 0]):
        item = room.placements[row]
        c, s = np.cos(item.yaw), np.sin(item.yaw)
        local = (shot.xyz[hit == row] - item.position) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        assert (np.abs(local[:, :2]) <= item.size[:2] / 2 + 2e-3).all()
        assert local[:, 2].min() >= -2e-3
        assert local[:, 2].max() <= item.size[2] + 2e-3


def test_every_class_is_common_enough_and_rooms_are_as_full_as_scannets(scans, views):
    for samples, names in ((scans, SCANNET_CLASSES), (views, SUNRGBD_CLASSES)):
        shares = [np.mean([(s["boxes_label"] == row).any() for s in samples]) for row in range(len(names))]
        assert min(shares) >= 0.03, dict(zip(names, shares, strict=True))
    counts = [len(sample["boxes_label"]) for sample in scans]
    assert 15 <= np.mean(counts) <= 19
    assert np.percentile(counts, 5) <= 10, "small rooms stay small"
    assert max(counts) >= 30
    assert np.mean([len(sample["boxes_label"]) == 0 for sample in scans]) == 0
    assert np.mean([len(sample["boxes_label"]) > 0 for sample in views]) > 0.85


def test_scan_box_sizes_follow_scannets_means(scans):
    # Objects lie along either axis, so the two horizontal extents are compared by their mean.
    label = np.concatenate([sample["boxes_label"] for sample in scans])
    size = np.concatenate([sample["boxes_size"] for sample in scans])
    for row, name in enumerate(SCANNET_CLASSES):
        mean, want = size[label == row].mean(0), SCANNET_MEAN_SIZES[row]
        assert mean[:2].mean() == pytest.approx(want[:2].mean(), rel=0.15), name
        assert mean[2] == pytest.approx(want[2], rel=0.15), name


def test_sizes_within_a_class_vary_as_much_as_in_real_scans(scans):
    # Ratio of the third to the first quartile of the longer side; eight real scans gave 1.8 to 2.6 for these.
    label = np.concatenate([sample["boxes_label"] for sample in scans])
    longest = np.concatenate([sample["boxes_size"][:, :2].max(1) for sample in scans])
    for name in ("cabinet", "table", "window", "picture", "garbage_bin"):
        low, high = np.percentile(longest[label == SCANNET_CLASSES.index(name)], [25, 75])
        assert 1.3 < high / low < 2.6, name


def test_view_box_sizes_follow_sunrgbds_means(views):
    label = np.concatenate([sample["boxes_label"] for sample in views])
    size = np.concatenate([sample["boxes_size"] for sample in views])
    for row, name in enumerate(SUNRGBD_CLASSES):
        np.testing.assert_allclose(
            size[label == row].mean(0), SUNRGBD_MEAN_SIZES[row], rtol=0.15, err_msg=name
        )


def test_view_cameras_sit_at_the_origin_and_look_along_y(views):
    for sample in views[:50]:
        xyz = sample["xyz"]
        assert (xyz[:, 1] > 0).all(), "nothing lies behind the camera"
        assert np.abs(np.arctan2(xyz[:, 0], xyz[:, 1])).max() < np.radians(75)
        assert -1.85 < np.percentile(xyz[:, 2], 0.5) < -0.3, "the floor is below the camera, not at zero"


def test_view_boxes_hold_their_points_in_their_own_frame(views):
    checked = 0
    for sample in views:
        for row, yaw in enumerate(sample["boxes_yaw"]):
            delta = sample["xyz"][sample["instance"] == row] - sample["boxes_center"][row]
            x = np.cos(yaw) * delta[:, 0] + np.sin(yaw) * delta[:, 1]
            y = -np.sin(yaw) * delta[:, 0] + np.cos(yaw) * delta[:, 1]
            local = np.abs(np.stack([x, y, delta[:, 2]], 1))
            noise = 0.04 + 0.004 * np.linalg.norm(sample["boxes_center"][row]) ** 2
            assert (local <= sample["boxes_size"][row] / 2 + noise).mean() > 0.995
            checked += 1
    assert checked > 300


def test_view_yaw_is_where_the_seat_faces(views):
    # The back rest is on the far side of the yaw direction: this tells yaw from yaw + pi.
    chair = SUNRGBD_CLASSES.index("chair")
    offsets = []
    for sample in views:
        for row in np.flatnonzero(sample["boxes_label"] == chair):
            delta = sample["xyz"][sample["instance"] == row] - sample["boxes_center"][row]
            top = delta[delta[:, 2] > 0.38 * sample["boxes_size"][row, 2]]
            if len(top) >= 20:
                yaw = sample["boxes_yaw"][row]
                along = np.cos(yaw) * top[:, 0] + np.sin(yaw) * top[:, 1]
                offsets.append(along.mean() / sample["boxes_size"][row, 0])
    assert len(offsets) > 40
    assert np.mean(np.array(offsets) < -0.2) > 0.9


def test_splits_never_share_a_seed_and_mistakes_are_named():
    seeds = [
        split_seed(SynthRoomsConfig(seed=seed), split) for seed in range(4) for split in ("train", "val")
    ]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        split_seed(SynthRoomsConfig(), "test")
    with pytest.raises(ValueError, match="unknown style 'film'"):
        generate_scene(0, 0, SynthRoomsConfig(style="film"))
    assert class_names("scan") == SCANNET_CLASSES
    assert class_names("view") == SUNRGBD_CLASSES
