import jax
import numpy as np
import pytest
from anchor_scenes import LABEL_LEVELS, make_anchors, make_boxes, take_scene
from oracles import assigners as oracle

from vrdistill_jax.assigners import top_k
from vrdistill_jax.assigners.assignment import Anchors, Task
from vrdistill_jax.structs import Boxes

TASK = Task(True, LABEL_LEVELS)


@pytest.mark.parametrize("nearest_of_all", [True, False])
def test_against_loops(nearest_of_all):
    config = top_k.default_config()
    config.nearest_of_all = nearest_of_all
    assign = jax.jit(lambda anchors, boxes: top_k.assign(anchors, boxes, config, TASK).gt_index)
    differing = 0
    for seed in range(6):
        boxes = make_boxes(seed, (5, 3))
        anchors = make_anchors(boxes, seed + 100)
        result = np.asarray(assign(anchors, boxes))
        for row in range(2):
            scene = take_scene(anchors, boxes, row)
            expected = oracle.top_k(*scene, LABEL_LEVELS, nearest_of_all=nearest_of_all)
            np.testing.assert_array_equal(result[row], expected)
            differing += int(
                (expected != oracle.top_k(*scene, LABEL_LEVELS, nearest_of_all=not nearest_of_all)).any()
            )
    assert differing, "the two variants are told apart"


def line_of_anchors(x, level=0):
    """Anchors on the x axis and one unit box at the origin, of class 0."""
    xyz = np.zeros((1, len(x), 3), np.float32)
    xyz[0, :, 0] = x
    shape = xyz.shape[:2]
    boxes = np.ones((*shape, 7), np.float32)
    levels = np.full(len(x), level, np.int32)
    anchors = Anchors(
        xyz, np.ones(shape, bool), boxes, np.zeros((*shape, 4), np.float32), levels, levels + 1.0
    )
    zero = np.zeros((1, 1, 3), np.float32)
    return anchors, Boxes(
        zero, zero + 1, zero[..., 0], np.zeros((1, 1), np.int32), np.ones((1, 1), bool), zero
    )


def positives(x, level=0, k=6):
    config = top_k.default_config()
    config.k = k
    index = top_k.assign(*line_of_anchors(x, level), config, TASK).gt_index
    return np.flatnonzero(np.asarray(index[0]) >= 0).tolist()


def test_ties_at_the_border_drop_out():
    assert positives([0, 1, 2, 3, 4], k=3) == [0, 1, 2]
    assert positives([0, 1, 2, -2, 4], k=3) == [0, 1, 2, 3][:2]
    assert positives([0, 1, 2, -2, 4], k=2) == [0, 1]


def test_few_anchors_are_all_taken_and_other_levels_are_not():
    assert positives([0, 1, 2], k=6) == [0, 1, 2]
    assert positives([0, 1, 2], k=3) == [0, 1, 2]
    assert positives([0, 1, 2], level=1) == []


def test_unknown_levels_are_refused():
    anchors, boxes = line_of_anchors([0, 1])
    with pytest.raises(ValueError, match="config.detector.label_levels"):
        top_k.assign(anchors, boxes, top_k.default_config(), Task(True))


@pytest.mark.data
@pytest.mark.parametrize("variant", ["samsung", "mmdet3d"])
def test_golden(shared, variant):
    stored = np.load(shared / "golden/tr3d_sunrgbd/narrow_batch2_train.npz")
    config = top_k.default_config()
    config.nearest_of_all = variant == "samsung"
    task = Task(True, (1, 1, 1, 0, 0, 1, 0, 0, 1, 0))
    assign = jax.jit(lambda anchors, boxes: top_k.assign(anchors, boxes, config, task))
    for b in range(2):
        xyz = np.concatenate([stored[f"head{n}/points{b}"] for n in range(2)])[None]
        level = np.repeat(np.arange(2, dtype=np.int32), [len(stored[f"head{n}/points{b}"]) for n in range(2)])
        rows, label = stored[f"gt_boxes{b}"][None], stored[f"gt_labels{b}"][None].astype(np.int32)
        shape = xyz.shape[:2]
        anchors = Anchors(
            xyz, np.ones(shape, bool), np.ones((*shape, 7), np.float32), np.zeros((*shape, 10), np.float32), level,
            np.float32(0.64) * (1 + level),
        )  # fmt: skip
        boxes = Boxes(
            rows[..., :3], rows[..., 3:6], rows[..., 6], label, np.ones(label.shape, bool), rows[..., :3]
        )
        result = assign(anchors, boxes)
        np.testing.assert_array_equal(result.gt_index[0], stored[f"assigned_{variant}{b}"])
