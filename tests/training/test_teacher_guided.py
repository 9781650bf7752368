import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from scenes import make_batch, tiny_config

from vrdistill_jax.detectors import votenet
from vrdistill_jax.structs import Detections, Predictions
from vrdistill_jax.training import teacher_guided
from vrdistill_jax.training.teacher_guided import (
    LAYOUTS,
    guided_variables,
    label_detections,
    slice_teacher,
)

append_detections = jax.jit(teacher_guided.append_detections, static_argnames=("threshold", "max_iou"))
loss = jax.jit(lambda output, scene: votenet.loss(output, scene, tiny_config().detector)[1])
WIDTH = 0.125  # of the teacher; the student's is half of it


def shapes_at(config, batch):
    return jax.eval_shape(
        lambda: votenet.build(config.detector).init(
            jax.random.key(0), batch.scene.points, batch.pyramid, train=False
        )
    )


def random_variables(shapes, seed=0):
    """Weights and running statistics without any symmetry, variances positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan = leaf.shape[0] if len(leaf.shape) == 2 else 1
        values = rng.normal(size=leaf.shape) / np.sqrt(fan)
        return (np.abs(values) + 0.5 if path.endswith("var") else values).astype(np.float32)

    return unflatten_dict({k: draw(k, v) for k, v in flatten_dict(shapes, sep="/").items()}, sep="/")


@pytest.fixture(scope="module")
def networks():
    wide = tiny_config(**{"detector.width": WIDTH})
    narrow = tiny_config(**{"detector.width": WIDTH / 2})
    batch = make_batch(wide, (0,))
    return wide, narrow, batch, random_variables(shapes_at(wide, batch)), shapes_at(narrow, batch)


def apply(config, variables, batch):
    model = votenet.build(config.detector)
    return jax.jit(lambda v: model.apply(v, batch.scene.points, batch.pyramid, train=False))(variables)


def test_slice_at_the_same_width_is_the_teacher(networks):
    wide, _, batch, teacher, _ = networks
    sliced = guided_variables(teacher, shapes_at(wide, batch), "votenet")
    jax.tree.map(np.testing.assert_array_equal, sliced, teacher)


def test_arrays_are_the_documented_slices(networks):
    *_, teacher, shapes = networks
    sliced = flatten_dict(slice_teacher(teacher, shapes, LAYOUTS["votenet"]), sep="/")
    have, want = flatten_dict(teacher, sep="/"), flatten_dict(shapes, sep="/")
    assert {k: v.shape for k, v in sliced.items()} == {k: v.shape for k, v in want.items()}
    p = "params/"
    # Teacher's hidden sizes 8, 16, 32; student's 4, 8, 16.
    cases = {
        p + "backbone/sa1/mlp/layer0/dense/kernel": np.s_[:, :4],  # xyz and height stay
        p + "backbone/sa2/mlp/layer0/dense/kernel": np.s_[: 3 + 8, :8],  # xyz, then features
        p + "backbone/fp1/mlp/layer0/dense/kernel": np.s_[np.r_[0:16, 32:48], :16],  # each half by itself
        p + "voting_out/kernel": np.s_[:16, : 3 + 16],
        p + "voting_out/bias": np.s_[: 3 + 16],
        p + "proposal_out/kernel": np.s_[:8, :],
        p + "proposal_out/bias": np.s_[:],
        "batch_stats/voting/layer1/norm/var": np.s_[:16],
        p + "voting/layer0/norm/scale": np.s_[:16],
    }
    for path, rows in cases.items():
        np.testing.assert_array_equal(sliced[path], have[path][rows], err_msg=path)


def test_student_computes_what_the_kept_channels_of_the_teacher_compute(networks):
    """With every other channel of the teacher silenced, teacher and sliced student are the same function."""
    wide, narrow, batch, teacher, shapes = networks
    student = slice_teacher(teacher, shapes, LAYOUTS["votenet"])
    silenced = {}
    want = flatten_dict(shapes, sep="/")
    for path, array in flatten_dict(teacher, sep="/").items():
        array = array.copy()
        kept = want[path].shape[-1]
        if path.endswith(("norm/scale", "norm/bias")) or path.startswith("params/voting_out"):
            array[..., kept:] = 0.0  # zero after the ReLU, or no shift of the seed's feature
        silenced[path] = array
    a = apply(wide, unflatten_dict(silenced, sep="/"), batch)
    b = apply(narrow, student, batch)
    np.testing.assert_array_equal(a.raw.cluster_index, b.raw.cluster_index)
    np.testing.assert_allclose(a.taps["votes"].xyz, b.taps["votes"].xyz, atol=1e-4)
    x, y = a.raw.backbone.seeds.features, b.raw.backbone.seeds.features
    np.testing.assert_allclose(x[..., : y.shape[-1]], y, rtol=1e-3, atol=1e-4)
    assert np.abs(y).max() > 0.1
    assert not np.any(x[..., y.shape[-1] :])
    np.testing.assert_allclose(a.raw.head_channels, b.raw.head_channels, rtol=1e-3, atol=1e-3)


def test_networks_that_do_not_fit_are_refused(networks):
    wide, narrow, batch, teacher, shapes = networks
    layout = LAYOUTS["votenet"]
    student = slice_teacher(teacher, shapes, layout)
    with pytest.raises(ValueError, match="at least as wide"):
        slice_teacher(student, shapes_at(wide, batch), layout)
    fewer = tiny_config(**{"detector.width": WIDTH / 2})
    fewer.detector.class_names = ("a", "b", "c")
    with pytest.raises(ValueError, match="proposal_out.*same classes"):
        slice_teacher(teacher, shapes_at(fewer, batch), layout)
    other = dict(shapes, params=dict(shapes["params"], extra={"kernel": np.zeros((1, 1))}))
    with pytest.raises(ValueError, match="params/extra/kernel and 0 more"):
        slice_teacher(teacher, other, layout)
    with pytest.raises(ValueError, match="no weight layout for detector '3detr'; known: votenet"):
        guided_variables(teacher, shapes, "3detr")


# ---- Label distillation


def detections_of(rows, score, label=None, mask=None, batch=2):
    """The same detections for every scene."""
    count = len(score)
    one = (
        np.asarray(rows, np.float32).reshape(count, 7),
        np.asarray(score, np.float32),
        np.asarray(label if label is not None else np.zeros(count), np.int32),
        np.asarray(mask if mask is not None else np.ones(count), bool),
    )
    return Detections(*(np.broadcast_to(x, (batch, *x.shape)) for x in one))


def far_boxes(count):
    return [[10.0 + 3 * n, 0, 0.5, 1, 1, 1, 0.1 * n] for n in range(count)]


@pytest.fixture(scope="module")
def scene():
    return make_batch(tiny_config()).scene  # three boxes in each scene, eight slots


def test_confident_detections_fill_free_slots_best_first(scene):
    detections = detections_of(far_boxes(4), [0.9, 0.8, 0.7, 0.5], [3, 2, 1, 0], [True, False, True, True])
    got, count = append_detections(scene, detections)
    np.testing.assert_array_equal(got.boxes.mask.sum(1), [5, 5])
    for b in range(2):
        np.testing.assert_allclose(got.boxes.center[b, 3:5, 0], [10, 16])
        np.testing.assert_allclose(got.boxes.yaw[b, 3:5], [0, 0.2], atol=1e-6)
        np.testing.assert_array_equal(got.boxes.label[b, 3:5], [3, 1])
        np.testing.assert_array_equal(got.boxes.vote_center[b, 3:5], got.boxes.center[b, 3:5])
    np.testing.assert_array_equal(count.added, [2, 2])
    np.testing.assert_array_equal(count.left_over, [0, 0])
    for name, old in scene.boxes._asdict().items():
        new = np.asarray(getattr(got.boxes, name))
        assert new.dtype == old.dtype, name
        for rows in (slice(0, 3), slice(5, 8)):
            np.testing.assert_array_equal(new[:, rows], old[:, rows], err_msg=name)
    np.testing.assert_array_equal(got.point_instance, scene.point_instance)


def test_threshold_above_one_changes_nothing(scene):
    got, count = append_detections(scene, detections_of(far_boxes(3), [1.0, 0.9, 0.8]), threshold=1.01)
    jax.tree.map(np.testing.assert_array_equal, got.boxes, scene.boxes)
    assert not np.any(count.added)


def test_perfect_teacher_adds_nothing_unless_all_are_kept(scene):
    b = scene.boxes
    rows = np.concatenate([b.center, b.size, b.yaw[..., None]], -1)[:, :3]
    perfect = Detections(rows, np.full((2, 3), 0.95, np.float32), b.label[:, :3], np.ones((2, 3), bool))
    got, count = append_detections(scene, perfect)
    jax.tree.map(np.testing.assert_array_equal, got.boxes, b)
    np.testing.assert_array_equal(count.overlapping, [3, 3])
    everything, count = append_detections(scene, perfect, max_iou=1.1)
    np.testing.assert_array_equal(everything.boxes.mask.sum(1), [6, 6])
    np.testing.assert_array_equal(everything.boxes.center[:, 3:6], b.center[:, :3])
    np.testing.assert_array_equal(count.overlapping, [0, 0])


def test_overlap_with_a_pad_does_not_count(scene):
    at_origin = detections_of([[0, 0, 0, 1, 1, 1, 0]], [0.9])  # where the pads are
    none = scene._replace(boxes=scene.boxes._replace(mask=np.zeros_like(scene.boxes.mask)))
    _, count = append_detections(none, at_origin)
    np.testing.assert_array_equal(count.added, [1, 1])


def test_what_does_not_fit_is_counted(scene):
    got, count = append_detections(scene, detections_of(far_boxes(7), np.linspace(0.99, 0.9, 7)))
    assert got.boxes.mask.all()
    np.testing.assert_allclose(got.boxes.center[:, 3:, 0], [[10, 13, 16, 19, 22]] * 2)
    np.testing.assert_array_equal(count.added, [5, 5])
    np.testing.assert_array_equal(count.left_over, [2, 2])


def test_free_slots_between_boxes_are_used_and_empty_boxes_refused(scene):
    mask = scene.boxes.mask.copy()
    mask[:, 1] = False
    rows = far_boxes(2)
    rows[0][4] = -0.1
    got, count = append_detections(
        scene._replace(boxes=scene.boxes._replace(mask=mask)), detections_of(rows, [0.9, 0.8])
    )
    np.testing.assert_allclose(got.boxes.center[:, 1, 0], 13)
    np.testing.assert_array_equal(got.boxes.mask, scene.boxes.mask)
    np.testing.assert_array_equal(count.added, [1, 1])


def test_detection_labels_are_one_per_place_and_sorted():
    def both(x, dtype=np.float32):
        return np.asarray([x, x], dtype)

    predictions = Predictions(
        both([[0, 0, 0], [0.1, 0, 0], [5, 0, 0], [9, 0, 0]]),
        np.ones((2, 4, 3), np.float32),
        np.zeros((2, 4), np.float32),
        both([[0, 3, 0], [5, 0, 0], [0, 0, 9], [0, 0, 9]]),
        both([0.9, 0.8, 0.95, 1.0]),
        both([True, True, True, False], bool),
    )
    points = make_batch(tiny_config()).scene.points
    config = teacher_guided.LABEL_DECODE._replace(min_points=0)
    got = label_detections(predictions, points, config)
    np.testing.assert_array_equal(got.mask, [[True, True, False, False]] * 2)
    np.testing.assert_array_equal(np.asarray(got.label)[:, :2], [[2, 1]] * 2)
    np.testing.assert_allclose(
        np.asarray(got.score)[0, :2],
        [0.95 * np.exp(9) / (np.exp(9) + 2), 0.9 * np.exp(3) / (np.exp(3) + 2)],
        rtol=1e-5,
    )
    np.testing.assert_array_equal(np.asarray(got.boxes)[0, :2, 0], [5, 0])
    assert not np.asarray(label_detections(predictions, points).mask)[:, 2:].any()


def test_the_detection_loss_sees_added_boxes(networks):
    wide, _, batch, teacher, _ = networks
    output = apply(wide, teacher, batch)
    target = np.asarray(output.raw.clusters.xyz)[:, :1]
    rows = np.concatenate([target[0, 0] + [0.0, 0.0, 0.0], [0.05, 0.05, 0.05, 0.0]])
    scene, count = append_detections(batch.scene, detections_of([rows], [0.9], batch=1), max_iou=1.1)
    assert count.added == 1
    before = loss(output, batch.scene)
    after = loss(output, scene)
    assert after["positive_share"] > before["positive_share"]
    assert after["vote"] == before["vote"]  # votes are learnt from the ground truth alone


def test_no_labels_is_a_clear_error(scene):
    with pytest.raises(ValueError, match="no labels"):
        append_detections(scene._replace(boxes=None), detections_of(far_boxes(1), [0.9]))
