"""FCAF3D on SynthRooms.

    python -m vrdistill_jax.train --config=configs/fcaf3d/synthrooms.py

Small rooms, voxels of 2 cm and a narrow network, for two CPU cores. `:full` is the published size, for a GPU; `:tiny` is
for a few steps.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import synthrooms_config


def get_config(size: str = "small") -> ConfigDict:
    return synthrooms_config(size, detector="fcaf3d")
