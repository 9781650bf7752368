"""VoteNet on ScanNet V2, 18 classes, axis-aligned boxes, with the published recipe.

    python -m data_prep.scannet --raw=DOWNLOAD --output=datasets
    python -m vrdistill_jax.train --config=configs/scannet.py --config.dataset.data_dir=datasets

docs/datasets.md says how to get the data. `configs/scannet.py:small` is a model and schedule for two CPU cores.
The repository votenet reports mAP@0.25 / mAP@0.5 of about 58 / 35 for this recipe (its README);
we have not run it at full length.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import scannet_config


def get_config(arguments: str = "full") -> ConfigDict:
    size, _, detector = arguments.partition(",")
    return scannet_config(size, detector=detector or "votenet")
