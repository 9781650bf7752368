"""Groups of furniture that belong together: desk and chair, sofa and table, a kitchen's run."""

import numpy as np

from vrdistill_jax.data.rooms.furniture import footprint_solids
from vrdistill_jax.data.rooms.planner import Placement, RoomPlanner

DESK_CLUTTER = ("monitor", "laptop", "book_pile", "cup", "bottle", "table_lamp")
TABLE_CLUTTER = ("book_pile", "cup", "bottle", "bowl", "laptop", "table_lamp")


def place_openings(planner: RoomPlanner, kind: str) -> None:
    """Doors with free floor before them, and windows with or without curtains."""
    rng = planner.rng
    for _ in range(1 + min(4, rng.poisson(0.25 if kind == "bathroom" else 1.0))):
        style = str(rng.choice(["door:closed", "door:open", "door:double"], p=[0.56, 0.32, 0.12]))
        if kind == "bathroom" and style == "door:double":
            style = "door:closed"
        if style == "door:open":
            _open_door(planner)
            continue
        row = planner.against_wall(style, gap=(0.0, 0.0))
        if row is not None:
            door = planner.placements[row]
            _keep_free(planner, door, 0.75)
    windows = {"bathroom": 0.35, "storage": 0.5}.get(kind, 1.45)
    for _ in range(rng.poisson(windows)):
        size = planner.size("window")
        if kind == "bathroom":
            size = size * np.array([1, 0.6, 0.75], np.float32)
        bottom = float(np.clip(rng.normal(0.95, 0.3), 0.3, max(planner.height - size[2] - 0.1, 0.3)))
        row = planner.against_wall("window", size, z=bottom, gap=(0.0, 0.0), corner=0.0)
        if row is not None and rng.random() < (0.3 if kind == "office" else 0.6):
            _hang_curtain(planner, row)
    if kind in ("bedroom", "living", "studio") and rng.random() < 0.3:  # drawn across a wall
        size = planner.size("curtain")
        planner.against_wall("curtain", size, z=max(0.02, 2.15 - size[2]), gap=(0.02, 0.08))


def _keep_free(planner: RoomPlanner, item: Placement, depth: float) -> None:
    """Blocks the floor before an object."""
    reach = float(item.size[0]) / 2 + depth / 2
    xy = item.position[:2] + reach * np.array([np.cos(item.yaw), np.sin(item.yaw)])
    planner.block([*xy, depth, float(item.size[1])], item.yaw)


def _open_door(planner: RoomPlanner) -> None:
    """An open door leaf, hinged at a wall."""
    rng = planner.rng
    size = planner.size("door:open")
    wall = planner.walls[int(rng.integers(len(planner.walls)))]
    width = float(size[1])
    if wall.length < width + 0.5:
        return
    hinge = wall.start + rng.uniform(0.15, wall.length - width - 0.1) * wall.direction + 0.08 * wall.normal
    angle = rng.uniform(0.35, 1.75)  # from closed
    base = np.arctan2(wall.direction[1], wall.direction[0])
    leaf = base - angle  # the wall runs clockwise, so the room is on the right of its direction
    xy = hinge + width / 2 * np.array([np.cos(leaf), np.sin(leaf)])
    row = planner.place("door:open", xy, leaf - np.pi / 2, size)
    if row is not None:
        middle = hinge + width / 2 * wall.direction + 0.45 * wall.normal
        planner.block([*middle, width, 0.8], base)


def _hang_curtain(planner: RoomPlanner, window: int) -> None:
    """A curtain before a window."""
    rng = planner.rng
    size = planner.size("curtain")
    base = planner.placements[window]
    size[1] = min(float(size[1]) * 0.6 + 0.55 * float(base.size[1]), 3.2)
    top = min(float(base.position[2] + base.size[2]) + 0.15, planner.height - 0.05)
    size[2] = min(size[2], top - 0.03) if rng.random() < 0.6 else top - rng.uniform(0.03, 0.2)
    x = float(base.size[0] + size[0]) / 2 + 0.01
    planner.relative(window, "curtain", [x, 0.0, top - float(size[2]) - float(base.position[2])], 0.0, size)


def place_chairs_around(planner: RoomPlanner, table: int, count: int, kind: str) -> None:
    """Chairs along the sides of a table, tucked in, pulled out or turned."""
    rng = planner.rng
    d, w, _ = (float(v) for v in planner.placements[table].size)
    slots = [(side, y) for side in (0.0, np.pi) for y in _spread(w, 0.66)]
    slots += [(side, y) for side in (np.pi / 2, -np.pi / 2) for y in _spread(d, 0.8)]
    chair = planner.size(kind)
    for row in rng.permutation(len(slots))[:count]:
        side, offset = slots[row]
        half = d / 2 if abs(np.sin(side)) < 0.5 else w / 2
        pull = rng.uniform(-0.18, 0.12) if rng.random() < 0.7 else rng.uniform(0.12, 0.45)
        reach = half + float(chair[0]) / 2 + pull
        x, y = np.cos(side) * reach - np.sin(side) * offset, np.sin(side) * reach + np.cos(side) * offset
        turn = rng.uniform(-np.pi, np.pi) if rng.random() < 0.12 else rng.normal(0, 0.15)
        size = chair * rng.uniform(0.98, 1.02, 3).astype(np.float32)
        planner.relative(
            table, kind, [x, y, 0.0], side + np.pi + turn, size, ignore=(table,) if abs(turn) < 0.4 else ()
        )


def _spread(length: float, pitch: float) -> np.ndarray:
    """Places along a side of a table."""
    count = max(1, int(length / pitch))
    return (np.arange(count) - (count - 1) / 2) * length / count


def litter(planner: RoomPlanner, anchor: int | None, kinds, mean: float) -> None:
    """Puts a few small things on top of an object."""
    if anchor is None:
        return
    for _ in range(planner.rng.poisson(mean)):
        planner.on_top(anchor, str(planner.rng.choice(kinds)))


def hang_pictures(planner: RoomPlanner, mean: float) -> None:
    """Hangs pictures at eye height."""
    rng = planner.rng
    for _ in range(rng.poisson(mean)):
        size = planner.size("picture")
        top = planner.height - float(size[2]) - 0.1
        planner.against_wall(
            "picture", size, z=min(rng.uniform(1.0, 1.75), top), gap=(0.0, 0.005), corner=0.0
        )


def place_bins(planner: RoomPlanner, chance: float) -> None:
    """Stands garbage bins along the walls: none, one or several."""
    rng = planner.rng
    while rng.random() < chance:
        stand_bin(planner)
        chance *= 0.75


def stand_bin(planner: RoomPlanner) -> None:
    """Stands a garbage bin beside a desk, a table, a cabinet or another bin, else at a wall."""
    rng = planner.rng
    styles = ["office", "small", "recycle", "pedal", "wheelie"]
    kind = "garbage_bin:" + str(rng.choice(styles, p=[0.28, 0.22, 0.27, 0.15, 0.08]))
    if rng.random() < 0.6:
        hosts = ("desk", "table", "cabinet", "counter", "garbage_bin", "toilet")
        if place_beside(planner, kind, hosts) is not None:
            return
    planner.against_wall(kind, gap=(0.0, 0.1), turn=0.2, corner=0.4)


def place_beside(planner: RoomPlanner, kind: str, hosts=None, tries: int = 3) -> int | None:
    """Stands a thing on the floor right beside one already placed, touching it or nearly so.

    Args:
      planner: the room.
      kind: key of `FURNITURE_SIZES`.
      hosts: classes of objects that it may stand beside, or None for any on the floor.
      tries: places tried before giving up.

    Returns:
      Its row of `placements`, or None.
    """
    rng = planner.rng
    rows = [
        row
        for row, item in enumerate(planner.placements)
        if (hosts is None or item.kind.startswith(hosts)) and item.size[2] > 0.1 and item.position[2] < 1.0
    ]
    if not rows:
        return None
    size = planner.size(kind)
    for _ in range(tries):
        anchor = rows[int(rng.integers(len(rows)))]
        base = planner.placements[anchor]
        d, w = float(base.size[0]), float(base.size[1])
        gap = 0.006 + max(0.0, rng.normal(0.0, 0.06))
        if rng.random() < 0.65:  # at its side
            back = (float(size[0]) - d) / 2
            x = rng.uniform(min(back, -back), max(back, -back))
            y = float(rng.choice([-1, 1])) * ((w + float(size[1])) / 2 + gap)
        else:
            x, y = (d + float(size[0])) / 2 + gap, rng.uniform(-w, w) / 2
        row = planner.relative(anchor, kind, [x, y, -float(base.position[2])], 0.0, size)
        if row is not None:
            return row
    return None


def place_desk(planner: RoomPlanner, wall_desk: bool = True) -> int | None:
    """A desk with things on it and a chair before it."""
    rng = planner.rng
    style = str(rng.choice(["plain", "drawers", "corner", "hutch"], p=[0.34, 0.3, 0.12, 0.24]))
    kind = f"desk:{style}"
    if wall_desk or style == "corner":
        desk = planner.against_wall(kind, turn=0.01, corner=0.3)
    else:
        desk = planner.anywhere(kind, yaw=float(rng.integers(4)) * np.pi / 2 + rng.normal(0, 0.03))
    if desk is None:
        return None
    item = planner.placements[desk]
    if style != "hutch":
        litter(planner, desk, DESK_CLUTTER, 2.2)
    if rng.random() < 0.85:
        x, y, ex, _ = footprint_solids(item.kind, item.size)[0]
        chair = str(rng.choice(["chair:office", "chair:dining", "chair:shell"], p=[0.65, 0.15, 0.2]))
        size = planner.size(chair)
        for _ in range(4):
            pull = rng.uniform(-0.2, 0.4)
            y = rng.uniform(-0.2, 0.2) + (0.3 if style == "corner" else 0.0)
            turn = rng.uniform(-np.pi, np.pi) if pull > 0.15 and rng.random() < 0.4 else rng.normal(0, 0.2)
            offset = [x + ex / 2 + float(size[0]) / 2 + pull, y, 0.0]
            if (
                planner.relative(desk, chair, offset, np.pi + turn, size, (desk,) if pull < 0.1 else ())
                is not None
            ):
                break
    return desk


def place_dining_set(planner: RoomPlanner, most: int = 6) -> None:
    """A table in the room with chairs around it."""
    rng = planner.rng
    kind = str(rng.choice(["table:dining", "table:round"], p=[0.65, 0.35]))
    yaw = float(rng.integers(4)) * np.pi / 2 + rng.normal(0, 0.5 if rng.random() < 0.15 else 0.04)
    table = planner.anywhere(kind, yaw=yaw, tries=20)
    if table is not None:
        chair = str(rng.choice(["chair:dining", "chair:shell"], p=[0.7, 0.3]))
        place_chairs_around(planner, table, int(rng.integers(2, most + 2)), chair)
        litter(planner, table, TABLE_CLUTTER, 1.5)


def place_seating(planner: RoomPlanner, most: int = 2) -> None:
    """A sofa with a table before it, and more seats around that table."""
    rng = planner.rng
    kind = "sofa:" + str(rng.choice(["two", "three", "corner"], p=[0.42, 0.36, 0.22]))
    sofa = planner.against_wall(kind, gap=(0.0, 0.15), turn=0.02, tries=20)
    if sofa is None:
        return
    if rng.random() < 0.3:
        item = planner.placements[sofa]
        planner.relative(sofa, "rug", [float(item.size[0]) / 2 + 0.9, 0.0, 0.0], 0.0)
    x, y, ex, _ = footprint_solids(kind, planner.placements[sofa].size)[0]
    table = None
    if rng.random() < 0.85:
        size = planner.size("table:coffee")
        shift = 0.4 if kind == "sofa:corner" else rng.normal(0, 0.1)
        offset = [x + ex / 2 + float(size[0]) / 2 + rng.uniform(0.25, 0.5), y + shift, 0.0]
        table = planner.relative(sofa, "table:coffee", offset, rng.normal(0, 0.05), size)
        litter(planner, table, TABLE_CLUTTER, 1.2)
    for _ in random_times(rng, 0, most):
        seat = str(rng.choice(["chair:arm", "sofa:one", "sofa:two"], p=[0.5, 0.25, 0.25]))
        size = planner.size(seat)
        if table is not None:
            side = float(rng.choice([np.pi / 2, -np.pi / 2, 0.0]))
            half = planner.placements[table].size[0 if side == 0.0 else 1] / 2
            reach = float(half + size[0] / 2) + rng.uniform(0.25, 0.6)
            offset = [np.cos(side) * reach, np.sin(side) * reach, 0.0]
            if planner.relative(table, seat, offset, side + np.pi + rng.normal(0, 0.15), size) is not None:
                continue
        planner.against_wall(seat, size, gap=(0.02, 0.2), turn=0.15)
    if rng.random() < 0.5:
        width = float(planner.placements[sofa].size[1])
        size = planner.size("table:side")
        stand = planner.relative(
            sofa, "table:side", [0.0, width / 2 + float(size[1]) / 2 + 0.08, 0.0], 0.0, size
        )
        litter(planner, stand, ("table_lamp", "cup", "book_pile"), 1.0)


def place_television(planner: RoomPlanner) -> None:
    """A low cabinet with a television on it."""
    unit = planner.against_wall("cabinet:low", gap=(0.0, 0.05))
    if unit is not None and planner.rng.random() < 0.8:
        planner.on_top(unit, "television", yaw=0.0)


def place_shelves(planner: RoomPlanner, low: int, high: int) -> None:
    """Stands bookshelves along the walls."""
    for _ in random_times(planner.rng, low, high):
        style = str(planner.rng.choice(["tall", "wide", "low"], p=[0.4, 0.4, 0.2]))
        planner.against_wall(f"bookshelf:{style}", gap=(0.0, 0.03), corner=0.4)


def place_bed(planner: RoomPlanner) -> None:
    """A bed with its head to a wall, and night stands beside it."""
    rng = planner.rng
    style = str(rng.choice(["double", "single", "bunk"], p=[0.6, 0.25, 0.15]))
    bed = planner.against_wall(f"bed:{style}", tries=25, corner=0.3, turn=0.01)
    if bed is None:
        return
    size = planner.placements[bed].size
    for side in (-1, 1):
        if rng.random() < 0.6:
            stand = planner.size("night_stand")
            offset = [float(stand[0] - size[0]) / 2, side * (float(size[1] + stand[1]) / 2 + 0.05), 0.0]
            row = planner.relative(bed, "night_stand", offset, 0.0, stand)
            litter(planner, row, ("table_lamp", "book_pile", "cup", "bottle"), 1.0)


def place_kitchen(planner: RoomPlanner) -> None:
    """A counter with a basin, cabinets below and above it, a stove and a refrigerator beside it."""
    rng = planner.rng
    corner = rng.random() < 0.4
    kind = "counter:corner" if corner else "counter:straight"
    top = float(rng.uniform(0.84, 0.94))
    counter, size = None, None
    for shrink in (1.0, 0.85, 0.7):
        size = planner.size(kind) * np.array([shrink if corner else 1.0, shrink, 1.0], np.float32)
        sink = planner.size("sink:basin")
        solid = footprint_solids(kind, size)[0]
        free = solid[3] / 2 - float(sink[1]) / 2 - 0.12
        shift = float(rng.uniform(-free if not corner else -0.1 * free, free)) if free > 0 else 0.0
        sink[0] = min(sink[0], 0.8 * solid[2])
        half = 0.85 * sink / 2
        hole = (shift - half[1], shift + half[1], solid[0] - half[0], solid[0] + half[0])
        has_sink = rng.random() < 0.9 and free > 0
        counter = planner.against_wall(
            kind, size, z=top, gap=(0.0, 0.0), tries=10, corner=0.4, hole=hole if has_sink else None
        )
        if counter is not None:
            break
    if counter is None or size is None:
        return
    stack = [counter]
    d, w, h = (float(v) for v in size)
    if has_sink:
        slab = min(0.06, 0.3 * h)
        row = planner.relative(
            counter, "sink:basin", [solid[0], shift, slab - 0.62 * float(sink[2]) + 0.004], 0.0, sink, stack
        )
        stack += [row] if row is not None else []
    depth = solid[2] - 0.03
    cabinets = 1 if rng.random() < 0.35 else max(1, int(w / 1.1 + rng.random()))
    for k in range(cabinets):
        y = -w / 2 + (k + 0.5) * w / cabinets
        offset = [-d / 2 + depth / 2, y, -top]
        planner.relative(counter, "cabinet:base", offset, 0.0, [depth, w / cabinets - 0.004, top], stack)
    if corner:
        x, y, ex, ey = footprint_solids(kind, size)[1]
        offset = [x + 0.02, y - 0.015, -top]
        planner.relative(counter, "cabinet:base", offset, np.pi / 2, [ey - 0.03, ex - 0.05, top], stack)
    y = -w / 2
    while rng.random() < 0.8 and y < w / 2 - 0.4:
        upper = planner.size("cabinet:wall")
        y += float(upper[1]) / 2
        if y + float(upper[1]) / 2 > w / 2:
            break
        bottom = min(rng.uniform(0.5, 0.6), planner.height - top - float(upper[2]) - 0.02)
        planner.relative(
            counter, "cabinet:wall", [-d / 2 + float(upper[0]) / 2, y, bottom], 0.0, upper, stack
        )
        y += float(upper[1]) / 2 + 0.005
    appliances = (
        ["refrigerator:full" if rng.random() < 0.75 else "refrigerator:mini"] if rng.random() < 0.85 else []
    )
    appliances += ["stove"] if rng.random() < 0.7 else []
    for item in appliances:
        extra = planner.size(item)
        offset = [(float(extra[0]) - d) / 2, w / 2 + float(extra[1]) / 2 + 0.03, -top]
        if planner.relative(counter, item, offset, 0.0, extra) is None:
            planner.against_wall(item, extra, gap=(0.0, 0.05), corner=0.5, tries=20)


def hang_shower_curtain(planner: RoomPlanner, tub: int) -> None:
    """A shower curtain, gathered or drawn, over the front edge of a tub."""
    rng = planner.rng
    depth, width, _ = (float(v) for v in planner.placements[tub].size)
    for end in rng.permutation([-1, 1])[: 2 if rng.random() < 0.3 else 1]:
        size = planner.size("shower_curtain")
        if rng.random() < 0.2:
            size[1] = min(size[1] * 2.0, 0.95 * width)
        bottom = min(rng.uniform(0.15, 0.35), planner.height - float(size[2]) - 0.05)
        y = end * (width - float(size[1])) / 2
        planner.relative(tub, "shower_curtain", [depth / 2 - 0.02, y, bottom], 0.0, size, (tub,))


def place_vanity(planner: RoomPlanner) -> None:
    """A wall-hung basin, or a basin in a counter over a cabinet; often a mirror above."""
    rng = planner.rng
    if rng.random() < 0.5:
        size = planner.size("sink:wall")
        row = planner.against_wall(
            "sink:wall", size, z=0.88 - 0.62 * float(size[2]), gap=(0.0, 0.005), tries=25
        )
        height = 0.3
    else:
        sink = planner.size("sink:basin")
        size = np.array([0.58, rng.uniform(0.9, 1.7), 0.2], np.float32)
        half = 0.85 * sink / 2
        hole = (-half[1], half[1], -half[0], half[0])
        row = planner.against_wall("counter:straight", size, z=0.8, gap=(0.0, 0.0), hole=hole, tries=25)
        if row is None:
            row = planner.against_wall("sink:wall", z=0.62, gap=(0.0, 0.005), tries=25)
        else:
            basin = planner.relative(
                row, "sink:basin", [0.0, 0.0, 0.06 - 0.62 * float(sink[2]) + 0.004], 0.0, sink, (row,)
            )
            ignore = (row,) if basin is None else (row, basin)
            planner.relative(
                row, "cabinet:base", [-0.015, 0.0, -0.8], 0.0, [0.55, float(size[1]), 0.8], ignore
            )
        height = 0.35
    if row is not None and rng.random() < 0.75:
        base = planner.placements[row]
        planner.relative(row, "mirror", [-float(base.size[0]) / 2 + 0.025, 0.0, height], 0.0)


def random_times(rng: np.random.Generator, low: int, high: int) -> range:
    """Gives a range of a random length between two bounds, both included."""
    return range(int(rng.integers(low, high + 1)))
