from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import make_batch, tiny_three_detr_config

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.data.samples import scene_with_pyramid
from vrdistill_jax.detectors import three_detr
from vrdistill_jax.detectors.decoding import PREDICT, DecodeConfig
from vrdistill_jax.training.state import Batch, count_parameters

pytestmark = pytest.mark.slow  # compiling these networks takes minutes of processor time

# Each program runs a few times: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
CLASSES = ("a", "b", "c", "d")


CONFIG = tiny_three_detr_config()


class Network:
    """A small network with its variables and compiled passes."""

    def __init__(self, masked: bool):
        self.config = tiny_three_detr_config(masked).detector
        self.model = three_detr.build(self.config)
        batch = make_batch(tiny_three_detr_config(masked))

        def start(key, batch):
            variables = self.model.init(key, *batch_input(batch), train=False)
            # One training pass sets the running statistics, so that evaluation gives varied boxes.
            _, updates = self.model.apply(variables, *batch_input(batch), train=True, mutable=["batch_stats"])
            return {"params": variables["params"], "batch_stats": updates["batch_stats"]}

        def objective(params, stats, batch):
            variables = {"params": params, "batch_stats": stats}
            output, _ = self.model.apply(variables, *batch_input(batch), train=True, mutable=["batch_stats"])
            return three_detr.loss(output, batch.scene, self.config)

        self.variables = jit(start)(jax.random.key(0), batch)
        self.forward = jit(lambda batch: self.model.apply(self.variables, *batch_input(batch), train=False))
        self._gradient = jit(jax.value_and_grad(objective, has_aux=True))

    def value_and_grad(self, batch):
        return self._gradient(self.variables["params"], self.variables["batch_stats"], batch)


make_network = cache(Network)


def batch_input(batch):
    return batch.scene.points, batch.pyramid


@pytest.fixture(scope="module", params=[False, True], ids=["3detr", "3detr_m"])
def network(request):
    return make_network(request.param)


@pytest.fixture(scope="module")
def masked():
    """For what costs a gradient: 3DETR-m has every layer that 3DETR has."""
    return make_network(True)


def batch_of(network, *arguments, num_points: int = 700, **options):
    config = tiny_three_detr_config(network.config.name == "3detr_m", **{"dataset.num_points": num_points})
    return make_batch(config, *arguments, **options)


predict = jit(three_detr.predictions_from_head)
loss = jit(lambda output, scene: three_detr.loss(output, scene, CONFIG.detector))


@pytest.mark.parametrize(
    ("masked", "oriented", "width", "expected"),
    [
        (False, False, 1.0, 7_305_691),
        (False, True, 1.0, 7_309_289),
        (True, False, 1.0, 7_438_555),
        (True, True, 1.0, 7_442_153),
        (False, False, 0.5, 1_840_379),
        (True, False, 0.25, 475_723),
    ],
)
def test_parameter_counts(masked, oriented, width, expected):
    config = tiny_three_detr_config(masked)
    names = tuple(map(str, range(10 if oriented else 18)))
    detector = three_detr.default_config(names, (), oriented, masked)
    detector.width = width
    batch = make_batch(config)
    model = three_detr.build(detector)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *batch_input(batch), train=False))
    assert count_parameters(shapes["params"]) == expected


def test_published_recipes():
    scan = three_detr.default_config(CLASSES, (), oriented=False, masked=True)
    view = three_detr.default_config(CLASSES, (), oriented=True, masked=True)
    assert (scan.num_proposals, view.num_proposals) == (256, 128)
    assert (scan.encoder_dropout, view.encoder_dropout) == (0.3, 0.1)
    assert (scan.loss_weight["class"], view.loss_weight["class"]) == (1.0, 0.8)
    assert (scan.loss_weight.giou, view.loss_weight.giou) == (1.0, 0.0)
    assert (scan.match_cost.to_dict(), view.match_cost.to_dict()) == (
        {"class": 1.0, "objectness": 0.0, "center": 0.0, "giou": 2.0},
        {"class": 1.0, "objectness": 5.0, "center": 5.0, "giou": 3.0},
    )
    assert (scan.no_object_weight, view.no_object_weight) == (0.25, 0.1)
    assert [level.num_centers for level in three_detr.pyramid_config(scan).levels] == [2048, 1024, 256]


def test_taps(network):
    batch = batch_of(network)
    output = network.forward(batch)
    seeds, queries, clusters = (output.taps[name] for name in ("seeds", "queries", "clusters"))
    assert seeds.xyz.shape[1] == three_detr.pyramid_config(network.config).levels[-2].num_centers
    for points in (seeds, queries):  # each knows its row of the cloud
        rows = np.take_along_axis(batch.scene.points.xyz, np.asarray(points.seed_index)[..., None], 1)
        np.testing.assert_array_equal(rows, points.xyz)
    np.testing.assert_array_equal(clusters.xyz, output.predictions.center)
    np.testing.assert_array_equal(clusters.features, output.raw.decoder[-1])
    np.testing.assert_array_equal(output.taps["proposals"].features, clusters.features)
    sizes = {name: values.shape[-1] for name, values in output.head.items()}
    assert sizes == {"center": 3, "heading": 2, "size": 3, "class": 5}
    np.testing.assert_allclose(output.head["center"] + queries.xyz, clusters.xyz, atol=1e-6)
    offset = np.abs(clusters.xyz - queries.xyz)
    assert 0 < offset.max() <= 0.5


def test_rows_do_not_influence_each_other(network):
    both = network.forward(batch_of(network, (0, 1))).predictions
    other = network.forward(batch_of(network, (0, 5))).predictions
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), both, other)


def test_more_padding_changes_nothing(network):
    small, large = (batch_of(network, num_points=count) for count in (700, 900))
    assert not large.scene.points.mask.all()
    a, b = network.forward(small), network.forward(large)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.predictions, b.predictions)
    np.testing.assert_allclose(loss(a, small.scene)[0], loss(b, large.scene)[0], rtol=1e-5)


def test_garbage_in_pads_changes_nothing(masked):
    batch = batch_of(masked)
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
    (clean_loss, _), clean_gradient = masked.value_and_grad(batch)
    (dirty_loss, _), dirty_gradient = masked.value_and_grad(dirty)
    assert clean_loss == dirty_loss
    jax.tree.map(np.testing.assert_array_equal, clean_gradient, dirty_gradient)


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_loss_and_gradients_are_finite_and_used(masked, num_boxes):
    (total, terms), gradient = masked.value_and_grad(batch_of(masked, num_boxes=num_boxes))
    assert np.isfinite(total)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((terms, gradient)))
    assert set(terms) == {*masked.config.loss_weight, "cardinality_error"}
    if num_boxes == 0:
        assert all(terms[name] == 0 for name in ("center", "size", "giou"))
        assert terms["class"] > 0
    else:
        assert all(terms[name] > 0 for name in ("class", "center", "size", "giou"))
        idle = [p for p, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(g)]
        # The first decoder layer's content is 0: its keys and what it normalises have nothing to say.
        names = {jax.tree_util.keystr(path) for path in idle}
        assert all("heading" in name or "decoder_0" in name or "residual" in name for name in names), names


def test_an_empty_cloud_is_finite_and_finds_nothing(masked):
    batch = batch_of(masked, (0, 1))
    empty = np.zeros_like(batch.scene.points.mask[0])
    mask = np.stack([batch.scene.points.mask[0], empty])
    config = three_detr.pyramid_config(masked.config)
    scenes = [jax.tree.map(lambda x, b=b: x[b], batch.scene) for b in range(2)]
    scenes = [s._replace(points=s.points._replace(mask=m)) for s, m in zip(scenes, mask, strict=True)]
    batch = Batch(*stack_trees([scene_with_pyramid(s, config) for s in scenes]))
    output = masked.forward(batch)
    assert not output.predictions.mask[1].any()
    (total, _), gradient = masked.value_and_grad(batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((output, total, gradient)))


def test_padding_scenes_of_a_batch_do_not_count(network):
    results = []
    for seeds in ((0, 1), (0, 7)):
        batch = batch_of(network, seeds)
        results.append(loss(network.forward(batch), batch.scene._replace(mask=np.array([True, False])))[0])
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.fixture(scope="module")
def plain():
    return make_network(False)


def perfect_output(network, batch):
    """Both layers: query n < 3 says what box n is, the others that they are no object."""
    output, boxes = network.forward(batch), batch.scene.boxes
    raw, row = output.raw, np.minimum(np.arange(12), 2)
    label = np.where(np.arange(12) < 3, boxes.label[:, row], 4)
    extent = (raw.high - raw.low)[:, None]
    head = three_detr.HeadOutput(
        class_logits=50.0 * jax.nn.one_hot(label, 5)[None].repeat(2, 0),
        center=jnp.broadcast_to(boxes.center[:, row], (2, 2, 12, 3)),
        size=jnp.broadcast_to(boxes.size[:, row] / extent, (2, 2, 12, 3)),
        heading_logits=jnp.zeros((2, 2, 12, 1)),
        heading_residual=jnp.zeros((2, 2, 12, 1)),
    )
    predictions = predict(head, output.predictions.mask, raw.low, raw.high)
    return output._replace(raw=raw._replace(head=head), predictions=predictions)


def test_perfect_queries_have_no_loss_and_decode_to_the_boxes(plain):
    batch = batch_of(plain)
    output, boxes = perfect_output(plain, batch), batch.scene.boxes
    total, terms = loss(output, batch.scene)
    assert total < 1e-4, terms
    assert terms["cardinality_error"] < 1e-5
    assign = jit(lambda raw, mask: three_detr.assign_boxes(raw, boxes, mask, plain.config))
    assigned = assign(output.raw, output.predictions.mask)
    np.testing.assert_array_equal(assigned, np.broadcast_to([0, 1, 2] + 9 * [-1], (2, 2, 12)))
    detections = three_detr.decode(output, batch.scene.points, plain.config, DecodeConfig())
    best = np.asarray(detections.boxes[0, :3])
    order = np.argsort(best[:, 0])
    expected = np.concatenate([boxes.center, boxes.size], -1)[0, :3]
    np.testing.assert_allclose(best[order, :6], expected, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(detections.label[0, :3])[order], [0, 1, 2])


def test_terms_by_hand(plain):
    """One box is off by (0.3, 0, 0) m and its query hesitates between its class and no object."""
    batch = batch_of(plain)
    output = perfect_output(plain, batch)
    head, extent = output.raw.head, np.asarray(output.raw.high - output.raw.low)
    head = head._replace(
        center=head.center.at[0, 0, 0, 0].add(0.3),
        class_logits=head.class_logits.at[0, 0, 0].set(jnp.array([2.0, -50.0, -50.0, -50.0, 1.0])),
    )
    output = output._replace(raw=output.raw._replace(head=head))
    terms = jit(lambda *x: three_detr.losses_by_layer(*x, plain.config))(output, batch.scene)
    np.testing.assert_allclose(
        terms["center"], [5 * 0.3 / extent[0, 0] / 6, 0], rtol=1e-4
    )  # six boxes in the batch
    weight = 6 + 0.25 * 18  # of all queries of both scenes
    np.testing.assert_allclose(terms["class"][0], -np.log(np.e / (1 + np.e)) / weight, rtol=1e-3)
    length = float(batch.scene.boxes.size[0, 0, 0])
    shared = (length - 0.3) / (length + 0.3)
    np.testing.assert_allclose(terms["giou"], [(1 - shared) / 6, 0], atol=1e-5)
    assert loss(output, batch.scene)[0] == pytest.approx(
        sum(float(jnp.sum(terms[name])) for name in plain.config.loss_weight), rel=1e-6
    )


def test_two_devices_have_the_loss_of_one(plain):
    """Per-device results, averaged, are those of the whole batch, whatever number of boxes each has."""
    one, three = batch_of(plain, (0,), num_boxes=1), batch_of(plain, (1,), num_boxes=3)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, three)
    whole = jax.tree.map(lambda x: x[:, 0], both)
    outputs = jax.tree.map(lambda a, b: jnp.stack([a, b]), *map(plain.forward, (one, three)))
    per_device = jit(
        jax.vmap(
            lambda output, scene: three_detr.loss(output, scene, plain.config, "devices")[0],
            axis_name="devices",
        )
    )(outputs, both.scene)
    expected, _ = loss(plain.forward(whole), whole.scene)
    np.testing.assert_allclose(jnp.mean(per_device), expected, rtol=1e-5)


def test_scores_are_those_of_the_reference(plain):
    """p_class (1 - p_none), with p over all classes and "no object"; and the threshold is on 1 - p_none."""
    batch = batch_of(plain)
    output = perfect_output(plain, batch)
    logits = output.raw.head.class_logits.at[-1, 0, 0].set(jnp.array([1.0, 0.5, 0.0, -1.0, 2.0]))
    head = output.raw.head._replace(class_logits=logits)
    predictions = three_detr.predictions_from_head(
        head, output.predictions.mask, output.raw.low, output.raw.high
    )
    output = output._replace(predictions=predictions)
    probability = np.asarray(jax.nn.softmax(logits[-1, 0, 0]))
    objectness = 1 - probability[-1]

    def scores(**options):
        found = three_detr.decode(
            output, batch.scene.points, plain.config, DecodeConfig(min_points=0, **options)
        )
        mine = np.linalg.norm(found.boxes[0, :, :3] - batch.scene.boxes.center[0, 0], axis=-1) < 1e-3
        return np.asarray(found.score[0])[mine & np.asarray(found.mask[0])]

    np.testing.assert_allclose(scores(), np.sort(probability[:-1] * objectness)[::-1], rtol=1e-4)
    assert len(scores(score_threshold=float(objectness) - 0.01)) == 4
    assert len(scores(score_threshold=float(objectness) + 0.01)) == 0
    found = three_detr.decode(output, batch.scene.points, plain.config, PREDICT._replace(score_threshold=0.0))
    np.testing.assert_allclose(np.sort(found.score[0])[-3:], [objectness, 1, 1], rtol=1e-4)


def test_heading_is_the_negative_of_yaw():
    head = three_detr.HeadOutput(
        jnp.zeros((1, 1, 1, 5)), jnp.zeros((1, 1, 1, 3)), jnp.full((1, 1, 1, 3), 0.5),
        jnp.zeros((1, 1, 1, 12)).at[..., 2].set(9.0), jnp.zeros((1, 1, 1, 12)),
    )  # fmt: skip
    low, high = jnp.zeros((1, 3)), jnp.array([[2.0, 4.0, 6.0]])
    predictions = three_detr.predictions_from_head(head, jnp.ones((1, 1), bool), low, high)
    np.testing.assert_allclose(predictions.yaw, [[-np.pi / 3]], rtol=1e-5)  # 60 degrees from +x towards -y
    np.testing.assert_allclose(predictions.size, [[[1.0, 2.0, 3.0]]])


def test_dropout_acts_in_training_only(plain):
    config = tiny_three_detr_config(
        **{"detector.head_dropout": 0.5, "detector.encoder_dropout": 0.5}
    ).detector
    model, batch = three_detr.build(config), batch_of(plain)

    @jit
    def train(key):
        return model.apply(
            plain.variables, *batch_input(batch), train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )[0].predictions.center

    assert np.abs(train(jax.random.key(0)) - train(jax.random.key(1))).max() > 1e-3
    evaluated = jit(lambda: model.apply(plain.variables, *batch_input(batch), train=False))()
    np.testing.assert_allclose(
        evaluated.predictions.center, plain.forward(batch).predictions.center, atol=1e-4
    )


def test_configs_that_cannot_be_are_refused():
    batch = make_batch(CONFIG)
    for changes, message in (
        ({"detector.masking_radii": (1.0,)}, "must name one radius for each of 2 encoder layers"),
        ({"detector.levels": ((64, 0.5, 8),) * 3}, "the config has 3 levels"),
    ):
        config = tiny_three_detr_config()
        config.update_from_flattened_dict(changes)
        with pytest.raises(ValueError, match=message):
            three_detr.build(config.detector).init(jax.random.key(0), *batch_input(batch), train=False)


def test_no_labels_is_a_clear_error(plain):
    batch = batch_of(plain)
    with pytest.raises(ValueError, match="this scene has no labels"):
        three_detr.loss(plain.forward(batch), batch.scene._replace(boxes=None), plain.config)
