import numpy as np
import pytest
from ml_collections import ConfigDict

from vrdistill_jax.training.schedules import learning_rate_schedule, norm_momentum_schedule


def rates(steps, **changes):
    config = ConfigDict(
        dict(schedule="cosine", learning_rate=1.0, warmup_steps=0, decay_epochs=(), decay_factor=0.1)
        | changes
    )
    schedule = learning_rate_schedule(config, 100, 10)
    return np.array([schedule(s) for s in steps])


def test_cosine_goes_to_zero_after_warmup():
    np.testing.assert_allclose(rates([0, 50, 100]), [1.0, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(rates([0, 5, 10, 55, 100], warmup_steps=10), [0, 0.5, 1.0, 0.5, 0], atol=1e-6)


def test_steps_decay_at_epochs():
    got = rates([0, 79, 81, 121], schedule="steps", decay_epochs=(8, 12))
    np.testing.assert_allclose(got, [1, 1, 0.1, 0.01], rtol=1e-5)
    warm = rates([79, 81], schedule="steps", decay_epochs=(8,), warmup_steps=10)
    np.testing.assert_allclose(warm, [1, 0.1], rtol=1e-5)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'linear'; known: constant, cosine, steps"):
        rates([0], schedule="linear")


def test_votenet_momentum():
    config = ConfigDict({"initial": 0.5, "factor": 0.5, "decay_epochs": 20.0, "floor": 0.001})
    schedule = norm_momentum_schedule(config, steps_per_epoch=3)
    for epoch in (0, 19, 20, 45, 100, 179):
        expected = max(0.5 * 0.5 ** (epoch // 20), 0.001)
        assert float(schedule(epoch * 3 + 2)) == pytest.approx(expected, rel=1e-5)


def test_constant_momentum():
    schedule = norm_momentum_schedule(
        ConfigDict({"initial": 0.1, "factor": 1.0, "decay_epochs": 20.0, "floor": 0.001}), 3
    )
    assert float(schedule(1000)) == pytest.approx(0.1)
