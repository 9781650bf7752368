"""Trains configs/synthrooms.py:tiny and dies, as if killed, right after the checkpoint of a given step.

usage: train_until.py STEP DATA_DIR WORKDIR [--config.key=value ...]
"""

import os
import sys

from vrdistill_jax import train
from vrdistill_jax.command_line import run_verb
from vrdistill_jax.training.checkpoint import RunCheckpoints

stop, data, workdir, *settings = sys.argv[1:]
save = RunCheckpoints.save


def save_then_die(self, state, metrics=None):
    save(self, state, metrics)
    if int(state.step) == int(stop):
        self._manager.wait_until_finished()
        os._exit(9)


RunCheckpoints.save = save_then_die
sys.argv = [
    "train",
    "--config=configs/synthrooms.py:tiny",
    f"--workdir={workdir}",
    f"--config.dataset.data_dir={data}",
    "--config.train.num_steps=4",
    *settings,
]
train.define_flags()
run_verb(train.main)
