"""One training step and one inference step, as pure functions of one device's share of the batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vrdistill_jax.nn.norm import update_running
from vrdistill_jax.training.state import Batch, TrainState


def make_train_step(
    model: nn.Module,
    loss: Callable,
    config: Any,
    optimizer: optax.GradientTransformation,
    norm_momentum: optax.Schedule,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds step(state, batch, key) -> (state, metrics).

    Args:
      model: the network.
      loss: the detector's loss(output, scene, config, axis_name).
      config: config.detector.
      optimizer: of all parameters.
      norm_momentum: batch-norm momentum by step.
      axis_name: mapped device axis, or None for a single device.

    Returns:
      A function of the state, this device's part of the batch and a key. Metrics are the loss terms, their "total" and
      the global norms of gradient and parameters.
    """

    def mean_over_devices(tree):
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def step(state: TrainState, batch: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step)

        def objective(params):
            output, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch.scene.points,
                batch.pyramid,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            total, terms = loss(output, batch.scene, config, axis_name)
            return total, (terms, updates["batch_stats"])

        (total, (terms, stats)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        grads, stats, metrics = mean_over_devices((grads, stats, {"total": total} | terms))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        stats = update_running(state.batch_stats, stats, norm_momentum(state.step))
        metrics |= {"gradient_norm": optax.global_norm(grads), "parameter_norm": optax.global_norm(params)}
        return TrainState(state.step + 1, params, stats, opt_state), metrics

    return step


def make_predict_step(model: nn.Module, decode: Callable, config: Any, decode_config: Any = None) -> Callable:
    """Builds predict(variables, points, pyramid) -> Detections, jitted.

    Args:
      model: the network.
      decode: the detector's decode(output, points, config, decode_config).
      config: config.detector.
      decode_config: thresholds, or None for the evaluation protocol.
    """

    @jax.jit
    def predict(variables, points, pyramid):
        return decode(model.apply(variables, points, pyramid, train=False), points, config, decode_config)

    return predict


def find_non_finite(metrics: dict[str, Any]) -> list[str]:
    """Names of the metrics that are NaN or infinite."""
    return [name for name, value in metrics.items() if not jnp.isfinite(value)]
