"""The loader: from a stored scene to what VoteNet reads at its published size, stage by stage on one core."""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from vrdistill_jax.benchmarks.cases import MAX_ROOMS, ROOMS_SEED
from vrdistill_jax.benchmarks.recorder import Recorder
from vrdistill_jax.data.augment import augment
from vrdistill_jax.data.builders import open_split, prepare_scenes
from vrdistill_jax.data.loader import PreparedScenes, train_batches
from vrdistill_jax.data.samples import find_floor, labelled_scene, middle_of_instances, vote_slots
from vrdistill_jax.data.synthrooms import generate_scene
from vrdistill_jax.detectors import votenet
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.recipes import SCANNET, SUNRGBD, augmentation, votenet_config


def run(recorder: Recorder) -> None:
    """Times scenes of 40,000 points drawn from rooms of about 50,000, axis-aligned (ScanNet) and turned (SUN RGB-D)."""
    quick = recorder.effort.quick
    samples = _large_rooms(2 if quick else 8, 1000 if quick else 40000)
    with tempfile.TemporaryDirectory() as folder:
        stored = prepare_scenes("rooms", {"train": lambda: samples}, SCANNET.class_names, "", folder)
        source = open_split(stored, "train")
        for task in (SCANNET, SUNRGBD):
            config = votenet_config(task, "tiny" if quick else "full")
            config.dataset.num_points = 1000 if quick else 40000
            _time_task(
                recorder, "turned boxes" if task.oriented else "axis-aligned boxes", config, source, task
            )


def _large_rooms(count: int, num_points: int) -> list[dict]:
    rooms = (generate_scene(ROOMS_SEED, index) for index in range(MAX_ROOMS))
    return list(itertools.islice((room for room in rooms if len(room["xyz"]) >= num_points), count))


def _time_task(recorder: Recorder, case: str, config, source, task) -> None:
    pyramid = votenet.pyramid_config(config.detector)
    scenes = PreparedScenes(source, config, pyramid, train=True)
    samples = [source[row] for row in range(len(source))]
    num_points = config.dataset.num_points
    clouds = [{**sample, "xyz": sample["xyz"][:num_points]} for sample in samples]
    mask = np.ones(num_points, bool)

    def each(function: Callable[[dict], Any], inputs: list[dict]) -> Callable[[], Any]:
        """A function without arguments that takes one scene after the other."""
        turn = itertools.cycle(inputs)
        return lambda: function(next(turn))

    def boxes(sample: dict) -> np.ndarray:
        return np.concatenate(
            [sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"][:, None]], axis=1
        )

    def votes(sample: dict) -> Any:
        if task.oriented:
            return vote_slots(sample["xyz"], boxes(sample))
        return middle_of_instances(sample["xyz"], sample["instance"][:num_points], sample["boxes_center"])

    time = partial(recorder.time, "loader", f"{case}, {num_points} points")
    rows, rng = itertools.cycle(range(len(source))), np.random.default_rng(0)
    time("read and decode", lambda: source[next(rows)])
    for detector in ("votenet", "3detr", "tr3d"):
        change = partial(augment, config=augmentation(task, detector), rng=rng)
        time(f"augment ({detector})", each(change, samples))
    time("floor", each(lambda sample: find_floor(sample["xyz"]), samples))
    time("votes", each(votes, clouds))
    time("whole scene", each(lambda sample: labelled_scene(sample, 0, config, rng, True), samples))
    time("pyramid", each(lambda sample: build_point_pyramid(sample["xyz"], mask, pyramid), clouds))
    time("all of it, one core", lambda: scenes.prepare(next(rows)), scenes=1)
    batches = train_batches(source, config, pyramid)
    time(
        f"batch of {config.train.batch_size}, {config.dataset.num_threads} threads",
        lambda: next(batches),
        scenes=config.train.batch_size,
    )
