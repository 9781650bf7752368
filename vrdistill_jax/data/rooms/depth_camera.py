"""Depth cameras that look at meshes by ray casting: visible surfaces only, with noise and holes."""

import functools
from typing import NamedTuple

import numpy as np

from vrdistill_jax.data.rooms.mesh_parts import TriangleMesh


class CameraConfig(NamedTuple):
    """A depth camera and its faults."""

    width: int = 96  # pixels
    height: int = 72
    horizontal_fov: float = 62.0  # degrees
    min_range: float = 0.4  # metres; nearer surfaces give nothing
    max_range: float = 6.0
    noise_scale: float = (
        1.0  # factor on the depth noise of a single Kinect frame; a fused scan averages some of it away
    )
    hole_patches: float = 1.5  # mean number of patches without returns per image
    grazing_cosine: float = (
        0.2  # below this cosine between ray and normal, returns get rarer, down to none at 0
    )
    pose_noise: float = 0.0  # metres; error of the camera's position (and 1 mrad per 2 mm of its direction)


class CameraPose(NamedTuple):
    """Where a camera stands and how it is turned."""

    position: np.ndarray  # f64[3] metres
    rotation: np.ndarray  # f64[3, 3] columns: right, forward, up


class Capture(NamedTuple):
    """The returns of one or several images, in world coordinates."""

    xyz: np.ndarray  # f32[n, 3]
    color: np.ndarray  # f32[n, 3] in [0, 1]
    face: np.ndarray  # i32[n] triangle that was hit


class RayScene:
    """A mesh that rays can be cast at."""

    def __init__(self, mesh: TriangleMesh) -> None:
        from embreex import rtcore_scene
        from embreex.mesh_construction import TriangleMesh as EmbreeMesh

        triangles = np.ascontiguousarray(mesh.vertices[mesh.faces], np.float32)
        normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        self.normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        self.mesh = mesh
        self._scene = rtcore_scene.EmbreeScene()
        self._geometry = EmbreeMesh(self._scene, triangles)  # kept alive as long as the scene

    def cast(self, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds the first triangle that each ray meets.

        Args:
          origin: f32[n, 3] metres.
          direction: f32[n, 3] of any length.

        Returns:
          f32[n] distance in units of the direction's length (meaningless without a hit) and i32[n] triangle,
          -1 none.
        """
        result = self._scene.run(
            np.ascontiguousarray(origin, np.float32), np.ascontiguousarray(direction, np.float32), output=1
        )
        return result["tfar"], result["primID"]


def look_at(position, target, roll: float = 0.0) -> CameraPose:
    """Turns a camera at `position` towards `target`.

    Args:
      position: f32[3] metres.
      target: f32[3] metres; not straight above or below.
      roll: radians about the viewing direction, clockwise seen from behind the camera.

    Returns:
      The pose.
    """
    position, target = np.asarray(position, float), np.asarray(target, float)
    forward = target - position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    c, s = np.cos(roll), np.sin(roll)
    return CameraPose(position, np.stack([c * right - s * up, forward, s * right + c * up], 1))


def capture(
    scene: RayScene, poses: list[CameraPose], camera: CameraConfig, rng: np.random.Generator
) -> Capture:
    """Takes one depth and colour image from each pose and fuses them.

    Args:
      scene: what is looked at.
      poses: the cameras.
      camera: resolution, range and faults; one for all poses.
      rng: random numbers for noise and holes.

    Returns:
      The returns of all images, one image after the other, in the order of the pixels.

    Differs: depth noise is normal with the standard deviation of "Modeling Kinect Sensor Noise for Improved
      3D
    Reconstruction and Tracking" (Nguyen et al., 2012), 1.2 mm + 1.9 mm (z - 0.4)^2 at depth z in metres, but
    axial only.
    """
    pixels = _pixel_grid(camera)
    count = len(pixels)
    jitter = rng.uniform(-0.5, 0.5, (len(poses), count, 2)) * _pixel_pitch(camera)
    local = np.ones((len(poses), count, 3), np.float32)
    local[..., 0] = pixels[:, 0] + jitter[..., 0]
    local[..., 2] = pixels[:, 1] + jitter[..., 1]
    rotation = np.stack([pose.rotation for pose in poses]).astype(np.float32)
    position = np.stack([pose.position for pose in poses]).astype(np.float32)
    direction = local @ rotation.transpose(0, 2, 1)
    origin = np.broadcast_to(position[:, None], direction.shape)
    depth, face = scene.cast(origin.reshape(-1, 3), direction.reshape(-1, 3))

    ray = np.flatnonzero((face >= 0) & ~_hole_mask(camera, len(poses), rng).reshape(-1))
    flat_direction = direction.reshape(-1, 3)
    depth, face, toward = depth[ray], face[ray], flat_direction[ray]
    length = np.linalg.norm(toward, axis=1)
    normal = scene.normal[face]
    cosine = np.abs((toward * normal).sum(1)) / length
    return_chance = (1 - scene.mesh.absorption[face]) * np.clip(cosine / camera.grazing_cosine, 0, 1)
    in_range = (depth * length > camera.min_range) & (depth * length < camera.max_range)
    keep = in_range & (rng.random(len(ray)) < return_chance)
    ray, depth, face, toward, normal = ray[keep], depth[keep], face[keep], toward[keep], normal[keep]

    sigma = camera.noise_scale * (0.0012 + 0.0019 * np.maximum(depth - 0.4, 0) ** 2)
    depth = depth + sigma.astype(np.float32) * rng.standard_normal(len(depth), np.float32)
    view = ray // count
    xyz = position[view] + depth[:, None] * toward
    if camera.pose_noise > 0:
        shift = rng.normal(0, camera.pose_noise, (len(poses), 3))
        turn = rng.normal(0, 0.5 * camera.pose_noise, (len(poses), 3))
        xyz = xyz + (shift[view] + np.cross(turn[view], xyz - position[view])).astype(np.float32)
    exposure = rng.normal(1.0, 0.06, len(poses)).astype(np.float32)[view]
    light = np.array([0.35, 0.2, 0.91], np.float32)
    shade = exposure * (0.72 + 0.28 * np.abs(normal @ light))
    color = scene.mesh.color[face] * shade[:, None] + 0.03 * rng.standard_normal((len(face), 3), np.float32)
    return Capture(xyz.astype(np.float32), np.clip(color, 0, 1).astype(np.float32), face.astype(np.int32))


def thin_by_voxel(xyz: np.ndarray, voxel_size: float, rng: np.random.Generator) -> np.ndarray:
    """Keeps one random point per occupied voxel.

    Args:
      xyz: f32[n, 3] metres.
      voxel_size: edge length in metres.
      rng: decides which point of a voxel stays.

    Returns:
      i64[m] rows kept, in random order.
    """
    order = rng.permutation(len(xyz))
    cell = np.floor(xyz[order] / voxel_size).astype(np.int64)
    cell -= cell.min(0, initial=0)
    span = cell.max(0, initial=0) + 1
    key = (cell[:, 0] * span[1] + cell[:, 1]) * span[2] + cell[:, 2]
    _, first = np.unique(key, return_index=True)
    return order[np.sort(first)]


@functools.lru_cache(maxsize=8)
def _pixel_grid(camera: CameraConfig) -> np.ndarray:
    """Tangents (right, up) of every pixel centre, f32[h * w, 2]."""
    pitch = _pixel_pitch(camera)
    u = (np.arange(camera.width) - (camera.width - 1) / 2) * pitch
    v = ((camera.height - 1) / 2 - np.arange(camera.height)) * pitch
    return np.stack(np.broadcast_arrays(u[None], v[:, None]), -1).reshape(-1, 2).astype(np.float32)


def _pixel_pitch(camera: CameraConfig) -> float:
    return 2 * float(np.tan(np.radians(camera.horizontal_fov) / 2)) / camera.width


def _hole_mask(camera: CameraConfig, views: int, rng: np.random.Generator) -> np.ndarray:
    """Random elliptical patches without returns, bool[views, h, w] True where nothing returns."""
    mask = np.zeros((views, camera.height, camera.width), bool)
    rows, columns = np.arange(camera.height)[:, None], np.arange(camera.width)[None]
    for view in range(views):
        for _ in range(rng.poisson(camera.hole_patches)):
            row, column = rng.uniform(0, camera.height), rng.uniform(0, camera.width)
            high, wide = rng.uniform(0.01, 0.07, 2) * camera.width
            mask[view] |= ((rows - row) / high) ** 2 + ((columns - column) / wide) ** 2 < 1
    return mask
