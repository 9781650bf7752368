"""Compares our 3DETR and 3DETR-m with the official ones: forward pass, decoding, matching, losses, gradients, batch norm.

A golden folder holds inputs.npz, labels.npz, outputs.npz, outputs_encoder.npz, losses.json, train_outputs.npz, bn_after.npz
and, per GIoU variant ("torch", "cython"), match_{eval,train}_*.npz and grads_*.npz. Only inputs and outputs.npz are required.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vrdistill_jax.detectors import three_detr
from vrdistill_jax.detectors.decoding import DecodeConfig, keep_predictions
from vrdistill_jax.geometry.boxes import corners_from_boxes, join_boxes
from vrdistill_jax.geometry.frames import camera_from_depth, yaw_from_votenet_heading
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.interop.name_map import Variables, flatten
from vrdistill_jax.interop.parity import ParityTable, has_file, load_arrays
from vrdistill_jax.interop.torch_three_detr import official_rules
from vrdistill_jax.losses.box import squared_distances
from vrdistill_jax.nn.norm import update_running
from vrdistill_jax.structs import Boxes, DetectorOutput, PointPyramid, Points, Scene

# Relative to a tensor's largest value. Eight decoder layers on top of three of the encoder: what the reference's own back ends
# differ by in one layer grows along the way.
FORWARD, HEAD = 2e-5, 2e-4
TRAIN = 5e-4  # batch statistics divide by the spread of this batch: a few times the forward pass
GRADIENT_NORM, GRADIENT = 1e-2, 3e-2  # they jump where a ReLU or a maximum switches sides
NORM_MOMENTUM = 0.1
# Pairs of points whose distance is within rounding of a mask's radius: the reference's distances are 6e-5 off.
FLIPPED_PAIRS = 64

_LOSSES = {
    "loss_sem_cls": "class",
    "loss_angle_cls": "heading_class",
    "loss_angle_reg": "heading_residual",
    "loss_center": "center",
    "loss_size": "size",
    "loss_giou": "giou",
    "loss_cardinality": "cardinality_error",
}
_PARSING = {"exact_eval": DecodeConfig(keep_surest=True), "fast_eval": DecodeConfig(min_points=0)}


def check_three_detr(
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
    table, detector = ParityTable(), config.detector
    cloud = load_arrays(inputs / "inputs.npz")["point_clouds"]
    width = 3 + three_detr.feature_size(detector.input_features)
    if cloud.ndim != 3 or cloud.shape[2] != width:
        raise ValueError(
            f"{inputs}/inputs.npz has clouds {cloud.shape}, the checkpoint reads [B, N, {width}]"
        )
    points = Points(cloud[..., :3], cloud[..., 3:], np.ones(cloud.shape[:2], bool))
    pyramid_config = three_detr.pyramid_config(detector)
    one = [build_point_pyramid(xyz, np.ones(len(xyz), bool), pyramid_config) for xyz in points.xyz]
    pyramid: PointPyramid = jax.tree.map(lambda *rows: np.stack(rows), *one)

    stored = load_arrays(golden / "outputs.npz")
    if has_file(table, golden / "outputs_encoder.npz"):
        stored |= load_arrays(golden / "outputs_encoder.npz")
    masks = read_attention_masks(table, stored, pyramid, detector)
    model = three_detr.build(detector)
    apply = jax.jit(lambda v, p, g, m: model.apply(v, p, g, train=False, attention_masks=m))
    output = jax.tree.map(np.asarray, apply(variables, points, pyramid, masks))
    check_geometry(table, stored, pyramid)
    check_forward(table, stored, output)
    check_heads(table, stored, output, "", HEAD)
    check_parsing(table, stored, output, points)
    if has_file(table, golden / "losses.json") and has_file(table, inputs / "labels.npz"):
        losses = json.loads((golden / "losses.json").read_text())
        labels = load_arrays(inputs / "labels.npz")
        scene = scene_from_labels(points, labels)
        corners = camera_from_depth(np.asarray(corners_from_boxes(_rows(scene.boxes))))
        mask = labels["gt_box_present"] > 0
        table.add("gt_box_corners", corners[mask], labels["gt_box_corners"][mask], FORWARD)
        for variant in ("torch", "cython"):
            own = ConfigDict(config.to_dict())
            own.detector.reference_giou = variant
            if f"eval_{variant}" in losses:
                _check_losses(table, golden, losses, f"eval_{variant}", output, scene, own, HEAD)
            if f"train_{variant}" in losses:
                _check_training(table, golden, losses, variant, variables, own, scene, pyramid, masks)
    return table


def read_attention_masks(table: ParityTable, stored: dict, pyramid: PointPyramid, detector: Any):
    """The reference's own masks, so that pairs near a radius fall on the same side; None where there are none.

    They are compared with ours; a few pairs may differ.
    """
    if not detector.masking_radii:
        return None
    masks = []
    for n, radius in enumerate(detector.masking_radii):
        xyz = pyramid.levels[min(n, len(pyramid.levels) - 2)].xyz
        ours = np.asarray(jax.jit(squared_distances)(xyz, xyz) < radius**2)
        name = f"enc_mask{n}_packed"
        if name not in stored:
            table.skipped.append(f"no {name} there")
            return None
        theirs = ~np.unpackbits(stored[name], axis=-1, count=ours.shape[-1]).astype(bool)
        table.add_exact(f"enc_mask{n}", ours, theirs, FLIPPED_PAIRS)
        masks.append(theirs)
    return tuple(masks)


def check_geometry(table: ParityTable, stored: dict, pyramid: PointPyramid) -> None:
    """Tokens and queries: the same rows, the same coordinates."""
    first, *between, queries = pyramid.levels
    table.add_exact("pre_enc_inds", first.index, stored["pre_enc_inds"])
    table.add_stored(stored, "pre_enc_xyz", first.xyz, 0.0)
    for level in between:
        theirs = stored["enc_interim_inds"]
        of_cloud = theirs.max() >= first.index.shape[-1]  # rows of the cloud, or of the level above
        table.add_exact("enc_interim_inds", level.source_index if of_cloud else level.index, theirs)
    table.add_stored(stored, "enc_xyz", pyramid.levels[-2].xyz, 0.0)
    table.add_stored(stored, "query_xyz", queries.xyz, 0.0)


def check_forward(table: ParityTable, stored: dict, output: DetectorOutput) -> None:
    """Everything between cloud and heads."""
    raw, names = output.raw, {name.partition("__")[0] for name in stored}
    channels_first = {
        "pre_enc_features": raw.abstractions[0],
        "enc_features_projected": raw.memory.features,
        "enc_pos_embed": raw.memory_position,
        "query_pos_embed": raw.query_position,
        "query_embed": raw.query_embedding,
    }
    if len(raw.abstractions) > 1:
        channels_first["interim_features"] = raw.abstractions[1]
    for name, ours in channels_first.items():
        if name in names:
            table.add_stored(stored, name, ours, FORWARD, channels_first=True)
    rows_first = {"enc_layer0": raw.encoder[0], "enc_features": raw.encoder[-1]}
    rows_first |= {f"box_features_layer{n}": x for n, x in enumerate(raw.decoder)}
    for name, ours in rows_first.items():
        if name in names:
            tolerance = HEAD if name.startswith("box") else FORWARD
            table.add_stored(stored, name, ours.swapaxes(0, 1), tolerance)
    if "box_features_layersum64" in stored:
        ours = raw.decoder.astype(np.float64)
        scale = np.abs(ours).sum((1, 2, 3)).max()
        table.add(
            "box_features_layersum64", ours.sum((1, 2, 3)), stored["box_features_layersum64"], HEAD, scale
        )


def check_heads(
    table: ParityTable, stored: dict, output: DetectorOutput, prefix: str, tolerance: float
) -> None:
    """What the heads say after every layer, and the boxes that follow."""
    raw, head, predictions = output.raw, output.raw.head, output.predictions
    low, extent = raw.low[:, None], (raw.high - raw.low)[:, None]
    bins = head.heading_logits.shape[-1]
    heads = {
        "sem_cls_logits": head.class_logits,
        "center_normalized": (head.center - low) / extent,
        "size_normalized": head.size,
        "angle_logits": head.heading_logits,
        "angle_residual_normalized": head.heading_residual,
        "center_unnormalized": head.center,
        "size_unnormalized": head.size * extent,
        "angle_residual": head.heading_residual * np.float32(np.pi / bins),
    }
    for layer in range(len(head.center)):
        last = layer == len(head.center) - 1
        for name, ours in heads.items():
            theirs = f"out_{name}" if last else f"aux{layer}_{name}"
            if theirs in stored:
                table.add(prefix + theirs, ours[layer], stored[theirs], tolerance)
    if "out_box_corners" not in stored:
        return
    probability = np.asarray(jax.nn.softmax(head.class_logits[-1], -1))[..., :-1]
    table.add(f"{prefix}out_sem_cls_prob", probability, stored["out_sem_cls_prob"], tolerance)
    table.add(
        f"{prefix}out_objectness_prob", predictions.objectness, stored["out_objectness_prob"], tolerance
    )
    turn = (
        predictions.yaw + stored["out_angle_continuous"]
    )  # our yaw is minus their heading, up to a whole turn
    turn = turn - 2 * np.pi * np.round(turn / (2 * np.pi))
    table.add(f"{prefix}out_angle_continuous", turn, np.zeros_like(turn), tolerance * np.pi)
    corners = camera_from_depth(np.asarray(corners_from_boxes(_rows(predictions))))
    table.add(f"{prefix}out_box_corners", corners, stored["out_box_corners"], tolerance)


def check_parsing(table: ParityTable, stored: dict, output: DetectorOutput, points: Points) -> None:
    """The queries that survive the evaluation protocol, and their scores."""
    predictions = output.predictions
    corners = camera_from_depth(np.asarray(corners_from_boxes(_rows(predictions))))
    probability = np.asarray(jax.nn.softmax(output.raw.head.class_logits[-1], -1))[..., :-1]
    for name, protocol in _PARSING.items():
        if f"parse_{name}_kept_inds_0" not in stored:
            continue
        kept = np.asarray(keep_predictions(predictions, points, protocol))
        decoded = three_detr.decode(output, points, None, protocol)
        for b in range(len(kept)):
            rows = np.flatnonzero(kept[b])
            if not table.add_exact(
                f"parse_{name}_kept_inds_{b}", rows, stored[f"parse_{name}_kept_inds_{b}"]
            ):
                continue
            score = (probability[b][rows] * predictions.objectness[b][rows, None]).T.reshape(-1)
            classes = np.repeat(np.arange(probability.shape[-1]), len(rows))  # class after class
            theirs = stored[f"parse_{name}_score_{b}"]
            table.add_exact(f"parse_{name}_cls_{b}", classes, stored[f"parse_{name}_cls_{b}"])
            table.add(f"parse_{name}_score_{b}", score, theirs, HEAD)
            table.add(
                f"parse_{name}_corners_{b}", corners[b][rows], stored[f"parse_{name}_kept_corners_{b}"], HEAD
            )
            final = np.asarray(decoded.score[b])[np.asarray(decoded.mask[b])]
            table.add(f"decode_{name}_score_{b}", final, -np.sort(-theirs), HEAD)


def scene_from_labels(points: Points, labels: dict) -> Scene:
    """The reference's label dictionary as a scene."""
    mask = labels["gt_box_present"] > 0
    center = np.where(mask[..., None], labels["gt_box_centers"], 0.0).astype(np.float32)
    boxes = Boxes(
        center=center,
        size=np.where(mask[..., None], labels["gt_box_sizes"], 1.0).astype(np.float32),
        yaw=np.where(mask, yaw_from_votenet_heading(labels["gt_box_angles"]), 0.0).astype(np.float32),
        label=np.where(mask, labels["gt_box_sem_cls_label"], -1).astype(np.int32),
        mask=mask,
        vote_center=center,
    )
    batch = len(mask)
    frame = np.tile(np.eye(4, dtype=np.float32), (batch, 1, 1))
    return Scene(points, boxes, None, frame, np.arange(batch, dtype=np.int32), np.ones(batch, bool))


def _check_losses(table, folder, losses, mode, output, scene, config, tolerance) -> None:
    """Assignments and every term of every layer; `mode` is "eval_torch" or the like."""
    detector, raw, boxes = config.detector, output.raw, scene.boxes
    terms = jax.tree.map(np.asarray, three_detr.losses_by_layer(output, scene, detector))
    total = sum(values.sum() for name, values in terms.items() if name != "cardinality_error")
    last = len(raw.head.center) - 1
    path = folder / f"match_{mode}.npz"
    if has_file(table, path):
        stored = load_arrays(path)
        assigned = np.asarray(three_detr.assign_boxes(raw, boxes, raw.queries.mask, detector))
        for layer in range(last + 1):
            name = "last" if layer == last else f"aux{layer}"
            theirs = np.where(
                stored[f"match_{name}_matched_mask"] > 0, stored[f"match_{name}_per_prop_gt_inds"], -1
            )
            table.add_exact(f"{mode}:match_{name}", assigned[layer], theirs)
        columns = stored["giou_last"].shape[-1]
        valid = np.broadcast_to(boxes.mask[:, None, :columns], stored["giou_last"].shape)
        giou = np.asarray(three_detr.match_giou(raw, boxes, detector))[-1, :, :, :columns]
        distance = np.abs(raw.head.center[-1][:, :, None] - boxes.center[:, None, :columns])
        distance = (distance / (raw.high - raw.low)[:, None, None]).sum(-1)
        table.add(f"{mode}:giou_last", giou[valid], stored["giou_last"][valid], tolerance)
        table.add(f"{mode}:center_dist_last", distance[valid], stored["center_dist_last"][valid], tolerance)
    for name, value in losses[mode].items():
        stem, _, layer = name.rpartition("_")
        if name == "loss_total":
            table.add(f"{mode}:{name}", total, value, tolerance)
        elif name in _LOSSES and _LOSSES[name] in terms:
            table.add(f"{mode}:{name}", terms[_LOSSES[name]][last], value, tolerance)
        elif layer.isdigit() and _LOSSES.get(stem) in terms and int(layer) < last:
            table.add(f"{mode}:{name}", terms[_LOSSES[stem]][int(layer)], value, tolerance)
        else:
            table.skipped.append(f"{mode}:{name} (unknown term)")


def _check_training(table, folder, losses, variant, variables, config, scene, pyramid, masks) -> None:
    """One training step without dropout: outputs, loss, gradients, running statistics."""
    detector, prefix = config.detector, f"train_{variant}:"
    detector.encoder_dropout = detector.decoder_dropout = detector.head_dropout = 0.0
    model = three_detr.build(detector)

    @jax.jit
    def step(variables, scene, pyramid, masks):
        def objective(params):
            tree = {"params": params, "batch_stats": variables["batch_stats"]}
            output, updates = model.apply(
                tree, scene.points, pyramid, train=True, attention_masks=masks, mutable=["batch_stats"]
            )
            total, _ = three_detr.loss(output, scene, detector)
            return total, (output, updates["batch_stats"])

        return jax.grad(objective, has_aux=True)(variables["params"])

    gradients, (output, stats) = jax.tree.map(np.asarray, step(variables, scene, pyramid, masks))
    if has_file(table, folder / "train_outputs.npz"):
        check_heads(table, load_arrays(folder / "train_outputs.npz"), output, prefix, TRAIN)
    _check_losses(table, folder, losses, f"train_{variant}", output, scene, config, TRAIN)

    flat = flatten({"params": gradients})
    rules = official_rules(len(detector.levels) > 1, detector.encoder_layers, detector.decoder_layers)
    by_name = {rule.theirs: rule for rule in rules}
    norms = losses.get(f"grad_norms_train_{variant}", {})
    largest = max(norms.values(), default=1.0)
    for name, norm in norms.items():
        # Some have no gradient but rounding (the bias of the keys): judged against the largest one.
        ours = np.linalg.norm(flat[by_name[name].ours].astype(np.float64))
        table.add(f"{prefix}|grad {name}|", ours, norm, GRADIENT_NORM, scale=max(norm, 1e-3 * largest))
    if has_file(table, folder / f"grads_{variant}.npz"):
        for name, value in load_arrays(folder / f"grads_{variant}.npz").items():
            rule = by_name[name]
            table.add(f"{prefix}grad {name}", flat[rule.ours], rule.convert(value), GRADIENT)
    if has_file(table, folder / "bn_after.npz"):
        after = flatten({"batch_stats": update_running(variables["batch_stats"], stats, NORM_MOMENTUM)})
        for name, value in load_arrays(folder / "bn_after.npz").items():
            if name in by_name:
                table.add(prefix + name, after[by_name[name].ours], value, TRAIN)
            else:
                table.skipped.append(f"{prefix}{name} (a counter)")


def _rows(boxes: Any) -> Any:
    return join_boxes(boxes.center, boxes.size, boxes.yaw)
