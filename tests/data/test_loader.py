import jax
import numpy as np
import pytest
from scenes import make_sample, tiny_config

from vrdistill_jax.data.loader import PreparedScenes, evaluation_batches, train_batches
from vrdistill_jax.detectors import votenet
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.structs import InputConfig, LevelConfig, PyramidConfig

SOURCE = [make_sample(seed) for seed in range(7)]
CONFIG = tiny_config()
PYRAMID = votenet.pyramid_config(CONFIG.detector)


FULL_AUGMENTATION = {
    "points_share": (0.5, 1.0), "flip_x": 0.5, "max_turn": 0.5, "max_scale": 0.1, "shift_std": 0.1, "crop": "last",
    "color_drop": 0.3,
}  # fmt: skip


def take(count: int, start: int = 0, **changes):
    batches = train_batches(SOURCE, tiny_config(**changes), PYRAMID, start)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_resuming_gives_the_same_batches(threads):
    whole = take(8)
    resumed = take(5, start=3, **{"dataset.num_threads": threads})
    jax.tree.map(np.testing.assert_array_equal, whole[3:], resumed)


def test_worker_processes_deliver_the_same_batches_and_resume():
    whole = take(6)
    workers = take(4, start=2, **{"dataset.num_workers": 2})
    jax.tree.map(np.testing.assert_array_equal, whole[2:], workers)
    assert jax.tree.structure(whole[0]) == jax.tree.structure(workers[0])
    doubled = jax.jit(lambda scene: 2 * scene.points.xyz)(workers[0][0])  # JAX takes arrays in shared memory
    np.testing.assert_array_equal(doubled, 2 * whole[2][0].points.xyz)


def test_batches_do_not_depend_on_what_was_read_before():
    """A killed epoch that is resumed batch by batch gives the sequence of an uninterrupted one."""
    whole = take(5, **{"dataset.augment": FULL_AUGMENTATION})
    for step in range(5):
        (alone,) = take(1, start=step, **{"dataset.augment": FULL_AUGMENTATION})
        jax.tree.map(np.testing.assert_array_equal, whole[step], alone)


def test_impossible_augmentation_is_told_at_once():
    with pytest.raises(ValueError, match="unknown entry 'flipx'"):
        train_batches(SOURCE, tiny_config(**{"dataset.augment": {"flipx": 1.0}}), PYRAMID)


def test_every_epoch_is_a_permutation_with_other_points():
    batches = take(7, **{"train.batch_size": 2})  # 14 = two epochs of 7
    rows = np.concatenate([scene.index for scene, _ in batches])
    assert sorted(rows[:7]) == list(range(7))
    assert sorted(rows[7:]) == list(range(7))
    assert list(rows[:7]) != list(rows[7:])
    clouds = {}
    for scene, _ in batches:
        for row, xyz in zip(scene.index, scene.points.xyz, strict=True):
            if row in clouds:
                assert not np.array_equal(clouds[row], xyz)
            clouds[row] = xyz


def test_another_seed_gives_another_order():
    first = np.concatenate([s.index for s, _ in take(3)])
    other = np.concatenate([s.index for s, _ in take(3, **{"seed": 1})])
    assert list(first) != list(other)


def test_evaluation_reads_every_scene_once_and_marks_padding():
    batches = list(evaluation_batches(SOURCE, CONFIG, PYRAMID, 3))
    rows = np.concatenate([scene.index[scene.mask] for scene, _ in batches])
    np.testing.assert_array_equal(rows, range(7))
    assert batches[-1][0].mask.tolist() == [True, False, False]
    again = list(evaluation_batches(SOURCE, tiny_config(**{"dataset.num_threads": 5}), PYRAMID, 3))
    jax.tree.map(np.testing.assert_array_equal, batches, again)


def test_evaluation_points_do_not_depend_on_the_batch_size():
    by_one = [s.points.xyz[0] for s, _ in evaluation_batches(SOURCE, CONFIG, PYRAMID, 1)]
    by_four = np.concatenate([s.points.xyz for s, _ in evaluation_batches(SOURCE, CONFIG, PYRAMID, 4)])
    np.testing.assert_array_equal(by_one, by_four[:7])


def test_a_teacher_of_another_kind_gets_its_own_input_of_the_same_points():
    """Geometry and features as a run of the teacher itself would read them, and the student's as without a teacher."""
    config = tiny_config()
    pyramid = votenet.pyramid_config(config.detector)
    other = PyramidConfig((LevelConfig(32, 0.5, 4),))
    reads = InputConfig(("color",), other)
    alone = next(train_batches(SOURCE, config, pyramid))
    scene, built, taught = next(train_batches(SOURCE, config, pyramid, 0, reads))
    np.testing.assert_array_equal(taught.points.xyz, scene.points.xyz)
    np.testing.assert_array_equal(taught.points.mask, scene.points.mask)
    for name in ("xyz", "features"):
        np.testing.assert_array_equal(getattr(scene.points, name), getattr(alone[0].points, name))
    for level, expected in zip(built.levels, alone[1].levels, strict=True):
        np.testing.assert_array_equal(level.index, expected.index)
    for b, xyz in enumerate(scene.points.xyz):
        expected = build_point_pyramid(xyz, scene.points.mask[b], other)
        np.testing.assert_array_equal(taught.pyramid.levels[0].index[b], expected.levels[0].index)

    scene, _, taught = next(evaluation_batches(SOURCE, config, pyramid, 2, reads))
    sample = SOURCE[0]
    colors = {tuple(p): c for p, c in zip(sample["xyz"], sample["color"], strict=True)}
    for point, color in zip(scene.points.xyz[0], taught.points.features[0], strict=True):
        np.testing.assert_array_equal(color, colors[tuple(point)])


def test_a_teacher_that_differs_in_features_only_shares_the_geometry():
    config = tiny_config()
    pyramid = votenet.pyramid_config(config.detector)
    scene, built, taught = PreparedScenes(SOURCE, config, pyramid, True, InputConfig((), pyramid)).prepare(0)
    assert taught.pyramid is built
    assert taught.points.features.shape == (256, 0)
    assert scene.points.features.shape == (256, 1)


def test_colour_that_the_source_lacks_is_an_error():
    config = tiny_config()
    source = [{key: value for key, value in make_sample(0).items() if key != "color"}]
    pyramid = votenet.pyramid_config(config.detector)
    with pytest.raises(ValueError, match="reads colour but this cloud has none"):
        PreparedScenes(source, config, pyramid, False, InputConfig(("color",), pyramid)).prepare(0)
