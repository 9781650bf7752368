"""SR3D, its ablations and competitors on ScanNet V2.

    python -m vrdistill_jax.train --config=configs/sr3d/scannet.py --config.dataset.data_dir=datasets
    python -m vrdistill_jax.train --config=configs/sr3d/scannet.py:tr3d --config.dataset.data_dir=datasets

After the colon: VARIANT[,SIZE]. VARIANT is sr3d (default), tr3d (the baseline), spota or ras (one of SR3D's two parts alone),
ota, simota, alignota (SR3D with another assigner), qfl or vfl (with another classification loss).
With the published schedule, for a GPU; `:sr3d,small` is a narrow network for two CPU cores.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import scannet_config, sr3d_variant


def get_config(arguments: str = "sr3d") -> ConfigDict:
    variant, _, size = arguments.partition(",")
    return sr3d_variant(
        scannet_config(size or "full", detector="tr3d" if variant == "tr3d" else "sr3d"), variant
    )
