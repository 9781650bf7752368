import jax
import numpy as np
import pytest
from scenes import make_sample, tiny_config

from vrdistill_jax.data.loader import evaluation_batches, train_batches
from vrdistill_jax.detectors import votenet

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
