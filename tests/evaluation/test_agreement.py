import numpy as np
import pytest

from vrdistill_jax.evaluation.agreement import Agreement, RecallByVolume, match_boxes


def boxes(*centers, size=1.0):
    return np.array([[x, 0, 0, size, size, size, 0] for x in centers], float).reshape(-1, 7)


def test_pairs_are_one_to_one_and_of_one_class():
    a, b = boxes(0, 0.1, 5), boxes(0.05, 5)
    # Both of the first two overlap b[0] equally: only one of them gets it. The last is of another class.
    partner = match_boxes(a, [0, 0, 1], b, [0, 0], 0.5)
    assert sorted(partner[:2]) == [-1, 0]
    assert partner[2] == -1


def test_largest_overlap_goes_first():
    np.testing.assert_array_equal(match_boxes(boxes(0.4, 0.1), [0, 0], boxes(0.0), [0], 0.1), [-1, 0])


def test_agreement_is_the_share_with_a_partner():
    agreement = Agreement(0.5)
    agreement.add(boxes(0, 3, 6), [0, 0, 0], boxes(0), [0])
    assert agreement.compute() == pytest.approx(2 / 4)
    agreement.add(boxes(), [], boxes(), [])
    assert agreement.compute() == pytest.approx(2 / 4)
    assert np.isnan(Agreement().compute())


def test_recall_by_volume():
    recall = RecallByVolume(0.25, (0.1, 0.5))
    truth = np.concatenate([boxes(0, 2, size=0.4), boxes(4, size=0.7), boxes(8, size=2.0)])
    recall.add(truth[[0, 3]], [0, 1], truth, [0, 0, 0, 1])
    result = recall.compute()
    assert result["<=0.1"] == {"recall": 0.5, "num_gt": 2}
    assert result["<=0.5"] == {"recall": 0.0, "num_gt": 1}
    assert result[">0.5"] == {"recall": 1.0, "num_gt": 1}
    assert np.isnan(RecallByVolume().compute()[">0.5"]["recall"])
