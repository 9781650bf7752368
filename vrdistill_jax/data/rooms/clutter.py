"""Things without a label: boxes, plants, lamps, bags, shoes, screens, books and the like."""

import numpy as np

from vrdistill_jax.data.rooms.furniture_common import (
    DARK,
    STEEL,
    WHITE,
    fabric_color,
    paint_color,
    wood_color,
)

# Mean depth, width and height in metres, and the relative spread.
CLUTTER_SIZES: dict[str, tuple[float, float, float, float]] = {
    "carton": (0.40, 0.45, 0.35, 0.25),
    "plant": (0.50, 0.50, 1.00, 0.20),
    "floor_lamp": (0.38, 0.38, 1.55, 0.08),
    "table_lamp": (0.24, 0.24, 0.42, 0.15),
    "bag": (0.28, 0.40, 0.42, 0.15),
    "shoes": (0.28, 0.24, 0.11, 0.08),
    "monitor": (0.20, 0.52, 0.42, 0.12),
    "laptop": (0.26, 0.34, 0.22, 0.08),
    "book_pile": (0.22, 0.28, 0.14, 0.30),
    "bottle": (0.08, 0.08, 0.26, 0.15),
    "cup": (0.09, 0.11, 0.10, 0.10),
    "bowl": (0.26, 0.26, 0.10, 0.20),
    "television": (0.12, 1.05, 0.65, 0.15),
    "rug": (1.60, 2.20, 0.02, 0.15),
    "ball": (0.22, 0.22, 0.22, 0.10),
    "mirror": (0.04, 0.60, 0.80, 0.15),
    "whiteboard": (0.05, 1.70, 1.05, 0.15),
    "suitcase": (0.26, 0.46, 0.66, 0.10),
    "basket": (0.38, 0.46, 0.50, 0.12),
    "fan": (0.34, 0.40, 1.10, 0.10),
    "stove": (0.62, 0.62, 0.90, 0.03),
    "pan": (0.24, 0.38, 0.08, 0.10),
    "radiator": (0.12, 0.90, 0.58, 0.12),
    "towel": (0.06, 0.50, 0.70, 0.12),
    "ottoman": (0.50, 0.58, 0.45, 0.20),
    "hamper": (0.42, 0.50, 0.60, 0.20),
    "pile": (0.45, 0.60, 0.28, 0.35),
    "clothes": (0.20, 0.55, 1.00, 0.25),
    "column": (0.35, 0.40, 2.30, 0.20),
    "pipes": (0.10, 0.25, 2.20, 0.20),
    "wall_shelf": (0.26, 0.90, 0.35, 0.25),
    "panel": (0.06, 0.80, 0.70, 0.40),
    "printer": (0.42, 0.46, 0.30, 0.20),
    "ledge": (0.20, 1.80, 0.35, 0.35),
    "rack": (0.45, 0.75, 1.30, 0.25),
}


def _carton(mesh, rng, d, w, h) -> None:
    color = np.array([0.66, 0.50, 0.33]) * rng.uniform(0.8, 1.1)
    if rng.random() < 0.35:
        color = paint_color(rng)
    mesh.box([-d / 2, -w / 2, 0], [d / 2, w / 2, 0.9 * h], color)
    mesh.box([-d / 2, -w / 2, 0.9 * h], [d / 2, -w / 2 + 0.3 * w, h], color * 0.95)
    mesh.box([-d / 2, 0.2 * w, 0.9 * h], [d / 2, w / 2, 0.96 * h], color * 0.95)


def _plant(mesh, rng, d, w, h) -> None:
    pot = 0.25 * h
    mesh.cylinder([0, 0, 0], [0, 0, pot], 0.13, wood_color(rng), 0.17, 10)
    green = np.array([0.18, 0.38, 0.15]) * rng.uniform(0.7, 1.4)
    for _ in range(int(rng.integers(8, 14))):  # leaves: narrow bent blades
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.0)
        s = np.linspace(0, 1, 4)
        out = reach * 0.25 * s**1.5
        z = pot + (h - pot) * rng.uniform(0.5, 1.0) * np.sin(s * rng.uniform(1.2, 2.2))
        across = np.array([-1, 1])[:, None] * 0.045 * np.sin(np.pi * (0.15 + 0.8 * s))
        c, sn = np.cos(angle), np.sin(angle)
        mesh.sheet(np.stack([c * out - sn * across, sn * out + c * across, z + 0 * across], -1), green)


def _floor_lamp(mesh, rng, d, w, h) -> None:
    mesh.cylinder([0, 0, 0], [0, 0, 0.03], 0.3 * d, DARK, sides=12)
    mesh.cylinder([0, 0, 0.03], [0, 0, 0.9 * h], 0.015, STEEL * 0.5, sides=6)
    mesh.cylinder([0, 0, 0.8 * h], [0, 0, h], 0.5 * d, WHITE * 0.92, 0.32 * d, 12, caps=False)


def _table_lamp(mesh, rng, d, w, h) -> None:
    mesh.ellipsoid([0, 0, 0.25 * h], [0.3 * d, 0.3 * w, 0.25 * h], paint_color(rng), 6, 8)
    mesh.cylinder([0, 0, 0.45 * h], [0, 0, 0.62 * h], 0.015, STEEL, sides=6)
    mesh.cylinder([0, 0, 0.55 * h], [0, 0, h], 0.5 * d, WHITE * 0.9, 0.3 * d, 10, caps=False)


def _bag(mesh, rng, d, w, h) -> None:
    color = fabric_color(rng)
    mesh.ellipsoid([0, 0, 0.42 * h], [0.5 * d, 0.5 * w, 0.42 * h], color, 6, 8)
    mesh.box([0.3 * d, -0.3 * w, 0.1 * h], [0.5 * d, 0.3 * w, 0.45 * h], color * 0.9)
    mesh.cylinder([0, -0.12 * w, 0.8 * h], [0, 0, h], 0.015, color * 0.6, sides=5)
    mesh.cylinder([0, 0.12 * w, 0.8 * h], [0, 0, h], 0.015, color * 0.6, sides=5)


def _shoes(mesh, rng, d, w, h) -> None:
    color = fabric_color(rng)
    for y in (-0.27 * w, 0.27 * w):
        mesh.ellipsoid([0, y, 0.02], [0.5 * d, 0.2 * w, 0.5 * h], color, 4, 8, lowest=0.0)
        mesh.ellipsoid([-0.28 * d, y, 0.02], [0.2 * d, 0.19 * w, h - 0.02], color * 0.8, 4, 8, lowest=0.0)


def _monitor(mesh, rng, d, w, h) -> None:
    mesh.box([-0.5 * d, -0.25 * w, 0], [0.5 * d, 0.25 * w, 0.02], DARK)
    mesh.box([-0.1 * d, -0.05 * w, 0], [0.0, 0.05 * w, 0.5 * h], DARK)
    mesh.box([0.0, -0.5 * w, 0.25 * h], [0.15 * d, 0.5 * w, h], DARK, absorption=0.45)


def _laptop(mesh, rng, d, w, h) -> None:
    color = STEEL * rng.uniform(0.2, 1.0)
    mesh.box([-0.4 * d, -w / 2, 0], [d / 2, w / 2, 0.02], color)
    y, z = np.meshgrid([-w / 2, w / 2], [0.02, h], indexing="ij")
    mesh.sheet(np.stack([-0.4 * d - 0.1 * d * z / h, y, z], -1), DARK, absorption=0.4)


def _book_pile(mesh, rng, d, w, h) -> None:
    edges = np.linspace(0, h, int(rng.integers(2, 6)) + 1)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        a, b = rng.uniform(0.8, 1.0, 2) * (d / 2, w / 2)
        mesh.box([-a, -b, low], [a, b, high], rng.uniform(0.1, 0.85, 3))


def _bottle(mesh, rng, d, w, h) -> None:
    color = rng.uniform(0.1, 0.8, 3)
    mesh.cylinder([0, 0, 0], [0, 0, 0.65 * h], d / 2, color, sides=8, absorption=0.3)
    mesh.cylinder([0, 0, 0.65 * h], [0, 0, h], d / 2, color, d / 6, sides=8)


def _cup(mesh, rng, d, w, h) -> None:
    color = paint_color(rng)
    mesh.cylinder([0, 0, 0], [0, 0, h], 0.4 * d, color, 0.5 * d, 8)
    mesh.box([-0.01, 0.4 * d, 0.3 * h], [0.01, 0.4 * d + 0.03, 0.8 * h], color)


def _bowl(mesh, rng, d, w, h) -> None:
    mesh.cylinder([0, 0, 0], [0, 0, h], 0.25 * d, paint_color(rng), 0.5 * d, 12, caps=False)
    for _ in range(3):
        x, y = rng.uniform(-0.2, 0.2, 2) * d
        mesh.ellipsoid([x, y, 0.6 * h], [0.04, 0.04, 0.04], rng.uniform(0.2, 0.9, 3), 4, 6)


def _television(mesh, rng, d, w, h) -> None:
    mesh.box([-0.5 * d, -0.3 * w, 0], [0.5 * d, 0.3 * w, 0.02], DARK)
    mesh.box([-0.2 * d, -0.1 * w, 0], [0.0, 0.1 * w, 0.3 * h], DARK)
    mesh.box([-0.2 * d, -0.5 * w, 0.08 * h], [0.2 * d, 0.5 * w, h], DARK, absorption=0.5)


def _rug(mesh, rng, d, w, h) -> None:
    color = fabric_color(rng)
    mesh.box([-d / 2, -w / 2, 0], [d / 2, w / 2, 0.6 * h], color)
    mesh.box([-0.4 * d, -0.4 * w, 0], [0.4 * d, 0.4 * w, h], np.clip(color * rng.uniform(0.6, 1.5), 0, 1))


def _ball(mesh, rng, d, w, h) -> None:
    mesh.ellipsoid([0, 0, h / 2], [d / 2, w / 2, h / 2], rng.uniform(0.1, 0.9, 3), 8, 12)


def _mirror(mesh, rng, d, w, h) -> None:
    mesh.box([-d / 2, -w / 2, 0], [d / 2, w / 2, h], (0.7, 0.75, 0.8), absorption=0.8)


def _whiteboard(mesh, rng, d, w, h) -> None:
    mesh.box([-d / 2, -w / 2, 0], [0.2 * d, w / 2, h], WHITE, absorption=0.15)
    mesh.box([-d / 2, -0.4 * w, 0], [d / 2, 0.4 * w, 0.03], STEEL)


def _suitcase(mesh, rng, d, w, h) -> None:
    color = rng.uniform(0.05, 0.6, 3)
    mesh.box([-d / 2, -w / 2, 0.04], [d / 2, w / 2, 0.88 * h], color)
    for y in (-0.3 * w, 0.3 * w):
        mesh.cylinder([0, y, 0.88 * h], [0, y, h], 0.012, STEEL, sides=5)
        mesh.cylinder([-0.3 * d, y, 0.03], [0.3 * d, y, 0.03], 0.03, DARK, sides=6)
    mesh.box([-0.02, -0.3 * w, h - 0.03], [0.02, 0.3 * w, h], DARK)


def _basket(mesh, rng, d, w, h) -> None:
    mesh.cylinder([0, 0, 0], [0, 0, 0.85 * h], 0.4 * d, wood_color(rng), 0.5 * d, 12)
    mesh.ellipsoid([0, 0, 0.85 * h], [0.42 * d, 0.42 * d, 0.15 * h], fabric_color(rng), 4, 8, lowest=0.0)


def _fan(mesh, rng, d, w, h) -> None:
    mesh.cylinder([0, 0, 0], [0, 0, 0.04], 0.45 * d, WHITE * 0.9, sides=12)
    mesh.cylinder([0, 0, 0.04], [0, 0, 0.7 * h], 0.02, WHITE * 0.9, sides=6)
    mesh.cylinder([-0.08, 0, h - w / 2], [0.08, 0, h - w / 2], w / 2, WHITE * 0.8, sides=14, absorption=0.4)


def _stove(mesh, rng, d, w, h) -> None:
    color = WHITE * 0.95 if rng.random() < 0.5 else DARK * 1.5
    mesh.box([-d / 2, -w / 2, 0], [d / 2 - 0.03, w / 2, h - 0.02], color)
    mesh.box([d / 2 - 0.03, -0.4 * w, 0.25], [d / 2 - 0.01, 0.4 * w, h - 0.25], DARK, absorption=0.3)
    mesh.box([d / 2 - 0.03, -0.4 * w, h - 0.2], [d / 2, 0.4 * w, h - 0.17], STEEL)
    for x in (-0.2, 0.2):
        for y in (-0.22, 0.22):
            mesh.cylinder([x * d, y * w, h - 0.02], [x * d, y * w, h], 0.09, DARK, sides=10)


def _pan(mesh, rng, d, w, h) -> None:
    mesh.cylinder([0, -0.1 * w, 0], [0, -0.1 * w, h], 0.4 * d, STEEL * rng.uniform(0.2, 0.9), 0.5 * d, 12)
    mesh.box([-0.02, 0.2 * w, 0.6 * h], [0.02, 0.5 * w, 0.8 * h], DARK)


def _radiator(mesh, rng, d, w, h) -> None:
    for y in np.linspace(-w / 2, w / 2 - 0.05, max(4, int(w / 0.09))):
        mesh.box([-d / 2, y, 0], [d / 2, y + 0.05, h], WHITE * 0.93)
    mesh.box([-d / 3, -w / 2, 0.1 * h], [d / 3, w / 2, 0.9 * h], WHITE * 0.85)


def _towel(mesh, rng, d, w, h) -> None:
    mesh.cylinder([0, -w / 2, h - 0.02], [0, w / 2, h - 0.02], 0.012, STEEL, sides=6)
    mesh.box([-d / 2, -0.4 * w, 0], [d / 2, 0.4 * w, h], fabric_color(rng))


def _ottoman(mesh, rng, d, w, h) -> None:
    cloth = fabric_color(rng)
    for x in (-0.4 * d, 0.4 * d):
        for y in (-0.4 * w, 0.4 * w):
            mesh.cylinder([x, y, 0], [x, y, 0.1], 0.025, DARK, sides=6)
    mesh.box([-d / 2, -w / 2, 0.08], [d / 2, w / 2, 0.75 * h], cloth)
    mesh.ellipsoid([0, 0, 0.75 * h], [d / 2, w / 2, 0.25 * h], cloth * 1.05, 4, 10, lowest=0.0)


def _hamper(mesh, rng, d, w, h) -> None:
    _basket(mesh, rng, min(d, w), min(d, w), h)


def _pile(mesh, rng, d, w, h) -> None:
    """A heap of things or clothes, of no shape."""
    for _ in range(int(rng.integers(4, 9))):
        x, y, size = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0.12, 0.3)
        color, top = rng.uniform(0.08, 0.85, 3), rng.uniform(0.3, 1.0) * h
        if rng.random() < 0.5:
            mesh.ellipsoid([x * d, y * w, 0], [size * d, size * w, top], color, 4, 7, lowest=0.0)
        else:
            mesh.box([(x - size) * d, (y - size) * w, 0], [(x + size) * d, (y + size) * w, top], color)


def _clothes(mesh, rng, d, w, h) -> None:
    """Coats and bags on a rail."""
    mesh.box([-d / 2, -w / 2, 0.92 * h], [-0.35 * d, w / 2, h], wood_color(rng))
    for y in np.linspace(-0.38, 0.38, int(rng.integers(2, 5))) * w:
        length, wide = rng.uniform(0.4, 1.0) * 0.45 * h, rng.uniform(0.12, 0.2) * w
        mesh.ellipsoid([0, y, 0.95 * h - length], [0.5 * d, wide, length], fabric_color(rng), 5, 8)


def _column(mesh, rng, d, w, h) -> None:
    mesh.box([-d / 2, -w / 2, 0], [d / 2, w / 2, h], WHITE * rng.uniform(0.6, 0.95))


def _pipes(mesh, rng, d, w, h) -> None:
    for y in np.linspace(-0.4, 0.4, int(rng.integers(2, 4))) * w:
        mesh.cylinder([0, y, 0], [0, y, h], 0.4 * d, WHITE * rng.uniform(0.5, 0.95), sides=7)


def _wall_shelf(mesh, rng, d, w, h) -> None:
    mesh.box([-d / 2, -w / 2, 0], [d / 2, w / 2, 0.03], wood_color(rng))
    for _ in range(int(rng.integers(2, 7))):
        y, wide, deep = rng.uniform(-0.45, 0.4) * w, rng.uniform(0.05, 0.25), rng.uniform(0.3, 0.9)
        high = [(deep - 0.5) * d, min(y + wide, w / 2), rng.uniform(0.3, 1.0) * h]
        mesh.box([-d / 2, y, 0.03], high, rng.uniform(0.1, 0.9, 3))


def _panel(mesh, rng, d, w, h) -> None:
    """Notice boards, fuse boxes, thermostats, calendars."""
    mesh.box([-d / 2, -w / 2, 0], [d / 4, w / 2, h], paint_color(rng), absorption=rng.uniform(0, 0.4))
    for _ in range(int(rng.integers(0, 4))):
        y, z = rng.uniform(-0.4, 0.3) * w, rng.uniform(0.1, 0.8) * h
        mesh.box([0, y, z], [d / 2, y + 0.12 * w, z + 0.12 * h], rng.uniform(0.1, 0.9, 3))


def _printer(mesh, rng, d, w, h) -> None:
    color = WHITE * rng.uniform(0.5, 0.95) if rng.random() < 0.6 else DARK
    mesh.box([-d / 2, -w / 2, 0], [d / 2, w / 2, 0.7 * h], color)
    mesh.box([-d / 2, -0.45 * w, 0.7 * h], [rng.uniform(0.0, 0.5) * d, 0.45 * w, h], color * 0.9)


def _ledge(mesh, rng, d, w, h) -> None:
    """A boxed-in pipe or heater, or a step of the wall."""
    mesh.box([-d / 2, -w / 2, 0], [d / 2, w / 2, h], WHITE * rng.uniform(0.5, 0.95))


def _rack(mesh, rng, d, w, h) -> None:
    """A frame on posts with things in it: carts, drying racks, shoe racks."""
    for x in (-d / 2, d / 2 - 0.03):
        for y in (-w / 2, w / 2 - 0.03):
            mesh.box([x, y, 0], [x + 0.03, y + 0.03, h], STEEL * 0.7)
    for z in np.linspace(0.1, h - 0.04, int(rng.integers(2, 5))):
        mesh.box([-d / 2, -w / 2, z], [d / 2, w / 2, z + 0.02], STEEL * 0.8)
        if z < 0.8 * h and rng.random() < 0.7:
            y, wide = rng.uniform(-0.4, 0.0) * w, rng.uniform(0.2, 0.4) * w
            mesh.box(
                [-0.4 * d, y, z], [0.4 * d, y + wide, z + rng.uniform(0.1, 0.2) * h], rng.uniform(0.1, 0.9, 3)
            )


CLUTTER_BUILDERS = {name: globals()[f"_{name}"] for name in CLUTTER_SIZES}
