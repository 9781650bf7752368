"""TR3D's and SR3D's network on small clouds, and against the reference's stored tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import make_sample

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.detectors import sr3d, tr3d
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid, pad_voxel_pyramid
from vrdistill_jax.structs import Points, Scene, pad_boxes
from vrdistill_jax.training.state import count_parameters

pytestmark = pytest.mark.slow  # compiling these networks takes minutes of processor time

CLASSES = ("a", "b", "c", "d")
CAPACITIES = (640, 640, 640, 512, 320, 192, 64, 512, 3584)


def make_config(file=tr3d, oriented=False, **changes):
    config = file.default_config(
        CLASSES, ((0.7, 0.7, 0.7), (1.5, 1.5, 0.6), (0.6, 0.6, 0.9), (2, 1, 0.6)), oriented
    )
    config.voxel_size, config.width, config.capacities = 0.05, 0.125, (CAPACITIES,)
    config.num_blocks = (1, 1, 1, 1)
    config.update_from_flattened_dict(changes)
    return config


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
        pyramid = tr3d.pyramid_config(config)
        built = pad_voxel_pyramid(build_voxel_pyramid(points.xyz, points.mask, pyramid), capacities, pyramid)
        scene = Scene(points, boxes, None, np.eye(4, dtype=np.float32), np.int32(seed), np.True_)
        prepared.append((scene, built))
    return stack_trees(prepared)


CONFIG = make_config()


@pytest.fixture(scope="module")
def variables():
    scene, pyramid = make_inputs(CONFIG)
    model = tr3d.build(CONFIG)
    variables = jax.jit(lambda key: model.init(key, scene.points, pyramid, train=False))(jax.random.key(0))
    # One training pass sets the running statistics; larger heads, so that boxes differ.
    _, updates = jax.jit(
        lambda v: model.apply(v, scene.points, pyramid, train=True, mutable=["batch_stats"])
    )(variables)
    params = variables["params"] | {
        name: jax.tree.map(lambda x: 10 * x, variables["params"][name]) for name in ("box_head",)
    }
    return {"params": params, "batch_stats": updates["batch_stats"]}


@pytest.fixture(scope="module")
def forward():
    model = tr3d.build(CONFIG)
    return jax.jit(lambda v, inputs: model.apply(v, inputs[0].points, inputs[1], train=False))


@pytest.fixture(scope="module")
def value_and_grad():
    model, config = tr3d.build(CONFIG), make_config(sr3d)

    def objective(params, stats, inputs):
        scene, pyramid = inputs
        output, _ = model.apply(
            {"params": params, "batch_stats": stats},
            scene.points,
            pyramid,
            train=True,
            mutable=["batch_stats"],
        )
        return sr3d.loss(output, scene, config)

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


@pytest.mark.parametrize(
    ("classes", "oriented", "width", "expected"),
    [(18, False, 1.0, 14_661_464), (10, True, 1.0, 14_660_690), (18, False, 0.5, 3_669_944)],
)
def test_parameter_counts(classes, oriented, width, expected):
    config = make_config(oriented=oriented, width=width, num_blocks=(3, 4, 6, 3))
    config.class_names = tuple(map(str, range(classes)))
    scene, pyramid = make_inputs(CONFIG)
    shapes = jax.eval_shape(
        lambda: tr3d.build(config).init(jax.random.key(0), scene.points, pyramid, train=False)
    )
    assert count_parameters(shapes["params"]) == expected


def test_untrained_scores_are_low_and_anchors_lie_on_the_lattice(forward, variables):
    scene, pyramid = make_inputs(CONFIG)
    output = forward(variables, (scene, pyramid))
    head, p = output.raw.head, output.predictions
    assert np.median(np.asarray(p.objectness)[p.mask]) == pytest.approx(0.01, abs=0.01)
    np.testing.assert_array_equal(head.level, np.repeat([0, 1], (CAPACITIES[8], CAPACITIES[7])))
    for level, stride in enumerate(tr3d.STRIDES):
        steps = np.asarray(head.points)[np.asarray(head.mask) & (np.asarray(head.level) == level)] / (
            stride * 0.05
        )
        assert len(steps) > 20
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert output.taps["level0"].features.shape == (2, CAPACITIES[8], 16)
    assert output.taps["level1"].seed_index is None


def test_proposals_are_the_anchors_where_the_other_network_is_most_certain(forward, variables):
    inputs = make_inputs(CONFIG)
    output = forward(variables, inputs)
    certain = np.where(output.predictions.mask, np.random.default_rng(0).random((2, sum(CAPACITIES[7:]))), -1)
    other = output._replace(predictions=output.predictions._replace(objectness=certain.astype(np.float32)))
    model = tr3d.build(CONFIG)
    chosen = model.apply(variables, output, other, train=False, method="propose_like")
    index = np.argsort(-certain, axis=1)[:, : tr3d.NUM_PROPOSALS]
    np.testing.assert_array_equal(chosen.raw.proposal_index, index)
    for row in (0, 1):
        np.testing.assert_array_equal(
            chosen.predictions.center[row], output.predictions.center[row][index[row]]
        )
        np.testing.assert_array_equal(
            chosen.head["class"][row], output.raw.head.class_logits[row][index[row]]
        )
        np.testing.assert_array_equal(
            chosen.taps["clusters"].xyz[row], output.raw.head.points[row][index[row]]
        )
    assert np.asarray(chosen.taps["proposals"].mask).all()
    np.testing.assert_allclose(np.exp(chosen.head["size"]), chosen.predictions.size, rtol=1e-5)
    # What has been chosen stays, and is what another network is read at.
    again = model.apply(variables, output, chosen, train=False, method="propose_like")
    np.testing.assert_array_equal(again.raw.proposal_index, index)
    assert model.apply(variables, chosen, other, train=False, method="propose_like") is chosen


def test_rows_do_not_influence_each_other(forward, variables):
    both = forward(variables, make_inputs(CONFIG, (0, 1))).predictions
    other = forward(variables, make_inputs(CONFIG, (0, 5))).predictions
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[0], atol=1e-5), both, other)


def test_more_padding_changes_nothing(forward, variables):
    small = make_inputs(CONFIG)
    large = make_inputs(CONFIG, capacities=tuple(x + 64 for x in CAPACITIES), num_points=800)
    config = make_config(sr3d)
    judge = jax.jit(lambda o, scene: (tr3d.loss(o, scene, config)[0], tr3d.decode(o, scene.points, config)))
    results = []
    for inputs in (small, large):
        output = forward(variables, inputs)
        assert np.asarray(output.predictions.mask).sum() < output.predictions.mask.size
        total, found = judge(output, inputs[0])
        rows = np.asarray(output.predictions.mask)
        results.append(
            (
                np.asarray(output.predictions.center)[rows],
                np.asarray(output.predictions.class_logits)[rows],
                np.asarray(found.boxes)[np.asarray(found.mask)],
                np.asarray(total),
            )
        )
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert len(results[0][2]) > 10


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_loss_and_gradients_are_finite_and_used(value_and_grad, variables, num_boxes):
    inputs = make_inputs(CONFIG, num_boxes=num_boxes)
    (total, terms), gradient = value_and_grad(variables["params"], variables["batch_stats"], inputs)
    assert np.isfinite(total)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((terms, gradient)))
    norms = jax.tree.map(lambda x: float(jnp.linalg.norm(x)), gradient)
    if num_boxes:
        assert min(jax.tree.leaves(norms)) > 0, "every parameter is used"
        assert terms["positives"] > 1
    else:
        assert terms["box"] == 0


def test_garbage_in_pads_changes_nothing(value_and_grad, variables):
    scene, pyramid = make_inputs(CONFIG)
    empty = ~scene.points.mask[..., None]
    dirty = scene.points._replace(
        xyz=np.where(empty, 0.1, scene.points.xyz), features=np.where(empty, 5.0, scene.points.features)
    )
    (clean, _), clean_gradient = value_and_grad(
        variables["params"], variables["batch_stats"], (scene, pyramid)
    )
    (total, _), gradient = value_and_grad(
        variables["params"], variables["batch_stats"], (scene._replace(points=dirty), pyramid)
    )
    assert total == clean
    jax.tree.map(np.testing.assert_array_equal, gradient, clean_gradient)


def test_sr3d_is_the_same_network():
    ours, baseline = (file.build(make_config(file)).clone(norm=None) for file in (sr3d, tr3d))
    assert ours == baseline
    assert ours != tr3d.build(make_config(voxel_size=0.1)).clone(norm=None)
