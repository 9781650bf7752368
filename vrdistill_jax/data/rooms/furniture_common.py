"""What several pieces of furniture share: colours, legs, drawer and door fronts, rows of books."""

import numpy as np

WHITE = np.array([0.96, 0.95, 0.93], np.float32)
STEEL = np.array([0.72, 0.73, 0.75], np.float32)
DARK = np.array([0.12, 0.12, 0.13], np.float32)

_WOODS = np.array(
    [
        [0.62, 0.44, 0.27],
        [0.45, 0.29, 0.17],
        [0.76, 0.60, 0.42],
        [0.30, 0.19, 0.12],
        [0.83, 0.73, 0.58],
        [0.55, 0.33, 0.20],
    ],
    np.float32,
)
_FABRICS = np.array(
    [[0.50, 0.48, 0.45], [0.25, 0.27, 0.32], [0.63, 0.56, 0.46], [0.45, 0.20, 0.18], [0.22, 0.33, 0.45],
     [0.30, 0.38, 0.27], [0.80, 0.77, 0.72], [0.20, 0.17, 0.16], [0.62, 0.42, 0.25]], np.float32
)  # fmt: skip


def wood_color(rng: np.random.Generator) -> np.ndarray:
    """Draws a colour of wood, f32[3] in [0, 1]."""
    return _vary(rng, _WOODS[rng.integers(len(_WOODS))], 0.04)


def fabric_color(rng: np.random.Generator) -> np.ndarray:
    """Draws a colour of cloth or leather, f32[3] in [0, 1]."""
    return _vary(rng, _FABRICS[rng.integers(len(_FABRICS))], 0.08)


def paint_color(rng: np.random.Generator) -> np.ndarray:
    """Draws a colour of paint: mostly light, sometimes strong; f32[3] in [0, 1]."""
    if rng.random() < 0.65:
        return _vary(rng, WHITE * rng.uniform(0.75, 0.98), 0.03)
    return rng.uniform(0.1, 0.85, 3).astype(np.float32)


def _vary(rng: np.random.Generator, color: np.ndarray, spread: float) -> np.ndarray:
    noise = rng.normal(0, 0.5 * spread, 3) + rng.normal(0, spread)
    return np.clip(color + noise, 0.03, 0.98).astype(np.float32)


def corner_arms(kind: str, size) -> tuple[float, float]:
    """Gives how deep the two arms of corner furniture are: the back arm (at -x) and the side arm (at -y)."""
    arm = {"sofa:corner": 0.9, "desk:corner": 0.65, "counter:corner": 0.63}[kind]
    return min(arm, 0.7 * float(size[0])), min(arm, 0.7 * float(size[1]))


def add_legs(mesh, rng, d, w, top, color, thickness=0.05, x=0.0, y=0.0) -> None:
    """Adds four legs under a rectangle d x w around (x, y), up to `top`; square, round or splayed."""
    t = thickness
    style = rng.integers(3)
    for sx in (-1, 1):
        for sy in (-1, 1):
            px, py = x + sx * (d - t) / 2, y + sy * (w - t) / 2
            if style == 0:
                mesh.box([px - t / 2, py - t / 2, 0], [px + t / 2, py + t / 2, top], color)
            else:
                inset = 0.12 if style == 2 else 0.0
                head = [x + (px - x) * (1 - inset), y + (py - y) * (1 - inset), top]
                mesh.cylinder([px, py, 0], head, 0.35 * t, color, 0.5 * t, sides=6, caps=False)


def _add_handle(mesh, x, y, z, length, vertical) -> None:
    half = np.array([0.0, 0.0 if vertical else length / 2, length / 2 if vertical else 0.0])
    center = np.array([x + 0.02, y, z])
    mesh.box(center - half - 0.012, center + half + 0.012, STEEL * 0.8)


def add_fronts(mesh, rng, x, y0, y1, z0, z1, color, drawers: int, doors: int) -> None:
    """Drawer or door fronts with gaps and handles on the plane x, over the rectangle y0..y1, z0..z1."""
    gap = 0.012
    if drawers:
        edges = np.linspace(z0, z1, drawers + 1)
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            mesh.box([x - 0.02, y0 + gap, low + gap], [x, y1 - gap, high - gap], color)
            _add_handle(mesh, x, (y0 + y1) / 2, (low + high) / 2, 0.3 * (y1 - y0), False)
    elif doors:
        edges = np.linspace(y0, y1, doors + 1)
        for k, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            mesh.box([x - 0.02, low + gap, z0 + gap], [x, high - gap, z1 - gap], color)
            y = high - 0.05 if k % 2 == 0 else low + 0.05
            _add_handle(mesh, x, y, (z0 + z1) / 2, 0.12, True)


def add_books(mesh, rng, x0, depth, y0, y1, z0, z1, fill) -> None:
    """A row of upright books along y, standing on z0 and lower than z1."""
    count = int((y1 - y0) / 0.045)
    if count < 1 or z1 - z0 < 0.08:
        return
    edges = y0 + (y1 - y0) * np.sort(rng.random(count + 1))
    height = (z1 - z0) * rng.uniform(0.6, 0.95, count)
    reach = x0 + depth * rng.uniform(0.6, 1.0, count)
    low = np.stack([np.full(count, x0), edges[:-1], np.full(count, z0)], 1)
    high = np.stack([reach, edges[1:] - 0.004, z0 + height], 1)
    keep = (high[:, 1] > low[:, 1] + 0.008) & (np.sin(9 * edges[:-1] + 6 * rng.random()) < 2 * fill - 1 + 0.2)
    colors = rng.uniform(0.08, 0.85, (count, 3)).astype(np.float32)
    if keep.any():
        mesh.boxes(low[keep].astype(np.float32), high[keep].astype(np.float32), colors[keep])
