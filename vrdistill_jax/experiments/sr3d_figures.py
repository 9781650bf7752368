"""Figures 6 and 7 of SR3D: how well scores agree with boxes, and what the vertex distance sees.

Source: "Real-Time 3D Object Detection with Inference-Aligned Learning" (SR3D, 2026).
"""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from vrdistill_jax.assigners.assignment import Anchors
from vrdistill_jax.assigners.costs import vertex_distances
from vrdistill_jax.experiments.grid import Study
from vrdistill_jax.experiments.rows import Row
from vrdistill_jax.experiments.sr3d_tables import TABLES
from vrdistill_jax.geometry.iou import box_diou, box_iou
from vrdistill_jax.structs import Boxes
from vrdistill_jax.visualization.charts import AlignmentSeries, write_alignment_chart, write_lines_chart

TITLES = {
    6: "Figure 6: inconsistency in training, scores against overlaps, consistency error",
    7: "Figure 7: IoU, centre distance and vertex distance of a box that fits less and less",
}
# What figure 6 shows: the rows of tables 1 and 2 with these labels.
RUNS = {
    "TR3D": (1, "TR3D"),
    "neither part": (2, "neither"),
    "SR3D": (1, "SR3D"),
}
BOX = (1.6, 0.8, 0.8)  # metres, of figure 7
STEPS = 33


def draw_figure(number: int, study: Study, output: pathlib.Path, seed: int = 0) -> list[pathlib.Path]:
    """Draws a figure.

    Args:
      number: 6, from the records of the runs that are there, or 7, which needs none.
      study: where the records are.
      output: folder of the files.
      seed: of the runs.

    Returns:
      Paths of the picture and of a JSON file with its numbers.

    Raises:
      ValueError: for another number, or if none of the runs has been made.
    """
    if number not in TITLES:
        raise ValueError(f"no figure {number}; there are {', '.join(map(str, TITLES))}")
    path = output / f"figure{number}"
    if number == 6:
        records = {label: study.read(find_row(*place).cell(seed)) for label, place in RUNS.items()}
        missing = [label for label, record in records.items() if record is None]
        if len(missing) == len(records):
            raise ValueError(
                "figure 6 shows TR3D and SR3D; neither has been trained yet. Run --paper=sr3d --table=1 --seeds=1 first"
            )
        for label in missing:
            print(f"not trained yet, left out: {label}")
        measured = {label: record["alignment"] for label, record in records.items() if record is not None}
        picture = write_alignment_chart(
            path, [series(label, each) for label, each in measured.items()], TITLES[number]
        )
        return [picture, _write_json(path, measured)]
    panels = misfit_curves()
    picture = write_lines_chart(path, panels, TITLES[number], "0: fits; 1: does not")
    return [picture, _write_json(path, panels)]


def find_row(table: int, label: str) -> Row:
    """A line of a table."""
    return next(row for row in TABLES[table][1] if row.label == label)


def series(label: str, measured: dict[str, Any]) -> AlignmentSeries:
    """What figure 6 shows of a run's record."""
    points, consistency = measured["consistency"]["points"], measured["consistency"]
    return AlignmentSeries(
        label,
        curve=np.array(measured["aic"]).reshape(-1, 2),
        common_curve=np.array(measured["aic_top_k"]).reshape(-1, 2),
        score=np.array(points["score"]),
        iou=np.array(points["iou"]),
        histogram=np.array(consistency["histogram"]),
        bin_size=consistency["bin"],
    )


def misfit_curves() -> dict[str, dict[str, list]]:
    """How three measures see a predicted box that fits a true one less and less.

    Returns:
      By what is changed: {"x": the change, "1 - IoU", "centre distance": squared and over the enclosing diagonal, as in the
      DIoU loss, "vertex distance": R_VD of equation 3}. The box is longer than wide. What only changes the size is invisible to
      the centre distance; the vertex distance sees it, and it also tells boxes apart that do not overlap.
    """
    true = np.array([0, 0, 0, *BOX, 0], np.float32)
    share = np.linspace(0, 1, STEPS, dtype=np.float32)
    boxes = {
        "centre moves, in lengths of the box": (2 * share, 0, 2 * BOX[0] * share),
        "length over the true one, centre stays": (1 + 3 * share, 3, BOX[0] * (1 + 3 * share)),
        "length over the true one, same volume": (1 + 3 * share, None, None),
    }
    panels = {}
    for name, (x, column, values) in boxes.items():
        predicted = np.tile(true, (STEPS, 1))
        if column is None:
            predicted[:, 3], predicted[:, 4] = BOX[0] * x, BOX[1] / x
        else:
            predicted[:, column] = values
        panels[name] = {"x": x.tolist()} | measure_misfit(true, predicted)
    return panels


def measure_misfit(true: np.ndarray, predicted: np.ndarray) -> dict[str, list[float]]:
    """The measures of axis-aligned boxes [n, 7] against one [7]."""
    rows = jnp.asarray(predicted)
    iou = box_iou(rows, jnp.asarray(true)[None], rotated=False)
    diou = box_diou(rows, jnp.asarray(true)[None], rotated=False)
    anchors = Anchors(
        rows[:, :3],
        jnp.ones(len(rows), bool),
        rows,
        jnp.zeros((len(rows), 1)),
        jnp.zeros(len(rows), jnp.int32),
        jnp.ones(len(rows)),
    )
    one = jnp.asarray(true)[None]
    truth = Boxes(one[:, :3], one[:, 3:6], one[:, 6], jnp.zeros(1, jnp.int32), jnp.ones(1, bool), one[:, :3])
    vertex = vertex_distances(anchors, truth, rotated=False)[0]
    measures = {"1 - IoU": 1 - iou, "centre distance": iou - diou, "vertex distance": vertex}
    return {name: np.asarray(values, np.float64).round(5).tolist() for name, values in measures.items()}


def _write_json(path: pathlib.Path, numbers: dict) -> pathlib.Path:
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    return path.with_suffix(".json")
