"""FCAF3D's network on small clouds; its numbers are compared with NumPy's in tests/interop/test_parity_fcaf3d.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import make_sample

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.detectors import fcaf3d, find_detector
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid, pad_voxel_pyramid
from vrdistill_jax.structs import Points, Scene, pad_boxes
from vrdistill_jax.training.state import count_parameters

CAPACITIES = (640, 640, 640, 256, 96, 40, 24, 128, 640, 4096)
DENSER = (640, 640, 640, 256, 96, 40, 16, 128, 1024, 8192)
# Each program runs a few times: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def make_config(oriented=False, num_classes=4, **changes):
    config = fcaf3d.default_config([f"c{n}" for n in range(num_classes)], None, oriented)
    config.voxel_size, config.capacities = 0.08, (CAPACITIES,)
    config.update_from_flattened_dict(changes)
    return config


def small_config(**changes):
    small = dict(width=1 / 16, num_blocks=(1, 1, 1, 1), prune_threshold=300, num_candidates=100)
    return make_config(**(small | changes))


def make_inputs(config, seeds=(0, 1), num_boxes=3, capacities=CAPACITIES, num_points=700):
    """(Scene, VoxelPyramid) of small rooms."""
    prepared = []
    for seed in seeds:
        sample = make_sample(seed, num_boxes)
        count = len(sample["xyz"])
        pads = [(0, num_points - count), (0, 0)]
        points = Points(
            np.pad(sample["xyz"], pads), np.pad(sample["color"], pads), np.arange(num_points) < count
        )
        boxes = pad_boxes(
            sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"], sample["boxes_label"], 8
        )
        pyramid = fcaf3d.pyramid_config(config)
        built = pad_voxel_pyramid(build_voxel_pyramid(points.xyz, points.mask, pyramid), capacities, pyramid)
        scene = Scene(points, boxes, None, np.eye(4, dtype=np.float32), np.int32(seed), np.True_)
        prepared.append((scene, built))
    return stack_trees(prepared)


@pytest.mark.parametrize(
    ("classes", "oriented", "expected"), [(18, False, 70_479_574), (10, True, 70_478_798)]
)
def test_parameter_counts(classes, oriented, expected):
    config = make_config(oriented, classes)
    scene, pyramid = make_inputs(config)
    model = fcaf3d.build(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), scene.points, pyramid, train=False))
    assert count_parameters(shapes["params"]) == expected


def test_published_architecture():
    config = fcaf3d.default_config(["a"], None, False)
    assert find_detector("fcaf3d") is fcaf3d
    assert (config.voxel_size, config.prune_threshold) == (0.01, 100_000)
    largest = config.capacities[-1]
    assert len(largest) == 10
    assert largest[7:] == tuple(8**n * largest[6] for n in (1, 2, 3))
    with pytest.raises(ValueError, match="width 0.3"):
        fcaf3d.build(make_config(width=0.3))


@pytest.fixture(scope="module")
def variables():
    config = small_config()
    scene, pyramid = make_inputs(config)
    model = fcaf3d.build(config)
    variables = jit(lambda key: model.init(key, scene.points, pyramid, train=False))(jax.random.key(0))
    heads = {name: jax.tree.map(lambda x: 20 * x, variables["params"][name]) for name in ("box_head",)}
    return {"params": variables["params"] | heads, "batch_stats": variables["batch_stats"]}


@pytest.mark.slow
def test_anchors_and_what_padding_and_other_scenes_do(variables):
    config = small_config()
    model = fcaf3d.build(config)
    forward = jit(lambda v, inputs: model.apply(v, inputs[0].points, inputs[1], train=False))
    output = forward(variables, make_inputs(config))
    head = jax.tree.map(np.asarray, output.raw.head)
    for level, stride in enumerate(fcaf3d.STRIDES):
        for b in range(2):
            rows = head.mask[b] & (head.level == level)
            assert 0 < rows.sum() <= 300
            steps = head.points[b][rows] / (stride * 0.08)
            np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert (head.mask[:, head.level == 0].sum(1) == 300).all(), "the finest level is pruned"
    assert output.taps["level3"].features.shape == (2, CAPACITIES[6], 8)
    assert (np.asarray(output.taps["level0"].seed_index) == -1).all()
    assert output.predictions.mask.shape == (2, 100 + 100 + 100 + CAPACITIES[6])
    scores = np.asarray(fcaf3d.scores_from_head(output.raw.head))[head.mask]
    assert np.median(scores) == pytest.approx(0.005, abs=0.003)
    other = forward(variables, make_inputs(config, (0, 5))).raw.head
    np.testing.assert_allclose(other.class_logits[0], head.class_logits[0], atol=1e-5)
    larger = forward(
        variables, make_inputs(config, capacities=tuple(x + 32 for x in CAPACITIES), num_points=800)
    )
    for ours, more in (
        (head.class_logits, larger.raw.head.class_logits),
        (head.points, larger.raw.head.points),
    ):
        np.testing.assert_allclose(ours[head.mask], np.asarray(more)[larger.raw.head.mask], atol=1e-5)


@pytest.mark.slow
def test_every_parameter_is_trained_and_no_box_is_no_problem(variables):
    config = small_config(voxel_size=0.05, prune_threshold=100_000)  # every box holds anchors
    model = fcaf3d.build(config)

    @jit
    def value_and_grad(params, inputs):
        def objective(params):
            tree = {"params": params, "batch_stats": variables["batch_stats"]}
            output, _ = model.apply(tree, inputs[0].points, inputs[1], train=True, mutable=["batch_stats"])
            return fcaf3d.loss(output, inputs[0], config)

        return jax.value_and_grad(objective, has_aux=True)(params)

    scene, pyramid = make_inputs(config, capacities=DENSER)
    (total, terms), gradient = value_and_grad(variables["params"], (scene, pyramid))
    assert np.isfinite(total)
    assert terms["positives"] > 1
    norms = jax.tree.map(lambda x: float(jnp.linalg.norm(x)), gradient)
    # Boxes of these rooms are learned on the finest level, whose scale alone has a gradient.
    unused = {
        jax.tree_util.keystr(path) for path, norm in jax.tree_util.tree_leaves_with_path(norms) if norm == 0
    }
    assert unused <= {f"['scale_{n}']" for n in (1, 2, 3)}
    none = scene.boxes._replace(mask=np.zeros_like(scene.boxes.mask))
    (total, terms), gradient = value_and_grad(variables["params"], (scene._replace(boxes=none), pyramid))
    assert terms["box"] == terms["center"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((total, gradient)))
