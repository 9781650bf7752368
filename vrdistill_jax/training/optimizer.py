"""The optimiser that a config describes."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Builds the Optax chain.

    Args:
      config: config.optimizer: `name` is "adam" or "adamw"; `weight_decay` (decoupled, on every parameter, as PyTorch's
        AdamW); `clip_norm` (0 for none); `group_rates`, if it is there, names groups of parameters that learn at another
        rate, see `scale_groups`.
      schedule: learning rate by step.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: for an unknown optimiser, or an impossible group.
    """
    if config.name not in ("adam", "adamw"):
        raise ValueError(f"unknown optimizer {config.name!r}; known: adam, adamw")
    if config.name == "adam" and config.weight_decay:
        raise ValueError(f"adam has no weight decay, got {config.weight_decay}; use optimizer.name=adamw")
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(optax.adamw(schedule, weight_decay=config.weight_decay))
    if config.get("group_rates"):
        parts.append(scale_groups(config.group_rates.to_dict()))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def scale_groups(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the finished updates of some parameters: they learn, and decay, at a share of the learning rate.

    Args:
      rates: part of a parameter's path (modules joined by "/") -> factor. A parameter that several parts match has the product
        of their factors, one that none matches keeps its update.

    Returns:
      A gradient transformation without state, to come last in a chain.

    Raises:
      ValueError: for a factor that is not positive and finite; on `init`, for a part that no parameter's path contains.
    """
    for part, factor in rates.items():
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"group_rates.{part} is {factor}; expected a positive factor")

    def init(params):
        paths = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        for part in rates:
            if not any(part in path for path in paths):
                tops = sorted({path.partition("/")[0] for path in paths})
                raise ValueError(
                    f"group_rates (or distiller_group_rates) names {part!r}, which no parameter's path contains; there are "
                    f"{', '.join(tops)}"
                )
        return optax.EmptyState()

    def scale(path, update):
        return update * math.prod(factor for part, factor in rates.items() if part in _path(path))

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


def _path(path: tuple) -> str:
    return "/".join(key.key for key in path)
