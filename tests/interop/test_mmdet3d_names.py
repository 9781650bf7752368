"""Tables of names, and output layers that are joined or split."""

import numpy as np
import pytest

from vrdistill_jax.interop.mmdet3d_names import join_outputs, split_outputs, to_official_names

NAMES = {"a.#+.b.#.": "x{}.y{}.", "a.": "z."}


def test_the_first_beginning_that_fits_renames():
    tensors = {name: np.array(n) for n, name in enumerate(("a.0.b.7.w", "a.0.c", "other.a.0.b.1.w"))}
    renamed = to_official_names(tensors, NAMES)
    assert {name: int(value) for name, value in renamed.items()} == {
        "x1.y7.w": 0,
        "z.0.c": 1,
        "other.a.0.b.1.w": 2,
    }


def test_two_tensors_never_become_one():
    with pytest.raises(ValueError, match="two tensors of the checkpoint are z.w"):
        to_official_names({"z.w": np.zeros(1), "a.w": np.ones(1)}, NAMES)


def test_numbers_that_no_network_has_are_not_read():
    name = f"a.{'9' * 5000}.b.1.w"
    assert list(to_official_names({name: np.zeros(1)}, NAMES)) == [f"z.{name[2:]}"]


def test_layers_that_are_not_there_are_left_alone():
    tensors = {"head.conv_cls.bias": np.arange(5)}
    assert join_outputs(tensors, "head").keys() == tensors.keys()
    assert split_outputs(tensors, "head.conv_reg", "official", {"center": 3}).keys() == tensors.keys()
