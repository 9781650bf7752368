"""What holds for every assigner: pads, empty scenes, transformations, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anchor_scenes import LABEL_LEVELS, make_anchors, make_boxes
from oracles import assigners as oracle

from vrdistill_jax.assigners import ASSIGNERS, find_assigner
from vrdistill_jax.assigners.assignment import Anchors, Task, assign_scenes, select_lowest

TASK = Task(rotated=True, label_levels=LABEL_LEVELS)
VARIANTS = {name: {} for name in ASSIGNERS} | {"spota_sinkhorn": {"transport": "sinkhorn"}}


def make_assign(variant, task=TASK):
    file = find_assigner(variant.split("_sinkhorn")[0])
    config = file.default_config()
    config.update(VARIANTS[variant])
    return lambda anchors, boxes: file.assign(anchors, boxes, config, task)


@functools.cache
def compiled(variant, task):
    return jax.jit(make_assign(variant, task))


def assign(variant, anchors, boxes, task=TASK):
    return compiled(variant, task)(anchors, boxes)


@pytest.fixture(scope="module")
def scene():
    boxes = make_boxes(1)
    return make_anchors(boxes, 2), boxes


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def plain(variant, scene):
    return assign(variant, *scene)


def test_assigns_real_anchors_to_real_boxes_with_their_iou(variant, scene, plain):
    anchors, boxes = scene
    index = np.asarray(plain.gt_index)
    assert index.dtype == np.int32
    assert (index[~anchors.mask] == -1).all()
    for b, count in enumerate((4, 2)):
        assert set(index[b]) <= set(range(-1, count))
        for a in np.flatnonzero(index[b] >= 0):
            box = oracle.rows_of(jax.tree.map(lambda x, b=b: x[b], boxes))[index[b, a]]
            expected = oracle.geometry.iou(box, anchors.boxes[b, a].astype(float))
            assert plain.quality[b, a] == pytest.approx(expected, abs=1e-5)
    assert (np.asarray(plain.quality)[index < 0] == 0).all()
    if variant != "fcaf3d":  # which takes anchors inside only: two of these boxes hold none
        assert len(set(index[0])) == 5, "every box of the first scene has a positive"


def test_more_padding_and_garbage_in_pads_change_nothing(variant, scene, plain):
    anchors, boxes = scene
    batch, count = anchors.mask.shape
    extra = 7

    def pad(x, axis, value):
        width = [(0, 0)] * x.ndim
        width[axis] = (0, extra)
        return np.pad(x, width, constant_values=value)

    logits = pad(anchors.class_logits, 1, 9.0)
    more = Anchors(
        pad(anchors.xyz, 1, 0.1), pad(anchors.mask, 1, False), pad(anchors.boxes, 1, 1.0), logits,
        pad(anchors.level, 0, 1), pad(anchors.stride, 0, 0.16),
    )  # fmt: skip
    empty = ~more.mask[..., None]
    more = more._replace(
        xyz=np.where(empty, boxes.center[:, :1], more.xyz),
        boxes=np.where(
            empty, np.concatenate([boxes.center, boxes.size, boxes.yaw[..., None]], -1)[:, :1], more.boxes
        ),
    )
    boxes = jax.tree.map(lambda x: pad(x, 1, 1), boxes)._replace(mask=pad(boxes.mask, 1, False))
    unused = ~boxes.mask
    boxes = boxes._replace(label=np.where(unused, 1, boxes.label), yaw=np.where(unused, 0.3, boxes.yaw))
    padded = assign(variant, more, boxes)
    np.testing.assert_array_equal(padded.gt_index[:, :count], plain.gt_index)
    assert (np.asarray(padded.gt_index)[:, count:] == -1).all()
    np.testing.assert_allclose(padded.quality[:, :count], plain.quality, atol=1e-6)
    assert batch == 2


def test_scenes_without_boxes_or_anchors_have_no_positives(variant, scene):
    anchors, boxes = scene
    for changed in (
        (anchors, boxes._replace(mask=np.zeros_like(boxes.mask))),
        (anchors._replace(mask=np.zeros_like(anchors.mask)), boxes),
    ):
        result = assign(variant, *changed)
        assert (np.asarray(result.gt_index) == -1).all()
        assert (np.asarray(result.quality) == 0).all()


def test_scenes_do_not_influence_each_other(variant, scene, plain):
    anchors, boxes = scene
    other = make_boxes(8, (4, 0))
    mixed_boxes = jax.tree.map(lambda a, b: np.stack([a[0], b[1]]), boxes, other)
    mixed = make_anchors(other, 9)
    first, second = (
        Anchors(*(x[row : row + 1] for x in a[:4]), *a[4:]) for a, row in ((anchors, 0), (mixed, 1))
    )
    joined = Anchors(
        *(np.concatenate(pair) for pair in zip(first[:4], second[:4], strict=True)), *anchors[4:]
    )
    np.testing.assert_array_equal(assign(variant, joined, mixed_boxes).gt_index[0], plain.gt_index[0])


def test_order_of_boxes_does_not_matter(variant, scene, plain):
    anchors, boxes = scene
    order = np.array([3, 5, 0, 2, 1, 4])
    shuffled = assign(variant, anchors, jax.tree.map(lambda x: x[:, order], boxes)).gt_index
    names = np.append(order, -1)
    np.testing.assert_array_equal(names[np.asarray(shuffled)], plain.gt_index)


def test_axis_aligned_boxes(variant):
    boxes = make_boxes(5, rotated=False)
    anchors = make_anchors(boxes, 6)
    aligned = assign(variant, anchors, boxes, Task(False, LABEL_LEVELS)).gt_index
    np.testing.assert_array_equal(aligned, assign(variant, anchors, boxes).gt_index)
    assert (np.asarray(aligned) >= 0).sum() >= 6


def test_no_gradient_passes(variant, scene):
    anchors, boxes = scene
    function = make_assign(variant)

    def quality(predicted, logits):
        return function(anchors._replace(boxes=predicted, class_logits=logits), boxes).quality

    inputs = (anchors.boxes, anchors.class_logits)
    traced = jax.make_jaxpr(lambda *tangents: jax.jvp(quality, inputs, tangents)[1])(*inputs)
    # The tangent does not depend on the inputs' tangents: nothing is differentiated.
    used = {str(v) for equation in traced.eqns for v in equation.invars}
    assert not used & {str(v) for v in traced.jaxpr.invars}


@pytest.mark.parametrize("conflict", ["claimants", "all"])
def test_selection_against_loops(conflict):
    rng = np.random.default_rng(0)
    select = jax.jit(lambda cost, count: select_lowest(cost, count, 5, conflict))
    contested = 0
    for _ in range(40):
        cost = rng.uniform(0, 1, (5, 12)).astype(np.float32)
        cost[:, 0] *= 0.1  # everybody wants it
        cost[rng.random(cost.shape) < 0.2] = np.inf
        count = rng.integers(0, 6, 5).astype(np.int32)
        result = np.asarray(select(cost, count))
        np.testing.assert_array_equal(result, oracle.select(cost, count, conflict))
        contested += int((result >= 0).sum() < np.minimum(count, np.isfinite(cost).sum(1)).sum())
    assert contested > 20


def test_selection_with_fewer_anchors_than_wanted():
    cost = np.array([[1.0, np.inf], [2.0, 3.0]], np.float32)
    np.testing.assert_array_equal(select_lowest(cost, np.array([6, 6]), 6), [0, 1])


def test_masked_anchors_are_dropped_whatever_an_assigner_says(scene):
    anchors, boxes = scene
    result = assign_scenes(lambda a, b: jnp.zeros(a.mask.shape, jnp.int32), anchors, boxes, True)
    np.testing.assert_array_equal(result.gt_index, np.where(anchors.mask, 0, -1))
    np.testing.assert_allclose(
        assign_scenes(lambda a, b: jnp.full(a.mask.shape, 5), anchors, boxes, True).quality, 0
    )


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown assigner 'spotta'; known: alignota, fcaf3d, ota, simota, spota, top_k"
    ):
        find_assigner("spotta")
