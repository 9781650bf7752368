"""SR3D, its ablations and competitors on SynthRooms.

    python -m vrdistill_jax.train --config=configs/sr3d/synthrooms.py
    python -m vrdistill_jax.train --config=configs/sr3d/synthrooms.py:tr3d

After the colon: VARIANT[,SIZE]. VARIANT is sr3d (default), tr3d (the baseline), spota or ras (one of SR3D's two parts alone),
none (neither: TR3D's targets and loss with SR3D's augmentation), ota, simota, alignota (SR3D with another assigner), qfl or vfl
(with another classification loss).
Small rooms, voxels of 2 cm and a narrow network, for two CPU cores. `:sr3d,full` is the published size, for a GPU.
"""

from ml_collections import ConfigDict

from vrdistill_jax.recipes import sr3d_variant, synthrooms_config


def get_config(arguments: str = "sr3d") -> ConfigDict:
    variant, _, size = arguments.partition(",")
    return sr3d_variant(
        synthrooms_config(size or "small", detector="tr3d" if variant == "tr3d" else "sr3d"), variant
    )
