"""Made-up outputs of a VoteNet and a scene to go with them, for tests of what compares proposals."""

import numpy as np

from vrdistill_jax.detectors.votenet import VoteNetRaw, group_channels, predictions_from_head, split_head
from vrdistill_jax.structs import HEAD_GROUPS, Boxes, DetectorOutput, Points, PointSet, Scene

MEAN_SIZES = ((1.0, 0.8, 0.9), (0.6, 0.7, 1.2), (0.9, 0.9, 0.5), (1.1, 0.5, 0.8))
CLASSES, BINS, SIZES = 4, 3, len(MEAN_SIZES)
CHANNELS = 2 + 3 + 2 * BINS + 4 * SIZES + CLASSES


def make_scene(seed: int = 0, batch: int = 2, slots: int = 5, num_boxes: int = 3) -> Scene:
    """Turned boxes of about a metre, two metres apart, in the first slots; the pads are as the contract says."""
    rng = np.random.default_rng(seed)
    mask = np.broadcast_to(np.arange(slots) < num_boxes, (batch, slots)).copy()
    center = rng.uniform(-0.3, 0.3, (batch, slots, 3)) + 2.0 * np.arange(slots)[:, None]
    boxes = Boxes(
        center=np.where(mask[..., None], center, 0).astype(np.float32),
        size=np.where(mask[..., None], rng.uniform(0.6, 1.3, (batch, slots, 3)), 1).astype(np.float32),
        yaw=np.where(mask, rng.uniform(-3, 3, (batch, slots)), 0).astype(np.float32),
        label=np.where(mask, rng.integers(0, CLASSES, (batch, slots)), -1).astype(np.int32),
        mask=mask,
        vote_center=np.where(mask[..., None], center, 0).astype(np.float32),
    )
    points = Points(
        np.zeros((batch, 8, 3), np.float32), np.zeros((batch, 8, 1), np.float32), np.ones((batch, 8), bool)
    )
    return Scene(
        points,
        boxes,
        np.full((batch, 8, 1), -1, np.int32),
        np.tile(np.eye(4, dtype=np.float32), (batch, 1, 1)),
        np.arange(batch, dtype=np.int32),
        np.ones(batch, bool),
    )


def make_output(
    seed: int, scene: Scene, size: int = 8, seed_size: int = 8, queries: int = 20, seeds: int = 16
) -> DetectorOutput:
    """An output whose proposals lie around the boxes' slots; `size` hidden channels, `seed_size` of the seeds.

    The coordinates of seeds and clusters are the same for every `seed`; all else differs.
    """
    shared, rng = np.random.default_rng(100), np.random.default_rng(seed)
    batch, slots = scene.boxes.mask.shape
    around = np.where(scene.boxes.mask[..., None], scene.boxes.center, 2.0 * np.arange(slots)[:, None])

    def near(count):
        return (around[:, np.arange(count) % slots] + shared.normal(0, 0.3, (batch, count, 3))).astype(
            np.float32
        )

    def normal(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    seed_xyz, cluster_xyz = near(seeds), near(queries)
    seed_mask, mask = np.ones((batch, seeds), bool), np.ones((batch, queries), bool)
    index = np.zeros((batch, seeds), np.int32)
    points = PointSet(seed_xyz, np.maximum(normal(batch, seeds, seed_size), 0), seed_mask, index)
    clusters = PointSet(cluster_xyz, normal(batch, queries, size), mask, np.zeros((batch, queries), np.int32))
    channels = normal(batch, queries, CHANNELS)
    channels[..., 2:5] *= 0.1
    residuals = slice(5 + 2 * BINS + SIZES, 5 + 2 * BINS + 4 * SIZES)
    channels[..., residuals] *= 0.1
    head = split_head(channels, cluster_xyz, BINS, SIZES)
    raw = VoteNetRaw(
        backbone=None,
        vote_channels=normal(batch, seeds, 3 + seed_size),
        votes=points,
        cluster_index=np.zeros((batch, queries), np.int32),
        clusters=clusters,
        head_channels=channels,
        head=head,
    )
    predictions = predictions_from_head(head, mask, MEAN_SIZES)
    proposals = clusters._replace(features=np.maximum(normal(batch, queries, size), 0))
    taps = {"seeds": points, "votes": points, "clusters": clusters, "proposals": proposals}
    return DetectorOutput(predictions, taps, raw, group_channels(channels, BINS, SIZES))


def join_head(output: DetectorOutput) -> np.ndarray:
    """All channels of the head, as they come out of it."""
    return np.concatenate([output.head[name] for name in HEAD_GROUPS], -1)


def replace_proposals(output: DetectorOutput, features) -> DetectorOutput:
    """Other hidden features."""
    proposals = output.taps["proposals"]._replace(features=features)
    return output._replace(taps=output.taps | {"proposals": proposals})


def mask_proposals(output: DetectorOutput, count: int) -> DetectorOutput:
    """Turns the last `count` proposals into pads."""
    mask = np.asarray(output.predictions.mask).copy()
    mask[:, mask.shape[1] - count :] = False
    masked = {name: output.taps[name]._replace(mask=mask) for name in ("clusters", "proposals")}
    return output._replace(predictions=output.predictions._replace(mask=mask), taps=output.taps | masked)


def permute_proposals(output: DetectorOutput, order) -> DetectorOutput:
    """Reorders the proposals of every scene."""

    def take(x):
        return np.asarray(x)[:, order]

    moved = {name: PointSet(*map(take, output.taps[name])) for name in ("clusters", "proposals")}
    return output._replace(
        predictions=type(output.predictions)(*map(take, output.predictions)),
        taps=output.taps | moved,
        head={name: take(group) for name, group in output.head.items()},
    )
