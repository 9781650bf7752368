"""The optimiser that a config describes."""

from typing import Any

import optax


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Builds the Optax chain.

    Args:
      config: config.optimizer: `name` is "adam" or "adamw"; `weight_decay` (decoupled, on every parameter, as PyTorch's
        AdamW) and `clip_norm` (0 for none).
      schedule: learning rate by step.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: for an unknown optimiser.
    """
    if config.name not in ("adam", "adamw"):
        raise ValueError(f"unknown optimizer {config.name!r}; known: adam, adamw")
    if config.name == "adam" and config.weight_decay:
        raise ValueError(f"adam has no weight decay, got {config.weight_decay}; use optimizer.name=adamw")
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    return (
        optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer) if config.clip_norm else optimizer
    )
