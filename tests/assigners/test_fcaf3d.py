import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anchor_scenes import NUM_CLASSES, make_boxes
from oracles import assigners as oracle

from vrdistill_jax.assigners import fcaf3d
from vrdistill_jax.assigners.assignment import Anchors, Task
from vrdistill_jax.structs import Boxes

CONFIG = fcaf3d.default_config()
STRIDES = (0.16, 0.32, 0.64)


def lattice(seed=0, strides=STRIDES, share=0.8, extent=2.2, pads=5) -> Anchors:
    """Two scenes of anchors at most cells of a lattice around the origin, shifted a little against it."""
    rng = np.random.default_rng(seed)
    xyz, mask, level = [], [], []
    for row, stride in enumerate(strides):
        steps = np.arange(-int(extent / stride), int(extent / stride)) * stride
        grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
        scenes = np.stack([np.pad(grid + rng.uniform(0, 0.01, 3), ((0, pads), (0, 0))) for _ in range(2)])
        xyz.append(scenes.astype(np.float32))
        mask.append((rng.random(scenes.shape[:2]) < share) & (np.arange(len(grid) + pads) < len(grid)))
        level.append(np.full(len(grid) + pads, row, np.int32))
    xyz, mask, level = np.concatenate(xyz, 1), np.concatenate(mask, 1), np.concatenate(level)
    shape = mask.shape
    return Anchors(
        xyz, mask, np.ones((*shape, 7), np.float32), np.zeros((*shape, NUM_CLASSES), np.float32), level,
        np.asarray(strides, np.float32)[level],
    )  # fmt: skip


@jax.jit
def assign(anchors, boxes):
    return fcaf3d.assign(anchors, boxes, CONFIG, Task(True)).gt_index


def test_against_loops():
    anchors, levels, contested = lattice(), set(), 0
    for seed in range(3):
        boxes = make_boxes(seed, (5, 3))
        boxes = boxes._replace(size=boxes.size * np.array([1, 2, 1.3, 0.4, 1, 1], np.float32)[None, :, None])
        result = np.asarray(assign(anchors, boxes))
        for row in range(2):
            scene = Anchors(*(x[row] for x in anchors[:4]), *anchors[4:])
            expected = oracle.fcaf3d(scene, Boxes(*(x[row] for x in boxes)))
            np.testing.assert_array_equal(result[row], expected)
            levels |= set(anchors.level[expected >= 0].tolist())
            contested += sum(0 < np.sum(expected == g) < 18 for g in range(5))
    assert levels == {0, 1, 2}, "every level was chosen once"
    assert contested, "some box lost anchors to a smaller one"


def single(xyz, level=0, sizes=((1, 1, 1),)):
    """Anchors at given places of one scene, boxes at the origin."""
    xyz = np.asarray(xyz, np.float32)[None]
    shape, count = xyz.shape[:2], len(sizes)
    zero = np.zeros((1, count, 3), np.float32)
    return Anchors(
        xyz, np.ones(shape, bool), np.ones((*shape, 7), np.float32), np.zeros((*shape, 4), np.float32),
        np.full(shape[1], level, np.int32), np.ones(shape[1], np.float32),
    ), Boxes(
        zero, np.asarray(sizes, np.float32)[None], zero[..., 0], np.zeros((1, count), np.int32),
        np.ones((1, count), bool), zero,
    )  # fmt: skip


def positives(xyz, k=18, **scene):
    config = fcaf3d.default_config()
    config.k = k
    return np.asarray(fcaf3d.assign(*single(xyz, **scene), config, Task(True)).gt_index)[0].tolist()


def test_faces_do_not_belong_to_the_box():
    assert positives([(0, 0, 0), (0.49, 0, 0), (0.5, 0, 0), (0, 0, -0.5)]) == [0, 0, -1, -1]


def test_ties_at_the_border_drop_out():
    xyz = [(0, 0, 0), (0.1, 0, 0), (0.2, 0, 0), (-0.2, 0, 0), (0.4, 0, 0)]
    assert positives(xyz, k=3) == [0, 0, -1, -1, -1]
    assert positives(xyz, k=2) == [0, 0, -1, -1, -1]
    assert positives(xyz, k=5) == [0] * 5


def test_the_smaller_box_wins():
    xyz = [(0, 0, 0), (0.4, 0, 0)]
    assert positives(xyz, sizes=((1, 1, 1), (0.5, 1, 1))) == [1, 0]


def test_a_box_with_few_anchors_stays_on_the_finest_level():
    assert positives([(0, 0, 0)], level=1) == [-1]
    assert positives([(0, 0, 0)], level=0) == [0]


def test_centreness_by_hand_and_its_gradient():
    box = jnp.array([1.0, 0, 0, 2, 1, 1, 0])
    distances = fcaf3d.face_distances(jnp.array([0.5, 0, 0]), box)
    np.testing.assert_allclose(distances, [0.5, 1.5, 0.5, 0.5, 0.5, 0.5], atol=1e-6)
    assert fcaf3d.centerness(distances) == pytest.approx((1 / 3) ** 0.5)
    assert fcaf3d.centerness(fcaf3d.face_distances(jnp.array([3.0, 0, 0]), box)) == 0
    turned = fcaf3d.face_distances(jnp.array([1.0, 0.5, 0]), box.at[6].set(np.pi / 2))
    np.testing.assert_allclose(turned, [1.5, 0.5, 0.5, 0.5, 0.5, 0.5], atol=1e-6)
    for at in (0.5, 3.0, 1.0):
        gradient = jax.grad(lambda x: fcaf3d.centerness(fcaf3d.face_distances(x, box)))(jnp.array([at, 0, 0]))
        assert np.isfinite(gradient).all()
