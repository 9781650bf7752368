"""What the dropout of attention weights costs in training, at the size of 3DETR's encoder."""

import jax
import jax.numpy as jnp
import numpy as np

from vrdistill_jax.benchmarks.recorder import Recorder
from vrdistill_jax.nn.attention import attend, draw_kept

SUITE = "attention"
NUM_SCENES, NUM_HEADS, HEAD_SIZE = 4, 4, 64  # of 3DETR's encoder
DROPOUT_RATE = 0.1


def run(recorder: Recorder) -> None:
    """Times self-attention forward and backward, with and without dropout, and the drawing alone: ours and JAX's own."""
    num_tokens = 64 if recorder.effort.quick else 512
    shape = (NUM_SCENES, num_tokens, NUM_HEADS, HEAD_SIZE)
    draw = np.random.default_rng(0).normal
    query, key, value = (jnp.asarray(draw(size=shape), jnp.float32) for _ in range(3))
    weights = (NUM_SCENES, NUM_HEADS, num_tokens, num_tokens)
    rng = jax.random.key(0)

    def backward(rate):
        def total(inputs, rng):
            query, key, value = inputs
            return jnp.sum(jnp.square(attend(query, key, value, None, rate, rng)))

        return jax.jit(jax.grad(total))

    plain, dropping = backward(0.0), backward(DROPOUT_RATE)
    ours = jax.jit(lambda rng: draw_kept(rng, DROPOUT_RATE, weights))
    threefry = jax.jit(lambda rng: jax.random.bernoulli(rng, 1 - DROPOUT_RATE, weights))
    recorder.time_in_turn(
        SUITE,
        f"batch {NUM_SCENES}, {num_tokens} tokens",
        {
            "forward, backward": lambda: plain((query, key, value), rng),
            "forward, backward, with dropout": lambda: dropping((query, key, value), rng),
            "draw_kept": lambda: ours(rng),
            "jax.random.bernoulli": lambda: threefry(rng),
        },
    )
