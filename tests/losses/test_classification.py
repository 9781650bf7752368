import numpy as np

from vrdistill_jax.losses.classification import cross_entropy


def test_matches_the_formula_with_weights_not_renormalised():
    logits = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], np.float32)
    label = np.array([1, 2])
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(probability[[0, 1], label])
    np.testing.assert_allclose(cross_entropy(logits, label), expected, rtol=1e-5)
    weighted = cross_entropy(logits, label, np.array([1.0, 0.5, 4.0], np.float32))
    np.testing.assert_allclose(weighted, expected * [0.5, 4.0], rtol=1e-5)


def test_negative_label_is_finite():
    assert np.isfinite(cross_entropy(np.zeros((1, 3), np.float32), np.array([-1]))).all()
