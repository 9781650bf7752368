from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.three_detr import attention as naive_attention
from oracles.three_detr import layer_norm as naive_layer_norm

from vrdistill_jax.nn.attention import (
    DecoderLayer,
    EncoderLayer,
    MultiHeadAttention,
    attend,
    attend_in_blocks,
    draw_kept,
)

SIZE, HEADS, HIDDEN = 12, 3, 20


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(layer, *arguments):
    """Parameters of the layer's shapes; none is 0 or 1 as after initialisation."""
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), *arguments, train=False))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [0.5 * normal(n, *leaf.shape) + 0.1 for n, leaf in enumerate(leaves)])


def naive_heads(params, query, key, value, mask=None):
    return naive_attention(
        query, key, value, params["in_kernel"].T, params["in_bias"], params["out_kernel"].T, params["out_bias"],
        HEADS, mask,
    )  # fmt: skip


def naive_norm(params, x):
    return naive_layer_norm(x, params["scale"], params["bias"])


def naive_feed_forward(params, x):
    hidden = np.maximum(x @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def test_attention_against_numpy():
    layer = MultiHeadAttention(SIZE, HEADS)
    query, key, value = normal(0, 2, 5, SIZE), normal(1, 2, 7, SIZE), normal(2, 2, 7, SIZE)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.5
    mask[..., 0] = True
    params = random_params(layer, query, key, value)
    for own_mask in (None, mask):
        got = jax.jit(lambda m: layer.apply({"params": params}, query, key, value, m, train=False))(own_mask)
        for b in range(2):
            row = None if own_mask is None else own_mask[b]
            expected = naive_heads(params, query[b], key[b], value[b], row)
            np.testing.assert_allclose(got[b], expected, atol=2e-5)


def test_masked_keys_have_no_influence_and_no_key_at_all_stays_finite():
    query, key, value = (normal(n, 1, 4, 2, 3) for n in range(3))
    mask = np.array([[[1, 1, 0, 1]]], bool)
    garbage = key.copy(), value.copy()
    for array in garbage:
        array[:, 2] = 1e4
    jitted = jax.jit(attend)
    np.testing.assert_array_equal(jitted(query, key, value, mask), jitted(query, *garbage, mask))

    def objective(query):
        return attend(query, key, value, np.zeros((1, 4, 4), bool))

    np.testing.assert_allclose(
        jax.jit(objective)(query), np.broadcast_to(value.mean(1, keepdims=True), query.shape), atol=1e-6
    )
    assert np.isfinite(jax.jit(jax.jacobian(objective))(query)).all()


def test_blocks_change_nothing():
    query, key, value = normal(0, 2, 12, 2, 3), normal(1, 2, 8, 2, 3), normal(2, 2, 8, 2, 3)
    mask = np.random.default_rng(3).random((2, 12, 8)) < 0.7

    def whole(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, mask)))

    def blocks(q, k, v):
        return jnp.sum(jnp.sin(attend_in_blocks(q, k, v, mask, block=4)))

    for a, b in zip(
        jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(query, key, value),
        jax.jit(jax.value_and_grad(blocks, (0, 1, 2)))(query, key, value),
        strict=True,
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)
    np.testing.assert_array_equal(  # no multiple of the block
        jax.jit(partial(attend_in_blocks, block=5))(query, key, value, mask),
        jax.jit(attend)(query, key, value, mask),
    )


def test_dropout_takes_weights_out_and_keeps_the_mean():
    query, key = np.zeros((1, 8, 1, 2), np.float32), np.zeros((1, 400, 1, 2), np.float32)
    value = np.ones((1, 400, 1, 2), np.float32)
    for block in (8, 4):
        got = np.asarray(attend_in_blocks(query, key, value, None, 0.25, jax.random.key(0), block))[
            0, :, 0, 0
        ]
        assert got.std() > 0.005  # other weights are dropped for each query, in each block
        assert len(set(got.round(6))) > 4
        assert abs(got.mean() - 1) < 0.05
    np.testing.assert_allclose(attend_in_blocks(query, key, value, None, 0.25, None), 1, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropped_weights_are_as_random_as_those_of_jax(rate):
    shape = (2, 4, 256, 256)
    draw = jax.jit(lambda key: draw_kept(key, rate, shape))
    kept, again, other = (np.asarray(draw(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(kept, again)

    def deviations(sample):
        """Of a mean of independent draws, in standard errors."""
        count = kept.size // sample.size
        return (sample - (1 - rate)) / np.sqrt(rate * (1 - rate) / count)

    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):  # of all, of a key, of a query, of a head
        worst = np.abs(deviations(np.mean(kept, axis=axes))).max()
        assert worst < 5, axes
    # Neither neighbours nor the same places under another key, in another head or another scene have to do with each other.
    centred = kept - (1 - rate)
    pairs = [
        (centred, other - (1 - rate)),
        (centred[..., 1:], centred[..., :-1]),
        (centred[..., 1:, :], centred[..., :-1, :]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
    ]
    for left, right in pairs:
        correlation = np.mean(left * right) / (rate * (1 - rate))
        assert abs(correlation) < 5 / np.sqrt(left.size)
    # Runs are as long as they are by chance.
    following = np.mean(kept[..., 1:] & kept[..., :-1])
    assert following == pytest.approx((1 - rate) ** 2, abs=0.005)


def test_keys_that_follow_each_other_drop_different_weights():
    keys = jax.random.split(jax.random.key(3), 64)
    kept = np.asarray(jax.vmap(lambda key: draw_kept(key, 0.5, (4096,)))(keys)).astype(np.float32) - 0.5
    correlation = kept @ kept.T / (0.25 * 4096)
    assert np.abs(correlation - np.eye(64)).max() < 6 / np.sqrt(4096)


def test_encoder_layer_against_numpy():
    layer, x = EncoderLayer(SIZE, HEADS, HIDDEN, 0.3), normal(0, 1, 6, SIZE)
    mask = np.tril(np.ones((1, 6, 6), bool))
    params = random_params(layer, x)
    normed = naive_norm(params["norm1"], x[0])
    expected = x[0] + naive_heads(params["attention"], normed, normed, normed, mask[0])
    expected = expected + naive_feed_forward(params["feed_forward"], naive_norm(params["norm2"], expected))
    apply = jax.jit(
        lambda train, rngs: layer.apply({"params": params}, x, mask, train=train, rngs=rngs), static_argnums=0
    )
    rngs = {"dropout": jax.random.key(0)}
    got = apply(False, rngs)
    np.testing.assert_allclose(got[0], expected, atol=5e-5)
    assert np.abs(apply(True, rngs) - got).max() > 0.1


@pytest.mark.parametrize(("norm_first", "position_in_value"), [(True, False), (False, True)])
def test_decoder_layer_against_numpy(norm_first, position_in_value):
    layer = DecoderLayer(SIZE, HEADS, HIDDEN, 0.1, norm_first, position_in_value)
    x, position = normal(0, 1, 5, SIZE), normal(1, 1, 5, SIZE)
    memory, memory_position = normal(2, 1, 7, SIZE), normal(3, 1, 7, SIZE)
    memory_mask = np.random.default_rng(4).random((1, 1, 7)) < 0.7
    arguments = (x, memory, position, memory_position, None, memory_mask)
    params = random_params(layer, *arguments)

    def among_queries(x):
        placed = x + position[0]
        return naive_heads(params["self_attention"], placed, placed, placed if position_in_value else x)

    def to_memory(x):
        keys = memory[0] + memory_position[0]
        values = keys if position_in_value else memory[0]
        return naive_heads(params["cross_attention"], x + position[0], keys, values, memory_mask[0])

    expected = x[0]
    for n, branch in enumerate(
        (among_queries, to_memory, lambda x: naive_feed_forward(params["feed_forward"], x)), 1
    ):
        if norm_first:
            expected = expected + branch(naive_norm(params[f"norm{n}"], expected))
        else:
            expected = naive_norm(params[f"norm{n}"], expected + branch(expected))
    got = jax.jit(lambda: layer.apply({"params": params}, *arguments, train=False))()
    np.testing.assert_allclose(got[0], expected, atol=5e-5)


def test_starts_as_pytorch_does():
    x = jnp.zeros((1, 4, 64))
    params = MultiHeadAttention(64, 4).init(jax.random.key(0), x, x, x, train=False)["params"]
    bound = np.sqrt(6 / (4 * 64))  # of the packed kernel, not of each projection
    assert 0.95 * bound < np.abs(params["in_kernel"]).max() <= bound
    assert not params["in_bias"].any()
    assert not params["out_bias"].any()


def test_heads_must_divide_the_channels():
    x = jnp.zeros((1, 4, 10))
    with pytest.raises(ValueError, match="10 channels cannot be split over 4 heads"):
        MultiHeadAttention(10, 4).init(jax.random.key(0), x, x, x, train=False)
