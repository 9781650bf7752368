"""Real scans in other units, axes and places give the boxes of the original, mapped back."""

import json

import numpy as np
import pytest

from vrdistill_jax.import_torch import import_checkpoint
from vrdistill_jax.predict import predict_files
from vrdistill_jax.training.checkpoint import save_inference_checkpoint

pytestmark = pytest.mark.data

Y_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # (x, y, z) with z up -> (x, z, -y) with y up
SCANS = ("000001", "000003", "000005")
# What a file may hold instead of the scan: (what is done to the points, its options, tolerance in the file's units).
VARIANTS = {
    "y_up_mm": (lambda p: p @ Y_UP.T * 1000, {"units": "mm", "up": "y"}, 1.0),
    "cm_guessed": (lambda p: p * 100, {}, 0.1),
    # Farther out the file's own float32 steps (0.1 mm at 2 km) move boxes of doubtful objects by centimetres.
    "far": (lambda p: p + np.array([200.0, -300.0, 0.0]), {}, 0.05),
}


@pytest.fixture(scope="module")
def records(shared, tmp_path_factory):
    """{(scan, variant): detections.json} of all scans in all variants, in one call per set of options."""
    pytest.importorskip("h5py", reason="the weights are a Keras file: pip install 'vrdistill-jax[keras]'")
    folder = tmp_path_factory.mktemp("variants")
    weights = shared / "real" / "weights" / "votenet_sunrgbd_keras.h5"
    save_inference_checkpoint(folder / "model", *import_checkpoint("votenet", "sunrgbd", weights))
    paths: dict[tuple, list[str]] = {}
    for scan in SCANS:
        xyz = np.load(shared / "real" / "sunrgbd" / "prepared_val" / f"{scan}_pc.npz")["pc"][:, :3]
        variants = {
            "original": (lambda p: p, {}, 0),
            **VARIANTS,
            "y_up_guessed": (lambda p: p @ Y_UP.T, {}, 0),
        }
        for name, (change, options, _) in variants.items():
            path = folder / f"{scan}-{name}.npy"
            np.save(path, change(xyz.astype(np.float64)).astype(np.float32))
            paths.setdefault(tuple(options.items()), []).append(str(path))
    for options, inputs in paths.items():
        predict_files(str(folder / "model"), inputs, str(folder / "out"), max_passes=2, **dict(options))
    found = (folder / "out").glob("*/detections.json")
    return {tuple(path.parent.name.split("-")): json.loads(path.read_text()) for path in found}


def corners(record):
    return np.array([found["input_corners"] for found in record["detections"]]).reshape(-1, 8, 3)


def assert_same_boxes(record, original, change, tolerance):
    assert [f["class"] for f in record["detections"]] == [f["class"] for f in original["detections"]]
    np.testing.assert_allclose(corners(record), change(corners(original)), atol=tolerance)
    for found, before in zip(record["detections"], original["detections"], strict=True):
        assert found["score"] == pytest.approx(before["score"], abs=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_the_boxes_are_those_of_the_original(records, scan, variant):
    change, options, tolerance = VARIANTS[variant]
    record = records[scan, variant]
    assert bool(record["warnings"]) == (not options)  # what is not said is assumed aloud
    assert record["detections"]
    assert_same_boxes(record, records[scan, "original"], change, tolerance)


@pytest.mark.parametrize("scan", SCANS)
def test_y_up_is_guessed_or_suspected_but_never_ignored(records, scan):
    record = records[scan, "y_up_guessed"]
    warnings = " ".join(record["warnings"])
    assert "--up" in warnings
    if "assumed that y points up" in warnings:
        assert_same_boxes(record, records[scan, "original"], lambda p: p @ Y_UP.T, 0.001)
