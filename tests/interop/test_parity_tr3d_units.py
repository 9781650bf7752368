"""Single operations of TR3D: groups under the names that a golden folder gives them, from naive NumPy."""

import numpy as np
import pytest

from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SCANNET_MEAN_SIZES
from vrdistill_jax.detectors import tr3d
from vrdistill_jax.interop.parity import ParityTable, load_arrays
from vrdistill_jax.interop.parity_tr3d_units import check_units

RNG = np.random.default_rng(0)
CONFIG = tr3d.default_config(SCANNET_CLASSES, SCANNET_MEAN_SIZES, False)


def judge(stored):
    table = ParityTable()
    check_units(table, stored, CONFIG)
    return table


def aligned_boxes():
    """Pairs with their IoU and DIoU loss in NumPy, and gradients by central differences."""
    pred = np.concatenate([RNG.uniform(-0.3, 0.3, (20, 3)), RNG.uniform(0.5, 1.5, (20, 3))], 1)
    target = np.concatenate([RNG.uniform(-0.3, 0.3, (20, 3)), RNG.uniform(0.5, 1.5, (20, 3))], 1)

    def iou_and_loss(p):
        low, high = p[:, :3] - p[:, 3:] / 2, p[:, :3] + p[:, 3:] / 2
        low_t, high_t = target[:, :3] - target[:, 3:] / 2, target[:, :3] + target[:, 3:] / 2
        both = np.prod(np.maximum(np.minimum(high, high_t) - np.maximum(low, low_t), 0), 1)
        iou = both / (np.prod(p[:, 3:], 1) + np.prod(target[:, 3:], 1) - both)
        diagonal = np.sum((np.maximum(high, high_t) - np.minimum(low, low_t)) ** 2, 1)
        return iou, 1 - iou + np.sum((p[:, :3] - target[:, :3]) ** 2, 1) / diagonal

    gradient, step = np.zeros_like(pred), 1e-6
    for column in range(6):
        moved = np.zeros(6)
        moved[column] = step
        gradient[:, column] = (iou_and_loss(pred + moved)[1] - iou_and_loss(pred - moved)[1]) / (2 * step)
    iou, loss = iou_and_loss(pred)
    return {
        "aa/pred": pred,
        "aa/target": target,
        "aa/iou": iou,
        "aa/diou_loss": loss,
        "aa/grad_pred_of_sum": gradient,
    }


def focal():
    logits, target = RNG.normal(size=(12, 18)) * 2, RNG.integers(0, 19, 12)

    def loss(z):
        p, hit = 1 / (1 + np.exp(-z)), target[:, None] == np.arange(18)
        return np.where(hit, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))

    gradient = (loss(logits + 1e-5) - loss(logits - 1e-5)) / 2e-5
    return {
        "focal/logits": logits,
        "focal/target": target,
        "focal/loss": loss(logits),
        "focal/grad": gradient,
    }


def assignment():
    """A naive loop over boxes, both official variants."""
    grids = [np.meshgrid(*[np.arange(-4, 5) * step] * 3, indexing="ij") for step in (0.16, 0.32)]
    lattices = [np.stack(grid, -1).reshape(-1, 3) for grid in grids]
    centers = RNG.uniform(-0.6, 0.6, (30, 3))
    boxes = np.concatenate([centers, np.ones((30, 3)), np.zeros((30, 1))], 1).astype(np.float32)
    labels, points = RNG.integers(0, 18, 30), np.concatenate(lattices).astype(np.float32)
    level = np.repeat([0, 1], [len(lattice) for lattice in lattices])
    distance = ((points[None] - boxes[:, None, :3]) ** 2).sum(-1)
    near = np.zeros(distance.shape, bool)
    for row, label in enumerate(labels):
        on_level = np.where(level == CONFIG.label_levels[label], distance[row], np.inf)
        near[row] = on_level < np.sort(on_level)[6]
    owner = np.where(near.any(0), np.where(near, distance, np.inf).argmin(0), -1)
    strict = np.where(owner == distance.argmin(0), owner, -1)
    return {
        "assign/points0": lattices[0], "assign/points1": lattices[1], "assign/gt_boxes": boxes, "assign/gt_labels": labels,
        "assign/samsung": strict, "assign/mmdet3d": owner,
    }  # fmt: skip


@pytest.mark.parametrize(("make", "rows"), [(aligned_boxes, 3), (focal, 2), (assignment, 2)])
def test_groups_of_axis_aligned_data_pass_and_changes_show(make, rows):
    stored = make()
    table = judge(stored)
    assert table.ok, table.render()
    assert len(table.rows) == rows
    assert table.skipped == []
    for row in table.rows:
        name = row.name.removeprefix("units:")
        changed = stored[name].copy()
        changed.flat[3] += 1
        assert judge(stored | {name: changed}).failed == [row.name]


def test_names_that_fit_two_quantities_are_read_either_way():
    stored = aligned_boxes()
    loss, gradient = 1 - stored["aa/iou"], stored["aa/grad_pred_of_sum"]
    assert judge(stored | {"aa/iou": loss, "aa/diou_grad": gradient, "aa/diou": stored["aa/diou_loss"]}).ok
    assert judge(stored | {"aa/iou": loss + 1e-3}).failed == ["units:aa/iou"]
    sums = focal()
    assert judge(sums | {"focal/loss": sums["focal/loss"].sum(-1)}).ok
    assert judge(sums | {"focal/loss": np.asarray(sums["focal/loss"].sum())}).ok


@pytest.mark.parametrize(("make", "renamed"), [(aligned_boxes, "aa/pred"), (focal, "focal/logits")])
def test_groups_without_their_inputs_are_listed_not_compared(make, renamed):
    stored = make()
    stored[f"{renamed}_of_another_name"] = stored.pop(renamed)
    table = judge(stored)
    assert table.rows == []
    assert len(table.skipped) == len(stored)


def test_unknown_groups_and_entries_are_listed():
    table = judge({"new/x": np.ones(3), **focal(), "focal/odd": np.ones(2), "assign/other": np.ones(2)})
    assert table.ok
    assert table.skipped == [
        "units:new/x (unknown)",
        "units:focal/odd (unknown)",
        "units:assign/other (unknown)",
    ]


@pytest.mark.data
@pytest.mark.slow
def test_official_units(shared):
    table = judge(load_arrays(shared / "golden/tr3d_sunrgbd/units.npz"))
    assert table.ok, table.render()
    assert len(table.rows) == 8
    assert table.skipped == []
