import numpy as np
import pytest
from oracles.augmentation import crop_is_allowed
from scenes import make_sample

from vrdistill_jax.data.crops import crop_sample, take_boxes, take_points


def wide_sample(seed: int, num_boxes: int = 3, num_points: int = 2000) -> dict:
    """A cloud that fills its extent, so that a crop leaves points behind."""
    rng = np.random.default_rng(seed)
    sample = make_sample(seed, num_boxes, num_points)
    return sample | {"xyz": rng.uniform(-3, 3, (num_points, 3)).astype(np.float32)}


def crop(sample, seed, min_share=0.5, min_aspect=0.8, min_points=400):
    return crop_sample(sample, min_share, min_aspect, min_points, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_is_one_that_the_reference_could_make(seed):
    sample = wide_sample(seed)
    part = crop(sample, seed)
    assert 400 <= len(part["xyz"]) < 2000
    assert crop_is_allowed(sample["xyz"], part["xyz"], sample["boxes_center"], part["boxes_center"], 0.5, 400)
    share = np.ptp(part["xyz"], axis=0) / np.ptp(sample["xyz"], axis=0)
    assert (share <= 1).all()


def test_points_boxes_and_instances_stay_together():
    removed = 0
    for seed in range(20):
        sample = wide_sample(seed) | {"vote_center": np.arange(9, dtype=np.float32).reshape(3, 3)}
        row_of = {tuple(p): row for row, p in enumerate(sample["xyz"])}
        box_of = {tuple(c): row for row, c in enumerate(sample["boxes_center"])}
        part = crop(sample, seed)
        old_box = [box_of[tuple(c)] for c in part["boxes_center"]]
        assert old_box == sorted(old_box)
        for name in ("boxes_size", "boxes_yaw", "boxes_label", "vote_center"):
            np.testing.assert_array_equal(part[name], sample[name][old_box])
        for point, color, instance in zip(part["xyz"], part["color"], part["instance"], strict=True):
            row = row_of[tuple(point)]
            np.testing.assert_array_equal(color, sample["color"][row])
            old = sample["instance"][row]
            assert instance == (old_box.index(old) if old in old_box else -1)
        removed += 3 - len(old_box)
    assert removed > 0


def test_the_share_and_the_aspect_bound_the_cuboid():
    """Points on the three axes measure the cuboid; most others, its centres, lie at the origin."""
    line = np.linspace(-3, 3, 601, dtype=np.float32)
    axes = np.concatenate([line[:, None] * np.eye(3, dtype=np.float32)[axis] for axis in range(3)])
    xyz = np.concatenate([np.zeros((40000, 3), np.float32), axes])
    sample = wide_sample(0, num_boxes=0) | {"xyz": xyz, "color": None, "instance": np.full(len(xyz), -1)}
    shares = []
    for seed in range(100):
        part = crop(sample, seed, 0.6, 0.95, 1)["xyz"]
        low, high = part.min(axis=0), part.max(axis=0)
        if np.allclose(low, -high, atol=1e-5):  # centred at the origin: no side sticks out of the cloud
            shares.append(np.sort((high - low) / 6))
    assert len(shares) > 80
    small, middle, large = np.transpose(shares)
    assert 0.59 < small.min() < 0.65
    assert 0.95 < large.max() <= 1
    assert (np.maximum(small / middle, middle / large) > 0.94).all()
    assert (small / large).min() < 0.75  # one pair is enough


def test_too_few_points_left_means_no_crop():
    sample = wide_sample(0)
    part = crop(sample, 0, min_share=0.5, min_points=10**9)  # 60 % of a small cloud
    assert part is sample or len(part["xyz"]) >= 1200
    corners = np.repeat(np.array([[0, 0, 0], [1, 1, 1]], np.float32), 50, axis=0)
    apart = sample | {"xyz": corners, "color": None, "instance": np.full(100, -1, np.int32)}
    assert crop(apart, 0, 0.5, 0.0, 100) is apart  # half of the points can be reached at most


def test_small_clouds_must_keep_sixty_percent():
    counts = [len(crop(wide_sample(1), seed, 0.5, 0.0, 30000)["xyz"]) for seed in range(30)]
    cropped = [count for count in counts if count < 2000]
    assert len(cropped) > 3
    assert min(cropped) >= 1200


def test_at_least_one_box_remains():
    sample = wide_sample(0, num_boxes=1)
    sample["boxes_center"] = np.array([[2.9, 2.9, 2.9]], np.float32)  # a corner that few crops reach
    kept = 0
    for seed in range(30):
        part = crop(sample, seed, min_points=100)
        assert len(part["boxes_center"]) == 1
        kept += part is not sample
    assert kept > 0
    sample["boxes_center"] += 100  # out of reach: never cropped
    assert crop(sample, 0, min_points=100) is sample


def test_scenes_without_boxes_or_colour_are_cropped():
    sample = wide_sample(0, num_boxes=0)
    del sample["color"]
    part = crop(sample, 0)
    assert len(part["xyz"]) < 2000
    assert len(part["instance"]) == len(part["xyz"])
    assert "color" not in part


def test_take_points_and_boxes():
    sample = make_sample(0, num_points=6) | {"instance": np.array([0, 1, 2, -1, 2, 0], np.int32)}
    part = take_boxes(take_points(sample, np.array([4, 1, 3, 0])), np.array([False, True, True]))
    np.testing.assert_array_equal(part["instance"], [1, 0, -1, -1])
    np.testing.assert_array_equal(part["xyz"], sample["xyz"][[4, 1, 3, 0]])
    np.testing.assert_array_equal(part["boxes_label"], sample["boxes_label"][1:])
    none = take_boxes(sample, np.zeros(3, bool))
    assert (none["instance"] == -1).all()
    assert none["boxes_center"].shape == (0, 3)
