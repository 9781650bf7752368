"""What a detector costs at inference: parameters, arithmetic, memory, time (table 8 of VRDistill)."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vrdistill_jax.data.loader import evaluation_batches
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import votenet
from vrdistill_jax.experiments.grid import Study
from vrdistill_jax.experiments.rendering import Table
from vrdistill_jax.nn.mlp import scale_size
from vrdistill_jax.recipes import DATASETS
from vrdistill_jax.training.logging import describe_environment
from vrdistill_jax.training.state import count_parameters, init_variables

# Parameters (M), multiply-adds (G), memory (MB) and time (ms) on an RTX 3090, batch 1.
PAPER = {1.0: (0.95, 5.84, 1377.5, 5.03), 0.5: (0.31, 1.53, 709.3, 3.47), 0.25: (0.08, 0.42, 376.9, 2.94)}
WIDTHS = {1.0: "Teacher", 0.5: "Student 1/2", 0.25: "Student 1/4"}
CALLS = 30


def count_multiply_adds(config: Any) -> int:
    """Multiply-adds of VoteNet's forward pass for one scene, counted as the paper's tool (thop) does.

    One per multiplication of a linear layer, which the reference applies to each neighbour of each centre, and four per
    element that a batch norm puts out. (Our first layers run once per point instead of once per neighbour and norms are folded
    away by the compiler, so that less is really done.)

    Args:
      config: config.detector of a VoteNet.

    Returns:
      Their number.
    """

    def size(channels: int) -> int:
        return scale_size(channels, config.width)

    def layers(rows: int, channels: list[int], norms: int) -> int:
        """`norms`: how many of the layers have a batch norm."""
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        return sum(rows * a * b for a, b in pairs) + sum(4 * rows * b for _, b in pairs[:norms])

    narrow, wide = size(128), size(256)
    inputs = [votenet.feature_size(config.input_features), narrow, wide, wide]
    hidden = [[size(64), size(64), narrow]] + 3 * [[narrow, narrow, wide]]
    total = 0
    for (centers, _, neighbors), channels, rest in zip(config.levels, inputs, hidden, strict=True):
        total += layers(centers * neighbors, [3 + channels, *rest], 3)
    seeds = config.levels[1][0]
    for rows in (config.levels[2][0], seeds):  # feature propagation
        total += layers(rows, [2 * wide, wide, wide], 2)
    total += layers(seeds, [wide, wide, wide, 3 + wide], 2)  # votes
    grouped = config.num_proposals * config.aggregation_neighbors
    total += layers(grouped, [3 + wide, narrow, narrow, narrow], 3)
    outputs = 5 + 2 * config.num_heading_bins + 4 * len(config.mean_sizes) + len(config.class_names)
    return total + layers(config.num_proposals, [narrow, narrow, narrow, outputs], 2)


def measure_cost(config: Any) -> dict[str, Any]:
    """Measures a whole config's detector, untrained, on the first validation scene.

    Returns:
      "parameters"; "multiply_adds", counted as the paper does; "compiled_flops", the compiler's own count of floating-point
      operations (None where the platform has none); "memory_mib", arguments, results and temporaries of the compiled forward
      pass; "network_ms" and "scene_to_boxes_ms", medians of single scenes, the latter with sampling, pyramid and suppression.
    """
    pyramid_config = votenet.pyramid_config(config.detector)
    source = open_source(config.dataset, "val")
    scene, pyramid = next(evaluation_batches(source, config, pyramid_config, 1))
    points = scene.points
    model = votenet.build(config.detector)
    variables = jax.device_put(init_variables(model, jax.random.key(0), points, pyramid))

    def forward(variables, points, pyramid):
        return model.apply(variables, points, pyramid, train=False)

    def detect(variables, points, pyramid):
        return votenet.decode(forward(variables, points, pyramid), points, config.detector)

    compiled = jax.jit(forward).lower(variables, points, pyramid).compile()
    memory = compiled.memory_analysis()
    counted = compiled.cost_analysis() or {}
    on_device = jax.device_put((points, pyramid))
    detect_jit = jax.jit(detect)

    def scene_to_boxes():
        scene, pyramid = next(evaluation_batches([source[0]], config, pyramid_config, 1))
        return detect_jit(variables, scene.points, pyramid)

    return {
        "parameters": count_parameters(variables["params"]),
        "multiply_adds": count_multiply_adds(config.detector),
        "compiled_flops": counted.get("flops"),
        "memory_mib": None
        if memory is None
        else (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes)
        / 2**20,
        "network_ms": median_ms(lambda: compiled(variables, *on_device)),
        "scene_to_boxes_ms": median_ms(scene_to_boxes),
    }


def median_ms(call: Callable[[], Any]) -> float:
    """Median wall time of a call in milliseconds, after two that are not timed."""
    times = []
    for _ in range(CALLS + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times[2:]))


def cost_table(study: Study) -> Table:
    """Table 8: VoteNet at three widths, at the published size."""
    lines, data = [], {}
    for width, name in WIDTHS.items():
        config = DATASETS[study.dataset]("full")
        config.detector.width, config.dataset.data_dir = width, study.data_dir
        cost, paper = measure_cost(config), PAPER[width]
        data[name] = cost | {"paper": paper}
        flops = cost["compiled_flops"]
        lines.append(
            [
                name,
                f"{cost['parameters'] / 1e6:.3f}",
                f"{paper[0]}",
                f"{cost['multiply_adds'] / 1e9:.2f}",
                f"{paper[1]}",
                "-" if flops is None else f"{flops / 1e9:.2f}",
                "-" if cost["memory_mib"] is None else f"{cost['memory_mib']:.1f}",
                f"{paper[2]}",
                f"{cost['network_ms']:.1f}",
                f"{cost['scene_to_boxes_ms']:.1f}",
                f"{paper[3]}",
            ]
        )
    environment = describe_environment()
    notes = [
        f"Batch 1, {config.dataset.num_points:,} points. Ours: {environment['platform']}, "
        f"{', '.join(sorted(set(environment['devices'])))}, jax {environment['jax']}, median of {CALLS} calls; memory: "
        "arguments, results and temporaries of the compiled network. Paper: RTX 3090.",
        "Multiply-adds are counted as the paper's tool does; compiled FLOPs are the compiler's count of what really runs "
        "(a multiply-add is two).",
        "The paper's parameters of the students fit a network whose grouping and proposal layers keep min(128, width x 256) "
        "channels (0.309 and 0.082 M), its multiply-adds one in which every layer is narrowed, as here.",
    ]
    columns = [
        "model",
        "params (M)",
        "paper",
        "multiply-adds (G)",
        "paper",
        "compiled GFLOP",
        "memory (MiB)",
        "paper (MB)",
    ]
    columns += ["network (ms)", "scene to boxes (ms)", "paper (ms)"]
    return Table(f"Table 8: cost of VoteNet at inference ({study.dataset})", columns, lines, notes, data)
