"""Naive float64 MGD of one scene, neighbour by neighbour: the oracle of the MGD tests."""

import numpy as np


def neighbors(xyz, num_neighbors):
    """Rows of the nearest points of each point, itself included, the lower row first among equals."""
    rows = []
    for p in xyz:
        distance = ((xyz - p) ** 2).sum(1)
        rows.append(sorted(range(len(xyz)), key=lambda j: (distance[j], j))[:num_neighbors])
    return rows


def neighbor_layer(features, xyz, graph, params, scale):
    output = []
    for i, row in enumerate(graph):
        messages = [
            np.concatenate([features[j], (xyz[j] - xyz[i]) / scale]) @ params["around"]["kernel"] for j in row
        ]
        own = features[i] @ params["own"]["kernel"] + params["own"]["bias"]
        output.append(own + np.mean(messages, axis=0))
    return np.array(output)


def generate(features, xyz, params, num_neighbors=9, scale=0.4):
    graph = neighbors(xyz, num_neighbors)
    hidden = np.maximum(neighbor_layer(features, xyz, graph, params["layer0"], scale), 0)
    return neighbor_layer(hidden, xyz, graph, params["layer1"], scale)


def mgd(student, teacher, xyz, kept, params, num_neighbors=9, scale=0.4):
    """Unweighted loss of one scene; all rows are valid, `kept` bool[m] are not blanked."""
    if "align" in params:
        student = student @ params["align"]["kernel"] + params["align"]["bias"]
    restored = generate(student * kept[:, None], xyz, params["generator"], num_neighbors, scale)
    return ((restored - teacher) ** 2).sum()
