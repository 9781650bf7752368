"""Primitives found on the device equal those of the NumPy twin; the loss equals one written out proposal by proposal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h3dnet_scenes import jit, small_config
from scenes import make_batch

from vrdistill_jax.data.primitives import find_primitives
from vrdistill_jax.detectors import h3dnet, h3dnet_targets, votenet
from vrdistill_jax.detectors.h3dnet_primitives import (
    EDGE_OFFSETS,
    FACE_OFFSETS,
    PrimitiveOutput,
    edge_centers,
    face_centers,
)
from vrdistill_jax.structs import Points, PointSet, Scene, pad_boxes


def random_scene(seed, oriented, num_points=900, padding=60):
    """Furniture-like boxes with points on and in them, some overlapping, and a floor."""
    rng = np.random.default_rng(seed)
    count = 4
    center = rng.uniform(-1.0, 1.0, (count, 3)) * (2, 2, 0.2) + (0, 0, 0.6)
    size = rng.uniform(0.4, 1.6, (count, 3))
    yaw = rng.uniform(-np.pi, np.pi, count) if oriented else np.zeros(count)
    owner = rng.integers(-1, count, num_points)
    local = rng.uniform(-0.5, 0.5, (num_points, 3))
    side = rng.integers(0, 6, num_points)  # most points lie near a face, as scans have them
    near = rng.random(num_points) < 0.8
    local[near, side[near] % 3] = (side[near] // 3 - 0.5) + rng.normal(0, 0.02, near.sum())
    local *= size[owner]
    cos, sin = np.cos(yaw[owner]), np.sin(yaw[owner])
    turned = np.stack(
        [cos * local[:, 0] - sin * local[:, 1], sin * local[:, 0] + cos * local[:, 1], local[:, 2]], 1
    )
    xyz = np.where(owner[:, None] >= 0, turned + center[owner], rng.uniform(-3, 3, (num_points, 3)))
    slots = np.repeat(owner[:, None], 3 if oriented else 1, 1)
    if oriented:  # some points belong to a second and a third box as well
        second = rng.integers(0, count, num_points)
        more = (rng.random(num_points) < 0.3) & (owner >= 0)
        slots[more, 1] = second[more]
        slots[more, 2] = (second[more] + 1) % count
    label = rng.integers(0, 4, count)
    boxes = pad_boxes(center, size, yaw, label, count + 3)
    total = num_points + padding
    points = Points(
        np.full((total, 3), 0.1, np.float32), np.zeros((total, 1), np.float32), np.arange(total) < num_points
    )
    points.xyz[:num_points] = xyz
    instance = np.full((total, slots.shape[1]), -1, np.int32)
    instance[:num_points] = slots
    scene = Scene(points, boxes, instance, np.eye(4, dtype=np.float32), np.int32(seed), np.True_)
    return jax.tree.map(lambda x: x[None], scene), jax.tree.map(lambda x: x[:count], boxes)


@pytest.mark.parametrize("oriented", [False, True])
def test_targets_equal_those_of_the_numpy_twin(oriented):
    rules = h3dnet.default_config(("a", "b", "c", "d"), ((1, 1, 1),) * 4, oriented).primitives
    rules.face_points, rules.edge_points = 15, 4
    find = jit(lambda s, i: h3dnet_targets.primitive_targets(s, i, rules))
    for seed in range(6):
        scene, boxes = random_scene(seed, oriented)
        seeds = np.random.default_rng(seed).permutation(960)[None, :500].astype(np.int32)
        ours = find(scene, seeds)
        rows = np.concatenate([boxes.center, boxes.size, boxes.yaw[:, None]], 1)
        theirs = find_primitives(scene.points.xyz[0], scene.point_instance[0], rows, boxes.label, rules)
        for kind, expected in theirs.items():
            mask = expected.mask[seeds[0]]
            assert 0.02 < mask.mean() < 0.95, kind
            np.testing.assert_array_equal(ours[kind].mask[0], mask)
            for name in ("center", "size", "label"):
                got = np.asarray(getattr(ours[kind], name)[0])[mask]
                np.testing.assert_allclose(got, getattr(expected, name)[seeds[0]][mask], atol=2e-5)


def test_scenes_without_boxes_have_no_primitives():
    scene, _ = random_scene(0, False)
    none = pad_boxes(*(np.zeros((0, *shape)) for shape in ((3,), (3,), ())), np.zeros(0, int), 3)
    scene = scene._replace(
        boxes=jax.tree.map(lambda x: x[None], none), point_instance=np.full_like(scene.point_instance, -1)
    )
    rules = h3dnet.default_config(("a",), ((1, 1, 1),), False).primitives
    found = jit(lambda s, i: h3dnet_targets.primitive_targets(s, i, rules))(scene, np.arange(50)[None])
    for target in found.values():
        assert not target.mask.any()
        assert np.isfinite(target.center).all()


def test_faces_and_edges_of_a_turned_box():
    center, size = np.array([[[1.0, 2.0, 3.0]]]), np.array([[[2.0, 4.0, 6.0]]])
    yaw = np.array([[np.pi / 2]])
    expected = [[1, 2, 6], [1, 2, 0], [-1, 2, 3], [3, 2, 3], [1, 3, 3], [1, 1, 3]]
    np.testing.assert_allclose(face_centers(center, size, yaw)[0, :, 0], expected, atol=1e-6)
    edges = np.asarray(edge_centers(center, size, yaw))[0, :, 0]
    np.testing.assert_allclose(edges[0], [1, 3, 6], atol=1e-6)  # upper, +x side
    np.testing.assert_allclose(edges[11], [3, 1, 3], atol=1e-6)  # -x and -y sides
    assert len(np.unique(EDGE_OFFSETS, axis=0)) == 12
    assert (np.abs(EDGE_OFFSETS).sum(1) == 2).all()
    assert (np.abs(FACE_OFFSETS).sum(1) == 1).all()


def cross_entropy(logits, label, weight=None):
    shifted = logits - logits.max()
    value = np.log(np.exp(shifted).sum()) - shifted[label]
    return value if weight is None else value * weight[label]


def mean(values):
    return float(np.sum(values) / (len(values) + 1e-6))


def test_primitive_terms_are_means_over_seeds_that_lie_on_one():
    rng = np.random.default_rng(0)
    votes = PointSet(
        rng.normal(size=(1, 6, 3)), rng.normal(size=(1, 6, 4)), np.ones((1, 6), bool), np.zeros((1, 6), int)
    )
    own = PrimitiveOutput(
        rng.normal(size=(1, 6, 2)), votes, votes.features, rng.normal(size=(1, 6, 3)), rng.normal(size=(1, 6, 2)),
        rng.normal(size=(1, 6, 4)),
    )  # fmt: skip
    there = np.array([[True, False, True, False, True, True]])
    valid = np.array([[True, True, True, True, True, False]])
    target = h3dnet_targets.PrimitiveTargets(
        there, rng.normal(size=(1, 6, 3)), rng.normal(size=(1, 6, 2)), rng.integers(0, 4, (1, 6))
    )
    terms = h3dnet_targets.primitive_terms(own, target, valid)
    flags = [cross_entropy(own.flag_logits[0, i], int(there[0, i]), (0.4, 0.6)) for i in range(5)]
    assert terms["flag"] == pytest.approx(mean(flags), rel=1e-5)
    rows = [0, 2, 4]
    for name, values in (("vote", votes.xyz), ("center", own.center), ("size", own.size)):
        aim = target.size if name == "size" else target.center
        expected = mean([np.abs(values[0, i] - aim[0, i]).sum() for i in rows])
        assert terms[name] == pytest.approx(expected, rel=1e-5)
    classes = [cross_entropy(own.class_logits[0, i], target.label[0, i]) for i in rows]
    assert terms["class"] == pytest.approx(mean(classes), rel=1e-5)


@pytest.fixture(scope="module")
def trained():
    """An output whose proposals and primitives lie near the boxes, so that every term has entries."""
    config = small_config()
    batch = make_batch(config)
    model = h3dnet.build(config.detector)
    shapes = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), batch.scene.points, batch.pyramid, train=False)[0]
    )
    draw = np.random.default_rng(4)

    def fill(leaf):
        if leaf.dtype == np.float32:
            return draw.normal(size=leaf.shape).astype(np.float32)
        return np.ones(leaf.shape, bool) if leaf.dtype == bool else draw.integers(0, 256, leaf.shape)

    output = jax.tree.map(fill, shapes)
    rng, raw, boxes = np.random.default_rng(3), output.raw, batch.scene.boxes
    owner = np.arange(16) % 4
    owner = np.where(owner == 3, 0, owner)
    spread = np.where(np.arange(16) % 4 == 3, 3.0, 0.1)[:, None]
    at = (boxes.center[:, owner] + spread * rng.uniform(-1, 1, (2, 16, 3))).astype(np.float32)
    clusters = raw.clusters._replace(xyz=at)
    truth = boxes.center[:, :3], boxes.size[:, :3], boxes.yaw[:, :3]
    faces, edges = (np.asarray(f(*truth)).reshape(2, -1, 3) for f in (face_centers, edge_centers))
    primitives = {}
    for kind, primitive in raw.primitives.items():
        places = {"z": faces[:, :6], "xy": faces[:, 6:], "line": edges}[kind]
        near = places[:, rng.integers(0, places.shape[1], 32)] + rng.normal(0, 0.15, (2, 32, 3))
        primitives[kind] = primitive._replace(
            center=near.astype(np.float32), flag_logits=rng.normal(0.5, 1, (2, 32, 2)).astype(np.float32)
        )
    own = [
        x + rng.normal(0, 0.1, x.shape).astype(np.float32)
        for x in (at, boxes.size[:, owner], boxes.yaw[:, owner])
    ]
    refinement = raw.refinement._replace(
        face_centers=np.asarray(face_centers(*own)), edge_centers=np.asarray(edge_centers(*own))
    )
    raw = raw._replace(clusters=clusters, primitives=primitives, refinement=refinement)
    return config.detector, batch.scene, output._replace(raw=raw)


@pytest.fixture(scope="module")
def evaluate(trained):
    """The loss of the config, compiled once."""
    return jit(lambda o, s: h3dnet.loss(o, s, trained[0]))


def naive_matching(output, scene, reference_labels):
    """The four terms, one face or edge at a time."""
    raw, boxes, final = output.raw, scene.boxes, output.predictions
    match, class_match, objectness, off = [], [], [], []
    for b in range(2):
        placed, classes = {}, {}
        for side, kinds in (("face", ("z", "xy")), ("edge", ("line",))):
            parts = [raw.primitives[k] for k in kinds]
            flags = np.concatenate([p.flag_logits[b] for p in parts])
            shift = np.where(flags[:, 1] > flags[:, 0], 0.0, 100.0)[:, None]
            placed[side] = np.concatenate([p.center[b] for p in parts]) + shift
            classes[side] = np.concatenate([p.class_logits[b] for p in parts]).argmax(-1)
        distance = np.linalg.norm(raw.clusters.xyz[b][:, None] - boxes.center[b][:3], axis=-1)
        assigned = distance.argmin(-1)
        any_match = np.zeros(16, bool)
        for row in range(18):
            side, f = ("face", row) if row < 6 else ("edge", row - 6)
            count, place = (6, face_centers) if side == "face" else (12, edge_centers)
            own = np.asarray(getattr(raw.refinement, f"{side}_centers"))[b, f]
            for q in range(16):
                box = assigned[q]
                one = (boxes.center[b, box], boxes.size[b, box], boxes.yaw[b, box])
                true = np.asarray(place(*(np.asarray(x)[None, None] for x in one)))[0, f, 0]
                refined = (final.center[b, q], final.size[b, q], final.yaw[b, q])
                found = np.asarray(place(*(np.asarray(x)[None, None] for x in refined)))[0, f, 0]
                to_true = np.linalg.norm(placed[side] - true, axis=-1)
                best = to_true.argmin()
                hit = to_true[best] < 0.3 and np.linalg.norm(placed[side][best] - own[q]) < 0.3
                reader = (f * 16 + q) // count if reference_labels else q
                same = classes[side][best] == boxes.label[b, assigned[reader]]
                any_match[q] |= hit
                positive = distance[q, box] < 0.3
                if positive or distance[q, box] > 0.6:
                    weight = (0.3, 0.7)
                    match.append(cross_entropy(raw.refinement.match_logits[b, row, q], int(hit), weight))
                    logits = raw.refinement.class_match_logits[b, row, q]
                    class_match.append(cross_entropy(logits, int(hit and same), weight))
                if hit and positive:
                    off.append(np.linalg.norm(found - true))
        for q in np.flatnonzero(any_match):
            label = int(distance[q].min() < 0.3)
            objectness.append(cross_entropy(raw.refined_head.objectness_logits[b, q], label, (0.2, 0.8)))
    return {
        "match": mean(match),
        "class_match": mean(class_match),
        "matched_objectness": mean(objectness),
        "primitive_distance": mean(off),
    }


@pytest.mark.parametrize("reference_labels", [False, True])
def test_matching_terms_equal_a_naive_twin(trained, reference_labels):
    config, scene, output = trained
    config = config.copy_and_resolve_references()
    config.reference_match_labels = reference_labels
    terms = jit(lambda o, s: h3dnet_targets.matching_terms(o, s, config))(output, scene)
    expected = naive_matching(output, scene, reference_labels)
    assert all(value > 0 for value in expected.values())
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value, rel=1e-3), name
    assert 0.02 < terms["matched_share"] < 0.9


def test_total_is_the_weighted_sum_of_the_terms(trained, evaluate):
    config, scene, output = trained
    total, t = evaluate(output, scene)
    t = {name: float(value) for name, value in t.items()}
    aimed = scene._replace(boxes=scene.boxes._replace(vote_center=scene.boxes.center))
    initial = float(jit(lambda o, s: votenet.loss(o, s, config)[0])(output, aimed))
    matching = t["match"] + t["class_match"] + (t["refined_objectness"] + t["matched_objectness"]) / 2
    potential = t["refined_center"] + t["primitive_distance"] + t["refined_size_residual"]
    expected = initial + 10 * (0.5 * matching + potential)
    for kind, weight in (("z", 1), ("xy", 1), ("line", 2)):
        expected += 30 * t[f"{kind}_flag"] + 10 * t[f"{kind}_vote"]
        expected += weight * (0.5 * t[f"{kind}_center"] + 0.5 * t[f"{kind}_size"] + t[f"{kind}_class"])
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert "refined_heading_residual" not in t  # axis-aligned
    assert t["line_size"] == 0
    turned = config.copy_and_resolve_references()
    turned.oriented = True
    more, terms = jit(lambda o, s: h3dnet.loss(o, s, turned))(output, scene)
    assert float(more - total) == pytest.approx(10 * float(terms["refined_heading_residual"]), rel=1e-3)


def test_votes_aim_at_the_boxes_centers(trained, evaluate):
    config, scene, output = trained
    moved = scene._replace(boxes=scene.boxes._replace(vote_center=scene.boxes.vote_center + 5))
    assert evaluate(output, moved)[0] == evaluate(output, scene)[0]


def test_no_labels_is_a_clear_error(trained):
    config, scene, output = trained
    with pytest.raises(ValueError, match="this scene has no labels"):
        h3dnet.loss(output, scene._replace(boxes=None), config)


def test_gradients_reach_refined_centers_through_faces_and_edges(trained):
    config, scene, output = trained

    def distance(center):
        shifted = output._replace(predictions=output.predictions._replace(center=center))
        return h3dnet_targets.matching_terms(shifted, scene, config)["primitive_distance"]

    assert jnp.abs(jit(jax.grad(distance))(jnp.asarray(output.predictions.center))).max() > 0
