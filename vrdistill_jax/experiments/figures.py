"""Figures 1, 4, 5, 6 and 7 of VRDistill, drawn from trained runs.

Source: "VRDistill: Vote Refinement Distillation for Efficient Indoor 3D Object Detection" (2024). What votes are, and which of
them is drawn, follows the run's own `vote_level` (docs/distillation.md).
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vrdistill_jax.data.loader import PreparedScenes, stack_scenes
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.distillers import vrdistill
from vrdistill_jax.experiments.analysis import Run, kept_detections, load_run, real_boxes
from vrdistill_jax.structs import Detections, PointSet, Scene
from vrdistill_jax.training.state import Batch
from vrdistill_jax.visualization.figures import write_detection_figure, write_vote_figure
from vrdistill_jax.visualization.layers import BLUE, LAYER_COLORS, RED, BoxSet, PointLayer


class Figure(NamedTuple):
    """A figure of the paper."""

    title: str
    runs: tuple[str, ...]  # labels of the paper's runs, as in experiments.vrdistill_tables
    rows: tuple[
        int, ...
    ]  # scenes of the validation split that are drawn where none are named; not chosen by result


FIGURES = {
    1: Figure("Figure 1: teacher's votes on objects, before and after refinement", ("VRDistill",), (0,)),
    4: Figure(
        "Figure 4: detections",
        ("Teacher", "Student", "FGD", "MGD", "PGD", "itKD", "SparseKD", "VRDistill"),
        (0,),
    ),
    5: Figure("Figure 5: all of the teacher's votes, before and after refinement", ("VRDistill",), (1,)),
    6: Figure("Figure 6: soft mask of the refined votes", ("VRDistill",), (0,)),
    7: Figure("Figure 7: votes of two students", ("FGD", "VRDistill"), (0,)),
}


class SceneOutputs(NamedTuple):
    """What one run makes of one scene; batches of one."""

    scene: Scene
    found: Detections
    votes: dict[str, PointSet]  # "student", and of a distilled run "teacher" and (VRDistill) "refined"


def draw_figure(
    number: int,
    checkpoints: Mapping[str, str | pathlib.Path],
    output: str | pathlib.Path,
    rows: Sequence[int] | None = None,
    source: Any = None,
) -> list[pathlib.Path]:
    """Draws a figure of the paper: for each scene a picture (PNG) and a page to turn around (HTML).

    Args:
      number: 1, 4, 5, 6 or 7.
      checkpoints: work directories of runs by the label that the figure gives them. Figures 1, 5 and 6 show one run of
        VRDistill (and its teacher's votes), 7 the votes of each, 4 the detections of each after the ground truth.
      output: folder of the files.
      rows: scenes of the dataset; None for those of FIGURES.
      source: labelled scenes; None for the validation split that the first run was evaluated on.

    Returns:
      Paths of the files.

    Raises:
      ValueError: for another number, a run that lacks what the figure shows, or a scene that is not there.
    """
    if number not in FIGURES:
        raise ValueError(f"there is no figure {number} to draw; known: {', '.join(map(str, FIGURES))}")
    if not checkpoints or (number in (1, 5, 6) and len(checkpoints) > 1):
        needed = "runs" if number in (4, 7) else "one run"
        raise ValueError(
            f"figure {number} needs {needed}, for example {', '.join(FIGURES[number].runs)}; got {list(checkpoints)}"
        )
    runs = {label: load_run(path) for label, path in checkpoints.items()}
    first = next(iter(runs.values()))
    names = tuple(first.config.detector.class_names)
    for label, run in runs.items():
        if tuple(run.config.detector.class_names) != names:
            raise ValueError(f"{label} knows other classes than {next(iter(runs))}; draw runs of one dataset")
        run.config.seed = first.config.seed  # decides which points of a scene are read: the same for all
    source = open_source(first.config.dataset, "val") if source is None else source
    paths = []
    for row in FIGURES[number].rows if rows is None else rows:
        if not 0 <= row < len(source):
            raise ValueError(f"there is no scene {row}; the dataset has the scenes 0 to {len(source) - 1}")
        outputs = {label: look_at_scene(run, source, row) for label, run in runs.items()}
        stem = pathlib.Path(output) / f"figure{number}_scene{row}"
        title, xyz = f"{FIGURES[number].title} (scene {row})", source[row]["xyz"]
        if number == 4:
            paths += write_detection_figure(stem, xyz, detections(outputs), names, title)
            continue
        if number == 7:
            layers = student_votes(runs, outputs)
        else:
            (label, seen), *_ = outputs.items()
            if "refined" not in seen.votes:
                raise ValueError(f"figure {number}: {label} was not trained with VRDistill; name another run")
            layers = [mask_layer(runs[label], seen)] if number == 6 else refined_votes(seen, number == 1)
        boxes = truth(next(iter(outputs.values())))
        paths += write_vote_figure(stem, xyz, layers, boxes, names, title, close_up=number in (1, 7))
    return paths


def look_at_scene(run: Run, source: Any, row: int) -> SceneOutputs:
    """Shows a run the points of one scene that its evaluation would draw."""
    pyramid = find_detector(run.config.detector.name).pyramid_config(run.config.detector)
    reads = run.teacher.reads if run.teacher else None
    prepared = PreparedScenes(source, run.config, pyramid, False, reads).prepare(row)
    batch = Batch(*stack_scenes([prepared], pyramid, reads))
    found, _, votes, _ = run.measure(batch)
    return SceneOutputs(
        batch.scene, found, {name: points for name, points in votes.items() if points is not None}
    )


def refined_votes(seen: SceneOutputs, on_objects: bool) -> list[PointLayer]:
    """Figures 1 (votes of seeds on objects) and 5 (every vote)."""
    return [
        vote_layer("Votes", seen, "teacher", BLUE, on_objects),
        vote_layer("Refined votes", seen, "refined", RED, on_objects),
    ]


def mask_layer(run: Run, seen: SceneOutputs) -> PointLayer:
    """Figure 6: the refined votes, shaded by how much they count."""
    entry, votes = run.config.distiller.methods.vrdistill, seen.votes["refined"]
    boxes: Any = seen.scene.boxes  # labelled: refined votes are measured against them
    mask = vrdistill.foreground_mask(
        votes.xyz, boxes, "soft", entry.sigma, entry.normalize_mask, entry.rotate_mask
    )
    real = votes.mask[0]
    return PointLayer("Soft mask", votes.xyz[0][real], values=np.asarray(mask)[0][real])


def student_votes(runs: Mapping[str, Run], outputs: Mapping[str, SceneOutputs]) -> list[PointLayer]:
    """Figure 7: votes of seeds on objects.

    Raises:
      ValueError: if a run has no votes, or they mean different things by them.
    """
    without = [label for label, seen in outputs.items() if "student" not in seen.votes]
    if without:
        raise ValueError(f"figure 7: {without[0]} is a detector without votes; name another run")
    levels = {label: vote_level(run) for label, run in runs.items()}
    if len(set(levels.values())) > 1:
        raise ValueError(
            f"figure 7: these runs call different points votes, {levels}; draw runs of one vote_level"
        )
    return [
        vote_layer(f"Votes of {label}", seen, "student", LAYER_COLORS[n % len(LAYER_COLORS)], True)
        for n, (label, seen) in enumerate(outputs.items())
    ]


def vote_level(run: Run) -> str:
    """Which points `Run` takes for votes."""
    distiller = run.config.get("distiller")
    entry = distiller.methods.get("vrdistill") if distiller else None
    return entry.vote_level if entry else "cluster"


def detections(outputs: Mapping[str, SceneOutputs]) -> list[BoxSet]:
    """Figure 4: the ground truth, then what each run found (objectness > 0.5)."""
    sets = [truth(next(iter(outputs.values())))]
    for label, seen in outputs.items():
        boxes, labels = kept_detections(seen.found, 0)
        sets.append(BoxSet(label, boxes, labels, seen.found.score[0][seen.found.mask[0]]))
    return sets


def vote_layer(
    name: str, seen: SceneOutputs, whose: str, color: tuple[int, int, int], on_objects: bool
) -> PointLayer:
    """Votes as a layer, whose name says how far those of seeds on objects are from their object's centre on average.

    Args:
      name: what they are.
      seen: of a run.
      whose: "student", "teacher" or "refined".
      color: of the layer.
      on_objects: only votes of seeds on objects.
    """
    votes = seen.votes[whose]
    distance, counted = (np.asarray(x)[0] for x in vrdistill.center_distances(votes, seen.scene))
    shown = votes.mask[0] & counted if on_objects else votes.mask[0]
    if counted.any():
        name = f"{name}: {distance[counted].mean():.2f} m from centres"
    return PointLayer(name, votes.xyz[0][shown], color)


def truth(seen: SceneOutputs) -> BoxSet:
    """The labelled boxes of a scene."""
    return BoxSet("Ground truth", *real_boxes(seen.scene.boxes, 0))
