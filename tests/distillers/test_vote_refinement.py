import jax
import numpy as np
import pytest
from oracles import vrdistill as oracle
from vote_scenes import B, C, M, make_votes, shaken

from vrdistill_jax.distillers.vote_refinement import MultiHeadAttention, VoteRefinement, attention_bias
from vrdistill_jax.structs import PointSet


@pytest.mark.parametrize("cross_query", ["refined", "initial"])
def test_untrained_refinement_is_the_identity_bit_for_bit(cross_query):
    votes = make_votes(pads=3)
    module = VoteRefinement(C, layers=3, heads=2, cross_query=cross_query)
    refined, _ = module.init_with_output(jax.random.key(0), votes)
    jax.tree.map(np.testing.assert_array_equal, refined, votes)
    moved = module.apply({"params": shaken(module.init(jax.random.key(0), votes)["params"])}, votes)
    assert np.abs(moved.xyz - votes.xyz).max() > 0.01
    assert np.abs(moved.features - votes.features).max() > 0.01


@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("neighbors", [3, M])
def test_attention_matches_the_oracle(sign, neighbors):
    votes, memory = make_votes(0), make_votes(1, count=11, pads=2)
    module = MultiHeadAttention(C, 2)
    bias = attention_bias(votes.xyz, memory.xyz, memory.mask, neighbors, sign)
    params = shaken(module.init(jax.random.key(0), votes.features, memory.features, bias)["params"])
    got = module.apply({"params": params}, votes.features, memory.features, bias)
    for b in range(B):
        want, weights = oracle.attention(
            votes.features[b],
            memory.features[b],
            votes.xyz[b],
            memory.xyz[b],
            memory.mask[b],
            jax.tree.map(np.asarray, params),
            2,
            neighbors,
            sign,
        )
        np.testing.assert_allclose(got[b], want, atol=1e-5)
        assert ((weights > 0).sum(-1) == min(neighbors, 9)).all()


def test_each_attention_row_has_k_entries_also_with_ties_and_few_keys():
    xyz = np.zeros((1, 6, 3), np.float32)  # all coincide
    mask = np.array([[True, True, True, True, False, True]])
    for neighbors, expected in ((1, 1), (3, 3), (5, 5), (6, 5), (9, 5)):
        bias = attention_bias(xyz, xyz, mask, neighbors)
        weights = jax.nn.softmax(bias, -1)
        assert ((np.asarray(weights) > 0).sum(-1) == expected).all()
        assert (np.asarray(weights)[..., 4] == 0).all()
    nothing = jax.nn.softmax(attention_bias(xyz, xyz, np.zeros((1, 6), bool), 3), -1)
    assert np.isfinite(nothing).all()


def test_all_neighbors_without_bias_are_plain_attention():
    votes = make_votes(0)
    np.testing.assert_array_equal(attention_bias(votes.xyz, votes.xyz, votes.mask, M, 0), 0)


def test_refinement_is_permutation_equivariant_and_ignores_pads():
    votes = make_votes(0, pads=4)
    module = VoteRefinement(C, layers=2, heads=2)
    params = {"params": shaken(module.init(jax.random.key(0), votes)["params"], scale=0.1)}
    refined = module.apply(params, votes)
    order = np.random.default_rng(3).permutation(M)
    permuted = module.apply(params, PointSet(*(field[:, order] for field in votes)))
    np.testing.assert_allclose(permuted.xyz, refined.xyz[:, order], atol=1e-5)
    np.testing.assert_allclose(permuted.features, refined.features[:, order], atol=1e-4)
    garbage = votes._replace(
        xyz=np.where(votes.mask[..., None], votes.xyz, 7.0),
        features=np.where(votes.mask[..., None], votes.features, 1e3),
    )
    again = module.apply(params, garbage)
    real = np.asarray(votes.mask)
    np.testing.assert_array_equal(np.asarray(again.xyz)[real], np.asarray(refined.xyz)[real])
    np.testing.assert_array_equal(np.asarray(again.features)[real], np.asarray(refined.features)[real])
