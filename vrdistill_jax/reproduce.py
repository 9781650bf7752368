"""Makes a table of a paper: runs what is missing of it, then prints it beside the paper's numbers. Draws its figures, too.

    python -m vrdistill_jax.reproduce --table=1
    python -m vrdistill_jax.reproduce --table=1 --seeds=1 --rows=Student,VRDistill@half
    python -m vrdistill_jax.reproduce --table=3 --dataset=scannet --data_dir=datasets --budget=full
    python -m vrdistill_jax.reproduce --table=7 --render_only
    python -m vrdistill_jax.reproduce --table=cross_family
    python -m vrdistill_jax.reproduce --table=readings
    python -m vrdistill_jax.reproduce --figure=1
    python -m vrdistill_jax.reproduce --paper=sr3d --table=2

A table is a grid of training runs. A run that is done is not run again, also by another table; a killed one goes on from its
last checkpoint. The same command may be started several times at once, on several machines with a common disk too: each run is
locked by the process that does it. --results receives a JSON file per run, and the table as JSON, Markdown and text.
A figure is drawn of the runs that are there, those of seed 0 (of VRDistill: of table 1, half width).

SR3D's detectors are tested as published with --seeds=5 --tests=5: best and mean of 25 tests. One more test of a trained run is
made without training it again.
"""

import pathlib
import shlex
import sys

from absl import flags

from vrdistill_jax.command_line import run_verb
from vrdistill_jax.experiments import sr3d_figures, sr3d_tables, vrdistill_tables
from vrdistill_jax.experiments.figures import FIGURES, draw_figure
from vrdistill_jax.experiments.grid import BUDGETS, TEACHER, Cell, Study, check_record, is_trained, run_cells
from vrdistill_jax.experiments.rendering import as_text, write_table
from vrdistill_jax.experiments.rows import Row
from vrdistill_jax.recipes import DATASETS

PAPERS = {"vrdistill": vrdistill_tables, "sr3d": sr3d_tables}


def choose_rows(rows: list[Row], wanted: list[str]) -> list[Row]:
    """The rows with these labels; all if none are named.

    Args:
      rows: of the table.
      wanted: labels, or label@width ("teacher", "half", "quarter") where rows of several widths have one label.

    Raises:
      ValueError: for a row that the table does not have.
    """
    names = [{row.label, f"{row.label}@{row.width}"} for row in rows]
    unknown = set(wanted).difference(*names)
    if unknown:
        known = ", ".join(dict.fromkeys(row.label for row in rows))
        raise ValueError(
            f"--rows names {min(unknown)!r}; this table has {known or 'nothing to train'} (one width only: LABEL@half)"
        )
    return [row for row, own in zip(rows, names, strict=True) if not wanted or own & set(wanted)]


def figure_runs(number: int, study: Study) -> dict[str, pathlib.Path]:
    """The runs that a figure shows, by the labels of table 1: of half width and seed 0.

    Raises:
      ValueError: if there is no such figure, or a run that it needs has not been trained.
    """
    if number not in FIGURES:
        raise ValueError(f"no figure {number}; there are {', '.join(map(str, FIGURES))}")
    rows = {row.label: row for row in vrdistill_tables.table_rows(1) if row.width in (TEACHER, "half")}
    cells = {label: rows[label].cell(0) for label in FIGURES[number].runs}
    missing = [label for label, cell in cells.items() if not is_trained(cell, study)]
    if missing and (number != 4 or len(missing) == len(cells)):
        raise ValueError(
            f"figure {number} shows {', '.join(cells)}; not trained yet: {', '.join(missing)}. Run --table=1 "
            f"--seeds=1 --rows={','.join(missing)} first"
        )
    for label in missing:
        print(f"not trained yet, left out: {label}")
    return {label: study.folder(cell) for label, cell in cells.items() if label not in missing}


def define_flags() -> None:
    """Declares the verb's flags; not at import, because other verbs use the same names."""
    flags.DEFINE_enum("paper", "vrdistill", list(PAPERS), "Whose table or figure.")
    flags.DEFINE_string(
        "table", None, "Number of the table in the paper, or the name of one that is in none."
    )
    flags.DEFINE_integer("figure", None, "Draw this figure instead (extra: figures).", 1)
    flags.DEFINE_list("scenes", None, "Rows of the validation split that a figure shows; default one or two.")
    flags.DEFINE_enum(
        "dataset",
        None,
        list(DATASETS),
        "What to train and evaluate on; default SynthRooms in the table's style.",
    )
    flags.DEFINE_string("data_dir", "", "Where the dataset lies.")
    flags.DEFINE_integer("seeds", 3, "Runs per row, with the seeds 0, 1, ...", 1)
    flags.DEFINE_integer("tests", 1, "Tests per run, each with other points of the scenes.", 1)
    flags.DEFINE_enum(
        "budget", "small", list(BUDGETS), "small: minutes a run on two CPU cores; full: as published."
    )
    flags.DEFINE_list("rows", [], "Only these rows (their labels, or LABEL@half and the like); default all.")
    flags.DEFINE_bool("render_only", False, "Run nothing; make the table of what is there.")
    flags.DEFINE_string("workdir", "runs/reproduce", "Where the training runs are kept.")
    flags.DEFINE_string("results", None, "Where the JSON files and the tables go; default results/PAPER.")


def main() -> int:
    """Runs the missing cells, then writes and prints the table; or draws a figure."""
    options = flags.FLAGS
    if (options.table is None) == (options.figure is None):
        raise ValueError("--table or --figure is needed, for example --table=1")
    workdir, results = (
        pathlib.Path(options.workdir),
        pathlib.Path(options.results or f"results/{options.paper}"),
    )
    tables = PAPERS[options.paper]
    number = int(options.table) if (options.table or "").isdecimal() else options.table
    dataset = options.dataset or tables.DATASETS_OF_TABLES.get(number, "synthrooms")
    study = Study(dataset, options.budget, workdir, results, options.data_dir, options.tests)
    if options.figure is not None:
        folder = workdir / f"{study.dataset}_{study.budget}" / "figures"
        if options.paper == "sr3d":
            for path in sr3d_figures.draw_figure(options.figure, study, results / folder.parent.name):
                print(f"written: {path}")
            return 0
        scenes = [int(row) for row in options.scenes] if options.scenes else None
        runs = figure_runs(options.figure, study)
        for path in draw_figure(options.figure, runs, folder, scenes):
            print(f"written: {path}")
        return 0
    rows = choose_rows(tables.table_rows(number), options.rows)
    # Seed by seed, so that a stopped grid has whole rows of the first seeds.
    cells: list[Cell] = [row.cell(seed) for seed in range(options.seeds) for row in rows]
    for cell in cells:
        check_record(cell, study)
    command = shlex.join(["python", "-m", "vrdistill_jax.reproduce", *sys.argv[1:]])
    running = [] if options.render_only else run_cells(cells, study, command)
    table = tables.make_table(number, study, options.seeds)
    name = f"table{number}" if isinstance(number, int) else number
    path = results / f"{study.dataset}_{study.budget}" / name
    write_table(table, path)
    print("\n" + as_text(table))
    print(f"\nWritten: {path}.json, .md, .txt")
    if running:
        names = ", ".join(cell.name for cell in running)
        print(
            f"Not in the table yet, another process is at work on: {names}. Call again with --render_only later."
        )
    return 0


if __name__ == "__main__":
    define_flags()
    run_verb(main, large_memory=True)
