"""FCAF3D on ScanNet V2, with its published schedule.

    python -m vrdistill_jax.train --config=configs/fcaf3d/scannet.py --config.dataset.data_dir=datasets

For a GPU; `configs/fcaf3d/scannet.py:small` is a narrow network for two CPU cores.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import scannet_config


def get_config(size: str = "full") -> ConfigDict:
    return scannet_config(size, detector="fcaf3d")
