"""VRDistill's tables of other detectors, one of teachers of other families, and one of a refinement that learns slowly.

Source of the numbers: "VRDistill: Vote Refinement Distillation for Efficient Indoor 3D Object Detection" (2024), tables 4 and 5
(mAP in %). The last two tables are in no paper.
"""

from vrdistill_jax.experiments.grid import TEACHER
from vrdistill_jax.experiments.rows import Row, Score

FAMILIES = {"groupfree3d": "Group-Free-3D", "h3dnet": "H3DNet", "3detr": "3DETR"}
# By table and detector: teacher; student and VRDistill at half width; the same at a quarter.
PAPER: dict[int, dict[str, tuple[Score, ...]]] = {
    4: {
        "groupfree3d": ((66.7, 48.4), (52.5, 31.5), (57.0, 34.7), (46.4, 25.7), (51.8, 31.0)),
        "h3dnet": ((66.3, 48.3), (62.0, 41.0), (64.4, 46.6), (57.8, 35.1), (58.3, 38.2)),
        "3detr": ((60.6, 42.1), (58.9, 35.4), (60.9, 37.5), (50.4, 21.8), (55.8, 26.9)),
    },
    5: {
        "groupfree3d": ((60.4, 43.3), (58.3, 38.8), (60.1, 41.0), (56.1, 34.1), (57.1, 37.1)),
        "h3dnet": ((58.0, 30.3), (54.9, 25.3), (56.2, 28.8), (50.3, 22.6), (51.4, 25.2)),
        "3detr": ((60.1, 39.0), (50.5, 23.2), (52.8, 26.9), (43.0, 15.5), (48.7, 18.4)),
    },
}
CROSS_FAMILY = "cross_family"
SLOW_REFINEMENT = "slow_refinement"
# What a reader must know of a table's numbers.
REMARKS: dict[int | str, str] = {
    5: "The paper's teachers of H3DNet and 3DETR are probably swapped: 58.0 / 30.3 is what 3DETR's authors published for it, "
    "and 60.1 / 39.0 what is published for H3DNet.",
    CROSS_FAMILY: "Every teacher sees the student's clouds while it teaches; with the small budget, TR3D has learned from "
    "larger ones.",
}
TEACHERS = {"votenet": "VoteNet"} | FAMILIES | {"tr3d": "TR3D"}


def family_rows(number: int) -> list[Row]:
    """The lines of table 4 or 5: each detector as teacher, and at 1/2 and 1/4 width alone and with VRDistill."""
    rows = []
    for detector, name in FAMILIES.items():
        teacher, *scores = PAPER[number][detector]
        rows.append(Row(f"{name}: teacher", TEACHER, paper=teacher, detector=detector))
        for width in ("half", "quarter"):
            for label, methods in (("student", ()), ("VRDistill", ("vrdistill",))):
                rows.append(Row(f"{name}: {label}", width, methods, (), scores.pop(0), detector))
    return rows


def cross_family_rows() -> list[Row]:
    """The same narrow VoteNet, alone and taught by detectors of several families; before that, the teachers' own scores."""
    rows = [Row(f"{name}: teacher", TEACHER, detector=teacher) for teacher, name in TEACHERS.items()]
    rows.append(Row("VoteNet: student", "quarter"))
    for teacher, name in TEACHERS.items():
        of_another = "" if teacher == "votenet" else teacher
        rows.append(Row(f"VoteNet from {name}", "quarter", ("vrdistill",), teacher=of_another))
    return rows


def slow_refinement_rows() -> list[Row]:
    """Students alone, with VRDistill, and with VRDistill whose refinement learns at a tenth of the learning rate."""
    slow = (("optimizer.distiller_group_rates.refinement", 0.1),)
    rows = []
    for detector, width in (("groupfree3d", "half"), ("h3dnet", "half"), ("votenet", "quarter")):
        name = TEACHERS[detector]
        rows += [
            Row(f"{name}: student", width, detector=detector),
            Row(f"{name}: VRDistill", width, ("vrdistill",), detector=detector),
            Row(f"{name}: VRDistill; slow", width, ("vrdistill",), slow, detector=detector),
        ]
    from_another = ("VoteNet from Group-Free-3D", "quarter", ("vrdistill",))
    rows.append(Row(*from_another, teacher="groupfree3d"))
    rows.append(Row(f"{from_another[0]}; slow", *from_another[1:], slow, teacher="groupfree3d"))
    return rows


TABLES: dict[int | str, tuple[str, list[Row]]] = {
    4: ("Table 4: other detectors, 18 classes, axis-aligned boxes", family_rows(4)),
    5: ("Table 5: other detectors, 10 classes, turned boxes", family_rows(5)),
    CROSS_FAMILY: (
        "Teachers of other families (in no paper): VoteNet at 1/4 width",
        cross_family_rows(),
    ),
    SLOW_REFINEMENT: (
        "A refinement that learns at a tenth of the learning rate (in no paper)",
        slow_refinement_rows(),
    ),
}
