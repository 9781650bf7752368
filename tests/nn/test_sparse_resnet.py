import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import sparse

from vrdistill_jax.data.loader import stack_trees
from vrdistill_jax.geometry.host.voxel_pyramid import build_voxel_pyramid, pad_voxel_pyramid
from vrdistill_jax.interop.torch_file import read_torch_file
from vrdistill_jax.nn.norm import update_running
from vrdistill_jax.nn.sparse_conv import voxel_features
from vrdistill_jax.nn.sparse_resnet import (
    FCAF3D_LEVELS,
    TR3D_LEVELS,
    FCAF3DNeck,
    SparseResNet,
    TR3DNeck,
    fcaf3d_pyramid_config,
    stage_sizes,
    tr3d_pyramid_config,
)

pytestmark = pytest.mark.slow  # compiling these networks takes minutes of processor time


def prepare(clouds, config, capacities=None):
    """(features of the first level, pyramid) of clouds f32[n, 3 + F]."""
    capacity = 150 if capacities else max(len(cloud) for cloud in clouds)
    points, built = [], []
    for cloud in clouds:
        padded = np.full((capacity, cloud.shape[1]), np.nan, np.float32)
        padded[: len(cloud)] = cloud
        points.append(padded)
        built.append(build_voxel_pyramid(padded[:, :3], np.arange(capacity) < len(cloud), config))
    capacities = capacities or [
        max(len(level.mask) for level in same) + 3 for same in zip(*(p.levels for p in built), strict=True)
    ]
    pyramid = stack_trees([pad_voxel_pyramid(p, capacities, config) for p in built])
    return voxel_features(jnp.asarray(np.stack(points)[..., 3:]), pyramid), pyramid


def rows_of(level, features):
    return np.asarray(features)[np.asarray(level.mask)]


def random_variables(module, *args, seed=1):
    """Variables of which nothing hides behind its initial value; drawn by NumPy, so that no initialiser is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            spread = (2 / (leaf.shape[0] * leaf.shape[2])) ** 0.5
            return rng.normal(0, spread, leaf.shape).astype(np.float32)
        low = {"var": 0.5, "scale": 0.5}.get(path[-1].key, -0.5)
        return rng.uniform(low, 1.5, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, train=False))
    return jax.tree_util.tree_map_with_path(draw, shapes)


class NaiveNetwork:
    """The same networks on dictionaries, one scene, running statistics."""

    def __init__(self, variables):
        self.params, self.stats = variables["params"], variables.get("batch_stats", {})

    def at(self, *names):
        params, stats = self.params, self.stats
        for name in names:
            params, stats = params[name], stats.get(name, {})
        return NaiveNetwork({"params": params, "batch_stats": stats})

    def kernel(self, name):
        return np.asarray(self.params[name]["kernel"], np.float64)

    def norm(self, name, tensor, activation=lambda x: np.maximum(x, 0)):
        params, stats = self.params[name], self.stats.get(name)
        if stats:
            mean, var, epsilon = stats["mean"], stats["var"], 1e-5
        else:
            rows = sparse.rows_of(tensor)
            mean, var, epsilon = rows.mean(0), rows.var(0), 1e-8
        scale = np.asarray(params["scale"]) / np.sqrt(np.asarray(var) + epsilon)
        return {at: activation((x - mean) * scale + params["bias"]) for at, x in tensor.items()}

    def residual(self, tensor, stride, strided):
        targets = sparse.coarsen(tensor, 2 * stride) if strided else set(tensor)
        out = stride * 2 if strided else stride
        y = self.norm("norm1", sparse.convolve(tensor, self.kernel("conv1"), targets, stride))
        y = self.norm("norm2", sparse.convolve(y, self.kernel("conv2"), targets, out), lambda x: x)
        if strided:
            x = sparse.convolve(tensor, self.kernel("downsample_conv"), targets, stride)
            tensor = self.norm("downsample_norm", x, lambda x: x)
        return {at: np.maximum(y[at] + tensor[at], 0) for at in targets}

    def backbone(self, tensor):
        x = sparse.convolve(tensor, self.kernel("conv1"), sparse.coarsen(tensor, 2), 1)
        x = self.norm("norm1", x)
        x = sparse.max_pool(x, 2, sparse.coarsen(x, 4), 2)
        stages, stride = [], 4
        for stage in range(1, 5):
            number = 0
            while f"layer{stage}_{number}" in self.params:
                x = self.at(f"layer{stage}_{number}").residual(x, stride, number == 0)
                stride *= 2 if number == 0 else 1
                number += 1
            stages.append(x)
        return stages

    def block(self, name, tensor, stride, targets=None, activation=lambda x: np.maximum(x, 0)):
        """Onto `targets` of half the stride (generative) or the same voxels."""
        block = self.at(name)
        kernel = block.kernel("conv")
        if targets is None:
            y = sparse.convolve(tensor, kernel, set(tensor), stride)
        else:
            y = sparse.convolve_transposed(tensor, kernel, targets, stride // 2)
        return block.norm("norm", y, activation)

    def tr3d_neck(self, stages):
        x, outputs = stages[3], []
        for number, stride in ((1, 64), (0, 32)):
            made = sparse.generate(x, 3, stride // 2)
            x = sparse.add(stages[number + 1], self.block(f"up_block_{number + 1}", x, stride, made))
            x = self.block(f"lateral_block_{number}", x, stride // 2)
            outputs.append(self.block(f"out_block_{number}", x, stride // 2))
        return outputs[::-1]

    def fcaf3d_neck(self, stages, score, threshold):
        def elu(x):
            return np.where(x > 0, x, np.expm1(x))

        x, outputs, scores, stride = stages[3], [], None, 64
        for number in (3, 2, 1, 0):
            if number < 3:
                made = sparse.generate(x, 2, stride // 2)
                x = self.block(f"up_block_{number + 1}_generate", x, stride, made, elu)
                x = sparse.add(
                    stages[number], self.block(f"up_block_{number + 1}_refine", x, stride // 2, None, elu)
                )
                at = {q: float(np.sum(sparse.interpolate(scores, stride, q))) for q in x}
                kept = sorted(x, key=lambda q: -at[q])[:threshold]
                gap = [at[q] for q in sorted(x, key=lambda q: -at[q])[threshold - 1 : threshold + 1]]
                assert len(gap) < 2 or gap[0] - gap[1] > 1e-5, "the choice must not hang on rounding"
                x, stride = {q: x[q] for q in kept}, stride // 2
            y = self.block(f"out_block_{number}", x, stride, None, elu)
            scores = {at: score(feature) for at, feature in y.items()}
            outputs.append(y)
        return outputs[::-1]


@pytest.fixture(scope="module")
def small():
    """A cloud, a tiny backbone with its variables, and what the naive one makes of it."""
    rng = np.random.default_rng(0)
    xyz = rng.uniform((-0.5, 0.1, 0.1), (1.5, 2.0, 0.2), (150, 3))  # two voxels of stride 64
    cloud = np.concatenate([xyz, rng.random((150, 2))], 1).astype(np.float32)
    found = sparse.voxelize(cloud[:, :3], np.ones(150, bool), 0.04)
    return cloud, {at: cloud[rows[0], 3:].astype(np.float64) for at, rows in found.items()}


def tiny_backbone(stem_norm):
    return SparseResNet(2, 4, (4, 5, 6, 7), (1, 2, 1, 1), stem_norm)


def stage_arrays(pyramid):
    """What the tiny backbone gives, but for the numbers."""
    sizes = zip(pyramid.levels[3:7], (4, 5, 6, 7), strict=True)
    return [jnp.zeros((*level.mask.shape, size)) for level, size in sizes]


def assert_levels(levels, features, want):
    for level, array, tensor in zip(levels, features, want, strict=True):
        assert [tuple(c) for c in level.coords[0][level.mask[0]].tolist()] == sorted(tensor)
        np.testing.assert_allclose(rows_of(level, array), sparse.rows_of(tensor), atol=2e-5)
        assert (np.asarray(array)[~np.asarray(level.mask)] == 0).all()


def test_tr3d_equals_the_dictionaries(small):
    cloud, tensor = small
    features, pyramid = prepare([cloud], tr3d_pyramid_config(0.04))
    backbone, neck = tiny_backbone("batch"), TR3DNeck((5, 6, 7), 3)
    a = random_variables(backbone, features, pyramid)
    b = random_variables(neck, stage_arrays(pyramid), pyramid, seed=2)

    @jax.jit
    def forward(a, b, features, pyramid):
        stages = backbone.apply(a, features, pyramid, train=False).stages
        return stages, neck.apply(b, stages, pyramid, train=False)

    stages, outputs = forward(a, b, features, pyramid)
    want = NaiveNetwork(a).backbone(tensor)
    assert_levels(pyramid.levels[3:7], stages, want)
    made = [pyramid.levels[row] for row in TR3D_LEVELS]
    assert_levels(made, [out.features for out in outputs], NaiveNetwork(b).tr3d_neck(want))
    for level, out in zip(made, outputs, strict=True):
        np.testing.assert_array_equal(level.coords, out.coords)


def test_fcaf3d_equals_the_dictionaries_with_true_pruning(small):
    cloud, tensor = small
    features, pyramid = prepare([cloud], fcaf3d_pyramid_config(0.04))
    backbone, neck = tiny_backbone("instance"), FCAF3DNeck((4, 5, 6, 7), 3, prune_threshold=40)

    def score(y):
        return jnp.max(y, -1) - 0.3 * y[..., 0]

    a = random_variables(backbone, features, pyramid)
    b = random_variables(neck, stage_arrays(pyramid), pyramid, score, seed=2)

    @jax.jit
    def forward(a, b, features, pyramid):
        stages = backbone.apply(a, features, pyramid, train=False).stages
        return neck.apply(b, stages, pyramid, score, train=False)

    outputs = forward(a, b, features, pyramid)
    stages = NaiveNetwork(a).backbone(tensor)
    want = NaiveNetwork(b).fcaf3d_neck(stages, lambda y: np.max(y) - 0.3 * y[0], 40)
    assert_levels(outputs, [out.features for out in outputs], want)
    assert [int(out.mask.sum()) for out in outputs] == [40, 40, 16, 2]
    assert pyramid.levels[FCAF3D_LEVELS[0]].mask.sum() > 40, "something was pruned"


def count(variables):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))


def shapes(cloud, config, backbone, make_neck):
    features, pyramid = prepare([cloud], config)

    def init(key):
        variables = backbone.init(key, features, pyramid, train=False)
        stages = backbone.apply(variables, features, pyramid, train=False).stages
        return variables, make_neck(stages, pyramid, key)

    return jax.eval_shape(init, jax.random.key(0))


def test_parameters_are_as_many_as_published(small):
    rgb = np.concatenate([small[0], small[0][:, :1]], 1)
    backbone, neck = shapes(
        rgb,
        tr3d_pyramid_config(0.04),
        SparseResNet(3, 64, stage_sizes(128)),
        lambda stages, pyramid, key: TR3DNeck().init(key, stages, pyramid, train=False),
    )
    assert (count(backbone), count(neck)) == (12_002_624, 2_655_744)
    backbone, neck = shapes(
        rgb,
        fcaf3d_pyramid_config(0.04),
        SparseResNet(3, 64, stage_sizes(), stem_norm="instance"),
        lambda stages, pyramid, key: FCAF3DNeck().init(
            key, stages, pyramid, lambda y: y[..., 0], train=False
        ),
    )
    heads = 128 + 6 * 128 + 18 * 128 + 18 + 4  # centreness, box, class (with bias), scales
    assert (count(backbone), count(neck) + heads) == (63_457_088, 7_022_486)


def test_unknown_norms_are_refused(small):
    features, pyramid = prepare([small[0]], tr3d_pyramid_config(0.04))
    with pytest.raises(ValueError, match="'layer'"):
        SparseResNet(2, 4, (4, 4, 4, 4), stem_norm="layer").init(
            jax.random.key(0), features, pyramid, train=False
        )


def test_scenes_do_not_see_each_other(small):
    other = small[0][::2] * np.float32(0.7)
    backbone, config = SparseResNet(2, 4, (4, 4, 4, 4), (1, 1, 1, 1), "instance"), tr3d_pyramid_config(0.04)
    capacities = [
        100 + len(level.mask)
        for level in build_voxel_pyramid(small[0][:, :3], np.ones(150, bool), config).levels
    ]
    first, second = (prepare(clouds, config, capacities) for clouds in ([small[0], other], [other, other]))
    variables = random_variables(backbone, *first)
    forward = jax.jit(
        lambda features, pyramid: backbone.apply(variables, features, pyramid, train=False).stages
    )
    for level, a, b in zip(first[1].levels[3:], forward(*first), forward(*second), strict=False):
        np.testing.assert_array_equal(a[1][level.mask[1]], b[0][level.mask[1]])
        assert not np.array_equal(a[0], b[0])


def variables_from(state, part, kernels_of=lambda name: name):
    """Names of the official repository -> our variables of the backbone or the neck."""
    variables: dict = {"params": {}, "batch_stats": {}}
    leaf_of = {
        "kernel": ("params", "kernel"),
        "weight": ("params", "scale"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    }
    for key, value in state.items():
        top, *path = key.split(".")
        if top != part or path[-1] == "num_batches_tracked":
            continue
        collection, leaf = leaf_of[path.pop()]
        path = [name for name in path if name != "bn"]
        if part == "neck":
            path = [path[0], ("conv", "norm")[int(path[1])]]
        elif path[0].startswith("layer"):
            path = [f"{path[0]}_{path[1]}", *path[2:]]
            if path[1] == "downsample":
                path[1:] = ["downsample_" + ("conv", "norm")[int(path[2])]]
        node = variables[collection]
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = jnp.asarray(value)
    return variables


def narrow_state(folder):
    state = read_torch_file(folder / "narrow_weights.pth")
    return state.get("state_dict", state)


def full_state(folder):
    """The recorded recipe of the full-size weights."""
    state = dict(np.load(folder / "full_weights_small.npz"))
    recipe = json.loads((folder / "full_weights_recipe.json").read_text())["recipe"]
    for name, entry in recipe.items():
        values = np.random.RandomState(entry["seed"]).standard_normal(entry["shape"]) * entry["std"]  # noqa: NPY002
        state[name] = values.astype("<f4")
    digest = hashlib.sha256(state["backbone.conv1.kernel"].tobytes()).hexdigest()
    assert digest == recipe["backbone.conv1.kernel"]["sha256"]
    return state


def load_case(shared, case, weights):
    folder = shared / "golden/tr3d_sunrgbd"
    if not (folder / f"{case}.npz").exists():
        pytest.skip(f"{folder / case}.npz is not there")
    golden = dict(np.load(folder / f"{case}.npz"))
    state = narrow_state(folder) if weights == "narrow" else full_state(folder)
    clouds = [golden[f"points{b}"] for b in range(2) if f"points{b}" in golden]
    config = tr3d_pyramid_config(float(golden["voxel_size"]))
    return golden, state, *prepare(clouds, config)


def assert_tensor(golden, name, level, features, tolerance):
    scene = np.repeat(np.arange(len(level.mask)), level.mask.sum(1))
    coords = np.concatenate([scene[:, None], np.asarray(level.coords)[level.mask]], 1)
    np.testing.assert_array_equal(coords, golden[f"{name}/coords"])
    rows = rows_of(level, features)
    step = int(golden[f"{name}/feats_step"])
    np.testing.assert_allclose(rows[::step], golden[f"{name}/feats"], atol=tolerance, err_msg=name)
    np.testing.assert_allclose(rows.mean(0), golden[f"{name}/feats_mean"], atol=tolerance, err_msg=name)


@pytest.mark.data
@pytest.mark.parametrize(
    ("case", "weights", "sizes"),
    [
        pytest.param("narrow_small", "narrow", stage_sizes(32), marks=pytest.mark.slow),
        ("narrow_batch2_train", "narrow", stage_sizes(32)),
        pytest.param("full_small", "full", stage_sizes(128), marks=pytest.mark.slow),
        pytest.param("full_large", "full", stage_sizes(128), marks=pytest.mark.slow),
    ],
)
def test_tr3d_equals_the_official_network(shared, case, weights, sizes):
    golden, state, features, pyramid = load_case(shared, case, weights)
    backbone, neck = SparseResNet(3, 64, sizes), TR3DNeck(sizes[1:], sizes[-1])
    a, b = variables_from(state, "backbone"), variables_from(state, "neck")
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(
        lambda s: s.shape,
        jax.eval_shape(lambda: backbone.init(jax.random.key(0), features, pyramid, train=False)),
    )

    @jax.jit
    def forward(a, b, features, pyramid):
        out = backbone.apply(a, features, pyramid, train=False)
        return out, neck.apply(b, out.stages, pyramid, train=False)

    np.testing.assert_array_equal(rows_of(pyramid.levels[0], features), golden["in/feats"])
    out, made = forward(a, b, features, pyramid)
    assert_tensor(golden, "stem", pyramid.levels[2], out.stem, 1e-4)
    for stage, array in enumerate(out.stages):
        assert_tensor(golden, f"backbone{stage}", pyramid.levels[3 + stage], array, 1e-4)
    for number, level in enumerate(made):
        assert_tensor(golden, f"neck{number}", level, level.features, 1e-4)


@pytest.mark.data
def test_training_statistics_equal_the_official_network(shared):
    golden, state, features, pyramid = load_case(shared, "narrow_batch2_train", "narrow")
    sizes = stage_sizes(32)
    backbone, neck = SparseResNet(3, 64, sizes), TR3DNeck(sizes[1:], sizes[-1])
    a, b = variables_from(state, "backbone"), variables_from(state, "neck")

    @jax.jit
    def forward(a, b, features, pyramid):
        out, first = backbone.apply(a, features, pyramid, train=True, mutable=["batch_stats"])
        made, second = neck.apply(b, out.stages, pyramid, train=True, mutable=["batch_stats"])
        return made, first["batch_stats"], second["batch_stats"]

    made, *written = forward(a, b, features, pyramid)
    after = {
        key.removeprefix("after_train/"): v for key, v in golden.items() if key.startswith("after_train/")
    }
    for part, before, batch in zip(("backbone", "neck"), (a, b), written, strict=True):
        want = variables_from(after, part)["batch_stats"]
        got = update_running(before["batch_stats"], batch, 0.1)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), got, want)
    kernel, bias = state["head.cls_conv.kernel"], state["head.cls_conv.bias"]
    for number, level in enumerate(made):
        logits = np.asarray(level.features) @ kernel + bias
        for scene in range(2):
            want = golden[f"train_head{number}/cls_preds{scene}"]
            np.testing.assert_allclose(logits[scene][level.mask[scene]], want, atol=2e-3)
