"""The parts of H3DNet that deal with geometric primitives: predicting them, and refining proposals with them.

A primitive is the centre of a face or of an edge of an object's box. There are three kinds, named as in the reference: "z"
(top and bottom faces), "xy" (the four faces at the sides) and "line" (the twelve edges). Every seed says for each kind whether
it lies on such a primitive, and votes for its centre.

Source: Zhang et al., "H3DNet: 3D Object Detection Using Hybrid Geometric Primitives" (2020) and the repository H3DNet.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vrdistill_jax.geometry.neighbors import query_ball
from vrdistill_jax.nn.mlp import Dense, PointMLP, scale_size, torch_default
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.nn.pointnet2 import FeaturePropagation, PointNet2Backbone, SetAbstraction
from vrdistill_jax.structs import PointSet, PyramidLevel

KINDS = {"z": 2, "xy": 1, "line": 0}  # kind -> sizes that it predicts: length and width, height, none
ABSENT = 100.0  # metres: how far a primitive that is not there is moved away on every axis, out of reach of all balls
PRESENT = 0.5  # probability that a primitive must exceed to stay

# Where the centres of faces and edges are, in half sizes along the box's axes, in the reference's order.
FACE_OFFSETS = np.array(
    [[0, 0, 1], [0, 0, -1], [0, 1, 0], [0, -1, 0], [1, 0, 0], [-1, 0, 0]], np.float32
)  # fmt: skip
EDGE_OFFSETS = np.array(
    [
        [1, 0, 1], [-1, 0, 1], [0, 1, 1], [0, -1, 1], [1, 0, -1], [-1, 0, -1], [0, 1, -1], [0, -1, -1],
        [1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0],
    ],
    np.float32,
)  # fmt: skip


class PrimitiveOutput(NamedTuple):
    """What the M seeds say about one kind of primitive."""

    flag_logits: Array  # f32[B, M, 2] (not there, there)
    votes: PointSet  # where the seeds vote, with features of unit length
    features: Array  # f32[B, M, C] of the votes around each vote
    center: Array  # f32[B, M, 3] metres
    size: Array  # f32[B, M, D] metres, D as in KINDS
    class_logits: Array  # f32[B, M, K] of the object that it belongs to


class Refinement(NamedTuple):
    """What comparing proposals with primitives gives."""

    face_centers: Array  # f32[B, 6, Q, 3] of the initial boxes, metres
    edge_centers: Array  # f32[B, 12, Q, 3]
    face_features: Array  # f32[B, 6, Q, C] of the primitives around them
    edge_features: Array  # f32[B, 12, Q, C]
    match_logits: Array  # f32[B, 18, Q, 2] whether the face or edge has a primitive, faces first
    class_match_logits: Array  # f32[B, 18, Q, 2] whether that is of the object's class as well
    hidden: Array  # f32[B, Q, C] what the last layer reads
    channels: Array  # f32[B, Q, *] the refined proposal, laid out as the initial one


def face_centers(
    center: Float[Array, "b q 3"], size: Float[Array, "b q 3"], yaw: Float[Array, "b q"]
) -> Float[Array, "b 6 q 3"]:
    """Centres of the faces of boxes.

    Args:
      center: f32[B, Q, 3] metres.
      size: f32[B, Q, 3] metres, full extents.
      yaw: f32[B, Q] radians.

    Returns:
      f32[B, 6, Q, 3] metres; upper, lower, then the faces on the box's +y, -y, +x and -x sides.
    """
    return _offset_centers(center, size, yaw, FACE_OFFSETS)


def edge_centers(
    center: Float[Array, "b q 3"], size: Float[Array, "b q 3"], yaw: Float[Array, "b q"]
) -> Float[Array, "b 12 q 3"]:
    """Centres of the edges of boxes, in the order of EDGE_OFFSETS; arguments as in `face_centers`."""
    return _offset_centers(center, size, yaw, EDGE_OFFSETS)


def _offset_centers(center, size, yaw, offsets: np.ndarray) -> Array:
    x, y, z = jnp.moveaxis(size[:, None] / 2 * offsets[:, None], -1, 0)
    cos, sin = jnp.cos(yaw)[:, None], jnp.sin(yaw)[:, None]
    return center[:, None] + jnp.stack([cos * x - sin * y, sin * x + cos * y, z], axis=-1)


def group_around(
    center: Float[Array, "b m 3"],
    mask: Bool[Array, "b m"],
    source_index: Int[Array, "b m"],
    xyz: Float[Array, "b n 3"],
    xyz_mask: Bool[Array, "b n"],
    radius: float,
    count: int,
) -> PyramidLevel:
    """The level of a set abstraction whose geometry the network has made itself; no gradient through the choice.

    Args:
      center: f32[B, M, 3] metres.
      mask: bool[B, M].
      source_index: i32[B, M] rows of the cloud.
      xyz: f32[B, N, 3] points to group, metres.
      xyz_mask: bool[B, N].
      radius: metres.
      count: neighbours of each centre.

    Returns:
      A PyramidLevel; its `index` means nothing.
    """
    neighbors = jax.vmap(lambda at, points, valid: query_ball(at, points, radius, count, valid))(
        *jax.lax.stop_gradient((center, xyz, xyz_mask))
    )
    return PyramidLevel(center, mask, source_index, source_index, neighbors)


class DeepBackbone(PointNet2Backbone):
    """The backbone of the variant with a single tower: both feature propagations have twice the channels.

    Source: H3DNet, models/backbone_module_scale.py with scale 1.
    """

    def setup(self) -> None:
        """Makes the parameters and layers."""

        def sizes(*channels):
            return tuple(scale_size(c, self.width) for c in channels)

        mlps = [sizes(64, 64, 128), *[sizes(128, 128, 256)] * 3]
        inputs = [self.input_size, *[mlp[-1] for mlp in mlps[:-1]]]
        self.abstractions = [
            SetAbstraction(i, mlp, radius, self.norm, name=f"sa{n + 1}")
            for n, (i, mlp, radius) in enumerate(zip(inputs, mlps, self.radii, strict=True))
        ]
        narrow, wide = sizes(256, 512)
        self.propagations = [
            FeaturePropagation(narrow, narrow, (wide, wide), self.norm, name="fp1"),
            FeaturePropagation(wide, narrow, (wide, wide), self.norm, name="fp2"),
        ]


class PrimitiveBranch(nn.Module):
    """Finds the primitives of one kind.

    Attributes:
      seed_size: channels of the seeds.
      num_sizes: sizes that a primitive of this kind has.
      num_classes: K.
      width: multiplier of the hidden sizes.
      radius: metres, of the vote grouping.
      num_neighbors: votes per group.
      norm: makes the norm layers.

    Source: H3DNet, models/proposal_module_surface.py; every vote is the centre of a group, none are sampled.
    """

    seed_size: int
    num_sizes: int
    num_classes: int
    width: float = 1.0
    radius: float = 0.3
    num_neighbors: int = 16
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        narrow = scale_size(128, self.width)
        layer = partial(PointMLP, use_bias=True, kernel_init=torch_default, norm=self.norm)
        self.flag = layer(self.seed_size, (narrow,))
        self.flag_out = Dense(narrow, 2)
        self.voting = layer(self.seed_size, (self.seed_size,) * 2)
        self.voting_out = Dense(self.seed_size, 3 + self.seed_size)
        self.aggregation = SetAbstraction(self.seed_size, (narrow,) * 3, self.radius, self.norm)
        self.hidden = layer(narrow, (narrow, narrow))
        self.out = Dense(narrow, 3 + self.num_sizes + self.num_classes)

    def __call__(self, seeds: PointSet, *, train: bool) -> PrimitiveOutput:
        """Asks every seed."""
        flags = self.flag_out(self.flag(seeds.features, seeds.mask, train=train))
        votes = cast_votes(seeds, self.voting_out(self.voting(seeds.features, seeds.mask, train=train)))
        groups = group_around(
            votes.xyz, votes.mask, votes.seed_index, votes.xyz, votes.mask, self.radius, self.num_neighbors
        )
        features = self.aggregation(votes.xyz, votes.features, groups, train=train)
        channels = self.out(self.hidden(features, votes.mask, train=train))
        offset, size, classes = jnp.split(channels, (3, 3 + self.num_sizes), -1)
        return PrimitiveOutput(flags, votes, features, votes.xyz + offset, size, classes)


def cast_votes(seeds: PointSet, channels: Float[Array, "b m c"]) -> PointSet:
    """Moves seeds by the first three channels, and their features by the others and then to unit length."""
    features = seeds.features + channels[..., 3:]
    # The floor only matters for all-zero features.
    features /= jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(features), -1, keepdims=True), 1e-24))
    return seeds._replace(xyz=seeds.xyz + channels[..., :3], features=features)


def place_primitives(primitive: PrimitiveOutput) -> Float[Array, "b m 3"]:
    """Centres of the primitives, those that are not there moved out of reach (metres)."""
    probability = jax.nn.softmax(jax.lax.stop_gradient(primitive.flag_logits), -1)[..., 1:]
    return primitive.center + jnp.where(probability > PRESENT, 0.0, ABSENT)


class PrimitiveMatching(nn.Module):
    """Gathers the primitives around each face and edge of the initial boxes and refines the proposals with them.

    Attributes:
      num_channels: of a proposal.
      width: multiplier of the hidden sizes.
      radius: metres, of the grouping around a face or edge centre.
      num_neighbors: primitives per group.
      norm: makes the norm layers.

    Source: H3DNet, models/proposal_module_refine.py. Features of the proposals are part of what is grouped there, but no group
      reaches them: what is left of their indicator of face or edge is a zero channel for each.
    """

    num_channels: int
    width: float = 1.0
    radius: float = 0.5
    num_neighbors: int = 32
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        wide, middle, narrow = (scale_size(c, self.width) for c in (128, 64, 32))
        layer = partial(PointMLP, use_bias=True, kernel_init=torch_default, norm=self.norm)
        faces, edges = len(FACE_OFFSETS), len(EDGE_OFFSETS)
        self.face_grouping, self.edge_grouping = (
            SetAbstraction(wide + zeros, (wide, middle, narrow), self.radius, self.norm)
            for zeros in (faces, edges)
        )
        self.match, self.class_match = layer(narrow, (narrow,)), layer(narrow, (narrow,))
        self.match_out, self.class_match_out = Dense(narrow, 2), Dense(narrow, 2)
        self.face_hidden, self.edge_hidden = layer(narrow, (narrow,) * 2), layer(narrow, (narrow,) * 2)
        self.merge = layer(narrow * (faces + edges), (wide,))
        self.hidden = layer(wide, (wide, wide))
        self.out = Dense(wide, self.num_channels)

    def __call__(
        self,
        clusters: PointSet,
        center: Float[Array, "b q 3"],
        size: Float[Array, "b q 3"],
        yaw: Float[Array, "b q"],
        primitives: dict[str, PrimitiveOutput],
        *,
        train: bool,
    ) -> Refinement:
        """Compares the initial boxes (in the contract's frame) with the primitives of each of KINDS."""
        faces, edges = face_centers(center, size, yaw), edge_centers(center, size, yaw)
        sides = self._gather(self.face_grouping, faces, clusters, [primitives["z"], primitives["xy"]], train)
        lines = self._gather(self.edge_grouping, edges, clusters, [primitives["line"]], train)
        both, mask = jnp.concatenate([sides, lines], 1), clusters.mask[:, None]
        match = self.match_out(self.match(both, mask, train=train))
        class_match = self.class_match_out(self.class_match(both, mask, train=train))

        parts = [
            # Channels of a proposal run over the faces of the first channel, of the second, ...
            jnp.moveaxis(part, 1, -1).reshape(*part.shape[:1], part.shape[2], -1)
            for part in (
                self.face_hidden(sides, mask, train=train),
                self.edge_hidden(lines, mask, train=train),
            )
        ]
        merged = self.merge(jnp.concatenate(parts, -1), clusters.mask, train=train) + clusters.features
        hidden = self.hidden(merged, clusters.mask, train=train)
        return Refinement(faces, edges, sides, lines, match, class_match, hidden, self.out(hidden))

    def _gather(self, grouping, centers, clusters: PointSet, primitives: list[PrimitiveOutput], train: bool):
        """Features f32[B, F, Q, C] of the primitives around centers f32[B, F, Q, 3]."""
        batch, count, proposals, _ = centers.shape
        xyz = jnp.concatenate([place_primitives(p) for p in primitives], 1)
        features = jnp.concatenate([p.features for p in primitives], 1)
        features = jnp.concatenate([jnp.zeros((*features.shape[:2], count)), features], -1)
        mask = jnp.concatenate([p.votes.mask for p in primitives], 1)
        groups = group_around(
            centers.reshape(batch, -1, 3),
            jnp.tile(clusters.mask, (1, count)),
            jnp.tile(clusters.seed_index, (1, count)),
            xyz,
            mask,
            self.radius,
            self.num_neighbors,
        )
        return grouping(xyz, features, groups, train=train).reshape(batch, count, proposals, -1)
