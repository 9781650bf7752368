"""Group-Free-3D: object candidates that attend to all seeds instead of pooling a hand-made group of them.

Seeds of a PointNet++ backbone are judged by how near to the middle of an object they lie, and the best become queries. A
proposal head reads a first box off each. A decoder then lets queries attend to each other and to all seeds, and after every
layer a head of its own reads a box, which is the positional code of the queries in the next layer.

Source: Liu et al., "Group-Free 3D Object Detection via Transformers" (2021) and the repository Group-Free-3D.
Inside, the reference's parametrisation is kept (its heading runs from +x towards -y, the negative of our yaw; turned boxes
have sizes in metres, axis-aligned ones a class and a residual); `predictions` and `decode` speak the contract's frame.

Taps (no point of this network votes):
  "seeds": what the backbone puts out.
  "queries": the seeds that became queries, with their features.
  "clusters": the centres that the proposal head predicts, with the features of the seeds that it predicts them from: a seed
    and a regressed offset, as a vote is. `tap_layer` n > 0 offers the centres and features after decoder layer n instead
    (-1 for the last).
  "proposals": the same points, with the features that the last layer of the last head reads.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.detectors.decoding import DecodeConfig, select_detections
from vrdistill_jax.detectors.groupfree3d_head import (
    HeadOutput,
    PredictionHead,
    group_channels,
    merge_heads,
    pick_entries,
    predictions_from_head,
)
from vrdistill_jax.detectors.votenet import feature_size as feature_size
from vrdistill_jax.detectors.votenet import pyramid_config as pyramid_config
from vrdistill_jax.geometry.boxes import axis_aligned_boxes, join_boxes
from vrdistill_jax.geometry.frames import votenet_heading_from_yaw
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.geometry.sampling import sample_farthest_points
from vrdistill_jax.losses.bins import bin_from_angle
from vrdistill_jax.losses.box import huber
from vrdistill_jax.losses.classification import cross_entropy, focal_loss
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.nn.attention import DecoderLayer
from vrdistill_jax.nn.mlp import Dense, PointMLP, scale_size, torch_default
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.nn.pointnet2 import BackboneOutput, PointNet2Backbone
from vrdistill_jax.nn.position import LearnedPosition
from vrdistill_jax.structs import (
    Boxes,
    Detections,
    DetectorOutput,
    PointPyramid,
    Points,
    PointSet,
    Scene,
)

SIZE, FEED_FORWARD = 288, 2048  # channels at width 1
SAMPLINGS = ("kps", "fps")
# Which of the first seeds the reference prefers among equally far ones: std::partial_sort's, with four picks, on a CPU.
TIE_ORDER = (1, 3, 0, 2)
NOT_ON_OBJECT = (
    100.0  # the reference's distance from a box to seeds that do not lie on its object, in sizes of the box
)


class GroupFree3DRaw(NamedTuple):
    """Everything between cloud and boxes."""

    backbone: BackboneOutput
    seed_logit: (
        Array | None
    )  # f32[B, M] that a seed is near the middle of an object; None where "fps" samples
    query_index: Array  # i32[B, Q] rows of the seeds
    queries: PointSet
    query_projection: Array  # f32[B, Q, C] content of the queries before the decoder
    seed_projection: Array  # f32[B, M, C] what they attend to
    query_positions: Array  # f32[L, B, Q, C] positional codes before each decoder layer
    seed_positions: Array  # f32[L, B, M, C]
    decoder: Array  # f32[L, B, Q, C] output of each decoder layer
    head: HeadOutput  # of all heads, stacked


class GroupFree3D(nn.Module):
    """The network.

    Attributes:
      num_classes: K.
      num_heading_bins: H; 1 where boxes are axis-aligned.
      mean_sizes: S rows (length, width, height) in metres, or none to predict sizes in metres whatever the class.
      input_size: feature channels of the cloud.
      radii: metres, of the four set abstractions.
      width: multiplier of every hidden size (1, 1/2, 1/4).
      backbone_width: further multiplier of the backbone's hidden sizes; the seeds keep theirs (2 in the published w2x).
      num_proposals: Q.
      decoder_layers: L.
      num_heads: of every attention; they get narrower with the width.
      dropout: rate in the decoder, in training.
      sampling: "kps" takes the seeds that the network judges best as queries, "fps" spreads them.
      tap_layer: decoder layer of the tap "clusters", 0 for the proposal head, -1 for the last.
      norm: makes the norm layers.
    """

    num_classes: int
    num_heading_bins: int
    mean_sizes: tuple[tuple[float, float, float], ...]
    input_size: int
    radii: tuple[float, ...]
    width: float = 1.0
    backbone_width: float = 1.0
    num_proposals: int = 256
    decoder_layers: int = 6
    num_heads: int = 8
    dropout: float = 0.1
    sampling: str = "kps"
    tap_layer: int = 0
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be {' or '.join(SAMPLINGS)}, got {self.sampling!r}")
        if self.decoder_layers < 1 or not -1 <= self.tap_layer <= self.decoder_layers:
            raise ValueError(
                f"decoder_layers={self.decoder_layers} must be at least 1 and tap_layer={self.tap_layer} "
                "one of them, 0 (proposal head) or -1 (the last)"
            )
        size, norm = scale_size(SIZE, self.width), self.norm
        # Its width scales the seeds' channels too: they are given as what becomes SIZE at width 1.
        of_seeds = scale_size(SIZE, 1 / self.backbone_width)
        self.backbone = PointNet2Backbone(
            self.input_size, self.radii, self.width * self.backbone_width, of_seeds, norm
        )
        if self.sampling == "kps":
            self.seed_mlp = PointMLP(size, (size, size), True, torch_default, norm)
            self.seed_out = Dense(size, 1)
        bins, every = self.num_heading_bins, range(self.decoder_layers)
        head = partial(PredictionHead, size, self.num_classes, bins, self.mean_sizes, norm)
        self.proposal_head = head()
        self.prediction_heads = [head() for _ in every]
        self.decoder_query_projection, self.decoder_seed_projection = Dense(size, size), Dense(size, size)
        self.decoder_query_position = [LearnedPosition(6, size, norm) for _ in every]
        self.decoder_seed_position = [LearnedPosition(3, size, norm) for _ in every]
        hidden = scale_size(FEED_FORWARD, self.width)
        self.decoder = [
            DecoderLayer(size, self.num_heads, hidden, self.dropout, norm_first=False, position_in_value=True)
            for _ in every
        ]

    def __call__(
        self, points: Points, pyramid: PointPyramid, *, train: bool, query_index: Array | None = None
    ) -> DetectorOutput:
        """Detects objects.

        Args:
          points: the clouds.
          pyramid: their geometry, built with `pyramid_config`.
          train: batch statistics (written to `batch_stats`) and dropout, or running statistics.
          query_index: i32[B, Q] rows of the seeds to take as queries; None samples them.

        Returns:
          DetectorOutput with a GroupFree3DRaw; `predictions` and `head` are those of the last head (centre as the offset from
          the query).
        """
        backbone, seed_logit = self.backbone(points, pyramid, train=train), None
        seeds = backbone.seeds
        if self.sampling == "kps":
            seed_logit = self.seed_out(self.seed_mlp(seeds.features, seeds.mask, train=train))[..., 0]
        if query_index is None:
            query_index = sample_queries(seeds, seed_logit, self.num_proposals)
        return self._propose(backbone, seed_logit, query_index, train)

    def propose_like(self, output: DetectorOutput, other: DetectorOutput, *, train: bool) -> DetectorOutput:
        """Starts from the seeds that another network took as queries: all but the backbone once more.

        Args:
          output: of `__call__` on the same clouds.
          other: of another Group-Free network on the same clouds.
          train: as in `__call__`; the statistics that it writes are those of this pass.
        """
        return self._propose(output.raw.backbone, output.raw.seed_logit, other.raw.query_index, train)

    def _propose(self, backbone, seed_logit, query_index, train) -> DetectorOutput:
        seeds = backbone.seeds
        queries = PointSet(*(gather_rows(x, query_index) for x in seeds))
        start = self.decoder_query_projection(queries.features)
        memory = self.decoder_seed_projection(seeds.features)
        head, hidden = self.proposal_head(queries.features, queries.xyz, queries.mask, train=train)
        content, heads, steps = start, [head], []
        for n, layer in enumerate(self.decoder):
            box = jax.lax.stop_gradient(jnp.concatenate([head.center, head.size], -1))
            at = self.decoder_query_position[n](box, queries.mask, train=train)
            seeds_at = self.decoder_seed_position[n](seeds.xyz, seeds.mask, train=train)
            content = layer(content, memory, at, seeds_at, train=train)
            head, hidden = self.prediction_heads[n](content, queries.xyz, queries.mask, train=train)
            heads.append(head)
            steps.append((at, seeds_at, content))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *heads)
        positions, seed_positions, decoded = (jnp.stack(x) for x in zip(*steps, strict=True))

        features = decoded[self.tap_layer - 1] if self.tap_layer > 0 else decoded[-1]
        clusters = queries._replace(
            xyz=stacked.center[self.tap_layer], features=features if self.tap_layer else queries.features
        )
        raw = GroupFree3DRaw(
            backbone,
            seed_logit,
            query_index,
            queries,
            start,
            memory,
            positions,
            seed_positions,
            decoded,
            stacked,
        )
        taps = {"seeds": seeds, "queries": queries, "clusters": clusters}
        taps["proposals"] = clusters._replace(features=hidden)
        predictions = predictions_from_head(head, queries.mask)
        return DetectorOutput(predictions, taps, raw, group_channels(head, queries.xyz))


def sample_queries(
    seeds: PointSet, seed_logit: Float[Array, "b m"] | None, num_queries: int
) -> Int[Array, "b q"]:
    """Picks the seeds that become queries.

    Args:
      seeds: of the backbone.
      seed_logit: f32[B, M] to pick the highest of, falling; None spreads the queries by farthest point sampling.
      num_queries: Q.

    Returns:
      i32[B, Q] rows of the seeds.

    Raises:
      ValueError: if there are fewer seeds than queries.

    Differs: the reference ranks sigmoids, among which high logits tie.
    """
    count = seeds.mask.shape[1]
    if num_queries > count:
        raise ValueError(
            f"{num_queries} proposals cannot be sampled from {count} seeds; lower num_proposals or raise the centres of "
            "the second level"
        )
    if seed_logit is None:
        return jax.vmap(lambda xyz, mask: sample_farthest_points(xyz, num_queries, mask))(
            jax.lax.stop_gradient(seeds.xyz), seeds.mask
        )
    score = jnp.where(seeds.mask, jax.lax.stop_gradient(seed_logit), -jnp.inf)
    return jax.lax.top_k(score, num_queries)[1].astype(jnp.int32)


def default_config(class_names, mean_sizes, oriented: bool) -> ConfigDict:
    """The published architecture with six decoder layers and 256 proposals (L6, O256) as `config.detector`.

    The larger published ones: decoder_layers=12 (L12), backbone_width=2 (w2x), num_proposals=512 (O512).

    Args:
      class_names: K names.
      mean_sizes: K rows (length, width, height) in metres.
      oriented: whether boxes are turned (12 heading bins, sizes in metres; SUN RGB-D's recipe) or axis-aligned (one bin,
        sizes by class; ScanNet's).

    Returns:
      A ConfigDict; besides the attributes of GroupFree3D it holds
        levels: (centres, radius, neighbours) of each set abstraction,
        input_features: of "color" and "height",
        size_by_class: whether a size is a class and a residual, or three numbers in metres,
        merged_heads: whose boxes `decode` joins before suppression: "proposal", "last", "last_three" or "all",
        loss_weight: weights of the loss terms,
        center_delta, heading_delta, size_delta: where smooth L1 turns from a parabola to a line, in metres, in units of half a
          bin, and in metres or (by class) shares of the mean size,
        query_positives: how many seeds of an object are to become queries,
        norm_epsilon: of the batch norms,
        reference_sizes: True learns the axis-aligned extents of turned boxes instead of their sizes, as the reference does,
        reference_query_positives: True also asks for seeds of other objects where one has fewer than `query_positives`.
    """
    config = ConfigDict()
    config.name = "groupfree3d"
    config.class_names = tuple(class_names)
    config.mean_sizes = tuple(tuple(float(x) for x in row) for row in mean_sizes)
    config.num_heading_bins = 12 if oriented else 1
    config.input_features = ()
    config.width = config.backbone_width = 1.0
    config.num_proposals = 256
    config.levels = ((2048, 0.2, 64), (1024, 0.4, 32), (512, 0.8, 16), (256, 1.2, 16))
    config.decoder_layers = 6
    config.num_heads = 8
    config.dropout = 0.1
    config.sampling = "kps"
    config.tap_layer = 0
    config.size_by_class = not oriented
    config.merged_heads = "all" if oriented else "last_three"
    config.loss_weight = ConfigDict(
        {"center": 1.0, "heading_class": 0.1, "heading_residual": 1.0, "size": 1.0}
    )
    config.loss_weight.update({"size_class": 0.1, "class": 0.1})
    config.loss_weight.update(
        {"query_points": 0.2, "objectness": 0.4} if oriented else {"query_points": 0.8, "objectness": 0.1}
    )
    config.center_delta = 1 / 9 if oriented else 0.04
    config.heading_delta = 0.04 if oriented else 1.0
    config.size_delta = 0.0625 if oriented else 1 / 9
    config.query_positives = 4
    config.norm_epsilon = 1e-5
    config.reference_sizes = config.reference_query_positives = False
    return config


def build(config: Any, norm_axis_name: str | None = None) -> GroupFree3D:
    """The network that `config.detector` describes; `norm_axis_name` synchronises its batch norm over that device axis."""
    same = ["num_heading_bins", "width", "backbone_width", "num_proposals", "decoder_layers", "num_heads"]
    same += ["dropout", "sampling", "tap_layer"]
    sizes = tuple(tuple(row) for row in config.mean_sizes) if config.size_by_class else ()
    return GroupFree3D(
        num_classes=len(config.class_names),
        mean_sizes=sizes,
        input_size=feature_size(config.input_features),
        radii=tuple(level[1] for level in config.levels),
        norm=partial(MaskedBatchNorm, epsilon=config.norm_epsilon, axis_name=norm_axis_name),
        **{name: config[name] for name in same},
    )


def loss(output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None):
    """Group-Free's training loss.

    Args:
      output: of the network.
      scene: with boxes and point_instance.
      config: config.detector.
      axis_name: mapped device axis over which the means are taken, or None.

    Returns:
      (scalar total, dict of scalar terms). Terms are means over the heads, without weights; total is 10 times their sum,
      weighted by config.loss_weight.

    Raises:
      ValueError: if the scene has no boxes.
    """
    by_head, measures = losses_by_head(output, scene, config, axis_name)
    terms = {name: jnp.mean(values) for name, values in by_head.items()}
    total = 10.0 * sum(config.loss_weight[name] * value for name, value in terms.items())
    return total, terms | measures


def losses_by_head(
    output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The terms of `loss`, f32[L + 1] for each head ("query_points", which judges seeds, f32[1]), and what is only measured.

    Every head has the same targets: a query belongs to the object that its seed lies on.

    Source: Group-Free-3D, models/loss_helper.py.
    Differs: sizes of turned boxes are theirs, see config.reference_sizes; an object with too few seeds asks for no others,
      see config.reference_query_positives.
    """
    if scene.boxes is None or scene.point_instance is None:
        raise ValueError("the loss needs scene.boxes and scene.point_instance; this scene has no labels")
    raw, head, boxes = output.raw, output.raw.head, scene.boxes
    sizes = boxes.size
    if config.reference_sizes:
        sizes = axis_aligned_boxes(join_boxes(boxes.center, sizes, boxes.yaw))[..., 3:6]
    row, on_object = assign_seeds(raw.backbone.seeds, scene.point_instance, boxes)
    assigned, positive = gather_rows(row, raw.query_index), gather_rows(on_object, raw.query_index)
    valid = raw.queries.mask & scene.mask[:, None]
    positive &= valid

    def mean(values, mask):  # of each head
        return jax.vmap(lambda one: masked_mean(one, mask, axis_name))(values)

    def target(values):  # of each query, for every head
        wanted = gather_rows(values, assigned)
        return jnp.broadcast_to(wanted, (head.center.shape[0], *wanted.shape))

    is_object = jnp.broadcast_to(jnp.where(positive, 0, -1), head.objectness_logit.shape)
    num_bins = head.heading_logits.shape[-1]
    heading_bin, residual = bin_from_angle(votenet_heading_from_yaw(boxes.yaw), num_bins)
    bin_target, residual_target = target(heading_bin), target(residual) / (jnp.pi / num_bins)
    label = target(jnp.maximum(boxes.label, 0))
    off_center = huber(head.center - target(boxes.center), config.center_delta) / config.center_delta
    off_heading = pick_entries(head.heading_residual, bin_target) - residual_target
    off_size = head.size - target(sizes)
    by_head = {}
    if head.size_logits is not None:
        mean_size = jnp.asarray(config.mean_sizes, jnp.float32)[label]
        own_residual = pick_entries(head.size_residual, label[..., None], axis=-2)
        off_size = own_residual - (target(sizes) / mean_size - 1)
        by_head["size_class"] = mean(cross_entropy(head.size_logits, label), positive)
    by_head |= {
        "objectness": mean(focal_loss(head.objectness_logit[..., None], is_object)[..., 0], valid),
        "center": mean(jnp.sum(off_center, -1), positive),
        "heading_class": mean(cross_entropy(head.heading_logits, bin_target), positive),
        "heading_residual": mean(huber(off_heading, config.heading_delta), positive),
        "size": mean(jnp.sum(huber(off_size, config.size_delta), -1), positive),
        "class": mean(cross_entropy(head.class_logits, label), positive),
    }
    count_as = partial(masked_mean, axis_name=axis_name)
    measures = {"positive_share": count_as(positive.astype(jnp.float32), valid)}
    if raw.seed_logit is not None:
        wanted = pick_central_seeds(raw.backbone.seeds, row, on_object, boxes, sizes, config)
        judged = raw.backbone.seeds.mask & scene.mask[:, None]
        focal = focal_loss(raw.seed_logit[..., None], jnp.where(wanted, 0, -1))[..., 0]
        by_head["query_points"] = mean(focal[None], judged)
        measures["query_point_share"] = count_as(wanted.astype(jnp.float32), judged)
    return by_head, measures


def assign_seeds(
    seeds: PointSet, point_instance: Int[Array, "b n v"], boxes: Boxes
) -> tuple[Int[Array, "b m"], Bool[Array, "b m"]]:
    """The object that each seed lies on; of several boxes that hold it, the one with the nearest centre.

    Returns:
      (i32[B, M] rows of `boxes`, 0 for seeds on none, bool[B, M] whether the seed lies on an object).
    """
    instance = gather_rows(point_instance, seeds.seed_index)
    row = jnp.maximum(instance, 0)
    holds = (instance >= 0) & gather_rows(boxes.mask, row) & seeds.mask[..., None]
    distance = jnp.sum(jnp.square(gather_rows(boxes.center, row) - seeds.xyz[:, :, None]), -1)
    nearest = jnp.argmin(jnp.where(holds, distance, jnp.inf), -1)
    return pick_entries(row, nearest), jnp.any(holds, -1)


def pick_central_seeds(
    seeds: PointSet,
    row: Int[Array, "b m"],
    on_object: Bool[Array, "b m"],
    boxes: Boxes,
    sizes: Array,
    config: Any,
) -> Bool[Array, "b m"]:
    """Which seeds are to become queries: of each object the `query_positives` nearest to its centre, in units of its size.

    Args:
      seeds: of the backbone.
      row: i32[B, M] rows of `boxes`.
      on_object: bool[B, M] which seeds lie on an object.
      boxes: ground truth.
      sizes: f32[B, G, 3] metres.
      config: config.detector.

    Source: Group-Free-3D, compute_points_obj_cls_loss_hard_topk.
    """
    offset = (seeds.xyz[:, None] - boxes.center[:, :, None]) / (sizes[:, :, None] + 1e-6)
    distance = jnp.sqrt(jnp.sum(jnp.square(offset), -1) + 1e-6)
    count = boxes.mask.shape[1]
    own = on_object[:, None] & (row[:, None] == jnp.arange(count)[:, None])  # bool[B, G, M]
    distance = jnp.where(own, distance, NOT_ON_OBJECT)
    order = jnp.arange(distance.shape[-1])
    if config.reference_query_positives:  # ties go by `order`
        order = jnp.concatenate([jnp.asarray(TIE_ORDER), order[len(TIE_ORDER) :]])
    _, index = jax.lax.top_k(-distance[..., order], min(config.query_positives, len(order)))
    index = order[index]
    asked = jnp.broadcast_to(boxes.mask[..., None], index.shape)
    if not config.reference_query_positives:
        asked &= jnp.take_along_axis(own, index, axis=-1)
    batch = jnp.arange(len(index))[:, None, None]
    chosen = jnp.zeros(on_object.shape, bool).at[batch, index].max(asked)
    return chosen & on_object


def decode(
    output: DetectorOutput, points: Points, config: Any, decode_config: DecodeConfig | None = None
) -> Detections:
    """Turns proposals into final boxes by VoteNet's protocol, with those of several heads joined before suppression.

    Args:
      output: of the network, in evaluation mode.
      points: the clouds that it read (boxes that hold next to none of them are dropped).
      config: config.detector, of which merged_heads is read.
      decode_config: thresholds; None for the evaluation protocol, which takes boxes of every score.

    Returns:
      Detections sorted by falling score.

    Source: Group-Free-3D, eval_avg.py.
    """
    merged = merge_heads(output.raw.head, output.raw.queries.mask, config.merged_heads)
    return select_detections(merged, points, decode_config or DecodeConfig(score_threshold=0.0))
