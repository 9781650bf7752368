"""mmdetection3d's names of tensors -> those of the official repositories, from which detectors are imported.

mmdetection3d rewrote VoteNet, Group-Free-3D and H3DNet: the networks are the same, their parts have other names, and some
output layers are joined. A table of names maps the beginning of each name; in theirs, "#" stands for a number and "#+" for one
that counts from 0 where the official name counts from 1. In the official name "{}" stands for these numbers in turn.

Source: the modules of mmdetection3d (PointNet2SASSG, VoteModule, BaseConvBboxHead, PointSAModule) and mmcv's ConvModule.
"""

import re
from collections.abc import Mapping

import numpy as np

from vrdistill_jax.interop.name_map import Tensors

Names = Mapping[str, str]
_NUMBER = r"(\d{1,3})"


def to_official_names(tensors: Tensors, names: Names) -> dict[str, np.ndarray]:
    """Renames tensors by the first entry of the table that a name begins with; others keep their names.

    Args:
      tensors: their state_dict.
      names: beginning of their name -> beginning of the official one.

    Returns:
      The same arrays under the official names.

    Raises:
      ValueError: if two tensors would get the same name.
    """
    table = []
    for theirs, official in names.items():
        steps = [len(number) - 1 for number in re.findall(r"#\+?", theirs)]
        pattern = re.escape(theirs).replace(r"\#\+", _NUMBER).replace(r"\#", _NUMBER)
        table.append((re.compile(pattern), steps, official))
    renamed: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        for beginning, steps, official in table:
            if match := beginning.match(name):
                numbers = [int(found) + step for found, step in zip(match.groups(), steps, strict=True)]
                name = official.format(*numbers) + name[match.end() :]
                break
        if name in renamed:
            raise ValueError(f"two tensors of the checkpoint are {name}; it mixes two versions of the model")
        renamed[name] = value
    return renamed


def shared_mlp(theirs: str, official: str) -> dict[str, str]:
    """The layers of a set abstraction or feature propagation; official norms are called bn.bn."""
    norms = {f"{theirs}.layer{n}.bn.": f"{official}.layer{n}.bn.bn." for n in range(3)}
    return norms | {f"{theirs}.": f"{official}."}


def conv_module(theirs: str, official: str) -> dict[str, str]:
    """A convolution with its norm; "@" in the official name stands for "conv" and "bn"."""
    return {f"{theirs}.{kind}.": official.replace("@", kind) + "." for kind in ("conv", "bn")}


def point_backbone(theirs: str = "backbone", official: str = "backbone_net") -> dict[str, str]:
    """A PointNet++ backbone."""
    return shared_mlp(f"{theirs}.SA_modules.#+.mlps.0", f"{official}.sa{{}}.mlp_module") | shared_mlp(
        f"{theirs}.FP_modules.#+.mlps", f"{official}.fp{{}}.mlp"
    )


def voting(theirs: str, official: str) -> dict[str, str]:
    """A voting module."""
    layers = conv_module(f"{theirs}.vote_conv.#+", f"{official}.@{{}}")
    return layers | {f"{theirs}.conv_out.": f"{official}.conv3."}


def vote_aggregation(theirs: str, official: str) -> dict[str, str]:
    """The set abstraction that groups votes."""
    return shared_mlp(f"{theirs}.vote_aggregation.mlps.0", f"{official}.vote_aggregation.mlp_module")


def join_outputs(tensors: Tensors, head: str) -> dict[str, np.ndarray]:
    """Joins two output layers into one, with the channels in the official order.

    conv_cls is [objectness 2 | class], conv_reg is [centre 3 | heading class | heading residual | size class | size residual];
    the official layer is conv_cls[:2], conv_reg, conv_cls[2:].

    Args:
      tensors: their state_dict.
      head: beginning of the layers' names.

    Returns:
      The state_dict with "conv_out" instead of the two layers, where both are there.
    """
    tensors = dict(tensors)
    for leaf in ("weight", "bias"):
        names = [f"{head}.{layer}.{leaf}" for layer in ("conv_cls", "conv_reg")]
        if all(name in tensors for name in names):
            classes, boxes = (np.asarray(tensors.pop(name)) for name in names)
            tensors[f"{head}.conv_out.{leaf}"] = np.concatenate([classes[:2], boxes, classes[2:]])
    return tensors


def mirror_heading(tensors: Tensors, layer: str, num_heading_bins: int) -> dict[str, np.ndarray]:
    """Turns the heading channels of a joined output layer the other way round.

    Since version 1.0 mmdetection3d's yaw is counter-clockwise and the reference's heading clockwise: bin b becomes (-b) mod H
    and residuals change sign.

    Args:
      tensors: their state_dict.
      layer: beginning of the layer's name.
      num_heading_bins: H.

    Returns:
      The state_dict with the layer changed.
    """
    tensors = dict(tensors)
    mirror = -np.arange(num_heading_bins) % num_heading_bins
    first, end = 5 + num_heading_bins, 5 + 2 * num_heading_bins
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in tensors:
            out = np.array(tensors[name])
            out[5:first] = out[5:first][mirror]
            out[first:end] = -out[first:end][mirror]
            tensors[name] = out
    return tensors


def split_outputs(tensors: Tensors, layer: str, head: str, parts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Cuts an output layer into those that the official head has, one for each part of a box.

    Args:
      tensors: their state_dict.
      layer: beginning of the layer's name.
      head: what the names of the parts begin with.
      parts: name of each part -> its channels, in order.

    Returns:
      The state_dict with the parts instead of the layer, where it is there.

    Raises:
      ValueError: if the layer has another number of channels.
    """
    tensors = dict(tensors)
    for leaf in ("weight", "bias"):
        if f"{layer}.{leaf}" not in tensors:
            continue
        rows = np.asarray(tensors.pop(f"{layer}.{leaf}"))
        expected = sum(parts.values())
        if not rows.ndim or len(rows) != expected:
            raise ValueError(
                f"{layer}.{leaf} has shape {rows.shape}; expected {expected} channels "
                f"({', '.join(f'{name} {count}' for name, count in parts.items())}); check --dataset"
            )
        ends = np.cumsum(list(parts.values()))[:-1]
        for name, part in zip(parts, np.split(rows, ends), strict=True):
            tensors[f"{head}.{name}.{leaf}"] = part
    return tensors
