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


PARAMS = {"decoder_0": {"kernel": jnp.full(2, 2.0)}, "decoder_seed_position_0": {"bias": jnp.full(2, 2.0)},
          "proposal_head": {"kernel": jnp.full(2, 2.0)}}  # fmt: skip


def test_a_group_learns_and_decays_at_its_own_rate():
    """As PyTorch's parameter groups do: everything that the optimiser makes of a gradient is scaled, clipping is not."""
    config = ConfigDict(dict(name="adamw", weight_decay=0.5, clip_norm=1.0, group_rates=dict(decoder=0.1)))
    gradient = {"decoder_0": {"kernel": jnp.asarray([3.0, -4.0])},
                "decoder_seed_position_0": {"bias": jnp.asarray([1.0, 1.0])},
                "proposal_head": {"kernel": jnp.asarray([2.0, 2.0])}}  # fmt: skip

    def steps(config):
        optimizer, params = make_optimizer(config, optax.constant_schedule(0.1)), PARAMS
        state = optimizer.init(params)
        updates, state = optimizer.update(gradient, state, params)
        return updates, optax.tree_utils.tree_get(state, "mu")

    grouped, moments = steps(config)
    with config.unlocked():
        del config.group_rates
    plain, plain_moments = steps(config)
    np.testing.assert_array_equal(moments["decoder_0"]["kernel"], plain_moments["decoder_0"]["kernel"])
    for name, factor in (("decoder_0", 0.1), ("decoder_seed_position_0", 0.1), ("proposal_head", 1.0)):
        for leaf, expected in zip(grouped[name].values(), plain[name].values(), strict=True):
            np.testing.assert_allclose(leaf, factor * expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"encoder": 0.1}, "names 'encoder', which no parameter's path contains; there are decoder_0, "),
        ({"decoder": 0.0}, "group_rates.decoder is 0.0; expected a positive factor"),
        ({"decoder": float("nan")}, "group_rates.decoder is nan"),
    ],
)
def test_impossible_groups(rates, message):
    config = ConfigDict(dict(name="adamw", weight_decay=0.0, clip_norm=0.0, group_rates=rates))
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, optax.constant_schedule(0.1)).init(PARAMS)
