"""The table of TR3D's comparisons: on folders written from a small network of our own, and on the reference's."""

import json

import jax
import numpy as np
import pytest

from vrdistill_jax.detectors import tr3d
from vrdistill_jax.import_torch import find_importer, import_checkpoint
from vrdistill_jax.interop import parity_tr3d
from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.parity_sparse import build_case, read_case_arrays
from vrdistill_jax.interop.torch_tr3d import tr3d_config, tr3d_rules

RNG = np.random.default_rng(0)


def small_config(dataset):
    config = tr3d_config(dataset)
    config.detector.num_blocks, config.detector.width = (1, 1, 1, 1), 0.0625
    return config


def sorted_rows(coords, mask):
    rows = [
        np.pad(c[m], [(0, 0), (1, 0)], constant_values=b)
        for b, (c, m) in enumerate(zip(coords, mask, strict=True))
    ]
    return np.concatenate(rows)  # fmt: skip


def write_folder(folder, dataset, name="narrow_small"):
    """A golden folder of a small network's own numbers, inputs apart; returns what `check_tr3d` takes."""
    config = small_config(dataset)
    config.detector.voxel_size, detector = 0.05, config.detector
    clouds = [RNG.uniform(-1, 1, (count, 6)).astype(np.float32) for count in (300, 200)]
    inputs = {f"points{b}": cloud for b, cloud in enumerate(clouds)} | {"voxel_size": np.float32(0.05)}
    for b, count in enumerate((3, 2)):
        boxes = RNG.uniform(0.4, 1, (count, 7)).astype(np.float32)
        boxes[:, 6] *= detector.oriented
        inputs |= {f"gt_boxes{b}": boxes, f"gt_labels{b}": np.arange(count)}
    apart = folder / "inputs"
    apart.mkdir()
    np.savez(apart / f"{name}_inputs.npz", **inputs)
    steps = ("backbone0", "backbone1", "backbone2", "backbone3", "neck0", "neck1", "bbox_preds", "cls_preds")
    log = {"max_abs_diff_float32_vs_float64": dict.fromkeys(steps, 1e-5), "det0": {}, "det1": {}}
    (folder / f"{name}_log.json").write_text(json.dumps(log))
    np.savez(folder / f"{name}.npz")

    stored, log = read_case_arrays(folder, apart, name)
    case = build_case(name, stored, log, tr3d.pyramid_config(detector))
    model, scene = tr3d.build(detector), case.scene
    variables = jax.jit(lambda key: model.init(key, scene.points, case.pyramid, train=False))(
        jax.random.key(0)
    )
    forward = jax.jit(lambda v, p, q: model.apply(v, p, q, train=False))
    output = jax.tree.map(np.asarray, forward(variables, scene.points, case.pyramid))
    head, out = output.raw.head, {}
    levels = {f"backbone{n}": (case.pyramid.levels[3 + n].coords, x, case.pyramid.levels[3 + n].mask)
              for n, x in enumerate(output.raw.backbone.stages)}  # fmt: skip
    levels["stem"] = (case.pyramid.levels[2].coords, output.raw.backbone.stem, case.pyramid.levels[2].mask)
    levels |= {f"neck{n}": tuple(level) for n, level in enumerate(output.raw.neck)}
    for key, (coords, features, mask) in levels.items():
        rows = features[mask]
        out |= {f"{key}/coords": sorted_rows(coords, mask), f"{key}/feats_step": 2, f"{key}/feats": rows[::2],
                f"{key}/feats_mean": rows.mean(0), f"{key}/feats_meanabs": np.abs(rows).mean(0)}  # fmt: skip
    boxes = np.asarray(tr3d.boxes_from_head(head.points, head.box_channels))
    for b in range(2):
        for n in range(2):
            rows = head.mask[b] & (head.level == n)
            out |= {f"head{n}/points{b}": head.points[b][rows], f"head{n}/bbox_preds{b}": head.box_channels[b][rows],
                    f"head{n}/cls_preds{b}": head.class_logits[b][rows], f"head{n}/boxes_step": 2,
                    f"head{n}/boxes{b}": boxes[b][rows][::2, : 7 if detector.oriented else 6]}  # fmt: skip
    for variant, suffix in parity_tr3d.VARIANTS.items():
        detector.assigners.top_k.nearest_of_all = variant == "samsung"
        compute = jax.jit(lambda head, scene: parity_tr3d.unreduced_losses(head, scene, detector))
        index, classes, box = jax.tree.map(np.asarray, compute(head, scene))
        for b in range(2):
            rows = head.mask[b]
            out |= {f"assigned_{variant}{b}": index[b][rows],
                    f"loss_bbox_per_positive{suffix}{b}": box[b][rows & (index[b] >= 0)],
                    f"loss_cls_sum{suffix}{b}": classes[b][rows].sum()}  # fmt: skip
    detector.assigners.top_k.nearest_of_all = True
    found = jax.jit(lambda o, p: tr3d.decode(o, p, detector))(output, scene.points)
    for b in range(2):
        keep = np.asarray(found.mask[b])
        out |= {f"det_{k}{b}": np.asarray(x[b])[keep] for k, x in
                (("boxes", found.boxes), ("scores", found.score), ("labels", found.label))}  # fmt: skip
    np.savez(folder / f"{name}.npz", **out)
    return variables, config, folder, apart


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["scannet", "sunrgbd"])
def test_a_folder_of_our_own_numbers_passes_and_a_change_shows(tmp_path, dataset):
    variables, config, folder, apart = write_folder(tmp_path, dataset)
    table = parity_tr3d.check_tr3d(variables, config, folder, apart)
    assert table.ok, table.render()
    names = [row.name for row in table.rows]
    for part in ("neck1/feats", "samsung assigned1", "mmdet3d loss_bbox0", "head0/boxes0", "det1 matched"):
        assert any(part in name for name in names), part
    assert any("yaw" in name for name in names) is (dataset == "sunrgbd")
    assert "no units.npz there" in table.skipped

    path = folder / "narrow_small.npz"
    stored = dict(np.load(path))
    stored["assigned_mmdet3d0"][:3] = 2
    stored["neck1/feats"] += 1e-3
    np.savez(path, **stored)
    table = parity_tr3d.check_tr3d(variables, config, folder, apart)
    assert table.failed == ["narrow_small:neck1/feats", "narrow_small:mmdet3d assigned0"]


def test_folders_without_cases_or_of_the_other_dataset_say_so(tmp_path):
    config = small_config("scannet")
    with pytest.raises(
        ValueError, match="holds none of narrow_small, narrow_batch2_train, full_small, full_large"
    ):
        parity_tr3d.check_tr3d({}, config, tmp_path)
    arrays = {"points0": RNG.uniform(size=(9, 6)).astype(np.float32), "voxel_size": np.float32(0.1)}
    np.savez(tmp_path / "narrow_small.npz", **arrays, **{"head0/bbox_preds0": np.ones((4, 8))})
    (tmp_path / "narrow_small_log.json").write_text("{}")
    with pytest.raises(ValueError, match="8 box channels; it is of the other --dataset"):
        parity_tr3d.check_tr3d({}, config, tmp_path)
    config.detector.input_features = ("color", "height")
    with pytest.raises(ValueError, match="points0 has 6 columns, the checkpoint reads 7"):
        parity_tr3d.check_tr3d({}, config, tmp_path)


def test_full_width_cases_need_a_recipe(tmp_path):
    np.savez(tmp_path / "full_small.npz", points0=np.zeros((1, 6)))
    table = parity_tr3d.check_tr3d({}, small_config("scannet"), tmp_path)
    assert not table.ok
    assert table.skipped[-2:] == ["full_small: no weights for it", "no units.npz there"]


def test_a_case_without_points_is_named_and_refused_only_if_no_case_has_any(tmp_path):
    np.savez(tmp_path / "narrow_small.npz", voxel_size=np.float32(0.1))
    with pytest.raises(ValueError, match="narrow_small: points0 is neither in .*--inputs"):
        parity_tr3d.check_tr3d({}, small_config("scannet"), tmp_path)
    apart = tmp_path / "inputs"
    apart.mkdir()
    np.savez(apart / "full_small_inputs.npz", points0=np.zeros((1, 6)))
    np.savez(tmp_path / "full_small.npz")
    table = parity_tr3d.check_tr3d({}, small_config("scannet"), tmp_path, apart)
    assert f"narrow_small: no points0 there, nor in {apart}" in table.skipped
    assert "full_small: no weights for it" in table.skipped


def make_gradients():
    theirs = ["head.cls_conv.kernel", "neck.out_block_0.0.kernel"]
    ours = {
        "params/class_head/kernel": RNG.normal(size=(4, 3)),
        "params/neck/out_block_0/conv/kernel": RNG.normal(size=(27, 4, 4)),
    }
    return ours, dict(zip(theirs, ours.values(), strict=True))


def test_gradients_may_be_off_as_far_as_the_references_own():
    ours, theirs = make_gradients()
    stored = {f"grad/{name}": value * 1.01 for name, value in theirs.items()}
    exact = {f"grad/{name}": value for name, value in theirs.items()}
    exact |= {f"norm/{name}": np.linalg.norm(value) for name, value in theirs.items()}
    log = {"grad_norm_sum_absmax": {name: [np.linalg.norm(v) * 1.01, 0, 0] for name, v in theirs.items()}}

    class Case:
        name = "train"

    case, rules = Case(), {rule.theirs: rule for rule in tr3d_rules()}
    case.stored, case.log = stored, log
    for factor, passes in ((1.005, True), (1.015, False), (1.03, False)):
        for numbers in (exact, {}):
            table = ParityTable()
            gradient = {name: value * factor for name, value in ours.items()}
            parity_tr3d.check_gradients(table, case, numbers, gradient, rules)
            assert len(table.rows) == 5
            assert table.ok is (passes or not numbers), (factor, table.render())


@pytest.mark.data
@pytest.mark.slow
def test_parity_with_the_official_tr3d(shared):
    golden = shared / "golden/tr3d_sunrgbd"
    variables, config = import_checkpoint("tr3d", "sunrgbd", golden / "narrow_weights.pth")
    table = find_importer("tr3d").check(variables, config, golden)
    assert table.ok, table.render()
    assert len(table.rows) > 400
