"""Name maps of the official 3DETRs: random checkpoints give what a NumPy twin that reads the official names gives."""

from functools import partial

import jax
import numpy as np
import pytest
from oracles import torch_writer as writer
from oracles.three_detr import Oracle, make_state

from vrdistill_jax.detectors import three_detr
from vrdistill_jax.geometry.host.point_pyramid import build_point_pyramid
from vrdistill_jax.import_torch import expected_variables, find_importer, import_checkpoint
from vrdistill_jax.interop.name_map import check_shapes, flatten
from vrdistill_jax.interop.torch_file import read_torch_file
from vrdistill_jax.interop.torch_three_detr import variables_from_three_detr
from vrdistill_jax.structs import Points

# Each program runs once: compiling it well would take longer than it saves.
jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
HEADS = {"scannet": (18, 1), "sunrgbd": (10, 12)}


@pytest.mark.parametrize(("dataset", "masked"), [("scannet", True), ("sunrgbd", False)])
def test_official_tensors_land_where_the_network_reads_them(dataset, masked):
    state = make_state(*HEADS[dataset], masked)
    assert len(state) == (305 if masked else 293)
    variables, config = variables_from_three_detr({"model": state, "epoch": 3}, dataset, masked)
    assert config.detector.width == 1 / 16
    assert config.detector.name == ("3detr_m" if masked else "3detr")
    assert config.detector.num_proposals == (256 if dataset == "scannet" else 128)
    check_shapes(variables, expected_variables(config))
    flat = flatten(variables)
    # every tensor arrived exactly once
    theirs = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(flat) == len(theirs)
    sums = [sorted(float(np.sum(v, dtype=np.float64)) for v in tree.values()) for tree in (flat, theirs)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_network_gives_the_numbers_of_a_numpy_twin(masked):
    state = make_state(10, 12, masked, features=3, decoder_layers=2, seed=1)
    variables, config = variables_from_three_detr(state, "sunrgbd", masked)
    detector = config.detector
    assert detector.decoder_layers == 2
    assert detector.input_features == ("color",)
    detector.num_proposals = 12
    detector.levels = ((64, 0.5, 8), (32, 0.8, 6)) if masked else ((64, 0.5, 8),)
    detector.masking_radii = (0.7, 0.9, 1.1) if masked else ()
    rng = np.random.default_rng(2)
    xyz = rng.uniform(-2, 3, (2, 300, 3)).astype(np.float32)
    color = rng.random((2, 300, 3)).astype(np.float32)
    every, pyramid_config = np.ones(300, bool), three_detr.pyramid_config(detector)
    pyramid = jax.tree.map(
        lambda *x: np.stack(x), *(build_point_pyramid(cloud, every, pyramid_config) for cloud in xyz)
    )
    model, points = three_detr.build(detector), Points(xyz, color, np.ones((2, 300), bool))
    output = jit(lambda v: model.apply(v, points, pyramid, train=False))(variables)
    head, boxes = output.raw.head, output.predictions
    for b in range(2):
        levels = [(level.xyz[b], level.neighbor_index[b]) for level in pyramid.levels]
        radii = [level[1] for level in detector.levels]
        expected = Oracle(state).forward(
            xyz[b], color[b], levels[:-1], levels[-1][0], radii, detector.masking_radii
        )
        ours = (head.class_logits, head.center, None, head.heading_logits, head.heading_residual)
        for values, own in zip(expected.values(), ours, strict=True):
            if own is not None:
                np.testing.assert_allclose(own[:, b], values, atol=2e-4)
        np.testing.assert_allclose(boxes.size[b], expected["size"][-1], atol=2e-4)
        heading = expected["heading_logits"][-1].argmax(-1)
        residual = expected["heading_residual"][-1][np.arange(12), heading]
        turn = boxes.yaw[b] + heading * np.pi / 6 + residual * np.pi / 12
        np.testing.assert_allclose(np.cos(turn), 1, atol=1e-5)  # our yaw is minus their heading
        logits = expected["logits"][-1]
        objectness = 1 - 1 / np.exp(logits - logits[:, -1:]).sum(-1)
        np.testing.assert_allclose(boxes.objectness[b], objectness, atol=1e-4)
    if masked:  # the masks matter
        detector.masking_radii = ()
        model = three_detr.build(detector)
        unmasked = jit(lambda v: model.apply(v, points, pyramid, train=False))(variables)
        assert np.abs(unmasked.raw.head.center - head.center).max() > 1e-3


SMALL = {"decoder_layers": 1, "encoder_layers": 1}


def test_options_of_the_training_script_are_taken_over():
    options = {
        "nqueries": 77, "enc_nhead": 2, "mlp_dropout": 0.2, "loss_giou_weight": 0.5, "matcher_cls_cost": 4,
        "loss_no_object_weight": 0.3, "checkpoint_dir": "somewhere", "preenc_npoints": 1000, "dec_nhead": 2,
    }  # fmt: skip
    state = make_state(10, 12, False, decoder_layers=1)
    detector = variables_from_three_detr({"model": state, "args": options}, "sunrgbd")[1].detector
    assert (detector.num_proposals, detector.num_heads, detector.head_dropout) == (77, 2, 0.2)
    assert (detector.loss_weight.giou, detector.loss_weight["class"]) == (0.5, 1.0)
    assert (detector.match_cost["class"], detector.match_cost.center) == (4.0, 5.0)
    assert detector.no_object_weight == 0.3
    assert detector.levels == ((1000, 0.2, 64),)
    masked = {"model": make_state(10, 12, True, **SMALL), "args": options}
    detector = variables_from_three_detr(masked, "sunrgbd")[1].detector
    assert detector.levels == ((1000, 0.2, 64), (500, 0.4, 32))


@pytest.mark.parametrize(
    ("checkpoint", "masked", "message"),
    [
        (make_state(10, 12, True, **SMALL), False, "is of 3DETR-m; import it with --detector=3detr_m"),
        (make_state(10, 12, False, **SMALL), True, "is of 3DETR; import it with --detector=3detr$"),
        (make_state(18, 1, False, **SMALL), False, "19 classes .* needs 11 and 12; it fits --dataset=scannet"),
        (make_state(10, 12, False, features=2, **SMALL), False, "reads 2 features per point"),
        ({"model": make_state(10, 12, False, **SMALL), "args": {"nqueries": 10**9}}, False, "nqueries is 1000000000"),
        ({"model": make_state(10, 12, False, **SMALL), "args": {"mlp_dropout": "x"}}, False, "mlp_dropout is no finite"),
        ({"model": make_state(10, 12, False, **SMALL), "args": {"dec_nhead": 8}}, False, "decoder has 8 .* encoder 4"),
        ({"model": make_state(10, 12, False, **SMALL), "args": {"pos_embed": "sine"}}, False, "pos_embed='sine'"),
        ({"epoch": 1}, False, "no state_dict"),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit_say_what_differs(checkpoint, masked, message):
    with pytest.raises(ValueError, match=message):
        variables_from_three_detr(checkpoint, "sunrgbd", masked)


def test_either_kind_is_recognised():
    """--detector=3detr takes both; --detector=3detr_m 3DETR-m only."""
    for masked in (False, True):
        state = make_state(10, 12, masked, **SMALL)
        _, config = variables_from_three_detr(state, "sunrgbd")
        assert config.detector.name == ("3detr_m" if masked else "3detr")
    importer = find_importer("3detr_m")
    with pytest.raises(ValueError, match="is of 3DETR; import it with --detector=3detr$"):
        importer.from_torch(make_state(10, 12, False, **SMALL), "sunrgbd")


def test_a_missing_tensor_is_named():
    state = make_state(10, 12, False, **SMALL)
    del state["pos_embedding.gauss_B"]
    with pytest.raises(ValueError, match=r"1 missing \(pos_embedding.gauss_B\)"):
        variables_from_three_detr(state, "sunrgbd")


def test_shapes_are_compared_with_the_network(tmp_path):
    state = make_state(10, 12, False)
    state["decoder.norm.weight"] = np.zeros(15, np.float32)
    path = tmp_path / "weights.pth"
    path.write_bytes(writer.zip_bytes({name: writer.tensor(value) for name, value in state.items()}))
    with pytest.raises(ValueError, match=r"decoder_norm/scale has shape \(15,\), the config needs \(16,\)"):
        import_checkpoint("3detr", "sunrgbd", path)


@pytest.mark.data
def test_reads_the_golden_3detr(shared):
    checkpoint = read_torch_file(shared / "golden/3detr_sunrgbd/weights.pth.xz")
    variables, config = variables_from_three_detr(checkpoint, "sunrgbd")
    check_shapes(variables, expected_variables(config))
    np.testing.assert_array_equal(
        variables["batch_stats"]["position"]["frequencies"], checkpoint["model"]["pos_embedding.gauss_B"]
    )


@pytest.mark.data
@pytest.mark.slow
def test_parity_with_the_official_3detr(shared):
    golden = shared / "golden/3detr_sunrgbd"
    variables, config = import_checkpoint("3detr", "sunrgbd", golden / "weights.pth.xz")
    table = find_importer("3detr").check(variables, config, golden)
    assert table.ok, table.render()
    assert len(table.rows) > 800
