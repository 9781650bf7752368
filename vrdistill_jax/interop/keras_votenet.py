"""A Keras VoteNet for SUN RGB-D (.h5 weights) -> our variables.

The file holds 25 convolutions and 23 batch norms, numbered in the order of the network. Its network differs
from the published one: votes are grouped within 0.8 m, 64 at most, their features are not scaled to unit
length, batch norms have Keras' epsilon, and no convolution in front of a norm has a bias.
"""

import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.data.hdf5_files import HDF5_ERRORS, HDF5Walk
from vrdistill_jax.data.point_tables import printable
from vrdistill_jax.interop.name_map import Rule, Variables, map_tensors
from vrdistill_jax.interop.torch_votenet import configure_from_shapes, votenet_config

# (path of a PointMLP in our variables, its layers), in the order of the network
_ORDER = (
    *((f"backbone/sa{n}/mlp", 3) for n in range(1, 5)),
    *((f"backbone/fp{n}/mlp", 2) for n in (1, 2)),
    ("voting", 2),
    ("voting_out", 0),
    ("aggregation/mlp", 3),
    ("proposal", 2),
    ("proposal_out", 0),
)
_MAX_DEPTH = 12  # of groups
_NORM_LEAVES = (
    ("gamma", "params", "scale"),
    ("beta", "params", "bias"),
    ("moving_mean", "batch_stats", "mean"),
    ("moving_variance", "batch_stats", "var"),
)


def read_keras_file(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a Keras weight file as {"conv2d_1/kernel": array, ...}.

    Raises:
      ValueError: if h5py is not installed, or the file is missing, damaged, no HDF5 file, or refers to others.
    """
    path = pathlib.Path(path)
    try:
        import h5py
    except ImportError as error:
        raise ValueError("reading Keras weights needs h5py: pip install 'vrdistill-jax[keras]'") from error
    tensors: dict[str, np.ndarray] = {}

    def collect(group: Any, layer: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"its groups are nested more than {_MAX_DEPTH} deep")
        for name, item in walk.members(group).items():
            if isinstance(item, h5py.Group):
                collect(item, name, depth + 1)
            elif isinstance(item, h5py.Dataset):
                tensors[f"{layer}/{name.partition(':')[0]}"] = walk.read(item)

    try:
        walk = HDF5Walk(path.stat().st_size)
        with h5py.File(path, "r") as file:
            collect(file, "", 0)
    except HDF5_ERRORS as error:
        reason = printable(str(error), 300)
        raise ValueError(
            f"{path} cannot be read as an HDF5 file ({reason}); copy or download it again"
        ) from error
    return tensors


def keras_rules() -> list[Rule]:
    """The file's names in the order of the network."""
    rules, conv, norm = [], 0, 0
    for path, layers in _ORDER:
        for n in range(max(layers, 1)):
            conv += 1
            dense = f"{path}/layer{n}/dense" if layers else path
            rules.append(Rule(f"conv2d_{conv}/kernel", f"params/{dense}/kernel", _kernel))
            if not layers:
                rules.append(Rule(f"conv2d_{conv}/bias", f"params/{dense}/bias"))
                continue
            norm += 1
            for theirs, collection, ours in _NORM_LEAVES:
                rules.append(
                    Rule(f"batch_normalization_{norm}/{theirs}", f"{collection}/{path}/layer{n}/norm/{ours}")
                )
    return rules


def variables_from_keras(path: str | pathlib.Path, dataset: str = "sunrgbd") -> tuple[Variables, ConfigDict]:
    """Reads the weights and says which network they are for.

    Args:
      path: the .h5 file.
      dataset: "sunrgbd" (or "scannet" for a file of the same layout with that head).

    Returns:
      ({"params", "batch_stats"}, config) with the config's deviations set.

    Raises:
      ValueError: if h5py is missing, the file is damaged, or tensors are missing or unknown.
    """
    variables = map_tensors(read_keras_file(path), keras_rules())
    for name in (
        "voting",
        "proposal",
    ):  # our layers have the official model's redundant bias in front of the norm
        for layer in variables["params"][name].values():
            layer["dense"]["bias"] = np.zeros(layer["dense"]["kernel"].shape[1], np.float32)
    config = configure_from_shapes(variables, votenet_config(dataset))
    config.detector.aggregation_radius = 0.8
    config.detector.aggregation_neighbors = 64
    config.detector.normalize_votes = False
    config.detector.norm_epsilon = 1e-3
    return variables, config


def _kernel(weight: np.ndarray) -> np.ndarray:
    if weight.ndim != 4 or weight.shape[:2] != (1, 1):
        raise ValueError(
            f"expected the kernel of a 1x1 convolution [1, 1, in, out], got shape {weight.shape}"
        )
    return weight[0, 0]
