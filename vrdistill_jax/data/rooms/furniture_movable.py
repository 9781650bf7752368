"""Beds, chairs, sofas, tables, desks, dressers and night stands, built from parts."""

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


def build_dresser(mesh, rng, d, w, h) -> None:
    """Rows of drawers on short legs."""
    body, foot = wood_color(rng), 0.08
    add_legs(mesh, rng, d - 0.06, w - 0.04, foot, body * 0.8)
    mesh.box([-d / 2, -w / 2, foot], [d / 2 - 0.05, w / 2, h - 0.03], body)
    mesh.box([-d / 2, -w / 2, h - 0.03], [d / 2 - 0.02, w / 2, h], body * 0.9)
    columns = 2 if w > 0.9 else 1
    edges = np.linspace(-w / 2, w / 2, columns + 1)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        add_fronts(
            mesh, rng, d / 2 - 0.032, low, high, foot, h - 0.03, body * 1.05, max(2, round(h / 0.26)), 0
        )


def build_night_stand(mesh, rng, d, w, h) -> None:
    """A small box with drawers on legs."""
    body = wood_color(rng)
    leg = rng.uniform(0.1, 0.35) * h
    add_legs(mesh, rng, d - 0.04, w, leg, body, 0.045)
    mesh.box([-d / 2, -w / 2, leg], [d / 2 - 0.05, w / 2, h], body)
    add_fronts(mesh, rng, d / 2 - 0.032, -w / 2, w / 2, leg, h, body * 1.08, int(rng.integers(1, 3)), 0)


def _mattress(mesh, rng, d, w, low, high, x0) -> None:
    """A mattress with a pillow or two at -x and a duvet over its lower part."""
    duvet = fabric_color(rng)
    mesh.box([x0, -w / 2 + 0.03, low], [x0 + d, w / 2 - 0.03, high - 0.04], WHITE * 0.93)
    start = x0 + d * rng.uniform(0.25, 0.5)
    u, v = np.meshgrid(np.linspace(0, 1, 7), np.linspace(-1, 1, 9), indexing="ij")
    drop = np.where(np.abs(v) > 0.95, (high - low) * 0.8, 0.0)
    z = high - 0.01 - drop + 0.02 * rng.random(u.shape)
    mesh.sheet(np.stack([start + u * (x0 + d - start), v * w / 2, z], -1), duvet)
    count = 2 if w > 1.3 else 1
    for k in range(count):
        y = (k - (count - 1) / 2) * w / 2
        mesh.ellipsoid([x0 + 0.25, y, high - 0.02], [0.19, min(0.33, 0.42 * w / count), 0.10], WHITE * 0.97)


def build_bed(mesh, rng, d, w, h, bunk=False) -> None:
    """A frame with a headboard at -x, mattress, duvet and pillows; a bunk bed has two levels."""
    wood = wood_color(rng) if rng.random() < 0.7 else fabric_color(rng)
    base, t = rng.uniform(0.2, 0.32), 0.07
    top = base + rng.uniform(0.22, 0.32)
    levels = [(base, top), (0.62 * h, 0.62 * h + 0.18)] if bunk else [(base, top)]
    for low, high in levels:
        mesh.box([-d / 2 + t, -w / 2, low - 0.12], [d / 2 - 0.03, w / 2, low], wood)
        _mattress(mesh, rng, d - t - 0.05, w, low, high, -d / 2 + t)
    if bunk:
        for x in (-d / 2, d / 2 - t):
            for y in (-w / 2, w / 2 - t):
                mesh.box([x, y, 0], [x + t, y + t, h], wood)
            for z in np.linspace(0.25, 0.95, 4) * h:
                mesh.box([x, -w / 2, z], [x + t / 2, w / 2, z + 0.06], wood)
        mesh.box([-d / 2, w / 2 - t / 2, 0.85 * h], [d / 4, w / 2, 0.9 * h], wood)
        return
    add_legs(mesh, rng, d - 0.1, w - 0.04, base - 0.1, wood, 0.07)
    if rng.random() < 0.5:
        mesh.box([-d / 2, -w / 2, 0], [-d / 2 + t, w / 2, h], wood)
    else:  # barred headboard
        for y in np.linspace(-w / 2, w / 2 - t, 7 if w > 1.3 else 5):
            mesh.box([-d / 2, y, 0], [-d / 2 + t, y + t, h], wood)
        for z in (0.55 * h, h - 0.09):
            mesh.box([-d / 2, -w / 2, z], [-d / 2 + t, w / 2, z + 0.09], wood)
    foot = top + 0.12 if rng.random() < 0.3 else base
    mesh.box([d / 2 - 0.05, -w / 2, 0.05], [d / 2, w / 2, foot], wood)


def build_dining_chair(mesh, rng, d, w, h) -> None:
    """Four legs, a seat, and a back that is solid, slatted or barred."""
    wood = wood_color(rng)
    seat = h * rng.uniform(0.49, 0.55)
    add_legs(mesh, rng, d, w, seat, wood, 0.045)
    cushion = fabric_color(rng) if rng.random() < 0.5 else wood
    mesh.box([-d / 2, -w / 2, seat - 0.03], [d / 2, w / 2, seat + 0.02], cushion)
    lean, t = 0.05, 0.035
    for y in (-w / 2, w / 2 - t):
        mesh.cylinder([-d / 2 + lean, y + t / 2, seat], [-d / 2 + t / 2, y + t / 2, h], t / 2, wood, sides=6)
    style = rng.integers(3)
    if style == 0:
        mesh.box([-d / 2, -w / 2, seat + 0.12], [-d / 2 + t, w / 2, h], cushion)
    elif style == 1:
        for z in np.linspace(seat + 0.14, h - 0.07, 3):
            mesh.box([-d / 2 + 0.005, -w / 2, z], [-d / 2 + t, w / 2, z + 0.07], wood)
    else:
        for y in np.linspace(-w / 2 + 0.07, w / 2 - 0.1, 4):
            mesh.box([-d / 2 + 0.005, y, seat], [-d / 2 + t, y + 0.03, h - 0.05], wood)
        mesh.box([-d / 2, -w / 2, h - 0.07], [-d / 2 + t, w / 2, h], wood)


def build_office_chair(mesh, rng, d, w, h) -> None:
    """A five-armed foot with castors, a pole, a seat, a bent back, often arms."""
    cloth = DARK * rng.uniform(0.7, 1.6) if rng.random() < 0.7 else fabric_color(rng)
    seat = 0.48 * h
    for k in range(5):
        angle = 2 * np.pi * k / 5
        tip = np.array([np.cos(angle) * d * 0.48, np.sin(angle) * w * 0.48, 0.06])
        mesh.cylinder([0, 0, 0.1], tip, 0.03, DARK, sides=5)
        mesh.ellipsoid([tip[0], tip[1], 0.035], [0.03, 0.03, 0.035], DARK, rows=4, sides=6)
    mesh.cylinder([0, 0, 0.08], [0, 0, seat - 0.04], 0.03, STEEL * 0.6, sides=8)
    sw, sd = 0.84 * w, 0.8 * d
    mesh.box([-sd / 2, -sw / 2, seat - 0.04], [sd / 2, sw / 2, seat + 0.04], cloth)
    bend = np.linspace(-1, 1, 5)
    z = np.linspace(seat + rng.uniform(0.04, 0.16), h, 4)
    for offset in (0.0, -0.05):
        x = -0.45 * d + 0.06 * bend**2 + offset * (d > 0) + 0.05
        points = np.stack(np.broadcast_arrays(x[None], (bend * sw * 0.47)[None], z[:, None]), -1)
        mesh.sheet(points, cloth)
    mesh.box([-0.44 * d, -0.04, seat - 0.03], [-0.40 * d, 0.04, seat + 0.25], DARK)
    if rng.random() < 0.7:
        for y in (-w / 2, w / 2 - 0.06):
            mesh.box([-0.2 * d, y, seat + 0.18], [0.25 * d, y + 0.06, seat + 0.22], DARK)
            mesh.box([-0.05 * d, y + 0.01, seat - 0.02], [0.05 * d, y + 0.04, seat + 0.18], DARK)


def build_arm_chair(mesh, rng, d, w, h) -> None:
    """An upholstered chair: a sofa for one."""
    build_sofa(mesh, rng, d, w, h, seats=1)


def build_shell_chair(mesh, rng, d, w, h) -> None:
    """A moulded shell on a sled of bent tubes."""
    color, frame = paint_color(rng), STEEL * rng.uniform(0.3, 1.0)
    seat, t = 0.56 * h, 0.02
    for y in (-w / 2 + t, w / 2 - t):  # sled of bent tube
        path = [(-0.4 * d, seat), (-0.45 * d, t), (0.45 * d, t), (0.38 * d, seat)]
        for (x0, z0), (x1, z1) in zip(path[:-1], path[1:], strict=True):
            mesh.cylinder([x0, y, z0], [x1, y, z1], t, frame, sides=5)
    profile = np.array([[0.5, -0.03], [0.42, 0.0], [0.0, -0.02], [-0.32, 0.0], [-0.42, 0.08], [-0.5, 1.0]])
    profile[-1, 1] = h - seat
    across = np.linspace(-1, 1, 5)
    x = profile[:, :1] * d + 0.03 * across**2 * (profile[:, 1:] > 0.05)
    z = seat + profile[:, 1:] + 0.03 * across**2 * (profile[:, 1:] < 0.05)
    mesh.sheet(np.stack(np.broadcast_arrays(x, across * w / 2, z), -1), color)


def build_sofa(mesh, rng, d, w, h, seats=2, corner=False) -> None:
    """A base, a back, arms and cushions; a corner sofa has a second arm of seats along -y."""
    cloth = fabric_color(rng)
    cushion = cloth * rng.uniform(0.9, 1.1)
    foot, seat = rng.uniform(0.03, 0.14), rng.uniform(0.40, 0.47)
    back, arm = rng.uniform(0.18, 0.26), rng.uniform(0.12, 0.24)
    arm_height = h * rng.uniform(0.66, 0.85)
    depth = corner_arms("sofa:corner", (d, w))[0] if corner else d
    x0 = -d / 2
    add_legs(mesh, rng, depth - 0.1, w - 0.1, foot + 0.02, DARK, 0.05, x=x0 + depth / 2)
    mesh.box([x0, -w / 2, foot], [x0 + depth - 0.02, w / 2, seat - 0.13], cloth)
    mesh.box([x0, -w / 2, foot], [x0 + back * 0.7, w / 2, h - 0.06], cloth)
    mesh.box([x0, w / 2 - arm, foot], [x0 + depth - 0.02, w / 2, arm_height], cloth)
    left = -w / 2 + arm
    if corner:
        side = corner_arms("sofa:corner", (d, w))[1]
        mesh.box([x0, -w / 2, foot], [d / 2 - 0.02, -w / 2 + side, seat - 0.13], cloth)
        mesh.box(
            [x0, -w / 2, foot],
            [d / 2 if rng.random() < 0.5 else x0 + depth, -w / 2 + back * 0.7, h - 0.06],
            cloth,
        )
        mesh.box([x0 + depth, -w / 2 + back * 0.7, seat - 0.13], [d / 2, -w / 2 + side, seat], cushion)
    else:
        mesh.box([x0, -w / 2, foot], [x0 + depth - 0.02, -w / 2 + arm, arm_height], cloth)
    if rng.random() < 0.4:  # rounded arms
        for y in {w / 2 - arm / 2, -w / 2 + arm / 2} if not corner else {w / 2 - arm / 2}:
            mesh.cylinder([x0, y, arm_height], [x0 + depth - 0.02, y, arm_height], arm / 2, cloth, sides=8)
    edges = np.linspace(left, w / 2 - arm, seats + 1)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        mesh.box([x0 + back, low + 0.01, seat - 0.13], [x0 + depth, high - 0.01, seat], cushion)
        middle, half = (low + high) / 2, (high - low) / 2 - 0.01
        u, v = np.meshgrid(np.linspace(-1, 1, 4), np.linspace(0, 1, 4), indexing="ij")
        x = x0 + back + 0.09 * np.sin(np.pi * np.clip(0.15 + 0.7 * v, 0, 1)) * (1 - 0.3 * u**2) - 0.07 * v
        mesh.sheet(np.stack([x, middle + u * half, seat + v * (h - seat)], -1), cushion)
    if rng.random() < 0.6:
        y = rng.uniform(left + 0.2, w / 2 - arm - 0.2) if w - 2 * arm > 0.5 else 0.0
        mesh.ellipsoid([x0 + back + 0.15, y, seat + 0.15], [0.09, 0.2, 0.17], fabric_color(rng))


def build_table(mesh, rng, d, w, h) -> None:
    """A top on four legs or trestles, with or without apron and shelf."""
    wood = wood_color(rng) if rng.random() < 0.75 else paint_color(rng)
    t = rng.uniform(0.025, 0.05)
    mesh.box([-d / 2, -w / 2, h - t], [d / 2, w / 2, h], wood)
    style = rng.integers(3) if h > 0.6 else 2 * rng.integers(2)
    if style == 1:  # trestle
        for y in (-0.36 * w, 0.36 * w):
            mesh.box([-0.4 * d, y - 0.04, 0], [0.4 * d, y + 0.04, 0.06], wood)
            mesh.box([-0.06, y - 0.04, 0], [0.06, y + 0.04, h - t], wood)
        mesh.box([-0.03, -0.36 * w, 0.3], [0.03, 0.36 * w, 0.38], wood)
    else:
        add_legs(mesh, rng, d - 0.06, w - 0.06, h - t, wood * 0.9, rng.uniform(0.045, 0.08))
        if rng.random() < 0.6:
            mesh.box(
                [-d / 2 + 0.06, -w / 2 + 0.06, h - t - 0.08], [d / 2 - 0.06, w / 2 - 0.06, h - t], wood * 0.9
            )
    if h < 0.6 and rng.random() < 0.5:
        mesh.box([-d / 2 + 0.05, -w / 2 + 0.05, 0.12], [d / 2 - 0.05, w / 2 - 0.05, 0.15], wood)


def build_round_table(mesh, rng, d, w, h) -> None:
    """A round top on a pedestal or four legs."""
    color = wood_color(rng) if rng.random() < 0.6 else WHITE * 0.9
    t = 0.035
    angle = 2 * np.pi * np.arange(20) / 20
    mesh.prism(np.stack([d / 2 * np.cos(angle), w / 2 * np.sin(angle)], 1), h - t, h, color)
    if rng.random() < 0.6:
        mesh.cylinder([0, 0, 0.03], [0, 0, h - t], 0.045, STEEL * 0.5, sides=8)
        mesh.cylinder([0, 0, 0], [0, 0, 0.035], 0.28 * d, STEEL * 0.5, sides=16)
    else:
        add_legs(mesh, rng, 0.66 * d, 0.66 * w, h - t, color * 0.9)


def build_desk(mesh, rng, d, w, h, pedestal=None, hutch=False, corner=False) -> None:
    """A top on panels or legs with a back panel; with drawers, a hutch or a second arm along -y."""
    wood = wood_color(rng) if rng.random() < 0.7 else WHITE * 0.88
    top = rng.uniform(0.72, 0.77) if hutch else h
    t, x0 = 0.03, -d / 2
    depth = d
    if corner:
        depth, side = corner_arms("desk:corner", (d, w))
        mesh.box([x0 + depth, -w / 2, top - t], [d / 2, -w / 2 + side, top], wood)
        mesh.box([d / 2 - 0.03, -w / 2, 0], [d / 2, -w / 2 + side, top - t], wood)
    mesh.box([x0, -w / 2, top - t], [x0 + depth, w / 2, top], wood)
    if pedestal is None and not corner and rng.random() < 0.4:
        add_legs(mesh, rng, depth - 0.06, w - 0.06, top - t, STEEL * 0.5, 0.05)
    else:
        for y in (-w / 2, w / 2 - t):
            mesh.box([x0, y, 0], [x0 + depth - 0.03, y + t, top - t], wood)
    mesh.box([x0, -w / 2, top - 0.45], [x0 + 0.02, w / 2, top - t], wood)  # modesty panel
    if pedestal or hutch or rng.random() < 0.4:
        for side_sign in (1, -1) if pedestal and w > 1.45 else (1,):
            y0, y1 = sorted((side_sign * (w / 2 - t), side_sign * (w / 2 - 0.42)))
            mesh.box([x0, y0, 0.06], [x0 + depth - 0.05, y1, top - t], wood)
            add_fronts(mesh, rng, x0 + depth - 0.03, y0, y1, 0.06, top - t, wood * 1.06, 3, 0)
    if hutch:
        shelf = min(0.32, 0.5 * d)
        for y in (-w / 2, w / 2 - t):
            mesh.box([x0, y, top], [x0 + shelf, y + t, h], wood)
        mesh.box([x0, -w / 2, top], [x0 + 0.02, w / 2, h], wood)
        for z in (top + 0.5 * (h - top), h - t):
            mesh.box([x0, -w / 2, z], [x0 + shelf, w / 2, z + t], wood)
        add_books(
            mesh,
            rng,
            x0 + 0.03,
            shelf - 0.08,
            -w / 2 + t,
            w / 2 - t,
            top + 0.5 * (h - top) + t,
            h - 2 * t,
            0.5,
        )
