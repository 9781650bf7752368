"""VoteNet on SynthRooms, the procedural rooms that come with the library: no download.

    python -m vrdistill_jax.train --config=configs/synthrooms.py

Half width, few points, half-size set abstraction: about ten minutes on two CPU cores. `configs/synthrooms.py:teacher` has full
width and reads half as many points of small rooms, for students to learn from (configs/distill); `:full` is VoteNet at its
published size, for a GPU; `:tiny` is for tests. `:SIZE,DETECTOR` trains another detector (recipes.DETECTOR_RECIPES).
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import synthrooms_config


def get_config(arguments: str = "small") -> ConfigDict:
    size, _, detector = arguments.partition(",")
    return synthrooms_config(size, detector=detector or "votenet")
