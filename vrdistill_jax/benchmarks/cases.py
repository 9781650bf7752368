"""What the suites measure on: procedural rooms, and the configs of configs/synthrooms.py."""

import pathlib
import runpy
from typing import Any

import numpy as np

import vrdistill_jax
from vrdistill_jax.data.loader import stack_scenes
from vrdistill_jax.data.samples import labelled_scene, scene_with_pyramid
from vrdistill_jax.data.synthrooms import generate_scene
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.training.state import Batch

ROOMS_SEED = 0
MAX_ROOMS = 100  # looked at for one that is large enough


def synthrooms_config(size: str, **detector: Any) -> Any:
    """The config of configs/synthrooms.py, from the installed package or from the checkout around it.

    Args:
      size: "small", "full" or "tiny".
      **detector: fields of config.detector to change.

    Returns:
      ConfigDict.

    Raises:
      ValueError: if the file is in neither place.
    """
    package = pathlib.Path(vrdistill_jax.__file__).parent
    for folder in (package, package.parent):
        path = folder / "configs" / "synthrooms.py"
        if path.exists():
            config = runpy.run_path(str(path))["get_config"](size)
            config.detector.update(detector)
            return config
    raise ValueError(
        f"configs/synthrooms.py is neither in {package} nor beside it; install the package again"
    )


def training_rooms(config: Any) -> list[dict]:
    """As many generated rooms as a batch holds."""
    return [generate_scene(ROOMS_SEED, index) for index in range(config.train.batch_size)]


def training_batch(config: Any, rooms: list[dict]) -> Batch:
    """One batch as the loader makes it of stored rooms."""
    pyramid = find_detector(config.detector.name).pyramid_config(config.detector)
    prepared = []
    for index, room in enumerate(rooms):
        scene = labelled_scene(room, index, config, np.random.default_rng(index), train=True)
        prepared.append(scene_with_pyramid(scene, pyramid))
    return Batch(*stack_scenes(prepared, pyramid))


def scanned_room(num_points: int) -> np.ndarray:
    """The first room of SynthRooms whose scan has enough points: f32[n, 3] metres, n >= num_points.

    Raises:
      ValueError: if there is none.
    """
    for index in range(MAX_ROOMS):
        xyz = generate_scene(ROOMS_SEED, index)["xyz"]
        if len(xyz) >= num_points:
            return xyz
    raise ValueError(f"none of {MAX_ROOMS} rooms has {num_points} points; rooms are capped at 50000")


def room_cloud(num_points: int) -> np.ndarray:
    """A scanned room resampled to exactly f32[num_points, 3]; always the same one."""
    xyz = scanned_room(num_points)
    return xyz[np.random.default_rng(0).permutation(len(xyz))[:num_points]]
