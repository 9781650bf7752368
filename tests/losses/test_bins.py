import numpy as np
import pytest

from vrdistill_jax.losses.bins import angle_from_bin, bin_from_angle


@pytest.mark.parametrize("num_bins", [1, 12, 24])
def test_round_trip(num_bins):
    angle = np.random.default_rng(0).uniform(-np.pi, np.pi, 500).astype(np.float32)
    index, residual = bin_from_angle(angle, num_bins)
    assert (np.abs(residual) <= np.pi / num_bins + 1e-5).all()
    assert ((index >= 0) & (np.asarray(index) < num_bins)).all()
    error = np.asarray(angle_from_bin(index, residual, num_bins)) - angle
    np.testing.assert_allclose(np.mod(error + np.pi, 2 * np.pi) - np.pi, 0, atol=1e-5)


def test_bin_centres_and_edges():
    index, residual = bin_from_angle(np.array([0.0, np.pi / 6, -0.01, 2 * np.pi - 0.3], np.float32), 12)
    np.testing.assert_array_equal(index, [0, 1, 0, 11])
    np.testing.assert_allclose(residual, [0.0, 0.0, -0.01, np.pi / 6 - 0.3], atol=1e-5)
