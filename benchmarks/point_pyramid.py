"""Times the point pyramid of VoteNet's config on room-like clouds, both backends.

python benchmarks/point_pyramid.py
"""

import functools
import json
import time
from collections.abc import Callable

import jax
import numpy as np

from vrdistill_jax import structs
from vrdistill_jax.geometry import point_pyramid
from vrdistill_jax.geometry.host import neighbors, sampling
from vrdistill_jax.geometry.host import point_pyramid as host

CONFIG = structs.PyramidConfig(
    levels=(
        structs.LevelConfig(2048, 0.2, 64),
        structs.LevelConfig(1024, 0.4, 32),
        structs.LevelConfig(512, 0.8, 16),
        structs.LevelConfig(256, 1.2, 16),
    ),
    interpolations=((3, 2), (2, 1)),
)


def make_room(num_points: int, seed: int = 0) -> np.ndarray:
    """Scatters points over a floor, four walls and twelve box-shaped pieces of furniture, with 5 mm of noise.

    Args:
      num_points: N.
      seed: of the generator.

    Returns:
      f32[N, 3] metres.
    """
    random = np.random.default_rng(seed)
    size = np.concatenate([[[6.0, 5.0, 2.6]], random.uniform(0.4, 1.6, (12, 3))])
    low = np.concatenate(
        [[[0.0, 0.0, 0.0]], random.uniform(0, 1, (12, 3)) * ([6, 5, 0] - size[1:] * [1, 1, 0])]
    )
    box = np.where(random.random(num_points) < 0.6, 0, random.integers(1, 13, num_points))
    position = random.random((num_points, 3))
    axis = np.where(random.random(num_points) < 0.4, 2, random.integers(0, 2, num_points))
    face = random.integers(0, 2, num_points) * ((box > 0) | (axis < 2))  # the room has no ceiling
    position[np.arange(num_points), axis] = face
    return (low[box] + position * size[box] + random.normal(0, 0.005, (num_points, 3))).astype(np.float32)


def measure(function: Callable, repeats: int) -> dict[str, float]:
    """Calls a function once to compile, then times it.

    Args:
      function: without arguments; its result is waited for.
      repeats: timed calls.

    Returns:
      p50 and p95 in milliseconds.
    """
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(1e3 * (time.perf_counter() - begin))
    return {
        "p50": round(float(np.percentile(times, 50)), 2),
        "p95": round(float(np.percentile(times, 95)), 2),
    }


def run(repeats: int = 20) -> dict[str, dict[str, float]]:
    """Measures the host pyramid and its first level on one core, and the pyramid on the default device.

    Args:
      repeats: timed calls of each entry.

    Returns:
      A dict from the name of an entry to its p50 and p95 in milliseconds.
    """
    result = {}
    for count in (20_000, 40_000):
        xyz, mask = make_room(count), np.ones(count, bool)
        centers = xyz[sampling.sample_farthest_points(xyz, 2048)]
        cases = {
            "sample_2048": functools.partial(sampling.sample_farthest_points, xyz, 2048),
            "query_ball_2048x64": functools.partial(neighbors.query_ball, centers, xyz, 0.2, 64),
            "pyramid": functools.partial(host.build_point_pyramid, xyz, mask, CONFIG),
        }
        for name, function in cases.items():
            result[f"host_{name}_{count}"] = measure(function, repeats)
    clouds = jax.device_put(np.stack([make_room(20_000, seed) for seed in range(2)]))
    masks = jax.device_put(np.ones(clouds.shape[:2], bool))
    build = jax.jit(functools.partial(point_pyramid.build_point_pyramid, config=CONFIG))
    result["device_pyramid_2x20000"] = measure(lambda: build(clouds, masks), repeats)
    return result


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
