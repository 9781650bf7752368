"""OTA, simOTA and AlignOTA against loops."""

import functools

import jax
import numpy as np
import pytest
from anchor_scenes import make_anchors, make_boxes, take_scene
from oracles import assigners as oracle

from vrdistill_jax.assigners import alignota, ota, simota
from vrdistill_jax.assigners.assignment import Task, dynamic_counts

pytestmark = pytest.mark.slow  # compiling these networks takes minutes of processor time

TASK = Task(True)
ORACLES = {
    "ota": (ota, oracle.ota),
    "simota": (simota, oracle.simota),
    "alignota": (alignota, lambda anchors, boxes: oracle.simota(anchors, boxes, align=True)),
}


@functools.cache
def compiled(name):
    file = ORACLES[name][0]
    return jax.jit(lambda anchors, boxes: file.assign(anchors, boxes, file.default_config(), TASK).gt_index)


@pytest.mark.parametrize("name", ORACLES)
def test_against_loops(name):
    expected_of = ORACLES[name][1]
    agreement, counts = [], []
    for seed in range(4):
        boxes = make_boxes(seed + 20, (4, 2))
        anchors = make_anchors(boxes, seed, counts=(80, 25), noise=0.08)
        result = np.asarray(compiled(name)(anchors, boxes))
        for row in range(2):
            expected = expected_of(*take_scene(anchors, boxes, row))
            agreement.append((result[row] == expected).mean())
            counts.append((expected >= 0).sum())
    assert min(agreement) == 1.0
    assert np.ptp(counts) > 2, "the number of positives depends on the scene"


def test_the_three_differ():
    boxes = make_boxes(20, (4, 2))
    anchors = make_anchors(boxes, 0, counts=(80, 25), noise=0.08)
    results = [np.asarray(compiled(name)(anchors, boxes)) for name in ORACLES]
    for n in range(3):
        assert (results[n] != results[n - 1]).any()


def test_a_box_without_anchors_inside_keeps_the_ranking_of_its_costs():
    boxes = make_boxes(3, (1, 1))
    far = boxes._replace(center=boxes.center + np.float32([9, 0, 0]))
    anchors = make_anchors(boxes, 4, counts=(80, 25))
    anchors = anchors._replace(boxes=anchors.boxes + np.float32([9, 0, 0, 0, 0, 0, 0]))
    found = np.flatnonzero(np.asarray(compiled("ota")(anchors, far))[0] == 0)
    assert 1 <= len(found) <= 3
    assert compiled("simota")(anchors, far).max() == -1, "no candidate at all"


def test_dynamic_counts():
    iou = np.array([[0.9, 0.8, 0.7, 0.1], [0.2, 0.1, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0]], np.float32)
    candidates = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]], bool)
    np.testing.assert_array_equal(dynamic_counts(iou, candidates, 3), [2, 1, 2])
    np.testing.assert_array_equal(dynamic_counts(iou, candidates, 10), [2, 1, 2])
