"""Furnished rooms: the kind of a room decides what stands in it and where, as in real homes and offices."""

from typing import NamedTuple

import numpy as np

from vrdistill_jax.data.rooms.furniture import class_from_kind
from vrdistill_jax.data.rooms.groups import (
    hang_pictures,
    hang_shower_curtain,
    litter,
    place_bed,
    place_beside,
    place_bins,
    place_chairs_around,
    place_desk,
    place_dining_set,
    place_kitchen,
    place_openings,
    place_seating,
    place_shelves,
    place_television,
    place_vanity,
    random_times,
)
from vrdistill_jax.data.rooms.planner import Placement, RoomPlanner

FLOOR_CLUTTER = (
    "carton",
    "bag",
    "shoes",
    "suitcase",
    "basket",
    "plant",
    "fan",
    "ball",
    "carton",
    "bag",
    "floor_lamp",
    "pile",
    "pile",
    "rack",
    "hamper",
    "ottoman",
)
WALL_CLUTTER = {  # height of the bottom, lowest and highest, metres
    "clothes": (0.7, 1.0),
    "panel": (0.9, 1.7),
    "wall_shelf": (1.1, 1.7),
    "pipes": (0.0, 0.05),
    "column": (0.0, 0.0),
    "ledge": (0.0, 0.0),
    "radiator": (0.05, 0.15),
    "whiteboard": (0.8, 1.0),
    "mirror": (0.3, 1.1),
}
TOP_CLUTTER = ("book_pile", "carton", "bottle", "pile", "printer", "plant", "bag", "bowl", "cup")
_FLAT_TOPS = ("cabinet", "bookshelf", "desk", "table", "dresser", "refrigerator", "counter", "night_stand")


class Room(NamedTuple):
    """A furnished room, centred on the origin, floor at z = 0."""

    kind: str
    outline: np.ndarray  # f64[4 or 6, 2] corners, counter-clockwise
    height: float  # metres
    placements: list[Placement]
    planner: RoomPlanner  # knows where there is free space


def furnish_room(
    rng: np.random.Generator,
    kind: str | None = None,
    size_scale: dict | None = None,
    room_size: float = 1.0,
) -> Room:
    """Furnishes a random room.

    Args:
      rng: random numbers.
      kind: key of `ROOM_KINDS`, or None for a random one.
      size_scale: factors on the mean depth, width and height per class name; 1 where absent.
      room_size: in [0, 1]; at 0 all rooms are the smallest of their kind, at 1 they are up to the largest.

    Returns:
      The room with all its objects.

    Raises:
      ValueError: if the kind is unknown or room_size out of range.
    """
    if kind is None:
        chances = np.array([entry[0] for entry in ROOM_KINDS.values()])
        kind = str(rng.choice(list(ROOM_KINDS), p=chances / chances.sum()))
    if kind not in ROOM_KINDS:
        raise ValueError(f"unknown kind of room {kind!r}; known are {', '.join(ROOM_KINDS)}")
    if not 0 <= room_size <= 1:
        raise ValueError(f"room_size is {room_size}; expected 0 (smallest rooms) to 1 (all sizes)")
    _, low, high, furnish = ROOM_KINDS[kind]
    extent = rng.uniform(low, np.add(low, room_size * np.subtract(high, low)))
    extent = extent[::-1] if rng.random() < 0.5 else extent
    notch = None
    if min(extent) > 3.4 and rng.random() < 0.35:
        notch = (*rng.choice([-1, 1], 2), *(extent * rng.uniform(0.22, 0.42, 2)))
    planner = RoomPlanner(rng, extent, float(rng.uniform(2.4, 3.1)), notch, size_scale)
    place_openings(planner, kind)
    furnish(planner, rng)
    _scatter(planner, rng)
    return Room(kind, planner.outline, planner.height, planner.placements, planner)


def _scatter(planner: RoomPlanner, rng: np.random.Generator) -> None:
    """What belongs to no class: on the floor, beside and on top of furniture, on the walls."""
    area = float(planner.extent.prod())
    for _ in range(rng.poisson(0.1 * area)):
        wall_item = str(rng.choice(list(WALL_CLUTTER)))
        low, high = WALL_CLUTTER[wall_item]
        size = planner.size(wall_item)
        if wall_item in ("column", "pipes"):
            size[2] = planner.height - 0.1
        z = min(rng.uniform(low, high), max(planner.height - float(size[2]) - 0.05, 0.0))
        planner.against_wall(wall_item, size, z=z, gap=(0.0, 0.01), tries=5)
    for _ in range(rng.poisson(0.24 * area)):
        item = str(rng.choice(FLOOR_CLUTTER))
        how = rng.random()
        if how < 0.55:
            place_beside(planner, item)
        elif how < 0.85:
            planner.against_wall(item, gap=(0.0, 0.2), turn=0.3, tries=5)
        else:
            planner.anywhere(item, tries=5)
    for row in range(len(planner.placements)):
        base = planner.placements[row]
        top = float(base.position[2] + base.size[2])
        if class_from_kind(base.kind) in _FLAT_TOPS and top < 2.0 and base.kind != "cabinet:base":
            litter(planner, row, TOP_CLUTTER, 0.9)


def _living(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_seating(planner, 4)
    _seats(planner, rng, 1.0)
    if rng.random() < 0.75:
        place_television(planner)
    place_shelves(planner, 0, 1)
    if rng.random() < 0.25:
        place_kitchen(planner)
    if rng.random() < 0.6:
        place_dining_set(planner, 8)
    if rng.random() < 0.45:
        place_seating(planner, 2)
    if rng.random() < 0.3:
        place_desk(planner)
    _cabinets(planner, rng, 0, 3)
    _side_tables(planner, rng, 1.7)
    planner.against_wall("floor_lamp" if rng.random() < 0.5 else "plant", gap=(0.02, 0.1), corner=0.8)
    hang_pictures(planner, 1.8)
    place_bins(planner, 0.75)


def _bedroom(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_bed(planner)
    if rng.random() < 0.35:
        place_bed(planner)
    for kind, chance in (("cabinet:tall", 0.65), ("dresser", 0.65)):
        if rng.random() < chance:
            row = planner.against_wall(kind, corner=0.4)
            litter(planner, row if kind == "dresser" else None, ("table_lamp", "book_pile", "bottle"), 1.0)
    if rng.random() < 0.75:
        place_desk(planner)
    place_shelves(planner, 0, 1)
    _cabinets(planner, rng, 0, 3)
    _side_tables(planner, rng, 1.1)
    _seats(planner, rng, 1.9)
    if rng.random() < 0.3:
        place_seating(planner, 1)
    if rng.random() < 0.3:
        planner.anywhere("rug", yaw=0.0)
    if rng.random() < 0.3:
        planner.against_wall("mirror", z=0.9, gap=(0.0, 0.01))
    if rng.random() < 0.12:
        planner.against_wall("refrigerator:mini", corner=0.5)
    hang_pictures(planner, 1.8)
    place_bins(planner, 0.8)


def _office(planner: RoomPlanner, rng: np.random.Generator) -> None:
    for _ in random_times(rng, 1, 5):
        place_desk(planner, rng.random() < 0.75)
    _cabinets(planner, rng, 1, 5)
    place_shelves(planner, 0, 2)
    if rng.random() < 0.5:
        planner.against_wall("whiteboard", z=0.9, gap=(0.0, 0.01))
    _seats(planner, rng, 3.2)
    if rng.random() < 0.35:
        place_dining_set(planner, 8)
    if rng.random() < 0.3:
        place_seating(planner, 1)
    _side_tables(planner, rng, 1.1)
    if rng.random() < 0.12:
        planner.against_wall("refrigerator:mini", corner=0.5)
    hang_pictures(planner, 0.7)
    place_bins(planner, 0.95)


def _meeting(planner: RoomPlanner, rng: np.random.Generator) -> None:
    yaw = (0.0 if planner.extent[1] > planner.extent[0] else np.pi / 2) + rng.normal(0, 0.02)
    middle = rng.normal(0, 0.15, 2)
    table = planner.place("table:meeting", middle, yaw)
    table = planner.anywhere("table:dining", yaw=yaw) if table is None else table
    if table is not None:
        kind = str(rng.choice(["chair:office", "chair:shell", "chair:dining"], p=[0.5, 0.3, 0.2]))
        place_chairs_around(planner, table, int(rng.integers(5, 17)), kind)
        litter(planner, table, ("laptop", "cup", "bottle", "book_pile"), 2.0)
    planner.against_wall("whiteboard" if rng.random() < 0.7 else "television", z=0.95, gap=(0.0, 0.01))
    _cabinets(planner, rng, 0, 3)
    _side_tables(planner, rng, 1.4)
    _seats(planner, rng, 2.4)
    hang_pictures(planner, 0.8)
    place_bins(planner, 0.9)


def _kitchen(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_kitchen(planner)
    if rng.random() < 0.7:
        place_dining_set(planner, 8)
    _cabinets(planner, rng, 0, 3)
    _wall_cabinets(planner, rng, 1.0)
    _side_tables(planner, rng, 0.8)
    _seats(planner, rng, 1.0)
    hang_pictures(planner, 0.6)
    place_bins(planner, 0.9)


def _bathroom(planner: RoomPlanner, rng: np.random.Generator) -> None:
    if rng.random() < 0.85:
        tub = planner.against_wall("bathtub", gap=(0.0, 0.01), corner=1.0, tries=25)
        if tub is not None and rng.random() < 0.9:
            hang_shower_curtain(planner, tub)
    planner.against_wall("toilet", gap=(0.0, 0.06), tries=25, corner=0.2)
    place_vanity(planner)
    if rng.random() < 0.3:
        place_vanity(planner)
    _wall_cabinets(planner, rng, 0.5)
    if rng.random() < 0.5:
        planner.against_wall("towel", z=0.9, gap=(0.01, 0.03))
    hang_pictures(planner, 0.4)
    place_bins(planner, 0.85)


def _storage(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_shelves(planner, 2, 5)
    _cabinets(planner, rng, 1, 5)
    _wall_cabinets(planner, rng, 0.6)
    for _ in range(rng.poisson(0.8)):
        place_dining_set(planner, 5)
    _side_tables(planner, rng, 1.4)
    if rng.random() < 0.4:
        place_desk(planner)
    for _ in random_times(rng, 1, 5):
        row = planner.against_wall("carton", gap=(0.0, 0.3), turn=0.3)
        if row is not None and rng.random() < 0.4:
            planner.on_top(row, "carton")
    hang_pictures(planner, 0.5)
    place_bins(planner, 0.85)


def _studio(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_kitchen(planner)
    place_bed(planner)
    place_seating(planner, 2)
    for furnish, chance in ((place_desk, 0.7), (place_television, 0.5), (place_dining_set, 0.5)):
        if rng.random() < chance:
            furnish(planner)
    if rng.random() < 0.5:
        planner.against_wall("dresser" if rng.random() < 0.4 else "cabinet:tall", corner=0.4)
    place_shelves(planner, 0, 1)
    _cabinets(planner, rng, 0, 3)
    _side_tables(planner, rng, 1.4)
    _seats(planner, rng, 1.3)
    hang_pictures(planner, 1.5)
    place_bins(planner, 0.85)


def _lounge(planner: RoomPlanner, rng: np.random.Generator) -> None:
    """Tables in rows or strewn, with chairs; seating groups; shelves: classrooms, canteens, libraries."""
    for _ in random_times(rng, 1, 6):
        place_dining_set(planner, 8)
    for _ in random_times(rng, 0, 2):
        place_seating(planner, 2)
    place_shelves(planner, 0, 4)
    if rng.random() < 0.4:
        place_desk(planner, False)
    if rng.random() < 0.6:
        planner.against_wall("whiteboard", z=0.9, gap=(0.0, 0.01))
    _cabinets(planner, rng, 0, 3)
    _side_tables(planner, rng, 2.1)
    _seats(planner, rng, 4.8)
    hang_pictures(planner, 1.2)
    place_bins(planner, 0.95)


def _cabinets(planner: RoomPlanner, rng: np.random.Generator, low: int, high: int) -> None:
    """Cabinets along the walls, sometimes side by side."""
    for _ in random_times(rng, low, high):
        kind = str(rng.choice(["cabinet:file", "cabinet:tall", "cabinet:low"], p=[0.42, 0.3, 0.28]))
        if rng.random() < 0.3:
            place_beside(planner, kind, ("cabinet", "desk", "bookshelf"))
        else:
            planner.against_wall(kind, gap=(0.0, 0.04), corner=0.4)


def _wall_cabinets(planner: RoomPlanner, rng: np.random.Generator, mean: float) -> None:
    for _ in range(rng.poisson(mean)):
        size = planner.size("cabinet:wall")
        z = min(rng.uniform(1.25, 1.7), planner.height - float(size[2]) - 0.02)
        planner.against_wall("cabinet:wall", size, z=z, gap=(0.0, 0.0))


def _side_tables(planner: RoomPlanner, rng: np.random.Generator, mean: float) -> None:
    """Small tables, mostly beside a seat."""
    for _ in range(rng.poisson(mean)):
        kind = str(rng.choice(["table:side", "table:coffee", "table:dining"], p=[0.55, 0.2, 0.25]))
        row = None
        if rng.random() < 0.5:
            row = place_beside(planner, kind, ("chair", "sofa", "bed", "desk"))
        if row is None:
            row = planner.against_wall(kind, gap=(0.0, 0.15), turn=0.1)
        litter(planner, row, TOP_CLUTTER, 0.7)


def _seats(planner: RoomPlanner, rng: np.random.Generator, mean: float) -> None:
    """Chairs that belong to no table."""
    for _ in range(rng.poisson(mean)):
        kind = str(
            rng.choice(["chair:shell", "chair:arm", "chair:office", "chair:dining"], p=[0.2, 0.4, 0.2, 0.2])
        )
        if rng.random() < 0.7:
            planner.against_wall(kind, gap=(0.02, 0.3), turn=0.4, corner=0.4)
        else:
            planner.anywhere(kind)


# Frequency, smallest and largest extents in metres, and what furnishes it.
ROOM_KINDS = {
    "living": (0.17, (3.6, 4.8), (5.4, 9.0), _living),
    "bedroom": (0.17, (3.0, 4.0), (4.6, 7.0), _bedroom),
    "office": (0.14, (2.8, 4.0), (5.0, 8.5), _office),
    "meeting": (0.07, (3.4, 4.8), (5.0, 8.0), _meeting),
    "kitchen": (0.12, (2.6, 4.0), (4.2, 7.5), _kitchen),
    "bathroom": (0.13, (1.9, 2.4), (2.9, 4.4), _bathroom),
    "storage": (0.06, (2.6, 3.8), (4.4, 8.0), _storage),
    "studio": (0.08, (4.0, 5.6), (6.0, 9.0), _studio),
    "lounge": (0.09, (4.6, 6.0), (7.0, 9.5), _lounge),
}
