"""Name maps of PyTorch's FCAF3D: four layouts, every key, sizes from shapes."""

import json

import numpy as np
import pytest
from oracles import fcaf3d as oracle
from oracles import torch_writer

from vrdistill_jax.detectors.fcaf3d import boxes_from_head
from vrdistill_jax.import_torch import expected_variables, import_checkpoint
from vrdistill_jax.interop.name_map import check_shapes, flatten
from vrdistill_jax.interop.torch_fcaf3d import fcaf3d_config, variables_from_fcaf3d

HEADS = {"scannet": (18, 6), "sunrgbd": (10, 8)}  # classes, box channels


def official_state(dataset="scannet", blocks=(1, 1, 1, 1), **options):
    """A small state_dict, in the names of the authors' second repository."""
    return oracle.random_state(*HEADS[dataset], blocks=blocks, **options)


# How other projects call the same tensors.
RENAMED = {
    "tr3d": {},
    "mmdetection3d": {"head.": "bbox_head."},
    "mmdetection3d, old": {"conv_center": "center_conv", "conv_reg": "reg_conv", "conv_cls": "cls_conv"},
    "fcaf3d": {
        "head.": "neck_with_head.",
        "conv_center": "centerness_conv",
        "conv_reg": "reg_conv",
        "conv_cls": "cls_conv",
        "backbone.conv1.": "backbone.conv1.0.",
        "backbone.norm1.": "backbone.conv1.1.",
    },
    "neck apart": {"head.up_block": "neck.up_block", "head.out_block": "neck.out_block"},
}


def rename(state, layout):
    renamed = {}
    for name, value in state.items():
        for theirs, new in RENAMED[layout].items():
            name = name.replace(theirs, new)
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("dataset", HEADS)
def test_official_tensors_land_where_the_network_reads_them(dataset):
    state = official_state(dataset)
    variables, config = variables_from_fcaf3d({"state_dict": state, "meta": {}}, dataset)
    detector = config.detector
    assert (detector.stem_size, detector.stage_sizes, detector.head_size) == (4, (4, 4, 4, 4), 4)
    assert tuple(detector.num_blocks) == (1, 1, 1, 1)
    assert tuple(detector.input_features) == ("color",)
    assert detector.oriented == (dataset == "sunrgbd")
    check_shapes(variables, expected_variables(config))
    flat = flatten(variables)
    assert len(flat) == sum("num_batches" not in name for name in state)
    for ours, theirs in (
        ("params/backbone/layer2_0/downsample_conv/kernel", "backbone.layer2.0.downsample.0.kernel"),
        ("batch_stats/backbone/layer4_0/norm2/var", "backbone.layer4.0.norm2.bn.running_var"),
        ("params/neck/up_block_2_generate/conv/kernel", "head.up_block_2.0.kernel"),
        ("params/neck/up_block_3_refine/norm/scale", "head.up_block_3.4.bn.weight"),
        ("batch_stats/neck/up_block_1_generate/norm/mean", "head.up_block_1.1.bn.running_mean"),
        ("params/neck/out_block_0/conv/kernel", "head.out_block_0.0.kernel"),
        ("params/center_head/kernel", "head.conv_center.kernel"),
        ("params/box_head/kernel", "head.conv_reg.kernel"),
        ("params/scale_2", "head.scales.2.scale"),
    ):
        np.testing.assert_array_equal(flat[ours], state[theirs])
    np.testing.assert_array_equal(flat["params/class_head/bias"], state["head.conv_cls.bias"][0])
    np.testing.assert_array_equal(flat["params/backbone/norm1/bias"], state["backbone.norm1.bias"][0])
    total = sum(float(np.sum(v, dtype=np.float64)) for k, v in state.items() if "num_batches" not in k)
    assert sum(float(np.sum(v, dtype=np.float64)) for v in flat.values()) == pytest.approx(total, abs=1e-2)


@pytest.mark.parametrize("layout", RENAMED)
def test_all_projects_hold_the_same_network(layout, tmp_path):
    state = official_state(blocks=(3, 4, 6, 3), size=2)
    expected = flatten(variables_from_fcaf3d(state, "scannet")[0])
    tensors = {name: torch_writer.tensor(value) for name, value in rename(state, layout).items()}
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(torch_writer.zip_bytes({"state_dict": tensors, "meta": {"epoch": 12}}))
    variables, config = import_checkpoint("fcaf3d", "scannet", path)
    got = flatten(variables)
    assert expected.keys() == got.keys()
    assert all((expected[name] == got[name]).all() for name in expected)
    assert tuple(config.detector.num_blocks) == (3, 4, 6, 3)


def test_boxes_of_the_authors_own_project_turn_the_other_way():
    state = official_state("sunrgbd")
    kernels = {
        layout: flatten(variables_from_fcaf3d(rename(state, layout), "sunrgbd")[0])["params/box_head/kernel"]
        for layout in ("tr3d", "fcaf3d", "mmdetection3d", "mmdetection3d, old")
    }
    for layout, kernel in kernels.items():
        sign = np.where(np.arange(8) == 6, -1 if layout == "fcaf3d" else 1, 1)  # the sine of twice the yaw
        np.testing.assert_array_equal(kernel, kernels["tr3d"] * sign)
    points, channels = np.zeros((1, 3), np.float32), np.ones((1, 4), np.float32)
    yaws = [
        np.asarray(boxes_from_head(points, channels @ kernels[layout]))[0, 6] for layout in ("tr3d", "fcaf3d")
    ]
    assert yaws[0] == pytest.approx(-yaws[1])


def test_sizes_may_differ_from_stage_to_stage():
    state, rng = official_state(), np.random.default_rng(0)
    sizes = {"backbone.conv1": 3, "backbone.layer1": 4, "backbone.layer2": 5, "head.out_block_0.0": 7}
    for name in [n for n in state if n.endswith("kernel")]:
        for prefix, size in sizes.items():
            if name.startswith(prefix) and "downsample" not in name:
                state[name] = rng.normal(size=(*state[name].shape[:2], size)).astype(np.float32)
    detector = variables_from_fcaf3d(state, "scannet")[1].detector
    assert (detector.stem_size, detector.stage_sizes, detector.head_size) == (3, (4, 5, 4, 4), 7)


def broken(change, dataset="scannet", **options):
    state = official_state(dataset, **options) | change
    return {name: value for name, value in state.items() if value is not None}


MISFITS = {
    "missing": (broken({"head.up_block_1.0.kernel": None}), r"1 missing \(head.up_block_1.0.kernel\)"),
    "unknown": (broken({"extra": np.zeros(3)}), r"1 unknown \(extra\)"),
    "left over": (
        rename(official_state(), "fcaf3d") | {"head.conv_cls.bias": np.zeros((1, 18))},
        r"1 unknown \(head.conv_cls.bias\)",
    ),
    "dataset": (
        official_state("sunrgbd"),
        "10 classes and 8 box channels but scannet needs 18 and 6.*--dataset=sunrgbd",
    ),
    "features": (official_state(input_size=5), "reads 5 features"),
    "depth": (official_state(blocks=(1, 2, 1, 1)), r"\[1, 2, 1, 1\] residual blocks"),
    "scale": (broken({"head.scales.1.scale": np.zeros(2)}), r"head.scales.1.scale: .* shape \(2,\)"),
    "empty": ({"epoch": 1}, "no state_dict"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_checkpoints_that_do_not_fit_say_what_differs(name):
    checkpoint, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        variables_from_fcaf3d(checkpoint, "scannet")


def test_shapes_are_compared_with_the_network():
    state = broken({"head.up_block_2.3.kernel": np.zeros((27, 4, 5), np.float32)})
    variables, config = variables_from_fcaf3d(state, "scannet")
    with pytest.raises(ValueError, match=r"up_block_2_refine/conv/kernel has shape \(27, 4, 5\)"):
        check_shapes(variables, expected_variables(config))


def test_unknown_dataset():
    with pytest.raises(ValueError, match="unknown dataset 'kitti'"):
        fcaf3d_config("kitti")


@pytest.mark.data
def test_keys_of_all_projects(shared):
    path = shared / "golden/fcaf3d_scannet/state_dict_keys.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    keys = json.loads(path.read_text())["keys"]
    # An entry also holds the other projects' names of the same tensor.
    others = sorted(set.intersection(*(set(entry) for entry in keys.values())) - {"shape", "dtype"})
    for project in (None, *others):
        state = {
            entry[project] if project else name: np.zeros(entry["shape"], np.float32)
            for name, entry in keys.items()
        }
        variables, config = variables_from_fcaf3d(state, "scannet")
        check_shapes(variables, expected_variables(config))
        assert config.detector.stage_sizes == (64, 128, 256, 512)
