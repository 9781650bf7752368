"""SR3D: TR3D's network, trained so that scores rank boxes by how well they fit.

Two parts differ from TR3D: anchors are assigned by geometry (SPOTA, `assigners.spota`) and class scores are distilled from
the ranks of the network's own boxes (RAS, `losses.ranking`). Inference is TR3D's.

Source: "Real-Time 3D Object Detection with Inference-Aligned Learning" (SR3D, 2026). No code was released.
"""

from ml_collections import ConfigDict

from vrdistill_jax.detectors import tr3d
from vrdistill_jax.detectors.tr3d import build, decode, feature_size, loss, pyramid_config

__all__ = ["VARIANTS", "build", "decode", "default_config", "feature_size", "loss", "pyramid_config"]

# The paper's ablations and competitors: changed entries of config.detector.
VARIANTS: dict[str, dict[str, str]] = {
    "sr3d": {},
    "tr3d": {},
    "none": {  # neither part, but the augmentation
        "assigner": "top_k",
        "classification_loss": "focal",
    },
    "spota": {"classification_loss": "focal"},
    "ras": {"assigner": "top_k"},
    "ota": {"assigner": "ota"},
    "simota": {"assigner": "simota"},
    "alignota": {"assigner": "alignota"},
    "qfl": {"classification_loss": "qfl"},
    "vfl": {"classification_loss": "vfl"},
}


def default_config(class_names, mean_sizes, oriented: bool) -> ConfigDict:
    """The published detector as `config.detector`; entries as in `tr3d.default_config`.

    The ablations of the paper: assigner "top_k" (without SPOTA), classification_loss "focal" (without RAS);
    assigners.spota.class_weight = 1 (with a classification cost), assigners.spota.vertex_distance = False (without R_VD);
    assigner "simota" or "alignota"; classification_loss "qfl" or "vfl".
    """
    config = tr3d.default_config(class_names, mean_sizes, oriented)
    config.name = "sr3d"
    config.assigner = "spota"
    config.classification_loss = "ras"
    return config
