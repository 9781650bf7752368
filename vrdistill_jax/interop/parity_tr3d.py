"""Compares our TR3D with the authors': voxels, features, head, boxes, assignments, losses, gradients, batch norm, detections.

A golden folder holds any of the cases below (see `parity_sparse`), units.npz, and for the full-width cases a recipe of weights.
The narrow cases take the weights that are being imported.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vrdistill_jax.detectors import tr3d
from vrdistill_jax.detectors.tr3d import HeadOutput
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.interop.name_map import Rule, Variables
from vrdistill_jax.interop.parity import ParityTable, has_file, load_arrays
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
    build_case,
    check_channels,
    check_detections,
    check_input,
    check_level,
    check_terms,
    level_rows,
    read_case_arrays,
    score_noise,
)
from vrdistill_jax.interop.parity_tr3d_units import check_units
from vrdistill_jax.interop.torch_tr3d import tr3d_rules, variables_from_tr3d
from vrdistill_jax.losses.box import diou_loss
from vrdistill_jax.losses.classification import focal_loss
from vrdistill_jax.structs import DetectorOutput, Scene

NARROW_CASES = ("narrow_small", "narrow_batch2_train")
FULL_CASES = ("full_small", "full_large")
# The assigner of the authors' repository, and mmdetection3d's; what is called so has the second one's name at its end.
VARIANTS = {"samsung": "", "mmdet3d": "_mmdet3d"}


def check_tr3d(
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
        table, golden, inputs, NARROW_CASES, FULL_CASES, (variables, config), variables_from_tr3d
    )
    for name, weights, whole in cases:
        case, detector = read_case(golden, inputs, name, whole)
        check_case(table, case, weights, detector)
        if "train_bbox_loss" in case.stored:
            path = golden / f"{name}_grad64.npz"
            exact = load_arrays(path) if has_file(table, path) else {}
            check_training(table, case, exact, weights, detector)
    if has_file(table, golden / "units.npz"):
        check_units(table, load_arrays(golden / "units.npz"), config.detector)
    return table


def read_case(
    golden: pathlib.Path, inputs: pathlib.Path, name: str, config: ConfigDict
) -> tuple[SparseCase, ConfigDict]:
    """A case, and config.detector as it needs it.

    Raises:
      ValueError: if its files are incomplete or do not fit the checkpoint.
    """
    stored, log = read_case_arrays(golden, inputs, name)
    detector = ConfigDict(config.detector.to_dict())
    detector.voxel_size, detector.reference_diou = float(stored["voxel_size"]), True
    check_channels(name, stored, tr3d.feature_size(detector.input_features), detector.oriented)
    return build_case(name, stored, log, tr3d.pyramid_config(detector)), detector


def check_case(table: ParityTable, case: SparseCase, variables: Variables, config: Any) -> None:
    """The network in evaluation mode.

    Args:
      table: gets the rows.
      case: one cloud or a batch.
      variables: of the network.
      config: config.detector, with the case's voxel size.
    """
    model = tr3d.build(config)
    forward = jax.jit(lambda v, points, pyramid: model.apply(v, points, pyramid, train=False))
    output = jax.tree.map(np.asarray, forward(variables, case.scene.points, case.pyramid))
    head = output.raw.head

    check_input(table, case)
    levels = case.pyramid.levels
    check_level(
        table,
        case,
        "stem",
        levels[2].coords,
        levels[2].mask,
        output.raw.backbone.stem,
        case.tolerance("backbone0"),
    )
    for n, features in enumerate(output.raw.backbone.stages):
        level = levels[3 + n]
        check_level(
            table, case, f"backbone{n}", level.coords, level.mask, features, case.tolerance(f"backbone{n}")
        )
    for n, (coords, features, mask) in enumerate(output.raw.neck):
        check_level(table, case, f"neck{n}", coords, mask, features, case.tolerance(f"neck{n}"))
    check_head(table, case, head, "head", case.tolerance("bbox_preds"), case.tolerance("cls_preds"))
    check_boxes(table, case, head)
    if case.scene.boxes is not None:
        check_losses(table, case, head, config)

    probability, noise = np.asarray(jax.nn.sigmoid(head.class_logits)), []
    for b in range(case.num_scenes):
        theirs = np.concatenate([case.stored[f"head{n}/cls_preds{b}"] for n in range(2)])
        noise.append(score_noise(probability[b][head.mask[b]], np.asarray(jax.nn.sigmoid(theirs))))
    decode = jax.jit(lambda output, points: tr3d.decode(output, points, config))
    found = decode(DetectorOutput(output.predictions, {}, None), case.scene.points)
    check_detections(table, case, found, noise, SLACK * case.tolerance("bbox_preds"))


def check_head(
    table: ParityTable, case: SparseCase, head: HeadOutput, prefix: str, box: float, logit: float
) -> None:
    """Anchors and what the head says of them; `box` and `logit` are the largest absolute errors."""
    stored, label = case.stored, f"{case.name}:{prefix}"
    for n in range(2):
        for b in range(case.num_scenes):
            rows, at = level_rows(head, b, n), f"{prefix}{n}/"
            points = np.asarray(head.points[b])[rows]
            if f"{at}coords{b}" in stored:
                coords = np.round(points / stored["voxel_size"]).astype(np.int64)
                table.add_exact(f"{label}{n}/coords{b}", coords, stored[f"{at}coords{b}"])
            if f"{at}points{b}" in stored:
                table.add(f"{label}{n}/points{b}", points, stored[f"{at}points{b}"], 1e-7)
            for key, ours, tolerance in (
                ("bbox_preds", head.box_channels, box),
                ("cls_preds", head.class_logits, logit),
            ):
                add_absolute(
                    table,
                    f"{label}{n}/{key}{b}",
                    np.asarray(ours[b])[rows],
                    stored[f"{at}{key}{b}"],
                    tolerance,
                )


def check_boxes(table: ParityTable, case: SparseCase, head: HeadOutput) -> None:
    """Decoded boxes: from our channels, and from the reference's own, which shows the decoding alone."""
    for n in range(2):
        step = int(case.stored.get(f"head{n}/boxes_step", 1))
        for b in range(case.num_scenes):
            name = f"head{n}/boxes{b}"
            if name not in case.stored:
                table.skipped.append(f"no {name} in {case.name}")
                continue
            theirs, rows, label = case.stored[name], level_rows(head, b, n), f"{case.name}:{name}"
            channels = case.stored[f"head{n}/bbox_preds{b}"]
            points, ours = np.asarray(head.points[b])[rows], np.asarray(head.box_channels[b])[rows]
            decoded = np.asarray(tr3d.boxes_from_head(jnp.asarray(points), jnp.asarray(channels)))[::step]
            table.add(f"{label} decoding", decoded[:, : theirs.shape[1]], theirs, DECODED)
            boxes = np.asarray(tr3d.boxes_from_head(jnp.asarray(points), jnp.asarray(ours)))[::step]
            tolerance = case.tolerance("bbox_preds")
            # The height is the sum of two sizes.
            check_box_rows(table, label, boxes, theirs, channels[::step], 2 * tolerance, tolerance)


def check_losses(table: ParityTable, case: SparseCase, head: HeadOutput, config: Any) -> None:
    """Assignments of both official variants, with the losses per location and their sums."""
    box, logit = case.tolerance("bbox_preds"), case.tolerance("cls_preds")
    for variant, suffix in VARIANTS.items():
        own = ConfigDict(config.to_dict())
        own.assigners.top_k.nearest_of_all = variant == "samsung"
        compute = jax.jit(lambda head, scene, own=own: unreduced_losses(head, scene, own))
        gt_index, class_loss, box_loss = jax.tree.map(np.asarray, compute(head, case.scene))
        for b in range(case.num_scenes):
            rows = np.asarray(head.mask[b])
            assigned, per_location = gt_index[b][rows], class_loss[b][rows]
            positive = assigned >= 0
            label = f"{case.name}:{variant}"
            table.add_exact(f"{label} assigned{b}", assigned, case.stored[f"assigned_{variant}{b}"])
            theirs = case.stored[f"loss_bbox_per_positive{suffix}{b}"]
            # The derivative of a loss by a logit is at most about 1, by a number of a box about 1 / its size.
            add_absolute(table, f"{label} loss_bbox{b}", box_loss[b][rows][positive], theirs, box)
            if f"loss_cls_per_location{suffix}{b}" in case.stored:
                theirs = case.stored[f"loss_cls_per_location{suffix}{b}"]
                add_absolute(table, f"{label} loss_cls{b}", per_location, theirs, logit)
            if f"loss_cls_sum{suffix}{b}" in case.stored:
                theirs = case.stored[f"loss_cls_sum{suffix}{b}"]
                table.add(
                    f"{label} loss_cls_sum{b}", np.asarray(per_location.sum(dtype=np.float64)), theirs, logit
                )
        if variant == "samsung":
            loss = jax.jit(lambda head, scene, own=own: losses_of_head(head, scene, own))
            check_terms(table, case, "eval", loss(head, case.scene), max(box, logit))


def unreduced_losses(head: HeadOutput, scene: Scene, config: Any) -> tuple[Array, Array, Array]:
    """Box of each anchor (-1 none), focal loss summed over classes, DIoU loss of positives: i32, f32, f32 [B, A]."""
    boxes = scene.boxes
    if boxes is None:
        raise ValueError("the losses need scene.boxes")
    gt_index = tr3d.assign_targets(head, scene, config).gt_index
    row = jnp.maximum(gt_index, 0)
    label = jnp.where(gt_index >= 0, gather_rows(boxes.label, row), -1)
    target = gather_rows(join_boxes(boxes.center, boxes.size, boxes.yaw), row)
    predicted = tr3d.boxes_from_head(head.points, head.box_channels)
    box = diou_loss(predicted, target, rotated=config.oriented, reference=True)
    return gt_index, jnp.sum(focal_loss(head.class_logits, label), -1), box


def losses_of_head(head: HeadOutput, scene: Scene, config: Any) -> dict[str, Array]:
    """The terms of the training loss."""
    return tr3d.loss(DetectorOutput(tr3d.predictions_from_head(head), {}, HeadOnly(head)), scene, config)[1]


def check_training(
    table: ParityTable, case: SparseCase, exact: dict[str, np.ndarray], variables: Variables, config: Any
) -> None:
    """One training step in float32: losses, predictions with batch statistics, gradients, running statistics.

    Args:
      table: gets the rows.
      case: with train_head*, train_*_loss, grad/* and after_train/*.
      exact: grad/* and norm/* in float64; empty if there are none.
      variables: of the network.
      config: config.detector.
    """
    step = take_training_step(tr3d, case, variables, config)
    rules = {rule.theirs: rule for rule in tr3d_rules()}
    box, logit = TRAIN * case.tolerance("bbox_preds"), TRAIN * case.tolerance("cls_preds")
    check_head(table, case, step.head, "train_head", box, logit)
    check_terms(table, case, "train", step.terms, max(box, logit))
    check_gradients(table, case, exact, step.gradient, rules)
    check_running(table, case, step.running, rules)


def check_gradients(
    table: ParityTable,
    case: SparseCase,
    exact: dict[str, np.ndarray],
    gradient: dict[str, np.ndarray],
    rules: dict[str, Rule],
) -> None:
    """Gradients of the summed losses, against float64 if the reference has it.

    No tensor of ours may be further off than twice the worst of the reference's own float32 gradients, and half of ours must
    be as close as half of theirs, or within GRADIENT and GRADIENT_MEDIAN.

    Args:
      table: gets the rows.
      case: with grad/*, and the norms of all gradients in its log.
      exact: grad/* and norm/* in float64; empty if there are none.
      gradient: {our path: gradient}.
      rules: {their name: how it is converted}.
    """
    theirs = {name: value for name, value in case.stored.items() if name.startswith("grad/")}
    norms = {f"norm/{name}": entry[0] for name, entry in case.log.get("grad_norm_sum_absmax", {}).items()}
    worst, typical, worst_norm = GRADIENT, GRADIENT, GRADIENT
    if exact:
        own = [relative_error(theirs[name], exact[name]) for name in theirs]
        worst, typical = max(2 * max(own), GRADIENT), max(float(np.median(own)), GRADIENT_MEDIAN)
        theirs = {name: exact[name] for name in theirs}
        shared = [name for name in norms if name in exact]
        worst_norm = 2 * max((relative_error(norms[name], exact[name]) for name in shared), default=0.0)
        worst_norm = max(worst_norm, GRADIENT_NORM)
        norms = {name: exact[name] for name in shared}
    errors = []
    for name, value in theirs.items():
        rule = rules[name.removeprefix("grad/")]
        table.add(f"{case.name}:{name}", gradient[rule.ours], rule.convert(value), worst)
        errors.append(table.rows[-1].error)
    if errors:
        table.add(
            f"{case.name}:grad, median of the errors", np.asarray(np.median(errors)), np.asarray(0.0), typical
        )
    for name, value in norms.items():
        parameter = name.removeprefix("norm/")
        norm = np.asarray(np.linalg.norm(np.asarray(gradient[rules[parameter].ours], np.float64)))
        table.add(f"{case.name}:|grad {parameter}|", norm, value, worst_norm)


def relative_error(values: np.ndarray, exact: np.ndarray) -> float:
    """Largest error relative to the largest magnitude."""
    return float(np.max(np.abs(np.asarray(values, np.float64) - exact)) / np.max(np.abs(exact)))
