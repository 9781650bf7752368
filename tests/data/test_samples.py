import numpy as np
import pytest
from scenes import make_sample, tiny_config

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.data.samples import (
    height_above_floor,
    labelled_scene,
    middle_of_instances,
    select_features,
    stack_features,
    unlabelled_scene,
    vote_slots,
)
from vrdistill_jax.geometry.host.boxes import points_in_boxes
from vrdistill_jax.structs import Points, pad_boxes, validate


def scene_of(sample, train=False, **changes):
    return labelled_scene(sample, 5, tiny_config(**changes), np.random.default_rng(0), train)


def test_scene_keeps_the_contract():
    scene = stack_trees([scene_of(make_sample(0), train=True)])
    validate(scene)
    assert scene.index[0] == 5
    assert scene.points.mask.all()


def test_small_clouds_are_padded_not_repeated():
    scene = scene_of(make_sample(0, num_points=100))
    assert scene.points.mask.sum() == 100
    assert (scene.points.xyz[100:] == 0).all()
    assert (scene.point_instance[100:] == -1).all()
    rows = {tuple(p) for p in scene.points.xyz[:100]}
    assert rows == {tuple(p) for p in make_sample(0, num_points=100)["xyz"]}


def test_points_and_instances_stay_together():
    sample = make_sample(1)
    scene = scene_of(sample)
    by_point = {tuple(p): i for p, i in zip(sample["xyz"], sample["instance"], strict=True)}
    expected = [by_point[tuple(p)] for p in scene.points.xyz]
    np.testing.assert_array_equal(scene.point_instance[:, 0], expected)


def test_height_is_measured_on_the_whole_augmented_cloud():
    sample = make_sample(2)
    scene = scene_of(sample, train=True, **{"dataset.augment.max_scale": 0.15})
    scale = np.cbrt(abs(np.linalg.det(scene.scene_from_input[:3, :3].astype(np.float64))))
    assert abs(scale - 1) > 0.01
    floor = np.percentile(sample["xyz"][:, 2], 0.99) * scale
    np.testing.assert_allclose(scene.points.features[:, 0], scene.points.xyz[:, 2] - floor, atol=1e-5)


@pytest.mark.parametrize("crop", ["first", "last"])
def test_height_survives_shifts_and_crops(crop):
    """The floor is that of the stored cloud, wherever it went and whatever part of it is left."""
    sample = make_sample(2, num_points=2000)
    sample["xyz"] = np.random.default_rng(0).uniform(-3, 3, (2000, 3)).astype(np.float32)
    changes = {"shift_std": 0.5, "max_scale": 0.3, "crop": crop, "crop_min_points": 300}
    config = tiny_config()
    config.dataset.augment = dict(config.dataset.augment) | changes
    smaller = 0
    for seed in range(10):
        scene = labelled_scene(sample, 0, config, np.random.default_rng(seed), True)
        matrix = scene.scene_from_input.astype(np.float64)
        floor = matrix[2, 2] * np.percentile(sample["xyz"][:, 2], 0.99) + matrix[2, 3]
        mask = scene.points.mask
        np.testing.assert_allclose(
            scene.points.features[mask, 0], scene.points.xyz[mask, 2] - floor, atol=1e-5
        )
        back = (scene.points.xyz[mask] - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
        smaller += np.ptp(back, axis=0).min() < 5.0
        assert np.abs(back).max() < 3.001
    assert smaller > 3


def test_colours_are_augmented_only_where_they_are_read():
    sample = make_sample(0)
    changes = {"dataset.augment": {"color_drop": 0.5}, "detector.input_features": ("color",)}
    dropped = scene_of(sample, train=True, **changes).points.features
    assert 0.3 < (dropped == 0).all(axis=1).mean() < 0.7
    assert (scene_of(sample, train=False, **changes).points.features > 0).any(axis=1).all()
    sample["color"] = None  # never looked at
    scene_of(sample, train=True, **{"dataset.augment": {"color_drop": 0.5}})


def test_height_percentile_is_votenets():
    z = np.arange(1001, dtype=np.float32)
    xyz = np.stack([z, z, z], 1)
    np.testing.assert_allclose(height_above_floor(xyz), z - 9.9, rtol=1e-5)


def test_features_in_order_and_clear_errors():
    xyz, color = np.zeros((4, 3), np.float32), np.full((4, 3), 0.5, np.float32)
    assert stack_features(xyz, color, ("color", "height")).shape == (4, 4)
    assert stack_features(xyz, None, ()).shape == (4, 0)
    with pytest.raises(ValueError, match="this cloud has none"):
        stack_features(xyz, None, ("color",))
    with pytest.raises(ValueError, match="unknown input feature 'normal'"):
        stack_features(xyz, None, ("normal",))


def test_columns_are_picked_by_name():
    columns = np.arange(2 * 4, dtype=np.float32).reshape(2, 4)
    points = Points(np.zeros((2, 3), np.float32), columns, np.ones(2, bool))
    names = ("height", "color")
    np.testing.assert_array_equal(select_features(points, names, ("color",)).features, columns[:, 1:])
    np.testing.assert_array_equal(select_features(points, names, ("height",)).features, columns[:, :1])
    both = select_features(points, names, ("color", "height")).features
    np.testing.assert_array_equal(both, columns[:, [1, 2, 3, 0]])
    assert select_features(points, names, ()).features.shape == (2, 0)


def test_votes_aim_at_the_middle_of_the_sampled_instance():
    xyz = np.array([[0, 0, 0], [2, 4, 6], [9, 9, 9], [1, 1, 1]], np.float32)
    middle = middle_of_instances(xyz, np.array([0, 0, -1, 2]), np.full((3, 3), 7.0, np.float32))
    np.testing.assert_array_equal(middle, [[1, 2, 3], [7, 7, 7], [1, 1, 1]])


@pytest.mark.parametrize("seed", range(5))
def test_middles_are_those_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    xyz, instance = rng.normal(size=(500, 3)).astype(np.float32), rng.integers(-1, 9, 500)
    instance[instance == 4] = -1
    fallback = rng.normal(size=(9, 3)).astype(np.float32)
    expected = fallback.copy()
    for row in set(range(9)) - {4}:
        points = xyz[instance == row]
        expected[row] = (points.min(axis=0) + points.max(axis=0)) / 2
    np.testing.assert_allclose(middle_of_instances(xyz, instance, fallback), expected, atol=1e-7)
    np.testing.assert_array_equal(middle_of_instances(xyz, np.full(500, -1), fallback), fallback)


def test_an_instance_without_a_box_is_an_error():
    with pytest.raises(ValueError, match="a point is of instance 2 but there are 2 boxes"):
        middle_of_instances(np.zeros((3, 3), np.float32), np.array([0, 2, -1]), np.zeros((2, 3)))


@pytest.mark.parametrize("seed", range(5))
def test_vote_slots_are_those_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(-2, 2, (800, 3)).astype(np.float32)
    boxes = np.concatenate(
        [rng.uniform(-1, 1, (12, 3)), rng.uniform(0.3, 2.5, (12, 3)), rng.uniform(-3.1, 3.1, (12, 1))], 1
    ).astype(np.float32)
    boxes[3, 4] = 0  # empty
    boxes[5] = [*xyz[0], 2 * abs(xyz[1] - xyz[0])[0], 9, 9, 0]  # xyz[1] lies on a face
    inside = points_in_boxes(xyz, boxes)
    expected = np.full((800, 3), -1)
    for point in range(800):
        for number, row in enumerate(np.flatnonzero(inside[point])):
            expected[point, slice(None) if number == 0 else min(number, 2)] = row
    assert inside.sum(axis=1).max() >= 4
    np.testing.assert_array_equal(vote_slots(xyz, boxes), expected)


def test_vote_slots_fill_as_the_reference_does():
    big = [0, 0, 0, 4, 4, 4, 0]
    boxes = np.array([big, [9, 9, 9, 1, 1, 1, 0], big, big, big], np.float32)
    slots = vote_slots(np.array([[0, 0, 0], [9, 9, 9], [5, 5, 5]], np.float32), boxes)
    np.testing.assert_array_equal(slots, [[0, 2, 4], [1, 1, 1], [-1, -1, -1]])
    two = vote_slots(np.zeros((1, 3), np.float32), boxes[[0, 2]])
    np.testing.assert_array_equal(two, [[0, 1, 0]])


def test_oriented_data_votes_for_box_centres():
    sample = make_sample(0)
    scene = scene_of(sample, **{"dataset.oriented": True})
    assert scene.point_instance.shape == (256, 3)
    np.testing.assert_array_equal(scene.boxes.vote_center[:3], sample["boxes_center"])


def test_too_many_boxes_name_the_remedy():
    with pytest.raises(
        ValueError, match="9 boxes but the config holds 8; raise config.dataset.max_boxes to 9"
    ):
        scene_of(make_sample(0, num_boxes=9))


def test_unlabelled_scene_needs_no_boxes():
    scene = unlabelled_scene(np.ones((50, 3), np.float32), None, 64, ("height",), np.random.default_rng(0))
    assert scene.boxes is None
    assert scene.points.mask.sum() == 50


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("xyz", np.full((1, 4, 3), np.nan, np.float32), "points.xyz holds NaN"),
        ("xyz", np.zeros((1, 4, 2), np.float32), r"points.xyz has shape \(1, 4, 2\), expected \(1, 4, 3\)"),
        ("xyz", np.zeros((1, 4, 3)), "points.xyz has dtype float64, expected float32"),
    ],
)
def test_validate_names_the_field(field, value, message):
    scene = stack_trees(
        [unlabelled_scene(np.ones((4, 3), np.float32), None, 4, (), np.random.default_rng(0))._replace(
            scene_from_input=np.eye(4, dtype=np.float32))]
    )  # fmt: skip
    validate(scene)
    with pytest.raises(ValueError, match=message):
        validate(scene._replace(points=scene.points._replace(**{field: value})))


def test_validate_checks_boxes():
    scene = stack_trees([scene_of(make_sample(0))])
    bad = scene._replace(boxes=scene.boxes._replace(size=np.zeros_like(scene.boxes.size)))
    with pytest.raises(ValueError, match="boxes.size holds a value <= 0"):
        validate(bad)
    bad = scene._replace(point_instance=np.full_like(scene.point_instance, 99))
    with pytest.raises(ValueError, match=r"point_instance must lie in \[-1, 8\)"):
        validate(bad)


def test_pad_boxes_defaults_votes_to_centres():
    boxes = pad_boxes(np.ones((1, 3)), np.ones((1, 3)), np.zeros(1), np.array([2]), 2)
    np.testing.assert_array_equal(boxes.vote_center, [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(boxes.label, [2, -1])
