"""TR3D checkpoints of the authors' repository and of mmdetection3d -> our variables.

Source: the layouts of SamsungLabs/tr3d and of mmdetection3d's projects/TR3D, which differ in the names of the head.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.data.class_tables import (
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
)
from vrdistill_jax.detectors import tr3d
from vrdistill_jax.interop.name_map import Rule, Variables, find_state_dict, map_tensors, norm_rules

CONTAINERS = ("state_dict", "model")
_DATASETS = {
    "scannet": (SCANNET_CLASSES, SCANNET_MEAN_SIZES, False),
    "sunrgbd": (SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES, True),
}
_HEADS = {"head": ("bbox_conv", "cls_conv"), "bbox_head": ("conv_reg", "conv_cls")}
_FEATURES: dict[int, tuple[str, ...]] = {1: ("height",), 3: ("color",), 4: ("color", "height")}
NUM_BLOCKS = (3, 4, 6, 3)


def tr3d_config(dataset: str) -> ConfigDict:
    """The published TR3D of one dataset, with what predict and evaluate need besides the architecture.

    Args:
      dataset: "scannet" or "sunrgbd".

    Raises:
      ValueError: for another dataset.
    """
    if dataset not in _DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}; TR3D checkpoints are of {' or '.join(_DATASETS)}")
    names, sizes, oriented = _DATASETS[dataset]
    config = ConfigDict({"seed": 0, "train": {"eval_batch_size": 1}})
    config.detector = tr3d.default_config(names, sizes, oriented)
    config.detector.reference_diou = True
    config.dataset = ConfigDict({"name": dataset, "data_dir": "", "num_points": 100_000, "max_boxes": 64})
    config.dataset.oriented, config.dataset.num_threads = oriented, 2
    return config


def tr3d_rules(head: str = "head") -> list[Rule]:
    """The names of one of the two projects.

    Args:
      head: what the head is called: "head" in the authors' repository, "bbox_head" in mmdetection3d.

    Raises:
      ValueError: for another name.
    """
    if head not in _HEADS:
        raise ValueError(f"unknown head {head!r}; known: {', '.join(_HEADS)}")
    rules = backbone_rules(NUM_BLOCKS)
    for name in (
        "up_block_1",
        "up_block_2",
        "lateral_block_0",
        "lateral_block_1",
        "out_block_0",
        "out_block_1",
    ):
        rules.append(Rule(f"neck.{name}.0.kernel", f"params/neck/{name}/conv/kernel"))
        rules += norm_rules(f"neck.{name}.1.bn", f"neck/{name}/norm")
    for theirs, ours in zip(_HEADS[head], ("box_head", "class_head"), strict=True):
        rules.append(Rule(f"{head}.{theirs}.kernel", f"params/{ours}/kernel"))
        rules.append(Rule(f"{head}.{theirs}.bias", f"params/{ours}/bias", np.ravel))  # theirs is [1, C]
    return rules


def backbone_rules(num_blocks: tuple[int, ...]) -> list[Rule]:
    """MinkowskiEngine's residual network with a batch-norm stem; every stage begins with a downsampling block."""
    rules = [Rule("backbone.conv1.kernel", "params/backbone/conv1/kernel")]
    rules += norm_rules("backbone.norm1.bn", "backbone/norm1")
    for stage, count in enumerate(num_blocks, 1):
        for block in range(count):
            theirs, ours = f"backbone.layer{stage}.{block}", f"backbone/layer{stage}_{block}"
            for n in (1, 2):
                rules.append(Rule(f"{theirs}.conv{n}.kernel", f"params/{ours}/conv{n}/kernel"))
                rules += norm_rules(f"{theirs}.norm{n}.bn", f"{ours}/norm{n}")
            if block == 0:
                rules.append(Rule(f"{theirs}.downsample.0.kernel", f"params/{ours}/downsample_conv/kernel"))
                rules += norm_rules(f"{theirs}.downsample.1.bn", f"{ours}/downsample_norm")
    return rules


def variables_from_tr3d(checkpoint: Any, dataset: str) -> tuple[Variables, ConfigDict]:
    """Maps a TR3D checkpoint and finds out its sizes.

    Args:
      checkpoint: what read_torch_file returned: a state_dict, or a container of either project.
      dataset: "scannet" or "sunrgbd", on which it was trained.

    Returns:
      ({"params", "batch_stats"}, config).

    Raises:
      ValueError: if tensors are missing or unknown, or belong to another dataset or architecture.
    """
    config = tr3d_config(dataset)
    tensors = find_state_dict(checkpoint, CONTAINERS)
    head = "bbox_head" if any(name.startswith("bbox_head.") for name in tensors) else "head"
    variables = map_tensors(tensors, tr3d_rules(head))
    return variables, configure_from_shapes(variables, config)


def configure_from_shapes(variables: Variables, config: ConfigDict) -> ConfigDict:
    """Sets channels and input features from the mapped tensors, and checks the head against the dataset.

    Raises:
      ValueError: naming what does not fit.
    """
    params, detector = variables["params"], config.detector
    _, inputs, stem = params["backbone"]["conv1"]["kernel"].shape
    if inputs not in _FEATURES:
        raise ValueError(
            f"the first layer reads {inputs} features per point; known are 1 (height), 3 (colour), 4 (both)"
        )
    detector.input_features = _FEATURES[inputs]
    detector.stem_size, detector.max_size = stem, params["neck"]["out_block_0"]["conv"]["kernel"].shape[-1]
    classes, boxes = (params[name]["kernel"].shape[1] for name in ("class_head", "box_head"))
    wanted = len(detector.class_names), 8 if detector.oriented else 6
    if (classes, boxes) != wanted:
        fitting = [
            n
            for n, (names, _, turned) in _DATASETS.items()
            if (len(names), 8 if turned else 6) == (classes, boxes)
        ]
        hint = f"; it fits --dataset={fitting[0]}" if fitting else ""
        raise ValueError(
            f"the head has {classes} classes and {boxes} box channels but {config.dataset.name} needs {wanted[0]} and"
            f" {wanted[1]}{hint}"
        )
    return config
