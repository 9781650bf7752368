"""What the comparisons of TR3D and FCAF3D share beyond voxels: the cases of a folder, boxes of a head, one training step."""

import pathlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.interop.name_map import Rule, Variables, flatten
from vrdistill_jax.interop.parity import ParityTable, has_file, list_arrays
from vrdistill_jax.interop.parity_sparse import SLACK, SparseCase, add_absolute, recipe_tensors
from vrdistill_jax.nn.norm import update_running

RECIPE = ("full_weights_recipe.json", "full_weights_small.npz")
DECODED = 1e-5  # boxes from the same channels: a few roundings of numbers of some metres
TRAIN = 10.0  # batch statistics divide by the spread of this batch, layer after layer: errors grow more than in evaluation
STATISTICS = 1e-5
# A ReLU that switches sides by rounding changes a gradient by far more than rounding does: float32 gradients of the official
# TR3D are up to 2.4e-2 of a tensor's largest entry away from float64, half of them up to 1.7e-3, and their norms up to 9e-4.
# Which units switch is chance, so ours may be as far off even where the reference's happen to be nearer.
GRADIENT, GRADIENT_MEDIAN, GRADIENT_NORM = 3e-2, 2e-3, SLACK * 1e-3
NORM_MOMENTUM = 0.1

Imported = tuple[Variables, ConfigDict]


class HeadOnly(NamedTuple):
    """As much of a detector's raw output as its loss reads."""

    head: Any


class TrainingStep(NamedTuple):
    """What one step in training mode gives."""

    gradient: dict[str, np.ndarray]  # of the summed losses, by our path
    head: Any  # HeadOutput of the detector
    terms: dict[str, np.ndarray]
    running: dict[str, np.ndarray]  # statistics of batch norm after the step, by our path


def find_cases(
    table: ParityTable,
    golden: pathlib.Path,
    inputs: pathlib.Path,
    narrow: tuple[str, ...],
    full: tuple[str, ...],
    imported: Imported,
    import_full: Callable[[dict[str, np.ndarray], str], Imported],
) -> Iterator[tuple[str, Variables, ConfigDict]]:
    """The cases that a folder holds, with the weights that each was made with.

    Args:
      table: lists what the folder lacks.
      golden: the folder.
      inputs: folder of CASE_inputs.npz.
      narrow: cases with the weights that are being imported.
      full: cases with the weights of the folder's recipe.
      imported: variables and whole config of the narrow weights.
      import_full: makes the same of the recipe's tensors and the dataset's name.

    Raises:
      ValueError: if the folder has no case at all, or none with points.
    """
    cases = [name for name in (*narrow, *full) if has_file(table, golden / f"{name}.npz")]
    if not cases:
        raise ValueError(f"{golden} holds none of {', '.join((*narrow, *full))} (.npz)")
    without = [name for name in cases if not has_points(golden, inputs, name)]
    if without == cases:
        raise ValueError(
            f"{cases[0]}: points0 is neither in {golden / cases[0]}.npz nor in {inputs}/{cases[0]}_inputs.npz; --inputs "
            "names the folder of the latter"
        )
    table.skipped += [f"{name}: no points0 there, nor in {inputs}" for name in without]
    cases = [name for name in cases if name not in without]
    weights = dict.fromkeys(narrow, imported)
    if set(cases) & set(full) and all(has_file(table, golden / file) for file in RECIPE):
        weights |= dict.fromkeys(full, import_full(recipe_tensors(golden), imported[1].dataset.name))
    for name in cases:
        if name in weights:
            yield name, *weights[name]
        else:
            table.skipped.append(f"{name}: no weights for it")


def has_points(golden: pathlib.Path, inputs: pathlib.Path, name: str) -> bool:
    """Whether the points of a case are among its outputs or lie apart."""
    paths = golden / f"{name}.npz", inputs / f"{name}_inputs.npz"
    return any(path.is_file() and "points0" in list_arrays(path) for path in paths)


def check_box_rows(
    table: ParityTable,
    label: str,
    boxes: np.ndarray,
    theirs: np.ndarray,
    channels: np.ndarray,
    size_tolerance: float,
    tolerance: float,
) -> None:
    """Boxes that two heads made of their own channels.

    Args:
      table: gets the rows.
      label: of the rows.
      boxes: f32[n, 7].
      theirs: f32[n, 6 or 7].
      channels: f32[n, 6 or 8] that one of the two was made of.
      size_tolerance: largest error of centres and sizes (metres).
      tolerance: largest error of a channel.
    """
    add_absolute(table, label, boxes[:, :6], theirs[:, :6], size_tolerance)
    if channels.shape[1] == 8:
        # The direction of (a, b) is the less certain the shorter it is.
        length = np.hypot(channels[:, 6], channels[:, 7])
        turn = (boxes[:, 6] - theirs[:, 6] + np.pi / 2) % np.pi - np.pi / 2  # yaws repeat after pi
        add_absolute(table, f"{label} yaw", turn * length, np.zeros_like(turn), tolerance)


def take_training_step(
    detector: ModuleType, case: SparseCase, variables: Variables, config: Any
) -> TrainingStep:
    """One training step in float32.

    Args:
      detector: of vrdistill_jax.detectors.
      case: with boxes.
      variables: of the network.
      config: config.detector.
    """
    model = detector.build(config)

    @jax.jit
    def step(variables, scene, pyramid):
        def objective(params):
            tree = {"params": params, "batch_stats": variables["batch_stats"]}
            output, updates = model.apply(tree, scene.points, pyramid, train=True, mutable=["batch_stats"])
            total, terms = detector.loss(output, scene, config)
            return total, (output.raw.head, terms, updates["batch_stats"])

        return jax.grad(objective, has_aux=True)(variables["params"])

    gradient, (head, terms, statistics) = jax.tree.map(np.asarray, step(variables, case.scene, case.pyramid))
    running = update_running(variables["batch_stats"], statistics, NORM_MOMENTUM)
    return TrainingStep(flatten({"params": gradient}), head, terms, flatten({"batch_stats": running}))


def check_running(
    table: ParityTable, case: SparseCase, running: dict[str, np.ndarray], rules: dict[str, Rule]
) -> None:
    """Statistics of batch norm after the step: after_train/* of the case; `rules` by the reference's names."""
    for name, theirs in case.stored.items():
        kind, _, parameter = name.partition("/")
        if kind == "after_train" and parameter in rules:
            table.add(f"{case.name}:{name}", running[rules[parameter].ours], theirs, STATISTICS)
        elif kind == "after_train":
            table.skipped.append(f"{case.name}:{name} (unknown)")
