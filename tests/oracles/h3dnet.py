"""H3DNet at inference in NumPy, float64, straight from tensors with the official repository's names and layouts.

Geometry that does not depend on weights (sampled points, neighbours of the backbone) is passed in.
"""

import numpy as np

KINDS = {"z": 2, "xy": 1, "line": 0}
FACES = [(2, 1), (2, -1), (1, 1), (1, -1), (0, 1), (0, -1)]
EDGES = [
    ((2, 1), (0, 1)), ((2, 1), (0, -1)), ((2, 1), (1, 1)), ((2, 1), (1, -1)),
    ((2, -1), (0, 1)), ((2, -1), (0, -1)), ((2, -1), (1, 1)), ((2, -1), (1, -1)),
    ((0, 1), (1, 1)), ((0, 1), (1, -1)), ((0, -1), (1, 1)), ((0, -1), (1, -1)),
]  # fmt: skip


def make_state(classes, bins, towers=4, scale=1, features=1, width=1 / 16, seed=0):
    """A state_dict with the names and shapes of the official modules and random numbers."""
    rng, state = np.random.default_rng(seed), {}

    def sizes(*channels):
        return [int(c * width) for c in channels]

    def normal(name, *shape, scale=1.0, offset=0.0):
        state[name] = (offset + scale * rng.normal(size=shape)).astype(np.float32)

    def conv(name, inputs, out, dims=1, bias=True):
        normal(f"{name}.weight", out, inputs, *[1] * dims, scale=1.4 * inputs**-0.5)
        if bias:
            normal(f"{name}.bias", out, scale=0.3)

    def norm(name, channels):
        normal(f"{name}.weight", channels, scale=0.3, offset=1.0)
        normal(f"{name}.bias", channels, scale=0.3)
        normal(f"{name}.running_mean", channels, scale=0.3)
        state[f"{name}.running_var"] = rng.uniform(0.5, 2, channels).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    def shared(name, *channels):
        for n, (inputs, out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            conv(f"{name}.layer{n}.conv", inputs, out, 2, bias=False)
            norm(f"{name}.layer{n}.bn.bn", out)

    def layer(name, norm_name, inputs, out):
        conv(name, inputs, out)
        norm(norm_name, out)

    def head(name, inputs, out):
        shared(f"{name}.vote_aggregation.mlp_module", inputs + 3, narrow, narrow, narrow)
        for n in (1, 2):
            layer(f"{name}.conv{n}", f"{name}.bn{n}", narrow, narrow)
        conv(f"{name}.conv3", narrow, out)

    wide, narrow, tiny = sizes(256, 128, 32)
    for tower in range(1, towers + 1):
        name = f"backbone_net{tower}"
        w64, w128, w256 = sizes(64 * scale, 128 * scale, 256 * scale)
        shared(f"{name}.sa1.mlp_module", 3 + features, w64, w64, w128)
        shared(f"{name}.sa2.mlp_module", 3 + w128, w128, w128, w256)
        for n in (3, 4):
            shared(f"{name}.sa{n}.mlp_module", 3 + w256, w128, w128, w256)
        up = w256 if towers > 1 or scale > 1 else 2 * w256
        shared(f"{name}.fp1.mlp", w256 + w256, up, up)
        shared(f"{name}.fp2.mlp", up + w256, up, up)
    seed_size = wide if towers > 1 else wide * max(scale, 2)
    if towers > 1:
        layer("conv_agg1", "bn_agg1", towers * wide, 2 * wide)
        layer("conv_agg2", "bn_agg2", 2 * wide, wide)
    for kind in ("", *KINDS):
        name = f"vgen_{kind}" if kind else "vgen"
        for n in (1, 2):
            layer(f"{name}.conv{n}", f"{name}.bn{n}", seed_size, seed_size)
        conv(f"{name}.conv3", seed_size, 3 + seed_size)
        if kind:
            layer(f"conv_flag_{kind}1", f"bn_flag_{kind}1", seed_size, narrow)
            conv(f"conv_flag_{kind}2", narrow, 2)
            head(f"pnet_{kind}", seed_size, 3 + KINDS[kind] + classes)
    out = 5 + 2 * bins + 5 * classes
    head("pnet_final", seed_size, out)
    for name, zeros in (("surface", 6), ("line", 12)):
        shared(f"pnet_final.match_{name}_center.mlp_module", 3 + zeros + narrow, narrow, *sizes(64, 32))
        for n in (1, 2):
            layer(f"pnet_final.conv_{name}{n}", f"pnet_final.bn_{name}{n}", tiny, tiny)
    for name in ("match", "match_sem"):
        layer(f"pnet_final.conv_{name}1", f"pnet_final.bn_{name}1", tiny, tiny)
        conv(f"pnet_final.conv_{name}2", tiny, 2)
    layer("pnet_final.conv_refine1", "pnet_final.bn_refine1", 18 * tiny, narrow)
    for n in (2, 3):
        layer(f"pnet_final.conv_refine{n}", f"pnet_final.bn_refine{n}", narrow, narrow)
    conv("pnet_final.conv_refine4", narrow, out)
    return state


def ball(center, xyz, radius, count):
    """The first `count` points inside each ball, the first one repeated; point 0 where there is none."""
    rows = []
    for at in center:
        inside = np.flatnonzero(((xyz - at) ** 2).sum(-1) < radius**2)[:count]
        first = inside[0] if len(inside) else 0
        rows.append(np.concatenate([inside, np.full(count - len(inside), first)]))
    return np.array(rows, int)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Oracle:
    """One cloud, features as rows."""

    def __init__(self, state):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}
        self.towers = sum(f"backbone_net{n}.sa1.mlp_module.layer0.conv.weight" in state for n in range(1, 5))

    def conv(self, name, x):
        weight = self.state[f"{name}.weight"]
        y = x @ weight.reshape(weight.shape[:2]).T
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def layer(self, name, norm, x):
        s, y = self.state, self.conv(name, x)
        y = (y - s[f"{norm}.running_mean"]) / np.sqrt(s[f"{norm}.running_var"] + 1e-5)
        return np.maximum(y * s[f"{norm}.weight"] + s[f"{norm}.bias"], 0)

    def shared(self, name, x):
        n = 0
        while f"{name}.layer{n}.conv.weight" in self.state:
            x = self.layer(f"{name}.layer{n}.conv", f"{name}.layer{n}.bn.bn", x)
            n += 1
        return x

    def pool(self, name, center, xyz, features, index, radius):
        relative = (xyz[index] - center[:, None]) / radius
        return self.shared(name, np.concatenate([relative, features[index]], -1)).max(1)

    def interpolate(self, name, coarse, fine, index, weight):
        carried = (coarse[index] * weight[..., None]).sum(1)
        return self.shared(name, np.concatenate([carried, fine], -1))

    def tower(self, n, xyz, features, levels, radii, interpolations):
        name, x, down = f"backbone_net{n}", features, []
        for k, ((center, index), radius) in enumerate(zip(levels, radii, strict=True), 1):
            x = self.pool(f"{name}.sa{k}.mlp_module", center, xyz, x, index, radius)
            xyz = center
            down.append(x)
        for k, (fine, (index, weight)) in enumerate(zip((2, 1), interpolations, strict=True), 1):
            x = self.interpolate(f"{name}.fp{k}.mlp", x, down[fine], index, weight)
        return x

    def vote(self, name, xyz, features):
        x = features
        for n in (1, 2):
            x = self.layer(f"{name}.conv{n}", f"{name}.bn{n}", x)
        x = self.conv(f"{name}.conv3", x)
        moved = features + x[:, 3:]
        return xyz + x[:, :3], moved / np.linalg.norm(moved, axis=-1, keepdims=True)

    def head(self, name, center, xyz, features, radius, count):
        index = ball(center, xyz, radius, count)
        pooled = self.pool(f"{name}.vote_aggregation.mlp_module", center, xyz, features, index, radius)
        x = pooled
        for n in (1, 2):
            x = self.layer(f"{name}.conv{n}", f"{name}.bn{n}", x)
        return pooled, self.conv(f"{name}.conv3", x)

    def primitives(self, kind, xyz, features, radius, count):
        flags = self.layer(f"conv_flag_{kind}1", f"bn_flag_{kind}1", features)
        flags = self.conv(f"conv_flag_{kind}2", flags)
        at, voted = self.vote(f"vgen_{kind}", xyz, features)
        pooled, channels = self.head(f"pnet_{kind}", at, at, voted, radius, count)
        center = at + channels[:, :3]
        there = softmax(flags)[:, 1] > 0.5
        placed = np.where(there[:, None], center, center + 100.0)
        return {"flags": flags, "channels": channels, "pooled": pooled, "center": center, "placed": placed}

    def boxes(self, channels, base, bins, mean_sizes, turned):
        """Centre, size and heading of the likeliest bins, as the reference decodes the initial proposals."""
        sizes = len(mean_sizes)
        heading = channels[:, 5 : 5 + bins].argmax(-1)
        rows = np.arange(len(channels))
        angle = heading * 2 * np.pi / bins + channels[rows, 5 + bins + heading] * np.pi / bins
        first = 5 + 2 * bins
        size_class = channels[:, first : first + sizes].argmax(-1)
        residual = channels[:, first + sizes : first + 4 * sizes].reshape(len(rows), sizes, 3)[
            rows, size_class
        ]
        mean = np.asarray(mean_sizes)[size_class]
        return base + channels[:, 2:5], mean + residual * mean, angle if turned else 0 * angle

    def refine(self, clusters, center, size, heading, primitives, radius, count):
        """Face and edge centres [F, Q, 3], match features [18, Q, C] and the refined channels."""
        cos, sin = np.cos(-heading), np.sin(-heading)
        places, features = [], []
        for sides, kinds, name in ((FACES, ("z", "xy"), "surface"), (EDGES, ("line",), "line")):
            xyz = np.concatenate([primitives[k]["placed"] for k in kinds])
            pooled = np.concatenate([primitives[k]["pooled"] for k in kinds])
            pooled = np.concatenate([np.zeros((len(pooled), len(sides))), pooled], -1)
            at = []
            for side in sides:
                offset = np.zeros_like(center)
                for axis, sign in [side] if name == "surface" else side:
                    offset[:, axis] = sign * size[:, axis] / 2
                x, y, z = offset.T
                at.append(center + np.stack([cos * x - sin * y, sin * x + cos * y, z], -1))
            module = f"pnet_final.match_{name}_center.mlp_module"
            gathered = [
                self.pool(module, one, xyz, pooled, ball(one, xyz, radius, count), radius) for one in at
            ]
            places.append(np.array(at))
            features.append(np.array(gathered))
        joined = []
        for part, name in zip(features, ("surface", "line"), strict=True):
            x = part
            for n in (1, 2):
                x = self.layer(f"pnet_final.conv_{name}{n}", f"pnet_final.bn_{name}{n}", x)
            joined.append(np.concatenate([x[:, :, c] for c in range(x.shape[-1])]).T)
        x = self.layer("pnet_final.conv_refine1", "pnet_final.bn_refine1", np.concatenate(joined, -1))
        x = x + clusters
        for n in (2, 3):
            x = self.layer(f"pnet_final.conv_refine{n}", f"pnet_final.bn_refine{n}", x)
        return places, np.concatenate(features), self.conv("pnet_final.conv_refine4", x)

    def scores(self, features, name):
        hidden = self.layer(f"pnet_final.conv_{name}1", f"pnet_final.bn_{name}1", features)
        return self.conv(f"pnet_final.conv_{name}2", hidden)
