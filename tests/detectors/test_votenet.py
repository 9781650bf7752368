import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import make_batch, tiny_config

from vrdistill_jax.detectors import find_detector, votenet
from vrdistill_jax.training.state import count_parameters

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def model():
    return votenet.build(CONFIG.detector)


@pytest.fixture(scope="module")
def variables(model):
    batch = make_batch(CONFIG)
    variables = model.init(jax.random.key(0), batch.scene.points, batch.pyramid, train=False)
    # One training pass sets the running statistics, so that evaluation gives varied boxes.
    _, updates = model.apply(
        variables, batch.scene.points, batch.pyramid, train=True, mutable=["batch_stats"]
    )
    return {"params": variables["params"], "batch_stats": updates["batch_stats"]}


@pytest.fixture(scope="module")
def forward(model):
    return jax.jit(lambda v, batch: model.apply(v, batch.scene.points, batch.pyramid, train=False))


@pytest.fixture(scope="module")
def value_and_grad(model):
    def objective(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        output, _ = model.apply(
            variables, batch.scene.points, batch.pyramid, train=True, mutable=["batch_stats"]
        )
        return votenet.loss(output, batch.scene, CONFIG.detector)

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


@pytest.mark.parametrize(
    ("width", "heads", "expected"),
    [
        (1.0, (18, 1, 18), 953_828),
        (0.5, (18, 1, 18), 244_516),
        (0.25, (18, 1, 18), 64_196),
        (1.0, (10, 12, 10), 951_506),
    ],
)
def test_parameter_counts(width, heads, expected):
    classes, bins, sizes = heads
    config = tiny_config(**{"detector.width": width, "detector.num_heading_bins": bins}).detector
    config.class_names = tuple(map(str, range(classes)))
    config.mean_sizes = ((1.0, 1.0, 1.0),) * sizes
    batch = make_batch(CONFIG)
    shapes = jax.eval_shape(
        lambda: votenet.build(config).init(jax.random.key(0), batch.scene.points, batch.pyramid, train=False)
    )
    assert count_parameters(shapes["params"]) == expected


def test_rows_do_not_influence_each_other(variables, forward):
    both = forward(variables, make_batch(CONFIG, (0, 1))).predictions
    other = forward(variables, make_batch(CONFIG, (0, 5))).predictions
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), both, other)


def test_more_padding_changes_nothing(variables, forward):
    small = make_batch(tiny_config(**{"dataset.num_points": 700}))
    large = make_batch(tiny_config(**{"dataset.num_points": 900}))
    assert not large.scene.points.mask.all()
    a, b = forward(variables, small), forward(variables, large)
    np.testing.assert_array_equal(a.raw.votes.seed_index, b.raw.votes.seed_index)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.predictions, b.predictions)
    loss_a = votenet.loss(a, small.scene, CONFIG.detector)[0]
    loss_b = votenet.loss(b, large.scene, CONFIG.detector)[0]
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-5)


def test_garbage_in_pads_changes_nothing(variables, forward, value_and_grad):
    config = tiny_config(**{"dataset.num_points": 700})
    batch = make_batch(config)
    scene = batch.scene
    pads = ~scene.boxes.mask
    boxes = scene.boxes._replace(
        center=np.where(pads[..., None], 0.37, scene.boxes.center),
        size=np.where(pads[..., None], 7.0, scene.boxes.size),
        yaw=np.where(pads, 1.0, scene.boxes.yaw),
        label=np.where(pads, 3, scene.boxes.label),
        vote_center=np.where(pads[..., None], -9.0, scene.boxes.vote_center),
    )
    empty = ~scene.points.mask[..., None]
    points = scene.points._replace(
        xyz=np.where(empty, 0.1, scene.points.xyz), features=np.where(empty, 5.0, scene.points.features)
    )
    dirty = batch._replace(scene=scene._replace(boxes=boxes, points=points))
    (clean_loss, _), clean_gradient = value_and_grad(variables["params"], variables["batch_stats"], batch)
    (dirty_loss, _), dirty_gradient = value_and_grad(variables["params"], variables["batch_stats"], dirty)
    assert clean_loss == dirty_loss
    jax.tree.map(np.testing.assert_array_equal, clean_gradient, dirty_gradient)


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_loss_and_gradients_are_finite_and_used(variables, value_and_grad, num_boxes):
    batch = make_batch(CONFIG, num_boxes=num_boxes)
    (total, terms), gradient = value_and_grad(variables["params"], variables["batch_stats"], batch)
    assert np.isfinite(total)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((terms, gradient)))
    if num_boxes == 0:
        assert terms["vote"] == 0.0
        assert terms["positive_share"] == 0.0
    else:
        assert terms["vote"] > 0.0


def test_padding_scenes_of_a_batch_do_not_count(variables, forward):
    batch = make_batch(CONFIG, (0, 1))
    masked = batch.scene._replace(mask=np.array([True, False]))
    other = make_batch(CONFIG, (0, 7)).scene._replace(mask=np.array([True, False]))
    output = forward(variables, batch)
    changed = forward(variables, make_batch(CONFIG, (0, 7)))
    np.testing.assert_allclose(
        votenet.loss(output, masked, CONFIG.detector)[0],
        votenet.loss(changed, other, CONFIG.detector)[0],
        rtol=1e-6,
    )


def test_padded_boxes_attract_proposals_only_with_reference_padding(variables, forward):
    config = tiny_config()
    batch = make_batch(config, num_boxes=0)
    output = forward(variables, batch)
    near_origin = output.raw.clusters._replace(xyz=jnp.zeros_like(output.raw.clusters.xyz))
    output = output._replace(raw=output.raw._replace(clusters=near_origin))
    assert votenet.loss(output, batch.scene, config.detector)[1]["positive_share"] == 0
    config.detector.reference_padding = True
    assert votenet.loss(output, batch.scene, config.detector)[1]["positive_share"] == 1


def test_perfect_proposals_have_no_box_loss(variables, forward):
    batch = make_batch(CONFIG)
    output, boxes = forward(variables, batch), batch.scene.boxes
    row = np.arange(16) % 3  # each proposal sits on one of the three boxes
    label = boxes.label[:, row]
    mean_size = np.asarray(CONFIG.detector.mean_sizes, np.float32)[label]
    confident = 50.0 * jax.nn.one_hot(label, 4)
    head = output.raw.head._replace(
        objectness_logits=jnp.broadcast_to(jnp.asarray([-50.0, 50.0]), (2, 16, 2)),
        center=boxes.center[:, row],
        heading_residual=jnp.zeros((2, 16, 1)),
        size_logits=confident,
        class_logits=confident,
        size_residual=jnp.broadcast_to((boxes.size[:, row] / mean_size - 1)[:, :, None], (2, 16, 4, 3)),
    )
    clusters = output.raw.clusters._replace(xyz=boxes.center[:, row])
    votes = output.raw.votes
    slot = np.take_along_axis(batch.scene.point_instance[..., 0], np.asarray(votes.seed_index), 1)
    target = np.take_along_axis(boxes.vote_center, np.maximum(slot, 0)[..., None], 1)
    raw = output.raw._replace(head=head, clusters=clusters, votes=votes._replace(xyz=target))
    total, terms = votenet.loss(output._replace(raw=raw), batch.scene, CONFIG.detector)
    assert total < 1e-4, terms
    predictions = votenet.predictions_from_head(head, clusters.mask, CONFIG.detector.mean_sizes)
    detections = votenet.decode(output._replace(predictions=predictions), batch.scene.points, CONFIG.detector)
    best = np.asarray(detections.boxes[0, :3])
    order = np.argsort(best[:, 0])
    np.testing.assert_allclose(
        best[order, :6], np.concatenate([boxes.center, boxes.size], -1)[0, :3], atol=1e-4
    )
    np.testing.assert_array_equal(np.asarray(detections.label[0, :3])[order], [0, 1, 2])


def test_heading_is_the_negative_of_yaw():
    logits = jnp.zeros((1, 1, 12)).at[0, 0, 2].set(9.0)  # bin 2 = 60 degrees from +x towards -y
    head = votenet.HeadOutput(
        jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 3)), logits, jnp.zeros((1, 1, 12)), jnp.zeros((1, 1, 1)),
        jnp.zeros((1, 1, 1, 3)), jnp.zeros((1, 1, 2)),
    )  # fmt: skip
    predictions = votenet.predictions_from_head(head, jnp.ones((1, 1), bool), ((1.0, 2.0, 3.0),))
    np.testing.assert_allclose(predictions.yaw, [[-np.pi / 3]], rtol=1e-5)
    np.testing.assert_allclose(predictions.size, [[[1.0, 2.0, 3.0]]])


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown detector 'votnet'; known: .*votenet"):
        find_detector("votnet")
    config = tiny_config(**{"detector.cluster_sampling_eval": "random"})
    batch = make_batch(CONFIG)
    with pytest.raises(ValueError, match="vote_fps or seed_fps, got 'random'"):
        votenet.build(config.detector).init(jax.random.key(0), batch.scene.points, batch.pyramid, train=False)


def test_no_labels_is_a_clear_error(variables, forward):
    batch = make_batch(CONFIG)
    with pytest.raises(ValueError, match="this scene has no labels"):
        votenet.loss(forward(variables, batch), batch.scene._replace(boxes=None), CONFIG.detector)
