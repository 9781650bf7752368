import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import boxes as oracle

from vrdistill_jax.geometry import frames, iou

UNIT = [0.0, 0, 0, 1, 1, 1, 0]


def row(*values):
    return jnp.array(values, jnp.float32)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (UNIT, UNIT, 1),  # identical
        ([0, 0, 0, 1, 1, 1, 0.3], [0, 0, 0, 1, 1, 1, 0.3], 1),  # identical, turned
        ([0, 0, 0, 2, 1, 1, np.pi], [0, 0, 0, 2, 1, 1, 0], 1),  # half a turn is the same box
        ([0, 0, 0, 2, 1, 1, np.pi / 2], [0, 0, 0, 1, 2, 1, 0], 1),  # a quarter turn swaps length and width
        (UNIT, [1, 0, 0, 1, 1, 1, 0], 0),  # sharing a side face
        (UNIT, [0, -1, 0, 1, 1, 1, 0], 0),
        (UNIT, [1, 1, 0, 1, 1, 1, 0], 0),  # touching along an edge
        (UNIT, [0, 0, 1, 1, 1, 1, 0], 0),  # stacked
        (UNIT, [5, 0, 0, 1, 1, 1, 0.7], 0),  # apart
        (UNIT, [0, 0, 0, 0.5, 0.5, 0.5, 0.4], 1 / 8),  # contained
        ([0, 0, 0, 0.5, 0.5, 0.5, 0.4], UNIT, 1 / 8),
        (UNIT, [0.25, 0, 0, 0.5, 1, 1, 0], 1 / 2),  # contained, sharing faces
        (UNIT, [0.5, 0, 0, 1, 1, 1, 0], 1 / 3),  # shifted along shared edges
        (UNIT, [0.5, 0.5, 0.5, 1, 1, 1, 0], 1 / 15),
        (UNIT, [0, 0, 0, 1, 1, 1, np.pi / 4], (np.sqrt(8) - 2) / (4 - np.sqrt(8))),  # a regular octagon
        ([0, 0, 0, 4, 1, 1, 0], [0, 0, 0, 4, 1, 1, np.pi / 2], 1 / 7),  # a cross
        ([0, 0, 0, 1, 1, 1, np.pi / 4], [np.sqrt(2), 0, 0, 1, 1, 1, np.pi / 4], 0),  # corner to corner
    ],
)
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_rotated_iou_by_hand(a, b, expected, shift):
    a, b = (np.array(box, np.float32) + np.float32([shift, -shift, shift, 0, 0, 0, 0]) for box in (a, b))
    # Shifted coordinates are rounded to 6e-5 m before the function sees them; these are exact or nearly so.
    tolerance = 1e-6 if shift == 0 else 2e-4
    for first, second in ((a, b), (b, a)):
        value = float(iou.box_iou(jnp.asarray(first), jnp.asarray(second)))
        assert 0 <= value <= 1
        assert value == pytest.approx(expected, abs=tolerance)


def test_turning_both_boxes_together_changes_nothing():
    rng = np.random.default_rng(0)
    a, b = oracle.random_boxes(rng, 200), oracle.random_boxes(rng, 200)
    before = iou.box_iou(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    assert (before > 0.05).mean() > 0.2
    angle = 0.7
    for boxes in (a, b):
        boxes[:, :2] = np.stack(oracle.rotate(boxes[:, :2].T, angle), axis=-1)
        boxes[:, 6] += angle
    np.testing.assert_allclose(
        iou.box_iou(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), before, atol=3e-6
    )


def test_self_iou_is_one_for_any_box():
    rng = np.random.default_rng(1)
    size = 10 ** rng.uniform(-4, 1.3, (20000, 3))
    center = rng.uniform(-1, 1, (20000, 3)) * 10 ** rng.uniform(-3, 3, (20000, 1))
    boxes = jnp.asarray(np.concatenate([center, size, rng.uniform(-4, 4, (20000, 1))], axis=-1), jnp.float32)
    for function in (iou.box_iou, iou.bev_iou, iou.box_diou):
        for rotated in (True, False):
            np.testing.assert_allclose(function(boxes, boxes, rotated=rotated), 1, atol=1e-5)
    np.testing.assert_allclose(iou.box_giou(boxes, boxes, enclosing="oriented"), 1, atol=1e-5)
    np.testing.assert_allclose(iou.box_giou(boxes, boxes, rotated=False), 1, atol=1e-5)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("name", ["iou", "bev_iou", "giou", "diou"])
def test_against_polygon_clipping(name, rotated):
    rng = np.random.default_rng(2)
    a, b = oracle.random_boxes(rng, 25), oracle.random_boxes(rng, 30)
    expected = np.array([[getattr(oracle, name)(first, second, rotated) for second in b] for first in a])
    pairwise = {
        "iou": iou.pairwise_iou,
        "bev_iou": iou.pairwise_bev_iou,
        "giou": iou.pairwise_giou,
        "diou": iou.pairwise_diou,
    }[name]
    ours = jax.jit(lambda x, y: pairwise(x, y, rotated=rotated))(
        jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    )
    np.testing.assert_allclose(ours, expected, atol=3e-6)
    assert np.ptp(expected) > 0.3


def test_nearly_identical_boxes():
    # Tiny turns and shifts, where polygon clipping in float32 loses shared edges.
    rng = np.random.default_rng(3)
    a = oracle.random_boxes(rng, 300).astype(np.float32)
    for turn in (1e-7, 1e-5, 1e-3):
        for shift in (0, 1e-6, 1e-3):
            b = a + (rng.uniform(-1, 1, a.shape) * [shift, shift, shift, 0, 0, 0, turn]).astype(np.float32)
            expected = [oracle.iou(*pair) for pair in zip(a.astype(float), b.astype(float), strict=True)]
            ours = iou.box_iou(jnp.asarray(a), jnp.asarray(b))
            # The clipping oracle itself is trusted to 1e-6 here.
            np.testing.assert_allclose(ours, expected, atol=3e-6)


def test_rotated_equals_aligned_without_yaw():
    rng = np.random.default_rng(4)
    a, b = (jnp.asarray(oracle.random_boxes(rng, 100, yaw=False), jnp.float32) for _ in range(2))
    for function in (iou.pairwise_iou, iou.pairwise_giou, iou.pairwise_diou, iou.pairwise_bev_iou):
        np.testing.assert_allclose(function(a, b), function(a, b, rotated=False), atol=1e-6)


def test_empty_boxes_overlap_nothing():
    empty = jnp.array(
        [[0.0, 0, 0, 0, 1, 1, 0.2], [0, 0, 0, 1, -1, 1, 0], [0, 0, 0, -1, -1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]
    )
    others = jnp.concatenate([empty, row(*UNIT)[None]])
    for rotated in (True, False):
        assert (iou.pairwise_iou(empty, others, rotated=rotated) == 0).all()
        assert (iou.pairwise_iou(others, empty, rotated=rotated) == 0).all()
    assert iou.box_giou(empty[-1], empty[-1]) == -1
    # Disjoint GIoU still tells how far: a point 3 m from a unit cube.
    point = row(3, 0, 0, 0, 0, 0, 0)
    assert iou.box_giou(point, row(*UNIT)) == pytest.approx(1 / 3.5 - 1)


def test_giou_and_diou_by_hand():
    a, b = row(*UNIT), row(2, 0, 0, 1, 1, 1, 0)
    assert iou.box_giou(a, b) == pytest.approx(2 / 3 - 1)
    assert iou.box_diou(a, b) == pytest.approx(-4 / 11)
    turned = row(0, 0, 0, 2, 2, 1, np.pi / 4)
    assert iou.box_giou(turned, turned) == pytest.approx(0.5)  # its axis-aligned hull has twice the area
    np.testing.assert_allclose(iou.enclosing_size(a, b), [3, 1, 1])
    np.testing.assert_allclose(iou.enclosing_size(turned, turned), [np.sqrt(8), np.sqrt(8), 1], rtol=1e-6)


def test_values_and_gradients_are_finite_for_coincident_and_degenerate_boxes():
    rng = np.random.default_rng(5)

    def pool(count):
        center = rng.choice([-0.5, 0, 0.5, 1000], (count, 3))
        size = rng.choice(
            [-1, 0, 1e-20, 1e-6, 1, 2, 1000], (count, 3), p=[0.1, 0.1, 0.05, 0.1, 0.3, 0.3, 0.05]
        )
        yaw = rng.choice([0, 1e-20, 1e-7, 0.3, np.pi / 4, np.pi / 2, np.pi, -np.pi], (count, 1))
        return np.concatenate([center, size, yaw], axis=-1).astype(np.float32)

    a, b = pool(4000), pool(4000)
    b[:1000] = a[:1000]

    oriented_giou = functools.partial(iou.box_giou, enclosing="oriented")
    rotated = [iou.box_iou, iou.box_giou, iou.box_diou, oriented_giou]
    aligned = [iou.bev_iou, iou.box_giou, iou.box_diou]
    for function in rotated + [functools.partial(f, rotated=False) for f in aligned]:

        def total(x, y, f=function):
            values = f(x, y)
            return values.sum(), values

        gradients, values = jax.jit(jax.grad(total, (0, 1), has_aux=True))(a, b)
        assert np.isfinite(values).all()
        assert np.abs(values).max() <= 1
        for gradient in gradients:
            assert np.isfinite(gradient).all()
            assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("name", ["iou", "giou", "diou"])
def test_gradients_match_finite_differences(name):
    rng = np.random.default_rng(6)
    a, b = oracle.random_boxes(rng, 20, spread=0.4), oracle.random_boxes(rng, 20, spread=0.4)
    function = {"iou": iou.box_iou, "giou": iou.box_giou, "diou": iou.box_diou}[name]
    gradient = jax.grad(lambda x: function(x, jnp.asarray(b, jnp.float32)).sum())(jnp.asarray(a, jnp.float32))
    step, naive = 1e-6, getattr(oracle, name)
    for box, other, ours in zip(a, b, gradient, strict=True):
        expected = [(naive(box + d, other) - naive(box - d, other)) / (2 * step) for d in step * np.eye(7)]
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_batched_pairwise_and_vmap_agree():
    rng = np.random.default_rng(7)
    a = jnp.asarray(oracle.random_boxes(rng, 12), jnp.float32).reshape(3, 4, 7)
    b = jnp.asarray(oracle.random_boxes(rng, 15), jnp.float32).reshape(3, 5, 7)
    batched = jax.jit(iou.pairwise_giou)(a, b)
    assert batched.shape == (3, 4, 5)
    np.testing.assert_allclose(batched, jax.jit(jax.vmap(iou.pairwise_giou))(a, b), atol=1e-6)
    np.testing.assert_allclose(batched[1, 2, 3], jax.jit(iou.box_giou)(a[1, 2], b[1, 3]), atol=1e-6)


def test_unknown_enclosing_is_refused():
    with pytest.raises(ValueError, match="'aligned' or 'oriented'"):
        iou.box_giou(row(*UNIT), row(*UNIT), enclosing="tight")


@pytest.mark.data
@pytest.mark.parametrize(("kind", "num_missed"), [("none", 0), ("small", 21), ("full", 131)])
def test_3detr_giou(shared, kind, num_missed):
    """Equal to 3DETR's TorchScript path wherever its shortcut lets the pair through.

    The shortcut takes corners 2 and 0 for the lowest and the highest; where that makes an overlapping pair
    look apart it answers 0. Those pairs are counted and are the only ones that may differ.
    """
    stored = np.load(shared / "golden/giou/giou_3detr.npz")

    def read(side):
        fields = [stored[f"{kind}_{side}_{name}"] for name in ("center", "size", "angle")]
        return jnp.asarray(
            frames.boxes_from_votenet(np.concatenate([*fields[:2], fields[2][..., None]], -1), "full")
        )

    a, b = read("a"), read("b")
    real = np.arange(b.shape[1]) < stored[f"{kind}_nums_k2"][:, None, None]
    real = np.broadcast_to(real, (a.shape[0], a.shape[1], b.shape[1]))
    volume = np.asarray(iou.box_intersection(a[:, :, None], b[:, None]))
    differs = (np.abs(volume - stored[f"{kind}_inter_vol_torchscript"]) > 1e-5) & real
    assert differs.sum() == num_missed
    assert (stored[f"{kind}_inter_vol_torchscript"][differs] == 0).all()
    corners_a, corners_b = (stored[f"{kind}_corners_{side}"][..., [0, 2]] for side in "ab")
    low = np.maximum(corners_a[:, :, None, 2], corners_b[:, None, :, 2])
    high = np.minimum(corners_a[:, :, None, 0], corners_b[:, None, :, 0])
    assert (low >= high).any(-1)[differs].all()
    giou = np.asarray(iou.pairwise_giou(a, b))
    np.testing.assert_allclose(
        giou[real & ~differs], stored[f"{kind}_giou_torchscript"][real & ~differs], atol=1e-6
    )
    if kind == "none":
        aligned = np.asarray(iou.pairwise_giou(a, b, rotated=False))
        np.testing.assert_allclose(aligned[real], stored["none_giou_rotated_boxes_false"][real], atol=1e-6)
