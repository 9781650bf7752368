import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vrdistill_jax.training.parallel import split_batch

SCRIPT = """
import os, sys
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
import jax, numpy as np, optax
from scenes import make_batch, tiny_config
from vrdistill_jax.detectors import votenet
from vrdistill_jax.training.parallel import AXIS, map_train_step
from vrdistill_jax.training.state import init_state, init_variables
from vrdistill_jax.training.step import make_train_step

assert jax.local_device_count() == 8
config = tiny_config()
batches = [make_batch(config, range(8 * k, 8 * k + 8), num_boxes=1 + k % 3, train=True) for k in range(10)]
momentum = optax.constant_schedule(0.3)
# Plain SGD with small steps: Adam would blow up the rounding noise of gradients that are zero, and large steps of an
# untrained network turn it into other nearest neighbours.
optimizer = optax.sgd(1e-5)

def run(model, axis_name, wrap):
    scene, pyramid, _ = batches[0]
    state = init_state(init_variables(model, jax.random.key(0), scene.points, pyramid), optimizer)
    start = jax.tree.map(np.array, state.params)
    step = wrap(make_train_step(model, votenet.loss, config.detector, optimizer, momentum, axis_name))
    losses = []
    for batch in batches:
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["total"]))
    state = jax.tree.map(np.asarray, state)
    moved = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.params)))
    assert moved > 1e-3, moved  # fifty times the tolerance: a gradient wrong by two percent would show
    return state, np.array(losses)

one, one_losses = run(votenet.build(config.detector), None, jax.jit)
eight, eight_losses = run(votenet.build(config.detector, AXIS), AXIS, map_train_step)
worst = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)))
print(one_losses, eight_losses, "worst", worst, "loss", np.abs(one_losses - eight_losses).max(), "moved", np.ptp(one_losses))
assert worst < 2e-5, worst  # sums are rounded in another order, which depends on the processor
assert np.abs(one_losses / eight_losses - 1).max() < 3e-5
assert np.ptp(one_losses) > 0.1
"""


def test_eight_devices_equal_one_with_synchronised_batch_norm():
    tests = pathlib.Path(__file__).resolve().parents[1]
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tests)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_split_batch():
    parts = split_batch({"a": np.arange(6), "b": np.zeros((6, 2))}, 3)
    np.testing.assert_array_equal(parts["a"], [[0, 1], [2, 3], [4, 5]])
    assert parts["b"].shape == (3, 2, 2)
    with pytest.raises(ValueError, match="a batch of 6 scenes does not divide over 4 devices"):
        split_batch({"a": np.arange(6)}, 4)
