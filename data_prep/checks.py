"""Whether a prepared dataset makes sense: each check says ok, warning or failed, and why."""

import json
import math
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.statistics import SceneStatistics

MAX_SHARE_BELOW_5_POINTS = (0.05, 0.2)  # of the boxes: more is a warning, more is a failure
MAX_SHARE_OUTSIDE = (0.0, 0.02)  # of the boxes
MAX_SHARE_OF_POINTS_OUTSIDE = (0.1, 0.4)  # of the points with an instance
ROOM_LENGTH = (1.0, 50.0)  # metres; the median scan's longest side
LARGEST_BOX = 15.0  # metres


class Check(NamedTuple):
    """The verdict of one check."""

    name: str
    verdict: str  # "ok", "warning" or "failed"
    detail: str


def check_dataset(
    splits: Mapping[str, Sequence[SceneStatistics]],
    class_names: Sequence[str],
    directory: str | os.PathLike | None = None,
) -> list[Check]:
    """Judges a dataset.

    Args:
      splits: statistics per split.
      class_names: in label order.
      directory: the dataset's folder, whose manifest.json is compared where there is one.

    Returns:
      One verdict per check.
    """
    scenes = [scene for group in splits.values() for scene in group]
    checks = [
        _check_scenes("finite numbers", scenes, lambda s: ", ".join(s.non_finite), "NaN or infinity in"),
        _check_labels(scenes, class_names),
        _check_scenes("box sizes", scenes, _wrong_size, "sizes must lie in (0, 15] metres:"),
        _check_scenes("yaw", scenes, _wrong_yaw, "yaw must lie in [-pi, pi):"),
        _check_scenes("instance rows", scenes, _wrong_instance, "rows of boxes or -1 expected:"),
        _check_units(scenes),
        _check_up(scenes),
        _check_filled(scenes),
        _check_outside(scenes),
        _check_instances_in_boxes(scenes),
        _check_names(splits),
        _check_copies(splits),
        _check_presence(splits, class_names),
    ]
    if directory is not None:
        checks.append(_check_manifest(splits, pathlib.Path(directory) / "manifest.json"))
    return checks


def _check_scenes(name: str, scenes, problem_of, expected: str) -> Check:
    found = [(scene.name, problem) for scene in scenes if (problem := problem_of(scene))]
    if not found:
        return Check(name, "ok", "")
    first = "; ".join(f"{scene}: {problem}" for scene, problem in found[:3])
    return Check(name, "failed", f"{len(found)} scenes; {expected} {first}")


def _check_labels(scenes: Sequence[SceneStatistics], class_names: Sequence[str]) -> Check:
    def wrong(scene: SceneStatistics) -> str:
        bad = sorted({label for label in scene.labels if not 0 <= label < len(class_names)})
        return f"label {bad[0]}" if bad else ""

    return _check_scenes("labels", scenes, wrong, f"labels must lie in [0, {len(class_names)}):")


def _wrong_size(scene: SceneStatistics) -> str:
    bad = ~((scene.sizes > 0) & (scene.sizes <= LARGEST_BOX)).all(1)
    return f"{int(bad.sum())} boxes, {scene.sizes[bad][0].round(3).tolist()}" if bad.any() else ""


def _wrong_yaw(scene: SceneStatistics) -> str:
    bad = ~((scene.yaw >= -math.pi - 1e-6) & (scene.yaw < math.pi + 1e-6))
    return f"{scene.yaw[bad][0]:.3f} (degrees?)" if bad.any() else ""


def _wrong_instance(scene: SceneStatistics) -> str:
    low, high = scene.instance_range
    count = len(scene.labels)
    return "" if low >= -1 and high < count else f"{low}..{high} with {count} boxes"


def _check_units(scenes: Sequence[SceneStatistics]) -> Check:
    lengths = [max(scene.extent) for scene in scenes if max(scene.extent) > 0]
    if not lengths:
        return Check("units", "failed", "no scan has an extent")
    length = float(np.median(lengths))
    if ROOM_LENGTH[0] <= length <= ROOM_LENGTH[1]:
        return Check("units", "ok", f"the median scan is {length:.3g} m long")
    return Check("units", "failed", f"the median scan is {length:.3g} long: these are no metres")


def _check_up(scenes: Sequence[SceneStatistics]) -> Check:
    """Single scans can mislead (a wall is as flat as a floor), so the evidence of all is added up."""
    total: Counter[str] = Counter()
    misled = 0
    for scene in scenes:
        total.update(scene.floor)
        z = scene.floor.get("z", 0.0)
        misled += any(value >= 0.14 and value >= 2 * z for value in scene.floor.values())
    best = max(total, key=lambda axis: total[axis], default="z")
    if best != "z" and total[best] > 2 * total["z"]:
        return Check("up axis", "failed", f"the floors of the scans lie low along {best}, not along z")
    if misled > 0.1 * len(scenes):
        return Check(
            "up axis", "warning", f"in {misled} of {len(scenes)} scans another axis than z may be up"
        )
    return Check("up axis", "ok", "")


def _check_filled(scenes: Sequence[SceneStatistics]) -> Check:
    counts = [int(count) for scene in scenes for count in scene.points_in_box]
    if not counts:
        return Check("points in boxes", "failed", "the dataset has no box at all")
    few = sum(count < 5 for count in counts)
    detail = f"{few} of {len(counts)} boxes hold fewer than 5 points"
    return Check("points in boxes", _verdict(few / len(counts), MAX_SHARE_BELOW_5_POINTS), detail)


def _check_outside(scenes: Sequence[SceneStatistics]) -> Check:
    total = sum(len(scene.labels) for scene in scenes)
    found = [(scene.name, scene.outside) for scene in scenes if scene.outside]
    outside = sum(count for _, count in found)
    where = f" (in {', '.join(name for name, _ in found[:3])})" if found else ""
    detail = f"{outside} of {total} boxes lie outside their cloud{where}"
    return Check("boxes in the cloud", _verdict(outside / max(total, 1), MAX_SHARE_OUTSIDE), detail)


def _check_instances_in_boxes(scenes: Sequence[SceneStatistics]) -> Check:
    total = sum(scene.instance_points for scene in scenes)
    if not total:
        return Check("instances in their boxes", "warning", "no point belongs to a box")
    outside = sum(scene.instance_points_outside for scene in scenes)
    detail = f"{outside / total:.1%} of the points with an instance lie outside its box"
    return Check("instances in their boxes", _verdict(outside / total, MAX_SHARE_OF_POINTS_OUTSIDE), detail)


def _verdict(share: float, limits: tuple[float, float]) -> str:
    return "failed" if share > limits[1] else "warning" if share > limits[0] else "ok"


def _check_names(splits: Mapping[str, Sequence[SceneStatistics]]) -> Check:
    count = Counter(scene.name for group in splits.values() for scene in group)
    twice = [name for name, number in count.items() if number > 1]
    if not twice:
        return Check("names", "ok", "")
    return Check("names", "failed", f"{len(twice)} names occur more than once, such as {twice[0]}")


def _check_copies(splits: Mapping[str, Sequence[SceneStatistics]]) -> Check:
    """The same points under two names: across splits the evaluation would be on training data."""
    seen: dict[str, tuple[str, str]] = {}
    within: list[str] = []
    across: list[str] = []
    for split, group in splits.items():
        for scene in group:
            if scene.content in seen:
                other_split, other = seen[scene.content]
                pair = f"{split}/{scene.name} = {other_split}/{other}"
                (across if other_split != split else within).append(pair)
            else:
                seen[scene.content] = (split, scene.name)
    if across:
        detail = f"{len(across)} scenes occur in two splits, such as {across[0]}"
        return Check("copies", "failed", detail)
    if within:
        return Check("copies", "warning", f"{len(within)} scenes occur twice, such as {within[0]}")
    return Check("copies", "ok", "")


def _check_presence(splits: Mapping[str, Sequence[SceneStatistics]], class_names: Sequence[str]) -> Check:
    labels = {
        split: {label for scene in group for label in scene.labels if 0 <= label < len(class_names)}
        for split, group in splits.items()
    }
    absent = sorted(set(range(len(class_names))) - labels.get("train", set()))
    notes = []
    if absent and "train" in labels:
        notes.append("no box in train of " + ", ".join(class_names[row] for row in absent))
    for split, group in splits.items():
        if not group:
            notes.append(f"{split} has no scenes")
        elif all(not scene.labels for scene in group):
            notes.append(f"{split} has no boxes")
    return Check("classes", "warning" if notes else "ok", "; ".join(notes))


def _check_manifest(splits: Mapping[str, Sequence[SceneStatistics]], path: pathlib.Path) -> Check:
    if not path.is_file():
        return Check("manifest", "ok", "there is none to compare with")
    try:
        content = json.loads(path.read_text())["scenes"]
        listed = {(split, entry["scene"]): entry["sha256"] for split in content for entry in content[split]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Check("manifest", "failed", f"manifest.json is damaged ({str(error)[:80]})")
    changed = [
        scene.name
        for split, group in splits.items()
        for scene in group
        if listed.get((split, scene.name)) != scene.stored
    ]
    if changed:
        detail = f"{len(changed)} scenes differ from the manifest, such as {changed[0]}"
        return Check("manifest", "failed", detail)
    return Check("manifest", "ok", "checksums agree")
