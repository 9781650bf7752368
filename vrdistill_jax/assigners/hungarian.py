"""One-to-one matching of predictions and boxes at minimum total cost, inside jit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# What a search has come to, where it has not found a free query (a row >= 0).
_SEARCHING, _WITHOUT_QUERY, _NOTHING = -1, -2, -3


def match_boxes(
    cost: Float[Array, "*b q g"], query_mask: Bool[Array, "*b q"], box_mask: Bool[Array, "*b g"]
) -> Int[Array, "*b q"]:
    """Gives every box a query of its own so that the sum of the costs is the smallest possible.

    Boxes are added one by one; each time the cheapest chain of reassignments that makes room is found by Dijkstra's
    algorithm on reduced costs (Jonker and Volgenant's shortest augmenting paths). That is exact up to float32 rounding, and
    no step of it leaves the device.

    Args:
      cost: f32[..., Q, G]; entries that are not finite count as worse than all finite ones.
      query_mask: bool[..., Q]; pads are matched with nothing.
      box_mask: bool[..., G]; likewise.

    Returns:
      i32[..., Q] the box of each query, -1 none. min(valid queries, valid boxes) queries have one: where there are fewer
      queries than boxes, the boxes left out are those that make the sum smallest. No gradients.

    Source: scipy.optimize.linear_sum_assignment (its result, where the minimum is unique).
    """
    cost = jax.lax.stop_gradient(jnp.swapaxes(cost, -1, -2)).astype(jnp.float32)
    *batch, num_boxes, num_queries = cost.shape
    matched = jax.vmap(_match_one)(
        cost.reshape(-1, num_boxes, num_queries),
        query_mask.reshape(-1, num_queries),
        box_mask.reshape(-1, num_boxes),
    )
    return matched.reshape(*batch, num_queries)


def _match_one(cost, query_mask, box_mask):
    """i32[Q] for cost f32[G, Q]."""
    num_boxes, num_queries = cost.shape
    real = query_mask & box_mask[:, None]
    finite = real & jnp.isfinite(cost)
    largest = jnp.max(jnp.where(finite, jnp.abs(cost), 0.0)) + 1.0
    cost = jnp.where(finite, cost, 2.0 * largest)
    # To be left without a query costs more than any chain of reassignments can save.
    penalty = (4.0 * min(num_boxes, num_queries) + 4.0) * largest

    def add_box(box, state):
        box_price, query_price, box_of_query, query_of_box = state

        def search(carry):
            outcome, at, length, lengths, parent, seen, out_length, out_box = carry
            through = length + cost[at] - box_price[at] - query_price
            better = query_mask & ~seen & (through < lengths)
            lengths, parent = jnp.where(better, through, lengths), jnp.where(better, at, parent)
            leave = length + penalty - box_price[at]
            out_length, out_box = jnp.minimum(leave, out_length), jnp.where(leave < out_length, at, out_box)
            open_lengths = jnp.where(seen, jnp.inf, lengths)
            query = jnp.argmin(open_lengths).astype(jnp.int32)
            give_up = out_length <= open_lengths[query]
            owner = box_of_query[query]
            outcome = jnp.where(give_up, _WITHOUT_QUERY, jnp.where(owner < 0, query, _SEARCHING))
            length = jnp.where(give_up, out_length, open_lengths[query])
            seen = seen.at[query].max(~give_up)
            return outcome, jnp.maximum(owner, 0), length, lengths, parent, seen, out_length, out_box

        start = (
            jnp.where(box_mask[box], _SEARCHING, _NOTHING),
            box,
            jnp.float32(0),
            jnp.full(num_queries, jnp.inf),
            jnp.full(num_queries, -1, jnp.int32),
            jnp.zeros(num_queries, bool),
            jnp.float32(jnp.inf),
            box,
        )
        outcome, _, length, lengths, parent, seen, _, out_box = jax.lax.while_loop(
            lambda carry: carry[0] == _SEARCHING, search, start
        )

        # Prices change so that no reduced cost is negative and those on the path are zero.
        box_length = jnp.where(query_of_box >= 0, lengths[query_of_box], jnp.inf).at[box].set(0.0)
        reached = jnp.where(query_of_box >= 0, seen[query_of_box], False).at[box].set(box_mask[box])
        box_price = box_price + jnp.where(reached, length - box_length, 0.0)
        query_price = query_price - jnp.where(seen, length - lengths, 0.0)

        # The path is walked back: each query on it goes to the box that reached it.
        left_out = (outcome == _WITHOUT_QUERY) & (out_box != box)
        free = jnp.where(outcome >= 0, outcome, jnp.where(left_out, query_of_box[out_box], -1))
        query_of_box = query_of_box.at[out_box].set(jnp.where(left_out, -1, query_of_box[out_box]))

        def hand_over(carry):
            query, box_of_query, query_of_box = carry
            taker = parent[query]
            given_up = query_of_box[taker]  # -1 for the new box, where the path begins
            return given_up, box_of_query.at[query].set(taker), query_of_box.at[taker].set(query)

        _, box_of_query, query_of_box = jax.lax.while_loop(
            lambda carry: carry[0] >= 0, hand_over, (free, box_of_query, query_of_box)
        )
        return box_price, query_price, box_of_query, query_of_box

    state = (
        jnp.zeros(num_boxes),
        jnp.zeros(num_queries),
        jnp.full(num_queries, -1, jnp.int32),
        jnp.full(num_boxes, -1, jnp.int32),
    )
    return jax.lax.fori_loop(0, num_boxes, add_box, state)[2]
