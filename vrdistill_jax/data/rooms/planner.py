"""Where things may stand in a room: walls, free floor, no two things in the same place."""

from typing import NamedTuple

import numpy as np

from vrdistill_jax.data.rooms.furniture import class_from_kind, footprint_solids, sample_size

_MARGIN = 0.004  # metres that boxes may share: touching is fine
_CLEAR_BELOW = ("counter", "sink:wall")  # what hangs over the floor and yet keeps it free


class Wall(NamedTuple):
    """A wall: objects against it face along `normal`, and their own +y runs along `direction`."""

    start: np.ndarray  # f64[2] metres
    direction: np.ndarray  # f64[2] unit
    normal: np.ndarray  # f64[2] unit, into the room
    length: float
    inner_start: (
        bool  # whether a wall meets this one at its start and stands out into the room (not a convex corner)
    )


class Placement(NamedTuple):
    """One object in a room."""

    kind: str
    size: np.ndarray  # f32[3] depth, width, height
    position: np.ndarray  # f64[3] middle of its bottom
    yaw: float  # radians
    options: dict  # for its builder


class RoomPlanner:
    """Places objects one by one, refusing what would overlap or leave the room."""

    def __init__(self, rng: np.random.Generator, extent, height: float, notch=None, size_scale=None) -> None:
        """Starts with an empty room.

        Args:
          rng: random numbers.
          extent: x and y extents of the room's rectangle, metres, centred on the origin.
          height: metres.
          notch: None, or (sign x, sign y, extent x, extent y) of a corner that is cut out of the rectangle.
          size_scale: factors on depth, width, height per class name; 1 where absent.
        """
        self.rng = rng
        self.extent = np.asarray(extent, float)
        self.height = height
        self.placements: list[Placement] = []
        self.outline = room_outline(self.extent, notch)
        self.walls = walls_from_outline(self.outline)
        self._size_scale = size_scale or {}
        self._rectangles = np.zeros((256, 8))  # centre x, y, half x, half y, cos, sin, z low, z high
        self._owner = np.full(256, -1)
        self._count = 0
        if notch is not None:
            sx, sy, nx, ny = notch
            center = np.array([sx, sy]) * (self.extent - [nx, ny]) / 2
            self.block([*center, nx, ny], 0.0, low=-1.0, high=10.0)

    def size(self, kind: str) -> np.ndarray:
        """Draws a size for a kind of object, f32[3] metres."""
        return sample_size(self.rng, kind, self._size_scale.get(class_from_kind(kind), (1.0, 1.0, 1.0)))

    def block(self, rectangle, yaw: float, low: float = 0.05, high: float = 2.0) -> None:
        """Keeps a rectangle (centre x, y, extent x, y) free of objects between two heights."""
        cx, cy, ex, ey = rectangle
        self._append(np.array([[cx, cy, ex / 2, ey / 2, np.cos(yaw), np.sin(yaw), low, high]]), -1)

    def place(self, kind: str, position, yaw: float, size=None, ignore=(), **options) -> int | None:
        """Puts an object at a place if it fits there.

        Args:
          kind: key of `FURNITURE_SIZES`.
          position: f64[3] middle of its bottom (z may be left out: 0).
          yaw: radians; 0 faces +x.
          size: f32[3] metres, or None to draw one.
          ignore: rows of `placements` that it may overlap by design.
          **options: for its builder.

        Returns:
          Its row of `placements`, or None where it does not fit.
        """
        size = self.size(kind) if size is None else np.asarray(size, np.float32)
        position = np.array([*position, 0.0][:3], float)
        rectangles = self._rectangles_of(kind, size, position, yaw)
        if not self._is_inside(rectangles) or self._overlaps(rectangles, ignore):
            return None
        self._append(rectangles, len(self.placements))
        self.placements.append(Placement(kind, size, position, float(yaw), options))
        return len(self.placements) - 1

    def against_wall(
        self, kind: str, size=None, z: float = 0.0, gap=(0.0, 0.04), turn: float = 0.0, tries: int = 12,
        wall: int | None = None, along: float | None = None, corner: float = 0.25, ignore=(), **options,
    ) -> int | None:  # fmt: skip
        """Puts an object with its back to a wall.

        Args:
          kind: key of `FURNITURE_SIZES`; corner furniture goes to the corner where the wall starts.
          size: f32[3] metres, or None to draw one.
          z: metres, height of its bottom.
          gap: range of the distance to the wall, metres.
          turn: standard deviation of the yaw, radians.
          tries: places tried before giving up.
          wall: row of `walls`, or None for any.
          along: middle of the object along the wall, metres from its start, or None for any.
          corner: probability of standing in a corner.
          ignore: rows of `placements` that it may overlap by design.
          **options: for its builder.

        Returns:
          Its row of `placements`, or None where it does not fit.
        """
        size = self.size(kind) if size is None else np.asarray(size, np.float32)
        depth, width, _ = (float(v) for v in size)
        lengths = np.array([w.length for w in self.walls]) - width
        if kind.endswith(":corner"):
            lengths[[not w.inner_start for w in self.walls]] = -1
        if wall is None and (lengths <= 0).all():
            return None
        for _ in range(tries):
            row = wall
            if row is None:
                chance = np.maximum(lengths, 0) + 0.3 * (lengths > 0)
                row = int(self.rng.choice(len(chance), p=chance / chance.sum()))
            side, room = self.walls[row], lengths[row]
            if room < 0:
                return None
            middle = along
            if kind.endswith(":corner"):
                middle = width / 2 + 0.002
            elif middle is None:
                middle = width / 2 + room * self.rng.random()
                if self.rng.random() < corner:
                    slack = min(room, 0.01 + 0.1 * self.rng.random())
                    middle = width / 2 + (slack if self.rng.random() < 0.5 else room - slack)
            yaw = float(np.arctan2(side.normal[1], side.normal[0])) + turn * self.rng.standard_normal()
            reach = (
                depth / 2
                + self.rng.uniform(*gap)
                + abs(np.sin(yaw - np.arctan2(*side.normal[::-1]))) * width / 2
            )
            xy = side.start + middle * side.direction + (reach + 0.002) * side.normal
            placed = self.place(kind, [*xy, z], yaw, size, ignore, **options)
            if placed is not None:
                return placed
            if wall is not None and along is not None and turn == 0.0:
                return None
        return None

    def relative(
        self, anchor: int, kind: str, offset, yaw: float, size=None, ignore=(), **options
    ) -> int | None:
        """Puts an object at an offset (x, y, z) and yaw in the frame of one already placed."""
        base = self.placements[anchor]
        c, s = np.cos(base.yaw), np.sin(base.yaw)
        x, y, z = offset
        position = base.position + np.array([c * x - s * y, s * x + c * y, z])
        return self.place(kind, position, base.yaw + yaw, size, ignore, **options)

    def anywhere(
        self, kind: str, size=None, yaw: float | None = None, tries: int = 12, **options
    ) -> int | None:
        """Puts an object on free floor; at a random yaw where none is given."""
        size = self.size(kind) if size is None else np.asarray(size, np.float32)
        for _ in range(tries):
            xy = (self.rng.random(2) - 0.5) * np.maximum(self.extent - 0.3, 0.1)
            turn = self.rng.uniform(-np.pi, np.pi) if yaw is None else yaw
            placed = self.place(kind, xy, turn, size, **options)
            if placed is not None:
                return placed
        return None

    def on_top(self, anchor: int, kind: str, yaw: float | None = None, tries: int = 4) -> int | None:
        """Puts a small object on another one, at a random place of its top."""
        base = self.placements[anchor]
        x, y, ex, ey = footprint_solids(base.kind, base.size)[0]
        size = self.size(kind)
        reach = 0.5 * np.hypot(size[0], size[1])
        half = np.array([ex / 2, ey / 2]) - min(reach, 0.5 * float(size[:2].min()) + 0.02)
        if (half < 0).any():
            return None
        for _ in range(tries):
            offset = np.array([x, y]) + self.rng.uniform(-half, half)
            turn = self.rng.normal(0, 0.3) if yaw is None else yaw
            placed = self.relative(anchor, kind, [*offset, float(base.size[2]) + 0.001], turn, size)
            if placed is not None:
                return placed
        return None

    def is_free(self, xy, radius: float, low: float, high: float) -> bool:
        """Tells whether a square of half extent `radius` around a place is inside and free."""
        rectangle = np.array([[*xy, radius, radius, 1.0, 0.0, low, high]])
        return self._is_inside(rectangle) and not self._overlaps(rectangle, (), solids_only=True)

    def _rectangles_of(self, kind, size, position, yaw) -> np.ndarray:
        solids = footprint_solids(kind, size)
        c, s = np.cos(yaw), np.sin(yaw)
        out = np.empty((len(solids), 8))
        out[:, 0] = position[0] + c * solids[:, 0] - s * solids[:, 1]
        out[:, 1] = position[1] + s * solids[:, 0] + c * solids[:, 1]
        out[:, 2:4] = solids[:, 2:] / 2
        low = 0.0 if kind.startswith(_CLEAR_BELOW) else position[2]
        out[:, 4:] = c, s, low, position[2] + float(size[2])
        return out

    def _append(self, rectangles: np.ndarray, owner: int) -> None:
        end = self._count + len(rectangles)
        if end > len(self._rectangles):
            self._rectangles = np.concatenate([self._rectangles, np.zeros_like(self._rectangles)])
            self._owner = np.concatenate([self._owner, np.full_like(self._owner, -1)])
        self._rectangles[self._count : end] = rectangles
        self._owner[self._count : end] = owner
        self._count = end

    def _is_inside(self, rectangles: np.ndarray) -> bool:
        x, y, hx, hy, c, s = rectangles.T[:6]
        reach_x = np.abs(c) * hx + np.abs(s) * hy
        reach_y = np.abs(s) * hx + np.abs(c) * hy
        half = self.extent / 2 + 1e-6
        return bool((np.abs(x) + reach_x <= half[0]).all() and (np.abs(y) + reach_y <= half[1]).all())

    def _overlaps(self, rectangles: np.ndarray, ignore, solids_only: bool = False) -> bool:
        others = self._rectangles[: self._count]
        owner = self._owner[: self._count]
        candidates = np.ones(self._count, bool)
        for row in ignore:
            candidates &= owner != row
        if solids_only:  # areas kept free for doors are fine, the cut-out corner is not
            candidates &= (owner >= 0) | (others[:, 7] > 5)
        return any(overlapping_boxes(rectangle, others[candidates]).any() for rectangle in rectangles)


def overlapping_boxes(box: np.ndarray, others: np.ndarray, margin: float = _MARGIN) -> np.ndarray:
    """Tells which upright boxes share space with one (separating axes in the plane, intervals in height).

    Args:
      box: f64[8] centre x, y, half extents, cos and sin of the yaw, low and high z; metres.
      others: f64[n, 8].
      margin: metres of penetration that do not count.

    Returns:
      bool[n].
    """
    shared = (np.minimum(box[7], others[:, 7]) - np.maximum(box[6], others[:, 6])) > margin
    delta = others[:, :2] - box[:2]
    c, s = box[4], box[5]
    oc, os_ = others[:, 4], others[:, 5]
    cos, sin = np.abs(c * oc + s * os_), np.abs(c * os_ - s * oc)
    hx, hy, ox, oy = box[2], box[3], others[:, 2], others[:, 3]
    shared &= np.abs(c * delta[:, 0] + s * delta[:, 1]) < hx + ox * cos + oy * sin - margin
    shared &= np.abs(-s * delta[:, 0] + c * delta[:, 1]) < hy + ox * sin + oy * cos - margin
    shared &= np.abs(oc * delta[:, 0] + os_ * delta[:, 1]) < ox + hx * cos + hy * sin - margin
    shared &= np.abs(-os_ * delta[:, 0] + oc * delta[:, 1]) < oy + hx * sin + hy * cos - margin
    return shared


def room_outline(extent, notch=None) -> np.ndarray:
    """Gives the corners of a rectangular or L-shaped room, counter-clockwise, f64[4 or 6, 2] metres."""
    x, y = np.asarray(extent, float) / 2
    if notch is None:
        return np.array([[-x, -y], [x, -y], [x, y], [-x, y]])
    sx, sy, nx, ny = notch
    corners = np.array([[-x, -y], [x, -y], [x, y - ny], [x - nx, y - ny], [x - nx, y], [-x, y]])
    corners = corners * [sx, sy]
    return corners if sx * sy > 0 else corners[::-1]


def walls_from_outline(outline: np.ndarray) -> list[Wall]:
    """Makes the walls of a counter-clockwise outline; each runs clockwise, as its objects' +y does."""
    walls = []
    count = len(outline)
    for row in range(count):
        end, start, before = outline[row], outline[(row + 1) % count], outline[(row + 2) % count]
        edge = end - start
        length = float(np.hypot(*edge))
        direction = edge / length
        normal = np.array([direction[1], -direction[0]])
        turn = start - end
        after = before - start
        inner = turn[0] * after[1] - turn[1] * after[0] > 0
        walls.append(Wall(start, direction, normal, length, bool(inner)))
    return walls
