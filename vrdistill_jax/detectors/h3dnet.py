"""H3DNet: 3D object detection with hybrid geometric primitives.

VoteNet's seeds vote for object centres and, besides, for centres of faces and edges of the objects' boxes. Clusters of centre
votes propose boxes; the primitives found around a box's own faces and edges tell how sure it is, and refine it.

Source: Zhang et al., "H3DNet: 3D Object Detection Using Hybrid Geometric Primitives" (2020) and the repository H3DNet.
Inside, the reference's parametrisation is kept (see votenet.py); `predictions` and `decode` speak the contract's frame.

Four backbones ("towers") read the same point pyramid and their seeds' features are joined; the published variant with one
tower has wider feature propagations instead.

Taps: "seeds" (joined features), "votes" and "clusters" (of the object centres: votes for faces and edges aim elsewhere), and
"proposals" (what the last layer of the refinement reads).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vrdistill_jax.detectors import votenet
from vrdistill_jax.detectors.decoding import DecodeConfig, select_detections
from vrdistill_jax.detectors.h3dnet_primitives import (
    KINDS,
    DeepBackbone,
    PrimitiveBranch,
    PrimitiveMatching,
    PrimitiveOutput,
    Refinement,
)
from vrdistill_jax.detectors.h3dnet_targets import loss as loss
from vrdistill_jax.detectors.votenet import HeadOutput, VoteNet, group_channels, split_head
from vrdistill_jax.detectors.votenet import feature_size as feature_size
from vrdistill_jax.detectors.votenet import pyramid_config as pyramid_config
from vrdistill_jax.nn.mlp import Dense, PointMLP, scale_size, torch_default
from vrdistill_jax.nn.norm import MaskedBatchNorm
from vrdistill_jax.nn.pointnet2 import BackboneOutput, PointNet2Backbone, SetAbstraction
from vrdistill_jax.structs import (
    Detections,
    DetectorOutput,
    PointPyramid,
    Points,
    PointSet,
    Predictions,
)

# The published protocol keeps boxes without points. For AP at IoU 0.5 it also suppresses at 0.5 instead of 0.25.
PROTOCOL = DecodeConfig(min_points=0)


class H3DNetRaw(NamedTuple):
    """Everything between cloud and boxes. `votes`, `clusters` and `head` are the initial proposals', as in VoteNetRaw."""

    towers: tuple[BackboneOutput, ...]
    seeds: PointSet  # with joined features
    vote_channels: Array  # f32[B, M, 3 + C] of the votes for object centres
    votes: PointSet
    primitives: dict[str, PrimitiveOutput]  # by h3dnet_primitives.KINDS
    cluster_index: Array  # i32[B, Q]
    clusters: PointSet
    head_channels: Array  # f32[B, Q, 2 + 3 + 2H + 4S + K]
    head: HeadOutput
    refinement: Refinement
    refined_head: HeadOutput


class H3DNet(VoteNet):
    """The network: VoteNet with several backbones, primitives, and a second stage.

    Attributes, besides those of VoteNet:
      oriented: whether boxes are turned. Where they are not, the heading is predicted but not used.
      turn_primitives: whether the faces and edges that are compared with primitives turn with the box.
      num_towers: backbones.
      tower_scale: of the channels of a single tower.
      match_radius: metres around a face or edge in which primitives count.
      match_neighbors: primitives that count.
    """

    oriented: bool = False
    turn_primitives: bool = False
    num_towers: int = 4
    tower_scale: int = 1
    match_radius: float = 0.5
    match_neighbors: int = 32

    def setup(self) -> None:
        """Makes the parameters and layers."""
        if self.num_towers < 1 or self.tower_scale < 1 or (self.num_towers > 1 and self.tower_scale > 1):
            raise ValueError(
                f"num_towers is {self.num_towers} and tower_scale {self.tower_scale}; expected several towers of scale 1, or "
                "one of scale 1, 2, ..."
            )
        wide, narrow = scale_size(256, self.width), scale_size(128, self.width)
        layer = partial(PointMLP, use_bias=True, kernel_init=torch_default, norm=self.norm)
        single = self.num_towers == 1
        size = wide * max(self.tower_scale, 2) if single else wide
        tower = DeepBackbone if single and self.tower_scale == 1 else PointNet2Backbone
        self.towers = [
            tower(
                self.input_size, self.radii, self.width * self.tower_scale, norm=self.norm, name=f"tower{n}"
            )
            for n in range(self.num_towers)
        ]
        self.joining = None if single else layer(wide * self.num_towers, (2 * wide, wide))
        self.voting = layer(size, (size, size))
        self.voting_out = Dense(size, 3 + size)
        self.branches = [
            PrimitiveBranch(
                size, num_sizes, self.num_classes, self.width, self.aggregation_radius, self.aggregation_neighbors,
                self.norm, name=kind,
            )
            for kind, num_sizes in KINDS.items()
        ]  # fmt: skip
        self.aggregation = SetAbstraction(size, (narrow,) * 3, self.aggregation_radius, self.norm)
        self.proposal = layer(narrow, (narrow, narrow))
        channels = 2 + 3 + 2 * self.num_heading_bins + 4 * len(self.mean_sizes) + self.num_classes
        self.proposal_out = Dense(narrow, channels)
        self.matching = PrimitiveMatching(
            channels, self.width, self.match_radius, self.match_neighbors, self.norm
        )

    def __call__(
        self, points: Points, pyramid: PointPyramid, *, train: bool, cluster_index: Array | None = None
    ) -> DetectorOutput:
        """Detects objects.

        Args:
          points: the clouds.
          pyramid: their geometry, built with `pyramid_config`; all towers share it.
          train: batch statistics (written to `batch_stats`) or running ones; also picks the cluster sampling.
          cluster_index: i32[B, Q] rows of the votes to put clusters at; None samples them.

        Returns:
          DetectorOutput with taps "seeds", "votes", "clusters", "proposals" and an H3DNetRaw.
        """
        towers = tuple(tower(points, pyramid, train=train) for tower in self.towers)
        seeds = towers[0].seeds
        if self.joining is not None:
            joined = jnp.concatenate([tower.seeds.features for tower in towers], -1)
            seeds = seeds._replace(features=self.joining(joined, seeds.mask, train=train))
        votes, vote_channels = self._vote(seeds, train)
        primitives = {
            kind: branch(seeds, train=train) for kind, branch in zip(KINDS, self.branches, strict=True)
        }
        return self._detect(towers, seeds, vote_channels, votes, primitives, cluster_index, train)

    def propose_like(self, output: DetectorOutput, other: DetectorOutput, *, train: bool) -> DetectorOutput:
        """Clusters the votes of an earlier pass where another network did, and refines: the second half of the network only.

        Args:
          output: of `__call__` on the same clouds.
          other: of another H3DNet (or VoteNet) on the same clouds.
          train: as in `__call__`; the statistics that it writes are those of this pass.
        """
        raw = output.raw
        return self._detect(
            raw.towers,
            raw.seeds,
            raw.vote_channels,
            raw.votes,
            raw.primitives,
            other.raw.cluster_index,
            train,
        )

    def _detect(
        self, towers, seeds, vote_channels, votes, primitives, cluster_index, train
    ) -> DetectorOutput:
        clusters, cluster_index = self._cluster(seeds, votes, cluster_index, train)
        split = partial(
            split_head,
            base=clusters.xyz,
            num_heading_bins=self.num_heading_bins,
            num_sizes=len(self.mean_sizes),
        )
        head_channels = self.proposal_out(self.proposal(clusters.features, clusters.mask, train=train))
        head = split(head_channels)
        initial = self._predict(head, clusters.mask)
        size, yaw = jax.lax.stop_gradient((initial.size, initial.yaw))
        yaw = yaw if self.turn_primitives else jnp.zeros_like(yaw)
        refinement = self.matching(clusters, initial.center, size, yaw, primitives, train=train)
        refined_head = split(refinement.channels)

        predictions = self._predict(final_head(head, refined_head, self.oriented), clusters.mask)
        proposals = clusters._replace(features=refinement.hidden)
        taps = {"seeds": seeds, "votes": votes, "clusters": clusters, "proposals": proposals}
        raw = H3DNetRaw(
            towers, seeds, vote_channels, votes, primitives, cluster_index, clusters, head_channels, head, refinement,
            refined_head,
        )  # fmt: skip
        return DetectorOutput(predictions, taps, raw, self._group(head_channels, refinement.channels))

    def _predict(self, head: HeadOutput, mask: Bool[Array, "b q"]) -> Predictions:
        if not self.oriented:  # one bin stands for no heading
            head = head._replace(
                heading_logits=head.heading_logits[..., :1], heading_residual=head.heading_residual[..., :1]
            )
        return votenet.predictions_from_head(head, mask, self.mean_sizes)

    def _group(self, initial: Float[Array, "b q c"], refined: Float[Array, "b q c"]) -> dict[str, Array]:
        """The channels that the final boxes are made of."""
        bins, sizes = self.num_heading_bins, len(self.mean_sizes)
        first, second = (group_channels(channels, bins, sizes) for channels in (initial, refined))
        heading = second["heading"] if self.oriented else first["heading"]
        return second | {
            "heading": jnp.concatenate([first["heading"][..., :bins], heading[..., bins:]], -1),
            "size": jnp.concatenate([first["size"][..., :sizes], second["size"][..., sizes:]], -1),
            "class": first["class"],
        }


def final_head(initial: HeadOutput, refined: HeadOutput, oriented: bool) -> HeadOutput:
    """What the final boxes are made of: classes of all sorts are the initial proposal's, numbers and objectness the refined
    one's.

    Source: H3DNet, models/ap_helper.py with opt_ang for turned boxes, without opt_sem.
    """  # noqa: D205
    return refined._replace(
        heading_logits=initial.heading_logits,
        heading_residual=refined.heading_residual if oriented else initial.heading_residual,
        size_logits=initial.size_logits,
        class_logits=initial.class_logits,
    )


def default_config(class_names, mean_sizes, oriented: bool) -> ConfigDict:
    """The published architecture as `config.detector`.

    Args:
      class_names: K names.
      mean_sizes: K rows (length, width, height) in metres.
      oriented: whether boxes are turned (SUN RGB-D's recipe) or axis-aligned (ScanNet's, which predicts 24 heading bins all
        the same).

    Returns:
      VoteNet's ConfigDict with the attributes of H3DNet, and
        primitives: when a point lies on a face or edge, see h3dnet_targets; the numbers of points are meant for clouds of
          40,000 points,
        reference_match_labels: True reproduces the reference's mix-up of proposals in the labels of the class matching.
    """
    config = votenet.default_config(class_names, mean_sizes, oriented)
    config.name = "h3dnet"
    config.num_heading_bins = 12 if oriented else 24
    config.oriented = config.turn_primitives = oriented
    config.num_towers = 4
    config.tower_scale = 1
    config.match_radius = 0.5
    config.match_neighbors = 32
    config.primitives = ConfigDict()
    config.primitives.face_distance = 0.1 if oriented else 0.2  # metres
    config.primitives.face_points = 50 if oriented else 100
    config.primitives.face_variance = 5e-3 if oriented else 1e-2  # square metres
    config.primitives.edge_distance = 0.1 if oriented else 0.2  # metres
    config.primitives.edge_points = 10
    config.primitives.edge_of_box = oriented
    config.reference_match_labels = False
    return config


def build(config: Any, norm_axis_name: str | None = None) -> H3DNet:
    """The network that `config.detector` describes; `norm_axis_name` synchronises its batch norm over that device axis."""
    same = ["num_heading_bins", "width", "num_proposals", "cluster_sampling", "cluster_sampling_eval"]
    same += ["aggregation_radius", "aggregation_neighbors", "normalize_votes", "oriented", "turn_primitives"]
    same += ["num_towers", "tower_scale", "match_radius", "match_neighbors"]
    return H3DNet(
        num_classes=len(config.class_names),
        mean_sizes=tuple(tuple(row) for row in config.mean_sizes),
        input_size=feature_size(config.input_features),
        radii=tuple(level[1] for level in config.levels),
        norm=partial(MaskedBatchNorm, epsilon=config.norm_epsilon, axis_name=norm_axis_name),
        **{name: config[name] for name in same},
    )


def decode(
    output: DetectorOutput, points: Points, config: Any, decode_config: DecodeConfig | None = None
) -> Detections:
    """Turns proposals into final boxes by H3DNet's protocol: VoteNet's, but boxes that hold no points stay.

    Args:
      output: of the network, in evaluation mode.
      points: the clouds that it read.
      config: config.detector; not used, predictions are already in the contract's frame.
      decode_config: thresholds; None for PROTOCOL.

    Returns:
      Detections sorted by falling score.

    Differs: published AP at IoU 0.5 is measured with PROTOCOL._replace(nms_iou=0.5); here one set of boxes serves both.
    """
    del config
    return select_detections(output.predictions, points, decode_config or PROTOCOL)
