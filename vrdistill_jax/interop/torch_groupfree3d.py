"""Group-Free-3D checkpoints of the official repository and of mmdetection3d -> our variables.

Source: the layouts of Group-Free-3D's checkpoints (train_dist.py) and of mmdetection3d's GroupFree3DNet.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.detectors import groupfree3d
from vrdistill_jax.interop.mmdet3d_names import (
    conv_module,
    point_backbone,
    split_outputs,
    to_official_names,
)
from vrdistill_jax.interop.name_map import (
    INPUT_FEATURES,
    Rule,
    Tensors,
    Variables,
    dense_rules,
    find_state_dict,
    map_tensors,
    norm_rules,
    read_number,
)
from vrdistill_jax.interop.torch_three_detr import (
    attention_rules,
    count_layers,
    feed_forward_rules,
    layer_norm_rules,
)
from vrdistill_jax.interop.torch_votenet import official_rules as votenet_rules
from vrdistill_jax.interop.torch_votenet import votenet_config

CONTAINERS = ("model", "state_dict")
_HEADS = {
    "objectness_scores_head": "objectness_out",
    "center_residual_head": "center_out",
    "heading_class_head": "heading_out",
    "heading_residual_head": "heading_residual_out",
    "sem_cls_scores_head": "class_out",
}
_SIZES_BY_CLASS = {"size_class_head": "size_class_out", "size_residual_head": "size_residual_out"}
_SIZES = {"size_pred_head": "size_out"}
# Their decoder layers and a list of their own hold the same position embeddings: name in the layer -> name of the list.
_ALIASES = {"self_posembed": "decoder_self_posembeds", "cross_posembed": "decoder_cross_posembeds"}
_LAYER = "bbox_head.decoder_layers.#"
MMDET3D_NAMES = (
    point_backbone()
    | conv_module("bbox_head.points_obj_cls.mlp.layer#+", "points_obj_cls.@{}")
    | conv_module("bbox_head.conv_pred.shared_convs.layer#+", "proposal_head.@{}")
    | conv_module("bbox_head.prediction_heads.#.shared_convs.layer#+", "prediction_heads.{}.@{}")
    | {
        f"{_LAYER}.attentions.0.attn.": "decoder.{}.self_attn.",
        f"{_LAYER}.attentions.1.attn.": "decoder.{}.multihead_attn.",
        f"{_LAYER}.ffns.0.layers.0.0.": "decoder.{}.linear1.",
        f"{_LAYER}.ffns.0.layers.1.": "decoder.{}.linear2.",
        f"{_LAYER}.norms.#+.": "decoder.{}.norm{}.",
        "bbox_head.": "",  # projections, position embeddings, outputs
    }
)
# Entries of the training script's options -> entries of our config, and the largest value that makes sense.
_COUNTS = {
    "num_target": ("num_proposals", 4096),
    "nhead": ("num_heads", 64),
    "query_points_obj_topk": ("query_positives", 1024),
}
_LENGTHS = ("center_delta", "heading_delta", "size_delta")
_COEFFICIENTS = {  # of a group of terms -> (term, its weight within the group)
    "query_points_generator_loss_coef": {"query_points": 1.0},
    "obj_loss_coef": {"objectness": 1.0},
    "box_loss_coef": {
        "center": 1.0,
        "heading_class": 0.1,
        "heading_residual": 1.0,
        "size_class": 0.1,
        "size": 1.0,
    },
    "sem_cls_loss_coef": {"class": 1.0},
}


def groupfree3d_config(dataset: str) -> ConfigDict:
    """The published Group-Free-3D (L6, O256) of one dataset, with what predict and evaluate need besides the architecture.

    Args:
      dataset: "scannet" or "sunrgbd".

    Raises:
      ValueError: for another dataset.
    """
    config = votenet_config(dataset)  # all but the detector is the same
    detector = config.detector
    config.detector = groupfree3d.default_config(
        detector.class_names, detector.mean_sizes, config.dataset.oriented
    )
    config.dataset.num_points = 20000 if config.dataset.oriented else 50000
    return config


def head_rules(theirs: str, ours: str, size_by_class: bool) -> list[Rule]:
    """A PredictionHead."""
    rules = []
    for n in (1, 2):
        rules += dense_rules(f"{theirs}.conv{n}", f"{ours}/mlp/layer{n - 1}/dense")
        rules += norm_rules(f"{theirs}.bn{n}", f"{ours}/mlp/layer{n - 1}/norm")
    for name, out in (_HEADS | (_SIZES_BY_CLASS if size_by_class else _SIZES)).items():
        rules += dense_rules(f"{theirs}.{name}", f"{ours}/{out}")
    return rules


def official_rules(decoder_layers: int, size_by_class: bool, sampling: str) -> list[Rule]:
    """The official repository's names, position embeddings by those of their lists."""
    rules = [rule for rule in votenet_rules() if rule.theirs.startswith("backbone_net.")]
    if sampling == "kps":
        for n in (1, 2):
            rules += dense_rules(f"points_obj_cls.conv{n}", f"seed_mlp/layer{n - 1}/dense")
            rules += norm_rules(f"points_obj_cls.bn{n}", f"seed_mlp/layer{n - 1}/norm")
        rules += dense_rules("points_obj_cls.conv3", "seed_out")
    rules += head_rules("proposal_head", "proposal_head", size_by_class)
    rules += dense_rules("decoder_query_proj", "decoder_query_projection")
    rules += dense_rules("decoder_key_proj", "decoder_seed_projection")
    for n in range(decoder_layers):
        theirs, ours = f"decoder.{n}", f"decoder_{n}"
        rules += attention_rules(f"{theirs}.self_attn", f"{ours}/self_attention")
        rules += attention_rules(f"{theirs}.multihead_attn", f"{ours}/cross_attention")
        rules += feed_forward_rules(theirs, ours)
        for k in (1, 2, 3):
            rules += layer_norm_rules(f"{theirs}.norm{k}", f"{ours}/norm{k}")
        for their_list, own in (("self", "query"), ("cross", "seed")):
            theirs = f"decoder_{their_list}_posembeds.{n}.position_embedding_head"
            ours = f"decoder_{own}_position_{n}"
            rules += dense_rules(f"{theirs}.0", f"{ours}/hidden/dense")
            rules += norm_rules(f"{theirs}.1", f"{ours}/hidden/norm") + dense_rules(
                f"{theirs}.3", f"{ours}/out"
            )
        rules += head_rules(f"prediction_heads.{n}", f"prediction_heads_{n}", size_by_class)
    return rules


def drop_aliases(tensors: Tensors) -> dict[str, np.ndarray]:
    """Leaves of position embeddings that are there under two names only the one that `official_rules` knows.

    Raises:
      ValueError: if the two hold different numbers.
    """
    kept: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if parts[0] == "decoder" and len(parts) > 3 and parts[2] in _ALIASES:
            name = ".".join([_ALIASES[parts[2]], parts[1], *parts[3:]])
        if name in kept and not np.array_equal(kept[name], value):
            raise ValueError(f"{name} is there twice, with different numbers; one of the two was edited")
        kept[name] = value
    return kept


def from_mmdet3d(tensors: Tensors, config: ConfigDict) -> dict[str, np.ndarray]:
    """mmdetection3d's tensors under the official names, one output layer for each part of a box.

    Args:
      tensors: their state_dict.
      config: of the dataset, ScanNet: there is no other of theirs.

    Raises:
      ValueError: for turned boxes, or output layers with other channels.
    """
    detector = config.detector
    bins, sizes = detector.num_heading_bins, len(detector.mean_sizes)
    if config.dataset.oriented:
        raise ValueError("mmdetection3d has Group-Free-3D for ScanNet only; check --dataset")
    classes = {"objectness_scores_head": 1, "sem_cls_scores_head": len(detector.class_names)}
    boxes = {"center_residual_head": 3, "heading_class_head": bins, "heading_residual_head": bins}
    by_class = {"size_class_head": sizes, "size_residual_head": 3 * sizes}
    for name in [name for name in tensors if name.endswith(".conv_reg.bias")]:
        theirs = name.removesuffix(".conv_reg.bias")
        official = theirs.replace("bbox_head.conv_pred", "proposal_head", 1)
        tensors = split_outputs(tensors, f"{theirs}.conv_cls", official, classes)
        agnostic = np.size(tensors[name]) == sum(boxes.values()) + 3
        parts = boxes | ({"size_pred_head": 3} if agnostic else by_class)
        tensors = split_outputs(tensors, f"{theirs}.conv_reg", official, parts)
    return to_official_names(tensors, MMDET3D_NAMES)


def variables_from_groupfree3d(checkpoint: Any, dataset: str) -> tuple[Variables, ConfigDict]:
    """Maps a Group-Free-3D checkpoint and finds out which one it is.

    Widths, layers, sampling, kind of sizes and input features are read off the tensors; the number of proposals and the weights
    of the loss off the training script's options, where the checkpoint has them (the published values where it does not:
    mmdetection3d's model with 512 proposals needs config.detector.num_proposals=512).

    Args:
      checkpoint: what read_torch_file returned: a state_dict, or a container of the official training script or of
        mmdetection3d.
      dataset: "scannet" or "sunrgbd", on which it was trained.

    Returns:
      ({"params", "batch_stats"}, config).

    Raises:
      ValueError: if tensors are missing or unknown, or belong to another dataset or architecture.
    """
    config = groupfree3d_config(dataset)
    detector = config.detector
    tensors = find_state_dict(checkpoint, CONTAINERS)
    if any(name.startswith("bbox_head.") for name in tensors):
        tensors = from_mmdet3d(tensors, config)
    tensors = drop_aliases(tensors)
    detector.decoder_layers = count_layers(tensors, "decoder.")
    detector.size_by_class = not any(name.startswith("proposal_head.size_pred_head.") for name in tensors)
    detector.sampling = "kps" if any(name.startswith("points_obj_cls.") for name in tensors) else "fps"
    rules = official_rules(detector.decoder_layers, detector.size_by_class, detector.sampling)
    variables = map_tensors(tensors, rules)
    configure_from_shapes(variables, config)
    options = checkpoint.get("config") if isinstance(checkpoint, Mapping) else None
    if isinstance(options, Mapping):
        configure_from_options(options, detector)
    return variables, config


def configure_from_shapes(variables: Variables, config: ConfigDict) -> None:
    """Sets widths and input features from the mapped tensors, and checks the heads against the dataset.

    Raises:
      ValueError: naming what does not fit.
    """
    params, detector = variables["params"], config.detector
    inputs, first = params["backbone"]["sa1"]["mlp"]["layer0"]["dense"]["kernel"].shape
    if inputs - 3 not in INPUT_FEATURES:
        raise ValueError(
            f"the first layer reads {inputs - 3} features per point; known are 0, 1 (height), 3 (colour), 4 (both)"
        )
    detector.input_features = INPUT_FEATURES[inputs - 3]
    size = params["decoder_query_projection"]["kernel"].shape[0]
    if not size or not first:
        raise ValueError(f"the first layer has {first} channels and the decoder {size}; both must have some")
    detector.width = size / groupfree3d.SIZE
    detector.backbone_width = first / 64 / detector.width
    head = params["proposal_head"]
    found = [head[name]["kernel"].shape[1] for name in ("class_out", "heading_out")]
    expected = [len(detector.class_names), detector.num_heading_bins]
    if found != expected:
        fitting = {(18, 1): "scannet", (10, 12): "sunrgbd"}.get((found[0], found[1]))
        hint = f"; it fits --dataset={fitting}" if fitting else ""
        raise ValueError(
            f"the heads have {found[0]} classes and {found[1]} heading bins but {config.dataset.name} needs {expected[0]} "
            f"and {expected[1]}{hint}"
        )


def configure_from_options(options: Mapping[str, Any], detector: ConfigDict) -> None:
    """Takes the number of proposals, dropout and the loss over from the training script's options.

    Raises:
      ValueError: for a value that cannot be meant.
    """
    for theirs, (ours, limit) in _COUNTS.items():
        detector[ours] = int(read_number(options, theirs, detector[ours], 1, limit))
    detector.dropout = float(read_number(options, "transformer_dropout", detector.dropout, 0, 0.999))
    for name in _LENGTHS:
        detector[name] = float(read_number(options, name, detector[name], 1e-6, 1e6))
    for theirs, group in _COEFFICIENTS.items():
        if theirs in options:
            coefficient = float(read_number(options, theirs, 1.0, 0, 1e6))
            detector.loss_weight.update({term: coefficient * share for term, share in group.items()})
