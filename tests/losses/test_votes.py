import numpy as np

from vrdistill_jax.losses.votes import vote_distance, vote_targets


def test_targets_follow_slots_and_empty_slots_repeat_the_first():
    instance = np.array([[[1, 0, -1], [-1, -1, -1], [0, -1, -1]]])
    center = np.array([[[1.0, 0, 0], [0, 2.0, 0]]], np.float32)
    targets, on_object = vote_targets(instance, center, np.array([[2, 0, 1]]))
    np.testing.assert_array_equal(on_object, [[True, True, False]])
    np.testing.assert_array_equal(targets[0, 0], [[1, 0, 0]] * 3)
    np.testing.assert_array_equal(targets[0, 1], [[0, 2, 0], [1, 0, 0], [0, 2, 0]])


def test_distance_is_l1_to_the_nearest_target():
    vote = np.array([[[0.0, 0.0, 0.0]]], np.float32)
    targets = np.array([[[[1.0, 1.0, 0.0], [0.5, 0.0, -1.0]]]], np.float32)
    np.testing.assert_allclose(vote_distance(vote, targets), [[1.5]])
