"""VoteNet on SynthRooms, the procedural rooms that come with the library: no download.

    python -m vrdistill_jax.train --config=configs/synthrooms.py

Half width, few points, half-size set abstraction: about ten minutes on two CPU cores. `configs/synthrooms.py:full` is VoteNet
at its published size, for a GPU; `:tiny` is for tests.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import SCANNET, votenet_config


def get_config(size: str = "small") -> ConfigDict:
    config = votenet_config(SCANNET, size)
    config.dataset.name = "synthrooms"
    config.dataset.style = "scan"
    config.dataset.num_train = 64 if size == "tiny" else 1200
    config.dataset.num_val = 16 if size == "tiny" else 312
    if size == "full":
        config.train.num_steps, config.train.eval_every, config.train.checkpoint_every = 27000, 1500, 1500
    return config
