"""The comparison with a golden folder, on one that the network in NumPy made."""

import shutil

import jax
import numpy as np
import pytest
from oracles import fcaf3d as oracle
from oracles import fcaf3d_golden

from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid
from vrdistill_jax.import_torch import find_importer, import_checkpoint
from vrdistill_jax.interop.parity_fcaf3d import contained_rows, kept_voxels
from vrdistill_jax.nn.sparse_resnet import FCAF3D_LEVELS, fcaf3d_pyramid_config

CLASSES = {"scannet": (18, 6), "sunrgbd": (10, 8)}


@pytest.fixture(autouse=True)
def _compile_fast():
    """Each program runs once: compiling it well would take longer than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_folder(folder, dataset, cases, inputs=None):
    """A golden folder with some of the real one's cases."""
    classes, channels = CLASSES[dataset]
    state = oracle.random_state(classes, channels)
    clouds, boxes = fcaf3d_golden.make_clouds(), fcaf3d_golden.make_boxes(channels == 8, classes)
    fcaf3d_golden.write_weights(folder, state)
    for name in cases:
        if name.startswith("narrow"):
            threshold = 900 if name.endswith("prune900") else 100_000
            fcaf3d_golden.write_case(
                folder, name, state, clouds, boxes, threshold, inputs, train=name.endswith("train")
            )
        else:
            full = fcaf3d_golden.write_recipe(folder, state)
            fcaf3d_golden.write_case(folder, name, full, clouds[:1], boxes[:1], step=3)


def compare(folder, dataset, inputs=None):
    variables, config = import_checkpoint("fcaf3d", dataset, folder / "narrow_weights.pth")
    return find_importer("fcaf3d").check(variables, config, folder, inputs)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A folder of axis-aligned boxes whose inputs lie apart, and one with the inputs."""
    folder, inputs = tmp_path_factory.mktemp("golden"), tmp_path_factory.mktemp("inputs")
    make_folder(folder, "scannet", ("narrow_batch2_prune900", "narrow_batch2_train"), inputs)
    return folder, inputs


@pytest.mark.slow
def test_all_cases_of_axis_aligned_boxes(aligned, tmp_path):
    folder, inputs = aligned
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    make_folder(tmp_path, "scannet", ("full_large_prune12000",))
    table = compare(tmp_path, "scannet", inputs)
    assert table.ok, table.render()
    names = [row.name for row in table.rows]
    assert len(names) == len(set(names)) > 350
    for name in (
        "narrow_batch2_prune900:prune2 kept by one side only",
        "narrow_batch2_prune900:center_targets1",
        "narrow_batch2_prune900:head0/boxes1 decoding",
        "narrow_batch2_train:train_head3/center_preds0",
        "narrow_batch2_train:grad/head.scales.0.scale",
        "narrow_batch2_train:|grad head.conv_cls.bias|",
        "narrow_batch2_train:after_train/backbone.layer4.0.downsample.1.bn.running_var",
        "narrow_batch2_train:train_center_loss",
        "full_large_prune12000:head1/max_cls_logit0",
        "full_large_prune12000:det0 boxes",
    ):
        assert name in names
    assert not any("unknown" in what for what in table.skipped)


@pytest.mark.slow
def test_turned_boxes(tmp_path):
    make_folder(tmp_path, "sunrgbd", ("narrow_batch2_prune900",))
    table = compare(tmp_path, "sunrgbd")
    assert table.ok, table.render()
    assert "narrow_batch2_prune900:head0/boxes0 yaw" in [row.name for row in table.rows]
    assert "no narrow_batch2_train.npz there" in table.skipped


@pytest.mark.slow
def test_what_differs_is_named(aligned, tmp_path):
    folder, inputs = aligned
    shutil.copy(folder / "narrow_weights.pth", tmp_path)
    name = "narrow_batch2_prune900"
    shutil.copy(folder / f"{name}_log.json", tmp_path)
    stored = dict(np.load(folder / f"{name}.npz"))
    stored["backbone1/feats"][3, 0] += 0.01
    stored["prune2/interp_scores"][7] += 0.01
    stored["head1/bbox_preds0"][5, 2] *= 1.01
    stored["head2/center_preds0"][1] += 0.01
    stored["assigned0"][np.flatnonzero(stored["assigned0"] >= 0)[0]] = -1
    stored["eval_center_loss"] = stored["eval_center_loss"] * np.float32(1.01)
    stored["det_scores1"][4] += np.float32(5e-4)
    stored["det_boxes0"] = np.delete(stored["det_boxes0"], [3, 4, 5], 0)
    stored["det_scores0"] = np.delete(stored["det_scores0"], [3, 4, 5])
    stored["det_labels0"] = np.delete(stored["det_labels0"], [3, 4, 5])
    np.savez(tmp_path / f"{name}.npz", **stored)
    table = compare(tmp_path, "scannet", inputs)
    assert set(table.failed) == {
        f"{name}:{what}"
        for what in (
            "backbone1/feats", "prune2/interp_scores", "head1/bbox_preds0", "head1/boxes0 decoding",
            "head2/center_preds0", "assigned0", "eval_center_loss", "det1 scores", "det0 matched",
        )
    }  # fmt: skip


def test_folders_without_cases_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none of narrow_batch2_train"):
        find_importer("fcaf3d").check({}, None, tmp_path)


def test_rows_of_integers():
    rows = np.array([[0, 1, 2, 3], [0, -1, 2, 3], [1, 1, 2, 3]])
    np.testing.assert_array_equal(contained_rows(rows, rows[[2, 0]]), [True, False, True])
    np.testing.assert_array_equal(contained_rows(rows, rows[:0]), [False] * 3)


def test_kept_voxels_are_found_again():
    cloud, mask = fcaf3d_golden.make_clouds()[0][:, :3], np.ones(70, bool)
    pyramid = jax.tree.map(lambda x: x[None], build_voxel_pyramid(cloud, mask, fcaf3d_pyramid_config(0.04)))
    assert kept_voxels({}, pyramid) is None
    stored = {}
    for n, row in zip((2, 1, 0), FCAF3D_LEVELS, strict=False):
        coords = pyramid.levels[row].coords[0]
        stored[f"prune{n}/coords_after"] = np.pad(coords[: 5 + n], ((0, 0), (1, 0))).astype(np.int16)
    for n, mask in zip((2, 1, 0), kept_voxels(stored, pyramid), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(mask[0]), np.arange(5 + n))
