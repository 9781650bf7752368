"""A pretrained VoteNet finds the furniture of real scans, through the path that users take.

`pytest tests/real/test_pretrained_votenet.py -s` prints the table; with `-m slow` also the spread over random orders of
the points.
"""

import numpy as np
import pytest

from vrdistill_jax.data.class_tables import SUNRGBD_CLASSES
from vrdistill_jax.data.point_checks import check_points
from vrdistill_jax.data.point_files import read_points
from vrdistill_jax.geometry.frames import boxes_from_votenet
from vrdistill_jax.geometry.host.boxes import box_iou
from vrdistill_jax.import_torch import import_checkpoint
from vrdistill_jax.predict import Predictor
from vrdistill_jax.training.checkpoint import save_inference_checkpoint

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def checkpoint(shared, tmp_path_factory):
    pytest.importorskip("h5py", reason="the weights are a Keras file: pip install 'vrdistill-jax[keras]'")
    weights = shared / "real" / "weights" / "votenet_sunrgbd_keras.h5"
    folder = tmp_path_factory.mktemp("pretrained")
    save_inference_checkpoint(folder, *import_checkpoint("votenet", "sunrgbd", weights))
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint)


@pytest.fixture(scope="module")
def scans(shared):
    """{name: (xyz, boxes f64[g, 7], labels)} of the validation scans."""
    found = {}
    for path in sorted((shared / "real" / "sunrgbd" / "prepared_val").glob("*_pc.npz")):
        checked = check_points(read_points(path))
        assert checked.warnings == [], "a scan in metres with z up needs no assumption"
        rows = np.load(path.with_name(path.name.replace("_pc.npz", "_bbox.npy")))
        boxes = np.asarray(boxes_from_votenet(rows[:, :7], sizes="half"), np.float64)
        found[path.stem] = (checked.cloud.xyz, boxes, rows[:, 7].astype(int))
    assert len(found) == 5
    return found


def find_boxes(found, boxes, label, threshold):
    """Rows of the labelled boxes that a detection of their class overlaps by more than the threshold."""
    overlaps = box_iou(found.boxes[:, None].astype(np.float64), boxes[None])
    overlaps = np.where(found.label[:, None] == label[None], overlaps, 0)
    return set(np.flatnonzero(overlaps.max(0, initial=0) > threshold).tolist())


def measure_recall(predictor, scans, rng=None):
    """(boxes found at 0.25, at 0.5, detections) over all scans; `rng` shuffles the points first."""
    total = np.zeros(3, int)
    for name, (xyz, boxes, label) in scans.items():
        found = predictor(xyz if rng is None else rng.permutation(xyz))
        counts = [len(find_boxes(found, boxes, label, t)) for t in (0.25, 0.5)] + [len(found.score)]
        total += counts
        if rng is None:
            classes = ", ".join(SUNRGBD_CLASSES[row] for row in label)
            print(f"{name}: {counts[0]} / {counts[1]} of {len(label)} ({classes}), {counts[2]} detections")
    return total


def test_recall_on_the_validation_scans(predictor, scans):
    assert sum(len(label) for _, _, label in scans.values()) == 11
    at_quarter, at_half, detections = measure_recall(predictor, scans)
    print(f"recall@0.25 {at_quarter}/11, recall@0.5 {at_half}/11, {detections} detections")
    assert at_quarter >= 8
    assert at_half >= 7
    assert detections <= 22  # not by proposing everything


def test_the_same_scan_gives_the_same_result(checkpoint, predictor, scans):
    names = list(scans)
    first = predictor(scans[names[0]][0])
    predictor(scans[names[1]][0])
    for other in (predictor, Predictor(checkpoint)):
        again = other(scans[names[0]][0])
        for before, after in zip(first, again, strict=True):
            np.testing.assert_array_equal(before, after)


def test_detections_are_sorted_valid_boxes(predictor, scans):
    for xyz, _, _ in scans.values():
        found = predictor(xyz)
        assert found.mask.all()
        assert (found.score > 0.5).all()
        assert (np.diff(found.score) <= 0).all()
        assert (found.boxes[:, 3:6] > 0).all()
        assert (found.label < len(predictor.class_names)).all()


@pytest.mark.slow
def test_mean_recall_over_random_orders(checkpoint, predictor, scans):
    """What several passes give on average, against a single one; 24 random orders of the points each."""
    single = Predictor(checkpoint, max_passes=1)
    means = []
    for name, measured in (("one pass", single), ("default", predictor)):
        draws = np.array([measure_recall(measured, scans, np.random.default_rng(seed)) for seed in range(24)])
        rows = (draws.mean(0), draws.std(0), draws.min(0), draws.max(0))
        mean, spread, low, high = (np.round(row, 2).tolist() for row in rows)
        print(f"{name} (@0.25, @0.5, detections): mean {mean}, sd {spread}, from {low} to {high}")
        means.append(draws.mean(0))
    assert (means[1][:2] > means[0][:2] + 0.3).all()
    assert means[1][0] >= 8.3
    assert means[1][1] >= 7.3
