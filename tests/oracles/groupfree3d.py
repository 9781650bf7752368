"""Group-Free-3D at inference in NumPy, float64, straight from tensors with the official names; and its loss, box by box."""

import numpy as np
from oracles.three_detr import Oracle, softmax

HEADS = ("objectness_scores", "center_residual", "heading_class", "heading_residual", "sem_cls_scores")


def make_state(
    classes, bins, by_class, width=1 / 36, features=0, layers=2, kps=True, backbone_width=1, seed=0
):
    """A state_dict with the names and shapes of the official modules and random numbers."""
    rng, state = np.random.default_rng(seed), {}
    size, hidden = int(288 * width), int(2048 * width)
    w64, w128, w256 = (int(n * width * backbone_width) for n in (64, 128, 256))

    def normal(name, *shape, scale=1.0, offset=0.0):
        state[name] = (offset + scale * rng.normal(size=shape)).astype(np.float32)

    def linear(name, out, inputs, dims=1, bias=True):
        normal(f"{name}.weight", out, inputs, *[1] * dims, scale=1.5 * inputs**-0.5)
        if bias:
            normal(f"{name}.bias", out, scale=0.3)

    def batch_norm(name, channels):
        normal(f"{name}.weight", channels, scale=0.3, offset=1.0)
        normal(f"{name}.bias", channels, scale=0.3)
        normal(f"{name}.running_mean", channels, scale=0.3)
        state[f"{name}.running_var"] = rng.uniform(0.5, 2, channels).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    def shared(name, sizes, dims=2):
        for n, (inputs, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            linear(f"{name}.layer{n}.conv", out, inputs, dims, bias=False)
            batch_norm(f"{name}.layer{n}.bn.bn", out)

    def two_layers(name):
        for n in (1, 2):
            linear(f"{name}.conv{n}", size, size)
            batch_norm(f"{name}.bn{n}", size)

    def head(name):
        two_layers(name)
        outs = dict(zip(HEADS, (1, 3, bins, bins, classes), strict=True))
        outs |= {"size_class": classes, "size_residual": 3 * classes} if by_class else {"size_pred": 3}
        for part, out in outs.items():
            linear(f"{name}.{part}_head", out, size)

    shared("backbone_net.sa1.mlp_module", (3 + features, w64, w64, w128))
    shared("backbone_net.sa2.mlp_module", (3 + w128, w128, w128, w256))
    for n in (3, 4):
        shared(f"backbone_net.sa{n}.mlp_module", (3 + w256, w128, w128, w256))
    shared("backbone_net.fp1.mlp", (2 * w256, w256, w256))
    shared("backbone_net.fp2.mlp", (2 * w256, w256, size))
    if kps:
        two_layers("points_obj_cls")
        linear("points_obj_cls.conv3", 1, size)
    head("proposal_head")
    for name in ("decoder_query_proj", "decoder_key_proj"):
        linear(name, size, size)
    for n in range(layers):
        for attention in ("self_attn", "multihead_attn"):
            normal(f"decoder.{n}.{attention}.in_proj_weight", 3 * size, size, scale=1.5 * size**-0.5)
            normal(f"decoder.{n}.{attention}.in_proj_bias", 3 * size, scale=0.3)
            linear(f"decoder.{n}.{attention}.out_proj", size, size, 0)
        linear(f"decoder.{n}.linear1", hidden, size, 0)
        linear(f"decoder.{n}.linear2", size, hidden, 0)
        for k in (1, 2, 3):
            normal(f"decoder.{n}.norm{k}.weight", size, scale=0.3, offset=1.0)
            normal(f"decoder.{n}.norm{k}.bias", size, scale=0.3)
        for kind, inputs in (("self", 6), ("cross", 3)):
            name = f"decoder_{kind}_posembeds.{n}.position_embedding_head"
            linear(f"{name}.0", size, inputs)
            batch_norm(f"{name}.1", size)
            linear(f"{name}.3", size, size)
            for theirs in [key for key in state if key.startswith(name)]:
                alias = theirs.replace(f"decoder_{kind}_posembeds.{n}", f"decoder.{n}.{kind}_posembed")
                state[alias] = state[theirs]
        head(f"prediction_heads.{n}")
    return state


class GroupFreeOracle(Oracle):
    """The network of one state_dict; `forward` reads one scene."""

    def layers(self, x, name):
        for n in (1, 2):
            x = np.maximum(self.batch_norm(self.linear(x, f"{name}.conv{n}"), f"{name}.bn{n}"), 0)
        return x

    def propagate(self, coarse, fine, index, weight, name):
        x = np.concatenate([(coarse[index] * weight[..., None]).sum(1), fine], -1)
        for n in (0, 1):
            x = self.linear(x, f"{name}.layer{n}.conv")
            x = np.maximum(self.batch_norm(x, f"{name}.layer{n}.bn.bn"), 0)
        return x

    def head(self, x, base, name, mean_sizes):
        x = self.layers(x, name)
        logit, offset, bins, residual, classes = (self.linear(x, f"{name}.{part}_head") for part in HEADS)
        if f"{name}.size_pred_head.weight" in self.state:
            size = self.linear(x, f"{name}.size_pred_head")
        else:
            best = self.linear(x, f"{name}.size_class_head").argmax(-1)
            residuals = self.linear(x, f"{name}.size_residual_head").reshape(len(x), -1, 3)
            size = mean_sizes[best] * (1 + residuals[np.arange(len(x)), best])
        return {
            "logit": logit[:, 0],
            "center": base + offset,
            "bins": bins,
            "residual": residual,
            "size": size,
            "classes": classes,
        }

    def position(self, x, name):
        x = self.batch_norm(self.linear(x, f"{name}.0"), f"{name}.1")
        return self.linear(np.maximum(x, 0), f"{name}.3")

    def forward(self, xyz, features, levels, interpolations, radii, num_queries, mean_sizes=None):
        """Gives (rows of the seeds that are queries, a dictionary per head).

        Args:
          xyz: [n, 3].
          features: [n, f].
          levels: (centers, neighbors) of each set abstraction.
          interpolations: (index, weight) of each propagation.
          radii: of the set abstractions.
          num_queries: q.
          mean_sizes: [s, 3], for sizes by class.
        """
        at, x, down = xyz, features, []
        for n, ((centers, neighbors), radius) in enumerate(zip(levels, radii, strict=True), 1):
            x = self.set_abstraction(at, x, centers, neighbors, radius, f"backbone_net.sa{n}.mlp_module")
            at = centers
            down.append(x)
        x = self.propagate(x, down[2], *interpolations[0], "backbone_net.fp1.mlp")
        x = self.propagate(x, down[1], *interpolations[1], "backbone_net.fp2.mlp")
        seeds = levels[1][0]
        logit = self.linear(self.layers(x, "points_obj_cls"), "points_obj_cls.conv3")[:, 0]
        rows = np.argsort(-logit, kind="stable")[:num_queries]
        base = seeds[rows]
        heads = [self.head(x[rows], base, "proposal_head", mean_sizes)]
        query, key = self.linear(x[rows], "decoder_query_proj"), self.linear(x, "decoder_key_proj")
        count = len({name.split(".")[1] for name in self.state if name.startswith("decoder.")})
        for n in range(count):
            name, box = f"decoder.{n}", np.concatenate([heads[-1]["center"], heads[-1]["size"]], -1)
            placed = self.position(box, f"decoder_self_posembeds.{n}.position_embedding_head")
            keys = key + self.position(seeds, f"decoder_cross_posembeds.{n}.position_embedding_head")
            mixed = self.attention(query + placed, query + placed, query + placed, f"{name}.self_attn")
            query = self.layer_norm(query + mixed, f"{name}.norm1")
            mixed = self.attention(query + placed, keys, keys, f"{name}.multihead_attn")
            query = self.layer_norm(query + mixed, f"{name}.norm2")
            query = self.layer_norm(query + self.feed_forward(query, name), f"{name}.norm3")
            heads.append(self.head(query, base, f"prediction_heads.{n}", mean_sizes))
        return rows, heads


def _focal(logit, positive):
    p = 1 / (1 + np.exp(-logit))
    return -0.25 * (1 - p) ** 2 * np.log(p) if positive else -0.75 * p**2 * np.log(1 - p)


def _smooth_l1(x, delta):
    x = abs(x)
    return 0.5 * x * x / delta if x < delta else x - 0.5 * delta


def loss(head, seed_logit, seeds, instance, query_index, boxes, mean_sizes, config):
    """Terms of one batch, query by query.

    Args:
      head: of one head, arrays [b, q, ...] by the fields of HeadOutput.
      seed_logit: [b, m].
      seeds: [b, m, 3].
      instance: for each scene and seed, the rows of the boxes that hold it.
      query_index: [b, q] rows of the seeds.
      boxes: for each scene a list of (center, size, yaw, label).
      mean_sizes: [k, 3], or None for sizes in metres.
      config: config.detector.

    Returns:
      A dictionary of means.
    """
    sums = dict.fromkeys(("center", "heading_class", "heading_residual", "size_class", "size", "class"), 0.0)
    objectness, queries, positives = [], [], 0
    for b in range(len(seeds)):
        own = []
        for m, at in enumerate(seeds[b]):
            near = sorted(instance[b][m], key=lambda g: np.linalg.norm(boxes[b][g][0] - at))
            own.append(near[0] if near else None)
        asked = set()
        for g, (center, size, _, _) in enumerate(boxes[b]):
            mine = [m for m in range(len(own)) if own[m] == g]
            mine.sort(key=lambda m: np.linalg.norm((seeds[b][m] - center) / size))
            asked |= set(mine[: config.query_positives])
        queries += [_focal(seed_logit[b][m], m in asked) for m in range(len(own))]
        for q, m in enumerate(query_index[b]):
            objectness.append(_focal(head.objectness_logit[b, q], own[m] is not None))
            if own[m] is None:
                continue
            positives += 1
            center, size, yaw, label = boxes[b][own[m]]
            sums["center"] += sum(
                _smooth_l1(x, config.center_delta) for x in np.asarray(head.center)[b, q] - center
            )
            count = head.heading_logits.shape[-1]
            bin_of = round((-yaw % (2 * np.pi)) / (2 * np.pi / count)) % count
            residual = (-yaw - bin_of * 2 * np.pi / count + np.pi) % (2 * np.pi) - np.pi
            error = head.heading_residual[b, q, bin_of] - residual / (np.pi / count)
            sums["heading_residual"] += config.heading_delta * _smooth_l1(error, config.heading_delta)
            sums["heading_class"] -= np.log(softmax(np.asarray(head.heading_logits)[b, q])[bin_of])
            sums["class"] -= np.log(softmax(np.asarray(head.class_logits)[b, q])[label])
            if mean_sizes is None:
                errors = np.asarray(head.size)[b, q] - size
            else:
                errors = np.asarray(head.size_residual)[b, q, label] - (size / mean_sizes[label] - 1)
                sums["size_class"] -= np.log(softmax(np.asarray(head.size_logits)[b, q])[label])
            sums["size"] += sum(config.size_delta * _smooth_l1(x, config.size_delta) for x in errors)
    means = {name: value / positives for name, value in sums.items()}
    if mean_sizes is None:
        del means["size_class"]
    return means | {"objectness": np.mean(objectness), "query_points": np.mean(queries)}
