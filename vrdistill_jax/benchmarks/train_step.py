"""VoteNet's training step at batch 8."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vrdistill_jax.benchmarks.cases import synthrooms_config, training_batch, training_rooms
from vrdistill_jax.benchmarks.recorder import Recorder
from vrdistill_jax.detectors import votenet
from vrdistill_jax.training.optimizer import make_optimizer
from vrdistill_jax.training.schedules import learning_rate_schedule, norm_momentum_schedule
from vrdistill_jax.training.state import count_parameters, init_state, init_variables
from vrdistill_jax.training.step import make_train_step


def run(recorder: Recorder, size: str = "small") -> None:
    """Times configs/synthrooms.py, without the wait for data; `size` is "small" or "full"."""
    config = synthrooms_config("tiny" if recorder.effort.quick else size)
    batch_size, num_points = config.train.batch_size, config.dataset.num_points
    rooms = training_rooms(config)
    batch = training_batch(config, rooms)
    model = votenet.build(config.detector)
    optimizer = make_optimizer(config.optimizer, learning_rate_schedule(config.optimizer, 1000, 100))
    momentum = norm_momentum_schedule(config.norm_momentum, 100)
    key = jax.random.key(0)
    variables = init_variables(model, key, batch.scene.points, batch.pyramid)
    state = init_state(
        jax.tree.map(jnp.copy, variables), optimizer
    )  # a copy: the step takes over its buffers
    batch_on_device = jax.device_put(batch)

    @jax.jit
    def forward(variables, batch):
        output, _ = model.apply(
            variables, batch.scene.points, batch.pyramid, train=True, mutable=["batch_stats"]
        )
        return votenet.loss(output, batch.scene, config.detector)[0]

    step_fn = make_train_step(model, votenet.loss, config.detector, optimizer, momentum)
    step = jax.jit(step_fn, donate_argnums=(0,)).lower(state, batch_on_device, key).compile()
    memory_mib = step_memory_mib(step)

    def train():
        nonlocal state  # its buffers are donated, as in training
        state, metrics = step(state, batch_on_device, key)
        return state, metrics

    case = f"{size}, batch {batch_size}, {num_points} points"
    time = partial(recorder.time, "train_step", case, scenes=batch_size)
    time("prepare batch (host, one core)", lambda: training_batch(config, rooms))
    time("forward, loss", lambda: forward(variables, batch_on_device))
    parameters = count_parameters(variables["params"])
    time("step: forward, backward, update", train, memory_mib=memory_mib, parameters=parameters)
    if not np.isfinite(np.asarray(train()[1]["total"])):
        recorder.failures.append(f"train_step, {case}: the loss is not finite")


def step_memory_mib(compiled) -> float | None:
    """Memory that a compiled program needs while it runs, MiB: arguments, results and temporaries (None if unknown)."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return round((held + stats.temp_size_in_bytes) / 2**20, 1)
