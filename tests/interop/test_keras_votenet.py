"""The name map of the Keras VoteNet."""

import sys

import numpy as np
import pytest

from vrdistill_jax.import_torch import expected_variables, import_checkpoint
from vrdistill_jax.interop.keras_votenet import variables_from_keras
from vrdistill_jax.interop.name_map import check_shapes, flatten

h5py = pytest.importorskip("h5py")

# (convolution, our path, whether a norm follows), in the order of the file
LAYERS = [
    *[(n, f"backbone/sa{1 + (n - 1) // 3}/mlp/layer{(n - 1) % 3}", True) for n in range(1, 13)],
    (13, "backbone/fp1/mlp/layer0", True), (14, "backbone/fp1/mlp/layer1", True),
    (15, "backbone/fp2/mlp/layer0", True), (16, "backbone/fp2/mlp/layer1", True),
    (17, "voting/layer0", True), (18, "voting/layer1", True), (19, "voting_out", False),
    (20, "aggregation/mlp/layer0", True), (21, "aggregation/mlp/layer1", True), (22,
    "aggregation/mlp/layer2", True), (23, "proposal/layer0", True), (24, "proposal/layer1", True), (25,
    "proposal_out", False),
]  # fmt: skip
SIZES = [(4, 16), (16, 16), (16, 32), (35, 32), (32, 32), (32, 64), (67, 32), (32, 32), (32, 64), (67, 32),
(32, 32),
         (32, 64), (128, 64), (64, 64), (128, 64), (64, 64), (64, 64), (64, 64), (64, 67), (67, 32), (32,
         32), (32, 32), (32, 32), (32, 32), (32, 79)]  # fmt: skip


def write(path, leave_out=()):
    rng, arrays, norm = np.random.default_rng(0), {}, 0
    with h5py.File(path, "w") as file:
        for (conv, _, has_norm), (size, out) in zip(LAYERS, SIZES, strict=True):
            layer = {f"conv2d_{conv}": {"kernel": (1, 1, size, out)} | ({} if has_norm else {"bias": (out,)})}
            if has_norm:
                norm += 1
                leaves = ("gamma", "beta", "moving_mean", "moving_variance")
                layer[f"batch_normalization_{norm}"] = dict.fromkeys(leaves, (out,))
            for name, shapes in layer.items():
                for leaf, shape in shapes.items():
                    arrays[f"{name}/{leaf}"] = rng.uniform(0.5, 1, shape).astype(np.float32)
                    if f"{name}/{leaf}" not in leave_out:
                        file[f"{name}/{name}/{leaf}:0"] = arrays[f"{name}/{leaf}"]
        file.create_group("re_lu_1")
    return arrays


def test_layers_are_taken_in_the_order_of_the_network(tmp_path):
    path = tmp_path / "weights.h5"
    arrays = write(path)
    variables, config = import_checkpoint("votenet", "sunrgbd", path)
    flat, norm = flatten(variables), 0
    for conv, ours, has_norm in LAYERS:
        dense = f"params/{ours}/dense" if has_norm else f"params/{ours}"
        np.testing.assert_array_equal(flat.pop(f"{dense}/kernel"), arrays[f"conv2d_{conv}/kernel"][0, 0])
        if not has_norm:
            np.testing.assert_array_equal(flat.pop(f"{dense}/bias"), arrays[f"conv2d_{conv}/bias"])
            continue
        if ours.startswith(("voting", "proposal")):
            assert not flat.pop(f"{dense}/bias").any()
        norm += 1
        theirs = f"batch_normalization_{norm}"
        np.testing.assert_array_equal(flat.pop(f"params/{ours}/norm/scale"), arrays[f"{theirs}/gamma"])
        np.testing.assert_array_equal(flat.pop(f"params/{ours}/norm/bias"), arrays[f"{theirs}/beta"])
        np.testing.assert_array_equal(
            flat.pop(f"batch_stats/{ours}/norm/mean"), arrays[f"{theirs}/moving_mean"]
        )
        np.testing.assert_array_equal(
            flat.pop(f"batch_stats/{ours}/norm/var"), arrays[f"{theirs}/moving_variance"]
        )
    assert not flat
    detector = config.detector
    assert (detector.aggregation_radius, detector.aggregation_neighbors) == (0.8, 64)
    assert (detector.normalize_votes, detector.norm_epsilon) == (False, 1e-3)


def test_a_missing_layer_and_a_damaged_file_are_named(tmp_path):
    path = tmp_path / "weights.h5"
    write(path, leave_out=["batch_normalization_7/beta"])
    with pytest.raises(ValueError, match="1 missing .batch_normalization_7/beta"):
        variables_from_keras(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cannot be read as an HDF5 file"):
        variables_from_keras(path)


def test_missing_h5py_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"vrdistill-jax\[keras\]"):
        variables_from_keras(tmp_path / "weights.h5")


@pytest.mark.data
def test_reads_the_real_weights(shared):
    variables, config = variables_from_keras(shared / "real/weights/votenet_sunrgbd_keras.h5")
    check_shapes(variables, expected_variables(config))
    assert config.detector.width == 1.0
