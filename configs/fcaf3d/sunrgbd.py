"""FCAF3D on SUN RGB-D, with its published schedule.

    python -m vrdistill_jax.train --config=configs/fcaf3d/sunrgbd.py --config.dataset.data_dir=datasets

For a GPU; `configs/fcaf3d/sunrgbd.py:small` is a narrow network for two CPU cores.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import sunrgbd_config


def get_config(size: str = "full") -> ConfigDict:
    return sunrgbd_config(size, detector="fcaf3d")
