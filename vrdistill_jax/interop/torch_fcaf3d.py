"""FCAF3D checkpoints of three projects -> our variables.

Source: the layouts of SamsungLabs/fcaf3d, of mmdetection3d (two of them, its head was renamed once) and of SamsungLabs/tr3d.
They differ in what the head and three of its layers are called and in whether the stem is one module. The first one is older
than mmdetection3d 1.0 and turns boxes clockwise: its converter for SUN RGB-D (tools/data_converter/sunrgbd_data_utils.py)
negates the angles, mmdetection3d's later one does not.
"""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.data.class_tables import (
    SCANNET_CLASSES,
    SCANNET_MEAN_SIZES,
    SUNRGBD_CLASSES,
    SUNRGBD_MEAN_SIZES,
)
from vrdistill_jax.detectors import fcaf3d
from vrdistill_jax.interop.name_map import (
    INPUT_FEATURES,
    Rule,
    Tensors,
    Variables,
    find_state_dict,
    map_tensors,
    norm_rules,
)
from vrdistill_jax.interop.torch_tr3d import backbone_rules

CONTAINERS = ("state_dict", "model")
_DATASETS = {
    "scannet": (SCANNET_CLASSES, SCANNET_MEAN_SIZES, False),
    "sunrgbd": (SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES, True),
}
NUM_LEVELS = 4
# What the modules are called; the first name that the checkpoint has is taken.
_NECKS = ("neck_with_head", "bbox_head", "head", "neck")
_HEADS = ("neck_with_head", "bbox_head", "head")
_CLOCKWISE = "neck_with_head"
_CENTER = ("centerness_conv", "conv_center", "center_conv")
_BOX = ("reg_conv", "conv_reg", "bbox_conv")
_CLASS = ("cls_conv", "conv_cls")
# Residual blocks of the stages of the networks that the references' configs can name.
_DEPTHS = {14: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def fcaf3d_config(dataset: str) -> ConfigDict:
    """The published FCAF3D of one dataset, with what predict and evaluate need besides the architecture.

    Args:
      dataset: "scannet" or "sunrgbd".

    Raises:
      ValueError: for another dataset.
    """
    if dataset not in _DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}; FCAF3D checkpoints are of {' or '.join(_DATASETS)}")
    names, sizes, oriented = _DATASETS[dataset]
    config = ConfigDict({"seed": 0, "train": {"eval_batch_size": 1}})
    config.detector = fcaf3d.default_config(names, sizes, oriented)
    config.dataset = ConfigDict({"name": dataset, "data_dir": "", "num_points": 100_000, "max_boxes": 64})
    config.dataset.oriented, config.dataset.num_threads = oriented, 2
    return config


def fcaf3d_rules(names: Collection[str], num_blocks: tuple[int, ...] = _DEPTHS[34]) -> list[Rule]:
    """The rules for the layout that a state_dict has, or the names of some of its tensors.

    Args:
      names: of its tensors.
      num_blocks: residual blocks of the stages.
    """
    neck = _find(names, [f"{name}.out_block_0" for name in _NECKS]).rpartition(".")[0]
    classes = _find(names, [f"{name}.{layer}" for name in _HEADS for layer in _CLASS])
    owner = classes.rpartition(".")[0]
    center, box = (_find(names, [f"{owner}.{layer}" for layer in layers]) for layers in (_CENTER, _BOX))
    conv = _find(names, ["backbone.conv1.0", "backbone.conv1"])
    norm = "backbone.conv1.1" if conv.endswith(".0") else "backbone.norm1"
    stem = "params/backbone/norm1"
    rules = [
        Rule(f"{conv}.kernel", "params/backbone/conv1/kernel"),
        Rule(f"{norm}.weight", f"{stem}/scale", np.ravel),  # instance norm: [1, C], and no statistics
        Rule(f"{norm}.bias", f"{stem}/bias", np.ravel),
        *(rule for rule in backbone_rules(num_blocks) if rule.theirs.startswith("backbone.layer")),
    ]
    for level in range(NUM_LEVELS):
        blocks = [(f"out_block_{level}", 0, f"out_block_{level}")]
        if level:
            up = f"up_block_{level}"
            blocks += [(up, 0, f"{up}_generate"), (up, 3, f"{up}_refine")]
        for theirs, first, ours in blocks:
            rules.append(Rule(f"{neck}.{theirs}.{first}.kernel", f"params/neck/{ours}/conv/kernel"))
            rules += norm_rules(f"{neck}.{theirs}.{first + 1}.bn", f"neck/{ours}/norm")
        rules.append(Rule(f"{owner}.scales.{level}.scale", f"params/scale_{level}", _scalar))
    of_box = _turn_the_other_way if owner == _CLOCKWISE else np.asarray
    rules.append(Rule(f"{box}.kernel", "params/box_head/kernel", of_box))
    for theirs, ours in ((center, "center_head"), (classes, "class_head")):
        rules.append(Rule(f"{theirs}.kernel", f"params/{ours}/kernel"))
    return [*rules, Rule(f"{classes}.bias", "params/class_head/bias", np.ravel)]  # theirs is [1, K]


def _find(names: Iterable[str], modules: list[str]) -> str:
    """The first module that is there; the first of all if none is, so that the error names it."""
    return next((m for m in modules if any(name.startswith(f"{m}.") for name in names)), modules[0])


def _turn_the_other_way(kernel: np.ndarray) -> np.ndarray:
    """Negates sin(2 yaw), where the box channels [C, 8] of a 1x1 convolution have one."""
    turned = np.array(kernel)
    if turned.shape[-1] == 8:
        turned[..., 6] *= -1
    return turned


def _scalar(value: np.ndarray) -> np.ndarray:
    if np.size(value) != 1:
        raise ValueError(f"expected one number, got shape {np.shape(value)}")
    return np.reshape(value, ())


def count_blocks(tensors: Tensors) -> tuple[int, ...]:
    """Residual blocks of the four stages, as many as the state_dict has names for.

    Raises:
      ValueError: if the references have no network with that many.
    """
    found = []
    for stage in range(1, 5):
        prefix = f"backbone.layer{stage}."
        found.append(len({n.removeprefix(prefix).partition(".")[0] for n in tensors if n.startswith(prefix)}))
    if tuple(found) not in _DEPTHS.values():
        raise ValueError(
            f"the backbone has {found} residual blocks in its stages; FCAF3D's have"
            f" {' or '.join(str(list(depth)) for depth in _DEPTHS.values())}"
        )
    return tuple(found)


def variables_from_fcaf3d(checkpoint: Any, dataset: str) -> tuple[Variables, ConfigDict]:
    """Maps an FCAF3D checkpoint and finds out its sizes.

    Args:
      checkpoint: what read_torch_file returned: a state_dict, or a container of one of the projects.
      dataset: "scannet" or "sunrgbd", on which it was trained.

    Returns:
      ({"params", "batch_stats"}, config).

    Raises:
      ValueError: if tensors are missing or unknown, or belong to another dataset or architecture.
    """
    config = fcaf3d_config(dataset)
    tensors = find_state_dict(checkpoint, CONTAINERS)
    num_blocks = count_blocks(tensors)
    variables = map_tensors(tensors, fcaf3d_rules(tensors, num_blocks))
    with config.unlocked():
        config.detector.num_blocks = num_blocks
    return variables, configure_from_shapes(variables, config)


def configure_from_shapes(variables: Variables, config: ConfigDict) -> ConfigDict:
    """Sets channels and input features from the mapped tensors, and checks the head against the dataset.

    Raises:
      ValueError: naming what does not fit.
    """
    params, detector = variables["params"], config.detector
    stem = _shape(params["backbone"]["conv1"]["kernel"], 3, "the first convolution")
    if not INPUT_FEATURES.get(stem[1]):
        raise ValueError(
            f"the first layer reads {stem[1]} features per point; known are 1 (height), 3 (colour), 4 (both)"
        )
    detector.input_features = INPUT_FEATURES[stem[1]]
    detector.stem_size = stem[2]
    detector.stage_sizes = tuple(
        _shape(params["backbone"][f"layer{stage}_0"]["conv1"]["kernel"], 3, f"layer{stage}.0.conv1")[2]
        for stage in range(1, 5)
    )
    detector.head_size = _shape(params["neck"]["out_block_0"]["conv"]["kernel"], 3, "out_block_0")[2]
    classes, boxes = (
        _shape(params[name]["kernel"], 2, f"the {name.replace('_', ' ')}")[1]
        for name in ("class_head", "box_head")
    )
    wanted = len(detector.class_names), 8 if detector.oriented else 6
    if (classes, boxes) != wanted:
        fitting = [
            name
            for name, (names, _, turned) in _DATASETS.items()
            if (len(names), 8 if turned else 6) == (classes, boxes)
        ]
        hint = f"; it fits --dataset={fitting[0]}" if fitting else ""
        raise ValueError(
            f"the head has {classes} classes and {boxes} box channels but {config.dataset.name} needs {wanted[0]} and"
            f" {wanted[1]}{hint}"
        )
    return config


def _shape(kernel: np.ndarray, ndim: int, name: str) -> tuple[int, ...]:
    if kernel.ndim != ndim:
        raise ValueError(f"the kernel of {name} has shape {kernel.shape}; expected {ndim} axes")
    return kernel.shape
