import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vrdistill_jax.assigners.hungarian import match_boxes

match = jax.jit(match_boxes)


def total_cost(cost, box_of_query) -> float:
    rows = np.flatnonzero(box_of_query >= 0)
    return float(cost[rows, box_of_query[rows]].sum(dtype=np.float64))


def check_one_to_one(box_of_query, query_mask, box_mask):
    taken = box_of_query[box_of_query >= 0]
    assert len(set(taken.tolist())) == len(taken) == min(query_mask.sum(), box_mask.sum())
    assert box_mask[taken].all()
    assert (box_of_query[~query_mask] == -1).all()


def random_problems(seed, count, queries, boxes):
    """Costs, and masks of every share from none to all."""
    rng = np.random.default_rng(seed)
    cost = rng.normal(size=(count, queries, boxes)).astype(np.float32)
    query_mask = rng.random((count, queries)) < rng.choice([0.1, 0.5, 1.0], (count, 1))
    box_mask = rng.random((count, boxes)) < rng.choice([0.0, 0.3, 0.8, 1.0], (count, 1))
    return cost, query_mask, box_mask


@pytest.mark.parametrize(("queries", "boxes"), [(20, 6), (6, 20), (9, 9)])
def test_is_scipys_assignment(queries, boxes):
    cost, query_mask, box_mask = random_problems(queries, 60, queries, boxes)
    for one, q, g, ours in zip(
        cost, query_mask, box_mask, np.asarray(match(cost, query_mask, box_mask)), strict=True
    ):
        check_one_to_one(ours, q, g)
        expected = np.full(queries, -1)
        rows, columns = linear_sum_assignment(one[np.ix_(q, g)])
        expected[np.flatnonzero(q)[rows]] = np.flatnonzero(g)[columns]
        np.testing.assert_array_equal(ours, expected)


def test_equal_costs_still_give_the_smallest_sum():
    queries, boxes = 20, 6
    rng = np.random.default_rng(5)
    cost = rng.integers(0, 3, (60, queries, boxes)).astype(np.float32)
    every = np.ones((60, queries), bool), np.ones((60, boxes), bool)
    for one, ours in zip(cost, np.asarray(match(cost, *every)), strict=True):
        check_one_to_one(ours, every[0][0], every[1][0])
        rows, columns = linear_sum_assignment(one)
        assert total_cost(one, ours) == one[rows, columns].sum()


def test_as_large_as_detectors_need_it():
    cost = np.random.default_rng(0).uniform(-10, 10, (2, 3, 256, 64)).astype(np.float32)
    box_mask = np.arange(64) < np.array([64, 30, 1])[None, :, None]
    box_mask = np.broadcast_to(box_mask, (2, 3, 64))
    ours = np.asarray(match(cost, np.ones((2, 3, 256), bool), box_mask))
    assert ours.shape == (2, 3, 256)
    for at in np.ndindex(2, 3):
        count = box_mask[at].sum()
        rows, columns = linear_sum_assignment(cost[at][:, :count])
        expected = np.full(256, -1)
        expected[rows] = columns
        np.testing.assert_array_equal(ours[at], expected)


def test_boxes_must_sometimes_be_reassigned():
    """The second box takes the query of the first one, which moves on."""
    cost = np.array([[0.0, 0.0], [1.0, 9.0], [5.0, 9.0]], np.float32)
    np.testing.assert_array_equal(match(cost, np.ones(3, bool), np.ones(2, bool)), [1, 0, -1])


def test_with_too_few_queries_the_dearest_boxes_are_left_out():
    cost = np.array([[3.0, 1.0, 2.0, -4.0]], np.float32)
    np.testing.assert_array_equal(match(cost, np.ones(1, bool), np.ones(4, bool)), [3])
    np.testing.assert_array_equal(match(cost, np.ones(1, bool), np.array([1, 1, 1, 0], bool)), [1])


def test_pads_and_what_is_not_finite_change_nothing():
    cost, query_mask, box_mask = random_problems(3, 60, 20, 6)
    clean = match(cost, query_mask, box_mask)
    dirty = np.where(query_mask[..., None] & box_mask[:, None], cost, np.nan)
    np.testing.assert_array_equal(clean, match(dirty, query_mask, box_mask))
    cost[:, 0] = np.nan  # a query that nothing can be said about is the last choice
    cost[:, 1] = np.inf
    ours = np.asarray(match(cost, np.ones((60, 20), bool), np.ones((60, 6), bool)))
    assert (ours[:, :2] == -1).all()
    assert (np.sort(ours)[:, -6:] == np.arange(6)).all()
    nothing = match(np.full((4, 3), np.nan, np.float32), np.ones(4, bool), np.ones(3, bool))
    assert (np.asarray(nothing) >= 0).sum() == 3


def test_has_no_gradient():
    cost = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    every = jnp.ones(4, bool), jnp.ones(3, bool)

    def objective(cost):
        row = match_boxes(cost, *every)
        return jnp.sum(
            jnp.where(row >= 0, jnp.take_along_axis(cost, jnp.maximum(row, 0)[:, None], 1)[:, 0], 0.0)
        )

    gradient = np.asarray(jax.jit(jax.grad(objective))(cost))
    assert sorted(gradient.ravel()) == [0.0] * 9 + [1.0] * 3
