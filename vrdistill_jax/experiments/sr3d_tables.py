"""The tables of SR3D as grids of cells, beside the paper's numbers.

Source of the numbers: "Real-Time 3D Object Detection with Inference-Aligned Learning" (SR3D, 2026), tables 1 to 7 (AP in %,
ScanNet V2; table 1 SUN RGB-D, too). The text calls the assigners' table and the losses' table both 5; in print the
assigners are table 4, as here. Ablations report means over 25 tests, table 1 best (mean).
"""

from collections.abc import Mapping
from typing import Any

from vrdistill_jax.detectors.sr3d import VARIANTS
from vrdistill_jax.experiments.grid import TEACHER, Study
from vrdistill_jax.experiments.protocol import METRICS, summarize
from vrdistill_jax.experiments.rendering import Table, mean_and_std, percent
from vrdistill_jax.experiments.rows import (
    Row,
    Score,
    describe_command,
    describe_runs,
    find_rows,
    read_records,
)
from vrdistill_jax.experiments.training_cost import training_cost_table
from vrdistill_jax.losses.ranking import RDL_VARIANTS
from vrdistill_jax.recipes import DATASETS

DATASETS_OF_TABLES: dict[int, str] = {}  # all tables use synthrooms where no dataset is named
# Table 1: best and mean of AP25 and AP50 by whether boxes are turned (SUN RGB-D) or not (ScanNet).
PAPER_BEST_AND_MEAN: dict[bool, dict[str, tuple[Score, Score]]] = {
    False: {
        "FCAF3D": ((71.5, 70.7), (57.3, 56.0)),
        "TR3D": ((72.9, 72.0), (59.3, 57.4)),
        "SR3D": ((74.0, 73.2), (59.7, 58.5)),
    },
    True: {
        "FCAF3D": ((64.2, 63.8), (48.9, 48.2)),
        "TR3D": ((67.1, 66.3), (50.4, 49.6)),
        "SR3D": ((68.1, 67.2), (50.9, 50.5)),
    },
}
BASELINE, FULL = (70.8, 55.6), (73.2, 58.5)
PAPER_CASE_STUDY: dict[str, Score] = {"as it is": BASELINE, "gt_ctr": (70.9, 55.9), "gt_iou": (91.8, 87.7)}


def _variant(label: str, variant: str, paper: Score | None = None) -> Row:
    """SR3D with the changes that detectors.sr3d.VARIANTS lists."""
    return _changed(label, VARIANTS[variant], paper)


def _changed(label: str, entries: Mapping[str, Any], paper: Score | None = None) -> Row:
    """SR3D with other entries of config.detector."""
    changes = tuple((f"detector.{name}", value) for name, value in entries.items())
    return Row(label, TEACHER, (), changes, paper, "sr3d")


_TR3D, _SR3D = Row("TR3D", TEACHER, detector="tr3d"), Row("SR3D", TEACHER, paper=FULL, detector="sr3d")
_FCAF3D = Row("FCAF3D", TEACHER, detector="fcaf3d")
_BASELINE = _variant("neither", "none", BASELINE)

# Entries that say what is the default anyway are left out, so that tables share the run.
TABLES: dict[int, tuple[str, list[Row]]] = {
    1: ("Table 1: dense detectors", [_FCAF3D, _TR3D, _SR3D]),
    2: (
        "Table 2: the two parts of SR3D",
        [
            _BASELINE,
            _variant("SPOTA", "spota", (72.3, 57.4)),
            _variant("RAS", "ras", (72.5, 57.7)),
            _SR3D._replace(label="both"),
            # The reading of equation 6 that teaches most (docs/sr3d.md).
            _changed("RAS (RDL rank_pos)", {"assigner": "top_k", "ras.rdl_variant": "rank_pos"}),
            _changed("both (RDL rank_pos)", {"ras.rdl_variant": "rank_pos"}),
        ],
    ),
    3: (
        "Table 3: the cost of SPOTA",
        [
            _SR3D._replace(label="SPOTA"),
            _changed("with C_cls", {"assigners.spota.class_weight": 1.0}, (72.5, 56.9)),
            _changed("without R_VD", {"assigners.spota.vertex_distance": False}, (72.7, 57.8)),
        ],
    ),
    4: (
        "Table 4: assigners, with RAS",
        [
            _variant("OTA", "ota"),
            _variant("simOTA", "simota", (72.3, 56.5)),
            _variant("AlignOTA", "alignota", (72.2, 56.9)),
            _SR3D._replace(label="SPOTA"),
        ],
    ),
    5: (
        "Table 5: classification losses, with SPOTA",
        [
            _variant("focal", "spota", (72.3, 57.4)),
            _variant("QFL", "qfl", (71.9, 57.7)),
            _variant("VFL", "vfl", (71.7, 58.3)),
            _SR3D._replace(label="RAS (RDL as printed)"),
            *(_changed(f"RAS (RDL {v})", {"ras.rdl_variant": v}) for v in RDL_VARIANTS if v != "printed"),
        ],
    ),
    6: ("Table 6: scores corrected by the ground truth, of the baseline (table 2, neither)", [_BASELINE]),
    7: ("Table 7: cost of training and inference", []),
}


def table_rows(number: int) -> list[Row]:
    """The lines of a table that are trained; none for table 7.

    Raises:
      ValueError: for a table that is not here.
    """
    return find_rows(TABLES, number)


def make_table(number: int, study: Study, seeds: int) -> Table:
    """A table of all cells that have been run."""
    title, rows = TABLES[number]
    title = f"{title} ({study.dataset}, budget {study.budget})"
    if number == 7:
        return training_cost_table(title, study)
    records = {row: list(read_records(row, study, seeds).values()) for row in rows}
    if number == 6:
        return _case_study_table(title, records[_BASELINE], study)
    return _score_table(number, title, records, study)


def _score_table(number: int, title: str, records: dict[Row, list[dict]], study: Study) -> Table:
    oriented = DATASETS[study.dataset]("tiny").dataset.oriented
    lines, data = [], []
    for row, of_row in records.items():
        line, entry = [row.label, str(len(of_row))], row._asdict()
        for n, metric in enumerate(METRICS):
            summary = summarize(of_row, metric)
            if number == 1:
                paper = "{} ({})".format(*PAPER_BEST_AND_MEAN[oriented][row.label][n])
                line.append(percent(summary.best if summary else None))
            else:
                paper = f"{row.paper[n]}" if row.paper else "-"
            line += [percent(summary.mean, summary.std) if summary else "-", paper]
            entry[metric] = summary._asdict() if summary else None
        lines.append([*line, *_alignment_columns(of_row)])
        data.append(entry)
    columns = ["model", "trainings"]
    for metric in METRICS:
        columns += [metric, "paper"] if number != 1 else [f"{metric} best", "mean", "paper: best (mean)"]
    return Table(title, [*columns, *ALIGNMENT, "PCE"], lines, _notes(records, number, study), data)


ALIGNMENT = {"AIC": "aic_top_k", "score": "score_top_k", "IoU": "quality_top_k"}  # columns and curves


def _alignment_columns(records: list[dict]) -> list[str]:
    """Means of the last 50 steps on TR3D's positives, and consistency error of the best detections."""
    measured = [record["alignment"] for record in records if "alignment" in record]
    # A record that is older than a curve does not have it.
    columns = [[each[curve][-1][1] for each in measured if each.get(curve)] for curve in ALIGNMENT.values()]
    columns += [[each["consistency"]["PCE"] for each in measured if each["consistency"]["PCE"] is not None]]
    return [_decimal(*mean_and_std(values)) for values in columns]


def _decimal(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


def _case_study_table(title: str, records: list[dict], study: Study) -> Table:
    lines: list[list[str]] = []
    data: dict[str, dict[str, Any]] = {}
    for kind, paper in PAPER_CASE_STUDY.items():
        results = [r["result"] if kind == "as it is" else r["alignment"]["case_study"][kind] for r in records]
        line, data[kind] = [kind, str(len(results))], {"paper": paper}
        for n, metric in enumerate(METRICS):
            mean, std = mean_and_std([result[metric] for result in results])
            line += [percent(mean, std), f"{paper[n]}"]
            data[kind][metric] = {"mean": mean, "std": std}
        lines.append(line)
    columns = ["scores", "trainings"] + [heading for metric in METRICS for heading in (metric, "paper")]
    notes = [
        "gt_ctr: scores of anchors inside a true box are multiplied by their centerness in it; gt_iou: the score of the true "
        "class becomes the IoU of the anchor's box. Both before suppression.",
        *_notes({_BASELINE: records}, 6, study),
    ]
    return Table(title, columns, lines, notes, data)


def _notes(records: dict[Row, list[dict]], number: int, study: Study) -> list[str]:
    """What a reader must know of the runs."""
    every = [record for of_row in records.values() for record in of_row]
    if not every:
        return ["No cell has been run yet."]
    tests = max(len(record.get("tests", [0])) for record in every)
    oriented = DATASETS[study.dataset]("tiny").dataset.oriented
    where = "SUN RGB-D" if number == 1 and oriented else "ScanNet V2"
    runs, machines = describe_runs(every)
    lines = [
        *runs,
        machines,
        f"Mean ± standard deviation over trainings, of {tests} test{'s' * (tests > 1)} each. Paper: {where} at full size, "
        "25 tests.",
    ]
    if number != 6:
        lines.append(
            "AIC: mean |score - IoU| over the last 50 steps of training, of the anchors that TR3D's assigner would choose; "
            "score, IoU: the means of both; PCE: |score - IoU| of the 30 most certain detections of each class. AIC and PCE "
            "are better small."
        )
    return [*lines, describe_command(f"--paper=sr3d --table={number}", study, "synthrooms")]
