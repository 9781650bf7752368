"""Compares our FCAF3D with the official one: voxels, features, pruning, head, targets, losses, gradients, detections.

A golden folder holds any of the cases below (see `parity_sparse`) and for the full-width cases a recipe of weights. The narrow
cases take the weights that are being imported.
"""

import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vrdistill_jax.assigners.fcaf3d import centerness, face_distances
from vrdistill_jax.detectors import fcaf3d
from vrdistill_jax.detectors.dense_decoding import evaluation_protocol
from vrdistill_jax.detectors.fcaf3d import HeadOutput
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.interop.name_map import Rule, Variables
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.parity_dense import (
    DECODED,
    GRADIENT,
    GRADIENT_MEDIAN,
    GRADIENT_NORM,
    TRAIN,
    HeadOnly,
    check_box_rows,
    check_running,
    find_cases,
    take_training_step,
)
from vrdistill_jax.interop.parity_sparse import (
    SLACK,
    SparseCase,
    add_absolute,
    batch_coords,
    batch_rows,
    build_case,
    check_channels,
    check_detections,
    check_input,
    check_level,
    check_terms,
    level_rows,
    read_case_arrays,
)
from vrdistill_jax.interop.torch_fcaf3d import NUM_LEVELS, fcaf3d_rules, variables_from_fcaf3d
from vrdistill_jax.nn.sparse_conv import keep_highest
from vrdistill_jax.nn.sparse_resnet import FCAF3D_LEVELS
from vrdistill_jax.structs import DetectorOutput, Scene, VoxelPyramid

NARROW_CASES = ("narrow_batch2_train", "narrow_batch2_prune900")
FULL_CASES = ("full_small", "full_large", "full_large_prune12000")
# Where a log does not say what rounding costs: features, logits and lengths differ by 1e-6 to 4e-5 between float32 and float64
# in all logs that do.
USUAL_ROUNDING = 4e-5
TARGETS = 1e-5  # centreness from the same coordinates: a few roundings, of distances that may be small
# The largest derivative of a score by one of its two logits.
SCORE_SLOPE = 0.25


def check_fcaf3d(
    variables: Variables,
    config: ConfigDict,
    golden: str | pathlib.Path,
    inputs: str | pathlib.Path | None = None,
) -> ParityTable:
    """Runs every comparison that the golden folder has numbers for.

    Args:
      variables: imported from the folder's narrow weights.
      config: the whole config that belongs to them.
      golden: the folder.
      inputs: folder of CASE_inputs.npz, if elsewhere.

    Returns:
      The table; what the folder lacks is listed in `skipped`.

    Raises:
      ValueError: if there is no case at all, or none with points, or a case lacks its log, or files contradict each other.
    """
    golden, inputs = pathlib.Path(golden), pathlib.Path(inputs or golden)
    table = ParityTable()
    cases = find_cases(
        table, golden, inputs, NARROW_CASES, FULL_CASES, (variables, config), variables_from_fcaf3d
    )
    for name, weights, whole in cases:
        case, detector = read_case(golden, inputs, name, whole)
        check_case(table, case, weights, detector)
        if "train_bbox_loss" in case.stored:
            check_training(table, case, weights, detector)
    return table


def read_case(
    golden: pathlib.Path, inputs: pathlib.Path, name: str, config: ConfigDict
) -> tuple[SparseCase, ConfigDict]:
    """A case, and config.detector as it needs it: its voxel size, and the pruning threshold that its name ends with.

    Raises:
      ValueError: if its files are incomplete or do not fit the checkpoint.
    """
    stored, log = read_case_arrays(golden, inputs, name)
    detector = ConfigDict(config.detector.to_dict())
    detector.voxel_size = float(stored["voxel_size"])
    threshold = re.search(r"_prune(\d+)$", name)
    if threshold:
        detector.prune_threshold = int(threshold[1])
    check_channels(name, stored, fcaf3d.feature_size(detector.input_features), detector.oriented)
    return build_case(name, stored, log, fcaf3d.pyramid_config(detector)), detector


def find_tolerance(case: SparseCase, name: str) -> float:
    """What rounding explains, as the case's log says, or as logs usually say (of lengths, which are exponentials, relative)."""
    if name in case.log.get("max_abs_diff_float32_vs_float64", {}):
        return case.tolerance(name)
    lengths = [x for key, x in case.stored.items() if name == "bbox_preds" and f"/{name}" in key]
    largest = max((float(np.max(np.abs(x), initial=0.0)) for x in lengths), default=1.0)
    return SLACK * USUAL_ROUNDING * max(largest, 1.0)


def check_case(table: ParityTable, case: SparseCase, variables: Variables, config: Any) -> None:
    """The network in evaluation mode.

    It keeps the voxels that the reference kept, so that two of nearly equal score which swap do not upset all the rest; its
    own choice is compared with them.

    Args:
      table: gets the rows.
      case: one cloud or a batch.
      variables: of the network.
      config: config.detector, with the case's voxel size and pruning threshold.
    """
    model = fcaf3d.build(config)
    kept = kept_voxels(case.stored, case.pyramid)
    forward = jax.jit(
        lambda v, points, pyramid, kept: model.apply(v, points, pyramid, train=False, kept=kept)
    )
    output = jax.tree.map(np.asarray, forward(variables, case.scene.points, case.pyramid, kept))
    head, backbone = output.raw.head, output.raw.backbone

    check_input(table, case)
    levels = case.pyramid.levels
    tensors = {"stem": (levels[2], backbone.stem)}
    tensors |= {f"backbone{n}": (levels[3 + n], x) for n, x in enumerate(backbone.stages)}
    for name, (level, features) in tensors.items():
        tolerance = find_tolerance(case, "backbone0" if name == "stem" else name)
        check_level(table, case, name, level.coords, level.mask, features, tolerance)
    check_pruning(table, case, output, config.prune_threshold)
    check_head(table, case, head, "head")
    check_boxes(table, case, head)
    if case.scene.boxes is not None:
        check_losses(table, case, head, config)
    decode = jax.jit(
        lambda predictions, points: fcaf3d.decode(DetectorOutput(predictions, {}, None), points, config)
    )
    found = jax.tree.map(np.asarray, decode(output.predictions, case.scene.points))
    noise = [score_noise(case, head, b) for b in range(case.num_scenes)]
    margins = {f"det{b}": score_margins(output, b, config.num_candidates) for b in range(case.num_scenes)}
    check_detections(
        table, case._replace(log=case.log | margins), found, noise, SLACK * find_tolerance(case, "bbox_preds")
    )


def kept_voxels(stored: dict[str, np.ndarray], pyramid: VoxelPyramid) -> tuple[np.ndarray, ...] | None:
    """The voxels of strides 8, 16 and 32 that the reference kept: bool[B, V] each; None if it does not say."""
    names = [f"prune{n}/coords_after" for n in (2, 1, 0)]
    if any(name not in stored for name in names):
        return None
    masks = []
    for name, row in zip(names, FCAF3D_LEVELS, strict=False):
        level = pyramid.levels[row]
        mask = np.zeros(level.mask.shape, bool)
        found = contained_rows(batch_coords(level.coords, level.mask), stored[name])
        mask[np.asarray(level.mask)] = found
        masks.append(mask)
    return tuple(masks)


def contained_rows(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which rows of integers are among the others: i[n, 4], i[m, 4] -> bool[n]."""
    both = np.concatenate([np.asarray(rows, np.int64), np.asarray(others, np.int64)])
    _, name = np.unique(both, axis=0, return_inverse=True)
    name = name.reshape(-1)
    return np.isin(name[: len(rows)], name[len(rows) :])


def check_pruning(table: ParityTable, case: SparseCase, output: DetectorOutput, threshold: int) -> None:
    """What there was before pruning, the scores, and who is kept, level by level."""
    for n, level in enumerate(reversed(output.raw.neck[:-1])):
        name = f"prune{n}"
        if f"{name}/coords_before" not in case.stored:
            table.skipped.append(f"no {name} in {case.name}")
            continue
        label, tolerance = f"{case.name}:{name}", find_tolerance(case, "cls_preds")
        before = batch_coords(level.coords, level.candidates)
        table.add_exact(f"{label}/coords_before", before, case.stored[f"{name}/coords_before"])
        score, theirs = (
            batch_rows(level.score, level.candidates),
            case.stored[f"{name}/interp_scores"].reshape(-1),
        )
        add_absolute(table, f"{label}/interp_scores", score, theirs, tolerance)
        kept = np.asarray(keep_highest(level.score, level.candidates, threshold))
        after = case.stored[f"{name}/coords_after"]
        counts = np.bincount(after[:, 0], minlength=case.num_scenes)
        table.add_exact(f"{label} voxels kept", np.sum(kept, 1), counts)
        differ = kept.copy()
        differ[level.candidates] ^= contained_rows(before, after)
        # Only voxels whose scores are within rounding of the last one that is kept may be on the other side.
        cut = np.min(np.where(kept, level.score, np.inf), axis=1, keepdims=True)
        decided = differ & (np.abs(level.score - cut) > 2 * tolerance)
        table.add_exact(f"{label} kept by one side only", np.sum(decided), np.zeros(()))


def check_head(
    table: ParityTable, case: SparseCase, head: HeadOutput, prefix: str, factor: float = 1.0
) -> None:
    """Anchors and what the head says of them; `factor` multiplies what rounding explains in evaluation."""
    stored = case.stored
    logit = np.asarray(head.class_logits)
    for n in range(NUM_LEVELS):
        for b in range(case.num_scenes):
            rows, at = level_rows(head, b, n), f"{prefix}{n}/"
            points, label = np.asarray(head.points[b])[rows], f"{case.name}:{at}"
            if f"{at}coords{b}" in stored:
                coords = np.round(points / stored["voxel_size"]).astype(np.int64)
                table.add_exact(f"{label}coords{b}", coords, stored[f"{at}coords{b}"])
            if f"{at}points{b}" in stored:
                table.add(f"{label}points{b}", points, stored[f"{at}points{b}"], 1e-7)
            if f"{at}max_cls_logit{b}" in stored:
                best = np.max(logit[b][rows], -1, initial=-np.inf)
                largest = stored[f"{at}max_cls_logit{b}"].reshape(-1)
                tolerance = factor * find_tolerance(case, "cls_preds")
                add_absolute(table, f"{label}max_cls_logit{b}", best, largest, tolerance)
            for key, ours in (
                ("bbox_preds", head.box_channels),
                ("cls_preds", head.class_logits),
                ("center_preds", head.center_logit[..., None]),
            ):
                if f"{at}{key}{b}" not in stored:
                    table.skipped.append(f"no {at}{key}{b} in {case.name}")
                    continue
                theirs = stored[f"{at}{key}{b}"]
                values = np.asarray(ours[b])[rows][:: find_step(stored, at, "preds")]
                theirs = theirs.reshape(len(theirs), values.shape[1])
                tolerance = factor * find_tolerance(case, key)
                add_absolute(table, f"{label}{key}{b}", values, theirs, tolerance)


def find_step(stored: dict[str, np.ndarray], at: str, kind: str) -> int:
    """Every how many rows are stored of a level's predictions or boxes; in training, unless it says so, as in evaluation."""
    names = (f"{at}{kind}_step", f"{at.removeprefix('train_')}{kind}_step", f"{kind}_step")
    return int(next((stored[name] for name in names if name in stored), 1))


def check_boxes(table: ParityTable, case: SparseCase, head: HeadOutput) -> None:
    """Decoded boxes: from our channels, and from the reference's own where all are stored, which shows the decoding alone."""
    tolerance = find_tolerance(case, "bbox_preds")
    for n in range(NUM_LEVELS):
        at = f"head{n}/"
        step = find_step(case.stored, at, "boxes")
        for b in range(case.num_scenes):
            name = f"{at}boxes{b}"
            if name not in case.stored:
                table.skipped.append(f"no {name} in {case.name}")
                continue
            theirs, rows, label = case.stored[name], level_rows(head, b, n), f"{case.name}:{name}"
            points, ours = np.asarray(head.points[b])[rows], np.asarray(head.box_channels[b])[rows]
            channels = case.stored.get(f"{at}bbox_preds{b}")
            if channels is not None and len(channels) == len(points):
                decoded = np.asarray(fcaf3d.boxes_from_head(points, jnp.asarray(channels)))[::step]
                table.add(f"{label} decoding", decoded[:, : theirs.shape[1]], theirs, DECODED)
            boxes = np.asarray(fcaf3d.boxes_from_head(points, ours))[::step]
            # A length is the sum of two distances, that of a turned box of up to four.
            check_box_rows(table, label, boxes, theirs, ours[::step], 4 * tolerance, tolerance)


class Targets(NamedTuple):
    """What the reference calls the targets of each anchor."""

    gt_index: Array  # i32[B, A] -1 none
    label: Array  # i32[B, A] -1 none
    center: Array  # f32[B, A] -1 where there is none
    center_in_first: Array  # f32[B, A] in the scene's first box, whosever the anchor is


def find_targets(head: HeadOutput, scene: Scene, config: Any) -> Targets:
    """The targets of all anchors."""
    boxes = scene.boxes
    if boxes is None:
        raise ValueError("the targets need scene.boxes")
    gt_index = fcaf3d.assign_targets(head, scene, config).gt_index
    row, positive = jnp.maximum(gt_index, 0), gt_index >= 0
    target = gather_rows(join_boxes(boxes.center, boxes.size, boxes.yaw), row)
    central = centerness(face_distances(head.points, target))
    first = gather_rows(join_boxes(boxes.center, boxes.size, boxes.yaw), jnp.zeros_like(row))
    label = jnp.where(positive, gather_rows(boxes.label, row), -1)
    return Targets(
        gt_index,
        label,
        jnp.where(positive, central, -1.0),
        centerness(face_distances(head.points, first)),
    )


def check_losses(table: ParityTable, case: SparseCase, head: HeadOutput, config: Any) -> None:
    """Assignments, targets and the losses of the batch."""

    @jax.jit
    def compute(head, scene):
        loss = fcaf3d.loss(DetectorOutput(None, {}, HeadOnly(head)), scene, config)  # type: ignore[arg-type]
        return find_targets(head, scene, config), loss[1]

    targets, terms = jax.tree.map(np.asarray, compute(head, case.scene))
    for b in range(case.num_scenes):
        rows = np.asarray(head.mask[b])
        for key, ours in (("assigned", targets.gt_index), ("cls_targets", targets.label)):
            if f"{key}{b}" in case.stored:
                table.add_exact(f"{case.name}:{key}{b}", ours[b][rows], case.stored[f"{key}{b}"])
        if f"center_targets{b}" in case.stored:
            theirs, ours = case.stored[f"center_targets{b}"].reshape(-1), targets.center[b][rows]
            if theirs.shape == ours.shape:
                # The reference's code leaves the centreness in the first box to anchors without one; its loss ignores it.
                leftover = (targets.gt_index[b][rows] < 0) & (theirs != -1.0)
                ours = np.where(leftover, targets.center_in_first[b][rows], ours)
            add_absolute(table, f"{case.name}:center_targets{b}", ours, theirs, TARGETS)
    tolerance = max(find_tolerance(case, key) for key in ("bbox_preds", "cls_preds", "center_preds"))
    check_terms(table, case, "eval", terms, tolerance)


def score_noise(case: SparseCase, head: HeadOutput, b: int) -> float:
    """How far rounding moved any score of a scene; those nearer to a threshold may fall on either side."""
    ours = np.asarray(fcaf3d.scores_from_head(head)[b])
    noise = 0.0
    for n in range(NUM_LEVELS):
        at, rows = f"head{n}/", level_rows(head, b, n)
        if f"{at}cls_preds{b}" not in case.stored or f"{at}center_preds{b}" not in case.stored:
            return np.inf
        step = find_step(case.stored, at, "preds")
        logits, center = case.stored[f"{at}cls_preds{b}"], case.stored[f"{at}center_preds{b}"].reshape(-1, 1)
        theirs = np.asarray(jax.nn.sigmoid(logits)) * np.asarray(jax.nn.sigmoid(center))
        if theirs.shape != ours[rows][::step].shape:
            return np.inf
        noise = max(noise, float(np.max(np.abs(ours[rows][::step] - theirs), initial=0.0)))
        if step > 1:  # of the others only the bound is known
            bound = find_tolerance(case, "cls_preds") + find_tolerance(case, "center_preds")
            noise = max(noise, SCORE_SLOPE * bound)
    return noise


def score_margins(output: DetectorOutput, b: int, num_candidates: int) -> dict[str, float]:
    """How near a scene's candidates are to being others: the entries of a log that `check_detections` reads.

    The logs of FCAF3D need not have them for every level, so they are taken from our own scores.
    """
    head: HeadOutput = output.raw.head
    scores = np.asarray(fcaf3d.scores_from_head(head)[b])
    gap = distance = np.inf
    for n in range(NUM_LEVELS):
        of_level = scores[level_rows(head, b, n)]
        best = np.max(of_level, -1, initial=0.0)
        order = np.argsort(-best)
        if len(best) > num_candidates:
            gap = min(gap, float(best[order[num_candidates - 1]] - best[order[num_candidates]]))
        candidates = of_level[order[:num_candidates]]
        threshold = evaluation_protocol(True).score_threshold
        distance = min(distance, float(np.min(np.abs(candidates - threshold), initial=np.inf)))
    return {"margin_at_1000": gap, "min_dist_to_score_thr_among_top1000": distance}


def check_training(table: ParityTable, case: SparseCase, variables: Variables, config: Any) -> None:
    """One training step: losses, predictions with batch statistics, gradients, running statistics.

    Args:
      table: gets the rows.
      case: with train_head*, train_*_loss, grad/* and after_train/*.
      variables: of the network.
      config: config.detector.
    """
    step = take_training_step(fcaf3d, case, variables, config)
    check_head(table, case, step.head, "train_head", TRAIN)
    tolerance = max(find_tolerance(case, key) for key in ("bbox_preds", "cls_preds", "center_preds"))
    check_terms(table, case, "train", step.terms, TRAIN * tolerance)
    names = [name.partition("/")[2] for name in case.stored if name.startswith(("grad/", "after_train/"))]
    names += case.log.get("grad_norm_sum_absmax", {})
    rules = {rule.theirs: rule for rule in fcaf3d_rules(names, tuple(config.num_blocks))}
    check_gradients(table, case, step.gradient, rules)
    check_running(table, case, step.running, rules)


def check_gradients(
    table: ParityTable, case: SparseCase, gradient: dict[str, np.ndarray], rules: dict[str, Rule]
) -> None:
    """Gradients of the summed losses: some tensors entry by entry, of all others their norms."""
    errors = []
    for name, theirs in case.stored.items():
        if name.startswith("grad/"):
            rule = rules.get(name.removeprefix("grad/"))
            if rule is None:
                table.skipped.append(f"{case.name}:{name} (unknown)")
            else:
                table.add(f"{case.name}:{name}", gradient[rule.ours], rule.convert(theirs), GRADIENT)
                errors.append(table.rows[-1].error)
    if errors:
        table.add(
            f"{case.name}:grad, median of the errors",
            np.asarray(np.median(errors)),
            np.zeros(()),
            GRADIENT_MEDIAN,
        )
    for name, entry in case.log.get("grad_norm_sum_absmax", {}).items():
        if name not in rules:
            table.skipped.append(f"{case.name}:|grad {name}| (unknown)")
            continue
        norm = np.linalg.norm(np.asarray(gradient[rules[name].ours], np.float64).reshape(-1))
        table.add(f"{case.name}:|grad {name}|", np.asarray(norm), np.asarray(entry[0]), GRADIENT_NORM)
