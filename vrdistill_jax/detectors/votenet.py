"""VoteNet: deep Hough voting for 3D object detection.

Seeds of a PointNet++ backbone vote for object centres; votes are grouped into clusters, and each cluster proposes a box.

Source: Qi et al., "Deep Hough Voting for 3D Object Detection in Point Clouds" (2019) and the repository votenet.
Inside, the reference's parametrisation is kept (its heading runs from +x towards -y, the negative of our yaw; channel
layout of the outputs), so that its checkpoints and losses can be compared number by number; `predictions` and `decode`
speak the contract's frame.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.detectors.decoding import DecodeConfig, select_detections
from vrdistill_jax.geometry.frames import votenet_heading_from_yaw, yaw_from_votenet_heading
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.geometry.neighbors import query_ball
from vrdistill_jax.geometry.sampling import sample_farthest_points
from vrdistill_jax.losses.bins import angle_from_bin, bin_from_angle
from vrdistill_jax.losses.box import huber, nearest, squared_distances
from vrdistill_jax.losses.classification import cross_entropy
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.losses.votes import vote_distance, vote_targets
from vrdistill_jax.nn.mlp import Dense, PointMLP, scale_size, torch_default
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.nn.pointnet2 import BackboneOutput, PointNet2Backbone, SetAbstraction
from vrdistill_jax.structs import (
    HEAD_GROUPS,
    Detections,
    DetectorOutput,
    LevelConfig,
    PointPyramid,
    Points,
    PointSet,
    Predictions,
    PyramidConfig,
    PyramidLevel,
    Scene,
)

NEAR, FAR = 0.3, 0.6  # metres: proposals nearer than NEAR to an object are positive, beyond FAR negative
OBJECTNESS_WEIGHT = (0.2, 0.8)


class HeadOutput(NamedTuple):
    """A proposal's channels, split; the reference's parametrisation."""

    objectness_logits: Array  # f32[B, Q, 2] (no object, object)
    center: Array  # f32[B, Q, 3] metres
    heading_logits: Array  # f32[B, Q, H]
    heading_residual: Array  # f32[B, Q, H] in units of pi / H
    size_logits: Array  # f32[B, Q, S]
    size_residual: Array  # f32[B, Q, S, 3] in units of the class's mean size
    class_logits: Array  # f32[B, Q, K]


class VoteNetRaw(NamedTuple):
    """Everything between cloud and boxes."""

    backbone: BackboneOutput
    vote_channels: Array  # f32[B, M, 3 + C] output of the voting layers: offset, feature residual
    votes: PointSet
    cluster_index: Array  # i32[B, Q] row of the vote at each cluster's centre
    clusters: PointSet
    head_channels: Array  # f32[B, Q, 2 + 3 + 2H + 4S + K]
    head: HeadOutput


class VoteNet(nn.Module):
    """The network.

    Attributes:
      num_classes: K.
      num_heading_bins: H; 1 where boxes are axis-aligned.
      mean_sizes: S rows (length, width, height) in metres.
      input_size: feature channels of the cloud.
      radii: metres, of the four set abstractions.
      width: multiplier of every hidden size (1, 1/2, 1/4).
      num_proposals: Q.
      cluster_sampling: "vote_fps" or "seed_fps": what the cluster centres are spread over, in training.
      cluster_sampling_eval: the same at inference.
      aggregation_radius: metres, of the vote grouping.
      aggregation_neighbors: votes per cluster.
      normalize_votes: whether vote features are scaled to unit length.
      norm: makes the norm layers.
    """

    num_classes: int
    num_heading_bins: int
    mean_sizes: tuple[tuple[float, float, float], ...]
    input_size: int
    radii: tuple[float, ...]
    width: float = 1.0
    num_proposals: int = 256
    cluster_sampling: str = "vote_fps"
    cluster_sampling_eval: str = "seed_fps"
    aggregation_radius: float = 0.3
    aggregation_neighbors: int = 16
    normalize_votes: bool = True
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        wide, narrow = scale_size(256, self.width), scale_size(128, self.width)
        layer = partial(PointMLP, use_bias=True, kernel_init=torch_default, norm=self.norm)
        self.backbone = PointNet2Backbone(self.input_size, self.radii, self.width, norm=self.norm)
        self.voting = layer(wide, (wide, wide))
        self.voting_out = Dense(wide, 3 + wide)
        self.aggregation = SetAbstraction(wide, (narrow,) * 3, self.aggregation_radius, self.norm)
        self.proposal = layer(narrow, (narrow, narrow))
        channels = 2 + 3 + 2 * self.num_heading_bins + 4 * len(self.mean_sizes) + self.num_classes
        self.proposal_out = Dense(narrow, channels)

    def __call__(
        self, points: Points, pyramid: PointPyramid, *, train: bool, cluster_index: Array | None = None
    ) -> DetectorOutput:
        """Detects objects.

        Args:
          points: the clouds.
          pyramid: their geometry, built with `pyramid_config`.
          train: batch statistics (written to `batch_stats`) or running ones; also picks the cluster sampling.
          cluster_index: i32[B, Q] rows of the votes to put clusters at; None samples them.

        Returns:
          DetectorOutput with taps "seeds", "votes", "clusters", "proposals" and a VoteNetRaw.
        """
        backbone = self.backbone(points, pyramid, train=train)
        votes, vote_channels = self._vote(backbone.seeds, train)
        return self._propose(backbone, votes, vote_channels, cluster_index, train)

    def propose_like(self, output: DetectorOutput, other: DetectorOutput, *, train: bool) -> DetectorOutput:
        """Clusters the votes of an earlier pass where another network did: the second half of the network only.

        Args:
          output: of `__call__` on the same clouds.
          other: of another VoteNet on the same clouds.
          train: as in `__call__`; the statistics that it writes are those of this pass.
        """
        raw = output.raw
        return self._propose(raw.backbone, raw.votes, raw.vote_channels, other.raw.cluster_index, train)

    def propose_at(self, output: DetectorOutput, clusters: PointSet, *, train: bool) -> DetectorOutput:
        """Lets the head read other clusters than those that an earlier pass found.

        Args:
          output: of `__call__`; everything before the clusters is taken from it.
          clusters: f32[B, Q, C] features of the same size; what the head reads.
          train: as in `__call__`.
        """
        raw = output.raw
        return self._read_clusters(
            raw.backbone, raw.votes, raw.vote_channels, clusters, raw.cluster_index, train
        )

    def _propose(self, backbone, votes, vote_channels, cluster_index, train) -> DetectorOutput:
        clusters, cluster_index = self._cluster(backbone.seeds, votes, cluster_index, train)
        return self._read_clusters(backbone, votes, vote_channels, clusters, cluster_index, train)

    def _read_clusters(
        self, backbone, votes, vote_channels, clusters, cluster_index, train
    ) -> DetectorOutput:
        hidden = self.proposal(clusters.features, clusters.mask, train=train)
        head_channels = self.proposal_out(hidden)
        head = split_head(head_channels, clusters.xyz, self.num_heading_bins, len(self.mean_sizes))
        raw = VoteNetRaw(backbone, vote_channels, votes, cluster_index, clusters, head_channels, head)
        proposals = clusters._replace(features=hidden)
        taps = {"seeds": backbone.seeds, "votes": votes, "clusters": clusters, "proposals": proposals}
        predictions = predictions_from_head(head, clusters.mask, self.mean_sizes)
        groups = group_channels(head_channels, self.num_heading_bins, len(self.mean_sizes))
        return DetectorOutput(predictions, taps, raw, groups)

    def _vote(self, seeds: PointSet, train: bool) -> tuple[PointSet, Array]:
        channels = self.voting_out(self.voting(seeds.features, seeds.mask, train=train))
        features = seeds.features + channels[..., 3:]
        if self.normalize_votes:
            # The reference divides by the norm without an epsilon; the floor only matters for all-zero features.
            norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(features), -1, keepdims=True), 1e-24))
            features = features / norm
        return seeds._replace(xyz=seeds.xyz + channels[..., :3], features=features), channels

    def _cluster(
        self, seeds: PointSet, votes: PointSet, index: Array | None, train: bool
    ) -> tuple[PointSet, Array]:
        index = self._sample_clusters(seeds, votes, train) if index is None else index
        center, mask = gather_rows(votes.xyz, index), gather_rows(votes.mask, index)
        radius, count = self.aggregation_radius, self.aggregation_neighbors
        neighbors = jax.vmap(lambda at, xyz, mask: query_ball(at, xyz, radius, count, mask))(
            *jax.lax.stop_gradient((center, votes.xyz, votes.mask))
        )
        source_index = gather_rows(votes.seed_index, index)
        level = PyramidLevel(center, mask, index, source_index, neighbors)
        features = self.aggregation(votes.xyz, votes.features, level, train=train)
        return PointSet(center, features, mask, source_index), index

    def _sample_clusters(self, seeds: PointSet, votes: PointSet, train: bool) -> Array:
        sampling = self.cluster_sampling if train else self.cluster_sampling_eval
        if sampling not in ("vote_fps", "seed_fps"):
            raise ValueError(f"cluster sampling must be vote_fps or seed_fps, got {sampling!r}")
        spread = jax.lax.stop_gradient(votes.xyz if sampling == "vote_fps" else seeds.xyz)
        return jax.vmap(lambda xyz, mask: sample_farthest_points(xyz, self.num_proposals, mask))(
            spread, votes.mask
        )


def default_config(class_names, mean_sizes, oriented: bool) -> ConfigDict:
    """The published architecture as `config.detector`.

    Args:
      class_names: K names.
      mean_sizes: K rows (length, width, height) in metres.
      oriented: whether boxes are turned (12 heading bins) or axis-aligned (one).

    Returns:
      A ConfigDict; besides the attributes of VoteNet it holds
        levels: (centres, radius, neighbours) of each set abstraction,
        input_features: of "color" and "height",
        norm_epsilon: of the batch norms (Keras weights need 1e-3),
        reference_padding: True reproduces the reference's unmasked zero padding of boxes in the loss.
    """
    config = ConfigDict()
    config.name = "votenet"
    config.class_names = tuple(class_names)
    config.mean_sizes = tuple(tuple(float(x) for x in row) for row in mean_sizes)
    config.num_heading_bins = 12 if oriented else 1
    config.input_features = ("height",)
    config.width = 1.0
    config.num_proposals = 256
    config.levels = ((2048, 0.2, 64), (1024, 0.4, 32), (512, 0.8, 16), (256, 1.2, 16))
    config.cluster_sampling = "vote_fps"
    config.cluster_sampling_eval = "seed_fps"
    config.aggregation_radius = 0.3
    config.aggregation_neighbors = 16
    config.normalize_votes = True
    config.norm_epsilon = 1e-5
    config.reference_padding = False
    return config


def build(config: Any, norm_axis_name: str | None = None) -> VoteNet:
    """The network that `config.detector` describes; `norm_axis_name` synchronises its batch norm over that device axis."""
    return VoteNet(
        num_classes=len(config.class_names),
        num_heading_bins=config.num_heading_bins,
        mean_sizes=tuple(tuple(row) for row in config.mean_sizes),
        input_size=feature_size(config.input_features),
        radii=tuple(level[1] for level in config.levels),
        width=config.width,
        num_proposals=config.num_proposals,
        cluster_sampling=config.cluster_sampling,
        cluster_sampling_eval=config.cluster_sampling_eval,
        aggregation_radius=config.aggregation_radius,
        aggregation_neighbors=config.aggregation_neighbors,
        normalize_votes=config.normalize_votes,
        norm=partial(MaskedBatchNorm, epsilon=config.norm_epsilon, axis_name=norm_axis_name),
    )


def feature_size(input_features) -> int:
    """Channels of the cloud's features, for example 1 for ("height",) and 4 for ("color", "height")."""
    return sum({"color": 3, "height": 1}[name] for name in input_features)


def pyramid_config(config: Any) -> PyramidConfig:
    """What the loader computes for each cloud."""
    return PyramidConfig(tuple(LevelConfig(*level) for level in config.levels), ((3, 2), (2, 1)))


def split_head(
    channels: Float[Array, "b q c"], base: Float[Array, "b q 3"], num_heading_bins: int, num_sizes: int
) -> HeadOutput:
    """Names the channels of the proposal head; `base` is the cluster centre that the offset is added to."""
    ends = np.cumsum([2, 3, num_heading_bins, num_heading_bins, num_sizes, 3 * num_sizes])
    objectness, offset, heading, heading_residual, size, size_residual, classes = jnp.split(
        channels, ends, -1
    )
    size_residual = size_residual.reshape(*channels.shape[:-1], num_sizes, 3)
    return HeadOutput(objectness, base + offset, heading, heading_residual, size, size_residual, classes)


def group_channels(
    channels: Float[Array, "b q c"], num_heading_bins: int, num_sizes: int
) -> dict[str, Float[Array, "b q _"]]:
    """The channels of the proposal head by HEAD_GROUPS of the data contract."""
    ends = np.cumsum([2, 3, 2 * num_heading_bins, 4 * num_sizes])
    return dict(zip(HEAD_GROUPS, jnp.split(channels, ends, -1), strict=True))


def predictions_from_head(head: HeadOutput, mask, mean_sizes) -> Predictions:
    """Decodes the likeliest heading bin and size class of each proposal into the contract's frame."""
    num_bins = head.heading_logits.shape[-1]
    heading_bin = jnp.argmax(head.heading_logits, -1)
    residual = _pick(head.heading_residual, heading_bin) * (jnp.pi / num_bins)
    heading = angle_from_bin(heading_bin, residual, num_bins)
    if num_bins == 1:  # axis-aligned data: the reference ignores the heading
        heading = jnp.zeros_like(heading)
    size_class = jnp.argmax(head.size_logits, -1)
    mean = jnp.asarray(mean_sizes, jnp.float32)[size_class]
    size = mean + _pick(head.size_residual, size_class) * mean
    objectness = jax.nn.softmax(head.objectness_logits, -1)[..., 1]
    return Predictions(
        head.center, size, yaw_from_votenet_heading(heading), head.class_logits, objectness, mask
    )


def _pick(values: Float[Array, "b q s *c"], index: Int[Array, "b q"]) -> Array:
    """values[b, q, index[b, q]]."""
    index = index.reshape(*index.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=2)[:, :, 0]


def loss(output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None):
    """VoteNet's training loss.

    Args:
      output: of the network.
      scene: with boxes and point_instance.
      config: config.detector.
      axis_name: mapped device axis over which the means are taken, or None.

    Returns:
      (scalar total, dict of scalar terms). total = 10 (vote + 0.5 objectness + box + 0.1 class), where box =
      center + 0.1 heading_class + heading_residual + 0.1 size_class + size_residual.

    Raises:
      ValueError: if the scene has no boxes.

    Source: VoteNet, models/loss_helper.py.
    Differs: padded boxes never attract a proposal, unless config.reference_padding is set (the reference lets its
      zero padding act as an object of class 0 at the origin).
    """
    if scene.boxes is None or scene.point_instance is None:
        raise ValueError("the loss needs scene.boxes and scene.point_instance; this scene has no labels")
    raw, boxes = output.raw, scene.boxes
    mean = partial(masked_mean, axis_name=axis_name)
    real = scene.mask[:, None]

    targets, on_object = vote_targets(scene.point_instance, boxes.vote_center, raw.votes.seed_index)
    on_object = on_object & raw.votes.mask & real
    vote_loss = mean(vote_distance(raw.votes.xyz, targets), on_object)

    candidate = jnp.ones_like(boxes.mask) if config.reference_padding else boxes.mask
    distance, assigned = nearest(
        squared_distances(jax.lax.stop_gradient(raw.clusters.xyz), boxes.center), candidate
    )
    distance = jnp.sqrt(distance + 1e-6)
    valid = raw.clusters.mask & real
    positive = (distance < NEAR) & valid
    judged = positive | ((distance > FAR) & valid)
    objectness = cross_entropy(
        raw.head.objectness_logits, positive.astype(jnp.int32), jnp.asarray(OBJECTNESS_WEIGHT, jnp.float32)
    )
    terms = {"vote": vote_loss, "objectness": mean(objectness, judged)}
    terms |= _box_terms(raw.head, boxes, assigned, positive, candidate, valid, config, mean)
    box = (
        terms["center"]
        + 0.1 * terms["heading_class"]
        + terms["heading_residual"]
        + 0.1 * terms["size_class"]
        + terms["size_residual"]
    )
    total = 10.0 * (vote_loss + 0.5 * terms["objectness"] + box + 0.1 * terms["class"])
    right = (jnp.argmax(raw.head.objectness_logits, -1) == positive).astype(jnp.float32)
    terms |= {
        "positive_share": mean(positive.astype(jnp.float32), valid),
        "negative_share": mean((judged & ~positive).astype(jnp.float32), valid),
        "objectness_accuracy": mean(right, judged),
    }
    return total, terms


def _box_terms(
    head: HeadOutput, boxes, assigned, positive, candidate, valid, config, mean
) -> dict[str, Array]:
    """The terms that compare positive proposals with the boxes that they are assigned to."""
    pairs = squared_distances(head.center, boxes.center)
    to_box, _ = nearest(pairs, candidate)
    to_proposal, _ = nearest(jnp.swapaxes(pairs, 1, 2), valid)
    box_mask = boxes.mask & jnp.any(valid, axis=1, keepdims=True)

    num_bins = head.heading_logits.shape[-1]
    heading_bin, heading_residual = bin_from_angle(votenet_heading_from_yaw(boxes.yaw), num_bins)
    bin_target = gather_rows(heading_bin, assigned)
    residual_target = gather_rows(heading_residual, assigned) / (jnp.pi / num_bins)

    label = gather_rows(jnp.maximum(boxes.label, 0), assigned)
    mean_size = jnp.asarray(config.mean_sizes, jnp.float32)[label]
    size_target = gather_rows(boxes.size, assigned) / mean_size - 1.0
    if (
        config.reference_padding
    ):  # the reference's pads: class 0 with size residual 0, heading bin 0 with residual 0
        size_target = jnp.where(gather_rows(boxes.mask, assigned)[..., None], size_target, 0.0)
    return {
        "center": mean(to_box, positive) + mean(to_proposal, box_mask),
        "heading_class": mean(cross_entropy(head.heading_logits, bin_target), positive),
        "heading_residual": mean(huber(_pick(head.heading_residual, bin_target) - residual_target), positive),
        "size_class": mean(cross_entropy(head.size_logits, label), positive),
        "size_residual": mean(jnp.mean(huber(_pick(head.size_residual, label) - size_target), -1), positive),
        "class": mean(cross_entropy(head.class_logits, label), positive),
    }


def decode(
    output: DetectorOutput, points: Points, config: Any, decode_config: DecodeConfig | None = None
) -> Detections:
    """Turns proposals into final boxes by VoteNet's protocol.

    Args:
      output: of the network, in evaluation mode.
      points: the clouds that it read (boxes that hold next to none of them are dropped).
      config: config.detector.
      decode_config: thresholds; None for the evaluation protocol.

    Returns:
      Detections sorted by falling score.
    """
    del config  # predictions are already in the contract's frame
    return select_detections(output.predictions, points, decode_config or DecodeConfig())
