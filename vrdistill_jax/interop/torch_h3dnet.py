"""H3DNet checkpoints of the official repository, with four towers or one -> our variables.

Source: the layout of H3DNet's checkpoints (train.py and train_1bb.py).
"""

from typing import Any

from ml_collections import ConfigDict

from vrdistill_jax.detectors import h3dnet
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
from vrdistill_jax.interop.torch_votenet import votenet_config

CONTAINERS = ("model_state_dict",)
_SHARED: dict[str, Any] = {"conv": "layer{}.conv", "norm": "layer{}.bn.bn"}


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


def variables_from_h3dnet(checkpoint: Any, dataset: str) -> tuple[Variables, ConfigDict]:
    """Maps an H3DNet checkpoint and finds out which H3DNet it is.

    Towers, widths and input features are read off names and shapes.

    Args:
      checkpoint: what read_torch_file returned: a state_dict, or a container of the official training script.
      dataset: "scannet" or "sunrgbd", on which it was trained.

    Returns:
      ({"params", "batch_stats"}, config).

    Raises:
      ValueError: if tensors are missing or unknown, or belong to another dataset or architecture.
    """
    config = h3dnet_config(dataset)
    tensors = find_state_dict(checkpoint, CONTAINERS)
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
