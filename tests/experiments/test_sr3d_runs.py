"""From training to a record: a tiny SR3D, tested twice, then once more."""

import pytest

from vrdistill_jax.experiments import grid
from vrdistill_jax.experiments.grid import Study, run_cells
from vrdistill_jax.experiments.sr3d_tables import make_table, table_rows

pytestmark = pytest.mark.slow  # compiling the network takes minutes of processor time


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sr3d")
    study = Study(
        "synthrooms", "tiny", folder / "runs", folder / "results", str(folder / "data"), num_tests=2
    )
    assert run_cells([table_rows(6)[0].cell(0)], study, "the command") == []
    return study


def test_record_has_tests_curves_and_the_case_study(done):
    record = done.read(table_rows(6)[0].cell(0))
    assert [test["seed"] for test in record["tests"]] == [0, 1000]
    assert record["tests"][0]["mAP@0.25"] == record["result"]["mAP@0.25"]
    alignment = record["alignment"]
    assert alignment["aic"] == alignment["aic_top_k"]  # its assigner is TR3D's
    assert alignment["aic"][0][0] == 50
    assert 0 < alignment["aic"][0][1] < 1
    assert 0 < alignment["score_top_k"][0][1] < 1
    assert 0 < alignment["quality_top_k"][0][1] < 1
    points = alignment["consistency"]["points"]
    assert len(points["iou"]) == len(points["label"]) == alignment["consistency"]["num_detections"]
    # Perfect scores cannot be worse than the scores of a network that has hardly learnt.
    assert alignment["case_study"]["gt_iou"]["mAP@0.25"] >= record["result"]["mAP@0.25"]
    assert make_table(6, done, seeds=1).rows[0][1] == "1"


def test_more_tests_do_not_train_again(done, monkeypatch):
    monkeypatch.setattr(grid, "train", lambda *_: pytest.fail("a trained cell was trained again"))
    cell = table_rows(6)[0].cell(0)
    assert run_cells([cell], done._replace(num_tests=3), "again") == []
    record = done.read(cell)
    assert [test["seed"] for test in record["tests"]] == [0, 1000, 2000]
    assert record["command"] == "the command"
