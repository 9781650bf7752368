"""Lines of a table: the same run with several seeds, and what is common to them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vrdistill_jax.experiments.grid import VOTENET, Cell, Study
from vrdistill_jax.experiments.protocol import METRICS as METRICS

Score = tuple[float, float]  # of METRICS, in %


class Row(NamedTuple):
    """One line of a table."""

    label: str
    width: str  # and the next four as in grid.Cell
    methods: tuple[str, ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()
    paper: Score | None = None
    detector: str = VOTENET
    teacher: str = ""
    teacher_changes: tuple[tuple[str, Any], ...] = ()

    def cell(self, seed: int) -> Cell:
        """The run with that seed."""
        return Cell(
            self.width, seed, self.methods, self.changes, self.detector, self.teacher, self.teacher_changes
        )


def find_rows(tables: Mapping[Any, tuple[str, list[Row]]], number: int | str) -> list[Row]:
    """The lines of a table that are trained.

    Args:
      tables: title and lines by number, or by name where they are in no paper.
      number: or name of the table.

    Raises:
      ValueError: for a table that is not there.
    """
    if number not in tables:
        raise ValueError(f"no table {number}; there are {', '.join(sorted(map(str, tables)))}")
    return tables[number][1]


def read_records(row: Row, study: Study, seeds: int) -> dict[int, dict]:
    """The records of a line's runs that are done, by seed."""
    records = {seed: study.read(row.cell(seed)) for seed in range(seeds)}
    return {seed: record for seed, record in records.items() if record is not None}


def describe_runs(records: Iterable[dict]) -> tuple[list[str], str]:
    """How the runs of a table were trained (a line for each way), and on what machines."""
    lines: dict[str, list[str]] = {}
    environments: dict[str, None] = {}
    for record in records:
        config, environment = record["config"], record["environment"]
        train, detector = config["train"], config["detector"]
        proposals = f", {detector['num_proposals']} proposals" if "num_proposals" in detector else ""
        text = (
            f"{train['num_steps']:,} steps of {train['batch_size']} scenes, {config['dataset']['num_points']:,} points a "
            f"scene{proposals}; score of the last step on {record['result']['num_scenes']} held-out scenes, in %."
        )
        lines.setdefault(text, []).append(detector["name"])
        devices = ", ".join(sorted(set(environment["devices"])))
        environments[f"{environment['platform']}, {devices}, jax {environment['jax']}"] = None
    every = len(lines) == 1
    runs = [
        f"{'Each run' if every else ', '.join(sorted(set(names)))}: {text}" for text, names in lines.items()
    ]
    return runs, f"Ours: {'; '.join(environments)}."


def describe_command(table: str, study: Study, default_dataset: str) -> str:
    """What makes a table, for instance of `table` "--paper=sr3d --table=2"; `default_dataset` need not be named."""
    words = ["python -m vrdistill_jax.reproduce", table]
    words += [f"--dataset={study.dataset}"] * (study.dataset != default_dataset)
    words += [f"--budget={study.budget}"] * (study.budget != "small")
    return f"Command: {' '.join(words)}; the JSON file of each run has its own."
