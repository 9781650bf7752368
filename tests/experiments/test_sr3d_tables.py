"""SR3D's tables and figures of made-up records; the way from training to a record is test_sr3d_runs.py."""

import json

import numpy as np
import pytest

from vrdistill_jax.experiments import sr3d_figures
from vrdistill_jax.experiments.grid import Study, cell_config
from vrdistill_jax.experiments.protocol import list_tests, summarize
from vrdistill_jax.experiments.rendering import as_markdown, as_text
from vrdistill_jax.experiments.sr3d_tables import TABLES, make_table, table_rows
from vrdistill_jax.recipes import sr3d_variant, synthrooms_config

TRAINED = [number for number in TABLES if TABLES[number][1]]


def record_of(config, score: float, num_tests: int = 1) -> dict:
    """As the grid writes it, with numbers that follow from `score`."""
    result = {"mAP@0.25": score, "mAP@0.5": score / 2, "num_scenes": 4, "classes": {}}
    points = {"label": [0, 1], "score": [0.5, 0.25], "iou": [score, score]}
    return {
        "command": "the command",
        "config": json.loads(config.to_json()),
        "environment": {"devices": ["cpu"], "platform": "Linux, 2 cores", "jax": "0"},
        "result": result,
        "tests": [{"seed": n, "mAP@0.25": score + 0.01 * n, "mAP@0.5": score / 2} for n in range(num_tests)],
        "alignment": {
            "aic": [[50, 0.4], [100, score]],
            "aic_top_k": [[50, 0.4], [100, score + 0.01]],
            "score_top_k": [[50, 0.1], [100, score - 0.1]],  # "quality_top_k" was added to records later
            "consistency": {"PCE": 1 - score, "histogram": [1, 1], "bin": 0.5, "points": points},
            "case_study": {
                kind: {"mAP@0.25": score + 0.2, "mAP@0.5": score} for kind in ("gt_ctr", "gt_iou")
            },
        },
    }


def put(study, row, seed, score, num_tests=1):
    cell = row.cell(seed)
    path = study.record_path(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record_of(cell_config(cell, study), score, num_tests)))


@pytest.fixture
def study(tmp_path):
    return Study("synthrooms", "tiny", tmp_path / "runs", tmp_path / "results")


def test_tables_share_cells_and_names_are_unique(study):
    cells = {row.cell(0) for number in TRAINED for row in table_rows(number)}
    assert len({cell.name for cell in cells}) == len(cells)
    full = table_rows(1)[-1].cell(0)
    assert full.name == "sr3d_seed0"
    assert all(full in [row.cell(0) for row in table_rows(number)] for number in (1, 2, 3, 4, 5))
    for cell in cells:
        cell_config(cell, study)  # every changed entry exists
    assert table_rows(7) == []
    with pytest.raises(ValueError, match="no table 8"):
        table_rows(8)


def test_variants_are_those_of_the_config_files(study):
    rows = {row.label: row for number in (2, 4, 5) for row in table_rows(number)}
    for label, variant in {
        "neither": "none",
        "RAS": "ras",
        "simOTA": "simota",
        "VFL": "vfl",
        "both": "sr3d",
    }.items():
        wanted = sr3d_variant(synthrooms_config("tiny", detector="sr3d"), variant)
        assert cell_config(rows[label].cell(0), study).detector == wanted.detector, label


def test_table_1_has_best_and_mean_of_all_tests(study):
    (tr3d, sr3d) = table_rows(1)[-2:]
    put(study, tr3d, 0, 0.30, num_tests=3)
    put(study, tr3d, 1, 0.40, num_tests=3)
    table = make_table(1, study, seeds=2)
    lines = {line[0]: line for line in table.rows}
    assert table.columns[:5] == ["model", "trainings", "mAP@0.25 best", "mean", "paper: best (mean)"]
    assert lines["TR3D"][1:5] == ["2", "42.0", "36.0 ± 7.1", "72.9 (72.0)"]
    assert lines["SR3D"][1:5] == ["0", "-", "-", "74.0 (73.2)"]
    assert table.columns[-4:] == ["AIC", "score", "IoU", "PCE"]
    assert lines["TR3D"][-4:] == ["0.360 ± 0.071", "0.250 ± 0.071", "-", "0.650 ± 0.071"]
    assert table.data[-2]["mAP@0.25"]["num_tests"] == 6
    assert sr3d.cell(0).detector == "sr3d"
    for text in (as_text(table), as_markdown(table)):
        assert "of 3 tests each" in text
        assert "Command: python -m vrdistill_jax.reproduce --paper=sr3d --table=1" in text


def test_ablations_stand_beside_the_papers_means(study):
    for n, row in enumerate(table_rows(3)):
        put(study, row, 0, 0.5 - 0.1 * n)
    lines = {line[0]: line for line in make_table(3, study, seeds=1).rows}
    assert lines["with C_cls"][2:6] == ["40.0", "72.5", "20.0", "56.9"]
    assert lines["without R_VD"][2:6] == ["30.0", "72.7", "15.0", "57.8"]


def test_case_study_compares_three_kinds_of_scores(study):
    put(study, table_rows(6)[0], 0, 0.5)
    assert make_table(6, study, seeds=1).rows == [
        ["as it is", "1", "50.0", "70.8", "25.0", "55.6"],
        ["gt_ctr", "1", "70.0", "70.9", "50.0", "55.9"],
        ["gt_iou", "1", "70.0", "91.8", "50.0", "87.7"],
    ]


def test_an_empty_table_says_so(study):
    assert make_table(2, study, seeds=1).notes == ["No cell has been run yet."]


def test_summary_of_records_without_listed_tests(study):
    record = record_of(synthrooms_config("tiny", detector="tr3d"), 0.25)
    del record["tests"]
    assert list_tests(record) == [{"seed": 0, "mAP@0.25": 0.25, "mAP@0.5": 0.125}]
    assert summarize([record], "mAP@0.5") == (0.125, 0.125, None, 1)
    assert summarize([], "mAP@0.5") is None


def test_figure_6_shows_the_runs_that_are_there(study, tmp_path, capsys):
    with pytest.raises(ValueError, match="neither has been trained yet"):
        sr3d_figures.draw_figure(6, study, tmp_path)
    put(study, table_rows(1)[-1], 0, 0.3)
    picture, numbers = sr3d_figures.draw_figure(6, study, tmp_path)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert json.loads(numbers.read_text())["SR3D"]["aic"] == [[50, 0.4], [100, 0.3]]
    assert "left out: TR3D" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no figure 5; there are 6, 7"):
        sr3d_figures.draw_figure(5, study, tmp_path)


def test_figure_7_what_each_measure_sees(study, tmp_path):
    picture, numbers = sr3d_figures.draw_figure(7, study, tmp_path)
    assert picture.exists()
    panels = json.loads(numbers.read_text())
    length, width, height = sr3d_figures.BOX
    moved, longer, reshaped = (
        {name: np.array(values) for name, values in panel.items()} for panel in panels.values()
    )
    for panel in (moved, longer, reshaped):
        assert panel["1 - IoU"][0] == panel["vertex distance"][0] == panel["centre distance"][0] == 0
        assert (np.diff(panel["vertex distance"]) > 0).all()
    shift = moved["x"] * length
    diagonal = np.hypot(np.hypot(length + shift, width), height)
    np.testing.assert_allclose(moved["vertex distance"], shift / diagonal, atol=1e-4)
    np.testing.assert_allclose(moved["centre distance"], (shift / diagonal) ** 2, atol=1e-4)
    assert (moved["1 - IoU"][moved["x"] > 1] == 1).all()
    np.testing.assert_allclose(longer["1 - IoU"], 1 - 1 / longer["x"], atol=1e-4)
    for panel in (longer, reshaped):
        np.testing.assert_allclose(panel["centre distance"], 0, atol=1e-5)
