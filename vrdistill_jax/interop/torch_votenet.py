"""VoteNet checkpoints of the official repository and of mmdetection3d -> our variables.

Source: the layouts of votenet (`pytorch_votenet` checkpoints) and of mmdetection3d's VoteNet, before and
since 0.6.
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
from vrdistill_jax.detectors import votenet
from vrdistill_jax.interop.name_map import (
    INPUT_FEATURES,
    Rule,
    Tensors,
    Variables,
    dense_rules,
    find_state_dict,
    map_tensors,
    mlp_rules,
    norm_rules,
)

CONTAINERS = ("model_state_dict", "state_dict", "model")
_DATASETS = {
    "scannet": (SCANNET_CLASSES, SCANNET_MEAN_SIZES, False, 40000),
    "sunrgbd": (SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES, True, 20000),
}


def votenet_config(dataset: str) -> ConfigDict:
    """The published VoteNet of one dataset, with what predict and evaluate need besides the architecture.

    Args:
      dataset: "scannet" or "sunrgbd".

    Raises:
      ValueError: for another dataset.
    """
    if dataset not in _DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}; VoteNet checkpoints are of {' or '.join(_DATASETS)}")
    names, sizes, oriented, num_points = _DATASETS[dataset]
    config = ConfigDict({"seed": 0, "train": {"eval_batch_size": 8}})
    config.detector = votenet.default_config(names, sizes, oriented)
    config.dataset = ConfigDict({"name": dataset, "data_dir": "", "num_points": num_points, "max_boxes": 64})
    config.dataset.oriented, config.dataset.num_threads = oriented, 2
    return config


def official_rules() -> list[Rule]:
    """The official repository's names; its output channels are in our order."""
    rules = []
    for n in range(1, 5):
        rules += mlp_rules(
            f"backbone_net.sa{n}.mlp_module", f"backbone/sa{n}/mlp", 3, "layer{}.conv", "layer{}.bn.bn"
        )
    for n in (1, 2):
        rules += mlp_rules(
            f"backbone_net.fp{n}.mlp", f"backbone/fp{n}/mlp", 2, "layer{}.conv", "layer{}.bn.bn"
        )
    for n in (1, 2):
        rules += dense_rules(f"vgen.conv{n}", f"voting/layer{n - 1}/dense")
        rules += norm_rules(f"vgen.bn{n}", f"voting/layer{n - 1}/norm")
    rules += dense_rules("vgen.conv3", "voting_out")
    rules += mlp_rules(
        "pnet.vote_aggregation.mlp_module", "aggregation/mlp", 3, "layer{}.conv", "layer{}.bn.bn"
    )
    for n in (1, 2):
        rules += dense_rules(f"pnet.conv{n}", f"proposal/layer{n - 1}/dense")
        rules += norm_rules(f"pnet.bn{n}", f"proposal/layer{n - 1}/norm")
    return rules + dense_rules("pnet.conv3", "proposal_out")


def mmdet3d_rules(shared: str = "shared_convs.layer", out: str = "conv_out") -> list[Rule]:
    """mmdetection3d's names; its two output layers are to be joined first, see `join_mmdet3d_head`."""
    rules = []
    for n in range(4):
        rules += mlp_rules(
            f"backbone.SA_modules.{n}.mlps.0", f"backbone/sa{n + 1}/mlp", 3, "layer{}.conv", "layer{}.bn"
        )
    for n in range(2):
        rules += mlp_rules(
            f"backbone.FP_modules.{n}.mlps", f"backbone/fp{n + 1}/mlp", 2, "layer{}.conv", "layer{}.bn"
        )
    vote = "bbox_head.vote_module"
    rules += mlp_rules(f"{vote}.vote_conv", "voting", 2, "{}.conv", "{}.bn", bias=True)
    rules += dense_rules(f"{vote}.conv_out", "voting_out")
    rules += mlp_rules(
        "bbox_head.vote_aggregation.mlps.0", "aggregation/mlp", 3, "layer{}.conv", "layer{}.bn"
    )
    head = "bbox_head.conv_pred"
    rules += mlp_rules(head, "proposal", 2, shared + "{}.conv", shared + "{}.bn", bias=True)
    return rules + dense_rules(f"{head}.{out}", "proposal_out")


def join_mmdet3d_head(
    tensors: Tensors, num_heading_bins: int, counterclockwise: bool = True
) -> dict[str, np.ndarray]:
    """Joins mmdetection3d's two output layers into one with the channels in the official order.

    conv_cls is [objectness 2 | class], conv_reg is [centre 3 | heading class | heading residual | size class
    | size residual]; the official layer is conv_cls[:2], conv_reg, conv_cls[2:]. Since version 1.0
    mmdetection3d's yaw is counter-clockwise and the reference's heading clockwise: bin b becomes (-b) mod H
    and residuals change sign.

    Args:
      tensors: their state_dict.
      num_heading_bins: H.
      counterclockwise: False for checkpoints of versions before 1.0, whose heading is the official one.

    Returns:
      The state_dict with conv_pred.conv_out instead of the two layers.
    """
    head = "bbox_head.conv_pred"
    tensors = dict(tensors)
    for leaf in ("weight", "bias"):
        names = [
            f"{head}.{layer}.{leaf}"
            for layer in ("conv_cls", "conv_reg")
            if f"{head}.{layer}.{leaf}" in tensors
        ]
        if len(names) == 2:
            classes, boxes = (np.asarray(tensors.pop(name)) for name in names)
            tensors[f"{head}.conv_out.{leaf}"] = np.concatenate([classes[:2], boxes, classes[2:]])
    if counterclockwise:
        mirror = -np.arange(num_heading_bins) % num_heading_bins
        for leaf in ("weight", "bias"):
            name = f"{head}.conv_out.{leaf}"
            if name not in tensors:
                continue
            out = np.array(tensors[name])
            first, end = 5 + num_heading_bins, 5 + 2 * num_heading_bins
            out[5:first] = out[5:first][mirror]
            out[first:end] = -out[first:end][mirror]
            tensors[name] = out
    return tensors


def variables_from_votenet(checkpoint: Any, dataset: str) -> tuple[Variables, ConfigDict]:
    """Maps a VoteNet checkpoint and finds out which VoteNet it is.

    Width, input features and the size of the head are read off the shapes.

    Args:
      checkpoint: what read_torch_file returned: a state_dict, or a container of the official training script
        or of mmdetection3d.
      dataset: "scannet" or "sunrgbd", on which it was trained.

    Returns:
      ({"params", "batch_stats"}, config).

    Raises:
      ValueError: if tensors are missing or unknown, or belong to another dataset or architecture.
    """
    config = votenet_config(dataset)
    tensors = find_state_dict(checkpoint, CONTAINERS)
    if any(name.startswith("bbox_head.") for name in tensors):
        separate = any(name.startswith("bbox_head.conv_pred.conv_cls.") for name in tensors)
        if separate:
            tensors = join_mmdet3d_head(tensors, config.detector.num_heading_bins)
        variables = map_tensors(tensors, mmdet3d_rules("shared_convs.layer" if separate else ""))
    else:
        variables = map_tensors(tensors, official_rules())
    return variables, configure_from_shapes(variables, config)


def configure_from_shapes(variables: Variables, config: ConfigDict) -> ConfigDict:
    """Sets width and input features from the mapped tensors, and checks the head against the dataset.

    Raises:
      ValueError: naming what does not fit.
    """
    params = variables["params"]
    inputs, first = params["backbone"]["sa1"]["mlp"]["layer0"]["dense"]["kernel"].shape
    if inputs - 3 not in INPUT_FEATURES:
        raise ValueError(
            f"the first layer reads {inputs - 3} features per point; known are 0, 1 (height), 3 "
            f"(colour), 4 (both)"
        )
    config.detector.input_features = INPUT_FEATURES[inputs - 3]
    config.detector.width = first / 64
    channels = params["proposal_out"]["kernel"].shape[1]
    expected = {
        name: 5 + 2 * (12 if oriented else 1) + 5 * len(names)
        for name, (names, _, oriented, _) in _DATASETS.items()
    }
    if channels != expected[config.dataset.name]:
        fitting = [name for name, count in expected.items() if count == channels]
        hint = f"; it fits --dataset={fitting[0]}" if fitting else ""
        raise ValueError(
            f"the proposal head has {channels} channels but {config.dataset.name} needs "
            f"{expected[config.dataset.name]} "
            f"(2 objectness, 3 centre, 2 x {config.detector.num_heading_bins} heading, 5 x "
            f"{len(config.detector.class_names)} size and class){hint}"
        )
    return config
