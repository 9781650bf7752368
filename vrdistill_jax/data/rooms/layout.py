"""Furnished rooms: the kind of a room decides what stands in it and where, as in real homes and offices."""

from typing import NamedTuple

import numpy as np

from vrdistill_jax.data.rooms.groups import (
    hang_pictures,
    hang_shower_curtain,
    litter,
    place_bed,
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
)


class Room(NamedTuple):
    """A furnished room, centred on the origin, floor at z = 0."""

    kind: str
    outline: np.ndarray  # f64[4 or 6, 2] corners, counter-clockwise
    height: float  # metres
    placements: list[Placement]
    planner: RoomPlanner  # knows where there is free space


def furnish_room(rng: np.random.Generator, kind: str | None = None, size_scale: dict | None = None) -> Room:
    """Furnishes a random room.

    Args:
      rng: random numbers.
      kind: key of `ROOM_KINDS`, or None for a random one.
      size_scale: factors on the mean depth, width and height per class name; 1 where absent.

    Returns:
      The room with all its objects.

    Raises:
      ValueError: if the kind is unknown.
    """
    if kind is None:
        chances = np.array([entry[0] for entry in ROOM_KINDS.values()])
        kind = str(rng.choice(list(ROOM_KINDS), p=chances / chances.sum()))
    if kind not in ROOM_KINDS:
        raise ValueError(f"unknown kind of room {kind!r}; known are {', '.join(ROOM_KINDS)}")
    _, low, high, furnish = ROOM_KINDS[kind]
    extent = rng.uniform(low, high)
    extent = extent[::-1] if rng.random() < 0.5 else extent
    notch = None
    if min(extent) > 3.4 and rng.random() < 0.25:
        notch = (*rng.choice([-1, 1], 2), *(extent * rng.uniform(0.22, 0.42, 2)))
    planner = RoomPlanner(rng, extent, float(rng.uniform(2.4, 2.9)), notch, size_scale)
    place_openings(planner, kind)
    furnish(planner, rng)
    if rng.random() < 0.08:
        planner.against_wall("radiator", z=0.1)
    for _ in range(rng.poisson(0.35 if kind == "bathroom" else 1.5)):
        item = str(rng.choice(FLOOR_CLUTTER))
        if rng.random() < 0.7:
            planner.against_wall(item, gap=(0.0, 0.2), turn=0.3, tries=5)
        else:
            planner.anywhere(item, tries=5)
    return Room(kind, planner.outline, planner.height, planner.placements, planner)


def _living(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_seating(planner, 3)
    if rng.random() < 0.75:
        place_television(planner)
    place_shelves(planner, 0, 2)
    if rng.random() < 0.4:
        place_dining_set(planner, 4)
    for _ in random_times(rng, 0, 1):
        planner.against_wall("cabinet:tall" if rng.random() < 0.4 else "cabinet:file", gap=(0.0, 0.03))
    planner.against_wall("floor_lamp" if rng.random() < 0.5 else "plant", gap=(0.02, 0.1), corner=0.8)
    hang_pictures(planner, 2.0)
    place_bins(planner, 0.3)


def _bedroom(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_bed(planner)
    if rng.random() < 0.25:
        place_bed(planner)
    for kind, chance in (("cabinet:tall", 0.65), ("dresser", 0.65)):
        if rng.random() < chance:
            row = planner.against_wall(kind, corner=0.4)
            litter(planner, row if kind == "dresser" else None, ("table_lamp", "book_pile", "bottle"), 1.0)
    if rng.random() < 0.75:
        place_desk(planner)
    place_shelves(planner, 0, 1)
    if rng.random() < 0.4:
        planner.against_wall("chair:arm", gap=(0.02, 0.2), turn=0.3, corner=0.6)
    if rng.random() < 0.3:
        planner.anywhere("rug", yaw=0.0)
    if rng.random() < 0.3:
        planner.against_wall("mirror", z=0.9, gap=(0.0, 0.01))
    if rng.random() < 0.12:
        planner.against_wall("refrigerator:mini", corner=0.5)
    hang_pictures(planner, 2.2)
    place_bins(planner, 0.4)


def _office(planner: RoomPlanner, rng: np.random.Generator) -> None:
    for _ in random_times(rng, 1, 4):
        place_desk(planner, rng.random() < 0.75)
    for _ in random_times(rng, 0, 3):
        planner.against_wall(
            str(rng.choice(["cabinet:file", "cabinet:tall", "cabinet:low"], p=[0.6, 0.25, 0.15])), corner=0.4
        )
    place_shelves(planner, 0, 2)
    if rng.random() < 0.5:
        planner.against_wall("whiteboard", z=0.9, gap=(0.0, 0.01))
    for _ in random_times(rng, 0, 2):
        planner.against_wall(
            str(rng.choice(["chair:shell", "chair:arm", "chair:office"])), gap=(0.02, 0.3), turn=0.3
        )
    if rng.random() < 0.25:
        place_dining_set(planner, 4)
    if rng.random() < 0.12:
        planner.against_wall("refrigerator:mini", corner=0.5)
    hang_pictures(planner, 0.8)
    place_bins(planner, 0.75)


def _meeting(planner: RoomPlanner, rng: np.random.Generator) -> None:
    yaw = (0.0 if planner.extent[1] > planner.extent[0] else np.pi / 2) + rng.normal(0, 0.02)
    middle = rng.normal(0, 0.15, 2)
    table = planner.place("table:meeting", middle, yaw)
    table = planner.anywhere("table:dining", yaw=yaw) if table is None else table
    if table is not None:
        kind = str(rng.choice(["chair:office", "chair:shell", "chair:dining"], p=[0.5, 0.3, 0.2]))
        place_chairs_around(planner, table, int(rng.integers(4, 11)), kind)
        litter(planner, table, ("laptop", "cup", "bottle", "book_pile"), 2.0)
    planner.against_wall("whiteboard" if rng.random() < 0.7 else "television", z=0.95, gap=(0.0, 0.01))
    for _ in random_times(rng, 0, 2):
        planner.against_wall(str(rng.choice(["cabinet:low", "cabinet:file"])), corner=0.4)
    for _ in random_times(rng, 0, 3):
        planner.against_wall("chair:shell", gap=(0.02, 0.2), turn=0.2)
    hang_pictures(planner, 0.8)
    place_bins(planner, 0.7)


def _kitchen(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_kitchen(planner)
    if rng.random() < 0.7:
        place_dining_set(planner, 4)
    if rng.random() < 0.4:
        planner.against_wall("cabinet:tall", corner=0.5)
    hang_pictures(planner, 0.6)
    place_bins(planner, 0.7)


def _bathroom(planner: RoomPlanner, rng: np.random.Generator) -> None:
    if rng.random() < 0.85:
        tub = planner.against_wall("bathtub", gap=(0.0, 0.01), corner=1.0, tries=25)
        if tub is not None and rng.random() < 0.9:
            hang_shower_curtain(planner, tub)
    planner.against_wall("toilet", gap=(0.0, 0.06), tries=25, corner=0.2)
    place_vanity(planner)
    if rng.random() < 0.3:
        planner.against_wall("cabinet:wall", z=1.3, gap=(0.0, 0.0))
    if rng.random() < 0.5:
        planner.against_wall("towel", z=0.9, gap=(0.01, 0.03))
    hang_pictures(planner, 0.3)
    place_bins(planner, 0.6)


def _storage(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_shelves(planner, 2, 5)
    for _ in random_times(rng, 1, 3):
        planner.against_wall(str(rng.choice(["cabinet:tall", "cabinet:file", "cabinet:low"])), corner=0.3)
    if rng.random() < 0.6:
        place_dining_set(planner, 4)
    if rng.random() < 0.4:
        place_desk(planner)
    for _ in random_times(rng, 1, 5):
        row = planner.against_wall("carton", gap=(0.0, 0.3), turn=0.3)
        if row is not None and rng.random() < 0.4:
            planner.on_top(row, "carton")
    hang_pictures(planner, 0.4)
    place_bins(planner, 0.5)


def _studio(planner: RoomPlanner, rng: np.random.Generator) -> None:
    place_kitchen(planner)
    place_bed(planner)
    place_seating(planner, 1)
    for furnish, chance in ((place_desk, 0.7), (place_television, 0.5), (place_dining_set, 0.5)):
        if rng.random() < chance:
            furnish(planner)
    if rng.random() < 0.5:
        planner.against_wall("dresser" if rng.random() < 0.4 else "cabinet:tall", corner=0.4)
    place_shelves(planner, 0, 1)
    hang_pictures(planner, 1.5)
    place_bins(planner, 0.5)


# Frequency, smallest and largest extents in metres, and what furnishes it.
ROOM_KINDS = {
    "living": (0.17, (3.6, 4.2), (5.2, 6.4), _living),
    "bedroom": (0.20, (3.0, 3.4), (4.2, 5.2), _bedroom),
    "office": (0.13, (2.8, 3.4), (4.6, 6.0), _office),
    "meeting": (0.07, (3.2, 4.2), (4.6, 6.4), _meeting),
    "kitchen": (0.13, (2.8, 3.2), (4.0, 5.0), _kitchen),
    "bathroom": (0.15, (1.9, 2.2), (2.6, 3.4), _bathroom),
    "storage": (0.06, (2.8, 3.2), (4.2, 5.5), _storage),
    "studio": (0.08, (4.2, 5.2), (5.4, 7.0), _studio),
}
