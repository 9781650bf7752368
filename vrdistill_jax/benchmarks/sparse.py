"""Sparse convolutions: TR3D at full width from cloud to head, and single convolutions beside spconv where it is installed."""

import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vrdistill_jax.benchmarks.cases import scanned_room
from vrdistill_jax.benchmarks.recorder import Recorder, compare
from vrdistill_jax.benchmarks.spconv_peer import make_convolution
from vrdistill_jax.benchmarks.train_step import step_memory_mib
from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SCANNET_MEAN_SIZES
from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.detectors import tr3d
from vrdistill_jax.geometry.host import voxels
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid, pad_voxel_pyramids
from vrdistill_jax.nn.sparse_conv import convolve
from vrdistill_jax.nn.sparse_resnet import TR3D_LEVELS
from vrdistill_jax.structs import Points, VoxelLevelConfig, VoxelPyramid, VoxelPyramidConfig
from vrdistill_jax.training.state import count_parameters, init_variables

CLOUDS = ((20_000, 0.01), (5_000, 0.04))  # points, voxel size: those of our reference figures
CONVOLUTION_VOXELS = (0.04, 0.02, 0.01)  # of 40,000 points: many, some and few neighbours
SIZE = 64  # channels of the single convolution
PRODUCT = "for scale: 2048^3 product (17 GFLOP)"
SAME = 1e-4  # of the largest output: how far spconv's may differ from ours


def run(recorder: Recorder, cloud: np.ndarray | None = None) -> None:
    """Times one scene at a time; random weights.

    Args:
      recorder: keeps the rows.
      cloud: f32[n, 3] metres, the scan to measure on; None for a generated room.
    """
    quick = recorder.effort.quick
    xyz = scanned_room(4000 if quick else 40_000) if cloud is None else cloud
    xyz = xyz[np.random.default_rng(0).permutation(len(xyz))]
    for num_points, voxel_size in ((1500, 0.08),) if quick else CLOUDS:
        if len(xyz) < num_points:
            recorder.skip("sparse", f"{num_points} points", f"the cloud has only {len(xyz)}")
            continue
        _time_network(recorder, xyz[:num_points], voxel_size, 0.125 if quick else 1.0)
    for voxel_size in (0.04,) if quick else CONVOLUTION_VOXELS:
        _time_convolution(recorder, xyz[: 4000 if quick else 40_000], voxel_size)


def _time_network(recorder: Recorder, xyz: np.ndarray, voxel_size: float, width: float) -> None:
    config = tr3d.default_config(SCANNET_CLASSES, SCANNET_MEAN_SIZES, False)
    config.voxel_size, config.width = voxel_size, width
    pyramid_config, model = tr3d.pyramid_config(config), tr3d.build(config)
    mask = np.ones(len(xyz), bool)
    points = Points(xyz[None], np.full((1, len(xyz), 3), 0.5, np.float32), mask[None])

    def build() -> VoxelPyramid:
        pyramid = build_voxel_pyramid(xyz, mask, pyramid_config)
        return stack_trees(pad_voxel_pyramids([pyramid], pyramid_config))

    pyramid = build()
    variables = init_variables(model, jax.random.key(0), points, pyramid)

    @jax.jit
    def forward(variables, points, pyramid):
        output: Any = model.apply(variables, points, pyramid, train=False)
        return output.raw.head

    compiled = forward.lower(variables, points, pyramid).compile()
    held = variables, *jax.device_put((points, pyramid))
    fine_rows = int(pyramid.levels[TR3D_LEVELS[0]].mask.sum())
    # In the same moment on the same machine: how fast arithmetic can be at all.
    square, product = jax.random.normal(jax.random.key(1), (2048, 2048)), jax.jit(jnp.matmul)
    case = f"TR3D, {len(xyz)} points, {100 * voxel_size:g} cm"
    rows = recorder.time_in_turn(
        "sparse",
        case,
        {
            "pyramid (host, one core)": build,
            "network": lambda: compiled(*held),
            "total: cloud to head": lambda: compiled(variables, points, build()),
            PRODUCT: partial(product, square, square),
        },
    )
    rows["network"] |= {
        "memory_mib": step_memory_mib(compiled),
        "parameters": count_parameters(variables["params"]),
        "fine_rows": fine_rows,
    }
    rows["total: cloud to head"]["peak_memory_mib"] = peak_memory_mib()


def _time_convolution(recorder: Recorder, xyz: np.ndarray, voxel_size: float) -> None:
    """One 3^3 submanifold convolution: dense, by pairs, and by spconv; every form with its map."""
    mask = np.ones(len(xyz), bool)
    keys, _, _ = voxels.unique_voxels(voxels.quantize(xyz, mask, voxel_size), mask)
    count = len(keys)
    x = jax.random.normal(jax.random.key(0), (1, count, SIZE))
    kernel = jax.random.normal(jax.random.key(1), (27, SIZE, SIZE)) / np.sqrt(27 * SIZE)
    product = jax.jit(convolve)

    def build(tiles: bool):
        config = VoxelPyramidConfig(voxel_size, (VoxelLevelConfig(same3=True, tiles=tiles),), (), ((count,),))
        pyramid = build_voxel_pyramid(xyz, mask, config)
        return stack_trees(pad_voxel_pyramids([pyramid], config)).levels[0].same3

    maps = {name: build(tiles) for name, tiles in (("dense", False), ("by pairs", True))}
    present = float((maps["dense"].index >= 0).mean())
    stages: dict[str, Callable[[], Any]] = {}
    for name, kernel_map in maps.items():
        held = jax.device_put(kernel_map)
        stages[f"map, {name} (host)"] = partial(build, kernel_map.tiles is not None)
        stages[f"convolution, {name}"] = partial(product, x, kernel, held)
    coords = voxels.coords_from_keys(keys)
    case = f"{count} voxels, {100 * present:.0f} % of taps"
    try:
        map_and_product, only_product = make_convolution(coords, np.asarray(x[0]), np.asarray(kernel))
    except ImportError as error:
        recorder.skip("sparse", "spconv", str(error))
        recorder.time_in_turn("sparse", case, stages)
        return
    stages |= {"spconv with map": map_and_product, "spconv, map cached": only_product}
    rows = recorder.time_in_turn("sparse", case, stages)
    ours = {name: _add(rows[f"map, {name} (host)"], rows[f"convolution, {name}"]) for name in maps}
    best = min(ours.values(), key=lambda row: row["min_ms"])
    compare(best, rows["spconv with map"])
    compare(rows["convolution, by pairs"], rows["spconv, map cached"])
    reference = np.asarray(product(x, kernel, maps["dense"]))[0]
    difference = float(np.abs(map_and_product() - reference).max() / np.abs(reference).max())
    if not difference < SAME:
        recorder.failures.append(f"sparse, spconv: outputs are {difference:.1e} off ours; the ratio is void")


def _add(*rows: dict) -> dict:
    return {name: sum(row[name] for row in rows) for name in ("p50_ms", "min_ms")}


def peak_memory_mib() -> float:
    """The most memory that this process has held so far, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
