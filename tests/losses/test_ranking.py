import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import ranking as oracle

from vrdistill_jax.losses import ranking


def config_with(**changes):
    config = ranking.default_config()
    config.update(changes)
    return config


def random_groups(rng, count, num_groups=4):
    return rng.integers(-1, num_groups, count).astype(np.int32)


@pytest.mark.parametrize("normalizer", ["count", "others", "inclusive"])
def test_soft_rank_against_loops(normalizer):
    rng = np.random.default_rng(0)
    rank = jax.jit(lambda v, g: ranking.soft_rank(v, g, 0.1, normalizer))
    for _ in range(5):
        values, group = rng.random(40).astype(np.float32), random_groups(rng, 40)
        expected = oracle.soft_rank(values, group, 0.1, normalizer)
        np.testing.assert_allclose(rank(values, group), expected, atol=1e-6)
    assert np.ptp(expected) > 0.5


def test_soft_rank_becomes_the_hard_rank():
    rng = np.random.default_rng(1)
    values, group = rng.permutation(24).astype(np.float32) / 24, np.repeat(np.arange(4, dtype=np.int32), 6)
    hard = np.array([np.sum(values[group == g] > v) / 6 for v, g in zip(values, group, strict=True)])
    gaps = [
        np.abs(ranking.soft_rank(values, group, temperature) - hard).max()
        for temperature in (1.0, 0.1, 0.01, 1e-3)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[0] > 0.2
    assert gaps[3] < 1e-6
    soft = np.exp(-np.asarray(ranking.soft_rank(values, group, 1e-3)))
    np.testing.assert_allclose([soft.max(), soft.min()], [1.0, np.exp(-5 / 6)], rtol=1e-5)


def test_order_groups_and_outsiders_do_not_matter():
    rng = np.random.default_rng(2)
    values, group = rng.random(30).astype(np.float32), random_groups(rng, 30)
    plain = np.asarray(ranking.soft_rank(values, group, 0.05))
    order = rng.permutation(30)
    np.testing.assert_allclose(ranking.soft_rank(values[order], group[order], 0.05), plain[order], atol=1e-6)
    changed = np.where(group < 0, 9.0, values)
    np.testing.assert_allclose(ranking.soft_rank(changed, group, 0.05), plain, atol=1e-6)
    assert (plain[group < 0] == 0).all()


def test_lonely_and_absent_positives():
    np.testing.assert_array_equal(ranking.soft_rank(jnp.ones(3), jnp.array([-1, 2, -1]), 0.1), 0)
    np.testing.assert_array_equal(ranking.soft_rank(jnp.ones(3), jnp.array([-1, -1, -1]), 0.1), 0)


def test_a_group_of_any_size():
    values = np.random.default_rng(3).random(300).astype(np.float32)
    group = np.zeros(300, np.int32)
    np.testing.assert_allclose(
        ranking.soft_rank(values, group, 0.1), oracle.soft_rank(values, group, 0.1), atol=1e-5
    )


def test_gradient_of_the_soft_rank_against_finite_differences():
    rng = np.random.default_rng(4)
    values, group, weight = rng.random(20).astype(np.float32), random_groups(rng, 20, 3), rng.normal(size=20)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(weight * ranking.soft_rank(v, group, 0.3))))(values)
    step = 1e-5
    expected = [
        (weight * (oracle.soft_rank(values + d, group, 0.3) - oracle.soft_rank(values - d, group, 0.3))).sum()
        / (2 * step)
        for d in step * np.eye(20)
    ]
    np.testing.assert_allclose(gradient, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def make_positives(seed=5, scenes=2, count=25, classes=3):
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, (scenes, count, classes)).astype(np.float32)
    gt_index = np.stack([random_groups(rng, count, 3) for _ in range(scenes)])
    label = np.where(gt_index >= 0, gt_index % classes, -1).astype(np.int32)
    quality = np.where(gt_index >= 0, rng.random((scenes, count)), 0).astype(np.float32)
    return logits, label, quality, gt_index


@pytest.mark.parametrize(
    "changes",
    [{"rdl_variant": variant, "beta": beta} for variant in ranking.RDL_VARIANTS for beta in (1.0, 2.0)]
    + [
        {"temperature": 0.1, "rank_normalizer": "others"},
        {"rank_scale": 3.0, "rank_normalizer": "inclusive"},
        {"score_group": "scene"},
        {"scale_other_classes": True},
        {"detach": False},
    ],
)
def test_rank_aware_loss_against_loops(changes):
    config = config_with(**changes)
    logits, label, quality, gt_index = make_positives()
    got = ranking.rank_aware_loss(logits, label, quality, gt_index, config)
    for row in range(2):
        expected = oracle.rank_aware(logits[row], label[row], quality[row], gt_index[row], config)
        np.testing.assert_allclose(got[row], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ranking.RDL_VARIANTS)
def test_gradient_with_constant_ranks_against_finite_differences(variant):
    rng = np.random.default_rng(6)
    logit, quality, rank = rng.normal(0, 1.5, 12), rng.random(12), rng.random(12)
    soft = np.exp(-rank)
    gradient = jax.grad(
        lambda z: jnp.sum(ranking.rank_distillation_loss(z, quality, rank, soft, 1.5, variant))
    )(jnp.asarray(logit, jnp.float32))
    step = 1e-5
    ends = [
        oracle.distillation(oracle.sigmoid(logit + s), quality, rank, soft, 1.5, variant)
        for s in (step, -step)
    ]
    np.testing.assert_allclose(gradient, (ends[0] - ends[1]) / (2 * step), atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("printed", [0.00, 0.29, 0.39, 0.41, 0.41, 0.41]),
        ("rank_pos", [0.80, 0.69, 0.61, 0.52, 0.42, 0.35]),
        ("rank_neg", [1.0, 0.91, 0.81, 0.66, 0.47, 0.28]),
    ],
)
def test_where_the_loss_wants_the_scores(variant, expected):
    """The score that minimises each variant, for six positives ranked by IoU."""
    quality = np.array([0.75, 0.62, 0.55, 0.43, 0.30, 0.18])
    rank = oracle.soft_rank(quality, np.zeros(6, int), 0.01)
    grid = np.linspace(-9, 9, 2001)
    values = ranking.rank_distillation_loss(
        jnp.asarray(grid)[:, None], quality, rank, np.exp(-rank), 1.0, variant
    )
    best = oracle.sigmoid(grid[np.argmin(np.asarray(values), 0)])
    np.testing.assert_allclose(best, expected, atol=0.012)


def test_detached_targets_pass_no_gradient_and_others_do():
    logits, label, quality, gt_index = make_positives()
    for detach in (True, False):
        gradient = jax.grad(
            lambda q, d=detach: jnp.sum(
                ranking.rank_aware_loss(logits, label, q, gt_index, config_with(detach=d))
            )
        )(quality)
        assert np.isfinite(gradient).all()
        assert (np.abs(np.asarray(gradient)).max() > 0) == (not detach)


@pytest.mark.parametrize("variant", ["printed", "rank_neg"])
def test_extreme_inputs_are_finite(variant):
    logits, label, quality, gt_index = make_positives()
    config = config_with(rdl_variant=variant)
    function = jax.jit(
        jax.value_and_grad(lambda z, q: jnp.sum(ranking.rank_aware_loss(z, label, q, gt_index, config)))
    )
    for scale in (0.0, 100.0):
        for overlap in (0.0, 1.0):
            value, gradient = function(logits * np.float32(scale), jnp.full_like(quality, overlap))
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()


def test_scores_of_labelled_classes():
    logits, label, _, gt_index = make_positives()
    scores = np.asarray(ranking.labelled_scores(logits, label))
    row, anchor = np.argwhere(gt_index >= 0)[3]
    assert scores[row, anchor] == pytest.approx(
        oracle.sigmoid(logits[row, anchor, label[row, anchor]]), abs=1e-6
    )


@pytest.mark.parametrize("name", ["rdl_variant", "rank_normalizer", "score_group"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 'best'; expected"):
        ranking.rank_aware_loss(*make_positives(), config_with(**{name: "best"}))
