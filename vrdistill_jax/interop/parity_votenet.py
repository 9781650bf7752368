"""Compares our VoteNet with the official one: forward pass, decoding, losses, gradients, batch norm.

A golden folder holds inputs.npz, labels.npz, outputs.npz, outputs_vote_fps.npz, parse_configs.json,
losses.json and, per cluster sampling, grads_*.npz, bn_after_*.npz and train_outputs_*.npz. Only inputs and
outputs.npz are required.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.detectors import votenet
from vrdistill_jax.geometry.boxes import corners_from_boxes, count_points_in_boxes, join_boxes
from vrdistill_jax.geometry.frames import camera_from_depth, yaw_from_votenet_heading
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.geometry.nms import nms
from vrdistill_jax.interop.name_map import Variables, flatten
from vrdistill_jax.interop.parity import ParityTable, has_file, load_arrays
from vrdistill_jax.interop.torch_votenet import official_rules
from vrdistill_jax.losses.bins import angle_from_bin
from vrdistill_jax.nn.norm import update_running
from vrdistill_jax.structs import Boxes, DetectorOutput, PointPyramid, Points, Scene

# Relative to a tensor's largest value. The reference itself moves by 4e-6 (features) to 2e-5 (heads) between
# its own convolution back ends; our set abstraction adds its products in another order.
FORWARD, HEAD = 2e-5, 6e-5
TRAIN = 2e-4  # batch statistics divide by the spread of this batch: a few times the forward pass
# Gradients jump where a ReLU or a maximum switches sides: weights that differ by 2e-7 move the backbone's by
# 1e-2. The proposal head lies behind all maxima.
HEAD_GRADIENT, GRADIENT_NORM, GRADIENT = 1e-3, 1e-2, 3e-2
NORM_MOMENTUM = 0.5  # of the reference in its first epoch

_HEAD = {
    "objectness_scores": "objectness_logits",
    "center": "center",
    "heading_scores": "heading_logits",
    "heading_residuals_normalized": "heading_residual",
    "size_scores": "size_logits",
    "size_residuals_normalized": "size_residual",
    "sem_cls_scores": "class_logits",
}
_LOSSES = {
    "vote_loss": "vote",
    "objectness_loss": "objectness",
    "center_loss": "center",
    "heading_cls_loss": "heading_class",
    "heading_reg_loss": "heading_residual",
    "size_cls_loss": "size_class",
    "size_reg_loss": "size_residual",
    "sem_cls_loss": "class",
    "pos_ratio": "positive_share",
    "neg_ratio": "negative_share",
    "obj_acc": "objectness_accuracy",
}


def check_votenet(
    variables: Variables,
    config: ConfigDict,
    golden: str | pathlib.Path,
    inputs: str | pathlib.Path | None = None,
) -> ParityTable:
    """Runs every comparison that the golden folder has numbers for.

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
    table = ParityTable()
    cloud = np.load(inputs / "inputs.npz")["point_clouds"]
    width = 3 + votenet.feature_size(config.detector.input_features)
    if cloud.ndim != 3 or cloud.shape[2] != width:
        raise ValueError(
            f"{inputs}/inputs.npz has clouds {cloud.shape}, the checkpoint reads [B, N, {width}]"
        )
    points = Points(cloud[..., :3], cloud[..., 3:], np.ones(cloud.shape[:2], bool))
    one = [
        build_point_pyramid(xyz, np.ones(len(xyz), bool), votenet.pyramid_config(config.detector))
        for xyz in points.xyz
    ]
    pyramid: PointPyramid = jax.tree.map(lambda *rows: np.stack(rows), *one)

    outputs = {}
    for sampling in ("seed_fps", "vote_fps"):
        model = votenet.build(_with_sampling(config, sampling).detector)
        apply = jax.jit(lambda v, p, g, model=model: model.apply(v, p, g, train=False))
        outputs[sampling] = jax.tree.map(np.asarray, apply(variables, points, pyramid))
    check_geometry(table, load_arrays(golden / "outputs.npz"), pyramid)
    check_forward(table, load_arrays(golden / "outputs.npz"), outputs["seed_fps"], config)
    check_decoding(table, load_arrays(golden / "outputs.npz"), outputs["seed_fps"], points)
    if has_file(table, golden / "parse_configs.json"):
        configs = json.loads((golden / "parse_configs.json").read_text())
        check_parsing(table, load_arrays(golden / "outputs.npz"), configs, outputs["seed_fps"], points)
    if has_file(table, golden / "outputs_vote_fps.npz"):
        check_clusters(
            table, load_arrays(golden / "outputs_vote_fps.npz"), outputs["vote_fps"], "vote_fps:", HEAD
        )
    if has_file(table, golden / "losses.json") and has_file(table, inputs / "labels.npz"):
        losses = json.loads((golden / "losses.json").read_text())
        scene = scene_from_labels(points, load_arrays(inputs / "labels.npz"), config)
        for sampling, output in outputs.items():
            if f"eval_{sampling}" in losses:
                total, terms = votenet.loss(output, scene, _with_sampling(config, sampling).detector)
                check_losses(table, losses[f"eval_{sampling}"], total, terms, f"eval_{sampling}:", HEAD)
            if f"train_{sampling}" in losses:
                _check_training(
                    table, golden, losses, variables, _with_sampling(config, sampling), scene, pyramid
                )
    return table


def check_geometry(table: ParityTable, golden: dict, pyramid: PointPyramid) -> None:
    """Sampled points of every level: the same rows, the same coordinates."""
    for n, level in enumerate(pyramid.levels, 1):
        if f"sa{n}_inds" in golden:
            table.add_exact(f"sa{n}_inds", level.index, golden[f"sa{n}_inds"])
        table.add_stored(golden, f"sa{n}_xyz", level.xyz, 0.0)


def check_forward(table: ParityTable, golden: dict, output: DetectorOutput, config: ConfigDict) -> None:
    """Everything between cloud and head."""
    raw = output.raw
    for n, features in enumerate(raw.backbone.abstractions, 1):
        table.add_stored(golden, f"sa{n}_features", features, FORWARD, channels_first=True)
    for n, features in enumerate(raw.backbone.propagations, 1):
        table.add_stored(golden, f"fp{n}_features", features, FORWARD, channels_first=True)
    table.add_exact("seed_inds", raw.backbone.seeds.seed_index, golden["seed_inds"])
    table.add_stored(golden, "seed_xyz", raw.backbone.seeds.xyz, 0.0)
    table.add_stored(golden, "vgen_conv3_raw", raw.vote_channels, HEAD, channels_first=True)
    table.add_stored(golden, "vote_xyz", raw.votes.xyz, FORWARD)
    table.add_stored(golden, "vote_features", raw.votes.features, FORWARD, channels_first=True)
    table.add_stored(golden, "aggregated_vote_features", raw.clusters.features, HEAD, channels_first=True)
    table.add_stored(golden, "pnet_conv3_raw", raw.head_channels, HEAD, channels_first=True)
    check_clusters(table, golden, output, "", HEAD)
    head = raw.head
    bins = head.heading_logits.shape[-1]
    mean_sizes = np.asarray(config.detector.mean_sizes, np.float32)
    table.add_stored(golden, "heading_residuals", head.heading_residual * np.float32(np.pi / bins), HEAD)
    table.add_stored(golden, "size_residuals", head.size_residual * mean_sizes, HEAD)


def check_clusters(
    table: ParityTable, golden: dict, output: DetectorOutput, prefix: str, tolerance: float
) -> None:
    """Clusters and head, as many of them as the file holds."""
    raw, stored = output.raw, {name.partition("__")[0] for name in golden}
    table.add_exact(f"{prefix}aggregated_vote_inds", raw.cluster_index, golden["aggregated_vote_inds"])
    values = {"aggregated_vote_xyz": raw.clusters.xyz} | {k: getattr(raw.head, v) for k, v in _HEAD.items()}
    for name, value in values.items():
        if name in stored:
            table.add_stored(golden, name, value, tolerance, label=prefix + name)


def check_decoding(table: ParityTable, golden: dict, output: DetectorOutput, points: Points) -> None:
    """Boxes, their corners and the points inside them."""
    head, predictions = output.raw.head, output.predictions
    table.add_exact("decoded_heading_class", head.heading_logits.argmax(-1), golden["decoded_heading_class"])
    table.add_exact("decoded_size_class", head.size_logits.argmax(-1), golden["decoded_size_class"])
    table.add_exact("decoded_sem_cls", predictions.class_logits.argmax(-1), golden["decoded_sem_cls"])
    turn = predictions.yaw + golden["decoded_heading_angle"]
    turn = turn - 2 * np.pi * np.round(
        turn / (2 * np.pi)
    )  # our yaw is minus their heading, up to a whole turn
    table.add("decoded_heading_angle", turn, np.zeros_like(turn), 6e-5 * np.pi)
    table.add_stored(golden, "decoded_box_size", predictions.size, HEAD)
    table.add_stored(golden, "objectness_prob", predictions.objectness, HEAD)
    probability = np.asarray(jax.nn.softmax(predictions.class_logits, -1))
    table.add_stored(golden, "sem_cls_prob", probability, HEAD)
    boxes = join_boxes(predictions.center, predictions.size, predictions.yaw)
    corners = np.asarray(camera_from_depth(corners_from_boxes(boxes)))
    table.add_stored(golden, "decoded_corners_upright_camera", corners, HEAD)
    _, outside = count_points(golden, output, points)
    table.add_exact("decoded_points_in_box", outside, np.zeros_like(outside))


def count_points(golden: dict, output: DetectorOutput, points: Points) -> tuple[np.ndarray, np.ndarray]:
    """How many points every box holds, as the reference counted where rounding decides.

    Corners may differ by HEAD of the largest coordinate. A box that much smaller and one that much larger bound the counts
    that this allows.

    Args:
      golden: the arrays of outputs.npz.
      output: of our network.
      points: the clouds.

    Returns:
      (i64[B, Q] the reference's count if it lies within the bounds, else ours; bool[B, Q] where it does not). Boxes of which
      the reference could not make a hull have our count.
    """
    center, size, yaw = output.predictions.center, output.predictions.size, output.predictions.yaw
    slack = HEAD * np.abs(corners_from_boxes(join_boxes(center, size, yaw))).max()

    @jax.jit
    def count(change):
        boxes = join_boxes(center, size + 2 * change, yaw)
        return jax.vmap(count_points_in_boxes)(points.xyz, boxes, points.mask)

    fewest, ours, most = (np.asarray(count(change)).astype(np.int64) for change in (-slack, 0.0, slack))
    theirs = golden["decoded_points_in_box"]
    known = theirs >= 0  # -1: the reference's hull construction failed
    outside = known & ((theirs < fewest) | (theirs > most))
    return np.where(known & ~outside, theirs, ours), outside


def check_parsing(
    table: ParityTable, golden: dict, configs: dict, output: DetectorOutput, points: Points
) -> None:
    """Which boxes survive suppression, and what is emitted, for each of the reference's configurations."""
    predictions = output.predictions
    boxes = join_boxes(predictions.center, predictions.size, predictions.yaw)
    count, _ = count_points(golden, output, points)
    label = predictions.class_logits.argmax(-1)
    probability = np.asarray(jax.nn.softmax(predictions.class_logits, -1))
    corners = np.asarray(camera_from_depth(corners_from_boxes(boxes)))
    for name, options in configs.items():
        valid = count >= 5 if options["remove_empty_box"] else np.ones_like(count, bool)
        kept = np.stack(
            [
                np.asarray(
                    nms(
                        boxes[b],
                        predictions.objectness[b],
                        valid[b],
                        label[b] if options["cls_nms"] else None,
                        threshold=options["nms_iou"],
                        overlap="aligned" if options["use_3d_nms"] else "bev_aligned",
                        denominator="candidate" if options["use_old_type_nms"] else "union",
                    ).mask
                )
                for b in range(len(boxes))
            ]
        )
        table.add_exact(f"parse_{name}_pred_mask", kept, golden[f"parse_{name}_pred_mask"])
        for b in range(len(boxes)):
            rows = np.flatnonzero(kept[b] & (predictions.objectness[b] > options["conf_thresh"]))
            if options["per_class_proposal"]:  # class after class
                classes = np.repeat(np.arange(probability.shape[-1]), len(rows))
                rows = np.tile(rows, probability.shape[-1])
                score = predictions.objectness[b][rows] * probability[b][rows, classes]
            else:
                classes, score = label[b][rows], predictions.objectness[b][rows]
            table.add_exact(f"parse_{name}_cls_{b}", classes, golden[f"parse_{name}_cls_{b}"])
            table.add(f"parse_{name}_score_{b}", score, golden[f"parse_{name}_score_{b}"], HEAD)
            if f"parse_{name}_corners_{b}" in golden:
                table.add(
                    f"parse_{name}_corners_{b}", corners[b][rows], golden[f"parse_{name}_corners_{b}"], HEAD
                )


def check_losses(
    table: ParityTable, golden: dict, total: Any, terms: dict, prefix: str, tolerance: float
) -> None:
    """Every term of the loss."""
    ours = {theirs: terms[name] for theirs, name in _LOSSES.items()} | {"loss": total}
    ours["box_loss"] = (
        terms["center"]
        + 0.1 * (terms["heading_class"] + terms["size_class"])
        + terms["heading_residual"]
        + terms["size_residual"]
    )
    for name, value in golden.items():
        if name in ours:
            table.add(prefix + name, ours[name], value, tolerance)
        else:
            table.skipped.append(f"{prefix}{name} (unknown term)")


def scene_from_labels(points: Points, labels: dict, config: ConfigDict) -> Scene:
    """The reference's label dictionary as a scene.

    Its votes are offsets per point; each distinct place that votes aim at belongs to the nearest box.

    Raises:
      ValueError: if two places belong to one box.
    """
    sizes = np.asarray(config.detector.mean_sizes, np.float32)
    mask = labels["box_label_mask"] > 0
    heading = angle_from_bin(
        labels["heading_class_label"], labels["heading_residual_label"], config.detector.num_heading_bins
    )
    center = labels["center_label"].astype(np.float32)
    vote_center, instance = (
        np.zeros_like(center),
        np.full((*mask.shape[:1], points.xyz.shape[1], 3), -1, np.int32),
    )
    for b in range(len(mask)):
        rows = np.flatnonzero(labels["vote_label_mask"][b])
        votes = labels["vote_label"][b][rows].reshape(len(rows), 3, 3)
        aim = points.xyz[b][rows][:, None] + votes
        distance = np.linalg.norm(aim[:, :, None] - center[b][mask[b]], axis=-1)
        owner = np.flatnonzero(mask[b])[distance.argmin(-1)]
        instance[b, rows] = owner
        for row in np.unique(owner):
            places = aim[owner == row]
            vote_center[b, row] = places.mean(0)
            if np.abs(places - vote_center[b, row]).max() > 1e-3:
                raise ValueError(
                    f"votes of box {row} of sample {b} aim at several places; labels.npz is not VoteNet's"
                )
    boxes = Boxes(
        center=center,
        size=np.where(
            mask[..., None], sizes[labels["size_class_label"]] + labels["size_residual_label"], 1.0
        ).astype(np.float32),
        yaw=np.where(mask, np.asarray(yaw_from_votenet_heading(heading)), 0.0).astype(np.float32),
        label=np.where(mask, labels["sem_cls_label"], -1).astype(np.int32),
        mask=mask,
        vote_center=vote_center,
    )
    batch = len(mask)
    frame = np.tile(np.eye(4, dtype=np.float32), (batch, 1, 1))
    return Scene(points, boxes, instance, frame, np.arange(batch, dtype=np.int32), np.ones(batch, bool))


def _check_training(table, golden_folder, losses, variables, config, scene, pyramid) -> None:
    """One training step: outputs, loss, gradients, running statistics."""
    sampling = config.detector.cluster_sampling
    model, prefix = votenet.build(config.detector), f"train_{sampling}:"

    @jax.jit
    def step(variables, scene, pyramid):
        def objective(params):
            tree = {"params": params, "batch_stats": variables["batch_stats"]}
            output, updates = model.apply(tree, scene.points, pyramid, train=True, mutable=["batch_stats"])
            total, terms = votenet.loss(output, scene, config.detector)
            return total, (terms, output, updates["batch_stats"])

        (total, rest), gradients = jax.value_and_grad(objective, has_aux=True)(variables["params"])
        return total, *rest, gradients

    total, terms, output, stats, gradients = jax.tree.map(np.asarray, step(variables, scene, pyramid))
    path = golden_folder / f"train_outputs_{sampling}.npz"
    if has_file(table, path):
        golden = load_arrays(path)
        table.add_exact(f"{prefix}seed_inds", output.raw.votes.seed_index, golden["seed_inds"])
        table.add_stored(golden, "vote_xyz", output.raw.votes.xyz, TRAIN, label=f"{prefix}vote_xyz")
        check_clusters(table, golden, output, prefix, TRAIN)
    check_losses(table, losses[f"train_{sampling}"], total, terms, prefix, TRAIN)

    flat = flatten({"params": gradients})
    norms = losses.get(f"grad_norms_train_{sampling}", {})
    rules = {rule.theirs: rule for rule in official_rules()}
    largest = max(norms.values(), default=1.0)
    for name, norm in norms.items():
        # A bias in front of a batch norm has no gradient but rounding: judged against the largest one.
        ours = np.linalg.norm(flat[rules[name].ours].astype(np.float64))
        tolerance = HEAD_GRADIENT if _behind_maxima(name) else GRADIENT_NORM
        table.add(f"{prefix}|grad {name}|", ours, norm, tolerance, scale=max(norm, 1e-3 * largest))
    path = golden_folder / f"grads_{sampling}.npz"
    if has_file(table, path):
        for name, value in load_arrays(path).items():
            tolerance = HEAD_GRADIENT if _behind_maxima(name) else GRADIENT
            table.add(f"{prefix}grad {name}", flat[rules[name].ours], rules[name].convert(value), tolerance)
    path = golden_folder / f"bn_after_{sampling}.npz"
    if has_file(table, path):
        after = flatten({"batch_stats": update_running(variables["batch_stats"], stats, NORM_MOMENTUM)})
        for name, value in load_arrays(path).items():
            if name in rules:
                table.add(prefix + name, after[rules[name].ours], value, TRAIN)
            else:
                table.skipped.append(f"{prefix}{name} (a counter)")


def _behind_maxima(name: str) -> bool:
    return name.startswith(("pnet.conv", "pnet.bn"))


def _with_sampling(config: ConfigDict, sampling: str) -> ConfigDict:
    """The config with one cluster sampling in training and evaluation, and the reference's zero padding."""
    config = ConfigDict(config.to_dict())
    config.detector.cluster_sampling = config.detector.cluster_sampling_eval = sampling
    config.detector.reference_padding = True
    return config
