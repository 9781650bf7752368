"""The tables of VRDistill as grids of cells, beside the paper's numbers.

Source of the numbers: "VRDistill: Vote Refinement Distillation for Efficient Indoor 3D Object Detection" (2024), tables 1, 2,
3, 6, 7, 8 and 9 (mAP in %); tables 4 and 5 are in family_tables.py. Table 6's counter of PGD is illegible and follows from
the row's mean.
"""

from typing import Any

import numpy as np

from vrdistill_jax.experiments import family_tables
from vrdistill_jax.experiments.cost import cost_table
from vrdistill_jax.experiments.grid import TEACHER, Study
from vrdistill_jax.experiments.rendering import Table, mean_and_std, percent
from vrdistill_jax.experiments.rows import (
    METRICS,
    Row,
    Score,
    describe_command,
    describe_runs,
    find_rows,
    read_records,
)

METHOD_NAMES = {
    "alone": "Student",
    "seed": "Seed distillation",
    "fgd": "FGD",
    "mgd": "MGD",
    "pgd": "PGD",
    "itkd": "itKD",
    "sparsekd": "SparseKD",
    "vrdistill": "VRDistill",
}
# Where no dataset is named; the others: synthrooms.
DATASETS_OF_TABLES: dict[int | str, str] = {2: "synthrooms_view", 5: "synthrooms_view"}
WIDTH_NAMES = {TEACHER: "1", "half": "1/2", "quarter": "1/4"}

PAPER_TEACHERS: dict[int, Score] = {1: (58.1, 33.4), 2: (57.9, 35.7)}
# By table, width and method.
PAPER: dict[int, dict[str, dict[str, Score]]] = {
    1: {
        "half": {
            "alone": (50.8, 29.5),
            "seed": (53.0, 28.4),
            "fgd": (53.6, 30.7),
            "mgd": (53.5, 29.4),
            "pgd": (52.7, 30.8),
            "itkd": (52.7, 29.6),
            "sparsekd": (53.5, 27.1),
            "vrdistill": (58.8, 36.5),
        },
        "quarter": {
            "alone": (39.9, 20.5),
            "seed": (41.8, 21.1),
            "fgd": (43.8, 20.6),
            "mgd": (43.2, 21.9),
            "pgd": (42.0, 21.0),
            "itkd": (39.1, 16.8),
            "sparsekd": (41.3, 19.4),
            "vrdistill": (49.9, 26.5),
        },
    },
    2: {
        "half": {
            "alone": (53.2, 26.5),
            "seed": (54.4, 28.0),
            "fgd": (53.3, 26.2),
            "mgd": (51.4, 26.1),
            "pgd": (51.6, 25.2),
            "itkd": (49.7, 23.2),
            "sparsekd": (53.9, 25.2),
            "vrdistill": (56.9, 33.0),
        },
        "quarter": {
            "alone": (44.7, 16.4),
            "seed": (47.1, 18.2),
            "fgd": (43.1, 16.1),
            "mgd": (44.0, 14.8),
            "pgd": (43.1, 16.7),
            "itkd": (36.3, 11.7),
            "sparsekd": (44.9, 15.8),
            "vrdistill": (48.7, 24.8),
        },
    },
}
# AP@0.25 by class: teacher, student, FGD, MGD, PGD, VRDistill; half width on ScanNet.
PAPER_CLASSES = {
    "cabinet": (35.0, 27.2, 28.3, 24.4, 24.0, 36.7),
    "bed": (85.3, 80.3, 84.6, 83.9, 88.1, 86.3),
    "chair": (87.2, 84.8, 85.6, 84.7, 84.6, 89.8),
    "sofa": (87.2, 82.8, 86.2, 87.7, 86.5, 88.9),
    "table": (61.3, 54.1, 54.7, 55.4, 56.6, 58.5),
    "door": (44.6, 38.2, 38.7, 39.8, 38.5, 50.9),
    "window": (35.4, 28.7, 33.1, 29.7, 29.0, 31.7),
    "bookshelf": (55.1, 41.0, 46.3, 46.6, 44.4, 46.7),
    "picture": (3.9, 1.2, 3.1, 3.0, 1.8, 8.4),
    "counter": (55.7, 37.0, 51.1, 40.5, 43.6, 60.3),
    "desk": (65.7, 60.1, 62.1, 67.2, 65.7, 67.2),
    "curtain": (43.9, 34.5, 35.1, 42.4, 39.2, 51.4),
    "refrigerator": (43.4, 48.1, 37.9, 42.8, 43.4, 44.5),
    "shower_curtain": (67.1, 46.8, 61.2, 59.3, 51.3, 67.4),
    "toilet": (98.3, 93.8, 93.7, 91.1, 92.7, 96.3),
    "sink": (50.1, 43.2, 48.2, 48.2, 48.0, 55.1),
    "bathtub": (90.1, 89.0, 82.8, 87.3, 80.6, 90.2),
    "garbage_bin": (36.3, 23.4, 32.4, 28.9, 30.6, 37.1),
}
CLASS_METHODS = ("alone", "fgd", "mgd", "pgd", "vrdistill")
VRDISTILL = "distiller.methods.vrdistill"
# As VoteNet is trained; matched votes of student and teacher are then farther apart than at the same seeds.
CLUSTERS_AT_VOTES = {
    "detector.cluster_sampling": "vote_fps",
    "teacher.detector.cluster_sampling_eval": "vote_fps",
}
TWICE_THE_STEPS = (("train.num_steps", 3200),)  # of the small budget
FORMER_ETA = {"eta": 10.0}  # the default when the lines with clusters at votes were run
AS_PRINTED = {"target_features": "refined"}
# The second entry says nothing without a refinement; runs with clusters at votes were made when it was the default.
NO_REFINEMENT = {"refine": False} | AS_PRINTED


def _compared_methods(number: int) -> list[Row]:
    paper = PAPER[number]
    rows = [Row("Teacher", TEACHER, paper=PAPER_TEACHERS[number])]
    for width in ("half", "quarter"):
        for method, name in METHOD_NAMES.items():
            methods = () if method == "alone" else (method,)
            rows.append(Row(name, width, methods, paper=paper[width][method]))
    return rows


def _ablation(*lines: tuple[str, dict[str, Any], Score | None], width: str = "half") -> list[Row]:
    """Variants of VRDistill: label, changed entries, the paper's numbers."""
    rows = [Row("Student", width, paper=PAPER[1][width]["alone"])]
    for label, entries, paper in lines:
        changes = tuple(
            (name if "." in name else f"{VRDISTILL}.{name}", value) for name, value in entries.items()
        )
        rows.append(Row(label, width, ("vrdistill",), changes, paper))
    return rows


def _alone_at_votes(width: str, name: str = "Student") -> Row:
    """A detector that is trained alone, with clusters at votes."""
    sampling = tuple(CLUSTERS_AT_VOTES.items())[:1]
    return Row(f"{name}; clusters at votes", width, changes=sampling)


# Entries that say what is the default anyway are left out, so that tables share the run.
TABLES: dict[int | str, tuple[str, list[Row]]] = family_tables.TABLES | {
    1: ("Table 1: distillation methods, 18 classes, axis-aligned boxes", _compared_methods(1)),
    2: ("Table 2: distillation methods, 10 classes, turned boxes", _compared_methods(2)),
    3: (
        "Table 3: refinement and soft mask, 1/2 width",
        _ablation(
            ("neither", {"refine": False, "mask": "off"}, None),
            ("soft mask", {"refine": False}, (57.6, 34.4)),
            ("refinement", {"mask": "off"}, (58.5, 35.5)),
            ("both", {}, (58.8, 36.5)),
            ("refinement and hard mask", {"mask": "hard"}, None),
            # As printed, L_dis trains the refinement as well, and both sides can agree on constant features.
            ("both; as printed", AS_PRINTED, None),
            ("both; as printed; detached", AS_PRINTED | {"dis_detach_target": True}, None),
            (
                "both; as printed; detached; teacher's head",
                AS_PRINTED | {"dis_detach_target": True, "head_weight": 1.0},
                None,
            ),
            ("soft mask; clusters at votes; eta = 10", NO_REFINEMENT | FORMER_ETA | CLUSTERS_AT_VOTES, None),
            ("both; clusters at votes; eta = 10", FORMER_ETA | CLUSTERS_AT_VOTES, None),
        )
        + [_alone_at_votes("half")],
    ),
    6: (
        "Table 6: AP@0.25 by class, 1/2 width",
        [
            Row("Teacher", TEACHER),
            *(Row(METHOD_NAMES[m], "half", () if m == "alone" else (m,)) for m in CLASS_METHODS),
        ],
    ),
    7: (
        "Table 7: layers L of the refinement, 1/2 width",
        _ablation(
            ("L = 1", {"layers": 1}, (58.1, 35.3)),
            ("L = 2", {"layers": 2}, (57.6, 34.8)),
            ("L = 4", {}, (58.8, 36.5)),
            ("L = 6", {"layers": 6}, (57.5, 36.0)),
        ),
    ),
    8: ("Table 8: cost of VoteNet at inference", []),
    9: (
        "Table 9: sigma of the soft mask, 1/2 width",
        _ablation(
            ("sigma = 0.1", {"sigma": 0.1}, (58.3, 34.5)),
            ("sigma = 0.5", {"sigma": 0.5}, (58.0, 32.9)),
            ("sigma = 1", {}, (58.8, 36.5)),
            ("sigma = 2", {"sigma": 2.0}, (57.3, 34.2)),
            ("sigma = 5", {"sigma": 5.0}, (56.7, 35.0)),
            ("sigma = 10", {"sigma": 10.0}, (57.7, 35.8)),
        ),
    ),
}

READINGS = "readings"
TABLES[READINGS] = (
    "What the paper leaves open (in no paper)",
    _ablation(
        ("VRDistill", {}, PAPER[1]["quarter"]["vrdistill"]),
        ("eta = 1", {"eta": 1.0}, None),
        ("eta = 10", {"eta": 10.0}, None),
        ("eta = 100", {"eta": 100.0}, None),
        ("no refinement", {"refine": False}, None),
        ("no refinement; eta = 10", {"refine": False} | FORMER_ETA, None),
        ("as printed", AS_PRINTED, None),
        # Brings a student's vote nearer to the one that it imitates.
        ("coordinate_weight = 1", {"coordinate_weight": 1.0}, None),
        width="quarter",
    )
    + _ablation(
        ("VRDistill", {}, PAPER[1]["half"]["vrdistill"]),
        ("eta = 10", {"eta": 10.0}, None),
        ("coordinate_weight = 1", {"coordinate_weight": 1.0}, None),
    )
    + [
        # Their recipes' weights follow one rule (docs/distillation.md), with which both make students worse.
        Row(
            f"{METHOD_NAMES[method]}; a tenth of its weight",
            width,
            (method,),
            ((f"distiller.methods.{method}.weight", 0.1),),
        )
        for method in ("pgd", "itkd")
        for width in ("half", "quarter")
    ]
    + [
        # Whether a method gives a student more than a head start, also of a teacher that is as weak as before.
        Row("Teacher; twice the steps", TEACHER, changes=TWICE_THE_STEPS),
        Row("Student; twice the steps", "half", (), TWICE_THE_STEPS),
        *(
            Row(
                f"{METHOD_NAMES[m]}; twice the steps",
                "half",
                (m,),
                TWICE_THE_STEPS,
                teacher_changes=TWICE_THE_STEPS,
            )
            for m in ("seed", "vrdistill")
        ),
        Row(
            "VRDistill; twice the steps; eta = 10",
            "half",
            ("vrdistill",),
            (*TWICE_THE_STEPS, (f"{VRDISTILL}.eta", 10.0)),
            teacher_changes=TWICE_THE_STEPS,
        ),
        *(
            Row(f"{METHOD_NAMES[m]}; twice the steps; teacher as before", "half", (m,), TWICE_THE_STEPS)
            for m in ("seed", "vrdistill")
        ),
    ]
    + [
        Row("Teacher", TEACHER),
        _alone_at_votes("quarter"),
        _alone_at_votes(TEACHER, "Teacher"),
    ]
    + _ablation(
        *(
            (f"{label}; clusters at votes", entries | CLUSTERS_AT_VOTES, None)
            for label, entries in (
                ("eta = 1", {"eta": 1.0}),
                ("same clusters; eta = 10", {"same_clusters": True} | FORMER_ETA),
                ("no refinement; eta = 10", NO_REFINEMENT | FORMER_ETA),
                (
                    "no refinement; same clusters; eta = 10",
                    NO_REFINEMENT | {"same_clusters": True} | FORMER_ETA,
                ),
                ("no refinement; eta = 1", NO_REFINEMENT | {"eta": 1.0}),
                ("no refinement; all votes; eta = 100", NO_REFINEMENT | {"vote_level": "vote", "eta": 100.0}),
                ("as printed; detached; eta = 1", AS_PRINTED | {"dis_detach_target": True, "eta": 1.0}),
            )
        ),
        width="quarter",
    )[1:],
)


def table_rows(number: int | str) -> list[Row]:
    """The lines of a table that are trained; none for table 8.

    Raises:
      ValueError: for a table that is not here.
    """
    return find_rows(TABLES, number)


def make_table(number: int | str, study: Study, seeds: int) -> Table:
    """A table of all cells that have been run."""
    if number == 8:
        return cost_table(study)
    return _class_table(study, seeds) if number == 6 else _score_table(number, study, seeds)


def _score_table(number: int | str, study: Study, seeds: int) -> Table:
    title, rows = TABLES[number]
    records = {row: read_records(row, study, seeds) for row in rows}
    alone = {_student_of(row): records[row] for row in rows if not row.methods and row.width != TEACHER}
    lines, data = [], []
    for row in rows:
        line, entry = [row.label, WIDTH_NAMES[row.width], str(len(records[row]))], row._asdict()
        for n, metric in enumerate(METRICS):
            scores = {seed: record["result"][metric] for seed, record in records[row].items()}
            # Differences are between runs of the same seed: same teacher, same order of scenes.
            plain = alone.get(_student_of(row), {}) if row.methods else {}
            pairs = [scores[s] - plain[s]["result"][metric] for s in scores if s in plain]
            mean, std = mean_and_std(list(scores.values()))
            gain, gain_std = mean_and_std(pairs)
            line += [
                percent(mean, std),
                percent(gain, gain_std, sign=True),
                f"{row.paper[n]}" if row.paper else "-",
            ]
            entry[metric] = {"mean": mean, "std": std, "scores": scores, "gain": gain, "gain_std": gain_std}
        lines.append(line)
        data.append(entry)
    columns = ["model", "width", "seeds"]
    for metric in METRICS:
        columns += [metric, "gain", "paper"]
    notes = _notes(records, number, study) + _loss_notes(records)
    if number in family_tables.REMARKS:
        notes.append(family_tables.REMARKS[number])
    return Table(f"{title} ({study.dataset}, budget {study.budget})", columns, lines, notes, data)


def _loss_notes(records: dict[Row, dict[int, dict]]) -> list[str]:
    """How far training took the detector's loss, of the lines whose runs have recorded it."""
    fallen = []
    for row, of_row in records.items():
        curves = [record["loss"] for record in of_row.values() if record.get("loss")]
        if curves:
            first, last = (np.mean([curve[end][1] for curve in curves]) for end in (0, -1))
            fallen.append(f"{row.label} {WIDTH_NAMES[row.width]}: {first:.1f} to {last:.1f}")
    return (
        [f"Detection loss, mean of the first and of the last 50 steps: {', '.join(fallen)}."]
        if fallen
        else []
    )


def _student_of(row: Row) -> tuple:
    """What the student of a line is, whoever teaches it: lines with the same are compared."""
    return row.detector, row.width, row.cell(0).student_changes


def _class_table(study: Study, seeds: int) -> Table:
    title, rows = TABLES[6]
    records = {row: read_records(row, study, seeds) for row in rows}
    names = sorted(
        {n for of_row in records.values() for r in of_row.values() for n in r["result"]["classes"]}
    )
    lines: list[list[str]] = []
    data: dict[str, dict] = {}
    for name in [*names, "mean"]:
        line, paper = [name], PAPER_CLASSES.get(name)
        data[name] = {}
        for n, row in enumerate(rows):
            results = [record["result"] for record in records[row].values()]
            values = [r["mAP@0.25"] if name == "mean" else r["classes"][name]["AP@0.25"] for r in results]
            mean, std = mean_and_std(values)
            line += [percent(mean), f"{paper[n]}" if paper else "-"]
            data[name][row.label] = {"mean": mean, "std": std, "paper": paper[n] if paper else None}
        lines.append(line)
    columns = ["class"] + [heading for row in rows for heading in (row.label, "paper")]
    return Table(
        f"{title} ({study.dataset}, budget {study.budget})", columns, lines, _notes(records, 6, study), data
    )


def _notes(records: dict[Row, dict[int, dict]], number: int | str, study: Study) -> list[str]:
    """What a reader must know of the runs."""
    every = [record for of_row in records.values() for record in of_row.values()]
    if not every:
        return ["No cell has been run yet."]
    runs, machines = describe_runs(every)
    return [
        *runs[:-1],
        f"{runs[-1]} Mean ± standard deviation over seeds; gain: over the student alone with the same seed.",
        f"Paper: ScanNet V2 or SUN RGB-D at full size, so only gains compare. {machines}",
        describe_command(f"--table={number}", study, DATASETS_OF_TABLES.get(number, "synthrooms")),
    ]
