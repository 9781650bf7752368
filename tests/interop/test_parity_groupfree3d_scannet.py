"""The comparison with Group-Free-3D on ScanNet: sizes by class, one heading bin, the last three heads joined."""

import numpy as np
import pytest
from drawn_outputs import LEVELS, camera, draw_output, names, softmax
from ml_collections import ConfigDict

from vrdistill_jax.detectors import groupfree3d
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.interop import parity_groupfree3d
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.torch_groupfree3d import groupfree3d_config


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
