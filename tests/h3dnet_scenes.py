"""A very small H3DNet for the scenes of `scenes.py`."""

from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict
from scenes import tiny_config

from vrdistill_jax.detectors import h3dnet

# Programs of these tests run once or a few times: compiling them well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def small_config(oriented: bool = False, **changes) -> ConfigDict:
    """A whole config; `changes` set dotted keys. Few points make a face or an edge."""
    config = tiny_config()
    old = config.detector
    detector = h3dnet.default_config(old.class_names, old.mean_sizes, oriented)
    detector.levels, detector.width, detector.num_proposals = old.levels, old.width, old.num_proposals
    detector.aggregation_radius, detector.aggregation_neighbors = 0.5, 8
    detector.match_neighbors = 8
    detector.num_towers = 2
    detector.primitives.face_points, detector.primitives.edge_points = 8, 2
    config.detector = detector
    config.dataset.oriented = oriented
    for key, value in changes.items():
        config.update_from_flattened_dict({key: value})
    return config


def random_variables(model, batch, seed: int = 0) -> dict:
    """Variables of the network, drawn without running it."""
    rng, (scene, pyramid, _) = np.random.default_rng(seed), batch
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), scene.points, pyramid, train=False))

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        scale = 1.4 * leaf.shape[0] ** -0.5 if name == "kernel" else 0.1
        return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
