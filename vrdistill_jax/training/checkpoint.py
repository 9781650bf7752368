"""Checkpoints through Orbax: one layout for training runs and for inference.

    DIR/checkpoints/<step>/variables   {"params", "batch_stats"}: enough for inference, with ...
                          /config      the whole config as JSON (architecture, class names, mean sizes)
                          /training    step, optimiser state and what distillers learn (absent in a checkpoint made for
                                       inference)
                          /metrics     what "best" is judged by, where the step was evaluated

Leaves are saved as NumPy arrays, so that they restore on any number and kind of devices without knowing the tree. Orbax
writes to a temporary folder and renames: a killed save is never read.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from vrdistill_jax.training.state import TrainState

BEST_METRIC = "mAP@0.25"
# Entries that a resumed run may have otherwise: they change neither data nor parameters.
FREE_TO_CHANGE = (
    "dataset.data_dir",
    "dataset.num_threads",
    "dataset.num_workers",
    "train.checkpoint_every",
    "train.eval_batch_size",
    "train.eval_every",
    "train.log_every",
)


class RunCheckpoints:
    """The checkpoints of a training run: the latest one and the best one are kept.

    Use as a context manager; leaving it waits for the last save.
    """

    def __init__(self, workdir: str | pathlib.Path, config: ConfigDict):
        self._config = config
        policy = policies.AnyPreservationPolicy(
            [policies.LatestN(1), policies.BestN(get_metric_fn=_metric, n=1)]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_metric)
        with _quiet():
            self._manager = ocp.CheckpointManager(_folder(workdir), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with _quiet():
            self._manager.close()

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Writes the state; `metrics` (with BEST_METRIC) where this step was evaluated."""
        state = jax.tree.map(np.asarray, state)
        items = ocp.args.Composite(
            variables=ocp.args.StandardSave(state.variables),
            training=ocp.args.StandardSave(_training_items(state)),
            config=ocp.args.JsonSave(json.loads(self._config.to_json())),
        )
        with _quiet():
            self._manager.save(int(state.step), args=items, metrics=metrics)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, template: TrainState) -> TrainState:
        """Reads the newest checkpoint into the shape of `template` (a freshly initialised state)."""
        template = jax.tree.map(np.asarray, template)
        items = ocp.args.Composite(
            variables=ocp.args.StandardRestore(template.variables),
            training=ocp.args.StandardRestore(_training_items(template)),
        )
        read = self._manager.restore(self._manager.latest_step(), args=items)
        return TrainState(
            read.training["step"],
            read.variables["params"],
            read.variables["batch_stats"],
            read.training["opt_state"],
            read.training.get("distiller"),
        )


def _training_items(state: TrainState) -> dict[str, Any]:
    """What only the continuation of the run needs."""
    items = {"step": state.step, "opt_state": state.opt_state}
    return items if state.distiller is None else items | {"distiller": state.distiller}


def check_same_config(workdir: str | pathlib.Path, config: ConfigDict) -> None:
    """Refuses to resume a run under another config.

    Args:
      workdir: folder of a run, which may not exist yet.
      config: what is to be trained now.

    Raises:
      ValueError: naming the first entries that differ.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        return
    difference = describe_difference(json.loads(path.read_text()), json.loads(config.to_json()))
    if difference:
        raise ValueError(
            f"{workdir} holds a run of another config ({difference}); choose another --workdir or delete it"
        )


def describe_difference(before: dict, now: dict, ignore: tuple[str, ...] = ()) -> str:
    """Compares two configs, except for entries that change neither data nor parameters.

    Args:
      before: a whole config as a nested dict of JSON values.
      now: likewise.
      ignore: beginnings of dotted entries that may differ besides FREE_TO_CHANGE.

    Returns:
      The first entries that differ, empty if none does.
    """
    before, now = flatten_config(before), flatten_config(now)
    differing = [
        f"{k}: {before.get(k)} there, {now.get(k)} here"
        for k in sorted(before | now)
        if k not in FREE_TO_CHANGE and not k.startswith(ignore) and before.get(k) != now.get(k)
    ]
    return "; ".join(differing[:5])


def flatten_config(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            flatten_config(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def save_inference_checkpoint(directory: str | pathlib.Path, variables: dict, config: ConfigDict) -> None:
    """Writes variables and config so that predict, evaluate and the teacher option can load them.

    Args:
      directory: is created; may not hold checkpoints already.
      variables: {"params", "batch_stats"}.
      config: the whole config; `config.detector` describes the architecture.

    Raises:
      ValueError: if the directory holds checkpoints.
    """
    folder = _folder(directory)
    with _quiet(), ocp.CheckpointManager(folder) as manager:
        if manager.latest_step() is not None:
            raise ValueError(f"{folder} already holds a checkpoint; choose an empty --output directory")
        items = ocp.args.Composite(
            variables=ocp.args.StandardSave(jax.tree.map(np.asarray, variables)),
            config=ocp.args.JsonSave(json.loads(config.to_json())),
        )
        manager.save(0, args=items)


def load_inference_checkpoint(
    directory: str | pathlib.Path, step: int | None = None
) -> tuple[dict, ConfigDict]:
    """Reads what inference needs.

    Args:
      directory: a run's workdir or an imported checkpoint (or their "checkpoints" folder).
      step: which one; None for the best one where the run was evaluated, else the newest.

    Returns:
      ({"params", "batch_stats"} of NumPy arrays, config).

    Raises:
      ValueError: if there is no such checkpoint.
    """
    folder = pathlib.Path(directory).absolute()
    folder = folder if folder.name == "checkpoints" else folder / "checkpoints"
    if not folder.is_dir():
        raise ValueError(
            f"no checkpoint at {directory}: expected a folder {folder} as train and import_torch write it"
        )
    with _quiet(), ocp.CheckpointManager(folder, options=_read_only()) as manager:
        steps = manager.all_steps()
        if not steps:
            raise ValueError(f"{folder} holds no complete checkpoint")
        if step is None:
            best = manager.best_step()
            step = best if best is not None else manager.latest_step()
        if step not in steps:
            raise ValueError(f"{folder} has no step {step}; it has {', '.join(map(str, steps))}")
        items = ocp.args.Composite(variables=ocp.args.StandardRestore(), config=ocp.args.JsonRestore())
        read = manager.restore(step, args=items)
    return read.variables, ConfigDict(read.config)


def load_distiller_params(directory: str | pathlib.Path, step: int | None = None) -> dict[str, dict]:
    """Reads what the distillers of a run have learned; inference does without it.

    Args:
      directory: a run's workdir.
      step: which one; None for the one that `load_inference_checkpoint` takes.

    Returns:
      Parameters by name of the method.

    Raises:
      ValueError: if the run trained no distillers, or there is no such checkpoint.
    """
    folder = pathlib.Path(directory).absolute() / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"no run at {directory}: expected a folder {folder} as train writes it")
    with _quiet(), ocp.CheckpointManager(folder, options=_read_only()) as manager:
        best = manager.best_step()
        step = step if step is not None else best if best is not None else manager.latest_step()
        if step not in manager.all_steps():
            raise ValueError(f"{folder} has no step {step}")
        read = manager.restore(step, args=ocp.args.Composite(training=ocp.args.StandardRestore()))
    if "distiller" not in read.training:
        raise ValueError(f"the run in {directory} trained no distillers")
    return read.training["distiller"]["params"]


def _read_only() -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(best_fn=_metric, read_only=True)


def _folder(directory: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(directory).absolute() / "checkpoints"


def _metric(metrics: Any) -> float:
    return metrics[BEST_METRIC]


class _quiet:
    """Silences Orbax's routine warnings (a step without metrics, a read-only manager), not its errors."""

    def __enter__(self):
        self._level = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)

    def __exit__(self, *exception):
        logging.set_verbosity(self._level)
