import jax
import numpy as np

from vrdistill_jax.distillers.matching import find_nearest, gather_points
from vrdistill_jax.structs import PointSet


def points(seed, count, size=3, batch=2):
    rng = np.random.default_rng(seed)
    return PointSet(
        rng.normal(size=(batch, count, 3)).astype(np.float32),
        rng.normal(size=(batch, count, size)).astype(np.float32),
        rng.random((batch, count)) < 0.7,
        np.stack([rng.permutation(50)[:count] for _ in range(batch)]).astype(np.int32),
    )


def test_nearest_valid_target_in_loops():
    query, target = points(0, 9), points(1, 12)
    squared, index = find_nearest(query.xyz, target.xyz, target.mask)
    for b in range(2):
        for m in range(9):
            distances = {
                n: float(np.sum((query.xyz[b, m] - target.xyz[b, n]) ** 2))
                for n in range(12)
                if target.mask[b, n]
            }
            best = min(distances, key=distances.get)
            assert index[b, m] == best
            np.testing.assert_allclose(squared[b, m], distances[best], rtol=1e-5)


def test_matching_has_no_gradient_and_survives_an_empty_teacher():
    query, target = points(0, 4), points(1, 5)
    empty = np.zeros_like(target.mask)
    gradient = jax.grad(lambda x: find_nearest(x, target.xyz, target.mask)[0].sum())(query.xyz)
    np.testing.assert_array_equal(gradient, 0)
    squared, index = find_nearest(query.xyz, target.xyz, empty)
    assert np.isfinite(squared).all()
    np.testing.assert_array_equal(index, 0)


def test_gather_points_takes_every_field_and_hides_missing_rows():
    source = points(2, 6)._replace(mask=np.array([[True] * 6, [False] * 6]))
    taken = gather_points(source, np.array([[5, -1, 0], [1, 1, -1]]))
    np.testing.assert_array_equal(taken.xyz[0, 0], source.xyz[0, 5])
    np.testing.assert_array_equal(taken.features[1, 1], source.features[1, 1])
    np.testing.assert_array_equal(taken.seed_index[0, 2], source.seed_index[0, 0])
    np.testing.assert_array_equal(taken.mask, [[True, False, True], [False, False, False]])
