"""State, optimiser, schedules, the step, parallelism, checkpoints and logs."""
