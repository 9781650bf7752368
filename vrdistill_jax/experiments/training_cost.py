"""What SR3D costs beside TR3D: parameters, a training step, inference (table 7 of SR3D)."""

import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.data.loader import evaluation_batches, train_batches
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.experiments.cost import median_ms
from vrdistill_jax.experiments.grid import TEACHER, Cell, Study, cell_config
from vrdistill_jax.experiments.rendering import Table
from vrdistill_jax.training.logging import describe_environment
from vrdistill_jax.training.optimizer import make_optimizer
from vrdistill_jax.training.schedules import learning_rate_schedule, norm_momentum_schedule
from vrdistill_jax.training.state import Batch, count_parameters, init_state, init_variables
from vrdistill_jax.training.step import make_predict_step, make_train_step

DETECTORS = {"TR3D": "tr3d", "SR3D": "sr3d"}
# Minutes per epoch of ScanNet and parameters (M), table 7; latency in ms, table 1; all on an RTX 4090.
PAPER = {"TR3D": (12.3, 14.7, 42.0), "SR3D": (12.6, 14.7, 42.0)}
STEPS = 9  # that are timed


def training_cost_table(title: str, study: Study) -> Table:
    """Table 7, at the size of the study's budget; nothing is trained to the end."""
    configs = {name: cell_config(Cell(TEACHER, 0, detector=key), study) for name, key in DETECTORS.items()}
    measured = {name: measure_inference(config) for name, config in configs.items()}
    for name, seconds in time_steps(configs).items():
        measured[name]["step_ms"] = 1000 * seconds
    lines, data = [], {}
    for name, cost in measured.items():
        minutes, parameters, latency = PAPER[name]
        steps = max(configs[name].dataset.get("num_train", 0) // configs[name].train.batch_size, 1)
        lines.append(
            [
                name,
                f"{cost['parameters'] / 1e6:.2f}",
                f"{parameters}",
                f"{cost['step_ms']:.0f}",
                f"{cost['step_ms'] * steps / 60_000:.1f}",
                f"{minutes}",
                f"{cost['network_ms']:.0f}",
                f"{cost['scene_to_boxes_ms']:.0f}",
                f"{latency:.0f}",
            ]
        )
        data[name] = cost | {"paper": PAPER[name], "steps_per_epoch": steps}
    ratio = measured["SR3D"]["step_ms"] / measured["TR3D"]["step_ms"] - 1
    config, environment = configs["TR3D"], describe_environment()
    notes = [
        f"A step of SR3D takes {100 * ratio:+.1f} % (paper: an epoch +2.4 %). Median of {STEPS} steps of "
        f"{config.train.batch_size} scenes, the two detectors in turn on the same batches, without the wait for data.",
        f"{config.dataset.num_points:,} points a scene, voxels of {100 * config.detector.voxel_size:g} cm; an epoch shows "
        "every training scene once (paper: 15 times). Latency: single scenes, the network alone and with voxels and "
        "suppression.",
        f"Ours: {environment['platform']}, {', '.join(sorted(set(environment['devices'])))}, jax {environment['jax']}. "
        "Paper: RTX 4090.",
    ]
    columns = ["model", "params (M)", "paper", "step (ms)", "epoch (min)", "paper (min)"]
    columns += ["network (ms)", "scene to boxes (ms)", "paper (ms)"]
    return Table(title, columns, lines, notes, data)


def measure_inference(config: ConfigDict) -> dict[str, Any]:
    """Measures an untrained detector: "parameters", "network_ms", "scene_to_boxes_ms" (medians of single scenes)."""
    detector = find_detector(config.detector.name)
    pyramid_config = detector.pyramid_config(config.detector)
    source = open_source(config.dataset, "val")
    scene, pyramid = next(evaluation_batches(source, config, pyramid_config, 1))
    model = detector.build(config.detector)
    variables = jax.device_put(init_variables(model, jax.random.key(0), scene.points, pyramid))
    forward = jax.jit(lambda variables, points, pyramid: model.apply(variables, points, pyramid, train=False))
    predict = make_predict_step(model, detector.decode, config.detector)
    on_device = jax.device_put((scene.points, pyramid))

    def scene_to_boxes():
        scene, pyramid = next(evaluation_batches([source[0]], config, pyramid_config, 1))
        return predict(variables, scene.points, pyramid)

    return {
        "parameters": count_parameters(variables["params"]),
        "network_ms": median_ms(lambda: forward(variables, *on_device)),
        "scene_to_boxes_ms": median_ms(scene_to_boxes),
    }


def time_steps(configs: dict[str, ConfigDict]) -> dict[str, float]:
    """Median seconds of a training step of each detector; they take turns, so that a busy machine slows all alike."""
    first = next(iter(configs.values()))
    pyramid = find_detector(first.detector.name).pyramid_config(first.detector)
    batches = train_batches(open_source(first.dataset, "train"), first, pyramid, 0)
    # One batch again and again: others could be of another size, and a step of a new size is compiled.
    batch = jax.device_put(Batch(*next(batches)))
    key, runs = jax.random.key(0), {}
    for name, config in configs.items():
        detector = find_detector(config.detector.name)
        model = detector.build(config.detector)
        optimizer = make_optimizer(config.optimizer, learning_rate_schedule(config.optimizer, 1000, 100))
        state = init_state(init_variables(model, key, batch.scene.points, batch.pyramid), optimizer)
        momentum = norm_momentum_schedule(config.norm_momentum, 100)
        step = make_train_step(model, detector.loss, config.detector, optimizer, momentum)
        runs[name] = [jax.jit(step, donate_argnums=(0,)), state]
    times: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(STEPS + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            run[1], metrics = run[0](run[1], batch, key)
            jax.block_until_ready(metrics)
            if number >= 2:  # the first ones compile and warm up
                times[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in times.items()}
