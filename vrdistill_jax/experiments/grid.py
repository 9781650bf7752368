"""Cells: the single training runs that the tables of a paper are made of, and how one is run.

A cell trains one detector and leaves one JSON file in the results folder; tables share cells. A cell whose file is there is
not run again. One that was killed goes on from its last checkpoint. Several processes may work through the same grid: each
cell is locked by the process that runs it.
"""

import contextlib
import fcntl
import json
import pathlib
import shlex
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vrdistill_jax.experiments import alignment
from vrdistill_jax.experiments.analysis import analyse_run, read_curve
from vrdistill_jax.experiments.protocol import list_tests, repeat_tests
from vrdistill_jax.recipes import DATASETS, DETECTOR_RECIPES, student_config
from vrdistill_jax.train import train
from vrdistill_jax.training.checkpoint import describe_difference, flatten_config
from vrdistill_jax.training.logging import describe_environment

TEACHER = "teacher"  # the width of a detector that is as wide as its recipe says, trained on its own
VOTENET = "votenet"


class Budget(NamedTuple):
    """What a run of a budget looks like."""

    size: str  # of the detector's recipe
    changes: dict[str, Any] = {}  # dotted config entries of all runs
    teacher_changes: dict[str, Any] = {}  # and of those at full width alone


# tiny: for tests; small: minutes per run on two CPU cores; full: the published size and schedule, for a GPU.
BUDGETS = ("tiny", "small", "full")
# The recipe's learning rate of 1e-3 teaches little in so few steps (docs/sr3d.md).
SPARSE_CHANGES = {"train.num_steps": 2000, "train.batch_size": 4, "optimizer.learning_rate": 1e-2}
DROPOUTS = ("detector.encoder_dropout", "detector.decoder_dropout", "detector.head_dropout")
# The small one of detectors that do not train as their recipe's size "small" says.
SMALL_BUDGETS = {
    # The recipe's learning rate suits the narrow students; at full width, so few steps need a smaller one
    # (docs/distillation.md).
    VOTENET: Budget(
        "teacher",
        {"train.num_steps": 1600, "train.batch_size": 4},
        {"optimizer.learning_rate": 1.5e-3},
    ),
    # Several times VoteNet's work in a step, so smaller networks.
    "groupfree3d": Budget("light", {"train.num_steps": 1600, "train.batch_size": 4}),
    "h3dnet": Budget("light", {"train.num_steps": 1600, "train.batch_size": 4}),
    # Learns slowly: its authors train it for six times as long as VoteNet. So few steps teach more without dropout.
    "3detr": Budget("light", {"train.num_steps": 3000, "train.batch_size": 4} | dict.fromkeys(DROPOUTS, 0.0)),
    # The recipe's batch of 8 would take twice as long; more steps teach more than larger ones.
    "tr3d": Budget("teacher", SPARSE_CHANGES),
    "sr3d": Budget("teacher", SPARSE_CHANGES),
    "fcaf3d": Budget("teacher", SPARSE_CHANGES),
}
# Of a record's config: says nothing about what was trained (the teacher is named by the cell).
NOT_COMPARED = ("teacher.",)


class Cell(NamedTuple):
    """One training run."""

    width: str  # TEACHER or one of recipes.STUDENT_WIDTHS
    seed: int
    methods: tuple[str, ...] = ()  # distillers; none trains the detector on its own
    changes: tuple[tuple[str, Any], ...] = ()  # dotted config entries and their values
    detector: str = VOTENET  # of recipes.DETECTOR_RECIPES
    teacher: str = ""  # the teacher's detector; "" for the same
    teacher_changes: tuple[tuple[str, Any], ...] = ()  # config entries of the teacher's run

    @property
    def detector_changes(self) -> tuple[tuple[str, Any], ...]:
        """Those of its changes that make another network."""
        return tuple(change for change in self.changes if change[0].startswith("detector."))

    @property
    def student_changes(self) -> tuple[tuple[str, Any], ...]:
        """Those of its changes that make another student, whoever teaches it: of its network or its training."""
        return tuple(
            change
            for change in self.changes
            if not change[0].startswith(("distiller.", "optimizer.distiller_", "teacher."))
        )

    @property
    def name(self) -> str:
        """Name of its folder and its file: a run at full width is called after its detector, VoteNet's the teacher."""
        words = [] if self.detector == VOTENET else [self.detector]
        if self.width != TEACHER:
            words += [self.width, "+".join(self.methods) or "alone"]
        words = words or [TEACHER]
        if self.teacher not in ("", self.detector):
            words.append(f"from_{self.teacher}")
        words += [f"{key.rpartition('.')[2]}={value}" for key, value in self.changes]
        words += [f"teacher_{key.rpartition('.')[2]}={value}" for key, value in self.teacher_changes]
        return "_".join([*words, f"seed{self.seed}"])


class Study(NamedTuple):
    """What all cells of a grid have in common."""

    dataset: str  # of recipes.DATASETS
    budget: str  # of BUDGETS
    workdir: pathlib.Path  # folder of the runs
    results: pathlib.Path  # folder of the JSON files
    data_dir: str = ""
    num_tests: int = 1  # of each training, see experiments.protocol

    def folder(self, cell: Cell) -> pathlib.Path:
        """Where the run keeps its checkpoints."""
        return self.workdir / f"{self.dataset}_{self.budget}" / cell.name

    def record_path(self, cell: Cell) -> pathlib.Path:
        """The cell's JSON file."""
        return self.results / f"{self.dataset}_{self.budget}" / f"{cell.name}.json"

    def read(self, cell: Cell) -> dict | None:
        """The cell's record, or None if it has not been run."""
        path = self.record_path(cell)
        return json.loads(path.read_text()) if path.exists() else None


def cell_config(cell: Cell, study: Study) -> ConfigDict:
    """The whole config of a cell's run.

    Raises:
      ValueError: for an unknown dataset, budget or detector, or a change of an entry that does not exist.
    """
    known_names = ((study.dataset, DATASETS), (study.budget, BUDGETS), (cell.detector, DETECTOR_RECIPES))
    for name, known in known_names:
        if name not in known:
            raise ValueError(f"unknown {name!r}; known: {', '.join(known)}")
    config = student_config(cell.methods, *recipe_arguments(cell, study))
    config.seed = cell.seed
    config.dataset.data_dir = study.data_dir
    with config.ignore_type():  # 1 is a fine value of an entry that holds 1.0
        for key, value in cell_changes(cell, study).items():
            parts = key.split(".")
            section = config
            for part in parts[:-1]:
                section = section[part]
            if parts[-1] not in section:
                raise ValueError(f"{cell.name}: the config has no entry {key}")
            section[parts[-1]] = value
    config.train.eval_every = config.train.num_steps  # one evaluation: the last step is what counts
    if cell.methods:
        config.teacher.checkpoint = str(study.folder(teacher_of(cell)))
    return config


def find_budget(study: Study, detector: str) -> Budget:
    """What the study's budget means for a detector."""
    default = Budget(study.budget)
    return SMALL_BUDGETS.get(detector, default) if study.budget == "small" else default


def recipe_arguments(cell: Cell, study: Study) -> tuple[str, ...]:
    """What `recipes.student_config` takes after the methods: width, size, dataset, detector and, if it is another, teacher."""
    width = "same" if cell.width == TEACHER else cell.width
    teacher = (cell.teacher,) if cell.teacher else ()
    return (width, find_budget(study, cell.detector).size, study.dataset, cell.detector, *teacher)


def cell_changes(cell: Cell, study: Study) -> dict[str, Any]:
    """Dotted config entries of a cell that its recipe has otherwise."""
    budget = find_budget(study, cell.detector)
    of_teacher = budget.teacher_changes if cell.width == TEACHER else {}
    return budget.changes | of_teacher | dict(cell.changes)


def teacher_of(cell: Cell) -> Cell:
    """The teacher of the same seed; a detector of the same kind has the student's changes."""
    detector = cell.teacher or cell.detector
    changes = cell.detector_changes if detector == cell.detector else ()
    return Cell(TEACHER, cell.seed, (), changes + cell.teacher_changes, detector)


def train_command(cell: Cell, study: Study) -> str:
    """The call of the verb `train` that does what the cell's run does."""
    arguments = ",".join(["+".join(cell.methods) or "none", *recipe_arguments(cell, study)])
    config = f"configs/distill/student.py:{arguments}"
    changes = {"seed": cell.seed} | cell_changes(cell, study)
    if cell.methods:
        changes["teacher.checkpoint"] = study.folder(teacher_of(cell)).as_posix()
    options = [f"--config.{key}={value}" for key, value in changes.items()]
    return shlex.join(["python", "-m", "vrdistill_jax.train", f"--config={config}", *options])


def run_cells(cells: list[Cell], study: Study, command: str) -> list[Cell]:
    """Runs what has not been run yet, teachers first where students need them.

    Args:
      cells: of one or more tables.
      study: where and how.
      command: of the verb, for the record.

    Returns:
      The cells that another process is running.

    Raises:
      ValueError: if a cell has been run with another config.
    """
    skipped = []
    for number, cell in enumerate(cells, 1):
        check_record(cell, study)
        record = study.read(cell)
        if record is not None and len(list_tests(record)) >= study.num_tests:
            continue
        print(f"\n[{number} of {len(cells)}] {cell.name}", flush=True)
        todo = [cell]
        if cell.methods and not is_trained(teacher_of(cell), study):
            todo.insert(0, teacher_of(cell))
        # `all` stops at the first cell that another process holds.
        if not all(run_cell(each, study, command) for each in todo):
            print(f"{cell.name}: another process is running it, or its teacher", flush=True)
            skipped.append(cell)
    return skipped


def is_trained(cell: Cell, study: Study) -> bool:
    """Whether a run is done and the checkpoint of its last step still there."""
    record = study.read(cell)
    if record is None:
        return False
    # Also of a run that has a record: it may be trained again at the moment, or have been stopped while it was.
    return (study.folder(cell) / "checkpoints" / str(record["config"]["train"]["num_steps"])).is_dir()


def check_record(cell: Cell, study: Study) -> None:
    """Refuses a record of the same cell that was made with another config.

    Entries that the record does not have were added to configs later; their defaults do what was done before.

    Raises:
      ValueError: naming what differs.
    """
    record = study.read(cell)
    if record is None:
        return
    now = flatten_config(json.loads(cell_config(cell, study).to_json()))
    before = flatten_config(record["config"])
    known = {key: value for key, value in now.items() if key in before}
    difference = describe_difference(before, known, NOT_COMPARED)
    if difference:
        raise ValueError(
            f"{study.record_path(cell)} was made with another config ({difference}); move it away to run the cell again, or "
            "choose another --results"
        )


def run_cell(cell: Cell, study: Study, command: str) -> bool:
    """Trains, measures and writes the record; False if another process holds the cell.

    Of a cell that has been trained, only the tests that are missing are made. One whose checkpoint is gone is trained anew.
    """
    config, folder = cell_config(cell, study), study.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock") as mine:
        if not mine:
            return False
        record = study.read(cell)
        if record is not None and not is_trained(cell, study):
            print(f"{cell.name} has a record but no checkpoint in {folder}: it is trained again", flush=True)
            record = None
        if record is None:
            began = time.time()
            result = train(config, folder)
            record = {
                "cell": cell._asdict(),
                "command": command,
                "train_command": train_command(cell, study),
                "environment": describe_environment(),
                "seconds_of_the_last_start": round(time.time() - began),
                "config": json.loads((folder / "config.json").read_text()),
                "result": result,
                "analysis": analyse_run(folder),
                # Of the detector; a distilled student logs its whole loss as "total".
                "loss": read_curve(folder, "train/detection" if cell.methods else "train/total"),
            }
            if cell.detector in alignment.DETECTORS:
                record["alignment"] = alignment.analyse_alignment(folder)
        record["tests"] = repeat_tests(folder, record, study.num_tests)
        _write_record(record, study.record_path(cell))
    jax.clear_caches()
    return True


def _write_record(record: dict, path: pathlib.Path) -> None:
    """Writes a file that is either whole or not there."""
    text = json.dumps(record, indent=1).replace(": NaN", ": null")  # NaN (nothing to find) is not JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[bool]:
    """Holds a file for this process; gives False if another one holds it. The system lets go of it when a process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
