"""Furniture and fittings that stand against walls or belong to them, built from parts."""

import numpy as np

from vrdistill_jax.data.rooms.furniture_common import (
    DARK,
    STEEL,
    WHITE,
    add_books,
    add_fronts,
    add_legs,
    corner_arms,
    fabric_color,
    paint_color,
    wood_color,
)


def build_cabinet(mesh, rng, d, w, h, kind="base") -> None:
    """Doors and drawers on a box; base cabinets are open on top, so that a basin may hang in them."""
    body = wood_color(rng) if rng.random() < 0.6 else paint_color(rng)
    front = body if rng.random() < 0.6 else paint_color(rng)
    plinth = 0.0 if kind == "wall" else 0.07
    back, face, t = -d / 2, d / 2 - 0.032, 0.03
    if kind == "low" and rng.random() < 0.5:
        plinth = 0.15
        add_legs(mesh, rng, d - 0.08, w - 0.08, plinth, body, 0.04)
    elif plinth:
        mesh.box([back, -w / 2 + 0.02, 0], [face - 0.06, w / 2 - 0.02, plinth], DARK)
    if kind == "base":  # open on top: a counter with a basin may lie on it
        for y in (-w / 2, w / 2 - t):
            mesh.box([back, y, plinth], [face, y + t, h], body)
        mesh.box([back, -w / 2, plinth], [back + t, w / 2, h], body)
        mesh.box([face - t, -w / 2, plinth], [face - 0.02, w / 2, h], body)
        mesh.box([back, -w / 2, plinth], [face, w / 2, plinth + t], body)
    else:
        mesh.box([back, -w / 2, plinth], [face - 0.02, w / 2, h], body)
    columns = max(1, round(w / 0.5))
    edges = np.linspace(-w / 2, w / 2, columns + 1)
    pull_out = int(rng.integers(columns)) if kind == "base" and rng.random() < 0.6 else -1
    for k in range(columns):
        drawers = {"file": max(2, round(h / 0.33)), "low": int(rng.integers(0, 3))}.get(
            kind, 3 if k == pull_out else 0
        )
        top_row = kind == "tall" and h > 1.7 and rng.random() < 0.4
        split = plinth + 0.68 * (h - plinth) if top_row else h
        add_fronts(mesh, rng, face, edges[k], edges[k + 1], plinth, split, front, drawers, 1)
        if top_row:
            add_fronts(mesh, rng, face, edges[k], edges[k + 1], split, h, front, 0, 1)
    if kind == "wall":
        mesh.box([back, -w / 2, -0.02], [face, w / 2, 0.0], body)


def build_bookshelf(mesh, rng, d, w, h) -> None:
    """Sides, boards and rows of books, with or without a back."""
    wood, t = wood_color(rng) if rng.random() < 0.75 else WHITE * 0.9, 0.025
    for y in (-w / 2, w / 2 - t):
        mesh.box([-d / 2, y, 0], [d / 2, y + t, h], wood)
    has_back = rng.random() < 0.7
    if has_back:
        mesh.box([-d / 2, -w / 2, 0], [-d / 2 + 0.012, w / 2, h], wood * 0.9)
    shelves = max(3, round(h / 0.34)) + 1
    levels = np.linspace(0.06, h - t, shelves)
    for z in levels:
        mesh.box([-d / 2, -w / 2, z], [d / 2, w / 2, z + t], wood)
    bays = max(1, round(w / 0.85))
    edges = np.linspace(-w / 2 + t, w / 2 - t, bays + 1)
    for y in edges[1:-1]:
        mesh.box([-d / 2, y - t / 2, 0], [d / 2, y + t / 2, h], wood)
    fill = rng.uniform(0.35, 1.0)
    for low, high in zip(levels[:-1], levels[1:], strict=True):
        for y0, y1 in zip(edges[:-1], edges[1:], strict=True):
            if rng.random() < 0.85:
                add_books(mesh, rng, -d / 2 + 0.02, d - 0.05, y0 + 0.01, y1 - 0.01, low + t, high, fill)


def build_door(mesh, rng, d, w, h, kind="closed") -> None:
    """A leaf with panels and knobs in a frame, or an open leaf alone."""
    color = wood_color(rng) if rng.random() < 0.5 else paint_color(rng)
    leaves = 2 if kind == "double" else 1
    frame = 0.0 if kind == "open" else 0.07
    absorption = rng.uniform(0.3, 0.9) if rng.random() < 0.35 else 0.0  # dark, glazed or half a gap
    if frame:
        trim = WHITE * 0.92 if rng.random() < 0.6 else color * 0.8
        for y in (-w / 2, w / 2 - frame):
            mesh.box([-d / 2, y, 0], [0.15 * d, y + frame, h], trim)
        mesh.box([-d / 2, -w / 2, h - frame], [0.15 * d, w / 2, h], trim)
    edges = np.linspace(-w / 2 + frame, w / 2 - frame, leaves + 1)
    style = rng.integers(3)
    for k, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        mesh.box([-0.45 * d, low, 0.005], [-0.05 * d, high, h - frame], color, absorption)
        for y0, y1, z0, z1 in _door_panels(style, low, high, h):
            mesh.box([-0.05 * d, y0, z0], [0.1 * d, y1, z1], color * 0.92, absorption)
        y = high - 0.08 if k == 0 else low + 0.08
        for side in (-1, 1) if kind == "open" else (1,):
            mesh.ellipsoid([side * d * 0.45 * 0.8, y, 1.0], [max(0.1 * d, 0.02), 0.035, 0.035], STEEL, 4, 6)
    mesh.box([-0.01, 0, 1.0], [d / 2, 0.001, 1.001], color)


def _door_panels(style, low, high, h):
    if style == 0:
        return []
    inset = 0.12
    if style == 1:
        return [(low + inset, high - inset, 0.15, 0.45 * h), (low + inset, high - inset, 0.52 * h, h - 0.2)]
    middle = (low + high) / 2
    columns = ((low + inset, middle - 0.05), (middle + 0.05, high - inset))
    return [(y0, y1, z0, z1) for y0, y1 in columns for z0, z1 in ((0.15, 0.5 * h), (0.56 * h, h - 0.2))]


def build_window(mesh, rng, d, w, h) -> None:
    """A frame with bars, panes that return almost nothing or blinds, and a sill."""
    color = WHITE * rng.uniform(0.8, 1.0) if rng.random() < 0.75 else wood_color(rng)
    t, front = rng.uniform(0.05, 0.09), -0.1 * d
    pane = 0.85 if rng.random() < 0.65 else rng.uniform(0.0, 0.6)  # the rest has drawn blinds
    for y in (-w / 2, w / 2 - t):
        mesh.box([-d / 2, y, 0], [front, y + t, h], color)
    for z in (0.0, h - t):
        mesh.box([-d / 2, -w / 2, z], [front, w / 2, z + t], color)
    columns, rows = max(1, round(w / 0.75)), int(rng.integers(1, 3))
    for y in np.linspace(-w / 2, w / 2, columns + 1)[1:-1]:
        mesh.box([-d / 2, y - t / 3, 0], [-0.2 * d, y + t / 3, h], color)
    for z in np.linspace(0, h, rows + 1)[1:-1]:
        mesh.box([-d / 2, -w / 2, z - t / 3], [-0.2 * d, w / 2, z + t / 3], color)
    mesh.box([-d / 2, -w / 2 + t, t], [-0.4 * d, w / 2 - t, h - t], (0.75, 0.85, 0.95), pane)
    mesh.box([-d / 2, -w / 2, 0], [d / 2, w / 2, 0.035], color)


def build_picture(mesh, rng, d, w, h) -> None:
    """A frame around a canvas of coloured patches."""
    frame, t = wood_color(rng) if rng.random() < 0.6 else DARK, min(0.05, 0.12 * min(w, h))
    for y in (-w / 2, w / 2 - t):
        mesh.box([-d / 2, y, 0], [d / 2, y + t, h], frame)
    for z in (0.0, h - t):
        mesh.box([-d / 2, -w / 2, z], [d / 2, w / 2, z + t], frame)
    rows, columns = 4, 4
    y, z = np.meshgrid(
        np.linspace(-w / 2 + t, w / 2 - t, columns + 1), np.linspace(t, h - t, rows + 1), indexing="ij"
    )
    tint = rng.uniform(0.1, 0.9, 3)
    patches = np.clip(tint + rng.normal(0, 0.2, (rows * columns, 3)), 0, 1).astype(np.float32)
    glass = rng.uniform(0.0, 0.8) if rng.random() < 0.7 else 0.0
    mesh.sheet(np.stack([np.full_like(y, 0.1 * d), y, z], -1), np.concatenate([patches, patches]), glass)


def build_counter(mesh, rng, d, w, h, corner=False, hole=None) -> None:
    """A worktop with a splash-back; `hole` (y0, y1, x0, x1) leaves room for a basin."""
    stone = rng.uniform(0.15, 0.9) * np.ones(3, np.float32) + rng.normal(0, 0.03, 3).astype(np.float32)
    stone = wood_color(rng) if rng.random() < 0.25 else np.clip(stone, 0.05, 0.97)
    t = min(0.06, 0.3 * h)
    back, side = corner_arms("counter:corner", (d, w)) if corner else (d, 0.0)
    x0 = -d / 2
    if hole is None:
        mesh.box([x0, -w / 2, 0], [x0 + back, w / 2, t], stone)
    else:
        y0, y1, hx0, hx1 = hole
        mesh.box([x0, -w / 2, 0], [x0 + back, y0, t], stone)
        mesh.box([x0, y1, 0], [x0 + back, w / 2, t], stone)
        mesh.box([x0, y0, 0], [hx0, y1, t], stone)
        mesh.box([hx1, y0, 0], [x0 + back, y1, t], stone)
    mesh.box([x0, -w / 2, t], [x0 + 0.025, w / 2, h], stone * 0.95)
    if corner:
        mesh.box([x0 + back, -w / 2, 0], [d / 2, -w / 2 + side, t], stone)
        mesh.box([x0, -w / 2, t], [d / 2, -w / 2 + 0.025, h], stone * 0.95)


def build_curtain(mesh, rng, d, w, h, rings=False) -> None:
    """A hanging cloth in folds, in one or two halves, on a rod."""
    color = paint_color(rng) if rings or rng.random() < 0.4 else fabric_color(rng)
    gap = rng.uniform(0.1, 0.5) * w if not rings and rng.random() < 0.4 else 0.0
    sheer = rng.uniform(0.2, 0.7) if rng.random() < 0.5 else 0.0
    halves = [(-w / 2, -gap / 2), (gap / 2, w / 2)] if gap else [(-w / 2, w / 2)]
    for y0, y1 in halves:
        folds = max(2.0, (y1 - y0) / rng.uniform(0.12, 0.2))
        s = np.linspace(0, 1, max(9, int(5 * folds)))
        v = np.linspace(0, 1, 5)[:, None]
        wave = np.sin(2 * np.pi * folds * s + rng.uniform(0, 6)) * (1 - 0.4 * v)
        x = d / 2 * np.clip(wave + 0.3 * np.sin(3 * s + rng.uniform(0, 6)), -1, 1)
        y = y0 + s * (y1 - y0) + 0.0 * v
        mesh.sheet(np.stack([x, y, (h - 0.03) * v + 0.0 * s], -1), color, sheer)
    if rings:
        for y in np.linspace(-w / 2, w / 2, 5):
            mesh.cylinder([0, y, h - 0.05], [0, y + 0.01, h - 0.01], 0.02, STEEL, sides=6)
    mesh.cylinder([0, -w / 2, h - 0.02], [0, w / 2, h - 0.02], 0.02, STEEL * (1 if rings else 0.6), sides=6)


def build_refrigerator(mesh, rng, d, w, h, mini=False) -> None:
    """A box with a freezer door, a cooler door and long handles."""
    color = WHITE * 0.95 if rng.random() < 0.5 else STEEL * rng.uniform(0.7, 1.0)
    color = DARK * 1.3 if rng.random() < 0.12 else color
    face = d / 2 - 0.045
    mesh.box([-d / 2, -w / 2, 0.03], [face - 0.06, w / 2, h], color * 0.9)
    mesh.box([-d / 2 + 0.03, -w / 2 + 0.03, 0], [face - 0.09, w / 2 - 0.03, 0.03], DARK)
    style = rng.integers(3)
    side = rng.choice([-1, 1]) * (w / 2 - 0.07)
    if style == 2 and not mini:  # side by side
        for y0, y1, y in ((-w / 2, -0.006, -0.05), (0.006, w / 2, 0.05)):
            mesh.box([face - 0.055, y0, 0.06], [face, y1, h], color)
            mesh.box([face, y - 0.015, 0.35 * h], [d / 2, y + 0.015, 0.8 * h], STEEL * 0.85)
        return
    split = h * (rng.uniform(0.64, 0.72) if style else rng.uniform(0.36, 0.44))
    for z0, z1 in ((0.06, split - 0.008), (split + 0.008, h)):
        mesh.box([face - 0.055, -w / 2, z0], [face, w / 2, z1], color)
        low, high = (max(z0, z1 - 0.5), z1 - 0.06) if z1 < h - 0.1 else (z0 + 0.04, min(z1 - 0.04, z0 + 0.4))
        mesh.box([face, side - 0.015, low], [d / 2, side + 0.015, high], STEEL * 0.85)


def build_toilet(mesh, rng, d, w, h) -> None:
    """A tank against the wall, a bowl with a seat and a foot; the lid is up or down."""
    white = WHITE * rng.uniform(0.93, 1.0)
    tank, seat = rng.uniform(0.17, 0.22), h * rng.uniform(0.52, 0.58)
    x0 = -d / 2
    mesh.box([x0, -w / 2, seat - 0.02], [x0 + tank, w / 2, h - 0.04], white)
    mesh.box([x0 - 0.0, -w / 2, h - 0.04], [x0 + tank + 0.015, w / 2, h], white * 0.97)
    middle, reach = (x0 + tank + d / 2) / 2, (d / 2 - x0 - tank) / 2
    bowl = 0.42 * w
    mesh.cylinder([middle - 0.05, 0, 0], [middle - 0.02, 0, seat - 0.12], 0.6 * bowl, white, 0.75 * bowl, 12)
    angle = 2 * np.pi * np.arange(17) / 16
    rings = [(0.75, -0.14), (1.0, -0.02), (1.0, 0.0), (0.72, 0.0), (0.5, -0.12), (0.1, -0.15)]
    points = [
        np.stack([middle + f * reach * np.cos(angle), f * bowl * np.sin(angle), np.full(17, seat + z)], 1)
        for f, z in rings
    ]
    mesh.sheet(np.stack(points), white)
    mesh.box([x0, -0.5 * bowl, 0], [middle, 0.5 * bowl, seat - 0.1], white)
    if rng.random() < 0.5:
        lid = np.stack([middle + reach * np.cos(angle[:16]), bowl * np.sin(angle[:16])], 1)
        mesh.prism(lid, seat + 0.005, seat + 0.03, white * 0.98)
    else:
        y, z = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(0, 1, 4), indexing="ij")
        width = bowl * np.sqrt(1 - (0.85 * np.maximum(z - 0.3, 0)) ** 2)
        mesh.sheet(
            np.stack([x0 + tank + 0.03 - 0.02 * z, y * width, seat + z * (h - seat + 0.0) * 0.98], -1), white
        )


def build_sink(mesh, rng, d, w, h, wall=False) -> None:
    """A basin with a rim, a tap and knobs; the wall-hung one has a body and a trap."""
    color = WHITE * 0.98 if wall or rng.random() < 0.5 else STEEL
    rim = 0.62 * h
    bottom = 0.0 if not wall else 0.25 * h
    t = 0.035
    steps = [
        (1.0, rim - 0.01),
        (1.0, rim),
        (0.9, rim),
        (0.82, 0.5 * (rim + bottom)),
        (0.6, bottom + 0.02),
        (0.05, bottom + 0.01),
    ]
    power = 0.35 if not wall and rng.random() < 0.6 else 0.8  # rectangular or oval
    shape = _superellipse(16, power) * [d / 2, w / 2]
    _add_rings(mesh, [(shape * f, z) for f, z in steps], color)
    if wall:
        _add_rings(mesh, [(shape, rim - 0.01), (shape * 0.9, 0.5 * rim), (shape * 0.5, bottom)], color)
        mesh.box([-d / 2, -0.4 * w, bottom], [-d / 4, 0.4 * w, rim], color)
        mesh.cylinder([-0.1 * d, 0, 0], [-0.1 * d, 0, bottom + 0.02], 0.03, STEEL, sides=8)
    x = -0.43 * d
    mesh.cylinder([x, 0, rim], [x, 0, h - 0.015], 0.018, STEEL, sides=7)
    mesh.cylinder([x, 0, h - 0.02], [x + 0.35 * d, 0, h - 0.04], 0.015, STEEL, sides=6)
    for y in (-0.14, 0.14):
        mesh.cylinder([x, y, rim], [x, y, rim + t + 0.02], 0.022, STEEL, sides=6)


def build_bathtub(mesh, rng, d, w, h) -> None:
    """A tub with a rim and an oval hollow, with or without an apron; a tap at one end."""
    white = WHITE * rng.uniform(0.94, 1.0)
    rim = h - 0.08
    t = 0.07
    half = np.array([d / 2, w / 2])
    block, hollow = _superellipse(24, 0.1), _superellipse(24, 0.5)
    rings = [(block * half, 0.0), (block * half, rim), (hollow * (half - t), rim)]
    rings += [
        (hollow * (half - t - 0.05), 0.5 * rim),
        (hollow * (half - t - 0.13), 0.12),
        (hollow * 0.02, 0.1),
    ]
    _add_rings(mesh, rings, white)
    end = rng.choice([-1, 1]) * (w / 2 - 0.04)
    mesh.cylinder([0, end, rim], [0, end, h], 0.02, STEEL, sides=6)
    mesh.cylinder([0, end, h - 0.02], [0, end * 0.85, h - 0.02], 0.02, STEEL, sides=6)


def build_garbage_bin(mesh, rng, d, w, h, kind="office") -> None:
    """Open round bins, open boxes, pedal bins with a dome and wheelie bins with a lid."""
    color = (
        DARK * rng.uniform(0.8, 2.5) if rng.random() < 0.5 else rng.uniform(0.1, 0.8, 3).astype(np.float32)
    )
    if kind == "pedal":
        steel = STEEL * rng.uniform(0.7, 1.0)
        mesh.cylinder([0, 0, 0], [0, 0, 0.86 * h], 0.47, steel, 0.47, 14)
        mesh.ellipsoid([0, 0, 0.86 * h], [0.48, 0.48, 0.14 * h], DARK, 4, 14, lowest=0.0)
        mesh.box([0.45, -0.08, 0.01], [0.52, 0.08, 0.03], DARK)
        return
    if kind == "wheelie":
        corners = np.array([[-0.4, -0.4], [0.4, -0.4], [0.4, 0.4], [-0.4, 0.4], [-0.4, -0.4]]) * [d, w]
        rings = [
            np.concatenate([corners * f, np.full((5, 1), z)], 1)
            for f, z in ((0.0, 0), (0.85, 0), (1.05, 0.88 * h))
        ]
        mesh.sheet(np.stack(rings), color)
        mesh.box([-0.47 * d, -0.45 * w, 0.88 * h], [0.48 * d, 0.45 * w, 0.95 * h], color * 0.8)
        mesh.cylinder([-0.42 * d, -w / 2, 0.1], [-0.42 * d, w / 2, 0.1], 0.09, DARK, sides=8)
        mesh.cylinder([-0.47 * d, -0.35 * w, h - 0.02], [-0.47 * d, 0.35 * w, h - 0.02], 0.02, DARK, sides=6)
        return
    sides, power = (16, 1.0) if kind == "office" else (16, 0.3)
    shape = _superellipse(sides, power) * [d / 2, w / 2]
    taper = rng.uniform(0.72, 0.95)
    steps = [(0.0, 0.0), (taper, 0.0), (1.0, h), (0.94, h), (taper - 0.05, 0.05), (0.0, 0.04)]
    _add_rings(mesh, [(shape * f, z) for f, z in steps], color)
    if kind == "recycle" and rng.random() < 0.6:  # a liner or contents
        mesh.ellipsoid(
            [0, 0, 0.75 * h], [0.42 * d, 0.42 * w, 0.2 * h], WHITE * rng.uniform(0.5, 0.95), 4, 8, lowest=0.0
        )


def _superellipse(sides: int, power: float) -> np.ndarray:
    """A closed outline within [-1, 1]^2, f64[sides + 1, 2]: a circle at power 1, nearly a square at 0.1."""
    angle = 2 * np.pi * np.arange(sides + 1) / sides
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.sign(circle) * np.abs(circle) ** power


def _add_rings(mesh, rings, color) -> None:
    """A surface through outlines f64[n, 2], each at a height."""
    mesh.sheet(np.stack([np.column_stack([xy, np.full(len(xy), z)]) for xy, z in rings]), color)
