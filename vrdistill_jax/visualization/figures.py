"""Pictures for a page or a paper (PNG, with matplotlib) and the same as pages to turn around (HTML).

Functions take arrays of one scene and know nothing of checkpoints; `experiments.figures` computes what they draw. matplotlib
is the extra `figures`; its Agg back end draws, so that no screen is needed.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vrdistill_jax.visualization.html_viewer import write_viewer
from vrdistill_jax.visualization.layers import BoxSet, PointLayer, check_layer, heat_colors, value_range
from vrdistill_jax.visualization.ply import box_corners, class_color

CLOUD_POINTS = 12_000  # of the cloud, in a PNG
DOTS_PER_INCH = 150
ELEVATION, AZIMUTH = np.radians(50), np.radians(-62)  # of the camera, seen from the middle of the room
# Corners that differ in one bit of their number share an edge of the box.
EDGES = np.array([(k, k | 1 << bit) for k in range(8) for bit in range(3) if not k >> bit & 1])
BOX_COLOR = (40, 46, 54)  # where the class does not matter


def write_vote_figure(
    stem: str | pathlib.Path,
    xyz: np.ndarray,
    layers: Sequence[PointLayer],
    truth: BoxSet,
    class_names: Sequence[str],
    title: str = "",
    close_up: bool = False,
) -> list[pathlib.Path]:
    """Writes stem.png and stem.html: votes, or anything else that lies in a room, over its cloud and the true boxes.

    Args:
      stem: path of both files without ending; its folder is made.
      xyz: f32[n, 3] metres, z up; the cloud.
      layers: points to show. One with `values` gets a colour bar.
      truth: boxes of the ground truth.
      class_names: name of each class.
      title: heading.
      close_up: the PNG shows the part of the room in which boxes and layers lie, instead of all of it.

    Returns:
      The two paths.

    Raises:
      ValueError: without matplotlib, or for a layer or a box that is not finite.
    """
    layers = [check_layer(layer) for layer in layers]
    shown = [box_corners(truth.boxes).reshape(-1, 3), *(layer.xyz for layer in layers)]
    limits = _limits(shown if close_up and any(map(len, shown)) else [xyz, *shown])
    figure = new_figure(9, 7)
    page = write_viewer(
        _with_ending(stem, ".html"),
        xyz,
        _cloud_shades(xyz),
        truth.boxes,
        truth.labels,
        None,
        class_names,
        title=title or "Votes",
        layers=layers,
    )
    axes = _add_room(figure, (1, 1, 1), xyz, limits)
    _draw_boxes(axes, truth.boxes, np.tile(BOX_COLOR, (len(truth.boxes), 1)), 0.9)
    for layer in layers:
        color: Any = np.array([layer.color]) / 255
        if layer.values is not None:
            low, high = value_range(layer.values)
            color = heat_colors(layer.values, low, high) / 255
            _draw_color_bar(figure, axes, layer.name, low, high)
        dots = image_from_scene(layer.xyz).T
        axes.scatter(*dots, s=20, c=color, edgecolors="white", linewidths=0.4, zorder=4, label=layer.name)
    if any(layer.values is None for layer in layers):
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return [save_figure(figure, stem), page]


def write_detection_figure(
    stem: str | pathlib.Path,
    xyz: np.ndarray,
    found: Sequence[BoxSet],
    class_names: Sequence[str],
    title: str = "",
) -> list[pathlib.Path]:
    """Writes stem.png and stem.html: what several detectors found in the same room, side by side.

    Args:
      stem: path of both files without ending; its folder is made.
      xyz: f32[n, 3] metres, z up; the cloud.
      found: boxes of each detector, and of the truth, in the order in which they are shown.
      class_names: name of each class; boxes of a class have its colour.
      title: heading.

    Returns:
      The two paths. The page shows one set of boxes at a time.

    Raises:
      ValueError: without matplotlib, without any set of boxes, or for boxes that are not finite.
    """
    if not found:
        raise ValueError("there is nothing to draw; give at least one set of boxes")
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = new_figure(4.4 * columns, 3.4 * rows + 0.9)
    first, *rest = found
    page = write_viewer(
        _with_ending(stem, ".html"),
        xyz,
        _cloud_shades(xyz),
        first.boxes,
        first.labels,
        first.scores,
        class_names,
        title=title or "Detections",
        more_boxes=rest,
        boxes_name=first.name,
    )
    limits = _limits([xyz, *(box_corners(group.boxes).reshape(-1, 3) for group in found)])
    for place, group in enumerate(found, 1):
        axes = _add_room(figure, (rows, columns, place), xyz, limits)
        colors = np.array([class_color(label) for label in group.labels]).reshape(-1, 3)
        _draw_boxes(axes, group.boxes, colors, 1.5)
        axes.set_title(f"{group.name} ({len(group.boxes)})", fontsize=10)
    _draw_class_legend(figure, found, class_names)
    figure.suptitle(title, fontsize=11)
    return [save_figure(figure, stem), page]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need the extra: pip install 'vrdistill-jax[figures]'") from error
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen
    return figure


def _limits(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Lowest and highest coordinates of all points, f64[2, 3], with some air around them."""
    points = np.concatenate([np.asarray(part, np.float64).reshape(-1, 3) for part in parts])
    points = points if len(points) else np.zeros((1, 3))
    return np.stack([points.min(0) - 0.1, points.max(0) + 0.1])


def image_from_scene(xyz: np.ndarray) -> np.ndarray:
    """Looks at a room from above and aside, without perspective, so that a metre is as long everywhere.

    Args:
      xyz: f32[..., 3] metres, z up.

    Returns:
      f64[..., 2] metres to the right and upwards in the picture.
    """
    right = [-np.sin(AZIMUTH), np.cos(AZIMUTH), 0]
    tilt = np.sin(ELEVATION)
    up = [-tilt * np.cos(AZIMUTH), -tilt * np.sin(AZIMUTH), np.cos(ELEVATION)]
    return np.asarray(xyz, np.float64) @ np.array([right, up]).T


def _add_room(figure: Any, place: tuple[int, int, int], xyz: np.ndarray, limits: np.ndarray) -> Any:
    """Axes with the part of the cloud within the limits in grey, and a scale of one metre."""
    axes = figure.add_subplot(*place)
    axes.set_aspect("equal")
    axes.set_axis_off()
    inside = np.flatnonzero(((xyz >= limits[0]) & (xyz <= limits[1])).all(1))
    if len(inside) > CLOUD_POINTS:
        inside = np.sort(np.random.default_rng(0).choice(inside, CLOUD_POINTS, replace=False))
    shades = _cloud_shades(xyz)[inside]
    dots = image_from_scene(xyz[inside])
    axes.scatter(*dots.T, s=1.2, c=shades, linewidths=0, zorder=1)
    left, bottom = dots.min(0) - 0.15 if len(dots) else image_from_scene(limits[0])
    axes.plot([left, left + 1], [bottom, bottom], color="black", linewidth=2, zorder=2)
    axes.text(left + 0.5, bottom, "1 m", fontsize=8, ha="center", va="bottom", zorder=2)
    return axes


def _cloud_shades(xyz: np.ndarray) -> np.ndarray:
    """Greys that say how high a point lies, f64[n, 3] in [0, 1]: the cloud is background here."""
    z = np.asarray(xyz, np.float64)[:, 2]
    low, high = np.percentile(z, [1, 99]) if len(z) else (0.0, 1.0)
    share = np.clip((z - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat((0.78 - 0.28 * share)[:, None], 3, axis=1)


def _draw_boxes(axes: Any, boxes: np.ndarray, colors: np.ndarray, width: float) -> None:
    from matplotlib.collections import LineCollection

    lines = list(image_from_scene(box_corners(boxes)[:, EDGES]).reshape(-1, 2, 2))
    colors = np.repeat(np.asarray(colors, np.float64) / 255, len(EDGES), axis=0)
    axes.add_collection(LineCollection(lines, colors=colors, linewidths=width, zorder=3))


def _draw_color_bar(figure: Any, axes: Any, name: str, low: float, high: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = ListedColormap(heat_colors(np.linspace(0, 1, 256), 0, 1) / 255)
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), shades), ax=axes, shrink=0.6, pad=0.02)
    bar.set_label(name, fontsize=9)


def _draw_class_legend(figure: Any, found: Sequence[BoxSet], class_names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    used = sorted({int(label) for group in found for label in group.labels})
    lines = [
        Line2D([], [], color="#{:02x}{:02x}{:02x}".format(*class_color(n)), label=class_names[n])
        for n in used
    ]
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=6, frameon=False, fontsize=8)


def _with_ending(stem: str | pathlib.Path, ending: str) -> pathlib.Path:
    """Not with_suffix: the name may hold a dot."""
    stem = pathlib.Path(stem)
    return stem.with_name(stem.name + ending)


def save_figure(figure: Any, stem: str | pathlib.Path) -> pathlib.Path:
    """Writes stem.png and returns its path."""
    path = _with_ending(stem, ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        path, facecolor="white", metadata={"Software": None}
    )  # the same bytes whatever the version
    return path
