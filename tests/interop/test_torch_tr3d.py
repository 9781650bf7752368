"""Name maps of PyTorch's TR3D, and the imported network against the reference's stored tensors."""

import json

import jax
import numpy as np
import pytest

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.detectors import tr3d
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid, pad_voxel_pyramid
from vrdistill_jax.interop.name_map import check_shapes, flatten
from vrdistill_jax.interop.torch_file import read_torch_file
from vrdistill_jax.interop.torch_tr3d import tr3d_config, tr3d_rules, variables_from_tr3d
from vrdistill_jax.structs import Points, Scene, pad_boxes

pytestmark = pytest.mark.slow  # compiling these networks takes minutes of processor time

HEADS = {"scannet": (18, 6), "sunrgbd": (10, 8)}  # classes, box channels


def official_state(dataset="sunrgbd", stem=16, largest=8, features=3, seed=0):
    """A state_dict of the authors' repository: names and shapes as its modules have them, random numbers."""
    rng, state = np.random.default_rng(seed), {}

    def kernel(name, *shape):
        state[f"{name}.kernel"] = rng.normal(size=shape).astype(np.float32)

    def norm(name, size):
        for leaf in ("weight", "bias", "running_mean"):
            state[f"{name}.bn.{leaf}"] = rng.normal(size=size).astype(np.float32)
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 2, size).astype(np.float32)
        state[f"{name}.bn.num_batches_tracked"] = np.array(7)

    kernel("backbone.conv1", 27, features, stem)
    norm("backbone.norm1", stem)
    inputs = stem
    for stage, count in enumerate((3, 4, 6, 3), 1):
        size = min(stem * 2 ** (stage - 1), largest)
        for block in range(count):
            name = f"backbone.layer{stage}.{block}"
            kernel(f"{name}.conv1", 27, inputs, size)
            norm(f"{name}.norm1", size)
            kernel(f"{name}.conv2", 27, size, size)
            norm(f"{name}.norm2", size)
            if block == 0:
                kernel(f"{name}.downsample.0", 1, inputs, size)
                norm(f"{name}.downsample.1", size)
            inputs = size
    for name in (
        "up_block_2",
        "lateral_block_1",
        "out_block_1",
        "up_block_1",
        "lateral_block_0",
        "out_block_0",
    ):
        kernel(f"neck.{name}.0", 27, largest, largest)
        norm(f"neck.{name}.1", largest)
    classes, boxes = HEADS[dataset]
    for name, size in (("bbox_conv", boxes), ("cls_conv", classes)):
        kernel(f"head.{name}", largest, size)
        state[f"head.{name}.bias"] = rng.normal(size=(1, size)).astype(np.float32)
    return state


def mmdet3d_state(state):
    names = {"head.bbox_conv.": "bbox_head.conv_reg.", "head.cls_conv.": "bbox_head.conv_cls."}
    renamed = {}
    for name, value in state.items():
        for theirs, new in names.items():
            name = name.replace(theirs, new)
        renamed[name] = value
    return renamed


def build_inputs(config, clouds):
    """Points and a pyramid of clouds of xyz and colours, padded to one size."""
    count, pyramid_config = max(map(len, clouds)), tr3d.pyramid_config(config)
    built, points = [], []
    for cloud in clouds:
        padded = np.pad(cloud, [(0, count - len(cloud)), (0, 0)])
        points.append(Points(padded[:, :3], padded[:, 3:], np.arange(count) < len(cloud)))
        built.append(build_voxel_pyramid(points[-1].xyz, points[-1].mask, pyramid_config))
    sizes = [max(len(p.levels[row].mask) for p in built) for row in range(9)]
    return stack_trees(points), stack_trees([pad_voxel_pyramid(p, sizes, pyramid_config) for p in built])


def expected_shapes(config):
    points, pyramid = build_inputs(config, [np.random.default_rng(0).random((20, 6)).astype(np.float32)])
    model = tr3d.build(config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), points, pyramid, train=False))


@pytest.mark.parametrize("dataset", ["scannet", "sunrgbd"])
def test_official_tensors_land_where_the_network_reads_them(dataset):
    state = official_state(dataset)
    variables, config = variables_from_tr3d({"state_dict": state, "meta": {}}, dataset)
    detector = config.detector
    assert (detector.stem_size, detector.max_size) == (16, 8)
    assert tuple(detector.input_features) == ("color",)
    assert detector.oriented == (dataset == "sunrgbd")
    check_shapes(variables, expected_shapes(detector))
    flat = flatten(variables)
    assert len(flat) == sum("num_batches" not in name for name in state)
    for ours, theirs in (
        ("params/backbone/layer2_0/downsample_conv/kernel", "backbone.layer2.0.downsample.0.kernel"),
        ("batch_stats/backbone/layer4_2/norm2/var", "backbone.layer4.2.norm2.bn.running_var"),
        ("params/neck/up_block_2/conv/kernel", "neck.up_block_2.0.kernel"),
        ("params/neck/lateral_block_0/norm/scale", "neck.lateral_block_0.1.bn.weight"),
        ("params/box_head/kernel", "head.bbox_conv.kernel"),
    ):
        np.testing.assert_array_equal(flat[ours], state[theirs])
    np.testing.assert_array_equal(flat["params/class_head/bias"], state["head.cls_conv.bias"][0])
    total = sum(float(np.sum(v, dtype=np.float64)) for k, v in state.items() if "num_batches" not in k)
    assert sum(float(np.sum(v, dtype=np.float64)) for v in flat.values()) == pytest.approx(total, abs=1e-2)


def test_mmdet3d_is_the_same_network():
    state = official_state()
    expected, got = (flatten(variables_from_tr3d(s, "sunrgbd")[0]) for s in (state, mmdet3d_state(state)))
    assert expected.keys() == got.keys()
    assert all((expected[name] == got[name]).all() for name in expected)


def broken(**change):
    state = official_state() | {name.replace("__", "."): value for name, value in change.items()}
    return {name: value for name, value in state.items() if value is not None}


MISFITS = {
    "missing": (broken(neck__up_block_1__0__kernel=None), r"1 missing \(neck.up_block_1.0.kernel\)"),
    "unknown": (broken(extra=np.zeros(3)), r"1 unknown \(extra\)"),
    "dataset": (
        official_state("scannet"),
        "18 classes and 6 box channels but sunrgbd needs 10 and 8.*--dataset=scannet",
    ),
    "features": (official_state(features=5), "reads 5 features"),
    "empty": ({"epoch": 1}, "no state_dict"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_checkpoints_that_do_not_fit_say_what_differs(name):
    checkpoint, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        variables_from_tr3d(checkpoint, "sunrgbd")


def test_unknown_dataset():
    with pytest.raises(ValueError, match="unknown dataset 'kitti'"):
        tr3d_config("kitti")


# The reference's own numbers.


def golden_case(shared, case):
    """The stored arrays, our inputs and the narrow network."""
    folder = shared / "golden/tr3d_sunrgbd"
    stored = np.load(folder / f"{case}.npz")
    variables, config = variables_from_tr3d(read_torch_file(folder / "narrow_weights.pth"), "sunrgbd")
    config.detector.voxel_size = float(stored["voxel_size"])
    clouds = [stored[f"points{b}"] for b in range(2) if f"points{b}" in stored]
    return stored, build_inputs(config.detector, clouds), variables, config.detector


def golden_scene(stored, points) -> Scene:
    boxes = []
    for b in range(len(points.mask)):
        rows = stored[f"gt_boxes{b}"]
        boxes.append(pad_boxes(rows[:, :3], rows[:, 3:6], rows[:, 6], stored[f"gt_labels{b}"], 16))
    return Scene(points, stack_trees(boxes), None, None, None, np.ones(len(points.mask), bool))


def rows_of_level(head, b, level):
    return np.asarray(head.mask[b]) & (np.asarray(head.level) == level)


def assert_head(head, stored, prefix, tolerance):
    for b in range(len(head.mask)):
        for level in range(2):
            rows = rows_of_level(head, b, level)
            for ours, theirs in (("box_channels", "bbox_preds"), ("class_logits", "cls_preds")):
                np.testing.assert_allclose(
                    np.asarray(getattr(head, ours)[b])[rows], stored[f"{prefix}{level}/{theirs}{b}"],
                    rtol=tolerance, atol=tolerance,
                )  # fmt: skip


@pytest.mark.data
def test_keys_of_both_projects(shared):
    keys = json.loads((shared / "golden/tr3d_sunrgbd/state_dict_keys.json").read_text())["keys"]
    state = {name: np.zeros(entry["shape"], np.float32) for name, entry in keys.items()}
    renamed = {keys[name]["mmdet3d_1x"]: value for name, value in state.items()}
    for checkpoint in (state, renamed):
        variables, config = variables_from_tr3d(checkpoint, "sunrgbd")
        check_shapes(variables, expected_shapes(config.detector))
        assert (config.detector.stem_size, config.detector.max_size) == (64, 128)


@pytest.mark.data
@pytest.mark.parametrize(
    "case", ["narrow_small", pytest.param("narrow_batch2_train", marks=pytest.mark.slow)]
)
def test_golden_forward_detections_and_losses(shared, case):
    stored, (points, pyramid), variables, config = golden_case(shared, case)
    model = tr3d.build(config)
    output = jax.jit(lambda p, q: model.apply(variables, p, q, train=False))(points, pyramid)
    head = output.raw.head
    assert_head(head, stored, "head", 2e-5)
    for b in range(len(points.mask)):
        for level in range(2):
            coords = np.asarray(head.points[b])[rows_of_level(head, b, level)] / np.float32(config.voxel_size)
            np.testing.assert_array_equal(np.round(coords), stored[f"head{level}/coords{b}"])
    _, terms = jax.jit(lambda o: tr3d.loss(o, golden_scene(stored, points), config))(output)
    assert terms["box"] == pytest.approx(float(stored["eval_bbox_loss"]), rel=1e-5)
    assert terms["class"] == pytest.approx(float(stored["eval_cls_loss"]), rel=1e-5)
    found = jax.jit(lambda o: tr3d.decode(o, points, config))(output)
    for b in range(len(points.mask)):
        expected = sorted(zip(stored[f"det_labels{b}"], stored[f"det_scores{b}"], stored[f"det_boxes{b}"], strict=True),
                          key=lambda row: (row[0], -row[1]))  # fmt: skip
        keep = np.asarray(found.mask[b])
        ours = sorted(zip(*(np.asarray(x[b])[keep] for x in (found.label, found.score, found.boxes)), strict=True),
                      key=lambda row: (row[0], -row[1]))  # fmt: skip
        # A score within rounding of the threshold, or of the last candidate's, may go either way.
        assert abs(len(ours) - len(expected)) <= 1
        pairs = {(int(k), *np.round(box[:3], 3)) for k, _, box in expected}
        same = [(int(k), *np.round(box[:3], 3)) in pairs for k, _, box in ours]
        assert np.mean(same) > 0.98


@pytest.mark.data
@pytest.mark.slow
def test_golden_training_step(shared):
    """Losses, predictions with batch statistics, and gradients, in float32; the reference's own float32 gradients are up to
    2.4 % of a tensor's largest entry away from its float64 ones.
    """
    stored, (points, pyramid), variables, config = golden_case(shared, "narrow_batch2_train")
    exact = np.load(shared / "golden/tr3d_sunrgbd/narrow_batch2_train_grad64.npz")
    model, scene = tr3d.build(config), golden_scene(stored, points)

    def objective(params):
        output, updates = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            points,
            pyramid,
            train=True,
            mutable=["batch_stats"],
        )
        total, terms = tr3d.loss(output, scene, config)
        return total, (terms, output.raw.head, updates["batch_stats"])

    (_, (terms, head, stats)), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        variables["params"]
    )
    assert terms["box"] == pytest.approx(float(stored["train_bbox_loss"]), rel=1e-4)
    assert terms["class"] == pytest.approx(float(stored["train_cls_loss"]), rel=1e-4)
    assert_head(head, stored, "train_head", 1e-3)
    blended = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, variables["batch_stats"], stats)
    state = {name.removeprefix("grad/"): exact[name] for name in exact.files if name.startswith("grad/")}
    checked = compare_with_state(
        flatten(gradient), state, lambda g, w: np.abs(g - w).max() / np.abs(w).max(), 0.03
    )
    assert checked > 50
    after = {
        name.removeprefix("after_train/"): stored[name]
        for name in stored.files
        if name.startswith("after_train/")
    }
    checked = compare_with_state(
        flatten(blended), after, lambda g, w: np.abs(g - w).max() / np.abs(w).max(), 1e-4
    )
    assert checked > 50


def compare_with_state(flat, state, error, tolerance) -> int:
    """Compares our tree with what their state holds of it; the number of tensors that were compared."""
    checked = 0
    for rule in tr3d_rules():
        ours = rule.ours.split("/", 1)[1]
        if rule.theirs in state and ours in flat:
            want = rule.convert(state[rule.theirs])
            assert error(np.asarray(flat[ours]), want) < tolerance, rule.theirs
            checked += 1
    return checked
