"""VoteNet on SUN RGB-D, 10 classes, oriented boxes, with the published recipe.

    python -m data_prep.sunrgbd --raw=DOWNLOAD --output=datasets
    python -m vrdistill_jax.train --config=configs/sunrgbd.py --config.dataset.data_dir=datasets

docs/datasets_sunrgbd.md says how to get the data. `configs/sunrgbd.py:small` is a model and schedule for two CPU cores.
The repository votenet reports mAP@0.25 / mAP@0.5 of about 57 / 32 for this recipe (its README);
we have not run it at full length.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import sunrgbd_config


def get_config(arguments: str = "full") -> ConfigDict:
    size, _, detector = arguments.partition(",")
    return sunrgbd_config(size, detector=detector or "votenet")
