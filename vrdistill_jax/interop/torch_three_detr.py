"""3DETR and 3DETR-m checkpoints of the official repository -> our variables.

Source: the layout of 3detr's checkpoints (facebookresearch/3detr).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.detectors import three_detr
from vrdistill_jax.interop.name_map import (
    Rule,
    Tensors,
    Variables,
    dense_rules,
    find_state_dict,
    map_tensors,
    mlp_rules,
    norm_rules,
    read_number,
)
from vrdistill_jax.interop.torch_votenet import votenet_config

CONTAINERS = ("model",)
_HEADS = {
    "sem_cls_head": "class_head",
    "center_head": "center_head",
    "size_head": "size_head",
    "angle_cls_head": "heading_head",
    "angle_residual_head": "residual_head",
}
_FEATURES: dict[int, tuple[str, ...]] = {0: (), 3: ("color",)}
# Entries of the training script's options -> entries of our config, and the largest value that makes sense.
_COUNTS = {"nqueries": ("num_proposals", 4096), "enc_nhead": ("num_heads", 64)}
# Options of which only one value is built here.
_ONLY = {"enc_activation": "relu", "pos_embed": "fourier"}
_MAX_TOKENS = 65536
_RATES = {"enc_dropout": "encoder_dropout", "dec_dropout": "decoder_dropout", "mlp_dropout": "head_dropout"}
_WEIGHTS = {
    "matcher_cls_cost": "match_cost.class",
    "matcher_objectness_cost": "match_cost.objectness",
    "matcher_center_cost": "match_cost.center",
    "matcher_giou_cost": "match_cost.giou",
    "loss_sem_cls_weight": "loss_weight.class",
    "loss_angle_cls_weight": "loss_weight.heading_class",
    "loss_angle_reg_weight": "loss_weight.heading_residual",
    "loss_center_weight": "loss_weight.center",
    "loss_size_weight": "loss_weight.size",
    "loss_giou_weight": "loss_weight.giou",
    "loss_no_object_weight": "no_object_weight",
}


def three_detr_config(dataset: str, masked: bool) -> ConfigDict:
    """The published 3DETR of one dataset, with what predict and evaluate need besides the architecture.

    Args:
      dataset: "scannet" or "sunrgbd".
      masked: 3DETR-m.

    Raises:
      ValueError: for another dataset.
    """
    config = votenet_config(dataset)  # all but the detector is the same
    names = config.detector.class_names
    config.detector = three_detr.default_config(names, (), config.dataset.oriented, masked)
    return config


def attention_rules(theirs: str, ours: str) -> list[Rule]:
    """A torch.nn.MultiheadAttention."""
    return [
        Rule(f"{theirs}.in_proj_weight", f"params/{ours}/in_kernel", np.transpose),
        Rule(f"{theirs}.in_proj_bias", f"params/{ours}/in_bias"),
        Rule(f"{theirs}.out_proj.weight", f"params/{ours}/out_kernel", np.transpose),
        Rule(f"{theirs}.out_proj.bias", f"params/{ours}/out_bias"),
    ]


def layer_norm_rules(theirs: str, ours: str) -> list[Rule]:
    """A torch.nn.LayerNorm."""
    return [
        Rule(f"{theirs}.weight", f"params/{ours}/scale"),
        Rule(f"{theirs}.bias", f"params/{ours}/bias"),
    ]


def feed_forward_rules(theirs: str, ours: str) -> list[Rule]:
    """The two linear layers of a transformer layer."""
    return dense_rules(f"{theirs}.linear1", f"{ours}/feed_forward/hidden") + dense_rules(
        f"{theirs}.linear2", f"{ours}/feed_forward/out"
    )


def official_rules(masked: bool, encoder_layers: int = 3, decoder_layers: int = 8) -> list[Rule]:
    """The official repository's names."""
    shared = "layer{}.conv", "layer{}.bn.bn"
    rules = mlp_rules("pre_encoder.mlp_module", "pre_encoder/mlp", 3, *shared)
    for n in range(encoder_layers):
        theirs, ours = f"encoder.layers.{n}", f"encoder_{n}"
        rules += attention_rules(f"{theirs}.self_attn", f"{ours}/attention") + feed_forward_rules(
            theirs, ours
        )
        for k in (1, 2):
            rules += layer_norm_rules(f"{theirs}.norm{k}", f"{ours}/norm{k}")
    if masked:
        rules += mlp_rules("encoder.interim_downsampling.mlp_module", "downsampling/mlp", 3, *shared)
    for n in range(2 if masked else 3):
        theirs, ours = "encoder_to_decoder_projection.layers", f"projection/layer{n}"
        rules += dense_rules(f"{theirs}.{3 * n}", f"{ours}/dense", bias=False)
        rules += norm_rules(f"{theirs}.{3 * n + 1}", f"{ours}/norm")
    rules.append(Rule("pos_embedding.gauss_B", "batch_stats/position/frequencies"))
    rules += dense_rules("query_projection.layers.0", "query_hidden")
    rules += dense_rules("query_projection.layers.2", "query_out")
    for n in range(decoder_layers):
        theirs, ours = f"decoder.layers.{n}", f"decoder_{n}"
        rules += attention_rules(f"{theirs}.self_attn", f"{ours}/self_attention")
        rules += attention_rules(f"{theirs}.multihead_attn", f"{ours}/cross_attention")
        rules += feed_forward_rules(theirs, ours)
        for k in (1, 2, 3):
            rules += layer_norm_rules(f"{theirs}.norm{k}", f"{ours}/norm{k}")
    rules += layer_norm_rules("decoder.norm", "decoder_norm")
    for theirs, ours in _HEADS.items():
        for n in (0, 1):
            rules += dense_rules(f"mlp_heads.{theirs}.layers.{4 * n}", f"{ours}/layer{n}/dense", bias=False)
            rules += norm_rules(f"mlp_heads.{theirs}.layers.{4 * n + 1}", f"{ours}/layer{n}/norm")
        rules += dense_rules(f"mlp_heads.{theirs}.layers.8", f"{ours}/out")
    return rules


def variables_from_three_detr(
    checkpoint: Any, dataset: str, masked: bool | None = None
) -> tuple[Variables, ConfigDict]:
    """Maps a 3DETR or 3DETR-m checkpoint and finds out which it is.

    Kind, width, layers and input features are read off names and shapes, the number of queries and the weights of loss and
    matching off the training script's options, where the checkpoint has them (the published values where it does not).

    Args:
      checkpoint: what read_torch_file returned: a state_dict, or a container of the official training script.
      dataset: "scannet" or "sunrgbd", on which it was trained.
      masked: True takes 3DETR-m only, False 3DETR only, None either.

    Returns:
      ({"params", "batch_stats"}, config).

    Raises:
      ValueError: if tensors are missing or unknown, or belong to another dataset or architecture.
    """
    tensors = find_state_dict(checkpoint, CONTAINERS)
    downsamples = any(name.startswith("encoder.interim_downsampling.") for name in tensors)
    if masked is not None and downsamples != masked:
        raise ValueError(
            f"the checkpoint is of 3DETR{'-m' if downsamples else ''}; "
            f"import it with --detector={'3detr_m' if downsamples else '3detr'}"
        )
    config = three_detr_config(dataset, downsamples)
    detector = config.detector
    detector.encoder_layers = count_layers(tensors, "encoder.layers.")
    detector.decoder_layers = count_layers(tensors, "decoder.layers.")
    rules = official_rules(downsamples, detector.encoder_layers, detector.decoder_layers)
    variables = map_tensors(tensors, rules)
    configure_from_shapes(variables, config)
    options = checkpoint.get("args") if isinstance(checkpoint, Mapping) else None
    if isinstance(options, Mapping):
        configure_from_options(options, detector)
    return variables, config


variables_from_three_detr_m = partial(variables_from_three_detr, masked=True)


def count_layers(tensors: Tensors, prefix: str) -> int:
    """How many layers are named PREFIX0., PREFIX1., ..."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len(numbers)


def configure_from_shapes(variables: Variables, config: ConfigDict) -> None:
    """Sets width and input features from the mapped tensors, and checks the heads against the dataset.

    Raises:
      ValueError: naming what does not fit.
    """
    params = variables["params"]
    inputs, first = params["pre_encoder"]["mlp"]["layer0"]["dense"]["kernel"].shape
    if inputs - 3 not in _FEATURES:
        raise ValueError(f"the first layer reads {inputs - 3} features per point; known are 0 and 3 (colour)")
    config.detector.input_features = _FEATURES[inputs - 3]
    config.detector.width = first / 64
    found = [params[head]["out"]["kernel"].shape[1] for head in ("class_head", "heading_head")]
    expected = [len(config.detector.class_names) + 1, config.detector.num_heading_bins]
    if found != expected:
        fitting = {(19, 1): "scannet", (11, 12): "sunrgbd"}.get((found[0], found[1]))
        hint = f"; it fits --dataset={fitting}" if fitting else ""
        raise ValueError(
            f"the heads have {found[0]} classes (with that of no object) and {found[1]} heading bins but "
            f"{config.dataset.name} needs {expected[0]} and {expected[1]}{hint}"
        )


def configure_from_options(options: Mapping[str, Any], detector: ConfigDict) -> None:
    """Takes the numbers of queries, tokens and heads, dropout rates and weights over from the training script's options.

    Raises:
      ValueError: for a value that cannot be meant, or a network that is not built here.
    """
    for name, value in _ONLY.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"the checkpoint was trained with {name}={options[name]!r}; only {value!r} is known"
            )
    for theirs, (ours, limit) in _COUNTS.items():
        detector[ours] = int(read_number(options, theirs, detector[ours], 1, limit))
    if read_number(options, "dec_nhead", detector.num_heads, 1, 64) != detector.num_heads:
        raise ValueError(
            f"the checkpoint's decoder has {options['dec_nhead']} attention heads, its encoder {detector.num_heads}; only "
            "equal numbers are known"
        )
    (tokens, *ball), *below = detector.levels
    tokens = int(read_number(options, "preenc_npoints", tokens, 2, _MAX_TOKENS))
    detector.levels = ((tokens, *ball), *((tokens // 2, *rest) for _, *rest in below))
    for theirs, ours in _RATES.items():
        detector[ours] = float(read_number(options, theirs, detector[ours], 0, 0.999))
    for theirs, ours in _WEIGHTS.items():
        section, _, leaf = ours.rpartition(".")
        entries = detector[section] if section else detector
        entries[leaf] = float(read_number(options, theirs, entries[leaf], 0, 1e6))
