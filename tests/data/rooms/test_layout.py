import numpy as np
import pytest

from vrdistill_jax.data.class_tables import SCANNET_CLASSES
from vrdistill_jax.data.rooms.furniture import class_from_kind, footprint_solids
from vrdistill_jax.data.rooms.layout import ROOM_KINDS, furnish_room
from vrdistill_jax.data.rooms.planner import RoomPlanner, overlapping_boxes, room_outline, walls_from_outline

BY_DESIGN = [{"sink", "counter"}, {"sink", "cabinet"}, {"chair", "table"}, {"chair", "desk"}]
BY_DESIGN += [{"shower_curtain", "bathtub"}]
LABELLED = {*SCANNET_CLASSES, "dresser", "night_stand"}


def inside_fraction(item, points):
    """Naive oracle: the share of world points inside an object's solids shrunk by 1 cm."""
    c, s = np.cos(item.yaw), np.sin(item.yaw)
    local = (points - item.position) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    inside = np.zeros(len(points), bool)
    for x, y, ex, ey in footprint_solids(item.kind, item.size):
        inside |= (np.abs(local[:, 0] - x) < ex / 2 - 0.01) & (np.abs(local[:, 1] - y) < ey / 2 - 0.01)
    return (inside & (local[:, 2] > 0.01) & (local[:, 2] < item.size[2] - 0.01)).mean()


def points_of(item, rng, count=400):
    c, s = np.cos(item.yaw), np.sin(item.yaw)
    solids = footprint_solids(item.kind, item.size)
    solid = solids[rng.integers(len(solids), size=count)]
    xy = solid[:, :2] + (rng.random((count, 2)) - 0.5) * solid[:, 2:]
    local = np.column_stack([xy, rng.random(count) * item.size[2]])
    return local @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + item.position


def in_outline(outline, points):
    """Even-odd rule."""
    inside = np.zeros(len(points), bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, 0), strict=True):
        crosses = (y0 > points[:, 1]) != (y1 > points[:, 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (points[:, 0] < (x1 - x0) * (points[:, 1] - y0) / (y1 - y0) + x0)
    return inside


def test_nothing_interpenetrates_or_leaves_the_room():
    rng = np.random.default_rng(0)
    shapes = set()
    for seed in range(60):
        room = furnish_room(np.random.default_rng(seed))
        shapes.add(len(room.outline))
        center = room.outline.mean(0)
        for row, item in enumerate(room.placements):
            points = points_of(item, rng)
            shrunk = center + (points[:, :2] - center) * 0.995
            assert in_outline(room.outline, shrunk).mean() > 0.97, (seed, item.kind)
            for other in room.placements[row + 1 :]:
                if {class_from_kind(item.kind), class_from_kind(other.kind)} in BY_DESIGN:
                    continue
                assert inside_fraction(other, points) == 0, (seed, item.kind, other.kind)
    assert shapes == {4, 6}, "rectangular and L-shaped rooms"


def test_seats_tucked_under_a_table_barely_enter_it():
    rng = np.random.default_rng(0)
    for seed in range(40):
        room = furnish_room(np.random.default_rng(seed), "meeting")
        tables = [item for item in room.placements if item.kind.startswith("table")]
        for item in room.placements:
            if item.kind.startswith("chair"):
                assert all(inside_fraction(table, points_of(item, rng)) < 0.45 for table in tables)


def test_wall_objects_stand_with_their_backs_to_a_wall():
    for seed in range(40):
        room = furnish_room(np.random.default_rng(seed))
        walls = walls_from_outline(room.outline)
        for item in room.placements:
            if class_from_kind(item.kind) not in ("window", "picture", "bathtub", "toilet", "bookshelf"):
                continue
            front = np.array([np.cos(item.yaw), np.sin(item.yaw)])
            back = item.position[:2] - front * item.size[0] / 2
            gaps = [
                abs((back - wall.start) @ wall.normal) for wall in walls if wall.normal @ front > np.cos(0.01)
            ]
            assert min(gaps) < 0.08, (seed, item.kind)


def test_same_seed_same_room_and_every_kind_is_furnished():
    for kind in ROOM_KINDS:
        first, again = (furnish_room(np.random.default_rng(5), kind) for _ in range(2))
        assert [p.kind for p in first.placements] == [p.kind for p in again.placements]
        for one, two in zip(first.placements, again.placements, strict=True):
            np.testing.assert_array_equal(one.position, two.position)
        labelled = [p for p in first.placements if class_from_kind(p.kind) in LABELLED]
        assert len(labelled) >= 3
    with pytest.raises(ValueError, match="unknown kind of room 'cellar'"):
        furnish_room(np.random.default_rng(0), "cellar")


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_outline_is_counter_clockwise_and_walls_face_inwards(signs):
    outline = room_outline([4.0, 3.0], (*signs, 1.0, 0.8))
    x, y = outline.T
    area = 0.5 * (x @ np.roll(y, -1) - y @ np.roll(x, -1))
    assert area == pytest.approx(4 * 3 - 0.8)
    walls = walls_from_outline(outline)
    assert sum(not wall.inner_start for wall in walls) == 1, "one corner juts into the room"
    for wall in walls:
        middle = wall.start + wall.direction * wall.length / 2
        assert in_outline(outline, np.array([middle + 0.01 * wall.normal]))[0]
        assert not in_outline(outline, np.array([middle - 0.01 * wall.normal]))[0]
        np.testing.assert_allclose(wall.direction, [-wall.normal[1], wall.normal[0]], atol=1e-12)


def test_overlapping_boxes_on_cases_done_by_hand():
    def box(x, y, hx, hy, yaw, low=0.0, high=1.0):
        return np.array([x, y, hx, hy, np.cos(yaw), np.sin(yaw), low, high])

    unit = box(0, 0, 0.5, 0.5, 0)
    others = np.stack(
        [
            box(0.9, 0, 0.5, 0.5, 0),  # overlaps by 0.1
            box(1.0, 0, 0.5, 0.5, 0),  # touches
            box(1.1, 1.1, 0.5, 0.5, np.pi / 4),  # only the axis-aligned bounds overlap
            box(1.1, 0, 0.5, 0.5, np.pi / 4),  # the corner reaches in
            box(0, 0, 0.5, 0.5, 0, 1.0, 2.0),  # stands on top
        ]
    )
    assert overlapping_boxes(unit, others).tolist() == [True, False, False, True, False]


def test_planner_refuses_what_does_not_fit():
    planner = RoomPlanner(np.random.default_rng(0), [3.0, 3.0], 2.5)
    assert planner.place("table:dining", [0, 0], 0.0, [1, 1, 0.7]) == 0
    assert planner.place("table:dining", [0.5, 0], 0.0, [1, 1, 0.7]) is None
    assert planner.place("table:dining", [0.5, 0], 0.0, [1, 1, 0.7], ignore=(0,)) == 1
    assert planner.place("table:dining", [1.2, 1.2], 0.0, [1, 1, 0.7]) is None, "would stand in the wall"
    assert planner.against_wall("sofa:three", [1.0, 3.2, 0.8]) is None, "wider than any wall"
