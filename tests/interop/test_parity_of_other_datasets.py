"""The comparisons of the detectors with the dataset that no golden folder at hand has: sizes by class and one heading bin
for Group-Free-3D and VoteNet, turned boxes for H3DNet, masks, two levels and GIoU as a loss for 3DETR-m.

Outputs of the right shapes are drawn, not computed, and written down under the reference's names in its layout; what is
compared must then agree, and what is changed must not.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from scenes import make_batch, make_sample, tiny_config

from vrdistill_jax.detectors import find_detector, groupfree3d, three_detr, votenet
from vrdistill_jax.geometry.boxes import corners_from_boxes, join_boxes
from vrdistill_jax.geometry.host.boxes import points_in_boxes
from vrdistill_jax.interop import parity_groupfree3d, parity_h3dnet, parity_three_detr, parity_votenet
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.torch_groupfree3d import groupfree3d_config
from vrdistill_jax.interop.torch_h3dnet import h3dnet_config
from vrdistill_jax.interop.torch_three_detr import three_detr_config
from vrdistill_jax.interop.torch_votenet import votenet_config

LEVELS = ((64, 0.5, 8), (32, 0.8, 8), (16, 1.0, 8), (8, 1.5, 8))


def draw_output(config: ConfigDict, **changes) -> SimpleNamespace:
    """A batch of the tiny scenes and an output of the network that `config.detector` describes, with random numbers."""
    whole = tiny_config()
    whole.detector, whole.dataset.oriented = config.detector, config.dataset.oriented
    whole.detector.update(changes)
    batch, rng = make_batch(whole), np.random.default_rng(0)
    model = find_detector(whole.detector.name).build(whole.detector)
    arguments = batch.scene.points, batch.pyramid
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments, train=False))
    shapes = jax.eval_shape(lambda v: model.apply(v, *arguments, train=False), variables)

    def fill(leaf):
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        if np.issubdtype(leaf.dtype, np.integer):
            return np.broadcast_to(np.arange(leaf.shape[-1]), leaf.shape).astype(leaf.dtype)
        return rng.normal(size=leaf.shape).astype(np.float32)

    output = jax.tree.map(fill, shapes)
    return SimpleNamespace(config=whole, batch=batch, output=output, table=ParityTable())


def camera(boxes) -> np.ndarray:
    """Corners in the reference's camera frame: (x, -z, y)."""
    x, y, z = np.moveaxis(np.asarray(corners_from_boxes(boxes)), -1, 0)
    return np.stack([x, -z, y], -1)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def names(table) -> set[str]:
    return {row.name for row in table.rows}


def first(values):
    return np.swapaxes(values, 1, 2)  # [B, N, C] -> [B, C, N]


# ---- 3DETR-m on ScanNet: masks, two levels, one heading bin, GIoU as a loss


@pytest.fixture(scope="module")
def masked():
    drawn = draw_output(
        three_detr_config("scannet", True),
        width=1 / 16, num_proposals=12, encoder_layers=3, decoder_layers=2, levels=LEVELS[:2], masking_radii=(0.5, 0.8, 1.1),
    )  # fmt: skip
    raw, pyramid = drawn.output.raw, drawn.batch.pyramid
    # Shares of the extent are positive, and so is the extent.
    head = raw.head._replace(size=np.abs(raw.head.size) + 0.1)
    low = drawn.batch.scene.points.xyz.min(1)
    raw = raw._replace(head=head, low=low, high=drawn.batch.scene.points.xyz.max(1))
    predicted = three_detr.predictions_from_head(head, raw.queries.mask, raw.low, raw.high)
    drawn.output = drawn.output._replace(raw=raw, predictions=jax.tree.map(np.asarray, predicted))
    first_level, second, queries = pyramid.levels
    extent = (raw.high - raw.low)[:, None]
    stored = {
        "pre_enc_inds": first_level.index,
        "pre_enc_xyz": first_level.xyz,
        "enc_interim_inds": second.index,
        "enc_xyz": second.xyz,
        "query_xyz": queries.xyz,
        "pre_enc_features": first(raw.abstractions[0]),
        "interim_features": first(raw.abstractions[1]),
        "enc_layer0": raw.encoder[0].swapaxes(0, 1),
        "enc_features": raw.encoder[2].swapaxes(0, 1),
        "enc_features_projected": first(raw.memory.features),
        "enc_pos_embed": first(raw.memory_position),
        "query_pos_embed": first(raw.query_position),
        "query_embed": first(raw.query_embedding),
    }
    for n, (xyz, radius) in enumerate(
        zip((first_level.xyz, second.xyz, second.xyz), (0.5, 0.8, 1.1), strict=True)
    ):
        distance = np.linalg.norm(xyz[:, :, None].astype(np.float64) - xyz[:, None], axis=-1)
        stored[f"enc_mask{n}_packed"] = np.packbits(distance >= radius, axis=-1)
    for layer in range(2):
        stored[f"box_features_layer{layer}"] = raw.decoder[layer].swapaxes(0, 1)
        stem = "out_" if layer == 1 else f"aux{layer}_"
        stored |= {
            f"{stem}sem_cls_logits": head.class_logits[layer],
            f"{stem}center_normalized": (head.center[layer] - raw.low[:, None]) / extent,
            f"{stem}center_unnormalized": head.center[layer],
            f"{stem}size_normalized": head.size[layer],
            f"{stem}size_unnormalized": head.size[layer] * extent,
            f"{stem}angle_logits": head.heading_logits[layer],
            f"{stem}angle_residual_normalized": head.heading_residual[layer],
            f"{stem}angle_residual": head.heading_residual[layer] * np.pi,  # one bin is the whole circle
        }
    boxes = np.concatenate([head.center[-1], head.size[-1] * extent, np.zeros((2, 12, 1))], -1)
    probability = softmax(head.class_logits[-1])
    stored |= {
        "out_sem_cls_prob": probability[..., :-1],
        "out_objectness_prob": 1 - probability[..., -1],
        "out_angle_continuous": np.zeros((2, 12)),
        "out_box_corners": camera(boxes),
    }
    drawn.stored = stored
    return drawn


def test_three_detr_m_forward(masked):
    table, stored = ParityTable(), masked.stored
    masks = parity_three_detr.read_attention_masks(
        table, stored, masked.batch.pyramid, masked.config.detector
    )
    assert [mask.shape for mask in masks] == [(2, 64, 64), (2, 32, 32), (2, 32, 32)]
    assert all(0.01 < mask.mean() < 0.99 and mask[:, range(32), range(32)].all() for mask in masks)
    parity_three_detr.check_geometry(table, stored, masked.batch.pyramid)
    parity_three_detr.check_forward(table, stored, masked.output)
    parity_three_detr.check_heads(table, stored, masked.output, "", parity_three_detr.HEAD)
    assert table.ok, table.render()
    assert set(stored) - names(table) <= {f"enc_mask{n}_packed" for n in range(3)}  # every array was compared


def test_rows_of_the_cloud_do_as_well_for_the_second_level(masked):
    table = ParityTable()
    stored = masked.stored | {"enc_interim_inds": masked.batch.pyramid.levels[1].source_index + 0}
    assert stored["enc_interim_inds"].max() >= 64  # so that they cannot be rows of the first level
    parity_three_detr.check_geometry(table, stored, masked.batch.pyramid)
    assert table.ok, table.render()


def test_three_detr_parsing_and_losses_with_one_heading_bin(masked, tmp_path):
    table, detector, scene = ParityTable(), masked.config.detector, masked.batch.scene
    predictions, stored = masked.output.predictions, {}
    probability = softmax(masked.output.raw.head.class_logits[-1])[..., :-1]
    for name, protocol in parity_three_detr._PARSING.items():
        kept = np.asarray(parity_three_detr.keep_predictions(predictions, scene.points, protocol))
        for b in range(2):
            rows = np.flatnonzero(kept[b])
            assert len(rows)
            stored[f"parse_{name}_kept_inds_{b}"] = rows
            score = (probability[b][rows] * predictions.objectness[b][rows, None]).T.reshape(-1)
            stored[f"parse_{name}_score_{b}"] = score
            stored[f"parse_{name}_cls_{b}"] = np.repeat(np.arange(18), len(rows))
            boxes = join_boxes(predictions.center[b], predictions.size[b], predictions.yaw[b])
            stored[f"parse_{name}_kept_corners_{b}"] = camera(boxes)[rows]
    parity_three_detr.check_parsing(table, stored, masked.output, scene.points)
    assert table.ok, table.render()

    terms = three_detr.losses_by_layer(masked.output, scene, detector)
    assert float(terms["heading_class"][1]) == 0.0  # one bin leaves nothing to choose
    assert float(terms["giou"][1]) > 0
    theirs = {name: term for name, term in parity_three_detr._LOSSES.items() if term in terms}
    losses = {name: float(terms[term][1]) for name, term in theirs.items()}
    losses |= {f"{name}_0": float(terms[term][0]) for name, term in theirs.items()}
    losses["loss_total"] = float(
        sum(terms[term].sum() for term in theirs.values() if term != "cardinality_error")
    )
    assert {"loss_giou", "loss_giou_0", "loss_angle_reg", "loss_size"} <= set(losses)
    assigned = np.asarray(
        three_detr.assign_boxes(masked.output.raw, scene.boxes, masked.output.raw.queries.mask, detector)
    )
    columns = 3
    match = {
        f"match_{name}_{key}": value
        for name, layer in (("aux0", 0), ("last", 1))
        for key, value in (
            ("matched_mask", (assigned[layer] >= 0).astype(np.float32)),
            ("per_prop_gt_inds", np.maximum(assigned[layer], 0)),
        )
    }
    match["giou_last"] = np.asarray(three_detr.match_giou(masked.output.raw, scene.boxes, detector))[
        1, :, :, :columns
    ]
    offset = np.abs(masked.output.raw.head.center[1][:, :, None] - scene.boxes.center[:, None, :columns])
    extent = masked.output.raw.high - masked.output.raw.low
    match["center_dist_last"] = (offset / extent[:, None, None]).sum(-1)
    np.savez(tmp_path / "match_eval_torch.npz", **match)
    own, table = ConfigDict({"detector": detector.to_dict()}), ParityTable()
    own.detector.reference_giou = "torch"
    arguments = tmp_path, {"eval_torch": losses}, "eval_torch", masked.output, scene, own
    parity_three_detr._check_losses(table, *arguments, 2e-4)
    assert table.ok, table.render()
    assert not table.skipped
    losses["loss_giou_0"] *= 1.01
    table = ParityTable()
    parity_three_detr._check_losses(table, *arguments, 2e-4)
    assert table.failed == ["eval_torch:loss_giou_0"]


# ---- Group-Free-3D on ScanNet: sizes by class, one heading bin, the last three heads joined


@pytest.fixture(scope="module")
def by_class():
    drawn = draw_output(
        groupfree3d_config("scannet"),
        width=1 / 8,
        num_proposals=12,
        decoder_layers=3,
        num_heads=4,
        levels=LEVELS,
    )
    sizes = np.asarray(drawn.config.detector.mean_sizes)
    raw, seeds = drawn.output.raw, drawn.output.raw.backbone.seeds
    likeliest = raw.head.size_logits.argmax(-1)
    residual = 0.1 * raw.head.size_residual
    own = np.take_along_axis(residual, likeliest[..., None, None], -2)[..., 0, :]
    size = sizes[likeliest] * (1 + own)
    head = raw.head._replace(size_residual=residual, size=size.astype(np.float32))
    seeds = seeds._replace(
        xyz=drawn.batch.pyramid.levels[1].xyz, seed_index=drawn.batch.pyramid.levels[1].source_index
    )
    queries = raw.queries._replace(xyz=seeds.xyz[:, :12])
    raw = raw._replace(head=head, backbone=raw.backbone._replace(seeds=seeds), queries=queries)
    drawn.output = drawn.output._replace(raw=raw)
    return drawn


def test_groupfree3d_heads_with_sizes_by_class(by_class):
    head, table = by_class.output.raw.head, ParityTable()
    prefixes = parity_groupfree3d.head_prefixes(4)
    assert prefixes == ["proposal_", "0head_", "1head_", "last_"]
    stored = {}
    for n, prefix in enumerate(prefixes):
        stored |= {
            f"{prefix}objectness_scores": head.objectness_logit[n][..., None],
            f"{prefix}center": head.center[n],
            f"{prefix}heading_scores": head.heading_logits[n],
            f"{prefix}heading_residuals_normalized": head.heading_residual[n],
            f"{prefix}size_scores": head.size_logits[n],
            f"{prefix}size_residuals_normalized": head.size_residual[n],
            f"{prefix}pred_size": head.size[n],
            f"{prefix}sem_cls_scores": head.class_logits[n],
        }
    assert stored["last_size_residuals_normalized"].shape == (2, 12, 18, 3)
    parity_groupfree3d.check_heads(table, stored, by_class.output, "", parity_groupfree3d.HEAD)
    assert table.ok, table.render()
    assert names(table) == set(stored)


def test_groupfree3d_parsing_in_the_order_of_the_reference(by_class):
    head, points, stored = by_class.output.raw.head, by_class.batch.scene.points, {}
    options = {"nms_iou": 0.25, "cls_nms": True, "conf_thresh": 0.0, "remove_empty_box": True}
    protocol = groupfree3d.DecodeConfig(score_threshold=0.0)
    mask = by_class.output.raw.queries.mask
    for prefix, which in parity_groupfree3d._MERGED.items():
        merged = groupfree3d.merge_heads(head, mask, which)
        kept = np.asarray(parity_groupfree3d.keep_predictions(merged, points, protocol))
        corners = camera(join_boxes(merged.center, merged.size, merged.yaw))
        classes = softmax(np.asarray(merged.class_logits))
        for b in range(2):
            rows = np.random.default_rng(b).permutation(np.flatnonzero(kept[b]))  # whatever order it has
            label = f"parse_eval_{prefix}"
            stored[f"{label}num_{b}"] = np.int64(len(rows))
            stored[f"{label}score_{b}"] = (
                classes[b][rows] * np.asarray(merged.objectness[b])[rows, None]
            ).T.reshape(-1)
            stored[f"{label}kept_corners_{b}"] = corners[b][rows]
    table = ParityTable()
    parity_groupfree3d.check_parsing(table, stored, {"eval": options}, by_class.output, points)
    assert table.ok, table.render()
    assert names(table) == set(stored)
    assert stored["parse_eval_all_layers_num_0"] > 1


def test_groupfree3d_labels_and_losses_with_sizes_by_class(by_class):
    detector, scene = by_class.config.detector, by_class.batch.scene
    sizes = np.asarray(detector.mean_sizes, np.float32)
    boxes, mask = scene.boxes, scene.boxes.mask
    label = np.where(mask, boxes.label, 0)
    labels = {
        "center_label": np.where(mask[..., None], boxes.center, 1000.0),  # the reference's padding
        "heading_class_label": np.zeros(mask.shape, np.int64),
        "heading_residual_label": np.zeros(mask.shape, np.float32),
        "size_class_label": label,
        "size_residual_label": np.where(mask[..., None], boxes.size - sizes[label], 0.0),
        "sem_cls_label": label,
        "box_label_mask": mask.astype(np.float32),
        "point_obj_mask": (scene.point_instance[..., 0] >= 0).astype(np.int64),
        "point_instance_label": scene.point_instance[..., 0].astype(np.int64),
    }
    own = parity_groupfree3d.scene_from_labels(scene.points, labels, detector)
    np.testing.assert_allclose(own.boxes.size, boxes.size, atol=1e-6)
    np.testing.assert_array_equal(own.point_instance, scene.point_instance)
    np.testing.assert_array_equal(own.boxes.yaw, 0)

    detector = ConfigDict(detector.to_dict())
    detector.reference_sizes = detector.reference_query_positives = True
    by_head, measures = groupfree3d.losses_by_head(by_class.output, own, detector)
    assert "size_class" in by_head
    golden = {}
    for n, prefix in enumerate(parity_groupfree3d.head_prefixes(4)):
        golden |= {
            prefix + name: float(by_head[term][n])
            for name, term in parity_groupfree3d._LOSSES.items()
            if term in by_head
        }
        box = sum(
            factor * float(by_head[term][n])
            for term, factor in (
                ("center", 1),
                ("heading_class", 0.1),
                ("heading_residual", 1),
                ("size_class", 0.1),
                ("size", 1),
            )
        )
        golden[f"{prefix}box_loss"] = box
        golden[f"{prefix}pos_ratio"] = float(measures["positive_share"])
    objectness, boxes_sum, classes = (
        sum(golden[f"{p}{name}_loss"] for p in parity_groupfree3d.head_prefixes(4))
        for name in ("objectness", "box", "sem_cls")
    )
    golden["query_points_generation_loss"] = float(by_head["query_points"][0])
    golden["sum_heads_box_loss"] = boxes_sum
    # The reference's total with its published weights on ScanNet.
    golden["loss"] = 10 * (
        0.8 * golden["query_points_generation_loss"] + (0.1 * objectness + boxes_sum + 0.1 * classes) / 4
    )
    table = ParityTable()
    parity_groupfree3d.check_losses(table, golden, by_class.output, own, detector, "eval:", 2e-4)
    assert table.ok, table.render()
    assert not table.skipped


# ---- H3DNet on SUN RGB-D: turned boxes, both settings of the primitives


def test_h3dnet_with_turned_boxes():
    drawn = draw_output(
        h3dnet_config("sunrgbd"), width=1 / 8, num_proposals=16, levels=LEVELS, num_towers=2, aggregation_neighbors=8,
        match_neighbors=8,
    )  # fmt: skip
    config, raw, mean = drawn.config, drawn.output.raw, np.asarray(drawn.config.detector.mean_sizes)
    far = {
        kind: p._replace(center=p.center + 20.0) for kind, p in raw.primitives.items()
    }  # at no face's radius
    small = {
        name: raw._asdict()[name]._replace(size_residual=0.1 * raw._asdict()[name].size_residual)
        for name in ("head", "refined_head")
    }
    raw = raw._replace(primitives=far, **small)
    drawn.output = drawn.output._replace(raw=raw)
    stored, refinement = {"aggregated_vote_inds": raw.cluster_index}, raw.refinement
    for name, values in (
        ("surface_center_object", refinement.face_centers),
        ("line_center_object", refinement.edge_centers),
        ("match_scores", refinement.match_logits),
        ("match_scores_sem", refinement.class_match_logits),
    ):
        stored[name] = values.reshape(2, -1, values.shape[-1])
    stored["match_surface_features"] = first(refinement.face_features.reshape(2, 6 * 16, -1))
    stored["match_line_features"] = first(refinement.edge_features.reshape(2, 12 * 16, -1))
    stored["conv_refine4_raw"] = first(refinement.channels)
    for mode, head in (("center", raw.head), ("opt", raw.refined_head)):
        stored |= {
            f"aggregated_vote_xyz{mode}": raw.clusters.xyz,
            f"objectness_scores{mode}": head.objectness_logits,
            f"center{mode}": head.center,
            f"heading_scores{mode}": head.heading_logits,
            f"heading_residuals_normalized{mode}": head.heading_residual,
            f"heading_residuals{mode}": head.heading_residual * np.pi / 12,
            f"size_scores{mode}": head.size_logits,
            f"size_residuals_normalized{mode}": head.size_residual,
            f"size_residuals{mode}": head.size_residual * mean,
            # the reference reads the refined classes off the size scores
            f"sem_cls_scores{mode}": head.size_logits if mode == "opt" else head.class_logits,
        }
    table = ParityTable()
    parity_h3dnet.check_refinement(table, stored, drawn.output, config, "with_angle_false:")
    assert table.ok, table.render()
    assert {f"with_angle_false:{name}" for name in stored} <= names(table)

    # Boxes of the four settings: class of heading and size of the first stage, numbers of the second.
    options, parsed = {"nms_iou": 0.25, "cls_nms": True, "conf_thresh": 0.05}, {}
    for angle in (0, 1):
        for classes in (0, 1):
            residual = (raw.refined_head if angle else raw.head).heading_residual
            bins, sizes = raw.head.heading_logits.argmax(-1), raw.head.size_logits.argmax(-1)
            heading = (
                bins * 2 * np.pi / 12 + np.take_along_axis(residual, bins[..., None], -1)[..., 0] * np.pi / 12
            )
            share = np.take_along_axis(raw.refined_head.size_residual, sizes[..., None, None], -2)[..., 0, :]
            size = mean[sizes] * (1 + share)
            boxes = np.concatenate([raw.refined_head.center, size, -heading[..., None]], -1).astype(
                np.float32
            )
            logits = raw.refined_head.size_logits if classes else raw.head.class_logits
            objectness = softmax(raw.refined_head.objectness_logits)[..., 1]
            name = f"parse_optang{angle}_optsem{classes}"
            kept = [
                np.asarray(parity_h3dnet.nms(b, o, np.ones(16, bool), c, threshold=0.25).mask)
                for b, o, c in zip(boxes, objectness, logits.argmax(-1), strict=True)
            ]
            parsed[f"{name}_pred_mask"] = np.stack(kept)
            for b in range(2):
                rows = np.flatnonzero(kept[b] & (objectness[b] > 0.05))
                parsed[f"{name}_score_{b}"] = (objectness[b][rows] * softmax(logits[b])[rows].T).reshape(-1)
                parsed[f"{name}_corners_{b}"] = camera(boxes[b])[rows]
    table = ParityTable()
    parity_h3dnet.check_parsing(table, parsed, drawn.output, config, options)
    assert table.ok, table.render()
    assert names(table) == set(parsed)


# ---- VoteNet on ScanNet: one heading bin


def test_votenet_decoding_with_one_heading_bin():
    drawn = draw_output(
        votenet_config("scannet"), width=1 / 8, num_proposals=16, levels=LEVELS, aggregation_neighbors=8
    )
    raw, mean = drawn.output.raw, np.asarray(drawn.config.detector.mean_sizes)
    head = raw.head._replace(size_residual=0.1 * raw.head.size_residual)
    predictions = jax.tree.map(
        np.asarray, votenet.predictions_from_head(head, raw.clusters.mask, drawn.config.detector.mean_sizes)
    )
    output = drawn.output._replace(raw=raw._replace(head=head), predictions=predictions)
    likeliest = head.size_logits.argmax(-1)
    own = np.take_along_axis(head.size_residual, likeliest[..., None, None], -2)[..., 0, :]
    size = mean[likeliest] * (1 + own)
    boxes = np.concatenate([head.center, size, np.zeros((2, 16, 1))], -1)
    points, objectness = drawn.batch.scene.points, softmax(head.objectness_logits)[..., 1]
    counts = [
        points_in_boxes(xyz[mask], rows).sum(0)
        for xyz, mask, rows in zip(points.xyz, points.mask, boxes, strict=True)
    ]
    stored = {
        "decoded_heading_class": np.zeros((2, 16), np.int64),
        "decoded_size_class": likeliest,
        "decoded_sem_cls": head.class_logits.argmax(-1),
        "decoded_heading_angle": np.zeros((2, 16)),
        "decoded_box_size": size,
        "objectness_prob": objectness,
        "sem_cls_prob": softmax(head.class_logits),
        "decoded_corners_upright_camera": camera(boxes),
        "decoded_points_in_box": np.stack(counts),
    }
    table = ParityTable()
    parity_votenet.check_decoding(table, stored, output, points)
    assert table.ok, table.render()
    assert names(table) == set(stored)

    # Counts that no box within the tolerance has are told; so is a mask that does not follow from them.
    wrong = stored | {"decoded_points_in_box": stored["decoded_points_in_box"] + (np.arange(16) == 3) * 200}
    table = ParityTable()
    parity_votenet.check_decoding(table, wrong, output, points)
    assert table.failed == ["decoded_points_in_box"]
    settled, outside = parity_votenet.count_points(wrong, output, points)
    np.testing.assert_array_equal(outside, np.broadcast_to(np.arange(16) == 3, (2, 16)))
    np.testing.assert_array_equal(settled, np.stack(counts))
    failed = stored | {"decoded_points_in_box": np.full((2, 16), -1)}  # the reference's hull failed
    assert not parity_votenet.count_points(failed, output, points)[1].any()


def test_votenet_labels_with_votes_at_the_middle_of_sampled_points():
    """ScanNet's votes aim beside the labelled centre; each place belongs to the nearest box."""
    config, sample = votenet_config("scannet"), make_sample(0)
    xyz = sample["xyz"][None]
    mask = np.arange(8)[None] < 3
    center = np.zeros((1, 8, 3), np.float32)
    center[0, :3] = sample["boxes_center"]
    sizes = np.asarray(config.detector.mean_sizes, np.float32)
    aim = center[0, np.maximum(sample["instance"], 0)] + np.float32([0.02, -0.01, 0.0])
    on_object = sample["instance"] >= 0
    votes = np.where(on_object[:, None], aim - xyz[0], 0.0)
    labels = {
        "center_label": center,
        "heading_class_label": np.zeros((1, 8), np.int64),
        "heading_residual_label": np.zeros((1, 8), np.float32),
        "size_class_label": np.zeros((1, 8), np.int64),
        "size_residual_label": np.zeros((1, 8, 3), np.float32),
        "sem_cls_label": np.zeros((1, 8), np.int64),
        "box_label_mask": mask.astype(np.float32),
        "vote_label": np.tile(votes, 3)[None].astype(np.float32),
        "vote_label_mask": on_object[None].astype(np.int64),
    }
    points = make_batch(tiny_config()).scene.points._replace(xyz=xyz, mask=np.ones(xyz.shape[:2], bool))
    scene = parity_votenet.scene_from_labels(points, labels, config)
    np.testing.assert_array_equal(scene.point_instance[0, :, 0], sample["instance"])
    np.testing.assert_allclose(
        scene.boxes.vote_center[0, :3], center[0, :3] + np.float32([0.02, -0.01, 0]), atol=1e-4
    )
    np.testing.assert_allclose(scene.boxes.size[0, :3], np.tile(sizes[0], (3, 1)))
    np.testing.assert_array_equal(scene.boxes.yaw, 0)
