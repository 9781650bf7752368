"""What the comparisons of sparse detectors share: reading cases, recipes of weights, rows of voxels, matching detections."""

import hashlib
import json

import numpy as np
import pytest

from vrdistill_jax.interop.parity import ParityTable
from vrdistill_jax.interop.parity_sparse import (
    SLACK,
    batch_coords,
    build_case,
    check_detections,
    check_input,
    check_level,
    match_detections,
    read_case_arrays,
    recipe_tensors,
)
from vrdistill_jax.nn.sparse_resnet import tr3d_pyramid_config
from vrdistill_jax.structs import Detections

RNG = np.random.default_rng(0)
LOG = {"max_abs_diff_float32_vs_float64": {"neck0": 1e-6, "cls_preds": [1e-6, 3e-6]}}


def clouds():
    return [RNG.uniform(-1, 1, (count, 6)).astype(np.float32) for count in (30, 20)]


def write_case(folder, apart=None, log=LOG, **more):
    a, b = clouds()
    inputs = {"points0": a, "points1": b, "voxel_size": np.float32(0.1)}
    inputs |= {
        "gt_boxes0": np.ones((2, 7), np.float32), "gt_labels0": np.array([1, 0]),
        "gt_boxes1": np.ones((1, 7), np.float32), "gt_labels1": np.array([1]),
    }  # fmt: skip
    np.savez(folder / "small.npz", **({} if apart else inputs), **more)
    if apart:
        np.savez(apart / "small_inputs.npz", **inputs)
    if log is not None:
        (folder / "small_log.json").write_text(json.dumps(log))
    return inputs


def read(folder, inputs=None):
    stored, log = read_case_arrays(folder, inputs or folder, "small")
    return build_case("small", stored, log, tr3d_pyramid_config(float(stored["voxel_size"])))


@pytest.mark.parametrize("split", [False, True])
def test_inputs_lie_in_the_case_or_apart(tmp_path, split):
    apart = tmp_path / "inputs"
    apart.mkdir()
    expected = write_case(tmp_path, apart if split else None)
    case = read(tmp_path, apart)
    assert case.num_scenes == 2
    points = case.scene.points
    np.testing.assert_array_equal(points.mask.sum(1), [30, 20])
    np.testing.assert_array_equal(points.xyz[1, :20], expected["points1"][:, :3])
    np.testing.assert_array_equal(case.scene.boxes.mask, [[True, True], [True, False]])
    np.testing.assert_array_equal(case.scene.boxes.label, [[1, 0], [1, -1]])
    assert case.tolerance("cls_preds") == pytest.approx(SLACK * 3e-6)


def test_incomplete_and_contradicting_files_say_so(tmp_path):
    apart = tmp_path / "inputs"
    apart.mkdir()
    write_case(tmp_path, apart)
    with pytest.raises(ValueError, match="points0 is neither in .*small.npz nor in .*small_inputs.npz"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"small.npz has no grad/x; is the golden folder complete"):
        read(tmp_path, apart).stored["grad/x"]
    with pytest.raises(ValueError, match="small_log.json has no .* of stem"):
        read(tmp_path, apart).tolerance("stem")
    write_case(tmp_path)  # other points than those apart
    with pytest.raises(ValueError, match="points0 in .*small_inputs.npz is not that in .*small.npz"):
        read(tmp_path, apart)
    (tmp_path / "small_log.json").unlink()
    with pytest.raises(ValueError, match="small_log.json is missing; the tolerances"):
        read(tmp_path)


def test_recipes_are_drawn_and_checked(tmp_path):
    kernel = np.random.RandomState(7).standard_normal((2, 3)).astype(np.float64) * 0.5  # noqa: NPY002
    kernel = kernel.astype(np.float32)
    entry = {"shape": [2, 3], "seed": 7, "std": 0.5, "sha256": hashlib.sha256(kernel.tobytes()).hexdigest()}
    np.savez(tmp_path / "full_weights_small.npz", bias=np.arange(3.0))
    path = tmp_path / "full_weights_recipe.json"
    path.write_text(json.dumps({"recipe": {"kernel": entry}}))
    tensors = recipe_tensors(tmp_path)
    assert tensors.keys() == {"bias", "kernel"}
    np.testing.assert_array_equal(tensors["kernel"], kernel)
    path.write_text(json.dumps({"recipe": {"kernel": entry | {"seed": 8}}}))
    with pytest.raises(ValueError, match="kernel drawn from seed 8 has another sha256"):
        recipe_tensors(tmp_path)


def stored_level(case, features, step):
    """A level of the case as the reference stores it: rows sorted by (batch, x, y, z)."""
    level = case.pyramid.levels[3]
    rows = features[level.mask]
    coords = np.concatenate(
        [np.pad(level.coords[b][level.mask[b]], [(0, 0), (1, 0)], constant_values=b) for b in range(2)]
    )
    assert (np.lexsort(coords.T[::-1]) == np.arange(len(coords))).all()
    return {
        "neck0/coords": coords.astype(np.int16),
        "neck0/feats_step": np.int32(step),
        "neck0/feats": rows[::step],
        "neck0/feats_mean": rows.mean(0, dtype=np.float64),
        "neck0/feats_meanabs": np.abs(rows).mean(0, dtype=np.float64),
    }


def test_levels_are_compared_by_coordinates_strided_rows_and_means(tmp_path):
    write_case(tmp_path)
    case = read(tmp_path)
    level = case.pyramid.levels[3]
    features = RNG.normal(size=(*level.mask.shape, 4)).astype(np.float32)
    features[~level.mask] = 99  # pads do not count
    case.stored.update(stored_level(case, features, step=3))

    def judge(features, coords=level.coords):
        table = ParityTable()
        check_level(table, case, "neck0", coords, level.mask, features, 1e-5)
        return table.failed

    assert judge(features) == []
    moved = features.copy()
    rows = np.argwhere(level.mask)
    moved[tuple(rows[1])] += 1.0  # a row that is not stored shows in the means
    assert judge(moved) == ["small:neck0/mean", "small:neck0/meanabs"]
    moved = features.copy()
    moved[tuple(rows[3])] += 1e-4
    assert judge(moved)[0] == "small:neck0/feats"
    shifted = level.coords + np.array([8, 0, 0], np.int32)
    assert judge(features, shifted) == ["small:neck0/coords"]


def test_the_input_is_counted_through_the_scenes(tmp_path):
    write_case(tmp_path)
    case = read(tmp_path)
    first = case.pyramid.levels[0]
    coords = batch_coords(first.coords, first.mask)
    points = np.concatenate([case.stored[f"points{b}"] for b in range(2)])
    batch = np.repeat([0, 1], [30, 20])
    voxel = np.floor(points[:, :3] / np.float32(0.1)).astype(int)
    all_rows = [tuple(row) for row in np.column_stack([batch, voxel])]
    lowest = [all_rows.index(tuple(row)) for row in coords]
    case.stored.update(
        {"in/coords": coords, "in/unique_index": np.array(lowest), "in/feats": points[lowest, 3:]}
    )
    table = ParityTable()
    check_input(table, case)
    assert table.ok, table.render()
    case.stored["in/unique_index"][-1] -= 1
    check_input(table, case)
    assert table.failed == ["small:in/unique_index"]


def some_detections(count=20):
    boxes = RNG.uniform(0.5, 3, (count, 7)).astype(np.float32)
    score = np.sort(RNG.uniform(0.1, 1, count))[::-1].astype(np.float32)
    return boxes, score, RNG.integers(0, 3, count).astype(np.int32)


def test_detections_match_one_to_one_whatever_their_order():
    boxes, score, label = some_detections()
    order = RNG.permutation(len(boxes))
    theirs = boxes[order] + 1e-5, score[order], label[order]
    pairs = match_detections(boxes, label, score, *theirs)
    assert sorted(pairs[:, 0]) == list(range(20))
    np.testing.assert_array_equal(order[pairs[:, 1]], pairs[:, 0])
    assert len(match_detections(boxes, label + 1, score, *theirs)) < 20
    twice = np.repeat(boxes[:1], 2, 0), np.repeat(label[:1], 2), np.repeat(score[:1], 2)
    assert len(match_detections(*twice, boxes[:1], score[:1], label[:1])) == 1


@pytest.mark.parametrize(
    ("noise", "lost", "passes"), [(1e-9, 0, True), (1e-9, 1, False), (1e-3, 1, True), (1e-3, 9, False)]
)
def test_detections_may_flip_only_where_scores_moved_over_a_margin(tmp_path, noise, lost, passes):
    log = LOG | {"det0": {"margin_at_1000": 1e-6, "min_dist_to_score_thr_among_top1000": 1e-5}}
    write_case(tmp_path, log=log)
    case = read(tmp_path)
    boxes, score, label = some_detections()
    case.stored.update(det_boxes0=boxes, det_scores0=score, det_labels0=label)
    found = Detections(boxes[None], score[None], label[None], (np.arange(20) >= lost)[None])
    table = ParityTable()
    check_detections(table, case, found, [noise], 1e-4)
    assert table.ok is passes, table.render()
    assert table.skipped == ["no det_boxes1 in small"]
