"""Votes and labelled scenes with random contents, for the tests of VRDistill."""

import jax
import numpy as np

from vrdistill_jax.structs import Boxes, Points, PointSet, Scene

B, M, C, G, N = 2, 16, 8, 5, 40


def make_scene(seed=0, counts=(3, 2), yaw=0.0) -> Scene:
    """Boxes at random places, every second point on one of them; pads hold garbage."""
    rng = np.random.default_rng(seed)
    mask = np.arange(G) < np.array(counts)[:, None]
    instance = np.full((B, N, 2), -1, np.int32)
    for b, count in enumerate(counts):
        if count:
            instance[b, ::2, 0] = rng.integers(0, count, N // 2)
            instance[b, ::6, 1] = 0
    center = rng.uniform(-2, 2, (B, G, 3)).astype(np.float32)
    boxes = Boxes(
        center,
        rng.uniform(0.5, 2, (B, G, 3)).astype(np.float32),
        np.full((B, G), yaw, np.float32),
        np.where(mask, 1, -1).astype(np.int32),
        mask,
        center + np.float32(0.1),
    )
    points = Points(
        rng.uniform(-2, 2, (B, N, 3)).astype(np.float32),
        np.zeros((B, N, 1), np.float32),
        np.ones((B, N), bool),
    )
    eye = np.tile(np.eye(4, dtype=np.float32), (B, 1, 1))
    return Scene(points, boxes, instance, eye, np.arange(B, dtype=np.int32), np.ones(B, bool))


def make_votes(seed=0, size=C, count=M, pads=0) -> PointSet:
    rng = np.random.default_rng(seed)
    mask = np.broadcast_to(np.arange(count) < count - pads, (B, count))
    return PointSet(
        rng.uniform(-2, 2, (B, count, 3)).astype(np.float32),
        rng.normal(size=(B, count, size)).astype(np.float32),
        mask,
        np.stack([rng.permutation(N)[:count] for _ in range(B)]).astype(np.int32),
    )


def shaken(params, seed=0, scale=0.3):
    """Parameters that are nowhere zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)
