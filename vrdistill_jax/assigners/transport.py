"""Assignment as optimal transport: boxes supply labels, anchors demand one each, the background supplies the rest."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def solve_transport(
    cost: Float[Array, "g a"],
    background: Float[Array, " a"],
    supply: Int[Array, " g"],
    box_mask: Bool[Array, " g"],
    anchor_mask: Bool[Array, " a"],
    epsilon: float,
    iterations: int,
) -> Float[Array, "g1 a"]:
    """Entropic optimal transport plan by a fixed number of Sinkhorn iterations.

    Args:
      cost: f32[G, A] finite in real pairs.
      background: f32[A] cost of giving an anchor no box.
      supply: i32[G] labels that each box hands out; scaled down together where there are fewer anchors than labels.
      box_mask: bool[G]; padded boxes supply nothing.
      anchor_mask: bool[A]; padded anchors demand nothing.
      epsilon: strength of the entropy, in units of the cost; towards 0 the plan is that of the linear programme.
      iterations: of Sinkhorn, a fixed number (a multiple of 10).

    Returns:
      f32[G + 1, A] plan in labels per anchor: columns sum to 1 on real anchors; the last row is the background. No
      gradients.

    Source: OTA (Ge et al., 2021), equation 1; the solver is ott-jax.
    """
    # Slow to import, and needed only here.
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    count = jnp.maximum(jnp.sum(anchor_mask), 1).astype(cost.dtype)
    labels = jnp.where(box_mask, supply, 0).astype(cost.dtype)
    labels = labels * jnp.minimum(1.0, count / jnp.maximum(jnp.sum(labels), 1.0))
    supplies = jnp.append(labels, jnp.maximum(count - jnp.sum(labels), 0.0)) / count
    demands = anchor_mask.astype(cost.dtype) / count
    table = jnp.concatenate([jnp.where(box_mask[:, None], cost, 0.0), background[None]])
    table = jax.lax.stop_gradient(jnp.where(anchor_mask[None], table, 0.0))
    # A number for epsilon: its default would come from statistics of the whole table, pads included.
    problem = LinearProblem(Geometry(cost_matrix=table, epsilon=epsilon), supplies, demands)
    # The number of iterations is fixed: a threshold on the error of the marginals would be met at once, since the whole
    # supply of a box is a tiny share of all labels.
    solver = Sinkhorn(min_iterations=iterations, max_iterations=iterations)
    return jax.lax.stop_gradient(solver(problem).matrix) * count


def select_from_plan(plan: Float[Array, "g1 a"]) -> Int[Array, " a"]:
    """Gives each anchor to the supplier that sends it most, each measured by the most that it sends to any anchor.

    Without that scaling the background, which has most of the labels, would win everywhere.

    Args:
      plan: f32[G + 1, A], of `solve_transport`.

    Returns:
      i32[A] row of the box, -1 for the background and where nothing arrives.

    Source: OTA's released code.
    """
    most = jnp.max(plan, axis=1, keepdims=True)
    share = jnp.where(most > 0, plan / jnp.where(most > 0, most, 1.0), 0.0)
    owner = jnp.argmax(share, axis=0)
    taken = (owner < plan.shape[0] - 1) & (jnp.max(share, axis=0) > 0)
    return jnp.where(taken, owner, -1).astype(jnp.int32)
