"""Writes a golden folder of FCAF3D, in the names and orders of the real one, from the network in NumPy."""

import hashlib
import json

import numpy as np
from oracles import fcaf3d, sparse, torch_writer

VOXEL_SIZE = 0.04
ROUNDING = 1e-5  # what the logs say of the reference's float32: the usual size of it
CHECKED = ("head.scales.0.scale", "head.conv_cls.bias", "head.conv_center.kernel")  # with gradients


def make_clouds(seed=0, counts=(70, 45)):
    """Clouds with colours, in two voxels of stride 64 each, and the boxes in them."""
    rng, clouds = np.random.default_rng(seed), []
    for count in counts:
        xyz = rng.uniform((-2.4, 0.1, 0.1), (2.4, 2.4, 2.0), (count, 3))
        xyz[1] = xyz[0] + 1e-3  # two points in one voxel, almost surely
        clouds.append(np.concatenate([xyz, rng.random((count, 3))], 1).astype(np.float32))
    return clouds


def make_boxes(rotated, num_classes, seed=0, counts=(6, 3)):
    """(boxes f32[n, 7], labels) per scene; the last box of each scene nearly is its first."""
    rng, found = np.random.default_rng(seed), []
    for count in counts:
        center = rng.uniform((-2, 0.6, 0.6), (2, 1.8, 1.8), (count, 3))
        size = rng.uniform(0.7, 2.4, (count, 3))
        yaw = rng.uniform(-np.pi, np.pi, (count, 1)) * rotated
        rows = np.concatenate([center, size, yaw], 1).astype(np.float32)
        rows[-1] = rows[0]
        rows[-1, :6] += 0.05
        found.append((rows, rng.integers(0, num_classes, count).astype(np.int32)))
    return found


def write_case(folder, name, state, clouds, boxes, threshold=100_000, inputs=None, step=1, train=False):
    """Writes NAME.npz, NAME_log.json and, if `inputs` is a folder, NAME_inputs.npz.

    Every `step`-th row of features, predictions and boxes is stored.
    """
    given, stored = _inputs(clouds, boxes), {}
    log = {
        "max_abs_diff_float32_vs_float64": dict.fromkeys(
            [*(f"backbone{n}" for n in range(4)), "bbox_preds", "cls_preds", "center_preds"], [ROUNDING]
        )
    }
    scenes = [_voxels(cloud) for cloud in clouds]
    network = fcaf3d.Network(state)
    stem, stages = network.backbone(scenes)
    _add_tensor(stored, "stem", 4, stem, step)
    for n, stage in enumerate(stages):
        _add_tensor(stored, f"backbone{n}", 8 * 2**n, stage, step)
    levels, prunings = network.neck(stages, threshold)
    for n, pruning in enumerate(prunings):
        stored[f"prune{n}/coords_before"] = _coords(pruning.score)
        scores = [s[q] for s in pruning.score for q in sorted(s)]
        stored[f"prune{n}/interp_scores"] = np.array(scores, np.float32)
        stored[f"prune{n}/coords_after"] = _coords(pruning.after)
    head = network.head(levels, VOXEL_SIZE)
    _add_head(stored, "head", head, step, not train)
    targets = _targets(head, boxes)
    for b, (assigned, labels, center) in enumerate(targets):
        stored[f"assigned{b}"] = assigned.astype(np.int16)
        stored[f"cls_targets{b}"] = labels.astype(np.int16)
        stored[f"center_targets{b}"] = center.astype(np.float32)
        rotated = state["head.conv_reg.kernel"].shape[1] == 8
        found = fcaf3d.detect([level[b] for level in head], rotated)
        for kind, values in zip(("boxes", "scores", "labels"), found, strict=True):
            stored[f"det_{kind}{b}"] = values if kind == "labels" else values.astype(np.float32)
        log[f"det{b}"] = {"n": len(found[1]), "margin_at_1000": [None, 1e-6]}
    _add_losses(stored, "eval", _losses(head, targets, boxes))
    if train:
        _add_training(stored, log, state, scenes, targets, boxes, step)
    if inputs is None:
        stored |= given
    else:
        np.savez(inputs / f"{name}_inputs.npz", **given)
    np.savez(folder / f"{name}.npz", **stored)
    (folder / f"{name}_log.json").write_text(json.dumps(log))


def write_weights(folder, state):
    """narrow_weights.pth."""
    tensors = {name: torch_writer.tensor(value) for name, value in state.items()}
    (folder / "narrow_weights.pth").write_bytes(torch_writer.zip_bytes({"state_dict": tensors}))


def write_recipe(folder, state):
    """full_weights_small.npz and full_weights_recipe.json; returns the state with its kernels drawn as the recipe says."""
    recipe, small, drawn = {}, {}, dict(state)
    for number, (name, value) in enumerate(state.items()):
        if value.ndim != 3:
            small[name] = value
            continue
        std = float(np.std(value))
        normal = np.random.RandomState(number).standard_normal(value.shape)  # noqa: NPY002
        drawn[name] = (normal * std).astype("<f4")
        digest = hashlib.sha256(drawn[name].tobytes()).hexdigest()
        recipe[name] = {"shape": list(value.shape), "seed": number, "std": std, "sha256": digest}
    np.savez(folder / "full_weights_small.npz", **small)
    (folder / "full_weights_recipe.json").write_text(json.dumps({"recipe": recipe}))
    return drawn


def _voxels(cloud):
    found = sparse.voxelize(cloud[:, :3], np.ones(len(cloud), bool), VOXEL_SIZE)
    return {at: cloud[rows[0], 3:].astype(np.float64) for at, rows in found.items()}


def _inputs(clouds, boxes):
    given, coords, feats, index, start = {"voxel_size": np.float32(VOXEL_SIZE)}, [], [], [], 0
    for b, (cloud, (rows, labels)) in enumerate(zip(clouds, boxes, strict=True)):
        given |= {f"points{b}": cloud, f"gt_boxes{b}": rows, f"gt_labels{b}": labels}
        found = sparse.voxelize(cloud[:, :3], np.ones(len(cloud), bool), VOXEL_SIZE)
        for at in sorted(found):
            coords.append((b, *at))
            feats.append(cloud[found[at][0], 3:])
            index.append(start + found[at][0])
        start += len(cloud)
    arrays = np.array(coords, np.int16), np.array(feats), np.array(index, np.int32)
    return given | dict(zip(("in/coords", "in/feats", "in/unique_index"), arrays, strict=True))


def _coords(scenes):
    return np.array([(b, *at) for b, scene in enumerate(scenes) for at in sorted(scene)], np.int16)


def _add_tensor(stored, name, stride, scenes, step):
    rows = np.concatenate([sparse.rows_of(scene) for scene in scenes if scene])
    stored |= {
        f"{name}/coords": _coords(scenes),
        f"{name}/stride": np.int32(stride),
        f"{name}/feats_step": np.int32(step),
        f"{name}/feats": rows[::step].astype(np.float32),
        f"{name}/feats_mean": rows.mean(0),
        f"{name}/feats_meanabs": np.abs(rows).mean(0),
    }


def _add_head(stored, prefix, head, step, with_boxes):
    for n, scenes in enumerate(head):
        at = f"{prefix}{n}/"
        if step > 1 and with_boxes:  # the steps of train_head are those of head
            stored[f"{at}preds_step"] = np.int32(step)
        if with_boxes:
            stored[f"{at}boxes_step"] = np.int32(step)
        for b, level in enumerate(scenes):
            stored[f"{at}points{b}"] = level.points
            stored[f"{at}coords{b}"] = level.coords.astype(np.int16)
            stored[f"{at}bbox_preds{b}"] = level.bbox[::step].astype(np.float32)
            stored[f"{at}cls_preds{b}"] = level.cls[::step].astype(np.float32)
            stored[f"{at}center_preds{b}"] = level.center[::step, None].astype(np.float32)
            if step > 1:
                stored[f"{at}max_cls_logit{b}"] = level.cls.max(1).astype(np.float32)
            if with_boxes:
                boxes = fcaf3d.decode(level.points, level.bbox)[::step].astype(np.float32)
                stored[f"{at}boxes{b}"] = boxes if level.bbox.shape[1] == 8 else boxes[:, :6]


def _joined(head, b):
    """points, channels, class logits, centre logits, level numbers of one scene."""
    levels = [scenes[b] for scenes in head]
    arrays = (np.concatenate([getattr(x, n) for x in levels]) for n in ("points", "bbox", "cls", "center"))
    return *arrays, np.repeat(np.arange(4), [len(x.points) for x in levels])


def _targets(head, boxes):
    found = []
    for b, (rows, labels) in enumerate(boxes):
        points, *_, level = _joined(head, b)
        assigned = fcaf3d.assign(points, level, rows)
        label = np.where(assigned >= 0, labels[np.maximum(assigned, 0)], -1)
        # Of the second scene as the reference's code leaves it: anchors without a box have the centreness in the first one.
        center = [
            -1.0
            if g < 0 and b == 0
            else fcaf3d.assigners.centerness(point, rows[max(g, 0)].astype(np.float64))
            for point, g in zip(points, assigned, strict=True)
        ]
        found.append((assigned, label, np.array(center)))
    return found


def _losses(head, targets, boxes):
    """Means over scenes: (centre, box, class)."""
    terms = []
    for b, (rows, labels) in enumerate(boxes):
        points, channels, cls, center, _ = _joined(head, b)
        terms.append(fcaf3d.losses(points, channels, cls, center, targets[b][0], rows, labels))
    return np.mean(terms, axis=0)


def _add_losses(stored, mode, terms):
    for name, value in zip(("center", "bbox", "cls"), terms, strict=True):
        stored[f"{mode}_{name}_loss"] = np.float32(value)


def _add_training(stored, log, state, scenes, targets, boxes, step):
    """Of gradients, those of the head's own parameters, by differences."""
    network = fcaf3d.Network(state, train=True)
    levels, _ = network.neck(network.backbone(scenes)[1], 100_000)
    head = network.head(levels, VOXEL_SIZE)
    _add_head(stored, "train_head", head, step, False)
    _add_losses(stored, "train", _losses(head, targets, boxes))
    stored |= {f"after_train/{name}": value.astype(np.float32) for name, value in network.after.items()}
    log["grad_norm_sum_absmax"] = {}
    for name in CHECKED:
        gradient = np.zeros(state[name].shape)
        for at in np.ndindex(gradient.shape):
            sides = []
            for shift in (1e-5, -1e-5):
                moved = np.array(state[name], np.float64)
                moved[at] += shift
                moved_head = fcaf3d.Network(state | {name: moved}).head(levels, VOXEL_SIZE)
                sides.append(_losses(moved_head, targets, boxes).sum())
            gradient[at] = (sides[0] - sides[1]) / 2e-5
        stored[f"grad/{name}"] = gradient.astype(np.float32)
        norms = np.linalg.norm(gradient.reshape(-1)), gradient.sum(), np.abs(gradient).max()
        log["grad_norm_sum_absmax"][name] = [float(value) for value in norms]
