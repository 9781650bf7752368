import jax
import numpy as np
import pytest
from oracles import assigners as oracle
from scipy.optimize import linear_sum_assignment

from vrdistill_jax.assigners.transport import select_from_plan, solve_transport

compiled = jax.jit(solve_transport, static_argnums=(5, 6))


def solve(cost, background, supply, epsilon=0.1, iterations=50, box_mask=None, anchor_mask=None):
    box_mask = np.ones(len(supply), bool) if box_mask is None else box_mask
    anchor_mask = np.ones(len(background), bool) if anchor_mask is None else anchor_mask
    plan = compiled(cost, background, np.asarray(supply), box_mask, anchor_mask, epsilon, iterations)
    return np.asarray(plan)


def random_problem(seed, boxes=3, anchors=15):
    rng = np.random.default_rng(seed)
    cost, background = rng.uniform(0, 1, (boxes, anchors)), rng.uniform(0, 1, anchors)
    return cost.astype(np.float32), background.astype(np.float32), rng.integers(1, 4, boxes)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_plain_sinkhorn(seed):
    cost, background, supply = random_problem(seed)
    table = np.concatenate([cost, background[None]]).astype(np.float64)
    supplies = np.append(supply, 15 - supply.sum()).astype(np.float64)
    expected = oracle.sinkhorn(table, supplies / 15, np.full(15, 1 / 15), 0.1, 50) * 15
    np.testing.assert_allclose(solve(cost, background, supply), expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_reaches_the_optimum_of_the_linear_programme(seed):
    cost, background, supply = random_problem(seed)
    copies = np.repeat(
        np.arange(4), [*supply, 15 - supply.sum()]
    )  # a label each: an ordinary assignment problem
    table = np.concatenate([cost, background[None]])
    best = table[copies][linear_sum_assignment(table[copies])].sum()
    plan = solve(cost, background, supply, epsilon=2e-3, iterations=3000)
    np.testing.assert_allclose(plan.sum(0), 1, atol=1e-2)
    np.testing.assert_allclose(plan[:-1].sum(1), supply, atol=1e-2)
    assert (plan * table).sum() == pytest.approx(best, rel=0.01)
    blurred = solve(cost, background, supply, epsilon=1.0)
    assert (blurred * table).sum() > 1.1 * best


def test_a_constant_background_does_not_matter():
    cost, background, supply = random_problem(7)
    plans = [solve(cost, np.full_like(background, value), supply) for value in (0.0, 5.0)]
    np.testing.assert_allclose(*plans, atol=1e-4)


def test_pads_carry_nothing():
    cost, background, supply = random_problem(3)
    small = solve(cost, background, supply)
    padded = solve(
        np.pad(cost, ((0, 2), (0, 4)), constant_values=7.0),
        np.pad(background, (0, 4)),
        np.pad(supply, (0, 2), constant_values=3),
        box_mask=np.arange(5) < 3,
        anchor_mask=np.arange(19) < 15,
    )
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[[0, 1, 2, 5], :15], small, atol=1e-5)
    assert (padded[3:5] == 0).all()
    assert (padded[:, 15:] == 0).all()


def test_more_labels_than_anchors_are_shared():
    cost, background, _ = random_problem(2, 3, 4)
    plan = solve(cost, background, [3, 3, 6])
    np.testing.assert_allclose(plan.sum(0), 1, atol=1e-3)
    np.testing.assert_allclose(plan.sum(1), [1, 1, 2, 0], atol=1e-2)


def test_selection_scales_rows():
    plan = np.array([[0.2, 0.1, 0.0, 0.0], [0.0, 0.05, 0.5, 0.0], [0.8, 0.85, 0.5, 0.0]], np.float32)
    np.testing.assert_array_equal(select_from_plan(plan), [0, -1, 1, -1])


def test_runs_under_vmap():
    problems = [random_problem(seed) for seed in range(3)]
    cost, background, supply = (np.stack(x) for x in zip(*problems, strict=True))
    ones = np.ones((3, 15), bool)
    plans = jax.vmap(lambda c, b, s, m: compiled(c, b, s, m[:3], m, 0.1, 50))(cost, background, supply, ones)
    for row, problem in enumerate(problems):
        np.testing.assert_allclose(plans[row], solve(*problem), atol=1e-5)
