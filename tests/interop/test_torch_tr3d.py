"""Name maps of PyTorch's TR3D; its numbers are compared in test_parity_tr3d."""

import json

import numpy as np
import pytest

from vrdistill_jax.import_torch import expected_variables
from vrdistill_jax.interop.name_map import check_shapes, flatten
from vrdistill_jax.interop.torch_tr3d import tr3d_config, variables_from_tr3d

HEADS = {"scannet": (18, 6), "sunrgbd": (10, 8)}  # classes, box channels


def official_state(dataset="sunrgbd", stem=16, largest=8, features=3, seed=0):
    """A state_dict of the authors' repository: names and shapes as its modules have them, random numbers."""
    rng, state = np.random.default_rng(seed), {}

    def kernel(name, *shape):
        state[f"{name}.kernel"] = rng.normal(size=shape).astype(np.float32)

    def norm(name, size):
        for leaf in ("weight", "bias", "running_mean"):
            state[f"{name}.bn.{leaf}"] = rng.normal(size=size).astype(np.float32)
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 2, size).astype(np.float32)
        state[f"{name}.bn.num_batches_tracked"] = np.array(7)

    kernel("backbone.conv1", 27, features, stem)
    norm("backbone.norm1", stem)
    inputs = stem
    for stage, count in enumerate((3, 4, 6, 3), 1):
        size = min(stem * 2 ** (stage - 1), largest)
        for block in range(count):
            name = f"backbone.layer{stage}.{block}"
            kernel(f"{name}.conv1", 27, inputs, size)
            norm(f"{name}.norm1", size)
            kernel(f"{name}.conv2", 27, size, size)
            norm(f"{name}.norm2", size)
            if block == 0:
                kernel(f"{name}.downsample.0", 1, inputs, size)
                norm(f"{name}.downsample.1", size)
            inputs = size
    for name in (
        "up_block_2",
        "lateral_block_1",
        "out_block_1",
        "up_block_1",
        "lateral_block_0",
        "out_block_0",
    ):
        kernel(f"neck.{name}.0", 27, largest, largest)
        norm(f"neck.{name}.1", largest)
    classes, boxes = HEADS[dataset]
    for name, size in (("bbox_conv", boxes), ("cls_conv", classes)):
        kernel(f"head.{name}", largest, size)
        state[f"head.{name}.bias"] = rng.normal(size=(1, size)).astype(np.float32)
    return state


def mmdet3d_state(state):
    names = {"head.bbox_conv.": "bbox_head.conv_reg.", "head.cls_conv.": "bbox_head.conv_cls."}
    renamed = {}
    for name, value in state.items():
        for theirs, new in names.items():
            name = name.replace(theirs, new)
        renamed[name] = value
    return renamed


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["scannet", "sunrgbd"])
def test_official_tensors_land_where_the_network_reads_them(dataset):
    state = official_state(dataset)
    variables, config = variables_from_tr3d({"state_dict": state, "meta": {}}, dataset)
    detector = config.detector
    assert (detector.stem_size, detector.max_size) == (16, 8)
    assert tuple(detector.input_features) == ("color",)
    assert detector.oriented == (dataset == "sunrgbd")
    check_shapes(variables, expected_variables(config))
    flat = flatten(variables)
    assert len(flat) == sum("num_batches" not in name for name in state)
    for ours, theirs in (
        ("params/backbone/layer2_0/downsample_conv/kernel", "backbone.layer2.0.downsample.0.kernel"),
        ("batch_stats/backbone/layer4_2/norm2/var", "backbone.layer4.2.norm2.bn.running_var"),
        ("params/neck/up_block_2/conv/kernel", "neck.up_block_2.0.kernel"),
        ("params/neck/lateral_block_0/norm/scale", "neck.lateral_block_0.1.bn.weight"),
        ("params/box_head/kernel", "head.bbox_conv.kernel"),
    ):
        np.testing.assert_array_equal(flat[ours], state[theirs])
    np.testing.assert_array_equal(flat["params/class_head/bias"], state["head.cls_conv.bias"][0])
    total = sum(float(np.sum(v, dtype=np.float64)) for k, v in state.items() if "num_batches" not in k)
    assert sum(float(np.sum(v, dtype=np.float64)) for v in flat.values()) == pytest.approx(total, abs=1e-2)


def test_mmdet3d_is_the_same_network():
    state = official_state()
    expected, got = (flatten(variables_from_tr3d(s, "sunrgbd")[0]) for s in (state, mmdet3d_state(state)))
    assert expected.keys() == got.keys()
    assert all((expected[name] == got[name]).all() for name in expected)


def broken(**change):
    state = official_state() | {name.replace("__", "."): value for name, value in change.items()}
    return {name: value for name, value in state.items() if value is not None}


MISFITS = {
    "missing": (broken(neck__up_block_1__0__kernel=None), r"1 missing \(neck.up_block_1.0.kernel\)"),
    "unknown": (broken(extra=np.zeros(3)), r"1 unknown \(extra\)"),
    "dataset": (
        official_state("scannet"),
        "18 classes and 6 box channels but sunrgbd needs 10 and 8.*--dataset=scannet",
    ),
    "features": (official_state(features=5), "reads 5 features"),
    "empty": ({"epoch": 1}, "no state_dict"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_checkpoints_that_do_not_fit_say_what_differs(name):
    checkpoint, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        variables_from_tr3d(checkpoint, "sunrgbd")


def test_unknown_dataset():
    with pytest.raises(ValueError, match="unknown dataset 'kitti'"):
        tr3d_config("kitti")


@pytest.mark.data
@pytest.mark.slow
def test_keys_of_both_projects(shared):
    keys = json.loads((shared / "golden/tr3d_sunrgbd/state_dict_keys.json").read_text())["keys"]
    state = {name: np.zeros(entry["shape"], np.float32) for name, entry in keys.items()}
    renamed = {keys[name]["mmdet3d_1x"]: value for name, value in state.items()}
    for checkpoint in (state, renamed):
        variables, config = variables_from_tr3d(checkpoint, "sunrgbd")
        check_shapes(variables, expected_variables(config))
        assert (config.detector.stem_size, config.detector.max_size) == (64, 128)
