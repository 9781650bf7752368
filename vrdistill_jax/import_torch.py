"""Imports another project's checkpoint, and checks that our network gives its numbers.

    python -m vrdistill_jax.import_torch --detector=votenet --dataset=sunrgbd --checkpoint=FILE.pth --output=DIR
    python -m vrdistill_jax.import_torch --detector=votenet --dataset=sunrgbd --checkpoint=FILE.pth --golden=DIR

Reads PyTorch files (zip or legacy format, also inside .xz) without PyTorch and without executing what they
hold, and Keras .h5 weights. The result is a checkpoint that predict, evaluate and the teacher option load.
With --golden every tensor of a folder of reference numbers is compared; exit code 1 if one is too far off.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vrdistill_jax.command_line import run_verb
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid
from vrdistill_jax.interop.keras_votenet import variables_from_keras
from vrdistill_jax.interop.name_map import Variables, check_shapes
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.parity_fcaf3d import check_fcaf3d
from vrdistill_jax.interop.parity_groupfree3d import check_groupfree3d
from vrdistill_jax.interop.parity_h3dnet import check_h3dnet
from vrdistill_jax.interop.parity_three_detr import check_three_detr
from vrdistill_jax.interop.parity_tr3d import check_tr3d
from vrdistill_jax.interop.parity_votenet import check_votenet
from vrdistill_jax.interop.torch_fcaf3d import variables_from_fcaf3d
from vrdistill_jax.interop.torch_file import read_torch_file
from vrdistill_jax.interop.torch_groupfree3d import variables_from_groupfree3d
from vrdistill_jax.interop.torch_h3dnet import variables_from_h3dnet
from vrdistill_jax.interop.torch_three_detr import variables_from_three_detr, variables_from_three_detr_m
from vrdistill_jax.interop.torch_tr3d import variables_from_tr3d
from vrdistill_jax.interop.torch_votenet import variables_from_votenet
from vrdistill_jax.structs import (
    AnyPyramid,
    Interpolation,
    PointPyramid,
    Points,
    PyramidConfig,
    PyramidLevel,
    VoxelPyramid,
    VoxelPyramidConfig,
)
from vrdistill_jax.training.checkpoint import save_inference_checkpoint
from vrdistill_jax.training.state import count_parameters


class Importer(NamedTuple):
    """What importing one detector takes."""

    from_torch: Callable[[Any, str], tuple[Variables, ConfigDict]]  # (read_torch_file's result, dataset)
    check: Callable[..., ParityTable]  # (variables, config, golden, inputs)
    from_keras: Callable[[pathlib.Path, str], tuple[Variables, ConfigDict]] | None = None


IMPORTERS = {
    "votenet": Importer(variables_from_votenet, check_votenet, variables_from_keras),
    "groupfree3d": Importer(variables_from_groupfree3d, check_groupfree3d),
    "h3dnet": Importer(variables_from_h3dnet, check_h3dnet),
    "3detr": Importer(variables_from_three_detr, check_three_detr),
    "3detr_m": Importer(variables_from_three_detr_m, check_three_detr),
    "tr3d": Importer(variables_from_tr3d, check_tr3d),
    "fcaf3d": Importer(variables_from_fcaf3d, check_fcaf3d),
}


def import_checkpoint(
    detector: str, dataset: str, checkpoint: str | pathlib.Path
) -> tuple[Variables, ConfigDict]:
    """Reads a checkpoint of another project into our variables.

    Args:
      detector: name of the detector.
      dataset: "scannet" or "sunrgbd".
      checkpoint: the file.

    Returns:
      ({"params", "batch_stats"} of NumPy arrays, the whole config).

    Raises:
      ValueError: if the file is damaged, unsafe, or not of that detector and dataset.
    """
    importer, path = find_importer(detector), pathlib.Path(checkpoint)
    if not path.is_file():
        raise ValueError(f"--checkpoint={path} is no file")
    with path.open("rb") as file:
        is_hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
    if is_hdf5 and importer.from_keras is None:
        raise ValueError(f"{path} is a Keras file; {detector} is imported from PyTorch checkpoints only")
    try:
        if is_hdf5 and importer.from_keras is not None:
            variables, config = importer.from_keras(path, dataset)
        else:
            variables, config = importer.from_torch(read_torch_file(path), dataset)
        check_shapes(variables, expected_variables(config))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error
    return variables, config


def find_importer(detector: str) -> Importer:
    """Returns how a detector is imported.

    Raises:
      ValueError: listing the detectors that can be.
    """
    if detector not in IMPORTERS:
        raise ValueError(f"no importer for --detector={detector}; there are: {', '.join(sorted(IMPORTERS))}")
    return IMPORTERS[detector]


def expected_variables(config: ConfigDict) -> Variables:
    """The shapes of the variables of the network that a config describes; nothing is computed."""
    detector = find_detector(config.detector.name)
    model = detector.build(config.detector)
    features = detector.feature_size(config.detector.input_features)
    pyramid_config = detector.pyramid_config(config.detector)
    pyramid: AnyPyramid
    if isinstance(pyramid_config, VoxelPyramidConfig):
        count, pyramid = 1, _voxel_pyramid_of_a_point(pyramid_config)
    else:
        count, pyramid = 2 * pyramid_config.levels[0].num_centers, _empty_pyramid(pyramid_config)
    points = Points(jnp.zeros((1, count, 3)), jnp.zeros((1, count, features)), jnp.ones((1, count), bool))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), points, pyramid, train=False))


def _empty_pyramid(config: PyramidConfig) -> PointPyramid:
    def index(*shape):
        return jnp.zeros((1, *shape), jnp.int32)

    levels = tuple(
        PyramidLevel(
            jnp.zeros((1, m, 3)), jnp.ones((1, m), bool), index(m), index(m), index(m, level.num_neighbors)
        )
        for level in config.levels
        for m in (level.num_centers,)
    )
    fine = [config.levels[row].num_centers for _, row in config.interpolations]
    return PointPyramid(levels, tuple(Interpolation(index(m, 3), jnp.zeros((1, m, 3))) for m in fine))


def _voxel_pyramid_of_a_point(config: VoxelPyramidConfig) -> VoxelPyramid:
    pyramid = build_voxel_pyramid(np.zeros((1, 3), np.float32), np.ones(1, bool), config)
    return jax.tree.map(lambda array: array[None], pyramid)


def define_flags() -> None:
    """Declares the verb's flags; not at import, because other verbs use the same names."""
    flags.DEFINE_string("detector", "votenet", "Which network the checkpoint is of.")
    flags.DEFINE_enum("dataset", None, ["scannet", "sunrgbd"], "What it was trained on.")
    flags.DEFINE_string("checkpoint", None, "The file: .pth, .tar, .pth.xz or .h5.")
    flags.DEFINE_string("output", None, "Folder for the imported checkpoint.")
    flags.DEFINE_string("golden", None, "Folder of reference numbers to compare with.")
    flags.DEFINE_string(
        "inputs",
        None,
        "Folder of the inputs, if not the golden one: inputs.npz and labels.npz, or CASE_inputs.npz.",
    )


def main() -> int:
    """Imports, saves, compares."""
    options = flags.FLAGS
    if not options.checkpoint or not options.dataset or not (options.output or options.golden):
        raise ValueError(
            "--checkpoint, --dataset and one of --output and --golden are needed, for example "
            "--detector=votenet --dataset=sunrgbd --checkpoint=votenet.pth --output=imported"
        )
    if options.inputs and not options.golden:
        raise ValueError("--inputs goes with --golden")
    variables, config = import_checkpoint(options.detector, options.dataset, options.checkpoint)
    count, features = count_parameters(variables["params"]), ", ".join(config.detector.input_features)
    print(
        f"{config.detector.name} on {options.dataset}: {count:,} parameters, width {config.detector.width:g}",
        end="",
    )
    print(f", input features: {features or 'none'}")
    if options.output:
        save_inference_checkpoint(options.output, variables, config)
        print(f"saved to {options.output}")
        print(f"next: python -m vrdistill_jax.predict --checkpoint={options.output} --input=FILE")
    if not options.golden:
        return 0
    table = find_importer(options.detector).check(variables, config, options.golden, options.inputs)
    print(table.render())
    return 0 if table.ok else 1


if __name__ == "__main__":
    define_flags()
    run_verb(main)
