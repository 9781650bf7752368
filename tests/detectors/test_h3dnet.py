import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h3dnet_scenes import jit, random_variables, small_config
from scenes import make_batch

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.data.samples import scene_with_pyramid
from vrdistill_jax.detectors import h3dnet
from vrdistill_jax.detectors.decoding import DecodeConfig
from vrdistill_jax.interop.torch_h3dnet import h3dnet_config
from vrdistill_jax.structs import HEAD_GROUPS
from vrdistill_jax.training.state import count_parameters

pytestmark = pytest.mark.slow  # compiling these networks takes minutes of processor time

CONFIG = small_config(**{"dataset.num_points": 700})  # the scenes have 600: the rest is padding


@pytest.fixture(scope="module")
def batch():
    return make_batch(CONFIG)


@pytest.fixture(scope="module")
def model():
    return h3dnet.build(CONFIG.detector)


@pytest.fixture(scope="module")
def forward(model):
    return jit(lambda v, batch: model.apply(v, batch.scene.points, batch.pyramid, train=False))


@pytest.fixture(scope="module")
def value_and_grad(model):
    def objective(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        output, updates = model.apply(
            variables, batch.scene.points, batch.pyramid, train=True, mutable=["batch_stats"]
        )
        total, terms = h3dnet.loss(output, batch.scene, CONFIG.detector)
        return total, terms

    return jit(jax.value_and_grad(objective, has_aux=True))


@jit
def loss(output, scene):
    return h3dnet.loss(output, scene, CONFIG.detector)[0]


@pytest.fixture(scope="module")
def variables(model, batch):
    return random_variables(model, batch)


@pytest.fixture(scope="module")
def like(model):
    return jit(lambda v, a, b: model.apply(v, a, b, train=False, method="propose_like"))


@pytest.mark.parametrize(
    ("dataset", "width", "expected"),
    [
        ("scannet", 1.0, 4_740_278),
        ("scannet", 0.5, 1_210_646),
        ("scannet", 0.25, 315_590),
        ("sunrgbd", 1.0, 4_720_670),
        ("sunrgbd", 0.5, 1_200_766),
        ("sunrgbd", 0.25, 310_574),
    ],
)
def test_parameter_counts(batch, dataset, width, expected):
    config = h3dnet_config(dataset).detector
    config.width, config.num_proposals = width, 16
    model = h3dnet.build(config)
    scene, pyramid, _ = batch
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), scene.points, pyramid, train=False))
    assert count_parameters(shapes["params"]) == expected


def test_rows_do_not_influence_each_other(variables, forward, batch):
    both = forward(variables, batch).predictions
    other = forward(variables, make_batch(CONFIG, (0, 5))).predictions
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), both, other)


@pytest.mark.slow
def test_more_padding_changes_nothing(variables, forward):
    small = make_batch(CONFIG)
    large = make_batch(small_config(**{"dataset.num_points": 900}))
    assert not large.scene.points.mask.all()
    a, b = forward(variables, small), forward(variables, large)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a.predictions, b.predictions)
    losses = [loss(out, s.scene) for out, s in ((a, small), (b, large))]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_loss_and_gradients_are_finite_and_reach_everything(variables, value_and_grad, num_boxes):
    batch = make_batch(CONFIG, num_boxes=num_boxes)
    (total, terms), gradient = value_and_grad(variables["params"], variables["batch_stats"], batch)
    assert np.isfinite(total)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((terms, gradient)))
    if not num_boxes:
        assert terms["z_vote"] == terms["match"] * 0
        return
    for kind in ("z", "xy", "line"):
        assert terms[f"{kind}_vote"] > 0
    unused = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if path[-1].key == "kernel" and not np.abs(leaf).max() > 0
    ]
    assert not unused


def test_garbage_in_pads_changes_nothing(variables, value_and_grad, batch):
    scene, pads = batch.scene, ~batch.scene.boxes.mask
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
    clean = value_and_grad(variables["params"], variables["batch_stats"], batch)
    changed = value_and_grad(variables["params"], variables["batch_stats"], dirty)
    jax.tree.map(np.testing.assert_array_equal, clean, changed)


def test_padding_scenes_of_a_batch_do_not_count(variables, forward, batch):
    only_first = np.array([True, False])
    losses = []
    for seeds in ((0, 1), (0, 7)):
        other = make_batch(CONFIG, seeds)
        scene = other.scene._replace(mask=only_first)
        losses.append(loss(forward(variables, other), scene))
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_clouds_with_fewer_points_than_seeds_ignore_the_padded_ones(variables, forward, batch):
    mask = batch.scene.points.mask & (np.arange(700) < 20)
    pyramid = h3dnet.pyramid_config(CONFIG.detector)
    outputs = []
    for garbage in (0.0, 0.4):
        points = batch.scene.points._replace(
            mask=mask,
            xyz=np.where(mask[..., None], batch.scene.points.xyz, garbage).astype(np.float32),
            features=np.where(mask[..., None], batch.scene.points.features, garbage).astype(np.float32),
        )
        scene = batch.scene._replace(points=points)
        rows = [jax.tree.map(lambda x, b=b: x[b], scene) for b in range(2)]
        few = batch._replace(
            scene=scene, pyramid=stack_trees([scene_with_pyramid(r, pyramid)[1] for r in rows])
        )
        output = forward(variables, few)
        assert len(np.unique(output.raw.seeds.seed_index[0])) <= 20
        outputs.append(output.predictions)
    jax.tree.map(np.testing.assert_array_equal, *outputs)


def test_flags_decide_which_primitives_count(variables, forward, batch, like):
    output = forward(variables, batch)

    def with_flags(logit):
        kinds = {
            kind: p._replace(flag_logits=jnp.broadcast_to(jnp.array([0.0, logit]), p.flag_logits.shape))
            for kind, p in output.raw.primitives.items()
        }
        raw = output.raw._replace(primitives=kinds)
        return like(variables, output._replace(raw=raw), output)

    present, absent = with_flags(3.0), with_flags(-3.0)
    assert np.abs(present.predictions.center - absent.predictions.center).max() > 1e-3
    same = with_flags(4.0)
    np.testing.assert_array_equal(present.predictions.center, same.predictions.center)
    # The initial proposals do not depend on primitives.
    np.testing.assert_array_equal(present.raw.head_channels, absent.raw.head_channels)


def test_propose_like_clusters_where_the_other_network_did(variables, forward, batch, like):
    output = forward(variables, batch)
    same = like(variables, output, output)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), same.predictions, output.predictions
    )
    index = jnp.flip(output.raw.cluster_index, 1)
    moved = like(variables, output, output._replace(raw=output.raw._replace(cluster_index=index)))
    np.testing.assert_allclose(moved.predictions.center, np.flip(output.predictions.center, 1), atol=2e-4)


def test_taps_and_head_keep_the_contract(variables, forward, batch):
    output = forward(variables, batch)
    seeds, votes, clusters, proposals = (
        output.taps[name] for name in ("seeds", "votes", "clusters", "proposals")
    )
    assert seeds.features.shape == votes.features.shape == (2, 32, 32)
    assert clusters.features.shape == proposals.features.shape == (2, 16, 16)
    np.testing.assert_array_equal(clusters.xyz, proposals.xyz)
    np.testing.assert_allclose(np.linalg.norm(votes.features, axis=-1), 1, rtol=1e-5)
    assert set(output.head) == set(HEAD_GROUPS)
    raw, head = output.raw, output.head
    assert head["heading"].shape[-1] == 48
    np.testing.assert_allclose(head["center"] + clusters.xyz, output.predictions.center, atol=1e-6)
    np.testing.assert_array_equal(head["class"], raw.head.class_logits)
    np.testing.assert_array_equal(head["size"][..., :4], raw.head.size_logits)
    residual = np.asarray(raw.refined_head.size_residual).reshape(2, 16, -1)
    np.testing.assert_array_equal(head["size"][..., 4:], residual)
    np.testing.assert_array_equal(head["objectness"], raw.refined_head.objectness_logits)
    # The last layer reads the proposals' features.
    out = variables["params"]["matching"]["out"]
    np.testing.assert_allclose(
        proposals.features @ out["kernel"] + out["bias"], raw.refinement.channels, atol=1e-4
    )


@pytest.mark.slow
def test_axis_aligned_boxes_do_not_turn_and_turned_ones_do(variables, forward, batch):
    assert not np.asarray(forward(variables, batch).predictions.yaw).any()
    config = small_config(oriented=True)
    turned = make_batch(config)
    model = h3dnet.build(config.detector)
    scene, pyramid, _ = turned
    tree = jit(lambda key: model.init(key, scene.points, pyramid, train=False))(jax.random.key(0))
    output = jit(lambda v: model.apply(v, scene.points, pyramid, train=False))(tree)
    assert len(np.unique(output.predictions.yaw)) > 4
    corner = np.asarray(output.raw.refinement.face_centers)[:, 4] - np.asarray(output.raw.head.center)
    # The +x face lies where the initial box's yaw points to.
    bins = np.asarray(output.raw.head.heading_logits).argmax(-1)
    residual = np.take_along_axis(np.asarray(output.raw.head.heading_residual), bins[..., None], -1)[..., 0]
    yaw = -(bins * np.pi / 6 + residual * np.pi / 12)
    length = np.hypot(corner[..., 0], corner[..., 1])
    sign = np.sign(corner[..., 0] * np.cos(yaw) + corner[..., 1] * np.sin(yaw))
    np.testing.assert_allclose(corner[..., 0], sign * length * np.cos(yaw), atol=1e-5)
    np.testing.assert_allclose(corner[..., 1], sign * length * np.sin(yaw), atol=1e-5)


def test_boxes_without_points_stay(variables, forward, batch):
    output = forward(variables, batch)
    sure, boxes = jnp.full((2, 16), 0.9), output.predictions
    away = output._replace(
        predictions=boxes._replace(center=boxes.center + 50, size=jnp.abs(boxes.size), objectness=sure)
    )
    for decode_config, stay in ((None, True), (DecodeConfig(), False)):
        decode = jit(lambda o, p, c=decode_config: h3dnet.decode(o, p, CONFIG.detector, c))
        assert decode(away, batch.scene.points).mask.any() == stay


def test_impossible_towers_are_a_clear_error(batch):
    config = small_config(**{"detector.tower_scale": 2})
    with pytest.raises(ValueError, match="num_towers is 2 and tower_scale 2"):
        h3dnet.build(config.detector).init(jax.random.key(0), batch.scene.points, batch.pyramid, train=False)
