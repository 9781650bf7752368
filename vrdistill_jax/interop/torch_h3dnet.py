"""H3DNet checkpoints of the official repository, with four towers or one, and of mmdetection3d -> our variables.

Source: the layouts of H3DNet's checkpoints (train.py and train_1bb.py) and of mmdetection3d's H3DNet. That one keeps its
primitives in another order: where more of them than it reads are near a face or edge, it reads others.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.detectors import h3dnet
from vrdistill_jax.interop.mmdet3d_names import (
    conv_module,
    join_outputs,
    point_backbone,
    shared_mlp,
    to_official_names,
    vote_aggregation,
    voting,
)
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
from vrdistill_jax.interop.torch_votenet import votenet_config

CONTAINERS = ("model_state_dict", "state_dict")
_SHARED: dict[str, Any] = {"conv": "layer{}.conv", "norm": "layer{}.bn.bn"}


def _mmdet3d_names() -> dict[str, str]:
    names = point_backbone("backbone.backbone_list.#+", "backbone_net{}")
    names |= conv_module("backbone.aggregation_layers.layer#+", "@_agg{}")
    names |= voting("rpn_head.vote_module", "vgen") | vote_aggregation("rpn_head", "pnet_final")
    names |= conv_module("rpn_head.conv_pred.shared_convs.layer#+", "pnet_final.@{}")
    names |= conv_module("rpn_head.conv_pred.#+", "pnet_final.@{}")  # before 0.6
    names |= {"rpn_head.conv_pred.conv_out.": "pnet_final.conv3."}
    for kind in h3dnet.KINDS:
        head = f"roi_head.primitive_{kind}"
        names |= conv_module(f"{head}.flag_conv", f"@_flag_{kind}1")
        names |= {f"{head}.flag_pred.": f"conv_flag_{kind}2."}
        names |= voting(f"{head}.vote_module", f"vgen_{kind}") | vote_aggregation(head, f"pnet_{kind}")
        names |= conv_module(f"{head}.conv_pred.#+", f"pnet_{kind}.@{{}}")
        names |= {f"{head}.conv_pred.conv_out.": f"pnet_{kind}.conv3."}
    head, official = "roi_head.bbox_head", "pnet_final"
    for kind in ("surface", "line"):
        mlp = f"{official}.match_{kind}_center.mlp_module"
        names |= shared_mlp(f"{head}.{kind}_center_matcher.mlps.0", mlp)
        names |= conv_module(f"{head}.{kind}_feats_aggregation.#+", f"{official}.@_{kind}{{}}")
    for theirs, kind in (("matching", "match"), ("semantic_matching", "match_sem")):
        names |= conv_module(f"{head}.{theirs}_conv", f"{official}.@_{kind}1")
        names |= {f"{head}.{theirs}_pred.": f"{official}.conv_{kind}2."}
    names |= conv_module(f"{head}.bbox_pred.#+", f"{official}.@_refine{{}}")
    return names | {f"{head}.bbox_pred.#+.": f"{official}.conv_refine{{}}."}


MMDET3D_NAMES = _mmdet3d_names()


def h3dnet_config(dataset: str) -> ConfigDict:
    """The published H3DNet of one dataset, with what predict and evaluate need besides the architecture.

    Args:
      dataset: "scannet" or "sunrgbd".

    Raises:
      ValueError: for another dataset.
    """
    config = votenet_config(dataset)  # all but the detector is the same
    detector = config.detector
    config.detector = h3dnet.default_config(
        detector.class_names, detector.mean_sizes, config.dataset.oriented
    )
    config.dataset.num_points = 40000
    return config


def layer_rules(theirs: str, norm: str, ours: str) -> list[Rule]:
    """A convolution with bias and the batch norm after it."""
    return dense_rules(theirs, f"{ours}/dense") + norm_rules(norm, f"{ours}/norm")


def official_rules(num_towers: int = 4) -> list[Rule]:
    """The official repository's names."""
    rules = []
    for tower in range(num_towers):
        theirs, ours = f"backbone_net{tower + 1}", f"tower{tower}"
        for n in range(1, 5):
            rules += mlp_rules(f"{theirs}.sa{n}.mlp_module", f"{ours}/sa{n}/mlp", 3, **_SHARED)
        for n in (1, 2):
            rules += mlp_rules(f"{theirs}.fp{n}.mlp", f"{ours}/fp{n}/mlp", 2, **_SHARED)
    if num_towers > 1:
        for n in (1, 2):
            rules += layer_rules(f"conv_agg{n}", f"bn_agg{n}", f"joining/layer{n - 1}")
    for kind in ("", *h3dnet.KINDS):
        suffix, ours = (f"_{kind}", f"{kind}/") if kind else ("", "")
        for n in (1, 2):
            rules += layer_rules(f"vgen{suffix}.conv{n}", f"vgen{suffix}.bn{n}", f"{ours}voting/layer{n - 1}")
        rules += dense_rules(f"vgen{suffix}.conv3", f"{ours}voting_out")
        if kind:
            rules += layer_rules(f"conv_flag_{kind}1", f"bn_flag_{kind}1", f"{kind}/flag/layer0")
            rules += dense_rules(f"conv_flag_{kind}2", f"{kind}/flag_out")
            rules += _head_rules(f"pnet_{kind}", f"{kind}/aggregation", f"{kind}/hidden", f"{kind}/out")
    rules += _head_rules("pnet_final", "aggregation", "proposal", "proposal_out")
    for theirs, ours in (("surface", "face"), ("line", "edge")):
        rules += mlp_rules(
            f"pnet_final.match_{theirs}_center.mlp_module", f"matching/{ours}_grouping/mlp", 3, **_SHARED
        )
        for n in (1, 2):
            rules += layer_rules(
                f"pnet_final.conv_{theirs}{n}",
                f"pnet_final.bn_{theirs}{n}",
                f"matching/{ours}_hidden/layer{n - 1}",
            )
    for theirs, ours in (("match", "match"), ("match_sem", "class_match")):
        rules += layer_rules(
            f"pnet_final.conv_{theirs}1", f"pnet_final.bn_{theirs}1", f"matching/{ours}/layer0"
        )
        rules += dense_rules(f"pnet_final.conv_{theirs}2", f"matching/{ours}_out")
    for n, ours in enumerate(("merge/layer0", "hidden/layer0", "hidden/layer1"), 1):
        rules += layer_rules(f"pnet_final.conv_refine{n}", f"pnet_final.bn_refine{n}", f"matching/{ours}")
    return rules + dense_rules("pnet_final.conv_refine4", "matching/out")


def _head_rules(theirs: str, aggregation: str, hidden: str, out: str) -> list[Rule]:
    rules = mlp_rules(f"{theirs}.vote_aggregation.mlp_module", f"{aggregation}/mlp", 3, **_SHARED)
    for n in (1, 2):
        rules += layer_rules(f"{theirs}.conv{n}", f"{theirs}.bn{n}", f"{hidden}/layer{n - 1}")
    return rules + dense_rules(f"{theirs}.conv3", out)


def from_mmdet3d(tensors: Tensors, num_classes: int) -> dict[str, np.ndarray]:
    """mmdetection3d's tensors under the official names, the channels of the output layers in the official order.

    Args:
      tensors: their state_dict.
      num_classes: of the dataset.
    """
    tensors = join_outputs(tensors, "rpn_head.conv_pred")
    first_of_box = 2 + num_classes
    for name in [f"roi_head.bbox_head.bbox_pred.3.{leaf}" for leaf in ("weight", "bias")]:
        if name in tensors:  # objectness, classes, box
            objectness, classes, box = np.split(np.atleast_1d(tensors[name]), (2, first_of_box))
            tensors[name] = np.concatenate([objectness, box, classes])
    return to_official_names(tensors, MMDET3D_NAMES)


def variables_from_h3dnet(checkpoint: Any, dataset: str) -> tuple[Variables, ConfigDict]:
    """Maps an H3DNet checkpoint and finds out which H3DNet it is.

    Towers, widths and input features are read off names and shapes.

    Args:
      checkpoint: what read_torch_file returned: a state_dict, or a container of the official training script or of
        mmdetection3d.
      dataset: "scannet" or "sunrgbd", on which it was trained.

    Returns:
      ({"params", "batch_stats"}, config).

    Raises:
      ValueError: if tensors are missing or unknown, or belong to another dataset or architecture.
    """
    config = h3dnet_config(dataset)
    tensors = find_state_dict(checkpoint, CONTAINERS)
    if any(name.startswith("roi_head.") for name in tensors):
        if config.dataset.oriented:
            raise ValueError("mmdetection3d has H3DNet for ScanNet only; check --dataset")
        tensors = from_mmdet3d(tensors, len(config.detector.class_names))
    # Whatever else a checkpoint is missing, map_tensors says.
    config.detector.num_towers = 4 if any(name.startswith("backbone_net2.") for name in tensors) else 1
    variables = map_tensors(tensors, official_rules(config.detector.num_towers))
    return variables, configure_from_shapes(variables, config)


def configure_from_shapes(variables: Variables, config: ConfigDict) -> ConfigDict:
    """Sets widths and input features from the mapped tensors, and checks the head against the dataset.

    Raises:
      ValueError: naming what does not fit.
    """
    params, detector = variables["params"], config.detector
    inputs, first = params["tower0"]["sa1"]["mlp"]["layer0"]["dense"]["kernel"].shape
    if inputs - 3 not in INPUT_FEATURES:
        raise ValueError(
            f"the first layer reads {inputs - 3} features per point; known are 0, 1 (height), 3 (colour), 4 (both)"
        )
    detector.input_features = INPUT_FEATURES[inputs - 3]
    detector.width = params["z"]["flag_out"]["kernel"].shape[0] / 128
    detector.tower_scale = max(round(first / (64 * detector.width)), 1)
    channels = params["proposal_out"]["kernel"].shape[1]
    expected = {"scannet": 143, "sunrgbd": 79}
    if channels != expected[config.dataset.name]:
        fitting = [name for name, count in expected.items() if count == channels]
        hint = f"; it fits --dataset={fitting[0]}" if fitting else ""
        raise ValueError(
            f"the proposal head has {channels} channels but {config.dataset.name} needs {expected[config.dataset.name]} "
            f"(2 objectness, 3 centre, 2 x {detector.num_heading_bins} heading, 5 x {len(detector.class_names)} size and "
            f"class){hint}"
        )
    return config
