"""SynthRooms: procedural furnished rooms seen by simulated depth cameras; the dataset that needs no download.

Two styles: `scan` fuses a walk through the room into one cloud with ScanNet's 18 classes and axis-aligned
boxes; `view` is a single frame with SUN RGB-D's 10 classes and oriented boxes. A room depends on (seed,
index) alone.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vrdistill_jax.data.builders import FORMAT_VERSION, map_in_processes, prepare_scenes
from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SUNRGBD_CLASSES
from vrdistill_jax.data.rooms.annotation import smear_labels
from vrdistill_jax.data.rooms.depth_camera import (
    CameraConfig,
    CameraPose,
    RayScene,
    capture,
    look_at,
    thin_by_voxel,
)
from vrdistill_jax.data.rooms.furniture import build_furniture, class_from_kind
from vrdistill_jax.data.rooms.furniture_common import WHITE, fabric_color, paint_color, wood_color
from vrdistill_jax.data.rooms.layout import Room, furnish_room
from vrdistill_jax.data.rooms.mesh_parts import MeshBuilder, TriangleMesh, move_mesh
from vrdistill_jax.data.rooms.planner import Placement

GENERATOR_VERSION = 3  # raise it whenever the rooms change: prepared datasets are then made anew

SCAN_CAMERA = CameraConfig(
    width=84, height=63, horizontal_fov=62.0, noise_scale=0.45, hole_patches=3.0, pose_noise=0.005
)
VIEW_CAMERA = CameraConfig(width=200, height=150, horizontal_fov=66.0, max_range=7.5, hole_patches=4.0)

# ScanNet leaves night stands and dressers without a label; here they are what they look like, small cabinets.
# Its last class is NYU40's "other furniture": bins, but also ottomans, hampers and the like.
_SCAN_LABELS = {name: row for row, name in enumerate(SCANNET_CLASSES)} | {
    **dict.fromkeys(("night_stand", "dresser"), 0),
    **dict.fromkeys(("ottoman", "hamper"), 17),
}
_SELDOM_AIMED_AT = ("door", "window", "picture", "curtain")
_VIEW_LABELS = {name: row for row, name in enumerate(SUNRGBD_CLASSES)}

# Factors on depth, width and height where SUN RGB-D's mean sizes (true sizes of turned boxes) differ from
# ScanNet's.
_VIEW_SIZE_SCALE: dict[str, tuple[float, float, float]] = {
    "bed": (1.02, 1.12, 0.77),
    "table": (0.95, 1.0, 1.10),
    "sofa": (0.95, 1.03, 1.0),
    "chair": (1.02, 1.0, 1.07),
    "desk": (0.89, 0.90, 0.84),
    "dresser": (1.03, 0.90, 1.12),
    "night_stand": (1.08, 1.18, 1.07),
    "bookshelf": (1.16, 0.76, 1.0),
    "bathtub": (1.0, 0.96, 0.95),
}

_MIN_IN_IMAGE = 0.2  # style view: objects of which less lies inside the image have no label


class SynthRoomsConfig(NamedTuple):
    """What rooms to make; everything that changes a room is in here."""

    style: str = "scan"  # "scan" or "view"
    seed: int = 0
    num_train: int = 1200
    num_val: int = 312
    num_views: int = 28  # images fused in style scan, at most; a careless walk takes fewer
    camera: CameraConfig | None = None  # None: SCAN_CAMERA or VIEW_CAMERA
    voxel_size: float = 0.02  # metres; one point per voxel stays (scan), 0 keeps all
    max_points: int = 50000  # a random subset of this size where there are more
    min_object_points: int = 30  # objects with fewer visible points lose their label
    label_reach: float = 0.04  # metres, how far labels run over edges (scan)
    label_gaps: float = 0.06  # share of the surface whose label is forgotten (scan)
    room_size: float = 1.0  # 0: all rooms are the smallest of their kind, 1: up to the largest


def class_names(style: str) -> tuple[str, ...]:
    """Names of the classes of a style, in label order."""
    return _check_style(style, SCANNET_CLASSES, SUNRGBD_CLASSES)


def generate_scene(seed: int, index: int, config: SynthRoomsConfig | None = None) -> dict:
    """Makes one room and scans it.

    Args:
      seed: of the dataset (`config.seed` is not read here).
      index: row of the room in the dataset.
      config: style, cameras and sizes.

    Returns:
      xyz f32[n, 3] metres, color f32[n, 3] in [0, 1], instance i32[n] (row of the boxes or -1), boxes_center
      f32[g, 3], boxes_size f32[g, 3], boxes_yaw f32[g], boxes_label i32[g], vote_center f32[g, 3], name str.

    Raises:
      ValueError: if the style is unknown.
    """
    config = config or SynthRoomsConfig()
    scan_style = _check_style(config.style, True, False)
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    room = furnish_room(rng, size_scale=None if scan_style else _VIEW_SIZE_SCALE, room_size=config.room_size)
    mesh, owner = build_room_mesh(rng, room)
    scene = RayScene(mesh)
    name = f"{config.style}_{seed}_{index:05d}_{room.kind}"
    sample = _scan(rng, config, room, scene, owner) if scan_style else _view(rng, config, room, scene, owner)
    return {**sample, "name": name}


def prepare_synthrooms(
    config: SynthRoomsConfig | None = None,
    data_dir: str | os.PathLike | None = None,
    progress: bool = True,
    num_workers: int | None = None,
) -> pathlib.Path:
    """Generates the SynthRooms dataset unless it is there already.

    Args:
      config: which rooms; None for the defaults.
      data_dir: folder of prepared datasets; None for `default_data_dir()`.
      progress: whether to show a progress bar.
      num_workers: worker processes; None for one per core, 0 to generate in this process.

    Returns:
      The folder of this dataset, for `open_split`. Its name carries a hash of the config and the generator's
      version.
    """
    config = config or SynthRoomsConfig()
    default_camera = SCAN_CAMERA if config.style == "scan" else VIEW_CAMERA
    config = config._replace(camera=config.camera or default_camera)
    names = class_names(config.style)
    key = hashlib.sha256(repr((GENERATOR_VERSION, FORMAT_VERSION, config)).encode()).hexdigest()[:10]

    from tqdm import tqdm

    def samples(split: str, count: int) -> Iterator[dict]:
        arguments = [(split_seed(config, split), index, config) for index in range(count)]
        made = map_in_processes(generate_scene, arguments, num_workers)
        return (
            iter(tqdm(made, total=count, desc=f"SynthRooms {config.style} {split}", unit="room"))
            if progress
            else made
        )

    splits = {
        "train": functools.partial(samples, "train", config.num_train),
        "val": functools.partial(samples, "val", config.num_val),
    }
    description = f"Procedural rooms, style {config.style}, generator version {GENERATOR_VERSION}: {config!r}"
    return prepare_scenes(f"synthrooms_{config.style}_{key}", splits, names, description, data_dir)


def split_seed(config: SynthRoomsConfig, split: str) -> int:
    """Gives the seed of a split: the two splits never share a room."""
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; known are train, val")
    return 2 * config.seed + (split == "val")


def build_room_mesh(rng: np.random.Generator, room: Room) -> tuple[TriangleMesh, np.ndarray]:
    """Builds walls, floor and every object of a room.

    Args:
      rng: random numbers for shapes and colours.
      room: the layout.

    Returns:
      The mesh, and i32[f] the row of `room.placements` that each triangle belongs to, -1 for walls and floor.
    """
    meshes = [_shell(rng, room)]
    owners = [np.full(len(meshes[0].faces), -1, np.int32)]
    for row, item in enumerate(room.placements):
        mesh = move_mesh(build_furniture(rng, item.kind, item.size, **item.options), item.position, item.yaw)
        meshes.append(mesh)
        owners.append(np.full(len(mesh.faces), row, np.int32))
    offsets = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    joined = TriangleMesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + offset for mesh, offset in zip(meshes, offsets, strict=True)]),
        np.concatenate([mesh.color for mesh in meshes]),
        np.concatenate([mesh.absorption for mesh in meshes]),
    )
    return joined, np.concatenate(owners)


def _check_style(style: str, scan, view):
    if style not in ("scan", "view"):
        raise ValueError(f"unknown style {style!r}; known are scan, view")
    return scan if style == "scan" else view


def _shell(rng: np.random.Generator, room: Room) -> TriangleMesh:
    """Walls, floor, skirting and a ceiling, which the cameras hardly see."""
    mesh = MeshBuilder()
    floor = wood_color(rng) if rng.random() < 0.55 else fabric_color(rng) * 0.9
    low, high = room.outline.min(0), room.outline.max(0)
    mesh.box([*low, -0.05], [*high, 0.0], floor)
    paint = (
        WHITE * rng.uniform(0.8, 0.98) if rng.random() < 0.6 else np.clip(paint_color(rng) * 0.5 + 0.4, 0, 1)
    )
    mesh.box([*low, room.height], [*high, room.height + 0.05], WHITE * 0.95)
    skirting = WHITE * 0.9
    for start, end in zip(room.outline, np.roll(room.outline, -1, 0), strict=True):
        points = np.array([[[*p, z] for p in (start, end)] for z in (0.0, room.height)])
        mesh.sheet(points, paint)
        inward = np.array([start[1] - end[1], end[0] - start[0]]) / np.hypot(*(end - start)) * 0.002
        board = np.array([[[*(p + inward), z] for p in (start, end)] for z in (0.0, 0.08)])
        mesh.sheet(board, skirting)
    return mesh.build()


def _scan(rng, config: SynthRoomsConfig, room: Room, scene: RayScene, owner: np.ndarray) -> dict:
    camera = config.camera or SCAN_CAMERA
    shot = capture(scene, _walk(rng, room, config.num_views), camera, rng)
    keep = (
        thin_by_voxel(shot.xyz, config.voxel_size, rng)
        if config.voxel_size > 0
        else rng.permutation(len(shot.xyz))
    )
    keep = keep[: config.max_points]
    angle = rng.normal(0, 0.03)  # aligned by hand: good, not perfect
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    xyz = shot.xyz[keep] + _drift(rng, shot.xyz[keep])
    xyz = (xyz @ turn.T + [*rng.normal(0, 0.1, 2), rng.normal(-0.01, 0.02)]).astype(np.float32)
    point_owner = owner[shot.face[keep]]
    if config.label_reach > 0 or config.label_gaps > 0:
        point_owner = smear_labels(xyz, point_owner, rng, config.label_reach, config.label_gaps)
    label = np.array([_SCAN_LABELS.get(class_from_kind(item.kind), -1) for item in room.placements] + [-1])
    counts = np.bincount(point_owner + 1, minlength=len(room.placements) + 1)[1:]
    rows = np.flatnonzero((label[:-1] >= 0) & (counts >= config.min_object_points))
    instance = _rows_from_owner(point_owner, rows, len(room.placements))
    bounds = np.array([[xyz[instance == k].min(0), xyz[instance == k].max(0)] for k in range(len(rows))])
    bounds = bounds.reshape(-1, 2, 3)
    return _sample(
        xyz,
        shot.color[keep],
        instance,
        bounds.mean(1),
        bounds[:, 1] - bounds[:, 0],
        np.zeros(len(rows)),
        label[rows],
    )


def _drift(rng: np.random.Generator, xyz: np.ndarray) -> np.ndarray:
    """Gives the slow wobble of a fused scan: walls bend by a centimetre or two, f32[n, 3] metres."""
    waves = rng.normal(0, 0.7, (3, 3)).astype(np.float32)  # radians per metre
    amplitude = rng.normal(0, 0.008, (3, 3)).astype(np.float32)
    amplitude[:, 2] *= 0.5
    return np.sin(xyz @ waves + rng.uniform(0, 2 * np.pi, 3).astype(np.float32)) @ amplitude


def _view(rng, config: SynthRoomsConfig, room: Room, scene: RayScene, owner: np.ndarray) -> dict:
    camera = config.camera or VIEW_CAMERA
    pose = _viewpoint(rng, room, camera)
    shot = capture(scene, [pose], camera, rng)
    keep = rng.permutation(len(shot.xyz))[: config.max_points]
    forward = pose.rotation[:2, 1]
    heading = np.arctan2(forward[1], forward[0]) - np.pi / 2  # turns the viewing direction to +y
    c, s = np.cos(heading), np.sin(heading)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    xyz = ((shot.xyz[keep] - pose.position) @ turn.T).astype(np.float32)
    point_owner = owner[shot.face[keep]]
    label = np.array([_VIEW_LABELS.get(class_from_kind(item.kind), -1) for item in room.placements] + [-1])
    counts = np.bincount(point_owner + 1, minlength=len(room.placements) + 1)[1:]
    in_image = np.array([_fraction_in_image(item, pose, camera) for item in room.placements])
    rows = np.flatnonzero(
        (label[:-1] >= 0) & (counts >= config.min_object_points) & (in_image > _MIN_IN_IMAGE)
    )
    instance = _rows_from_owner(point_owner, rows, len(room.placements))
    items: list[Placement] = [room.placements[row] for row in rows]
    size = np.array([item.size for item in items]).reshape(-1, 3)
    middle = np.array([item.position + [0, 0, item.size[2] / 2] for item in items]).reshape(-1, 3)
    yaw = np.array([item.yaw for item in items]) - heading
    yaw = (yaw + np.pi) % (2 * np.pi) - np.pi
    return _sample(xyz, shot.color[keep], instance, (middle - pose.position) @ turn.T, size, yaw, label[rows])


def _sample(xyz, color, instance, center, size, yaw, label) -> dict:
    center = np.asarray(center, np.float32).reshape(-1, 3)
    return {
        "xyz": xyz,
        "color": color,
        "instance": instance,
        "boxes_center": center,
        "boxes_size": np.asarray(size, np.float32).reshape(-1, 3),
        "boxes_yaw": np.asarray(yaw, np.float32).reshape(-1),
        "boxes_label": np.asarray(label, np.int32).reshape(-1),
        "vote_center": center.copy(),
    }


def _rows_from_owner(point_owner: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Maps each point's object to its row among the labelled ones, -1 elsewhere."""
    table = np.full(count + 1, -1, np.int32)  # the last entry serves owner -1
    table[rows] = np.arange(len(rows))
    return table[point_owner]


def _free_spots(rng: np.random.Generator, room: Room, count: int, low: float, high: float) -> np.ndarray:
    """Places where somebody could hold a camera, f64[n, 2], at most `count`; the middle if there are none."""
    spots = []
    for attempt in range(40 * count):
        xy = (rng.random(2) - 0.5) * (room.planner.extent - 0.4)
        radius = 0.18 if attempt < 20 * count else 0.05
        if room.planner.is_free(xy, radius, low, high):
            spots.append(xy)
            if len(spots) == count:
                break
    return np.array(spots).reshape(-1, 2) if spots else np.zeros((1, 2))


def _walk(rng: np.random.Generator, room: Room, views: int) -> list[CameraPose]:
    """Poses of a walk that looks at most parts of the room, from few places, as somebody with little time does.

    Most views aim at a group of neighbouring objects each, the rest across the room; some look up.
    """
    views = max(3, round(views * rng.uniform(0.65, 1.0)))
    across = views // 6
    spots = _free_spots(rng, room, int(rng.integers(5, 12)), 1.0, 1.8)
    middles = np.column_stack([room.outline * 0.9, np.full(len(room.outline), 0.9)])
    for item in room.placements:
        kind = class_from_kind(item.kind)
        if kind in _SCAN_LABELS and (kind not in _SELDOM_AIMED_AT or rng.random() < 0.4):
            middles = np.concatenate([middles, [item.position + [0, 0, 0.5 * item.size[2]]]])
    hub = spots.mean(0)
    around = np.argsort(np.arctan2(*(middles[:, :2] - hub).T[::-1]) + rng.uniform(-0.1, 0.1, len(middles)))
    upwards = rng.uniform(-0.25, 0.3)  # metres by which this person aims above the objects
    poses = []
    for group in np.array_split(around, views - across):
        if len(group) == 0:
            continue
        target = middles[group].mean(0) + rng.normal(0, 0.15, 3)
        target[2] = 0.9 * target[2] + upwards + rng.normal(0, 0.2)
        distance = np.hypot(*(spots - target[:2]).T)
        preferred = np.argsort(np.abs(distance - rng.uniform(1.2, 2.6)))
        spot = spots[preferred[int(rng.integers(min(3, len(spots))))]]
        position = np.array([*spot, rng.uniform(1.3, 1.75)])
        if np.hypot(*(target - position)[:2]) < 0.3:
            target[:2] += 0.5
        poses.append(look_at(position, target, rng.normal(0, 0.08)))
    for _ in range(across):
        spot = spots[int(rng.integers(len(spots)))]
        bearing = np.arctan2(*(hub - spot)[::-1]) + rng.normal(0, 0.9)
        reach = rng.uniform(1.5, 3.0)
        aim = rng.uniform(0.3, 1.0) if rng.random() < 0.7 else rng.uniform(1.6, 2.4)
        target = [*(spot + reach * np.array([np.cos(bearing), np.sin(bearing)])), aim]
        poses.append(look_at([*spot, rng.uniform(1.3, 1.75)], target, rng.normal(0, 0.08)))
    return poses


def _viewpoint(rng: np.random.Generator, room: Room, camera: CameraConfig) -> CameraPose:
    """One camera that looks at labelled objects; of a few random ones, those that see more are likelier."""
    spots = _free_spots(rng, room, 10, 0.9, 1.7)
    wanted = [item for item in room.placements if class_from_kind(item.kind) in _VIEW_LABELS]
    poses, seen = [], []
    for _ in range(10):
        target = np.array(wanted[int(rng.integers(len(wanted)))].position if wanted else np.zeros(3))
        distance = np.hypot(*(spots - target[:2]).T)
        spot = spots[int(np.argmin(np.abs(distance - rng.uniform(2.2, 4.5))))]
        height, reach = rng.uniform(1.2, 1.7), float(np.hypot(*(spot - target[:2])))
        if reach < 0.5:
            target[:2], reach = spot + [0.5, 0.0], 0.5
        pitch = np.radians(rng.uniform(5, 28))  # downwards
        pose = look_at([*spot, height], [*target[:2], height - reach * np.tan(pitch)], rng.normal(0, 0.02))
        poses.append(pose)
        seen.append(sum(_fraction_in_image(item, pose, camera) > 0.4 for item in wanted))
    chance = (np.array(seen) + 0.1) ** 3
    return poses[int(rng.choice(len(poses), p=chance / chance.sum()))]


_GRID = np.stack(np.meshgrid(*[np.linspace(-0.45, 0.45, 4)] * 3), -1).reshape(-1, 3)


def _fraction_in_image(item: Placement, pose: CameraPose, camera: CameraConfig) -> float:
    """How much of an object's box lies inside the image and the camera's range, hidden or not; in [0, 1]."""
    points = (_GRID + [0, 0, 0.5]) * item.size
    c, s = np.cos(item.yaw), np.sin(item.yaw)
    points = points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + item.position
    right, forward, up = ((points - pose.position) @ pose.rotation).T
    half_width = np.tan(np.radians(camera.horizontal_fov) / 2)
    half_height = half_width * camera.height / camera.width
    inside = (np.abs(right) < half_width * forward) & (np.abs(up) < half_height * forward)
    return float((inside & (forward < camera.max_range)).mean())
