"""Tables 4 and 5 and the cross-family table: which runs they are made of, and the paper's numbers."""

import pytest

from vrdistill_jax.experiments import grid
from vrdistill_jax.experiments.family_tables import (
    CROSS_FAMILY,
    FAMILIES,
    PAPER,
    SLOW_REFINEMENT,
    cross_family_rows,
    family_rows,
)
from vrdistill_jax.experiments.grid import Cell, Study, cell_config, teacher_of
from vrdistill_jax.experiments.rows import describe_command
from vrdistill_jax.experiments.vrdistill_tables import _loss_notes, make_table, table_rows

# Gains over the student as the paper prints them beside its scores: half and quarter width, each at IoU 0.25 and 0.5.
PRINTED_GAINS = {
    4: {"groupfree3d": (4.5, 3.2, 5.4, 5.3), "h3dnet": (2.4, 5.6, 0.5, 3.1), "3detr": (2.0, 2.1, 5.4, 5.1)},
    5: {"groupfree3d": (1.8, 2.2, 1.0, 3.0), "h3dnet": (1.3, 3.5, 1.1, 2.6), "3detr": (2.3, 3.7, 5.7, 2.9)},
}


@pytest.mark.parametrize("number", [4, 5])
def test_the_papers_scores_agree_with_its_gains(number):
    for detector, (_, *scores) in PAPER[number].items():
        half, half_taught, quarter, quarter_taught = scores
        pairs = ((half, half_taught), (quarter, quarter_taught))
        gains = [after[n] - before[n] for before, after in pairs for n in (0, 1)]
        assert gains == pytest.approx(PRINTED_GAINS[number][detector], abs=0.01)


@pytest.mark.parametrize("number", [4, 5])
def test_every_family_has_its_five_lines(number):
    rows = family_rows(number)
    assert rows == table_rows(number)
    assert len(rows) == 5 * len(FAMILIES)
    for detector in FAMILIES:
        own = [row for row in rows if row.detector == detector]
        assert [row.width for row in own] == [grid.TEACHER, "half", "half", "quarter", "quarter"]
        assert [row.methods for row in own] == [(), (), ("vrdistill",), (), ("vrdistill",)]
        assert all(teacher_of(row.cell(1)) == own[0].cell(1) for row in own)
        assert own[2].paper == PAPER[number][detector][2]


def test_cross_family_students_differ_in_their_teacher_only(tmp_path):
    study = Study("synthrooms", "small", tmp_path / "runs", tmp_path / "results")
    rows = cross_family_rows()
    assert table_rows(CROSS_FAMILY) == rows
    assert all(row.paper is None for row in rows)
    taught = [row.cell(0) for row in rows if row.methods]
    assert Cell("quarter", 0, ("vrdistill",)) in taught  # that of table 1
    configs = [cell_config(cell, study).to_dict() for cell in taught]
    for config, cell in zip(configs, taught, strict=True):
        assert config.pop("teacher")["checkpoint"] == str(study.folder(teacher_of(cell)))
        assert config == configs[0]
    # A teacher has learned from clouds like those that it reads while it teaches.
    for cell in {teacher_of(cell) for cell in taught} - {Cell(grid.TEACHER, 0, detector="tr3d")}:
        dataset = cell_config(cell, study).dataset
        assert dataset.num_points == configs[0]["dataset"]["num_points"]
        assert dataset.room_size == configs[0]["dataset"]["room_size"]


def test_a_slow_refinement_is_compared_with_the_same_student(tmp_path):
    study = Study("synthrooms", "small", tmp_path / "runs", tmp_path / "results")
    rows = table_rows(SLOW_REFINEMENT)
    slow = [row for row in rows if row.label.endswith("; slow")]
    assert len(slow) == 4
    for row in slow:
        as_usual = row._replace(label=row.label.removesuffix("; slow"), changes=())
        assert as_usual in rows
        ours, theirs = (cell_config(r.cell(0), study).to_dict() for r in (row, as_usual))
        assert ours["optimizer"].pop("distiller_group_rates") == {"refinement": 0.1}
        assert theirs["optimizer"].pop("distiller_group_rates") == {"refinement": 1.0}
        assert ours == theirs
        assert teacher_of(row.cell(1)) == teacher_of(as_usual.cell(1))
        assert row.cell(0).student_changes == ()


def test_a_table_says_where_the_losses_began_and_ended():
    row, without = table_rows(4)[:2]
    records = {
        row: {0: {"loss": [[50, 9.0], [100, 5.0], [150, 2.0]]}, 1: {"loss": [[50, 11.0], [100, 4.0]]}},
        without: {0: {}},
    }
    (note,) = _loss_notes(records)
    assert note.endswith("steps: Group-Free-3D: teacher 1: 10.0 to 3.0.")
    assert _loss_notes({without: {0: {}}}) == []


def test_the_command_of_a_table_names_what_is_not_its_default(tmp_path):
    study = Study("synthrooms", "full", tmp_path / "runs", tmp_path / "results")
    words = describe_command("--table=5", study, "synthrooms_view")
    assert "reproduce --table=5 --dataset=synthrooms --budget=full;" in words
    assert "reproduce --table=4;" in describe_command(
        "--table=4", study._replace(budget="small"), "synthrooms"
    )


def test_doubtful_numbers_are_remarked_upon(tmp_path):
    study = Study("synthrooms_view", "small", tmp_path / "runs", tmp_path / "results")
    assert any("probably swapped" in note for note in make_table(5, study, 1).notes)
    assert not any("probably swapped" in note for note in make_table(4, study, 1).notes)
