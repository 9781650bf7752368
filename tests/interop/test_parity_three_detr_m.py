"""The comparison with 3DETR-m on ScanNet: masks, two levels, one heading bin, GIoU as a loss."""

import jax
import numpy as np
import pytest
from drawn_outputs import LEVELS, camera, channels_first, draw_output, names, softmax
from ml_collections import ConfigDict

from vrdistill_jax.detectors import three_detr
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.interop import parity_three_detr
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.torch_three_detr import three_detr_config


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
        "pre_enc_features": channels_first(raw.abstractions[0]),
        "interim_features": channels_first(raw.abstractions[1]),
        "enc_layer0": raw.encoder[0].swapaxes(0, 1),
        "enc_features": raw.encoder[2].swapaxes(0, 1),
        "enc_features_projected": channels_first(raw.memory.features),
        "enc_pos_embed": channels_first(raw.memory_position),
        "query_pos_embed": channels_first(raw.query_position),
        "query_embed": channels_first(raw.query_embedding),
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
