from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.groupfree3d import loss as loss_oracle
from scenes import make_batch, tiny_config, tiny_groupfree3d_config

from vrdistill_jax import recipes
from vrdistill_jax.detectors import groupfree3d
from vrdistill_jax.detectors.decoding import PREDICT, DecodeConfig
from vrdistill_jax.detectors.groupfree3d_head import HeadOutput, merge_heads
from vrdistill_jax.structs import Boxes, PointSet
from vrdistill_jax.training.state import count_parameters

pytestmark = pytest.mark.slow  # compiling these networks takes minutes of processor time

# Each program runs a few times: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
SIZES = tiny_config().detector.mean_sizes
CLASSES = ("a", "b", "c", "d")


class Network:
    """A small network with its variables and compiled passes."""

    def __init__(self, oriented: bool):
        self.whole = tiny_groupfree3d_config(oriented)
        self.config = self.whole.detector
        self.model = groupfree3d.build(self.config)
        batch = self.batch()

        def start(key, batch):
            variables = self.model.init(key, *batch_input(batch), train=False)
            # One training pass sets the running statistics, so that evaluation gives varied boxes.
            _, updates = self.model.apply(variables, *batch_input(batch), train=True, mutable=["batch_stats"])
            return {"params": variables["params"], "batch_stats": updates["batch_stats"]}

        def objective(params, stats, batch):
            variables = {"params": params, "batch_stats": stats}
            output, _ = self.model.apply(variables, *batch_input(batch), train=True, mutable=["batch_stats"])
            return groupfree3d.loss(output, batch.scene, self.config)

        self.variables = jit(start)(jax.random.key(0), batch)
        self._forward = jit(lambda v, batch: self.model.apply(v, *batch_input(batch), train=False))
        self.loss = jit(lambda output, scene: groupfree3d.loss(output, scene, self.config))
        self._gradient = jit(jax.value_and_grad(objective, has_aux=True))

    def batch(self, *arguments, num_points: int = 256, **options):
        config = self.whole.copy_and_resolve_references()
        config.dataset.num_points = num_points
        return make_batch(config, *arguments, **options)

    def forward(self, batch):
        return self._forward(self.variables, batch)

    def value_and_grad(self, batch):
        return self._gradient(self.variables["params"], self.variables["batch_stats"], batch)


def batch_input(batch):
    return batch.scene.points, batch.pyramid


build_network = lru_cache(Network)


@pytest.fixture(params=[False, True], ids=["by_class", "metres"])
def network(request):
    return build_network(request.param)


@pytest.fixture
def plain():
    return build_network(False)


@pytest.mark.parametrize(
    ("oriented", "changes", "expected"),
    [
        (False, {}, 14_474_113),
        (False, {"decoder_layers": 12}, 27_768_385),
        (False, {"decoder_layers": 12, "backbone_width": 2.0}, 29_556_609),
        (True, {}, 14_362_848),
        (False, {"width": 0.5}, 3_689_745),
        (False, {"width": 0.25}, 958_297),
        (True, {"width": 0.5}, 3_633_920),
        (True, {"width": 0.25}, 930_192),
        (False, {"sampling": "fps"}, 14_474_113 - 167_905),
    ],
)
def test_parameter_counts(oriented, changes, expected):
    batch = make_batch(tiny_groupfree3d_config())
    count = 10 if oriented else 18
    detector = groupfree3d.default_config(tuple(map(str, range(count))), ((1, 1, 1),) * count, oriented)
    detector.update(changes, num_proposals=12)
    model = groupfree3d.build(detector)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *batch_input(batch), train=False))
    assert count_parameters(shapes["params"]) == expected


def test_published_recipes():
    scan = groupfree3d.default_config(CLASSES, SIZES, oriented=False)
    view = groupfree3d.default_config(CLASSES, SIZES, oriented=True)
    assert (scan.loss_weight.query_points, scan.loss_weight.objectness) == (0.8, 0.1)
    assert (view.loss_weight.query_points, view.loss_weight.objectness) == (0.2, 0.4)
    deltas = ("center_delta", "heading_delta", "size_delta")
    np.testing.assert_allclose([scan[name] for name in deltas], [0.04, 1, 0.1111111111111])
    np.testing.assert_allclose([view[name] for name in deltas], [0.1111111111111, 0.04, 0.0625])
    assert (scan.merged_heads, view.merged_heads) == ("last_three", "all")
    assert (scan.size_by_class, view.size_by_class) == (True, False)


def test_the_decoder_learns_more_slowly(plain):
    """As the reference groups its parameters: the decoder with its projections and position embeddings, not the heads."""
    rates = [
        recipes.groupfree3d_config(task, "tiny").optimizer.group_rates
        for task in (recipes.SCANNET, recipes.SUNRGBD)
    ]
    assert [rate.to_dict() for rate in rates] == [{"decoder": 0.1}, {"decoder": 0.05}]
    modules = set(plain.variables["params"])
    slow = {name for name in modules if "decoder" in name}
    assert modules - slow == {
        "backbone", "seed_mlp", "seed_out", "proposal_head", "prediction_heads_0", "prediction_heads_1"
    }  # fmt: skip
    assert {"decoder_0", "decoder_query_projection", "decoder_seed_position_1"} <= slow


def test_taps(network):
    batch = network.batch()
    output = network.forward(batch)
    raw, taps = output.raw, output.taps
    for points in (taps["seeds"], taps["queries"]):  # each knows its row of the cloud
        rows = np.take_along_axis(batch.scene.points.xyz, np.asarray(points.seed_index)[..., None], 1)
        np.testing.assert_array_equal(rows, points.xyz)
    best = np.sort(-np.asarray(raw.seed_logit), 1)[:, :12]
    np.testing.assert_array_equal(-np.take_along_axis(raw.seed_logit, raw.query_index, 1), best)
    np.testing.assert_array_equal(taps["clusters"].xyz, raw.head.center[0])
    np.testing.assert_array_equal(taps["clusters"].features, taps["queries"].features)
    np.testing.assert_array_equal(taps["clusters"].xyz, taps["proposals"].xyz)
    sizes = {name: values.shape[-1] for name, values in output.head.items()}
    bins = network.config.num_heading_bins
    of_size = 4 * 4 if network.config.size_by_class else 3
    assert sizes == {"objectness": 1, "center": 3, "heading": 2 * bins, "size": of_size, "class": 4}
    np.testing.assert_allclose(
        output.head["center"] + taps["queries"].xyz, output.predictions.center, atol=1e-6
    )
    # what the last layer of the head reads
    out = network.variables["params"]["prediction_heads_1"]["class_out"]
    logits = taps["proposals"].features @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(logits, output.predictions.class_logits, atol=1e-5)


@pytest.mark.parametrize(("layer", "row"), [(1, 0), (-1, 1)])
def test_tap_layer(plain, layer, row):
    config = tiny_groupfree3d_config(**{"detector.tap_layer": layer}).detector
    batch = plain.batch()
    model = groupfree3d.build(config)
    output = jit(lambda v, batch: model.apply(v, *batch_input(batch), train=False))(plain.variables, batch)
    np.testing.assert_array_equal(output.taps["clusters"].xyz, output.raw.head.center[row + 1])
    np.testing.assert_array_equal(output.taps["clusters"].features, output.raw.decoder[row])


def test_farthest_point_queries_depend_on_coordinates_only(plain):
    seeds = plain.forward(plain.batch()).taps["seeds"]
    index = np.asarray(groupfree3d.sample_queries(seeds, None, 12))
    np.testing.assert_array_equal(index, np.tile(np.arange(12), (2, 1)))  # seeds are in that order already
    with pytest.raises(ValueError, match="40 proposals cannot be sampled from 32 seeds"):
        groupfree3d.sample_queries(seeds, None, 40)


def test_proposals_where_another_network_has_its_own(plain):
    batch = plain.batch()
    output, apply = plain.forward(batch), plain.model.apply
    index = np.asarray(output.raw.query_index)[:, ::-1]
    other = output._replace(raw=output.raw._replace(query_index=index))
    again = jit(lambda v, *outputs: apply(v, *outputs, train=False, method="propose_like"))(
        plain.variables, output, other
    )
    np.testing.assert_allclose(again.predictions.center[:, ::-1], output.predictions.center, atol=1e-4)
    given = jit(lambda v, batch: apply(v, *batch_input(batch), train=False, query_index=index))(
        plain.variables, batch
    )
    np.testing.assert_allclose(given.predictions.center, again.predictions.center, atol=1e-4)


def test_rows_do_not_influence_each_other(plain):
    both = plain.forward(plain.batch((0, 1))).predictions
    other = plain.forward(plain.batch((0, 5))).predictions
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), both, other)


def test_more_padding_changes_nothing(plain):
    small, large = (plain.batch(num_points=count) for count in (700, 900))
    assert not large.scene.points.mask.all()
    a, b = plain.forward(small), plain.forward(large)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.predictions, b.predictions)
    np.testing.assert_allclose(plain.loss(a, small.scene)[0], plain.loss(b, large.scene)[0], rtol=1e-5)


def test_garbage_in_pads_changes_nothing(plain):
    batch = plain.batch(num_points=700)
    scene, pads = batch.scene, ~batch.scene.boxes.mask
    boxes = scene.boxes._replace(
        center=np.where(pads[..., None], 0.37, scene.boxes.center),
        size=np.where(pads[..., None], 7.0, scene.boxes.size),
        yaw=np.where(pads, 1.0, scene.boxes.yaw),
        label=np.where(pads, 3, scene.boxes.label),
    )
    empty = ~scene.points.mask[..., None]
    points = scene.points._replace(xyz=np.where(empty, 99.0, scene.points.xyz))
    dirty = batch._replace(scene=scene._replace(boxes=boxes, points=points))
    (clean_loss, _), clean_gradient = plain.value_and_grad(batch)
    (dirty_loss, _), dirty_gradient = plain.value_and_grad(dirty)
    assert clean_loss == dirty_loss
    jax.tree.map(np.testing.assert_array_equal, clean_gradient, dirty_gradient)


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_loss_and_gradients_are_finite_and_used(network, num_boxes):
    (total, terms), gradient = network.value_and_grad(network.batch(num_boxes=num_boxes))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((total, terms, gradient)))
    of_boxes = {"center", "size", "class"}
    if num_boxes == 0:
        assert all(terms[name] == 0 for name in of_boxes)
        assert terms["objectness"] > 0
        assert terms["query_points"] > 0
        return
    assert all(terms[name] > 0 for name in of_boxes | {"objectness", "query_points"})
    idle = [p for p, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(g)]
    names = {jax.tree_util.keystr(path) for path in idle}
    # One heading bin is always the right one.
    assert all("heading_out" in name and not network.whole.dataset.oriented for name in names), names


def test_an_empty_cloud_is_finite_and_finds_nothing(plain):
    batch = plain.batch()
    mask = batch.scene.points.mask & np.array([[True], [False]])
    levels = tuple(
        level._replace(mask=level.mask & np.array([[True], [False]])) for level in batch.pyramid.levels
    )
    scene = batch.scene._replace(points=batch.scene.points._replace(mask=mask))
    batch = batch._replace(scene=scene, pyramid=batch.pyramid._replace(levels=levels))
    output = plain.forward(batch)
    assert not output.predictions.mask[1].any()
    (total, _), gradient = plain.value_and_grad(batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((output, total, gradient)))


def test_padding_scenes_of_a_batch_do_not_count(plain):
    results = []
    for seeds in ((0, 1), (0, 7)):
        batch = plain.batch(seeds)
        scene = batch.scene._replace(mask=np.array([True, False]))
        results.append(plain.loss(plain.forward(batch), scene)[0])
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_loss_is_that_of_the_oracle(network):
    """Turned boxes, one of them inside another, and an object with fewer seeds than are asked for."""
    batch, config = network.batch(), network.config
    output, scene = network.forward(batch), batch.scene
    raw, boxes, rng = output.raw, scene.boxes, np.random.default_rng(3)
    turned = boxes.mask & (config.num_heading_bins > 1)
    boxes = boxes._replace(yaw=np.where(turned, rng.uniform(-3, 3, boxes.yaw.shape), 0).astype(np.float32))
    seeds = output.taps["seeds"]
    first = scene.point_instance[..., :1]
    second = np.where((first == 0) & (rng.random(first.shape) < 0.5), 1, -1)
    instance = np.concatenate([first, second], -1).astype(np.int32)
    here = np.take_along_axis(instance, np.asarray(seeds.seed_index)[..., None], 1)
    lonely = np.flatnonzero((here[0] == 2).any(-1))
    instance[0, np.asarray(seeds.seed_index)[0, lonely[1:]]] = -1  # one seed of box 2 is left
    here = np.take_along_axis(instance, np.asarray(seeds.seed_index)[..., None], 1)
    scene = scene._replace(boxes=boxes, point_instance=instance)
    total, terms = network.loss(output, scene)
    of_scene = [
        [
            (boxes.center[b, g], boxes.size[b, g], float(boxes.yaw[b, g]), int(boxes.label[b, g]))
            for g in range(3)
        ]
        for b in range(2)
    ]
    held = [[sorted({int(g) for g in slots if g >= 0}) for slots in rows] for rows in here]
    sizes = np.asarray(config.mean_sizes) if config.size_by_class else None
    means = [
        loss_oracle(
            jax.tree.map(lambda x, n=n: np.asarray(x[n], np.float64), raw.head),
            np.asarray(raw.seed_logit, np.float64), np.asarray(seeds.xyz), held, np.asarray(raw.query_index),
            of_scene, sizes, config,
        )
        for n in range(3)
    ]  # fmt: skip
    expected = {name: np.mean([mean[name] for mean in means]) for name in means[0]}
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    weighted = sum(config.loss_weight[name] * value for name, value in expected.items())
    np.testing.assert_allclose(total, 10 * weighted, rtol=2e-4)


def test_seeds_that_are_to_become_queries():
    """Box 0 holds seeds 0-5 of which four are wanted; box 1 has two only; seed 8 lies on nothing."""
    x = np.array([0.5, 0.1, 0.2, 0.3, 0.4, 0.0, 5.0, 5.5, 9.0], np.float32)
    seeds = PointSet(np.stack([x, 0 * x, 0 * x], -1)[None], np.zeros((1, 9, 1)), np.ones((1, 9), bool), None)
    row, on_object = np.array([[0] * 6 + [1] * 2 + [0]]), np.array([[True] * 8 + [False]])
    boxes = Boxes(
        np.array([[[0.0, 0, 0], [5, 0, 0], [0, 0, 0]]]), np.ones((1, 3, 3)), np.zeros((1, 3)), np.zeros((1, 3), int),
        np.array([[True, True, False]]), None,
    )  # fmt: skip
    config = tiny_groupfree3d_config().detector

    def picked():
        chosen = groupfree3d.pick_central_seeds(seeds, row, on_object, boxes, boxes.size, config)
        return np.flatnonzero(chosen[0]).tolist()

    assert picked() == [1, 2, 3, 5, 6, 7]
    config.query_positives = 1
    assert picked() == [5, 6]
    config.query_positives, config.reference_query_positives = 4, True
    assert picked() == [1, 2, 3, 5, 6, 7]  # the two that are missing are taken from the first: 1 and 3
    row[0, :2], on_object[0, :2] = 2, False
    assert picked() == [2, 3, 4, 5, 6, 7]


def test_reference_sizes_are_those_of_the_aligned_box():
    network = build_network(True)
    batch = network.batch()
    boxes, output = batch.scene.boxes, network.forward(batch)
    turned = boxes._replace(yaw=np.full_like(boxes.yaw, np.pi / 2))
    swapped = boxes._replace(size=boxes.size[..., [1, 0, 2]])
    config = tiny_groupfree3d_config(True, **{"detector.reference_sizes": True}).detector
    found = groupfree3d.loss(output, batch.scene._replace(boxes=turned), config)[1]
    np.testing.assert_allclose(
        found["size"], network.loss(output, batch.scene._replace(boxes=swapped))[1]["size"], rtol=1e-5
    )
    assert abs(found["size"] - network.loss(output, batch.scene)[1]["size"]) > 1e-4


def test_two_devices_have_the_loss_of_one(plain):
    """Per-device results, averaged, are those of the whole batch, whatever number of boxes each has."""
    one, three = plain.batch((0,), num_boxes=1), plain.batch((1,), num_boxes=3)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, three)
    whole = jax.tree.map(lambda x: x[:, 0], both)
    outputs = jax.tree.map(lambda a, b: jnp.stack([a, b]), plain.forward(one), plain.forward(three))
    per_device = jit(
        jax.vmap(
            lambda output, scene: groupfree3d.loss(output, scene, plain.config, "devices")[0],
            axis_name="devices",
        )
    )(outputs, both.scene)
    expected, _ = plain.loss(plain.forward(whole), whole.scene)
    np.testing.assert_allclose(jnp.mean(per_device), expected, rtol=1e-5)


def perfect_heads(boxes, sizes_by_class=True):
    """Two heads: query n < 3 says what box n is, the others that they are nothing."""
    row = np.minimum(np.arange(12), 2)
    label = np.maximum(boxes.label[:, row], 0)
    mean = np.asarray(SIZES, np.float32)[label]
    logit = np.broadcast_to(np.where(np.arange(12) < 3, 9.0, -9.0), (2, 12))
    residual = np.zeros((2, 12, 4, 3), np.float32)
    np.put_along_axis(residual, label[..., None, None], (boxes.size[:, row] / mean - 1)[:, :, None], axis=2)
    head = HeadOutput(
        logit, boxes.center[:, row], np.zeros((2, 12, 1)), np.zeros((2, 12, 1)), 9.0 * np.eye(4)[label], residual,
        boxes.size[:, row], 30.0 * np.eye(4)[label],
    )  # fmt: skip
    return jax.tree.map(lambda x: jnp.asarray(np.stack([x, x, x]), jnp.float32), head)


def test_perfect_heads_decode_to_the_boxes_however_many_are_joined(plain):
    batch = plain.batch()
    boxes, output = batch.scene.boxes, plain.forward(batch)
    output = output._replace(raw=output.raw._replace(head=perfect_heads(boxes)))
    expected = np.concatenate([boxes.center, boxes.size], -1)[0, :3]
    for which in ("proposal", "last", "last_three", "all"):
        config = tiny_groupfree3d_config(**{"detector.merged_heads": which}).detector
        found = groupfree3d.decode(output, batch.scene.points, config, PREDICT)
        assert int(found.mask[0].sum()) == 3, which
        order = np.argsort(found.boxes[0, :3, 0])
        np.testing.assert_allclose(np.asarray(found.boxes[0, :3])[order, :6], expected, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(found.label[0, :3])[order], [0, 1, 2])


def test_evaluation_takes_boxes_of_every_score(plain):
    batch = plain.batch()
    output = plain.forward(batch)
    low = output.raw.head._replace(objectness_logit=jnp.full((3, 2, 12), -6.0))
    output = output._replace(raw=output.raw._replace(head=low))
    every = groupfree3d.decode(output, batch.scene.points, plain.config)
    assert every.mask.any()
    sure = groupfree3d.decode(output, batch.scene.points, plain.config, DecodeConfig())
    assert not sure.mask.any()


def test_joined_heads_keep_their_own_numbers(network):
    output = network.forward(network.batch())
    head, mask = output.raw.head, output.raw.queries.mask
    joined = merge_heads(head, mask, "all")
    assert joined.center.shape == (2, 36, 3)
    for n in range(3):  # the last head comes first
        part = slice(12 * (2 - n), 12 * (3 - n))
        np.testing.assert_array_equal(joined.center[:, part], head.center[n])
        np.testing.assert_array_equal(joined.class_logits[:, part], head.class_logits[n])
    last = merge_heads(head, mask, "last")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), last, output.predictions)
    np.testing.assert_array_equal(merge_heads(head, mask, "proposal").size, head.size[0])
    with pytest.raises(ValueError, match="merged_heads must be one of proposal, last, last_three, all"):
        merge_heads(head, mask, "first")


def test_heading_is_the_negative_of_yaw():
    zeros = jnp.zeros((1, 1, 12))
    head = HeadOutput(
        zeros[..., 0], zeros[..., :3], zeros.at[..., 2].set(9.0), zeros, None, None, zeros[..., :3], zeros
    )
    yaw = groupfree3d.predictions_from_head(head, jnp.ones((1, 1), bool)).yaw
    np.testing.assert_allclose(yaw, [[-np.pi / 3]], rtol=1e-5)  # 60 degrees from +x towards -y


def test_dropout_acts_in_training_only(plain):
    config = tiny_groupfree3d_config(**{"detector.dropout": 0.5}).detector
    model, batch = groupfree3d.build(config), plain.batch()

    @jit
    def train(variables, key):
        return model.apply(
            variables, *batch_input(batch), train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )[0].predictions.center

    one, other = (train(plain.variables, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-3
    evaluated = jit(lambda v, batch: model.apply(v, *batch_input(batch), train=False))(plain.variables, batch)
    np.testing.assert_allclose(
        evaluated.predictions.center, plain.forward(batch).predictions.center, atol=1e-4
    )


def test_configs_that_cannot_be_are_refused():
    batch = make_batch(tiny_groupfree3d_config())
    for changes, message in (
        ({"detector.sampling": "random"}, "sampling must be kps or fps, got 'random'"),
        ({"detector.decoder_layers": 0}, "decoder_layers=0 must be at least 1"),
        ({"detector.tap_layer": 3}, "tap_layer=3"),
        ({"detector.num_proposals": 33}, "33 proposals cannot be sampled from 32 seeds"),
    ):
        model = groupfree3d.build(tiny_groupfree3d_config(**changes).detector)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda m=model: m.init(jax.random.key(0), *batch_input(batch), train=False))


def test_no_labels_is_a_clear_error(plain):
    batch = plain.batch()
    with pytest.raises(ValueError, match="this scene has no labels"):
        groupfree3d.loss(plain.forward(batch), batch.scene._replace(boxes=None), plain.config)
