"""A grid of two tiny runs: made, found again, refused when the config differs, and rendered."""

import json
import pathlib

import pytest

from vrdistill_jax.experiments import analysis, grid
from vrdistill_jax.experiments.grid import Cell, Study, cell_config, run_cells, teacher_of, train_command
from vrdistill_jax.experiments.rendering import as_markdown, as_text
from vrdistill_jax.experiments.vrdistill_tables import READINGS, TABLES, _student_of, make_table, table_rows
from vrdistill_jax.reproduce import choose_rows

SEED = 0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    return Study("synthrooms", "tiny", folder / "runs", folder / "results", str(folder / "data"))


@pytest.fixture(scope="module")
def cells():
    rows = choose_rows(table_rows(3), ["Student", "both"])
    return [row.cell(SEED) for row in rows]


@pytest.fixture(scope="module")
def done(study, cells):
    assert run_cells(cells, study, "the command") == []
    return study


def test_runs_the_teacher_first_and_records_everything(done, cells):
    record = done.read(cells[1])
    assert record["command"] == "the command"
    assert record["train_command"] == train_command(cells[1], done)
    assert record["config"]["teacher"]["weights_sha256"]
    assert done.read(Cell(grid.TEACHER, SEED)) is not None
    assert set(record["analysis"]["vote_distance"]) == {"student", "teacher", "refined"}
    assert set(done.read(cells[0])["analysis"]) == {"recall_by_volume", "vote_distance"}
    assert 0 <= record["result"]["mAP@0.25"] <= 1


def test_records_and_tables_show_the_detectors_loss(done, cells):
    teacher, alone, taught = (done.read(c) for c in (teacher_of(cells[1]), *cells))
    steps = teacher["config"]["train"]["num_steps"]
    for record, cell, key in ((alone, cells[0], "train/total"), (taught, cells[1], "train/detection")):
        rows = [json.loads(line) for line in (done.folder(cell) / "metrics.jsonl").read_text().splitlines()]
        logged = [row[key] for row in rows if key in row]
        assert len(logged) == steps <= 50  # one point of the curve
        assert record["loss"] == [[50.0, pytest.approx(sum(logged) / steps, rel=1e-4)]]
    first = f"Student 1/2: {alone['loss'][0][1]:.1f} to {alone['loss'][0][1]:.1f}"
    assert any(first in note for note in make_table(3, done, 1).notes)


def test_nothing_is_run_twice(done, cells, monkeypatch):
    monkeypatch.setattr(grid, "train", lambda *_: pytest.fail("a finished cell was run again"))
    assert run_cells(cells, done, "again") == []
    assert done.read(cells[0])["command"] == "the command"


@pytest.mark.parametrize("stopped_at", [None, 1])
def test_a_teacher_without_its_last_checkpoint_is_trained_again(
    done, cells, tmp_path, monkeypatch, stopped_at
):
    """Records travel with the repository, checkpoints do not; and that training may have been stopped."""
    elsewhere = done._replace(workdir=tmp_path / "runs")
    assert grid.is_trained(teacher_of(cells[1]), done)
    if stopped_at:
        (elsewhere.folder(teacher_of(cells[1])) / "checkpoints" / str(stopped_at)).mkdir(parents=True)
    started = []

    def train(config, folder):
        started.append(folder.name)
        raise InterruptedError

    monkeypatch.setattr(grid, "train", train)
    student = cells[1]._replace(width="quarter")
    with pytest.raises(InterruptedError):
        run_cells([cells[0], student], elsewhere, "again")  # the first has its record
    assert started == [teacher_of(student).name]


def test_a_record_of_another_config_is_refused(done, cells):
    path = done.record_path(cells[0])
    text = path.read_text()
    record = json.loads(text)
    record["config"]["optimizer"]["learning_rate"] = 1.0
    path.write_text(json.dumps(record))
    try:
        with pytest.raises(ValueError, match="optimizer.learning_rate: 1.0 there"):
            run_cells(cells, done, "again")
    finally:
        path.write_text(text)


def test_a_cell_that_another_process_holds_is_skipped(study, tmp_path):
    other = study._replace(workdir=tmp_path / "runs", results=tmp_path / "results")
    cell = Cell("half", SEED)
    folder = other.folder(cell)
    folder.mkdir(parents=True)
    with grid._lock(folder / "lock") as mine:
        assert mine
        assert run_cells([cell], other, "") == [cell]
    assert other.read(cell) is None


def test_table_has_scores_gains_and_the_papers_numbers(done):
    table = make_table(3, done, seeds=1)
    by_label = {entry["label"]: entry for entry in table.data}
    student, full = by_label["Student"], by_label["both"]
    gain = full["mAP@0.25"]["mean"] - student["mAP@0.25"]["mean"]
    assert full["mAP@0.25"]["gain"] == pytest.approx(gain)
    assert full["paper"] == (58.8, 36.5)
    assert by_label["soft mask"]["mAP@0.25"]["mean"] is None
    for text in (as_text(table), as_markdown(table)):
        assert "58.8" in text
        assert "reproduce --table=3 --budget=tiny; the" in text


def test_every_distilled_line_has_its_student_alone():
    for number in (1, 2, 3, 7, 9, READINGS):
        alone = {_student_of(row) for row in table_rows(number) if not row.methods}
        assert {_student_of(row) for row in table_rows(number) if row.methods} <= alone


def test_a_teacher_may_have_been_trained_otherwise():
    rows = {row.label: row for row in table_rows(READINGS) if "twice" in row.label}
    longer, as_before = (rows[f"VRDistill; twice the steps{end}"] for end in ("", "; teacher as before"))
    assert teacher_of(longer.cell(0)) == rows["Teacher; twice the steps"].cell(0)
    assert teacher_of(as_before.cell(0)) == Cell("teacher", 0)
    # Gains are over the student that was trained as long, whatever its teacher.
    assert _student_of(longer) == _student_of(as_before) == _student_of(rows["Student; twice the steps"])
    assert _student_of(longer) != _student_of(longer._replace(changes=()))


def test_a_run_that_is_older_than_an_entry_is_analysed(done, cells, monkeypatch):
    load = analysis.load_inference_checkpoint

    def load_older(folder):
        variables, config = load(folder)
        del config.distiller.methods.vrdistill.same_clusters
        return variables, config

    monkeypatch.setattr(analysis, "load_inference_checkpoint", load_older)
    run = analysis.load_run(done.folder(cells[1]))
    assert run.teacher is not None


def test_tables_share_cells_and_names_are_unique(study):
    cells = {number: [row.cell(SEED) for row in table_rows(number)] for number in TABLES}
    default = Cell("half", SEED, ("vrdistill",))
    assert all(default in cells[number] for number in (1, 3, 6, 7, 9))
    every = {cell for of_table in cells.values() for cell in of_table}
    assert len({cell.name for cell in every}) == len(every)
    for cell in every:
        cell_config(cell, study)  # every changed entry exists


def test_train_command_makes_the_same_config(study):
    """What the record says to call must do what the grid did."""
    import importlib.util

    cell = Cell("half", 2, ("vrdistill",), (("distiller.methods.vrdistill.sigma", 0.5),))
    words = train_command(cell, study).split()
    assert words[:3] == ["python", "-m", "vrdistill_jax.train"]
    config_word, *options = [word.removeprefix("--") for word in words[3:]]
    path, _, argument = config_word.removeprefix("config=").partition(":")
    root = pathlib.Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("config_file", root / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument)
    config.update_from_flattened_dict(
        {
            k.removeprefix("config."): type_like(config, k, v)
            for k, _, v in (o.partition("=") for o in options)
        }
    )
    wanted = cell_config(cell, study)
    for section in ("detector", "distiller", "optimizer", "seed"):
        assert json.loads(config.to_json())[section] == json.loads(wanted.to_json())[section]


def type_like(config, key, text):
    value = config
    for part in key.removeprefix("config.").split("."):
        value = value[part]
    return type(value)(text)


def test_names_say_what_is_trained():
    assert Cell(grid.TEACHER, 0).name == "teacher_seed0"
    assert Cell("half", 1).name == "half_alone_seed1"
    sigma = (("distiller.methods.vrdistill.sigma", 0.5),)
    assert Cell("half", 0, ("vrdistill",), sigma).name == "half_vrdistill_sigma=0.5_seed0"
    assert Cell(grid.TEACHER, 0, detector="tr3d").name == "tr3d_seed0"
    losses = (("detector.classification_loss", "qfl"),)
    assert Cell(grid.TEACHER, 2, (), losses, "sr3d").name == "sr3d_classification_loss=qfl_seed2"
    assert Cell("quarter", 0, ("seed",), detector="3detr").name == "3detr_quarter_seed_seed0"
    assert Cell("half", 0, ("seed",), teacher="h3dnet").name == "half_seed_from_h3dnet_seed0"


def test_a_student_has_the_detector_and_the_teacher_that_its_cell_names(study):
    own = Cell("half", 3, ("vrdistill",), detector="groupfree3d")
    assert teacher_of(own) == Cell(grid.TEACHER, 3, detector="groupfree3d")
    sampling = ("detector.cluster_sampling", "vote_fps")
    changed = Cell("half", 3, ("vrdistill",), (("distiller.methods.vrdistill.eta", 1.0), sampling))
    assert teacher_of(changed) == Cell(grid.TEACHER, 3, (), (sampling,))  # trained as its student
    assert teacher_of(changed._replace(teacher="groupfree3d")) == teacher_of(own)
    config = cell_config(own, study)
    assert config.detector.name == "groupfree3d"
    assert config.detector.width == 0.5 * cell_config(teacher_of(own), study).detector.width
    assert config.teacher.checkpoint.endswith("groupfree3d_seed3")
    assert not config.teacher.detector  # no entry of VoteNet's is changed
    assert ",groupfree3d" in train_command(own, study)

    other = Cell("half", 3, ("vrdistill",), teacher="h3dnet")
    assert teacher_of(other) == Cell(grid.TEACHER, 3, detector="h3dnet")
    config = cell_config(other, study)
    assert config.detector.name == "votenet"
    assert config.teacher.checkpoint.endswith("h3dnet_seed3")
    assert ",votenet,h3dnet" in train_command(other, study)
    with pytest.raises(ValueError, match="unknown 'votnet'; known: votenet"):
        cell_config(Cell("half", 0, detector="votnet"), study)


def test_published_records_are_found_done(tmp_path):
    """Their names and configs are those that the grid gives the same cells today."""
    results = pathlib.Path(__file__).resolve().parents[2] / "results" / "vrdistill"
    published = Study("synthrooms", "small", tmp_path, results)
    cells = [row.cell(SEED) for number in TABLES for row in table_rows(number)]
    done = [cell for cell in cells if published.record_path(cell).exists()]
    assert done
    for cell in done:
        grid.check_record(cell, published)


def test_rows_of_one_width_can_be_chosen():
    rows = choose_rows(table_rows(1), ["VRDistill@quarter", "Student"])
    assert [(row.label, row.width) for row in rows] == [
        ("Student", "half"), ("Student", "quarter"), ("VRDistill", "quarter")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="names 'Teacher@half'"):
        choose_rows(table_rows(1), ["Teacher@half"])


def test_unknown_rows_and_tables_are_named():
    with pytest.raises(ValueError, match="Vrdistil"):
        choose_rows(table_rows(1), ["Vrdistil"])
    with pytest.raises(ValueError, match="no table 12; there are 1, 2"):
        table_rows(12)
