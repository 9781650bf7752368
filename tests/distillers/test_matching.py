import jax
import numpy as np

from vrdistill_jax.distillers import matching
from vrdistill_jax.distillers.matching import find_nearest, gather_points, pair_points
from vrdistill_jax.structs import DetectorOutput, PointSet, Scene


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


def test_large_sets_are_searched_in_blocks_with_the_same_result(monkeypatch):
    query, target = points(0, 150), points(1, 40)
    whole = find_nearest(query.xyz, target.xyz, target.mask)
    monkeypatch.setattr(matching, "LARGE", 1)
    jax.tree.map(np.testing.assert_array_equal, find_nearest(query.xyz, target.xyz, target.mask), whole)


def pairs_of(student, teacher):
    scene = Scene(None, None, None, None, None, np.ones(2, bool))
    outputs = [DetectorOutput(None, {"seeds": points}, None) for points in (student, teacher)]
    return pair_points(*outputs, scene, "seeds")


def test_the_same_rows_of_the_cloud_are_paired_as_they_are():
    """Also where another row lies nearer: votes move."""
    student = points(0, 9)
    teacher = points(1, 9, size=5)._replace(seed_index=student.seed_index)
    pairs = pairs_of(student, teacher)
    np.testing.assert_array_equal(pairs.mask, student.mask & teacher.mask)
    np.testing.assert_array_equal(pairs.student[pairs.mask], student.features[pairs.mask])
    np.testing.assert_array_equal(pairs.teacher[pairs.mask], teacher.features[pairs.mask])
    np.testing.assert_array_equal(pairs.xyz[pairs.mask], teacher.xyz[pairs.mask])


def test_other_rows_are_paired_with_the_nearest():
    for count in (9, 12):  # as many points in both, and more in the teacher
        student, teacher = points(0, 9), points(1, count, size=5)
        pairs = pairs_of(student, teacher)
        np.testing.assert_array_equal(pairs.mask, student.mask)
        np.testing.assert_array_equal(pairs.seed_index, student.seed_index)
        for b, m in np.argwhere(student.mask):
            distances = np.sum((teacher.xyz[b] - student.xyz[b, m]) ** 2, -1)
            best = np.where(teacher.mask[b], distances, np.inf).argmin()
            np.testing.assert_array_equal(pairs.teacher[b, m], teacher.features[b, best])
            np.testing.assert_array_equal(pairs.xyz[b, m], student.xyz[b, m])


def test_no_gradient_reaches_the_teacher_either_way():
    for seed in (0, 1):
        student, teacher = points(0, 9), points(seed, 9)

        def total(features, student=student, teacher=teacher):
            pairs = pairs_of(student, teacher._replace(features=features))
            return pairs.teacher.sum() + pairs.student.sum()

        np.testing.assert_array_equal(jax.grad(total)(teacher.features), 0)


def test_a_teacher_without_points_pairs_nothing():
    student, teacher = points(0, 9), points(1, 12)
    pairs = pairs_of(student, teacher._replace(mask=np.zeros_like(teacher.mask)))
    assert not pairs.mask.any()
    np.testing.assert_array_equal(pairs.teacher, 0)
