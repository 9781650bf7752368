"""Charts of numbers (PNG, with matplotlib): curves, scatters and histograms; functions take arrays and know no runs."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vrdistill_jax.visualization.figures import new_figure, save_figure


class AlignmentSeries(NamedTuple):
    """How well the scores of one detector agree with its boxes."""

    label: str
    curve: np.ndarray  # f64[n, 2] step of training, mean |score - IoU| of its positives
    common_curve: np.ndarray  # f64[n, 2] the same of positives that are chosen alike for all detectors
    score: np.ndarray  # f64[m] of its most certain detections
    iou: np.ndarray  # f64[m] of the same with the ground truth
    histogram: np.ndarray  # i64[k] numbers of detections by |score - IoU|
    bin_size: float


def write_alignment_chart(
    stem: str | pathlib.Path, shown: Sequence[AlignmentSeries], title: str = ""
) -> pathlib.Path:
    """Writes stem.png: inconsistency over training, scores against overlaps, and how often which error occurs.

    Args:
      stem: path without ending; its folder is made.
      shown: one or more detectors.
      title: heading.

    Returns:
      The path.

    Raises:
      ValueError: without matplotlib, or without any detector.
    """
    if not shown:
        raise ValueError("there is nothing to draw; give at least one series")
    figure = new_figure(13, 4.2)
    training, scatter, errors = figure.subplots(1, 3)
    for n, each in enumerate(shown):
        color = f"C{n}"
        training.plot(*each.curve.T, color=color, label=each.label)
        training.plot(*each.common_curve.T, color=color, linestyle=":")
        scatter.scatter(each.score, each.iou, s=6, alpha=0.5, color=color, linewidths=0)
        edges = each.bin_size * np.arange(len(each.histogram) + 1)
        errors.stairs(each.histogram / max(each.histogram.sum(), 1), edges, color=color, label=each.label)
    training.set(xlabel="step", ylabel="mean |score - IoU| of positives", title="AIC (dotted: same assigner)")
    training.legend(frameon=False)
    scatter.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    scatter.set(xlabel="score", ylabel="IoU", xlim=(0, 1), ylim=(0, 1), title="Most certain detections")
    errors.set(xlabel="|score - IoU|", ylabel="share of detections", xlim=(0, 1), title="PCE")
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, stem)


def write_lines_chart(
    stem: str | pathlib.Path,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    title: str = "",
    y_label: str = "",
) -> pathlib.Path:
    """Writes stem.png: lines in panels side by side.

    Args:
      stem: path without ending; its folder is made.
      panels: by what the horizontal axis says: "x", and the values of each line by its label.
      title: heading.
      y_label: of the vertical axis, which all panels share.

    Returns:
      The path.

    Raises:
      ValueError: without matplotlib, or without any panel.
    """
    if not panels:
        raise ValueError("there is nothing to draw; give at least one panel")
    figure = new_figure(4.3 * len(panels), 3.8)
    all_axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        for label, values in lines.items():
            if label != "x":
                axes.plot(lines["x"], values, label=label)
        axes.set(xlabel=name)
    all_axes[0].set(ylabel=y_label)
    all_axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, stem)
