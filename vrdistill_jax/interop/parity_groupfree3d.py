"""Compares our Group-Free-3D with the official one: forward pass, decoding, losses, gradients, batch norm.

A golden folder holds inputs.npz, labels.npz, outputs.npz, outputs_features.npz, parse_configs.json, losses.json, grads.npz,
bn_after.npz and train_outputs.npz. Only inputs and outputs.npz are required.
"""

import json
import pathlib
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.detectors import groupfree3d
from vrdistill_jax.detectors.decoding import DecodeConfig, keep_predictions
from vrdistill_jax.detectors.groupfree3d_head import HeadOutput, merge_heads
from vrdistill_jax.geometry.boxes import corners_from_boxes, join_boxes
from vrdistill_jax.geometry.frames import camera_from_depth, yaw_from_votenet_heading
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.interop.name_map import Variables, flatten
from vrdistill_jax.interop.parity import ParityTable, has_file, load_arrays
from vrdistill_jax.interop.parity_gradients import Layer, undo_flips
from vrdistill_jax.interop.parity_votenet import check_geometry
from vrdistill_jax.interop.torch_groupfree3d import official_rules
from vrdistill_jax.losses.bins import angle_from_bin
from vrdistill_jax.nn.norm import update_running
from vrdistill_jax.structs import Boxes, DetectorOutput, PointPyramid, Points, Scene

# Relative to a tensor's largest value. Up to twelve decoder layers lie behind the backbone; what the reference's own back ends
# differ by in one layer grows along the way.
FORWARD, HEAD = 2e-5, 2e-4
TRAIN = 5e-4  # batch statistics divide by the spread of this batch: a few times the forward pass
# Gradients jump where a ReLU or a maximum switches sides: in the backbone as VoteNet's do. Behind it one ReLU can move a column
# of a kernel's gradient by 5e-2 of its largest entry: in the golden SUN RGB-D step the input of query 508 in channel 173 of the
# proposal head is -1.4e-5 (its column reaches 3), and with that one sign changed this column moves by 5.44e-2, the others by
# 4.4e-4. Such a column is compared with the sign changed (`undo_flips`). Of the layers before, each of 288 channels moves by
# its share.
GRADIENT_NORM, GRADIENT, BACKBONE_GRADIENT = 1e-2, 1e-2, 3e-2
# Kernels with a batch norm and a ReLU after them, in whose columns that is looked for.
FLIPS = ("proposal_head.conv1.weight", "decoder_self_posembeds.0.position_embedding_head.0.weight")
NORM_MOMENTUM = 0.1
# Seeds of neighbouring ranks whose logits differ by rounding may swap, at the last rank also with one that is not taken.
SWAPPED, REPLACED = 8, 2

_HEAD = {
    "center": "center",
    "heading_scores": "heading_logits",
    "heading_residuals_normalized": "heading_residual",
    "size_scores": "size_logits",
    "size_residuals_normalized": "size_residual",
    "pred_size": "size",
    "sem_cls_scores": "class_logits",
}
_LOSSES = {
    "objectness_loss": "objectness",
    "center_loss": "center",
    "heading_cls_loss": "heading_class",
    "heading_reg_loss": "heading_residual",
    "size_cls_loss": "size_class",
    "size_reg_loss": "size",
    "sem_cls_loss": "class",
}
_BOX_TERMS = ("center", "heading_class", "heading_residual", "size_class", "size")
_MERGED = {"proposal_": "proposal", "last_": "last", "last_three_": "last_three", "all_layers_": "all"}


def check_groupfree3d(
    variables: Variables,
    config: ConfigDict,
    golden: str | pathlib.Path,
    inputs: str | pathlib.Path | None = None,
) -> ParityTable:
    """Runs every comparison that the golden folder has numbers for.

    The network is given the reference's queries, so that two of nearly equal rank which swap do not upset all the rest; ours
    are compared with them.

    Args:
      variables: imported from the folder's weights.
      config: the whole config that belongs to them.
      golden: the folder.
      inputs: where inputs.npz and labels.npz lie, if elsewhere.

    Returns:
      The table; files that the folder lacks are listed in `skipped`.

    Raises:
      ValueError: if inputs or outputs.npz are missing or are for another config.
    """
    golden, inputs = pathlib.Path(golden), pathlib.Path(inputs or golden)
    for path in (inputs / "inputs.npz", golden / "outputs.npz"):
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; --golden and --inputs must name folders of reference numbers"
            )
    table, config = ParityTable(), ConfigDict(config.to_dict())
    detector = config.detector
    detector.reference_sizes = detector.reference_query_positives = True
    cloud = load_arrays(inputs / "inputs.npz")["point_clouds"]
    width = 3 + groupfree3d.feature_size(detector.input_features)
    if cloud.ndim != 3 or cloud.shape[2] != width:
        raise ValueError(
            f"{inputs}/inputs.npz has clouds {cloud.shape}, the checkpoint reads [B, N, {width}]"
        )
    points = Points(cloud[..., :3], cloud[..., 3:], np.ones(cloud.shape[:2], bool))
    pyramid_config = groupfree3d.pyramid_config(detector)
    one = [build_point_pyramid(xyz, np.ones(len(xyz), bool), pyramid_config) for xyz in points.xyz]
    pyramid: PointPyramid = jax.tree.map(lambda *rows: np.stack(rows), *one)

    stored = load_arrays(golden / "outputs.npz")
    if has_file(table, golden / "outputs_features.npz"):
        stored |= load_arrays(golden / "outputs_features.npz")
    model = groupfree3d.build(detector)
    apply = jax.jit(lambda v, p, g, index: model.apply(v, p, g, train=False, query_index=index))
    index = stored["query_points_sample_inds"]
    output = jax.tree.map(np.asarray, apply(variables, points, pyramid, index))
    check_geometry(table, stored, pyramid)
    check_queries(table, stored, output, "", FORWARD)
    check_forward(table, stored, output)
    check_heads(table, stored, output, "", HEAD)
    if has_file(table, golden / "parse_configs.json"):
        configs = json.loads((golden / "parse_configs.json").read_text())
        check_parsing(table, stored, configs, output, points)
    if has_file(table, golden / "losses.json") and has_file(table, inputs / "labels.npz"):
        losses = json.loads((golden / "losses.json").read_text())
        scene = scene_from_labels(points, load_arrays(inputs / "labels.npz"), detector)
        if "eval" in losses:
            check_losses(table, losses["eval"], output, scene, detector, "eval:", HEAD)
        if "train" in losses:
            _check_training(table, golden, losses, variables, detector, scene, pyramid)
    return table


def head_prefixes(count: int) -> list[str]:
    """How the reference calls the heads, in the order of ours: proposal_, 0head_, 1head_, ..., last_."""
    return ["proposal_", *(f"{n}head_" for n in range(count - 2)), "last_"]


def check_queries(
    table: ParityTable, stored: dict, output: DetectorOutput, prefix: str, tolerance: float
) -> None:
    """The judgement of the seeds and which of them become queries."""
    raw, theirs = output.raw, stored["query_points_sample_inds"]
    table.add_exact(f"{prefix}seed_inds", raw.backbone.seeds.seed_index, stored["seed_inds"])
    if raw.seed_logit is not None:
        ours = raw.seed_logit[..., None]
        name = "seeds_obj_cls_logits"
        table.add_stored(stored, name, ours, tolerance, channels_first=True, label=prefix + name)
    sample = jax.jit(partial(groupfree3d.sample_queries, num_queries=theirs.shape[1]))
    picked = np.asarray(sample(raw.backbone.seeds, raw.seed_logit))
    table.add_exact(f"{prefix}query_points_sample_inds", picked, theirs, SWAPPED)
    others = sum(len(set(a) - set(b)) for a, b in zip(picked.tolist(), theirs.tolist(), strict=True))
    table.add_exact(f"{prefix}queries not among theirs", np.arange(others) >= 0, np.zeros(others), REPLACED)


def check_forward(table: ParityTable, stored: dict, output: DetectorOutput) -> None:
    """Everything between cloud and heads."""
    raw, names = output.raw, {name.partition("__")[0] for name in stored}
    features = {f"sa{n}_features": x for n, x in enumerate(raw.backbone.abstractions, 1)}
    features |= {f"fp{n}_features": x for n, x in enumerate(raw.backbone.propagations, 1)}
    for name, ours in features.items():
        if name in names:
            table.add_stored(stored, name, ours, FORWARD, channels_first=True)
    points = {"seed_xyz": raw.backbone.seeds, "query_points_xyz": raw.queries}
    for name, ours in points.items():
        table.add_stored(stored, name, ours.xyz, 0.0)
    between = {
        "query_points_feature": (raw.queries.features, FORWARD),
        "query_proj": (raw.query_projection, FORWARD),
        "key_proj": (raw.seed_projection, FORWARD),
    }
    for n in range(len(raw.decoder)):
        between[f"decoder{n}_self_posembed"] = raw.query_positions[n], HEAD
        between[f"decoder{n}_cross_posembed"] = raw.seed_positions[n], FORWARD
        between[f"decoder{n}_query"] = raw.decoder[n], HEAD
    for name, (ours, tolerance) in between.items():
        if name in names:
            table.add_stored(stored, name, ours, tolerance, channels_first=True)


def check_heads(
    table: ParityTable, stored: dict, output: DetectorOutput, prefix: str, tolerance: float
) -> None:
    """What every head says, as many of them as the file holds."""
    stacked, names = output.raw.head, {name.partition("__")[0] for name in stored}
    for n, own in enumerate(head_prefixes(len(stacked.center))):
        head: HeadOutput = jax.tree.map(lambda x, n=n: x[n], stacked)
        values = {"objectness_scores": head.objectness_logit[..., None]}
        values |= {theirs: getattr(head, ours) for theirs, ours in _HEAD.items()}
        for name, ours in values.items():
            if ours is not None and own + name in names:
                table.add_stored(stored, own + name, np.asarray(ours), tolerance, label=prefix + own + name)


def check_parsing(
    table: ParityTable, stored: dict, configs: dict, output: DetectorOutput, points: Points
) -> None:
    """Which boxes of which heads survive the evaluation protocol, their corners and their scores."""
    merged = {
        prefix: merge_heads(output.raw.head, output.raw.queries.mask, which)
        for prefix, which in _MERGED.items()
    }
    for name, options in configs.items():
        protocol = DecodeConfig(
            nms_iou=options["nms_iou"],
            class_aware=options["cls_nms"],
            score_threshold=options["conf_thresh"],
            min_points=5 if options["remove_empty_box"] else 0,
        )
        for prefix, predictions in merged.items():
            if f"parse_{name}_{prefix}num_0" not in stored:
                continue
            kept = np.asarray(keep_predictions(predictions, points, protocol))
            boxes = join_boxes(predictions.center, predictions.size, predictions.yaw)
            corners = np.asarray(camera_from_depth(corners_from_boxes(boxes)))
            classes = np.asarray(jax.nn.softmax(predictions.class_logits, -1))
            for b in range(len(kept)):
                label, rows = f"parse_{name}_{prefix}", np.flatnonzero(kept[b])
                # Heads lie one after the other, in an order of the reference's own: both are put in the order of scores.
                objectness = np.asarray(predictions.objectness[b])[rows]
                rows = rows[np.argsort(-objectness, kind="stable")]
                count = int(stored[f"{label}num_{b}"])
                if not table.add_exact(f"{label}num_{b}", np.asarray(len(rows)), np.asarray(count)):
                    continue
                score = (classes[b][rows] * np.asarray(predictions.objectness[b])[rows, None]).T
                theirs = stored[f"{label}score_{b}"].reshape(-1, count)
                order = np.argsort(-theirs.sum(0), kind="stable")
                table.add(f"{label}score_{b}", np.asarray(score), theirs[:, order], HEAD)
                table.add(
                    f"{label}kept_corners_{b}",
                    corners[b][rows],
                    stored[f"{label}kept_corners_{b}"][order],
                    HEAD,
                )


def check_losses(
    table: ParityTable,
    golden: dict,
    output: DetectorOutput,
    scene: Scene,
    detector: Any,
    prefix: str,
    tolerance: float,
) -> None:
    """Every term of every head."""

    @jax.jit
    def compute(output, scene):
        return groupfree3d.loss(output, scene, detector)[0], *groupfree3d.losses_by_head(
            output, scene, detector
        )

    total, by_head, measures = jax.tree.map(np.asarray, compute(output, scene))
    weight, names = detector.loss_weight, head_prefixes(len(output.raw.head.center))
    boxes = sum(weight[term] * values for term, values in by_head.items() if term in _BOX_TERMS)
    sums = {"box": boxes, "objectness": by_head["objectness"], "sem_cls": by_head["class"]}
    ours = {"loss": total} | {f"sum_heads_{name}_loss": values.sum() for name, values in sums.items()}
    if "query_points" in by_head:
        ours["query_points_generation_loss"] = by_head["query_points"][0]
        share = measures["query_point_share"]
        stem = f"points_hard_topk{detector.query_positives}"
        ours |= {f"{stem}_pos_ratio": share, f"{stem}_neg_ratio": 1 - share}
    for n, own in enumerate(names):
        ours |= {own + theirs: by_head[term][n] for theirs, term in _LOSSES.items() if term in by_head}
        positive = measures["positive_share"]
        ours |= {f"{own}box_loss": boxes[n], f"{own}pos_ratio": positive, f"{own}neg_ratio": 1 - positive}
    for name, value in golden.items():
        if name in ours:
            table.add(prefix + name, ours[name], value, tolerance)
        else:
            table.skipped.append(f"{prefix}{name} (unknown term)")


def scene_from_labels(points: Points, labels: dict, detector: Any) -> Scene:
    """The reference's label dictionary as a scene; each point belongs to one box at most."""
    sizes, mask = np.asarray(detector.mean_sizes, np.float32), labels["box_label_mask"] > 0
    heading = angle_from_bin(
        labels["heading_class_label"], labels["heading_residual_label"], detector.num_heading_bins
    )
    center = np.where(mask[..., None], labels["center_label"], 0.0).astype(np.float32)
    size = sizes[labels["size_class_label"]] + labels["size_residual_label"]
    boxes = Boxes(
        center=center,
        size=np.where(mask[..., None], size, 1.0).astype(np.float32),
        yaw=np.where(mask, np.asarray(yaw_from_votenet_heading(heading)), 0.0).astype(np.float32),
        label=np.where(mask, labels["sem_cls_label"], -1).astype(np.int32),
        mask=mask,
        vote_center=center,
    )
    instance = np.where(labels["point_obj_mask"] > 0, labels["point_instance_label"], -1).astype(np.int32)
    batch = len(mask)
    frame = np.tile(np.eye(4, dtype=np.float32), (batch, 1, 1))
    rows = np.arange(batch, dtype=np.int32)
    return Scene(points, boxes, instance[..., None], frame, rows, np.ones(batch, bool))


def _check_training(table, folder, losses, variables, detector, scene, pyramid) -> None:
    """One training step without dropout: outputs, loss, gradients, running statistics."""
    path = folder / "train_outputs.npz"
    if not has_file(table, path):
        return  # without the reference's queries nothing behind them can be compared
    stored, prefix = load_arrays(path), "train:"
    index = stored["query_points_sample_inds"]
    detector = ConfigDict(detector.to_dict())
    detector.dropout = 0.0
    model = groupfree3d.build(detector)

    @jax.jit
    def step(variables, scene, pyramid):
        def objective(params):
            tree = {"params": params, "batch_stats": variables["batch_stats"]}
            output, updates = model.apply(
                tree, scene.points, pyramid, train=True, query_index=index, mutable=["batch_stats"]
            )
            total, _ = groupfree3d.loss(output, scene, detector)
            return total, (output, updates["batch_stats"])

        return jax.grad(objective, has_aux=True)(variables["params"])

    gradients, (output, stats) = jax.tree.map(np.asarray, step(variables, scene, pyramid))
    check_queries(table, stored, output, prefix, TRAIN)
    check_heads(table, stored, output, prefix, TRAIN)
    seeds = output.raw.backbone.seeds
    assign = jax.jit(groupfree3d.assign_seeds)
    row, on_object = (np.asarray(x) for x in assign(seeds, scene.point_instance, scene.boxes))
    row, on_object = (np.take_along_axis(x, index, 1) for x in (row, on_object))
    if "last_objectness_label" in stored:
        table.add_exact(f"{prefix}last_objectness_label", on_object, stored["last_objectness_label"])
        background = scene.boxes.mask.shape[1] - 1  # where the reference puts what lies on no object
        assigned = np.where(on_object, row, background)
        table.add_exact(f"{prefix}last_object_assignment", assigned, stored["last_object_assignment"])
    check_losses(table, losses["train"], output, scene, detector, prefix, TRAIN)

    flat = flatten({"params": gradients})
    rules = official_rules(detector.decoder_layers, detector.size_by_class, detector.sampling)
    by_name = {rule.theirs: rule for rule in rules}
    norms = losses.get("grad_norms_train", {})
    largest = max(norms.values(), default=1.0)
    for name, norm in norms.items():
        # A bias in front of a batch norm has no gradient but rounding: judged against the largest one.
        ours = np.linalg.norm(flat[by_name[name].ours].astype(np.float64))
        table.add(f"{prefix}|grad {name}|", ours, norm, GRADIENT_NORM, scale=max(norm, 1e-3 * largest))
    if has_file(table, folder / "grads.npz"):
        for name, value in load_arrays(folder / "grads.npz").items():
            own, theirs, label = (
                flat[by_name[name].ours],
                by_name[name].convert(value),
                f"{prefix}grad {name}",
            )
            if name in FLIPS:
                layer = _layer_before_relu(name, by_name[name].ours, output, variables, detector)
                own, flips = undo_flips(own, theirs, layer, FORWARD, GRADIENT)
                label += "".join(f" (but for the ReLU of query {f.row}, channel {f.column})" for f in flips)
            in_backbone = name.startswith("backbone_net.")
            table.add(label, own, theirs, BACKBONE_GRADIENT if in_backbone else GRADIENT)
    if has_file(table, folder / "bn_after.npz"):
        after = flatten({"batch_stats": update_running(variables["batch_stats"], stats, NORM_MOMENTUM)})
        for name, value in load_arrays(folder / "bn_after.npz").items():
            if name in by_name:
                table.add(prefix + name, after[by_name[name].ours], value, TRAIN)
            else:
                table.skipped.append(f"{prefix}{name} (a counter)")


def _layer_before_relu(
    name: str, path: str, output: DetectorOutput, variables: Variables, detector: Any
) -> Layer:
    """The layer of one of FLIPS, with what it reads in this training step."""
    raw = output.raw
    if name.startswith("proposal_head."):
        inputs = raw.queries.features
    else:  # the boxes of the proposal head
        inputs = np.concatenate([raw.head.center[0], raw.head.size[0]], -1)
    flat, stem = flatten({"params": variables["params"]}), path.removesuffix("dense/kernel")
    parts = ("dense/kernel", "dense/bias", "norm/scale", "norm/bias")
    kernel, bias, scale, shift = (np.asarray(flat[stem + part]) for part in parts)
    return Layer(inputs.reshape(-1, len(kernel)), kernel, bias, scale, shift, detector.norm_epsilon)
