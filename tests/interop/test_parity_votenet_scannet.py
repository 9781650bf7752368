"""The comparison with VoteNet on ScanNet: one heading bin, votes beside centres."""

import jax
import numpy as np
from drawn_outputs import LEVELS, camera, draw_output, names, softmax
from scenes import make_batch, make_sample, tiny_config

from vrdistill_jax.detectors import votenet
from vrdistill_jax.geometry.host.boxes import points_in_boxes
from vrdistill_jax.interop import parity_votenet
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.torch_votenet import votenet_config


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
