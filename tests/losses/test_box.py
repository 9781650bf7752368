import numpy as np

from vrdistill_jax.losses.box import huber, nearest, squared_distances


def test_huber_is_quadratic_then_linear():
    np.testing.assert_allclose(huber(np.array([0.5, -1.0, 3.0])), [0.125, 0.5, 2.5])
    np.testing.assert_allclose(huber(np.array([0.5, 2.0]), delta=0.5), [0.125, 0.875])


def test_nearest_skips_masked_columns():
    a = np.array([[[0.0, 0, 0], [2.0, 0, 0]]], np.float32)
    b = np.array([[[0.1, 0, 0], [1.0, 0, 0], [5.0, 0, 0]]], np.float32)
    distance, index = nearest(squared_distances(a, b), np.array([[False, True, True]]))
    np.testing.assert_allclose(distance, [[1.0, 1.0]])
    np.testing.assert_array_equal(index, [[1, 1]])
    distance, index = nearest(squared_distances(a, b), np.zeros((1, 3), bool))
    assert np.isfinite(distance).all()
    np.testing.assert_array_equal(index, 0)
