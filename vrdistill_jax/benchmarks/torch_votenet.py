"""VoteNet's layers in eager PyTorch, as people who use the reference run them: a peer to compare speed with.

Channels come first; each set abstraction gathers its neighbours with `index_select`, then 1x1 convolution, batch norm
(evaluation), ReLU, and the maximum over the neighbours. Sampling and neighbour search are not part of it: indices are
given. The weights are those of our network, so that both must give the same numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vrdistill_jax.structs import PointPyramid, Points


def import_torch() -> Any:
    """The torch module.

    Raises:
      ImportError: naming the extra to install.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("not installed: pip install 'vrdistill-jax[torch]'") from error
    return torch


def make_forward(
    variables: dict,
    config: Any,
    points: Points,
    pyramid: PointPyramid,
    cluster_index: np.ndarray,
    vote_neighbors: np.ndarray,
    num_threads: int,
) -> Callable[[], np.ndarray]:
    """Builds a call of the PyTorch network.

    Args:
      variables: of our VoteNet.
      config: config.detector.
      points: one cloud, batch axis 1.
      pyramid: its pyramid.
      cluster_index: i32[Q] rows of the votes at the cluster centres.
      vote_neighbors: i32[Q, S] rows of the votes around each.
      num_threads: for torch.

    Returns:
      A function without arguments that gives f32[Q, C], the head's channels.

    Raises:
      ImportError: if torch is not installed.
    """
    torch = import_torch()
    torch.set_num_threads(num_threads)
    relu_mlp, linear = _layer_builders(torch)
    params, stats = variables["params"], variables["batch_stats"]
    levels = [(f"sa{n + 1}", radius) for n, (_, radius, _) in enumerate(config.levels)]
    down = [relu_mlp(params["backbone"][n]["mlp"], stats["backbone"][n]["mlp"], config) for n, _ in levels]
    up = [relu_mlp(params["backbone"][n]["mlp"], stats["backbone"][n]["mlp"], config) for n in ("fp1", "fp2")]
    aggregate = relu_mlp(params["aggregation"]["mlp"], stats["aggregation"]["mlp"], config)
    vote = relu_mlp(params["voting"], stats["voting"], config)
    propose = relu_mlp(params["proposal"], stats["proposal"], config)
    vote_out, propose_out = linear(params["voting_out"]), linear(params["proposal_out"])

    def channels_first(x):
        return torch.tensor(np.asarray(x)[0].T[None, :, :, None].copy())  # [1, C, N, 1]

    def rows(x):
        return torch.tensor(np.asarray(x, np.int64))

    cloud, features = channels_first(points.xyz), channels_first(points.features)
    centers = [channels_first(level.xyz) for level in pyramid.levels]
    neighbors = [rows(level.neighbor_index[0]) for level in pyramid.levels]
    blends = [
        (rows(blend.index[0]), torch.tensor(np.asarray(blend.weight[0]))) for blend in pyramid.interpolations
    ]
    cluster_rows, vote_rows = rows(cluster_index), rows(vote_neighbors)

    def take(x, index):
        return x.index_select(2, index.reshape(-1)).reshape(1, x.shape[1], *index.shape)

    def abstract(mlp, xyz, x, at, index, radius):
        relative = (take(xyz[..., 0], index) - at) / radius
        return mlp(torch.cat([relative, take(x[..., 0], index)], 1)).amax(3, keepdim=True)

    def forward():
        with torch.inference_mode():
            xyz, x, kept = cloud, features, []
            for mlp, at, index, (_, radius) in zip(down, centers, neighbors, levels, strict=True):
                x = abstract(mlp, xyz, x, at, index, radius)
                xyz = at
                kept.append(x)
            for mlp, (index, weight), fine in zip(up, blends, (2, 1), strict=True):
                blended = (take(x[..., 0], index) * weight).sum(3, keepdim=True)
                x = mlp(torch.cat([blended, kept[fine]], 1))
            channels = vote_out(vote(x))
            votes, voted = centers[1] + channels[:, :3], x + channels[:, 3:]
            if config.normalize_votes:
                voted = voted / voted.norm(dim=1, keepdim=True)
            at = votes.index_select(2, cluster_rows)
            clusters = abstract(aggregate, votes, voted, at, vote_rows, config.aggregation_radius)
            return propose_out(propose(clusters))[0, :, :, 0].T.numpy()

    return forward


def _layer_builders(torch):
    def tensor(x):
        return torch.tensor(np.asarray(x))

    def convolution(dense):
        kernel = tensor(dense["kernel"]).T[:, :, None, None].contiguous()
        layer = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], 1, bias="bias" in dense)
        layer.weight.data = kernel
        if "bias" in dense:
            layer.bias.data = tensor(dense["bias"])
        return layer.eval()

    def relu_mlp(params, stats, config):
        layers = []
        for name in sorted(params):
            convolve = convolution(params[name]["dense"])
            norm = torch.nn.BatchNorm2d(convolve.out_channels, eps=config.norm_epsilon)
            norm.weight.data, norm.bias.data = (tensor(params[name]["norm"][k]) for k in ("scale", "bias"))
            norm.running_mean, norm.running_var = (tensor(stats[name]["norm"][k]) for k in ("mean", "var"))
            layers += [convolve, norm, torch.nn.ReLU(inplace=True)]
        return torch.nn.Sequential(*layers).eval()

    return relu_mlp, convolution
