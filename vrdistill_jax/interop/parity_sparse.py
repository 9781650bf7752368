"""What comparisons of sparse detectors with their references share: cases, weights from a recipe, voxel rows, detections.

A golden folder holds cases, CASE.npz with CASE_log.json. Points and boxes lie in the same file or apart, in CASE_inputs.npz.
Voxels are rows (batch, x, y, z) in units of the input voxels, sorted; features, predictions and assignments follow them.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid, pad_voxel_pyramid
from vrdistill_jax.interop.parity import ParityTable, load_arrays
from vrdistill_jax.structs import (
    Detections,
    Points,
    Scene,
    VoxelPyramid,
    VoxelPyramidConfig,
    pad_boxes,
)

# The logs say how far the reference in float32 is from itself in float64. Ours rounds as often, in another order; the
# largest of many rounding errors varies by a small factor.
SLACK = 4.0


class CaseArrays(dict[str, np.ndarray]):
    """The arrays of a case by name; asking for one that is not there is a ValueError that says so.

    Attributes:
      case: its name.
    """

    def __init__(self, case: str, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self.case = case

    def __missing__(self, name: str) -> np.ndarray:
        """Called where a dictionary has no such key."""
        raise ValueError(f"{self.case}.npz has no {name}; is the golden folder complete?")


LOSSES = {"center": "center_loss", "box": "bbox_loss", "class": "cls_loss"}  # our name: theirs


class SparseCase(NamedTuple):
    """One case of a golden folder."""

    name: str
    stored: CaseArrays  # all of its arrays, inputs included
    log: dict[str, Any]
    scene: Scene  # boxes are None where the case has none
    pyramid: VoxelPyramid

    @property
    def num_scenes(self) -> int:
        """Scenes of the batch."""
        return len(self.scene.mask)

    def tolerance(self, name: str) -> float:
        """Largest absolute error that rounding explains, from the reference's own.

        Args:
          name: an entry of the log's max_abs_diff_float32_vs_float64, such as "neck0" or "cls_preds".

        Raises:
          ValueError: if the log has no such entry.
        """
        differences = self.log.get("max_abs_diff_float32_vs_float64", {})
        if name not in differences:
            raise ValueError(f"{self.name}_log.json has no max_abs_diff_float32_vs_float64 of {name}")
        return SLACK * float(np.max(differences[name]))


def read_case_arrays(
    golden: pathlib.Path, inputs: pathlib.Path, name: str
) -> tuple[CaseArrays, dict[str, Any]]:
    """The arrays of a case, inputs included, and its log.

    Args:
      golden: folder of NAME.npz and NAME_log.json.
      inputs: folder that may hold NAME_inputs.npz.
      name: of the case; NAME.npz exists.

    Raises:
      ValueError: if the log or the points are missing, or if both files hold the same array with other numbers.
    """
    stored = CaseArrays(name, load_arrays(golden / f"{name}.npz"))
    apart = inputs / f"{name}_inputs.npz"
    if apart.is_file():
        for key, value in load_arrays(apart).items():
            if key in stored and not np.array_equal(stored[key], value):
                raise ValueError(
                    f"{key} in {apart} is not that in {golden / name}.npz; are they of one case?"
                )
            stored[key] = value
    missing = [key for key in ("points0", "voxel_size") if key not in stored]
    if missing:
        raise ValueError(
            f"{missing[0]} is neither in {golden / name}.npz nor in {apart}; --inputs names the folder of the latter"
        )
    path = golden / f"{name}_log.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; the tolerances come from it")
    return stored, json.loads(path.read_text())


def build_case(name: str, stored: CaseArrays, log: dict[str, Any], config: VoxelPyramidConfig) -> SparseCase:
    """Pads the clouds and boxes of a case and builds its geometry.

    Args:
      name: of the case.
      stored: of `read_case_arrays`: points0, points1, ... with columns x, y, z and features; gt_boxes0, gt_labels0, ...
      log: of the case.
      config: pyramid of the network, with the voxel size of the case; its capacities are not looked at.
    """
    clouds = _numbered(stored, "points")
    count = max(map(len, clouds))
    points, pyramids = [], []
    for cloud in clouds:
        padded = np.pad(cloud, [(0, count - len(cloud)), (0, 0)])
        points.append(Points(padded[:, :3], padded[:, 3:], np.arange(count) < len(cloud)))
        pyramids.append(build_voxel_pyramid(points[-1].xyz, points[-1].mask, config))
    capacities = [max(len(p.levels[row].mask) for p in pyramids) for row in range(len(pyramids[0].levels))]
    pyramid = stack_trees([pad_voxel_pyramid(p, capacities, config) for p in pyramids])

    boxes, rows, labels = None, _numbered(stored, "gt_boxes"), _numbered(stored, "gt_labels")
    if rows:
        capacity = max(map(len, rows))
        boxes = stack_trees(
            [pad_boxes(b[:, :3], b[:, 3:6], b[:, 6], k, capacity) for b, k in zip(rows, labels, strict=True)]
        )
    batch = len(clouds)
    frame = np.tile(np.eye(4, dtype=np.float32), (batch, 1, 1))
    index = np.arange(batch, dtype=np.int32)
    scene = Scene(stack_trees(points), boxes, None, frame, index, np.ones(batch, bool))
    return SparseCase(name, stored, log, scene, pyramid)


def _numbered(stored: dict[str, np.ndarray], stem: str) -> list[np.ndarray]:
    """stem0, stem1, ... as far as there are any."""
    found: list[np.ndarray] = []
    while f"{stem}{len(found)}" in stored:
        found.append(stored[f"{stem}{len(found)}"])
    return found


def check_channels(name: str, stored: CaseArrays, num_features: int, oriented: bool) -> None:
    """Refuses a case that another checkpoint or dataset was made with.

    Args:
      name: of the case.
      stored: its arrays.
      num_features: what the checkpoint reads of a point besides its place.
      oriented: whether its boxes are turned.

    Raises:
      ValueError: naming what does not fit.
    """
    if stored["points0"].shape[1] != 3 + num_features:
        raise ValueError(
            f"{name}: points0 has {stored['points0'].shape[1]} columns, the checkpoint reads {3 + num_features}"
        )
    boxes = stored.get("head0/bbox_preds0")
    if boxes is not None and boxes.shape[1] != (8 if oriented else 6):
        raise ValueError(f"{name} has {boxes.shape[1]} box channels; it is of the other --dataset")


def level_rows(head: Any, b: int, level: int) -> np.ndarray:
    """The valid anchors of one level of one scene of a dense head, in the reference's order: bool[A]."""
    return np.asarray(head.mask[b]) & (np.asarray(head.level) == level)


def check_terms(table: ParityTable, case: SparseCase, mode: str, terms: dict, tolerance: float) -> None:
    """The terms of the loss of a batch; `mode` is "eval" or "train"."""
    for ours, theirs in LOSSES.items():
        name = f"{mode}_{theirs}"
        if ours in terms and name in case.stored:
            table.add(f"{case.name}:{name}", terms[ours], case.stored[name], tolerance)
        elif ours in terms:
            table.skipped.append(f"no {name} in {case.name}")


def recipe_tensors(golden: pathlib.Path) -> dict[str, np.ndarray]:
    """The full-width weights: small tensors from full_weights_small.npz, kernels drawn as full_weights_recipe.json says.

    Args:
      golden: the folder.

    Returns:
      {their name: array}.

    Raises:
      ValueError: if a drawn tensor is not the one that the recipe was written for.
    """
    tensors = load_arrays(golden / "full_weights_small.npz")
    recipe = json.loads((golden / "full_weights_recipe.json").read_text())["recipe"]
    for name, entry in recipe.items():
        # The recipe is written for NumPy's legacy generator, whose stream never changes.
        normal = np.random.RandomState(entry["seed"]).standard_normal(entry["shape"])  # noqa: NPY002
        tensors[name] = np.asarray(normal * entry["std"], "<f4", "C")
        if hashlib.sha256(tensors[name].tobytes()).hexdigest() != entry["sha256"]:
            raise ValueError(
                f"{name} drawn from seed {entry['seed']} has another sha256 than {golden}/full_weights_recipe.json"
            )
    return tensors


def batch_rows(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The valid rows of all scenes one after another: [B, V, ...], bool[B, V] -> [n, ...]."""
    return np.asarray(values)[np.asarray(mask)]


def batch_coords(coords: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The valid voxels as rows (batch, x, y, z), sorted as the levels of a pyramid are: i32[n, 4]."""
    batch = np.broadcast_to(np.arange(len(coords), dtype=np.int32)[:, None, None], (*coords.shape[:2], 1))
    return batch_rows(np.concatenate([batch, np.asarray(coords)], -1), mask)


def check_input(table: ParityTable, case: SparseCase) -> None:
    """Voxels of the cloud, and which point each one reads."""
    first, stored, points = case.pyramid.levels[0], case.stored, case.scene.points
    label = f"{case.name}:in"
    if "in/coords" not in stored:
        table.skipped.append(f"no in/coords in {case.name}")
        return
    table.add_exact(f"{label}/coords", batch_coords(first.coords, first.mask), stored["in/coords"])
    # Theirs counts the points of all scenes through.
    start = np.cumsum([0, *np.sum(points.mask, 1)[:-1]])
    row = batch_rows(case.pyramid.point_index + start[:, None], first.mask)
    table.add_exact(f"{label}/unique_index", row, stored["in/unique_index"])
    joined = batch_rows(points.features, points.mask)
    table.add(f"{label}/feats", joined[row], stored["in/feats"], 0.0)


def check_level(
    table: ParityTable,
    case: SparseCase,
    name: str,
    coords: np.ndarray,
    mask: np.ndarray,
    features: np.ndarray,
    tolerance: float,
) -> None:
    """One sparse tensor: all coordinates, the stored rows of features, and their means over all rows.

    Args:
      table: gets the rows.
      case: with NAME/coords, NAME/feats (every NAME/feats_step-th row), NAME/feats_mean, NAME/feats_meanabs.
      name: of the tensor.
      coords: i32[B, V, 3].
      mask: bool[B, V].
      features: f32[B, V, C].
      tolerance: largest absolute error.
    """
    stored, label = case.stored, f"{case.name}:{name}"
    if f"{name}/coords" not in stored:
        table.skipped.append(f"no {name} in {case.name}")
        return
    table.add_exact(f"{label}/coords", batch_coords(coords, mask), stored[f"{name}/coords"])
    rows = batch_rows(features, mask).astype(np.float64)
    step = int(stored[f"{name}/feats_step"])
    add_absolute(table, f"{label}/feats", rows[::step], stored[f"{name}/feats"], tolerance)
    for statistic, ours in (("mean", rows.mean(0)), ("meanabs", np.abs(rows).mean(0))):
        add_absolute(table, f"{label}/{statistic}", ours, stored[f"{name}/feats_{statistic}"], tolerance)


def add_absolute(
    table: ParityTable, name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float
) -> bool:
    """Compares floats by their absolute errors."""
    return table.add(name, ours, theirs, tolerance, scale=1.0)


def score_noise(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far rounding moved any score; those nearer to a threshold may fall on either side: f32[...] twice, in [0, 1]."""
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    return float(np.max(difference, initial=0.0)) if np.shape(ours) == np.shape(theirs) else np.inf


def check_detections(
    table: ParityTable, case: SparseCase, found: Detections, noise: list[float], tolerance: float
) -> None:
    """Final boxes, one to one.

    The log of a case has margins: the gap behind the last candidate, the smallest distance of a candidate's score to the
    threshold, of an overlap to that of suppression. Where scores moved by less than the margins, all detections must be
    there and no others; where by more, a hundredth of them may differ (a candidate that flips frees or removes others).

    Args:
      table: gets the rows.
      case: with det_boxes0, det_scores0, det_labels0, ... and det0, ... in its log.
      found: of the batch.
      noise: per scene, of `score_noise`.
      tolerance: largest error of a box's numbers (metres; radians).
    """
    for b in range(case.num_scenes):
        if f"det_boxes{b}" not in case.stored:
            table.skipped.append(f"no det_boxes{b} in {case.name}")
            continue
        keep = np.asarray(found.mask[b])
        boxes, scores, labels = (np.asarray(x[b])[keep] for x in (found.boxes, found.score, found.label))
        theirs = [case.stored[f"det_{kind}{b}"] for kind in ("boxes", "scores", "labels")]
        pairs = match_detections(boxes, labels, scores, *theirs)
        margins = case.log.get(f"det{b}", {})
        decided = min(
            margins.get("margin_at_1000", np.inf), margins.get("min_dist_to_score_thr_among_top1000", np.inf)
        )
        allowed = 0 if noise[b] < decided else max(2, len(theirs[0]) // 100)
        rows = np.isin(np.arange(len(boxes)), pairs[:, 0]), np.isin(np.arange(len(theirs[0])), pairs[:, 1])
        matched = np.concatenate(rows)
        table.add_exact(f"{case.name}:det{b} matched", matched, np.ones_like(matched), allowed)
        if len(pairs):
            ours, reference = boxes[pairs[:, 0]], theirs[0][pairs[:, 1]]
            add_absolute(table, f"{case.name}:det{b} boxes", ours[:, :6], reference[:, :6], tolerance)
            score = scores[pairs[:, 0]]
            add_absolute(
                table, f"{case.name}:det{b} scores", score, theirs[1][pairs[:, 1]], max(noise[b], 1e-7)
            )


def match_detections(boxes, labels, scores, their_boxes, their_scores, their_labels) -> np.ndarray:
    """Pairs of the same class that are each other's nearest and less than 1 mm apart: i64[p, 2] (our row, theirs)."""
    pairs = []
    for label in np.unique(their_labels):
        ours, theirs = np.flatnonzero(labels == label), np.flatnonzero(their_labels == label)
        if not len(ours):
            continue
        a = np.concatenate([boxes[ours, :6], scores[ours, None]], 1)
        b = np.concatenate([their_boxes[theirs, :6], their_scores[theirs, None]], 1)
        distance = np.abs(a[:, None] - b[None]).max(-1)
        nearest, back = distance.argmin(1), distance.argmin(0)
        for i, j in enumerate(nearest):
            if back[j] == i and distance[i, j] < 1e-3:
                pairs.append((ours[i], theirs[j]))
    return np.array(pairs, np.int64).reshape(-1, 2)
