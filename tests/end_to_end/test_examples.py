"""The scripts of docs/examples run, at tiny size."""

import pathlib
import runpy

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.mark.slow
def test_the_sparse_unet_learns():
    script = runpy.run_path(str(EXAMPLES / "sparse_unet.py"), run_name="example")
    losses, accuracy, of_objects, background = script["train"](num_rooms=4, num_points=500, size=4, steps=12)
    assert len(losses) == 12
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert 0 < accuracy <= 1
    assert 0 <= of_objects <= 1
    assert 0.2 < background < 1


def test_rooms_have_labels_for_background_and_objects():
    script = runpy.run_path(str(EXAMPLES / "sparse_unet.py"), run_name="example")
    (features, labels, pyramid), *_ = script["make_rooms"]([0, 1], 800)
    assert features.shape == (800, 4)
    assert features.dtype == np.float32
    assert (labels == script["BACKGROUND"]).mean() > 0.2
    assert len(np.unique(labels)) > 3
    assert labels.min() >= 0
    assert len(pyramid.levels) == 4
