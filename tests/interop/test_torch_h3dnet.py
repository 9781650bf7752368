"""Name maps of the official H3DNet: random checkpoints give what a NumPy twin that reads the official names gives."""

from functools import partial

import jax
import numpy as np
import pytest
from oracles import torch_writer as writer
from oracles.h3dnet import KINDS, Oracle, make_state

from vrdistill_jax.detectors import h3dnet
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.import_torch import expected_variables, import_checkpoint
from vrdistill_jax.interop.name_map import check_shapes, flatten
from vrdistill_jax.interop.parity_h3dnet import check_h3dnet
from vrdistill_jax.interop.torch_file import read_torch_file
from vrdistill_jax.interop.torch_h3dnet import variables_from_h3dnet
from vrdistill_jax.structs import Points
from vrdistill_jax.training.state import count_parameters

# Each program runs once: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
HEADS = {"scannet": (18, 24), "sunrgbd": (10, 12)}


@pytest.mark.parametrize(
    ("dataset", "towers", "scale"),
    [("scannet", 4, 1), ("sunrgbd", 4, 1), ("scannet", 1, 1), ("sunrgbd", 1, 2)],
)
def test_official_tensors_land_where_the_network_reads_them(dataset, towers, scale):
    state = make_state(*HEADS[dataset], towers=towers, scale=scale)
    if towers == 4:
        assert len(state) == 730
    variables, config = variables_from_h3dnet({"model_state_dict": state, "epoch": 3}, dataset)
    detector = config.detector
    assert (detector.width, detector.num_towers, detector.tower_scale) == (1 / 16, towers, scale)
    assert detector.input_features == ("height",)
    check_shapes(variables, expected_variables(config))
    flat = flatten(variables)
    theirs = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(flat) == len(theirs)  # every tensor arrived exactly once
    sums = [sorted(float(np.sum(v, dtype=np.float64)) for v in tree.values()) for tree in (flat, theirs)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)
    parameters = sum(v.size for k, v in theirs.items() if "running" not in k)
    assert count_parameters(variables["params"]) == parameters


MMDET3D_PARTS = {
    "vgen": "rpn_head.vote_module", "vgen_z": "roi_head.primitive_z.vote_module",
    "vgen_xy": "roi_head.primitive_xy.vote_module", "vgen_line": "roi_head.primitive_line.vote_module",
    "pnet_z": "roi_head.primitive_z", "pnet_xy": "roi_head.primitive_xy", "pnet_line": "roi_head.primitive_line",
    "match_surface_center": "roi_head.bbox_head.surface_center_matcher.mlps.0",
    "match_line_center": "roi_head.bbox_head.line_center_matcher.mlps.0",
}  # fmt: skip
MMDET3D_LAYERS = {"match": "matching", "match_sem": "semantic_matching"}


def mmdet3d_name(name):
    """The name that mmdetection3d has for a tensor of the official repository, but for the two joined layers."""
    module, *rest = name.replace(".bn.bn.", ".bn.").split(".")
    leaf = ".".join(rest)
    kind, _, layer = module.partition("_")
    if module.startswith("backbone_net"):
        part, n = rest[0][:2], int(rest[0][2]) - 1
        folder = f"SA_modules.{n}.mlps.0" if part == "sa" else f"FP_modules.{n}.mlps"
        return f"backbone.backbone_list.{int(module[-1]) - 1}.{folder}." + ".".join(rest[2:])
    if layer.startswith("agg"):
        return f"backbone.aggregation_layers.layer{int(layer[-1]) - 1}.{kind}.{leaf}"
    if layer.startswith("flag"):
        flag = f"roi_head.primitive_{layer.split('_')[1][:-1]}.flag"
        return f"{flag}_pred.{leaf}" if layer.endswith("2") else f"{flag}_conv.{kind}.{leaf}"
    if rest[0] == "vote_aggregation":
        head = "rpn_head" if module == "pnet_final" else MMDET3D_PARTS[module]
        return f"{head}.vote_aggregation.mlps.0." + ".".join(rest[2:])
    if rest[0] in MMDET3D_PARTS:
        return f"{MMDET3D_PARTS[rest[0]]}." + ".".join(rest[2:])
    kind, _, layer = rest[0].partition("_")
    head, last = "roi_head.bbox_head", rest[1]
    if layer.startswith("match"):
        theirs = f"{head}.{MMDET3D_LAYERS[layer[:-1]]}"
        return f"{theirs}_pred.{last}" if layer.endswith("2") else f"{theirs}_conv.{kind}.{last}"
    if layer == "refine4":
        return f"{head}.bbox_pred.3.{last}"
    if layer:
        list_of = {
            "refine": "bbox_pred",
            "surface": "surface_feats_aggregation",
            "line": "line_feats_aggregation",
        }
        return f"{head}.{list_of[layer[:-1]]}.{int(layer[-1]) - 1}.{kind}.{last}"
    n = int(kind[-1]) - 1
    if module.startswith("vgen"):
        theirs = MMDET3D_PARTS[module]
        return f"{theirs}.conv_out.{last}" if n == 2 else f"{theirs}.vote_conv.{n}.{kind[:-1]}.{last}"
    if module == "pnet_final":
        return f"rpn_head.conv_pred.shared_convs.layer{n}.{kind[:-1]}.{last}"
    theirs = f"{MMDET3D_PARTS[module]}.conv_pred"
    return f"{theirs}.conv_out.{last}" if n == 2 else f"{theirs}.{n}.{kind[:-1]}.{last}"


def test_mmdet3d_is_the_same_network():
    state = make_state(*HEADS["scannet"])
    renamed = {mmdet3d_name(name): value for name, value in state.items() if "pnet_final.conv3" not in name}
    for leaf in ("weight", "bias"):  # theirs: objectness, classes, box
        rows, refined = state[f"pnet_final.conv3.{leaf}"], state[f"pnet_final.conv_refine4.{leaf}"]
        renamed[f"rpn_head.conv_pred.conv_cls.{leaf}"] = np.concatenate([rows[:2], rows[-18:]])
        renamed[f"rpn_head.conv_pred.conv_reg.{leaf}"] = rows[2:-18]
        theirs = np.concatenate([refined[:2], refined[-18:], refined[2:-18]])
        renamed[f"roi_head.bbox_head.bbox_pred.3.{leaf}"] = theirs
    assert len(renamed) == len(state) + 2
    assert not set(renamed) & set(state)
    (expected, config), (got, found) = (
        variables_from_h3dnet(s, "scannet") for s in (state, {"state_dict": renamed, "meta": {}})
    )
    assert found == config
    expected, got = flatten(expected), flatten(got)
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    before_0_6 = {
        name.replace("conv_pred.shared_convs.layer", "conv_pred."): value for name, value in renamed.items()
    }
    for leaf in ("weight", "bias"):
        for layer in ("conv_cls", "conv_reg"):
            del before_0_6[f"rpn_head.conv_pred.{layer}.{leaf}"]
        before_0_6[f"rpn_head.conv_pred.conv_out.{leaf}"] = state[f"pnet_final.conv3.{leaf}"]
    got = flatten(variables_from_h3dnet(before_0_6, "scannet")[0])
    assert all((got[name] == expected[name]).all() for name in expected)
    with pytest.raises(ValueError, match="ScanNet only"):
        variables_from_h3dnet(renamed, "sunrgbd")


@pytest.mark.parametrize(("dataset", "towers"), [("scannet", 4), ("sunrgbd", 1)])
def test_the_network_gives_the_numbers_of_a_numpy_twin(dataset, towers):
    state = make_state(*HEADS[dataset], towers=towers, seed=1)
    detector = variables_from_h3dnet(state, dataset)[1].detector
    detector.num_proposals = 12
    detector.levels = ((64, 0.6, 8), (40, 0.9, 6), (20, 1.2, 6), (10, 2.0, 6))
    detector.aggregation_radius, detector.match_radius = 0.9, 1.1
    detector.aggregation_neighbors, detector.match_neighbors = 6, 9
    rng = np.random.default_rng(2)
    xyz = rng.uniform(-2, 3, (1, 300, 3)).astype(np.float32)
    height = rng.random((1, 300, 1)).astype(np.float32)
    every = np.ones(300, bool)
    pyramid = jax.tree.map(
        lambda x: x[None], build_point_pyramid(xyz[0], every, h3dnet.pyramid_config(detector))
    )
    oracle, close = Oracle(state), partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    levels = [(level.xyz[0], level.neighbor_index[0]) for level in pyramid.levels]
    interpolations = [(i.index[0], i.weight[0]) for i in pyramid.interpolations]
    radii = [level[1] for level in detector.levels]
    seeds = [oracle.tower(n, xyz[0], height[0], levels, radii, interpolations) for n in range(1, towers + 1)]
    seeds = np.concatenate(seeds, -1)
    if towers > 1:
        seeds = oracle.layer("conv_agg1", "bn_agg1", seeds)
        seeds = oracle.layer("conv_agg2", "bn_agg2", seeds)
    for kind in KINDS:  # half of the primitives are there
        flags = oracle.primitives(kind, levels[1][0], seeds, 0.9, 6)["flags"]
        state[f"conv_flag_{kind}2.bias"][1] -= np.median(flags[:, 1] - flags[:, 0])
    oracle = Oracle(state)

    variables, _ = variables_from_h3dnet(state, dataset)
    points, model = Points(xyz, height, every[None]), h3dnet.build(detector)
    output = jit(lambda v: model.apply(v, points, pyramid, train=False))(variables)
    raw = jax.tree.map(lambda x: np.asarray(x[0]), output.raw)
    close(raw.seeds.features, seeds)
    at = levels[1][0]
    votes, voted = oracle.vote("vgen", at, seeds)
    close(raw.votes.xyz, votes)
    close(raw.votes.features, voted)
    primitives = {}
    for kind in KINDS:
        own = primitives[kind] = oracle.primitives(kind, at, seeds, 0.9, 6)
        ours = raw.primitives[kind]
        close(ours.flag_logits, own["flags"])
        close(ours.features, own["pooled"])
        close(ours.center, own["center"])
        close(np.concatenate([ours.size, ours.class_logits], -1), own["channels"][:, 3:])
    there = [(p["placed"] == p["center"]).all(-1) for p in primitives.values()]
    assert 0.1 < np.mean(there) < 0.9  # both sorts are tested
    base = votes[raw.cluster_index]
    clusters, channels = oracle.head("pnet_final", base, votes, voted, 0.9, 6)
    close(raw.head_channels, channels)
    bins, turned = detector.num_heading_bins, dataset == "sunrgbd"
    center, size, heading = oracle.boxes(channels, base, bins, detector.mean_sizes, turned)
    places, matched, refined = oracle.refine(clusters, center, size, heading, primitives, 1.1, 9)
    own = raw.refinement
    close(own.face_centers, places[0])
    close(own.edge_centers, places[1])
    tolerance = {"rtol": 1e-3, "atol": 2e-3}  # coordinates of absent primitives are in the hundreds
    np.testing.assert_allclose(np.concatenate([own.face_features, own.edge_features]), matched, **tolerance)
    np.testing.assert_allclose(own.match_logits, oracle.scores(matched, "match"), **tolerance)
    np.testing.assert_allclose(own.class_match_logits, oracle.scores(matched, "match_sem"), **tolerance)
    np.testing.assert_allclose(own.channels, refined, **tolerance)

    # The final boxes: classes of the initial proposals, numbers of the refined ones.
    sizes = len(detector.mean_sizes)
    mixed = refined.copy()
    mixed[:, 5 : 5 + bins] = channels[:, 5 : 5 + bins]
    first = 5 + 2 * bins
    mixed[:, first : first + sizes] = channels[:, first : first + sizes]
    center, size, heading = oracle.boxes(mixed, base, bins, detector.mean_sizes, turned)
    final = jax.tree.map(lambda x: np.asarray(x[0]), output.predictions)
    np.testing.assert_allclose(final.center, center, **tolerance)
    np.testing.assert_allclose(final.size, size, **tolerance)
    np.testing.assert_allclose(np.cos(final.yaw + heading), 1, atol=1e-5)  # our yaw is minus their heading
    close(final.class_logits, channels[:, -sizes:])
    objectness = 1 / (1 + np.exp(refined[:, 0] - refined[:, 1]))
    np.testing.assert_allclose(final.objectness, objectness, **tolerance)


SMALL = {"towers": 1, "width": 1 / 32}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (make_state(18, 24, **SMALL), "143 channels but sunrgbd needs 79 .* fits --dataset=scannet"),
        (make_state(10, 12, features=2, **SMALL), "reads 2 features per point"),
        (make_state(10, 12, towers=3, width=1 / 32), r"missing \(backbone_net4"),
        ({"epoch": 1}, "no state_dict"),
    ],
)
def test_checkpoints_that_do_not_fit_say_what_differs(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        variables_from_h3dnet(checkpoint, "sunrgbd")


def test_shapes_are_compared_with_the_network(tmp_path):
    state = make_state(10, 12, **SMALL)
    state["pnet_final.bn_refine1.weight"] = np.zeros(9, np.float32)
    path = tmp_path / "weights.pth"
    path.write_bytes(writer.zip_bytes({name: writer.tensor(value) for name, value in state.items()}))
    with pytest.raises(ValueError, match=r"matching/merge/layer0/norm/scale has shape \(9,\)"):
        import_checkpoint("h3dnet", "sunrgbd", path)


@pytest.mark.data
def test_reads_the_golden_h3dnet(shared):
    checkpoint = read_torch_file(shared / "golden/h3dnet_scannet/weights.pth.xz")
    variables, config = variables_from_h3dnet(checkpoint, "scannet")
    check_shapes(variables, expected_variables(config))
    assert config.detector.width == 1
    assert count_parameters(variables["params"]) == 4_740_278


@pytest.mark.data
@pytest.mark.slow
def test_parity_with_the_official_h3dnet(shared):
    golden = shared / "golden/h3dnet_scannet"
    variables, config = import_checkpoint("h3dnet", "scannet", golden / "weights.pth.xz")
    table = check_h3dnet(variables, config, golden)
    assert table.ok, table.render()
    assert len(table.rows) > 100
