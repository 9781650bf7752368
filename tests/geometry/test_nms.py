import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import boxes as oracle

from vrdistill_jax.geometry import nms as module

nms = jax.jit(module.nms, static_argnames=("threshold", "overlap", "denominator"))


def picked(kept):
    order, mask = np.asarray(kept.order), np.asarray(kept.mask)
    return order[mask[order]].tolist()


def aligned_overlap(function):
    return lambda a, b: function(oracle.axis_aligned(a), oracle.axis_aligned(b))


def covered_share(intersection, measure):
    return lambda better, candidate: intersection(better, candidate) / measure(candidate)


OVERLAPS = {
    ("rotated", "union"): oracle.iou,
    ("aligned", "union"): aligned_overlap(oracle.iou),
    ("bev_rotated", "union"): oracle.bev_iou,
    ("bev_aligned", "union"): aligned_overlap(oracle.bev_iou),
    ("rotated", "candidate"): covered_share(oracle.intersection, oracle.volume),
    ("aligned", "candidate"): aligned_overlap(covered_share(oracle.intersection, oracle.volume)),
    ("bev_rotated", "candidate"): covered_share(oracle.bev_intersection, lambda box: box[3] * box[4]),
    ("bev_aligned", "candidate"): aligned_overlap(
        covered_share(oracle.bev_intersection, lambda box: box[3] * box[4])
    ),
}


@pytest.mark.parametrize(("overlap", "denominator"), OVERLAPS)
@pytest.mark.parametrize("per_class", [False, True])
def test_picks_match_the_greedy_oracle(overlap, denominator, per_class):
    rng = np.random.default_rng(0)
    boxes = oracle.random_boxes(rng, 60)
    score, label, mask = rng.random(60), rng.integers(0, 3, 60), rng.random(60) < 0.8
    expected = oracle.greedy_nms(
        boxes, score, 0.2, OVERLAPS[overlap, denominator], label if per_class else None, mask
    )
    kept = nms(
        jnp.asarray(boxes, jnp.float32),
        jnp.asarray(score, jnp.float32),
        jnp.asarray(mask),
        jnp.asarray(label) if per_class else None,
        threshold=0.2,
        overlap=overlap,
        denominator=denominator,
    )
    assert 3 < len(expected) < mask.sum()
    assert picked(kept) == expected


def line_of_boxes(*centers):
    return jnp.array([[center, 0, 0, 1, 1, 1, 0] for center in centers], jnp.float32)


def test_a_suppressed_box_does_not_suppress():
    # The second overlaps both neighbours; once the first has removed it, the third stays.
    assert picked(nms(line_of_boxes(0, 0.6, 1.2), jnp.array([0.9, 0.8, 0.7]), threshold=0.1)) == [0, 2]


def test_a_long_chain_is_resolved_exactly():
    # Each box overlaps the next only: every second one is kept, and it takes a round for each link.
    score = jnp.linspace(1, 0, 41)
    assert picked(nms(line_of_boxes(*np.arange(41) * 0.6), score, threshold=0.1)) == list(range(0, 41, 2))


def test_threshold_is_strict():
    boxes, score = line_of_boxes(0, 0.5), jnp.array([0.9, 0.8])
    share = {"denominator": "candidate"}  # exactly 1/2
    assert picked(nms(boxes, score, threshold=0.5, **share)) == [0, 1]
    assert picked(nms(boxes, score, threshold=0.4999, **share)) == [0]


def test_equal_scores_go_by_row():
    assert picked(nms(line_of_boxes(0, 0.1, 5, 5.1), jnp.ones(4), threshold=0.25)) == [0, 2]


def test_old_type_measures_the_candidate():
    # The small box lies inside the big one: IoU 1/8, but all of it is covered.
    boxes = jnp.array([[0.0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0.5, 0.5, 0.5, 0]])
    big_first, small_first = jnp.array([0.9, 0.8]), jnp.array([0.8, 0.9])
    assert picked(nms(boxes, big_first, threshold=0.25)) == [0, 1]
    assert picked(nms(boxes, big_first, threshold=0.25, denominator="candidate")) == [0]
    assert picked(nms(boxes, small_first, threshold=0.25, denominator="candidate")) == [1, 0]


def test_stacked_boxes_differ_only_in_bev():
    boxes = jnp.array([[0.0, 0, 0, 1, 1, 1, 0], [0, 0, 3, 1, 1, 1, 0]])
    score = jnp.array([0.9, 0.8])
    assert picked(nms(boxes, score, threshold=0.25)) == [0, 1]
    assert picked(nms(boxes, score, threshold=0.25, overlap="bev_aligned")) == [0]
    assert picked(nms(boxes, score, threshold=0.25, overlap="bev_rotated")) == [0]


def test_aligned_sees_the_hull_of_turned_boxes():
    # Two long thin boxes side by side at 45 degrees: apart, but their hulls overlap.
    boxes = jnp.array([[0.0, 0, 0, 3, 0.2, 1, np.pi / 4], [0.4, -0.4, 0, 3, 0.2, 1, np.pi / 4]], jnp.float32)
    score = jnp.array([0.9, 0.8])
    assert picked(nms(boxes, score, threshold=0.25)) == [0]
    assert picked(nms(boxes, score, threshold=0.25, overlap="rotated")) == [0, 1]


def test_masked_and_empty_boxes_suppress_nothing():
    boxes = jnp.array([[0.0, 0, 0, 1, 1, 1, 0], [0, 0, 0, -1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0]])
    score = jnp.array([0.9, 0.8, 0.7])
    for overlap in ("aligned", "rotated", "bev_aligned", "bev_rotated"):
        kept = nms(boxes, score, jnp.array([False, True, True]), threshold=0.25, overlap=overlap)
        assert picked(kept) == [1, 2]
        assert kept.order.tolist() == [1, 2, 0]
    assert not nms(boxes, score, jnp.zeros(3, bool), threshold=0.25).mask.any()


def test_vmap_and_garbage_in_masked_rows():
    rng = np.random.default_rng(1)
    boxes = jnp.asarray(oracle.random_boxes(rng, 60).reshape(3, 20, 7), jnp.float32)
    score, mask = jnp.asarray(rng.random((3, 20)), jnp.float32), jnp.asarray(rng.random((3, 20)) < 0.7)
    batched = jax.vmap(lambda b, s, m: nms(b, s, m, threshold=0.2).mask)
    expected = np.stack(
        [nms(b, s, m, threshold=0.2).mask for b, s, m in zip(boxes, score, mask, strict=True)]
    )
    np.testing.assert_array_equal(batched(boxes, score, mask), expected)
    garbage = jnp.where(mask[..., None], boxes, jnp.nan)
    np.testing.assert_array_equal(batched(garbage, jnp.where(mask, score, jnp.nan), mask), expected)


def test_unknown_switches_are_refused():
    boxes, score = line_of_boxes(0), jnp.ones(1)
    with pytest.raises(ValueError, match="bev_rotated"):
        nms(boxes, score, threshold=0.25, overlap="3d")
    with pytest.raises(ValueError, match="'union' or 'candidate'"):
        nms(boxes, score, threshold=0.25, denominator="old")


@pytest.mark.data
@pytest.mark.parametrize("number", range(4))
def test_votenet_picks(shared, number):
    stored = np.load(shared / "golden/eval/nms.npz")
    rows = stored[f"set{number}_boxes"]
    center, size = (rows[:, :3] + rows[:, 3:6]) / 2, rows[:, 3:6] - rows[:, :3]
    boxes = jnp.asarray(np.concatenate([center, size, np.zeros((len(rows), 1))], axis=-1), jnp.float32)
    score, label = jnp.asarray(rows[:, 6], jnp.float32), jnp.asarray(rows[:, 7], jnp.int32)
    for threshold in (0.25, 0.5):
        for kind, denominator in (("new", "union"), ("old", "candidate")):
            for name, overlap, classes in (
                ("nms3d", "aligned", None),
                ("nms3d_samecls", "aligned", label),
                ("nms2d", "bev_aligned", None),
            ):
                kept = nms(
                    boxes, score, label=classes, threshold=threshold, overlap=overlap, denominator=denominator
                )
                assert picked(kept) == stored[f"set{number}_iou{threshold}_{kind}_{name}"].tolist()
