"""Name maps of the official Group-Free-3D: random checkpoints give what a NumPy twin that reads the official names gives."""

from functools import partial

import jax
import numpy as np
import pytest
from oracles.groupfree3d import GroupFreeOracle, make_state

from vrdistill_jax.detectors import groupfree3d
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.import_torch import expected_variables
from vrdistill_jax.interop.name_map import check_shapes, flatten
from vrdistill_jax.interop.parity_groupfree3d import check_groupfree3d
from vrdistill_jax.interop.torch_file import read_torch_file
from vrdistill_jax.interop.torch_groupfree3d import variables_from_groupfree3d
from vrdistill_jax.structs import Points

# Each program runs once: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
SCANNET, SUNRGBD = (18, 1, True), (10, 12, False)
QUARTER = {"width": 0.25}


@pytest.mark.parametrize(
    ("dataset", "heads", "entries"), [("scannet", SCANNET, 636), ("sunrgbd", SUNRGBD, 622)]
)
def test_official_tensors_land_where_the_network_reads_them(dataset, heads, entries):
    state = make_state(*heads, layers=6, **QUARTER)
    assert len(state) == entries
    prefixed = {f"module.{name}": value for name, value in state.items()}
    variables, config = variables_from_groupfree3d({"model": prefixed, "epoch": 3}, dataset)
    detector = config.detector
    assert (detector.width, detector.backbone_width, detector.decoder_layers) == (0.25, 1.0, 6)
    assert detector.size_by_class == (dataset == "scannet")
    check_shapes(variables, expected_variables(config))
    # every tensor arrived exactly once
    theirs = {
        k: v for k, v in state.items() if not k.endswith("num_batches_tracked") and "posembed." not in k
    }
    flat = flatten(variables)
    assert len(flat) == len(theirs)
    sums = [sorted(float(np.sum(v, dtype=np.float64)) for v in tree.values()) for tree in (flat, theirs)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)


def mmdet3d_state(state, old_sampling=False):
    """The same network as mmdetection3d would save it."""
    joined, renamed = {}, {}
    inner = {
        "self_attn": "attentions.0.attn",
        "multihead_attn": "attentions.1.attn",
        "linear1": "ffns.0.layers.0.0",
    }
    inner |= {"linear2": "ffns.0.layers.1", "norm1": "norms.0", "norm2": "norms.1", "norm3": "norms.2"}
    for name, value in state.items():
        module, *rest = name.split(".")
        if module == "backbone_net":
            folder, n = rest[0][:2].upper(), int(rest[0][2]) - 1
            new = (
                f"backbone.{folder}_modules.{n}.mlps"
                + (".0." if folder == "SA" else ".")
                + ".".join(rest[2:])
            )
            new = new.replace(".bn.bn.", ".bn.")
        elif module == "points_obj_cls" and not old_sampling:
            new = f"bbox_head.points_obj_cls.mlp.layer{int(rest[0][-1]) - 1}.{rest[0][:-1]}.{rest[1]}"
        elif module == "decoder" and "posembed" in rest[1]:
            continue  # there under its other name, too
        elif module == "decoder":
            new = ".".join(["bbox_head.decoder_layers", rest[0], inner[rest[1]], *rest[2:]])
        elif module in ("proposal_head", "prediction_heads"):
            head = "bbox_head.conv_pred" if module == "proposal_head" else f"bbox_head.{module}.{rest.pop(0)}"
            if rest[0].endswith("_head"):
                joined.setdefault(head, {})[(rest[0], rest[1])] = value
                continue
            new = f"{head}.shared_convs.layer{int(rest[0][-1]) - 1}.{rest[0][:-1]}.{rest[1]}"
        else:
            new = f"bbox_head.{name}"
        renamed[new] = value
    sizes = [("size_class_head", "size_residual_head"), ("size_pred_head",)]
    for head, parts in joined.items():
        for leaf in ("weight", "bias"):
            kind = sizes[("size_pred_head", leaf) in parts]
            boxes = ("center_residual_head", "heading_class_head", "heading_residual_head", *kind)
            for layer, names in (
                ("conv_cls", ("objectness_scores_head", "sem_cls_scores_head")),
                ("conv_reg", boxes),
            ):
                renamed[f"{head}.{layer}.{leaf}"] = np.concatenate([parts[n, leaf] for n in names])
    return renamed


@pytest.mark.parametrize("old_sampling", [False, True])
@pytest.mark.parametrize("by_class", [True, False])
def test_mmdet3d_is_the_same_network(old_sampling, by_class):
    state = make_state(18, 1, by_class, layers=2, **QUARTER)
    theirs = {"meta": {}, "state_dict": mmdet3d_state(state, old_sampling)}
    assert not any(name in state for name in theirs["state_dict"])
    (expected, config), (got, found) = (variables_from_groupfree3d(s, "scannet") for s in (state, theirs))
    assert found == config
    expected, got = flatten(expected), flatten(got)
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_mmdet3d_has_it_for_scannet_only():
    theirs = mmdet3d_state(make_state(*SCANNET, layers=1, **QUARTER))
    with pytest.raises(ValueError, match="ScanNet only; check --dataset"):
        variables_from_groupfree3d(theirs, "sunrgbd")
    theirs["bbox_head.conv_pred.conv_cls.bias"] = np.zeros(11, np.float32)
    with pytest.raises(ValueError, match=r"conv_cls.bias has shape \(11,\); expected 19 channels"):
        variables_from_groupfree3d(theirs, "scannet")


@pytest.mark.parametrize(("dataset", "heads", "features"), [("scannet", SCANNET, 0), ("sunrgbd", SUNRGBD, 1)])
def test_the_network_gives_the_numbers_of_a_numpy_twin(dataset, heads, features):
    state = make_state(*heads, features=features, width=0.25, seed=1)
    variables, config = variables_from_groupfree3d(state, dataset)
    detector = config.detector
    detector.num_proposals = 12
    detector.levels = ((64, 0.5, 8), (32, 0.8, 8), (16, 1.0, 8), (8, 1.5, 8))
    rng = np.random.default_rng(2)
    xyz = rng.uniform(-1, 2, (2, 300, 3)).astype(np.float32)
    inputs = rng.random((2, 300, features)).astype(np.float32)
    every, pyramid_config = np.ones(300, bool), groupfree3d.pyramid_config(detector)
    pyramid = jax.tree.map(
        lambda *x: np.stack(x), *(build_point_pyramid(cloud, every, pyramid_config) for cloud in xyz)
    )
    model, points = groupfree3d.build(detector), Points(xyz, inputs, np.ones((2, 300), bool))
    output = jit(lambda v: model.apply(v, points, pyramid, train=False))(variables)
    ours, found = output.raw.head, output.predictions
    sizes = np.asarray(detector.mean_sizes)
    for b in range(2):
        levels = [(level.xyz[b], level.neighbor_index[b]) for level in pyramid.levels]
        between = [(i.index[b], i.weight[b]) for i in pyramid.interpolations]
        radii = [level[1] for level in detector.levels]
        rows, expected = GroupFreeOracle(state, heads=8).forward(
            xyz[b], inputs[b], levels, between, radii, 12, sizes
        )
        np.testing.assert_array_equal(output.raw.query_index[b], rows)
        for n, head in enumerate(expected):
            fields = (
                "objectness_logit",
                "center",
                "heading_logits",
                "heading_residual",
                "size",
                "class_logits",
            )
            for field, values in zip(fields, head.values(), strict=True):
                np.testing.assert_allclose(
                    getattr(ours, field)[n, b], values, atol=5e-4, err_msg=f"{n} {field}"
                )
        last, bins = expected[-1], heads[1]
        best = last["bins"].argmax(-1)
        heading = best * 2 * np.pi / bins + last["residual"][np.arange(12), best] * np.pi / bins
        turn = found.yaw[b] + (heading if bins > 1 else 0.0)  # our yaw is minus their heading
        np.testing.assert_allclose(np.cos(turn), 1, atol=1e-5)
        np.testing.assert_allclose(found.objectness[b], 1 / (1 + np.exp(-last["logit"])), atol=2e-4)


def test_w2x_and_farthest_point_sampling_are_recognised():
    state = make_state(*SCANNET, width=0.25, kps=False, backbone_width=2)
    variables, config = variables_from_groupfree3d(state, "scannet")
    assert (config.detector.width, config.detector.backbone_width) == (0.25, 2.0)
    assert config.detector.sampling == "fps"
    check_shapes(variables, expected_variables(config))


def test_options_of_the_training_script_are_taken_over():
    options = {
        "num_target": 77, "nhead": 4, "transformer_dropout": 0.2, "center_delta": 0.5, "box_loss_coef": 2,
        "obj_loss_coef": 0.7, "query_points_obj_topk": 5, "log_dir": "somewhere",
    }  # fmt: skip
    state = make_state(*SUNRGBD, layers=1)
    detector = variables_from_groupfree3d({"model": state, "config": options}, "sunrgbd")[1].detector
    assert (detector.num_proposals, detector.num_heads, detector.dropout) == (77, 4, 0.2)
    assert (detector.center_delta, detector.size_delta, detector.query_positives) == (0.5, 0.0625, 5)
    weight = detector.loss_weight
    assert (weight.center, weight.heading_class, weight.size) == (2.0, 0.2, 2.0)
    assert (weight.objectness, weight.query_points, weight["class"]) == (0.7, 0.2, 0.1)


def edited_alias():
    state = make_state(*SUNRGBD, layers=1)
    name = "decoder.0.self_posembed.position_embedding_head.3.bias"
    return state | {name: state[name] + 1}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (make_state(*SCANNET, layers=1), "18 classes .* needs 10 and 12; it fits --dataset=scannet"),
        (make_state(*SUNRGBD, layers=1, features=2), "reads 2 features per point"),
        (
            {"model": make_state(*SUNRGBD, layers=1), "config": {"num_target": 10**9}},
            "num_target is 1000000000",
        ),
        (edited_alias(), "is there twice, with different numbers"),
        ({"epoch": 1}, "no state_dict"),
    ],
)
def test_checkpoints_that_do_not_fit_say_what_differs(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        variables_from_groupfree3d(checkpoint, "sunrgbd")


def test_a_missing_tensor_is_named():
    state = make_state(*SUNRGBD, layers=1)
    del state["decoder_key_proj.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(decoder_key_proj.bias\)"):
        variables_from_groupfree3d(state, "sunrgbd")


@pytest.mark.data
@pytest.mark.slow
def test_parity_with_the_official_groupfree3d(shared):
    golden = shared / "golden/groupfree_sunrgbd"
    variables, config = variables_from_groupfree3d(read_torch_file(golden / "weights.pth.xz"), "sunrgbd")
    check_shapes(variables, expected_variables(config))
    table = check_groupfree3d(variables, config, golden)
    assert table.ok, table.render()
    assert len(table.rows) > 700
