"""Name maps of PyTorch's VoteNets, and the verb that uses them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from oracles import torch_writer as writer

from vrdistill_jax.import_torch import expected_variables, import_checkpoint
from vrdistill_jax.interop.name_map import check_shapes, flatten
from vrdistill_jax.interop.torch_file import read_torch_file
from vrdistill_jax.interop.torch_votenet import variables_from_votenet
from vrdistill_jax.training.checkpoint import load_inference_checkpoint

HEADS = {"scannet": (1, 18), "sunrgbd": (12, 10)}  # heading bins, classes


def official_state(dataset="sunrgbd", width=0.25, features=1, seed=0):
    """An official state_dict: names and shapes as the repository's modules have them, random numbers."""
    rng, state = np.random.default_rng(seed), {}
    w64, w128, w256 = (int(n * width) for n in (64, 128, 256))

    def conv(name, out, size, dims, bias=False):
        state[f"{name}.weight"] = rng.normal(size=(out, size, *[1] * dims)).astype(np.float32)
        if bias:
            state[f"{name}.bias"] = rng.normal(size=out).astype(np.float32)

    def norm(name, size):
        for leaf in ("weight", "bias", "running_mean"):
            state[f"{name}.{leaf}"] = rng.normal(size=size).astype(np.float32)
        state[f"{name}.running_var"] = rng.uniform(0.5, 2, size).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    def shared(name, sizes):
        for n, (size, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            conv(f"{name}.layer{n}.conv", out, size, 2)
            norm(f"{name}.layer{n}.bn.bn", out)

    shared("backbone_net.sa1.mlp_module", (3 + features, w64, w64, w128))
    shared("backbone_net.sa2.mlp_module", (3 + w128, w128, w128, w256))
    shared("backbone_net.sa3.mlp_module", (3 + w256, w128, w128, w256))
    shared("backbone_net.sa4.mlp_module", (3 + w256, w128, w128, w256))
    shared("backbone_net.fp1.mlp", (2 * w256, w256, w256))
    shared("backbone_net.fp2.mlp", (2 * w256, w256, w256))
    shared("pnet.vote_aggregation.mlp_module", (3 + w256, w128, w128, w128))
    bins, classes = HEADS[dataset]
    for name, size, out in (("vgen", w256, 3 + w256), ("pnet", w128, 5 + 2 * bins + 5 * classes)):
        for n in (1, 2):
            conv(f"{name}.conv{n}", size, size, 1, bias=True)
            norm(f"{name}.bn{n}", size)
        conv(f"{name}.conv3", out, size, 1, bias=True)
    return state


def mmdet3d_state(state, bins):
    """The same network as mmdetection3d (1.0 and later) would save it: yaw counter-clockwise."""
    renamed = {}
    for name, value in state.items():
        for n in range(4):
            name = name.replace(f"backbone_net.sa{n + 1}.mlp_module.", f"backbone.SA_modules.{n}.mlps.0.")
        for n in range(2):
            name = name.replace(f"backbone_net.fp{n + 1}.mlp.", f"backbone.FP_modules.{n}.mlps.")
            for module, theirs in (
                ("vgen", "bbox_head.vote_module.vote_conv."),
                ("pnet", "bbox_head.conv_pred.shared_convs.layer"),
            ):
                name = name.replace(f"{module}.conv{n + 1}.", f"{theirs}{n}.conv.")
                name = name.replace(f"{module}.bn{n + 1}.", f"{theirs}{n}.bn.")
        name = name.replace("pnet.vote_aggregation.mlp_module.", "bbox_head.vote_aggregation.mlps.0.")
        name = name.replace(".bn.bn.", ".bn.").replace("vgen.conv3.", "bbox_head.vote_module.conv_out.")
        renamed[name] = value
    for leaf in ("weight", "bias"):
        rows = renamed.pop(f"pnet.conv3.{leaf}").copy()
        turned = rows.copy()
        for b in range(bins):  # their bin b is our bin -b, their residual has the other sign
            turned[5 + b] = rows[5 + (bins - b) % bins]
            turned[5 + bins + b] = -rows[5 + bins + (bins - b) % bins]
        first_class = len(rows) - HEADS["sunrgbd" if bins == 12 else "scannet"][1]
        renamed[f"bbox_head.conv_pred.conv_cls.{leaf}"] = np.concatenate([turned[:2], turned[first_class:]])
        renamed[f"bbox_head.conv_pred.conv_reg.{leaf}"] = turned[2:first_class]
    return renamed


@pytest.mark.parametrize("dataset", ["scannet", "sunrgbd"])
@pytest.mark.parametrize("features", [(), ("height",), ("color",), ("color", "height")])
def test_official_tensors_land_where_the_network_reads_them(dataset, features):
    count = {"color": 3, "height": 1}
    state = official_state(dataset, features=sum(count[f] for f in features))
    assert len(state) == 146
    variables, config = variables_from_votenet({"model_state_dict": state, "epoch": 3}, dataset)
    assert tuple(config.detector.input_features) == features
    assert config.detector.width == 0.25
    check_shapes(variables, expected_variables(config))
    flat = flatten(variables)
    assert len(flat) == 146 - 23  # without the counters of the 23 norms
    assert all(x.dtype == np.float32 for x in flat.values())
    np.testing.assert_array_equal(
        flat["params/backbone/sa2/mlp/layer1/dense/kernel"][:, 3],
        state["backbone_net.sa2.mlp_module.layer1.conv.weight"][3, :, 0, 0],
    )
    np.testing.assert_array_equal(
        flat["batch_stats/backbone/fp2/mlp/layer0/norm/var"],
        state["backbone_net.fp2.mlp.layer0.bn.bn.running_var"],
    )
    np.testing.assert_array_equal(flat["params/voting/layer1/norm/scale"], state["vgen.bn2.weight"])
    np.testing.assert_array_equal(flat["params/proposal/layer0/dense/bias"], state["pnet.conv1.bias"])
    np.testing.assert_array_equal(flat["params/proposal_out/kernel"], state["pnet.conv3.weight"][:, :, 0].T)
    # every tensor arrived exactly once
    theirs = sorted(float(np.sum(v, dtype=np.float64)) for k, v in state.items() if "num_batches" not in k)
    assert sorted(float(np.sum(v, dtype=np.float64)) for v in flat.values()) == pytest.approx(
        theirs, abs=1e-4
    )


def test_containers_and_data_parallel_prefix_do_not_matter():
    state = official_state()
    expected = flatten(variables_from_votenet(state, "sunrgbd")[0])
    prefixed = {f"module.{name}": value for name, value in state.items()}
    for container in ({"state_dict": state, "meta": {}}, {"model_state_dict": prefixed}, prefixed):
        got = flatten(variables_from_votenet(container, "sunrgbd")[0])
        assert got.keys() == expected.keys()
        assert all((got[name] == expected[name]).all() for name in got)


@pytest.mark.parametrize("dataset", ["scannet", "sunrgbd"])
def test_mmdet3d_is_the_same_network_with_mirrored_heading(dataset):
    state = official_state(dataset)
    theirs = mmdet3d_state(state, HEADS[dataset][0])
    expected = flatten(variables_from_votenet(state, dataset)[0])
    got = flatten(variables_from_votenet({"state_dict": theirs}, dataset)[0])
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_mmdet3d_heading_decodes_to_its_yaw():
    theirs = mmdet3d_state(official_state(), 12)
    params = variables_from_votenet({"state_dict": theirs}, "sunrgbd")[0]["params"]
    hidden = np.random.default_rng(3).normal(size=(50, 32)).astype(np.float32)
    head = "bbox_head.conv_pred.conv_reg"
    reg = hidden @ theirs[f"{head}.weight"][:, :, 0].T + theirs[f"{head}.bias"]
    ours = hidden @ params["proposal_out"]["kernel"] + params["proposal_out"]["bias"]
    for row, own in zip(reg, ours, strict=True):
        b = int(np.argmax(row[3:15]))
        yaw = b * 2 * np.pi / 12 + row[15 + b] * np.pi / 12  # counter-clockwise
        o = int(np.argmax(own[5:17]))
        heading = o * 2 * np.pi / 12 + own[17 + o] * np.pi / 12  # clockwise
        assert np.cos(yaw + heading) == pytest.approx(1, abs=1e-5)


def test_mmdet3d_before_0_6_has_one_output_layer_in_the_official_order():
    state, old = official_state(), {}
    for name, value in mmdet3d_state(state, 12).items():
        if "conv_cls" not in name and "conv_reg" not in name:
            old[name.replace("conv_pred.shared_convs.layer", "conv_pred.")] = value
    for leaf in ("weight", "bias"):
        old[f"bbox_head.conv_pred.conv_out.{leaf}"] = state[f"pnet.conv3.{leaf}"]
    expected, got = (flatten(variables_from_votenet(s, "sunrgbd")[0]) for s in (state, old))
    assert all((got[name] == expected[name]).all() for name in expected)


def broken(**change):
    """A state_dict with some tensors replaced, or left out where the new one is None."""
    state = official_state() | {name.replace("__", "."): value for name, value in change.items()}
    return {name: value for name, value in state.items() if value is not None}


MISFITS = {
    "missing": (broken(vgen__bn1__running_mean=None), r"1 missing \(vgen.bn1.running_mean\)"),
    "unknown": (broken(extra=np.zeros(3)), r"1 unknown \(extra\)"),
    "not finite": (broken(vgen__conv1__bias=np.full(64, np.nan, np.float32)), "vgen.conv1.bias holds NaN"),
    "wide": (broken(vgen__conv1__weight=np.zeros((64, 64, 3), np.float32)), "1x1 convolution"),
    "text": (broken(vgen__conv1__bias=np.array(["a"])), "tensor of numbers"),
    "dataset": (official_state("scannet"), "97 channels but sunrgbd needs 79.*--dataset=scannet"),
    "features": (official_state(features=2), "reads 2 features"),
    "empty": ({"epoch": 1}, "no state_dict"),
    "list": ([1, 2], "no state_dict"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_checkpoints_that_do_not_fit_say_what_differs(name):
    checkpoint, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        variables_from_votenet(checkpoint, "sunrgbd")


def test_shapes_are_compared_with_the_network(tmp_path):
    state = official_state()
    state["vgen.bn1.weight"] = np.zeros(63, np.float32)
    path = tmp_path / "weights.pth"
    path.write_bytes(writer.zip_bytes({name: writer.tensor(value) for name, value in state.items()}))
    with pytest.raises(
        ValueError, match=r"voting/layer0/norm/scale has shape \(63,\), the config needs \(64,\)"
    ):
        import_checkpoint("votenet", "sunrgbd", path)


def run_verb(*arguments):
    command = [sys.executable, "-m", "vrdistill_jax.import_torch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_verb_writes_a_checkpoint(tmp_path):
    state = official_state()
    path, output = tmp_path / "weights.pth", tmp_path / "imported"
    path.write_bytes(writer.legacy_bytes({name: writer.tensor(value) for name, value in state.items()}))
    done = run_verb("--dataset=sunrgbd", f"--checkpoint={path}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    variables, config = load_inference_checkpoint(output)
    np.testing.assert_array_equal(variables["params"]["voting_out"]["bias"], state["vgen.conv3.bias"])
    assert config.detector.name == "votenet"
    assert len(config.detector.class_names) == 10
    again = run_verb("--dataset=sunrgbd", f"--checkpoint={path}", f"--output={output}")
    assert again.returncode == 2
    assert "already holds a checkpoint" in again.stderr
    assert "Traceback" not in again.stderr


def test_the_verb_refuses_a_malicious_file_with_one_line(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(writer.zip_of(f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode()))
    done = run_verb("--dataset=sunrgbd", f"--checkpoint={path}", f"--output={tmp_path / 'imported'}")
    assert done.returncode == 2
    assert "os.system" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "imported").exists()


@pytest.mark.data
def test_reads_the_golden_votenet(shared):
    checkpoint = read_torch_file(shared / "golden/votenet_sunrgbd/weights.pth")
    variables, config = variables_from_votenet(checkpoint, "sunrgbd")
    check_shapes(variables, expected_variables(config))
    norms = json.loads((shared / "golden/votenet_sunrgbd/losses.json").read_text())[
        "grad_norms_train_seed_fps"
    ]
    assert len(flatten(variables["params"])) == len(norms)


@pytest.mark.data
@pytest.mark.slow
def test_parity_with_the_official_votenet(shared):
    golden = shared / "golden/votenet_sunrgbd"
    done = run_verb("--dataset=sunrgbd", f"--checkpoint={golden / 'weights.pth'}", f"--golden={golden}")
    assert done.stdout.strip().splitlines()[-1] == "parity: OK", done.stdout + done.stderr
    assert done.returncode == 0
