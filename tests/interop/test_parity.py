"""The parity table."""

import numpy as np
import pytest

from vrdistill_jax.interop.parity import ParityTable

RNG = np.random.default_rng(0)


def stored(values, name="x", start=1, step=3):
    flat = values.astype(np.float32).reshape(-1)
    return {
        f"{name}__slice": flat[start::step],
        f"{name}__slice_start_step": np.array([start, step]),
        f"{name}__shape": np.array(values.shape),
        f"{name}__sum64": np.float64(flat.astype(np.float64).sum()),
        f"{name}__abssum64": np.float64(np.abs(flat.astype(np.float64)).sum()),
    }


def test_errors_are_relative_to_the_largest_value():
    table, theirs = ParityTable(), np.array([0.0, -10.0])
    assert table.add("a", theirs + 1e-4, theirs, 2e-5)
    assert not table.add("b", theirs + 1e-3, theirs, 2e-5)
    assert table.add("c", np.full(2, 1e-6), np.zeros(2), 1e-5)
    assert table.add("d", np.array(2.0), np.array(1.0), 0.1, scale=100)
    assert table.failed == ["b"]
    assert table.rows[1].error == pytest.approx(1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_fail_whatever_the_tolerance(bad):
    table = ParityTable()
    assert not table.add("ours", np.array([bad, 1]), np.ones(2), 1e9)
    assert not table.add("theirs", np.ones(2), np.array([bad, 1]), 1e9)


def test_other_shapes_fail_and_do_not_broadcast():
    table = ParityTable()
    assert not table.add("a", np.ones((2, 1)), np.ones((2, 3)), 1.0)
    assert not table.add_exact("b", np.ones(1, int), np.ones(3, int))
    assert not table.add_stored({"c": np.ones((2, 3))}, "c", np.ones((3, 2)), 1.0)


def test_integers_and_masks_are_compared_exactly():
    table = ParityTable()
    assert table.add_exact("a", np.array([True, False]), np.array([1, 0], np.uint8))
    assert not table.add_exact("b", np.array([1, 2]), np.array([1, 3]))
    assert table.add_exact("c", np.array([1, 2]), np.array([1, 3]), allowed=1)


def test_strided_arrays_are_compared_by_slice_and_sums():
    values = RNG.normal(size=(2, 5, 40)).astype(np.float32)
    golden, ours = stored(values), np.moveaxis(values, 1, -1)
    table = ParityTable()
    assert table.add_stored(golden, "x", ours, 1e-6, channels_first=True)
    assert table.rows[-1].shape == (2, 5, 40)
    assert not table.add_stored(golden, "x", values, 1e-6, channels_first=True)
    assert not table.add_stored(golden, "x", values[:, :, ::-1], 1e-6)
    assert not table.add_stored(golden, "y", values, 1e-6)


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: -x])
def test_an_error_outside_the_slice_shows_in_the_sums(change):
    values = np.abs(RNG.normal(size=300)).astype(np.float32)
    wrong = values.copy()
    wrong[0::3] = change(wrong[0::3])  # the slice holds rows 1, 4, 7, ...
    table = ParityTable()
    assert not table.add_stored(stored(values), "x", wrong, 1e-4)
    assert "sum64" in table.rows[-1].note


def test_the_table_ends_with_the_verdict():
    table = ParityTable()
    assert not table.ok
    assert table.render() == "parity: FAILED at nothing to compare"
    table.add("first", np.ones((2, 3)), np.ones((2, 3)), 1e-5)
    assert table.ok
    assert table.render().splitlines()[-1] == "parity: OK"
    table.add("second", np.zeros(1), np.ones(1), 1e-5, scale=1.0)
    table.add("third", np.zeros(1), np.ones(1), 1e-5)
    table.skipped.append("losses.json")
    lines = table.render().splitlines()
    assert lines[-1] == "parity: FAILED at second"
    assert "skipped: losses.json" in lines
    assert lines[0].split()[:2] == ["first", "2x3"]
    assert lines[0].endswith("ok")
    assert "FAILED" in lines[1]
