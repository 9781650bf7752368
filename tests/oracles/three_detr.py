"""3DETR at inference in NumPy, float64, straight from tensors with the official repository's names and layouts."""

import numpy as np

HEADS = ("sem_cls_head", "center_head", "size_head", "angle_cls_head", "angle_residual_head")


def make_state(classes, bins, masked, width=1 / 16, features=0, encoder_layers=3, decoder_layers=8, seed=0):
    """A state_dict with the names and shapes of the official modules and random numbers."""
    rng, state = np.random.default_rng(seed), {}
    size, w64, w128 = (int(n * width) for n in (256, 64, 128))

    def normal(name, *shape, scale=1.0, offset=0.0):
        state[name] = (offset + scale * rng.normal(size=shape)).astype(np.float32)

    def linear(name, out, inputs, dims=0, bias=True):
        normal(f"{name}.weight", out, inputs, *[1] * dims, scale=1.5 * inputs**-0.5)
        if bias:
            normal(f"{name}.bias", out, scale=0.3)

    def layer_norm(name):
        normal(f"{name}.weight", size, scale=0.3, offset=1.0)
        normal(f"{name}.bias", size, scale=0.3)

    def batch_norm(name, channels):
        normal(f"{name}.weight", channels, scale=0.3, offset=1.0)
        normal(f"{name}.bias", channels, scale=0.3)
        normal(f"{name}.running_mean", channels, scale=0.3)
        state[f"{name}.running_var"] = rng.uniform(0.5, 2, channels).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    def shared(name, sizes):
        for n, (inputs, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            linear(f"{name}.layer{n}.conv", out, inputs, 2, bias=False)
            batch_norm(f"{name}.layer{n}.bn.bn", out)

    def attention(name):
        normal(f"{name}.in_proj_weight", 3 * size, size, scale=1.5 * size**-0.5)
        normal(f"{name}.in_proj_bias", 3 * size, scale=0.3)
        linear(f"{name}.out_proj", size, size)

    def feed_forward(name, hidden):
        linear(f"{name}.linear1", hidden, size)
        linear(f"{name}.linear2", size, hidden)

    shared("pre_encoder.mlp_module", (3 + features, w64, w128, size))
    for n in range(encoder_layers):
        attention(f"encoder.layers.{n}.self_attn")
        feed_forward(f"encoder.layers.{n}", w128)
        for k in (1, 2):
            layer_norm(f"encoder.layers.{n}.norm{k}")
    if masked:
        shared("encoder.interim_downsampling.mlp_module", (3 + size, size, size, size))
    for n in range(2 if masked else 3):
        linear(f"encoder_to_decoder_projection.layers.{3 * n}", size, size, 1, bias=False)
        batch_norm(f"encoder_to_decoder_projection.layers.{3 * n + 1}", size)
    normal("pos_embedding.gauss_B", 3, size // 2)
    for n in (0, 2):
        linear(f"query_projection.layers.{n}", size, size, 1)
    for n in range(decoder_layers):
        attention(f"decoder.layers.{n}.self_attn")
        attention(f"decoder.layers.{n}.multihead_attn")
        feed_forward(f"decoder.layers.{n}", size)
        for k in (1, 2, 3):
            layer_norm(f"decoder.layers.{n}.norm{k}")
    layer_norm("decoder.norm")
    for head, out in zip(HEADS, (classes + 1, 3, 3, bins, bins), strict=True):
        for n in (0, 4):
            linear(f"mlp_heads.{head}.layers.{n}", size, size, 1, bias=False)
            batch_norm(f"mlp_heads.{head}.layers.{n + 1}", size)
        linear(f"mlp_heads.{head}.layers.8", out, size, 1)
    return state


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attention(query, key, value, in_weight, in_bias, out_weight, out_bias, heads, mask=None):
    """torch.nn.MultiheadAttention of one scene, head by head; mask True where a query may look."""
    size = len(out_bias)
    q, k, v = (
        x @ in_weight[n * size : (n + 1) * size].T + in_bias[n * size : (n + 1) * size]
        for n, x in enumerate((query, key, value))
    )
    width, parts = size // heads, []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        logits = q[:, own] @ k[:, own].T / np.sqrt(width)
        if mask is not None:
            logits = np.where(mask, logits, -np.inf)
        parts.append(softmax(logits) @ v[:, own])
    return np.concatenate(parts, -1) @ out_weight.T + out_bias


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


class Oracle:
    """The network of one state_dict; `forward` reads one scene."""

    def __init__(self, state, heads=4):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}
        self.heads = heads

    def linear(self, x, name):
        weight = self.state[f"{name}.weight"]
        return x @ weight.reshape(weight.shape[:2]).T + self.state.get(f"{name}.bias", 0.0)

    def batch_norm(self, x, name):
        mean, var, weight, bias = (
            self.state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    def layer_norm(self, x, name):
        return layer_norm(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def attention(self, query, key, value, name, mask=None):
        leaves = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        return attention(query, key, value, *(self.state[f"{name}.{n}"] for n in leaves), self.heads, mask)

    def feed_forward(self, x, name):
        return self.linear(np.maximum(self.linear(x, f"{name}.linear1"), 0), f"{name}.linear2")

    def set_abstraction(self, xyz, features, centers, neighbors, radius, name):
        x = np.concatenate([(xyz[neighbors] - centers[:, None]) / radius, features[neighbors]], -1)
        for n in range(3):
            x = self.linear(x, f"{name}.layer{n}.conv")
            x = np.maximum(self.batch_norm(x, f"{name}.layer{n}.bn.bn"), 0)
        return x.max(1)

    def head(self, x, name):
        for n in (0, 4):
            x = self.linear(x, f"{name}.layers.{n}")
            x = np.maximum(self.batch_norm(x, f"{name}.layers.{n + 1}"), 0)
        return self.linear(x, f"{name}.layers.8")

    def forward(self, xyz, features, levels, query_xyz, radii, masking_radii=()):
        """Outputs of the heads for every decoder layer, and the boxes of the last one.

        Args:
          xyz: [n, 3].
          features: [n, f].
          levels: (centers, neighbors) of each set abstraction.
          query_xyz: [q, 3].
          radii: of the set abstractions.
          masking_radii: of the encoder layers, or ().

        Returns:
          A dictionary of lists over the layers.
        """
        layers = {name.split(".")[2] for name in self.state if name.startswith("encoder.layers.")}
        tokens = levels[0][0]
        x = self.set_abstraction(xyz, features, *levels[0], radii[0], "pre_encoder.mlp_module")
        for n in range(len(layers)):
            name, mask = f"encoder.layers.{n}", None
            if masking_radii:
                mask = np.linalg.norm(tokens[:, None] - tokens, axis=-1) < masking_radii[n]
            normed = self.layer_norm(x, f"{name}.norm1")
            x = x + self.attention(normed, normed, normed, f"{name}.self_attn", mask)
            x = x + self.feed_forward(self.layer_norm(x, f"{name}.norm2"), name)
            if n == 0 and len(levels) == 2:
                x = self.set_abstraction(
                    tokens, x, *levels[1], radii[1], "encoder.interim_downsampling.mlp_module"
                )
                tokens = levels[1][0]
        memory = x
        for n in range(2 if len(levels) == 2 else 3):
            name = "encoder_to_decoder_projection.layers"
            memory = self.batch_norm(self.linear(memory, f"{name}.{3 * n}"), f"{name}.{3 * n + 1}")
            memory = np.maximum(memory, 0)

        low, high = xyz.min(0), xyz.max(0)

        def position(at):
            phase = 2 * np.pi * (at - low) / (high - low) @ self.state["pos_embedding.gauss_B"]
            return np.concatenate([np.sin(phase), np.cos(phase)], -1)

        placed = position(query_xyz)
        for n in (0, 2):
            placed = np.maximum(self.linear(placed, f"query_projection.layers.{n}"), 0)
        keys, content = memory + position(tokens), np.zeros_like(placed)
        layers = {name.split(".")[2] for name in self.state if name.startswith("decoder.layers.")}
        result = {key: [] for key in ("logits", "center", "size", "heading_logits", "heading_residual")}
        for n in range(len(layers)):
            name = f"decoder.layers.{n}"
            normed = self.layer_norm(content, f"{name}.norm1")
            content = content + self.attention(normed + placed, normed + placed, normed, f"{name}.self_attn")
            normed = self.layer_norm(content, f"{name}.norm2") + placed
            content = content + self.attention(normed, keys, memory, f"{name}.multihead_attn")
            content = content + self.feed_forward(self.layer_norm(content, f"{name}.norm3"), name)
            decoded = self.layer_norm(content, "decoder.norm")
            logits, center, size, heading_logits, residual = (
                self.head(decoded, f"mlp_heads.{head}") for head in HEADS
            )
            result["logits"].append(logits)
            result["center"].append(query_xyz + 1 / (1 + np.exp(-center)) - 0.5)
            result["size"].append((high - low) / (1 + np.exp(-size)))
            result["heading_logits"].append(heading_logits)
            result["heading_residual"].append(residual)
        return result
