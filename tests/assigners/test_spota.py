import jax
import numpy as np
import pytest
from anchor_scenes import LABEL_LEVELS, make_anchors, make_boxes, take_scene
from oracles import assigners as oracle
from scipy.optimize import linear_sum_assignment

from vrdistill_jax.assigners import costs, spota
from vrdistill_jax.assigners.assignment import Task

TASK = Task(True, LABEL_LEVELS)


def config_with(**changes):
    config = spota.default_config()
    config.update(changes)
    return config


def compiled(config, task=TASK):
    return jax.jit(lambda anchors, boxes: spota.assign(anchors, boxes, config, task).gt_index)


def scenes(count=4, rotated=True, noise=0.15):
    for seed in range(count):
        boxes = make_boxes(seed, (4, 2), rotated=rotated)
        yield make_anchors(boxes, seed + 50, counts=(60, 20), noise=noise), boxes


def real_pairs(table, anchors, boxes):
    return np.asarray(table)[boxes.mask][:, anchors.mask]


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("vertex", [True, False])
def test_cost_and_selection_against_loops(rotated, vertex):
    config = config_with(vertex_distance=vertex, mu=0.7)
    task = Task(rotated, LABEL_LEVELS)
    assign = compiled(config, task)
    cost = jax.jit(lambda anchors, boxes: spota.pair_costs(anchors, boxes, config, rotated))
    for anchors, boxes in scenes(2, rotated):
        result = assign(anchors, boxes)
        for row in range(2):
            scene = take_scene(anchors, boxes, row)
            expected = oracle.spota_cost(*scene, rotated, 0.7, vertex)
            got = cost(*scene)
            np.testing.assert_allclose(
                real_pairs(got, *scene), real_pairs(expected, *scene), atol=2e-5, rtol=1e-5
            )
            np.testing.assert_array_equal(result[row], oracle.select(expected, [6] * len(expected)))


@pytest.mark.parametrize("frame", ["world", "box", "canonical"])
@pytest.mark.parametrize("match", ["fixed", "min"])
def test_vertex_distance_against_loops(frame, match):
    anchors, boxes = take_scene(*next(scenes()), 0)
    rows = oracle.rows_of(boxes)
    got = costs.vertex_distances(anchors, boxes, True, frame=frame, match=match)
    expected = oracle.pair_table(
        anchors,
        boxes,
        lambda g, a: oracle.vertex_distance(anchors.boxes[a].astype(float), rows[g], True, match, frame),
    )
    np.testing.assert_allclose(
        real_pairs(got, anchors, boxes), real_pairs(expected, anchors, boxes), atol=1e-5
    )
    assert np.asarray(got).min() >= 0
    assert real_pairs(got, anchors, boxes).max() <= 1


def test_vertex_distance_of_all_corners_against_loops():
    anchors, boxes = take_scene(*next(scenes()), 0)
    rows = oracle.rows_of(boxes)
    expected = oracle.pair_table(
        anchors, boxes, lambda g, a: oracle.vertex_distance_of_all(anchors.boxes[a].astype(float), rows[g])
    )
    got = costs.vertex_distances(anchors, boxes, True, vertices="all")
    np.testing.assert_allclose(
        real_pairs(got, anchors, boxes), real_pairs(expected, anchors, boxes), atol=1e-5
    )


def test_the_names_of_a_box_matter_only_with_fixed_vertices():
    anchors, boxes = take_scene(*next(scenes()), 0)
    rows = oracle.rows_of(boxes)[0]
    for n, naming in enumerate(oracle.namings_of(rows)):
        same = anchors._replace(boxes=np.tile(np.float32(naming), (len(anchors.mask), 1)))
        fixed, least = (
            costs.vertex_distances(same, boxes, True, match=match)[0, 0] for match in ("fixed", "min")
        )
        assert least == pytest.approx(0, abs=1e-6)
        assert (fixed > 0.1) == (n > 0)


def test_degenerate_boxes_have_finite_costs():
    anchors, boxes = take_scene(*next(scenes()), 0)
    flat = anchors._replace(boxes=np.zeros_like(anchors.boxes))
    assert np.isfinite(spota.pair_costs(flat, boxes._replace(size=boxes.size * 0), config_with(), True)).all()


def test_center_prior_forms():
    anchors, boxes = take_scene(*next(scenes()), 0)
    cost = {form: spota.pair_costs(anchors, boxes, config_with(center_prior=form, mu=2.0), True) for form in
            ("none", "printed", "growing", "additive")}  # fmt: skip
    squared = np.asarray(costs.center_distances(anchors, boxes))
    np.testing.assert_allclose(
        cost["printed"], cost["none"] * (1 - np.exp(-2 * squared)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(cost["growing"], cost["none"] * np.exp(2 * squared), rtol=1e-4)
    np.testing.assert_allclose(cost["additive"], cost["none"] + 2 * (1 - np.exp(-squared)), rtol=1e-4)
    near, far = np.argmin(squared[0]), np.argmax(np.where(anchors.mask, squared[0], -1))

    def emphasis(form, mu):
        """How much more a far anchor costs than a near one with the same prediction."""
        same = anchors._replace(boxes=np.tile(anchors.boxes[:1], (len(anchors.mask), 1)))
        table = spota.pair_costs(same, boxes, config_with(center_prior=form, mu=mu), True)
        return table[0, far] / table[0, near]

    assert emphasis("printed", 10.0) < emphasis("printed", 0.1), "as printed, a larger mu means less centre"
    assert emphasis("growing", 2.0) > emphasis("growing", 0.1)


def test_distance_in_strides():
    anchors, boxes = take_scene(*next(scenes()), 0)
    metres, strides = (np.asarray(costs.center_distances(anchors, boxes, x)) for x in (False, True))
    np.testing.assert_allclose(metres, strides * anchors.stride**2, rtol=1e-4)
    cost = spota.pair_costs(anchors, boxes, config_with(distance_unit="stride"), True)
    plain = spota.pair_costs(anchors, boxes, config_with(center_prior="none"), True)
    np.testing.assert_allclose(cost, plain * (1 - np.exp(-strides)), rtol=1e-4, atol=1e-6)


def test_class_cost_is_added():
    anchors, boxes = take_scene(*next(scenes()), 0)
    difference = spota.pair_costs(anchors, boxes, config_with(class_weight=0.5), True) - spota.pair_costs(
        anchors, boxes, config_with(), True
    )
    expected = oracle.pair_table(
        anchors, boxes, lambda g, a: 0.5 * oracle.class_cost(anchors, boxes, g, a, oracle.focal)
    )
    np.testing.assert_allclose(
        real_pairs(difference, anchors, boxes), real_pairs(expected, anchors, boxes), atol=1e-4
    )


@pytest.mark.parametrize(
    "changes", [{"candidates": "in_box"}, {"candidates": "in_center"}, {"restrict_levels": True}], ids=str
)
def test_restrictions(changes):
    assign = compiled(config_with(**changes))
    for anchors, boxes in scenes(2):
        result = np.asarray(assign(anchors, boxes))
        for row in range(2):
            scene = take_scene(anchors, boxes, row)
            inside, central = (
                oracle.pair_table(
                    *scene, lambda g, a, s=scene, n=n: oracle.inside_and_central(*s, g, a)[n], 0
                )
                == 1
                for n in (0, 1)
            )
            level = np.array([LABEL_LEVELS[k] if k >= 0 else -1 for k in scene[1].label])
            allowed = level[:, None] == scene[0].level[None]
            if "candidates" in changes:
                allowed = inside if changes["candidates"] == "in_box" else central
            cost = oracle.spota_cost(*scene)
            expected = oracle.select(np.where(allowed, cost, np.inf), [6] * len(cost))
            np.testing.assert_array_equal(result[row], expected)
            assert (expected != oracle.select(cost, [6] * len(cost))).any()


def test_dynamic_k_and_refill():
    anchors, boxes = next(scenes(noise=0.05))
    dynamic = np.asarray(compiled(config_with(dynamic_k=True))(anchors, boxes))
    for row in range(2):
        scene = take_scene(anchors, boxes, row)
        cost = oracle.spota_cost(*scene)
        counts = np.zeros(len(cost), int)
        for g in oracle.real_rows(scene[1].mask):
            counts[g] = oracle.dynamic_count(
                [oracle.iou(*scene, g, a) for a in oracle.real_rows(scene[0].mask)], 10
            )
        assert counts.max() > 6
        np.testing.assert_array_equal(dynamic[row], oracle.select(cost, counts))
    # Two boxes in the same place compete for the same anchors; the one that loses is served again.
    twins = jax.tree.map(
        lambda x: np.where(np.arange(6).reshape(-1, *[1] * (x.ndim - 2)) == 1, x[:, :1], x), boxes
    )
    counts = {
        rounds: np.bincount(
            np.asarray(compiled(config_with(refill_rounds=rounds))(anchors, twins))[0] + 1, minlength=7
        )[1:5]
        for rounds in (0, 6)
    }
    assert counts[0].min() == 0
    np.testing.assert_array_equal(counts[6], 6)


def test_transport_is_the_optimal_assignment_of_the_same_cost():
    assign = compiled(config_with(transport="sinkhorn", epsilon=1e-3, iterations=2000))
    shares = []
    for anchors, boxes in scenes(2):
        result = np.asarray(assign(anchors, boxes))
        for row in range(2):
            scene = take_scene(anchors, boxes, row)
            cost = oracle.spota_cost(*scene)
            gts, real = oracle.real_rows(scene[1].mask), oracle.real_rows(scene[0].mask)
            labels = np.repeat(gts, 6)
            best = linear_sum_assignment(cost[labels][:, real])
            expected = np.full(len(scene[0].mask), -1)
            expected[np.array(real)[best[1]]] = labels[best[0]]
            shares.append(float((result[row] == expected)[expected >= 0].mean()))
            chosen = result[row] >= 0
            total = cost[result[row][chosen], np.flatnonzero(chosen)].sum()
            assert chosen.sum() == pytest.approx(6 * len(gts), abs=2)
            assert total == pytest.approx(cost[labels][:, real][best].sum(), rel=0.1)
    assert np.mean(shares) > 0.9


@pytest.mark.parametrize("name", ["regression_cost", "vertex_frame", "center_prior", "transport", "conflict"])
def test_unknown_choices_are_refused(name):
    anchors, boxes = next(scenes())
    with pytest.raises(ValueError, match=f"{name} is 'best'; expected one of"):
        spota.assign(anchors, boxes, config_with(**{name: "best"}), TASK)
