"""The point pyramid of VoteNet: on the host stage by stage, on the device as a whole."""

from functools import partial

import jax
import numpy as np

from vrdistill_jax.benchmarks.cases import room_cloud, synthrooms_config
from vrdistill_jax.benchmarks.recorder import Recorder
from vrdistill_jax.detectors import votenet
from vrdistill_jax.geometry import point_pyramid as device
from vrdistill_jax.geometry.host.interpolation import build_interpolation
from vrdistill_jax.geometry.host.neighbors import query_ball
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.geometry.host.sampling import sample_farthest_points


def run(recorder: Recorder) -> None:
    """Times clouds of 20,000 and 40,000 points; the host code uses one core."""
    quick = recorder.effort.quick
    config = votenet.pyramid_config(synthrooms_config("tiny" if quick else "full").detector)
    for num_points in (2000,) if quick else (20000, 40000):
        _time_cloud(recorder, num_points, config)


def _time_cloud(recorder: Recorder, num_points: int, config) -> None:
    xyz = room_cloud(num_points)
    mask = np.ones(num_points, bool)
    pyramid = build_point_pyramid(xyz, mask, config)
    clouds = [xyz, *(level.xyz for level in pyramid.levels)]  # clouds[i] is what level i is sampled from
    levels = list(enumerate(config.levels))

    def sample():
        return [sample_farthest_points(clouds[i], level.num_centers) for i, level in levels]

    def group():
        return [
            query_ball(clouds[i + 1], clouds[i], level.radius, level.num_neighbors) for i, level in levels
        ]

    def interpolate():
        return [
            build_interpolation(clouds[fine + 1], clouds[coarse + 1])
            for coarse, fine in config.interpolations
        ]

    time = partial(recorder.time, "pyramid", f"{num_points} points")
    time("host: farthest point sampling", sample)
    time("host: ball queries", group)
    time("host: three nearest neighbours", interpolate)
    time("host: whole pyramid", lambda: build_point_pyramid(xyz, mask, config), scenes=1)
    build = jax.jit(partial(device.build_point_pyramid, config=config))
    batch = jax.device_put((xyz[None], mask[None]))
    time(f"device ({jax.default_backend()}): whole pyramid", lambda: build(*batch), scenes=1)
