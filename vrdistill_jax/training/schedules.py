"""Learning rates and batch-norm momenta over the steps of a run."""

from typing import Any

import optax


def learning_rate_schedule(config: Any, num_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate at each step.

    Args:
      config: config.optimizer: `schedule` is "constant", "cosine" (to zero) or "steps" (times `decay_factor` after each of
        `decay_epochs`); `learning_rate` is the base value, `warmup_steps` of linear warm-up come first.
      num_steps: length of the run.
      steps_per_epoch: translates epochs.

    Returns:
      A function of the step.

    Raises:
      ValueError: for an unknown schedule.
    """
    base = config.learning_rate
    if config.schedule == "constant":
        schedule = optax.constant_schedule(base)
    elif config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(base, max(num_steps - config.warmup_steps, 1))
    elif config.schedule == "steps":
        boundaries = {
            int(e * steps_per_epoch) - config.warmup_steps: config.decay_factor for e in config.decay_epochs
        }
        schedule = optax.piecewise_constant_schedule(base, boundaries)
    else:
        raise ValueError(f"unknown schedule {config.schedule!r}; known: constant, cosine, steps")
    if not config.warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, base, config.warmup_steps)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def norm_momentum_schedule(config: Any, steps_per_epoch: int) -> optax.Schedule:
    """Weight of the new statistics in batch norm at each step (PyTorch's meaning of momentum).

    max(initial * factor ** (epoch // decay_epochs), floor), the schedule of VoteNet's training script, with 0.5, 0.5, 20
    epochs and 0.001 there. `factor` 1 keeps the momentum constant.

    Args:
      config: config.norm_momentum with initial, factor, decay_epochs, floor.
      steps_per_epoch: translates epochs.
    """
    if config.factor == 1.0:
        return optax.constant_schedule(config.initial)
    return optax.exponential_decay(
        config.initial,
        transition_steps=max(int(config.decay_epochs * steps_per_epoch), 1),
        decay_rate=config.factor,
        staircase=True,
        end_value=config.floor,
    )
