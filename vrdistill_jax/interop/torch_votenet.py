"""VoteNet checkpoints of the official repository and of mmdetection3d -> our variables.

Source: the layouts of votenet (`pytorch_votenet` checkpoints) and of mmdetection3d's VoteNet, before and
since 0.6.
"""

from typing import Any

from ml_collections import ConfigDict

from vrdistill_jax.data.class_tables import (
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
)
from vrdistill_jax.detectors import votenet
from vrdistill_jax.interop.mmdet3d_names import (
    conv_module,
    join_outputs,
    mirror_heading,
    point_backbone,
    to_official_names,
    vote_aggregation,
    voting,
)
from vrdistill_jax.interop.name_map import (
    INPUT_FEATURES,
    Rule,
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

MMDET3D_NAMES = (
    point_backbone()
    | voting("bbox_head.vote_module", "vgen")
    | vote_aggregation("bbox_head", "pnet")
    | conv_module("bbox_head.conv_pred.shared_convs.layer#+", "pnet.@{}")
    | conv_module("bbox_head.conv_pred.#+", "pnet.@{}")  # before 0.6
    | {"bbox_head.conv_pred.conv_out.": "pnet.conv3."}
)


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
        if any(name.startswith("bbox_head.conv_pred.conv_cls.") for name in tensors):  # since 0.6
            tensors = join_outputs(tensors, "bbox_head.conv_pred")
            tensors = mirror_heading(
                tensors, "bbox_head.conv_pred.conv_out", config.detector.num_heading_bins
            )
        tensors = to_official_names(tensors, MMDET3D_NAMES)
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
