import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from vrdistill_jax.training.optimizer import make_optimizer


def first_update(gradient, **changes):
    config = ConfigDict(dict(name="adamw", weight_decay=0.0, clip_norm=0.0) | changes)
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    params = {"a": jnp.full(2, 2.0)}
    updates, _ = optimizer.update({"a": gradient}, optimizer.init(params), params)
    return updates["a"]


def test_weight_decay_is_decoupled():
    gradient = jnp.asarray([1.0, -3.0])
    plain = first_update(gradient)
    np.testing.assert_allclose(plain, [-0.1, 0.1], rtol=1e-4)
    np.testing.assert_allclose(first_update(gradient, weight_decay=0.5), plain - 0.1 * 0.5 * 2.0, atol=1e-6)


def test_clipping_scales_the_gradient():
    config = ConfigDict(dict(name="adamw", weight_decay=0.0, clip_norm=1.0))
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    params = {"a": jnp.zeros(2)}
    _, state = optimizer.update({"a": jnp.asarray([3.0, 4.0])}, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["a"]
    np.testing.assert_allclose(moment, 0.1 * np.array([0.6, 0.8]), rtol=1e-5)


def test_bad_names():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; known: adam, adamw"):
        first_update(jnp.ones(2), name="sgd")
    with pytest.raises(ValueError, match="use optimizer.name=adamw"):
        first_update(jnp.ones(2), name="adam", weight_decay=0.1)
