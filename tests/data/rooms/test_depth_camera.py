import numpy as np
import pytest

from vrdistill_jax.data.rooms.depth_camera import CameraConfig, RayScene, capture, look_at, thin_by_voxel
from vrdistill_jax.data.rooms.mesh_parts import MeshBuilder

CLEAN = CameraConfig(
    width=80, height=60, noise_scale=0.0, hole_patches=0.0, grazing_cosine=1e-6, max_range=20.0
)


def scene_of(*boxes, absorption=0.0):
    mesh = MeshBuilder()
    for low, high in boxes:
        mesh.box(low, high, (0.5, 0.5, 0.5), absorption)
    return RayScene(mesh.build())


def plane_at(distance, absorption=0.0):
    return scene_of(([-50, distance, -50], [50, distance + 1, 50]), absorption=absorption)


def test_hidden_sides_and_hidden_objects_get_no_points():
    # A cube in front of a plate, seen along +y from the origin: the plate's shadowed middle and the cube's
    # far side stay empty.
    scene = scene_of(([-0.5, 2, -0.5], [0.5, 3, 0.5]), ([-3, 5, -3], [3, 5.1, 3]))
    shot = capture(scene, [look_at([0, 0, 0], [0, 1, 0])], CLEAN, np.random.default_rng(0))
    cube = shot.face < 12
    assert cube.sum() > 100
    assert (~cube).sum() > 100
    np.testing.assert_allclose(shot.xyz[cube, 1], 2.0, atol=1e-5)
    np.testing.assert_allclose(shot.xyz[~cube, 1], 5.0, atol=1e-5)
    shadow = (np.abs(shot.xyz[~cube, 0]) < 1.24) & (np.abs(shot.xyz[~cube, 2]) < 1.24)  # 0.5 * 5 / 2
    assert not shadow.any()


def test_from_the_other_side_the_far_side_is_seen():
    scene = scene_of(([-0.5, 2, -0.5], [0.5, 3, 0.5]))
    poses = [look_at([0, 0, 0], [0, 1, 0]), look_at([0, 5, 0], [0, 1, 0])]
    shot = capture(scene, poses, CLEAN, np.random.default_rng(0))
    assert (np.abs(shot.xyz[:, 1] - 2) < 1e-4).any()
    assert (np.abs(shot.xyz[:, 1] - 3) < 1e-4).any()


def test_look_at_axes():
    pose = look_at([1, 2, 3], [1, 5, 3])
    np.testing.assert_allclose(pose.rotation, np.eye(3), atol=1e-12)  # right +x, forward +y, up +z
    pose = look_at([0, 0, 0], [1, 0, -1], roll=0.3)
    np.testing.assert_allclose(pose.rotation.T @ pose.rotation, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(pose.rotation[:, 1], np.array([1, 0, -1]) / np.sqrt(2), atol=1e-12)
    assert pose.rotation[2, 0] < 0, "a positive roll lowers the right side"


@pytest.mark.parametrize("depth", [1.0, 2.5, 4.5])
def test_noise_grows_with_the_square_of_the_depth(depth):
    camera = CLEAN._replace(width=160, height=120, noise_scale=1.0)
    shot = capture(plane_at(depth), [look_at([0, 0, 0], [0, 1, 0])], camera, np.random.default_rng(1))
    error = shot.xyz[:, 1] - depth
    expected = 0.0012 + 0.0019 * (depth - 0.4) ** 2
    assert error.std() == pytest.approx(expected, rel=0.05)
    assert abs(error.mean()) < 5 * expected / np.sqrt(len(error))


def test_holes_absorption_range_and_grazing_remove_points():
    pose, count = [look_at([0, 0, 0], [0, 1, 0])], CLEAN.width * CLEAN.height

    def points(scene, **changes):
        return len(capture(scene, pose, CLEAN._replace(**changes), np.random.default_rng(2)).xyz)

    assert points(plane_at(2.0)) == count
    assert points(plane_at(2.0), hole_patches=8.0) < 0.98 * count
    assert points(plane_at(2.0, absorption=0.75)) == pytest.approx(0.25 * count, rel=0.1)
    assert points(plane_at(2.0), max_range=1.5) == 0
    assert points(plane_at(0.3), min_range=0.5) < 0.3 * count
    floor = scene_of(([-50, -50, -0.5], [50, 50, -0.3]))  # seen at a low angle
    assert points(floor, grazing_cosine=0.5) < 0.75 * points(floor)


def test_pixels_cover_the_field_of_view():
    camera = CLEAN._replace(width=400, height=300, horizontal_fov=60.0)
    shot = capture(plane_at(1.0), [look_at([0, 0, 0], [0, 1, 0])], camera, np.random.default_rng(0))
    half = np.tan(np.radians(30))
    np.testing.assert_allclose([shot.xyz[:, 0].min(), shot.xyz[:, 0].max()], [-half, half], atol=0.004)
    np.testing.assert_allclose(
        [shot.xyz[:, 2].min(), shot.xyz[:, 2].max()], [-0.75 * half, 0.75 * half], atol=0.004
    )


def test_thinning_keeps_one_point_of_every_occupied_voxel():
    rng = np.random.default_rng(3)
    xyz = rng.normal(0, 0.3, (5000, 3)).astype(np.float32)
    keep = thin_by_voxel(xyz, 0.1, rng)
    cells = {tuple(cell) for cell in np.floor(xyz / 0.1).astype(int)}
    kept = [tuple(cell) for cell in np.floor(xyz[keep] / 0.1).astype(int)]
    assert len(kept) == len(set(kept))
    assert set(kept) == cells
