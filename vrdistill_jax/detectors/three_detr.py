"""3DETR and 3DETR-m: a transformer that detects objects in a point cloud, without votes or anchors.

One set abstraction turns the cloud into tokens; an encoder lets them attend to each other (3DETR-m: to near ones only, with a
second set abstraction after its first layer). Queries, spread over the tokens, attend to them in a decoder, and five small
heads read a box off each query after every decoder layer.

Source: Misra, Girdhar and Joulin, "An End-to-End Transformer Model for 3D Object Detection" (2021) and the repository 3detr.
Inside, the reference's parametrisation is kept (its heading runs from +x towards -y, the negative of our yaw); `predictions`
and `decode` speak the contract's frame.

Taps (no point of this network votes):
  "seeds": the tokens that the decoder reads, features after the projection.
  "queries": the points that queries start from, features after the last decoder layer, normed.
  "clusters" and "proposals": the centres predicted after decoder layer `tap_layer`, with that layer's normed features, which
    all heads read. The offset from query to centre is bounded, but it is what comes nearest to a vote.
Queries depend on the cloud only, so those of teacher and student are the same points, in the same order.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.assigners.hungarian import match_boxes
from vrdistill_jax.detectors.decoding import DecodeConfig, select_detections
from vrdistill_jax.detectors.votenet import feature_size as feature_size
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.geometry.frames import votenet_heading_from_yaw, yaw_from_votenet_heading
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.geometry.iou import box_giou, pairwise_giou
from vrdistill_jax.losses.bins import angle_from_bin, bin_from_angle
from vrdistill_jax.losses.box import huber, squared_distances
from vrdistill_jax.losses.classification import cross_entropy
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.losses.reference_giou import pairwise_reference_giou
from vrdistill_jax.nn.attention import DecoderLayer, EncoderLayer, layer_norm
from vrdistill_jax.nn.heads import DropoutHead
from vrdistill_jax.nn.mlp import Dense, PointMLP, scale_size, torch_default
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.nn.pointnet2 import SetAbstraction
from vrdistill_jax.nn.position import FourierPosition, find_bounds, normalize_coordinates
from vrdistill_jax.structs import (
    Boxes,
    Detections,
    DetectorOutput,
    LevelConfig,
    PointPyramid,
    Points,
    PointSet,
    Predictions,
    PyramidConfig,
    Scene,
)

SIZE, ENCODER_HIDDEN, DECODER_HIDDEN = 256, 128, 256  # channels at width 1
PRE_ENCODER = (64, 128, SIZE)


class HeadOutput(NamedTuple):
    """What the heads say after each of L decoder layers; the reference's parametrisation."""

    class_logits: Array  # f32[L, B, Q, K + 1], the last one is no object
    center: Array  # f32[L, B, Q, 3] metres
    size: Array  # f32[L, B, Q, 3] as a share of the scene's extent, in (0, 1)
    heading_logits: Array  # f32[L, B, Q, H]
    heading_residual: Array  # f32[L, B, Q, H] in units of pi / H


class ThreeDETRRaw(NamedTuple):
    """Everything between cloud and boxes."""

    low: Array  # f32[B, 3] smallest coordinates of the cloud, metres
    high: Array  # f32[B, 3] largest ones
    abstractions: tuple[Array, ...]  # f32[B, M_i, C] after each set abstraction
    encoder: tuple[Array, ...]  # f32[B, M_i, C] after each encoder layer
    memory: PointSet  # tokens after the projection
    memory_position: Array  # f32[B, M, C]
    query_position: Array  # f32[B, Q, C] Fourier code
    query_embedding: Array  # f32[B, Q, C] what the decoder adds to the queries
    queries: PointSet  # features after the last decoder layer
    decoder: Array  # f32[L, B, Q, C] normed output of each decoder layer
    head: HeadOutput


class ThreeDETR(nn.Module):
    """The network.

    Attributes:
      num_classes: K.
      num_heading_bins: H; 1 where boxes are axis-aligned.
      input_size: feature channels of the cloud.
      radii: metres, of the set abstractions; a second one stands after the first encoder layer.
      masking_radii: metres, for each encoder layer how far its tokens see; empty for everywhere.
      width: multiplier of every hidden size (1, 1/2, 1/4).
      encoder_layers: number of them.
      decoder_layers: L.
      num_heads: of every attention; they get narrower with the width.
      encoder_dropout, decoder_dropout, head_dropout: rates in training.
      tap_layer: decoder layer of the tap "clusters", -1 for the last.
      norm: makes the norm layers.
    """

    num_classes: int
    num_heading_bins: int
    input_size: int
    radii: tuple[float, ...]
    masking_radii: tuple[float, ...] = ()
    width: float = 1.0
    encoder_layers: int = 3
    decoder_layers: int = 8
    num_heads: int = 4
    encoder_dropout: float = 0.1
    decoder_dropout: float = 0.1
    head_dropout: float = 0.3
    tap_layer: int = -1
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        if self.masking_radii and len(self.masking_radii) != self.encoder_layers:
            raise ValueError(
                f"masking_radii {self.masking_radii} must name one radius for each of {self.encoder_layers} encoder layers"
            )
        if len(self.radii) not in (1, 2):
            raise ValueError(f"3DETR has one level, 3DETR-m two; the config has {len(self.radii)} levels")
        size = scale_size(SIZE, self.width)
        pre_encoder = tuple(scale_size(c, self.width) for c in PRE_ENCODER)
        encoder_hidden, decoder_hidden = (scale_size(c, self.width) for c in (ENCODER_HIDDEN, DECODER_HIDDEN))
        downsamples = len(self.radii) == 2

        pool = partial(SetAbstraction, norm=self.norm)
        self.pre_encoder = pool(self.input_size, pre_encoder, self.radii[0])
        encode = partial(EncoderLayer, size, self.num_heads, encoder_hidden, self.encoder_dropout)
        self.encoder = [encode() for _ in range(self.encoder_layers)]
        self.downsampling = pool(size, (size,) * 3, self.radii[1]) if downsamples else None
        sizes = (size,) * (2 if downsamples else 3)
        self.projection = PointMLP(size, sizes, kernel_init=torch_default, norm=self.norm)
        self.position = FourierPosition(size)
        self.query_hidden, self.query_out = Dense(size, size), Dense(size, size)
        decode = partial(DecoderLayer, size, self.num_heads, decoder_hidden, self.decoder_dropout)
        self.decoder = [decode() for _ in range(self.decoder_layers)]
        self.decoder_norm = layer_norm()
        head = partial(DropoutHead, size, dropout_rate=self.head_dropout, norm=self.norm)
        self.class_head, self.center_head, self.size_head = head(self.num_classes + 1), head(3), head(3)
        self.heading_head, self.residual_head = head(self.num_heading_bins), head(self.num_heading_bins)

    def __call__(
        self,
        points: Points,
        pyramid: PointPyramid,
        *,
        train: bool,
        attention_masks: tuple[Array, ...] | None = None,
    ) -> DetectorOutput:
        """Detects objects.

        Args:
          points: the clouds.
          pyramid: their geometry, built with `pyramid_config`; its last level holds the queries.
          train: batch statistics (written to `batch_stats`) and dropout, or running statistics.
          attention_masks: bool[B, N, N] for each encoder layer, which token sees which; None goes by `masking_radii`.

        Returns:
          DetectorOutput with a ThreeDETRRaw; `head` holds the last layer's outputs (centre as the offset from the query, size
          as in HeadOutput, objectness as the last class).
        """
        low, high = find_bounds(points.xyz, points.mask)
        abstractions, encoded = self._encode(points, pyramid, attention_masks, train)
        *_, level, at = pyramid.levels
        memory = PointSet(
            level.xyz, self.projection(encoded[-1], level.mask, train=train), level.mask, level.source_index
        )

        memory_position = self.position(normalize_coordinates(level.xyz, low, high))
        query_position = self.position(normalize_coordinates(at.xyz, low, high))
        embedding = jax.nn.relu(self.query_out(jax.nn.relu(self.query_hidden(query_position))))
        content, normed = jnp.zeros_like(embedding), []
        for layer in self.decoder:
            content = layer(content, memory.features, embedding, memory_position, train=train)
            normed.append(self.decoder_norm(content))
        decoded = jnp.stack(normed)

        head = self._predict(decoded, at.xyz, at.mask, train)
        queries = PointSet(at.xyz, decoded[-1], at.mask, at.source_index)
        clusters = queries._replace(xyz=head.center[self.tap_layer], features=decoded[self.tap_layer])
        raw = ThreeDETRRaw(
            low,
            high,
            abstractions,
            encoded,
            memory,
            memory_position,
            query_position,
            embedding,
            queries,
            decoded,
            head,
        )
        taps = {"seeds": memory, "queries": queries, "clusters": clusters, "proposals": clusters}
        predictions = predictions_from_head(head, at.mask, low, high)
        return DetectorOutput(predictions, taps, raw, group_channels(head, at.xyz))

    def propose_like(self, output: DetectorOutput, other: DetectorOutput, *, train: bool) -> DetectorOutput:
        """The same output: the queries of `other`, of the same clouds, are where this network's are."""
        del other, train
        return output

    def _encode(self, points, pyramid, attention_masks, train) -> tuple[tuple, tuple]:
        level = pyramid.levels[0]
        x = self.pre_encoder(points.xyz, points.features, level, train=train)
        abstractions, encoded = [x], []
        for n, layer in enumerate(self.encoder):
            mask = None
            if attention_masks is not None:
                mask = attention_masks[n]
            elif self.masking_radii:
                xyz = jax.lax.stop_gradient(level.xyz)
                mask = squared_distances(xyz, xyz) < self.masking_radii[n] ** 2
            x = layer(x, mask, train=train)
            encoded.append(x)
            if n == 0 and self.downsampling is not None:
                xyz, level = level.xyz, pyramid.levels[1]
                x = self.downsampling(xyz, x, level, train=train)
                abstractions.append(x)
        return tuple(abstractions), tuple(encoded)

    def _predict(self, decoded, query_xyz, mask, train) -> HeadOutput:
        """All layers at once: batch norm takes its statistics over them together."""
        mask = mask[None]
        offset = jax.nn.sigmoid(self.center_head(decoded, mask, train=train)) - 0.5
        return HeadOutput(
            class_logits=self.class_head(decoded, mask, train=train),
            center=query_xyz + offset,
            size=jax.nn.sigmoid(self.size_head(decoded, mask, train=train)),
            heading_logits=self.heading_head(decoded, mask, train=train),
            heading_residual=self.residual_head(decoded, mask, train=train),
        )


def default_config(class_names, mean_sizes, oriented: bool, masked: bool = False) -> ConfigDict:
    """The published architecture as `config.detector`.

    Args:
      class_names: K names.
      mean_sizes: not used: sizes are predicted as a share of the scene's extent.
      oriented: whether boxes are turned (12 heading bins; SUN RGB-D's recipe) or axis-aligned (one; ScanNet's).
      masked: 3DETR-m.

    Returns:
      A ConfigDict; besides the attributes of ThreeDETR it holds
        levels: (centres, radius, neighbours) of each set abstraction,
        num_proposals: Q, the number of queries,
        input_features: of "color" and "height",
        match_cost: weights of what a pair of query and box costs,
        loss_weight: weights of the loss terms (those with weight 0 are not computed),
        no_object_weight: of queries without a box in the class term,
        norm_epsilon: of the batch norms,
        reference_giou: "" for a right GIoU; "torch" and "cython" reproduce the one that the
          reference matches with, see losses.reference_giou.

    The radii of 3DETR-m's masks are those of the published weights: the reference squares 0.4, 0.8 and 1.2 but compares them
    with plain distances.
    """
    del mean_sizes
    config = ConfigDict()
    config.name = "3detr_m" if masked else "3detr"
    config.class_names = tuple(class_names)
    config.num_heading_bins = 12 if oriented else 1
    config.input_features = ()
    config.width = 1.0
    config.num_proposals = 128 if oriented else 256
    config.levels = ((2048, 0.2, 64), (1024, 0.4, 32)) if masked else ((2048, 0.2, 64),)
    config.masking_radii = (0.16, 0.64, 1.44) if masked else ()
    config.encoder_layers = 3
    config.decoder_layers = 8
    config.num_heads = 4
    config.encoder_dropout = 0.3 if masked and not oriented else 0.1
    config.decoder_dropout = 0.1
    config.head_dropout = 0.3
    config.tap_layer = -1
    cost = (1.0, 5.0, 5.0, 3.0) if oriented else (1.0, 0.0, 0.0, 2.0)
    config.match_cost = ConfigDict(dict(zip(("class", "objectness", "center", "giou"), cost, strict=True)))
    config.loss_weight = ConfigDict(
        {"heading_class": 0.1, "heading_residual": 0.5, "center": 5.0, "size": 1.0}
    )
    config.loss_weight["class"] = 0.8 if masked and oriented else 1.0
    config.loss_weight["giou"] = 0.0 if oriented else 1.0
    config.no_object_weight = 0.1 if oriented else 0.25
    config.norm_epsilon = 1e-5
    config.reference_giou = ""
    return config


def build(config: Any, norm_axis_name: str | None = None) -> ThreeDETR:
    """The network that `config.detector` describes; `norm_axis_name` synchronises its batch norm over that device axis."""
    same = ["num_heading_bins", "width", "encoder_layers", "decoder_layers", "num_heads", "tap_layer"]
    same += ["encoder_dropout", "decoder_dropout", "head_dropout"]
    return ThreeDETR(
        num_classes=len(config.class_names),
        input_size=feature_size(config.input_features),
        radii=tuple(level[1] for level in config.levels),
        masking_radii=tuple(config.masking_radii),
        norm=partial(MaskedBatchNorm, epsilon=config.norm_epsilon, axis_name=norm_axis_name),
        **{name: config[name] for name in same},
    )


def pyramid_config(config: Any) -> PyramidConfig:
    """What the loader computes for each cloud: the tokens' levels, then the queries, spread over the last of them."""
    levels = tuple(LevelConfig(*level) for level in config.levels)
    # Nothing is grouped around a query: one neighbour, because a level has at least one.
    return PyramidConfig((*levels, LevelConfig(config.num_proposals, levels[-1].radius, 1)))


def boxes_from_head(head: HeadOutput, low: Float[Array, "b 3"], high: Float[Array, "b 3"]) -> Array:
    """Box rows of every layer with the likeliest heading bin, in the contract's frame: f32[L, B, Q, 7]."""
    num_bins = head.heading_logits.shape[-1]
    heading_bin = jnp.argmax(head.heading_logits, -1)
    residual = _pick(head.heading_residual, heading_bin) * (jnp.pi / num_bins)
    heading = angle_from_bin(heading_bin, residual, num_bins)
    if num_bins == 1:  # axis-aligned data: the reference ignores the heading
        heading = jnp.zeros_like(heading)
    return join_boxes(head.center, head.size * (high - low)[:, None], yaw_from_votenet_heading(heading))


def group_channels(head: HeadOutput, query_xyz: Float[Array, "b q 3"]) -> dict[str, Array]:
    """What the last layer says, by HEAD_GROUPS of the data contract: f32[B, Q, *]."""
    last = HeadOutput(*(values[-1] for values in head))
    heading = jnp.concatenate([last.heading_logits, last.heading_residual], -1)
    groups = {"center": last.center - query_xyz, "heading": heading, "size": last.size}
    return groups | {"class": last.class_logits}


def predictions_from_head(head: HeadOutput, mask, low, high) -> Predictions:
    """The last layer's boxes; objectness is the probability of any class."""
    boxes, logits = boxes_from_head(head, low, high)[-1], head.class_logits[-1]
    objectness = 1 - jax.nn.softmax(logits, -1)[..., -1]
    return Predictions(boxes[..., :3], boxes[..., 3:6], boxes[..., 6], logits[..., :-1], objectness, mask)


def _pick(values: Float[Array, "*b h"], index: Int[Array, "*b"]) -> Array:
    """values[..., index[...]]."""
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def loss(output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None):
    """3DETR's training loss: every decoder layer is matched with the boxes and judged by itself.

    Args:
      output: of the network.
      scene: with boxes.
      config: config.detector.
      axis_name: mapped device axis over which the means are taken, or None.

    Returns:
      (scalar total, dict of scalar terms). Terms hold their config.loss_weight and are summed over the layers; total is their
      sum. "cardinality_error" tells by how many the last layer's queries that claim an object miss the number of boxes.

    Raises:
      ValueError: if the scene has no boxes.
    """
    by_layer = losses_by_layer(output, scene, config, axis_name)
    error = by_layer.pop("cardinality_error")[-1]
    terms = {name: jnp.sum(values) for name, values in by_layer.items()}
    return sum(terms.values(), start=jnp.float32(0)), terms | {"cardinality_error": error}


def losses_by_layer(
    output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None
) -> dict[str, Float[Array, " l"]]:
    """The terms of `loss` for each decoder layer, f32[L].

    Source: 3DETR, criterion.py.
    Differs: across devices the class term is the mean over all queries, not a mean of means; the GIoU is right for every
      heading (config.reference_giou matches as the reference does).
    """
    if scene.boxes is None:
        raise ValueError("the loss needs scene.boxes; this scene has no labels")
    raw, head = output.raw, output.raw.head
    predicted = boxes_from_head(head, raw.low, raw.high)
    boxes = scene.boxes._replace(mask=scene.boxes.mask & scene.mask[:, None])
    real = raw.queries.mask & scene.mask[:, None]
    assigned = assign_boxes(raw, boxes, real, config)
    matched, row = assigned >= 0, jnp.maximum(assigned, 0)
    num_boxes = jnp.sum(boxes.mask, dtype=jnp.float32)
    scale = 1.0
    if axis_name is not None:  # the mean over devices of all results is then that of the whole batch
        scale, num_boxes = jax.lax.psum(1, axis_name), jax.lax.psum(num_boxes, axis_name)

    def target(values):
        return jax.vmap(lambda index: gather_rows(values, index))(row)

    def per_box(values):
        total = jnp.sum(jnp.where(matched, values, 0.0), axis=(1, 2))
        return total * scale / jnp.maximum(num_boxes, scale)

    no_object = head.class_logits.shape[-1] - 1
    label = jnp.where(matched, target(boxes.label), no_object)
    weight = jnp.where(matched, 1.0, config.no_object_weight) * real
    class_loss = cross_entropy(head.class_logits, label)

    extent = (raw.high - raw.low)[:, None]
    num_bins = head.heading_logits.shape[-1]
    heading_bin, residual = bin_from_angle(votenet_heading_from_yaw(boxes.yaw), num_bins)
    bin_target, residual_target = target(heading_bin), target(residual) / (jnp.pi / num_bins)
    terms = {
        "class": lambda: jax.vmap(partial(masked_mean, axis_name=axis_name))(class_loss, weight),
        "heading_class": lambda: per_box(cross_entropy(head.heading_logits, bin_target)),
        "heading_residual": lambda: per_box(
            huber(_pick(head.heading_residual, bin_target) - residual_target)
        ),
        "center": lambda: per_box(_l1((head.center - target(boxes.center)) / extent)),
        "size": lambda: per_box(_l1(head.size - target(boxes.size) / extent)),
        "giou": lambda: per_box(1 - box_giou(predicted, target(_rows(boxes)), rotated=num_bins > 1)),
    }
    weighted = {name: factor * terms[name]() for name, factor in config.loss_weight.items() if factor}
    claims = jnp.sum((jnp.argmax(head.class_logits, -1) != no_object) & real, axis=-1)
    off = jnp.abs(claims - jnp.sum(boxes.mask, axis=-1)).astype(jnp.float32)
    return weighted | {
        "cardinality_error": jax.vmap(lambda x: masked_mean(x, scene.mask, axis_name))(off),
    }


def assign_boxes(
    raw: ThreeDETRRaw, boxes: Boxes, query_mask: Bool[Array, "b q"], config: Any
) -> Int[Array, "l b q"]:
    """Matches queries and boxes one to one, for each layer by itself.

    Args:
      raw: of the network.
      boxes: ground truth.
      query_mask: bool[B, Q].
      config: config.detector, of which match_cost and reference_giou are read.

    Returns:
      i32[L, B, Q] rows of `boxes`, -1 none.
    """
    raw = jax.lax.stop_gradient(raw)
    head, cost = raw.head, config.match_cost
    probability = jax.nn.softmax(head.class_logits, -1)
    label = jnp.broadcast_to(
        jnp.maximum(boxes.label, 0)[None, :, None], (*probability.shape[:-1], boxes.label.shape[1])
    )
    offset = head.center[..., :, None, :] - boxes.center[None, :, None]
    total = (
        -cost["class"] * jnp.take_along_axis(probability, label, axis=-1)
        - cost["objectness"] * (1 - probability[..., -1:])
        + cost["center"] * _l1(offset / (raw.high - raw.low)[:, None, None])
        - cost["giou"] * match_giou(raw, boxes, config)
    )
    query_mask, box_mask = (jnp.broadcast_to(m, (len(total), *m.shape)) for m in (query_mask, boxes.mask))
    return match_boxes(total, query_mask, box_mask)


def match_giou(raw: ThreeDETRRaw, boxes: Boxes, config: Any) -> Float[Array, "l b q g"]:
    """GIoU of every predicted box with every box of its scene, as matching sees it (config.reference_giou)."""
    predicted, rows = boxes_from_head(raw.head, raw.low, raw.high), _rows(boxes)[None]
    if config.reference_giou and config.num_heading_bins > 1:
        return pairwise_reference_giou(predicted, rows, config.reference_giou)
    return pairwise_giou(predicted, rows, rotated=config.num_heading_bins > 1)


def _rows(boxes: Boxes) -> Array:
    return join_boxes(boxes.center, boxes.size, boxes.yaw)


def _l1(x: Float[Array, "*n 3"]) -> Array:
    return jnp.sum(jnp.abs(x), axis=-1)


def decode(
    output: DetectorOutput, points: Points, config: Any, decode_config: DecodeConfig | None = None
) -> Detections:
    """Turns queries into final boxes by VoteNet's protocol, which the reference follows.

    Args:
      output: of the network, in evaluation mode.
      points: the clouds that it read (boxes that hold next to none of them are dropped).
      config: config.detector; not used, predictions are already in the contract's frame.
      decode_config: thresholds; None for the evaluation protocol.

    Returns:
      Detections sorted by falling score.

    Source: 3DETR, utils/ap_calculator.py.
    Differs: of a scene whose boxes are all empty the reference keeps the surest one; here none is left, unless
      decode_config.keep_surest is set.
    """
    predictions, decode_config = output.predictions, decode_config or DecodeConfig()
    if decode_config.per_class:
        # A class's score there is (1 - p_none) p_class with p_class = (1 - p_none) q_class: q, the softmax without "no
        # object", has to be multiplied by objectness squared, and the threshold is squared to fit.
        predictions = predictions._replace(objectness=jnp.square(predictions.objectness))
        decode_config = decode_config._replace(score_threshold=math.pow(decode_config.score_threshold, 2))
    return select_detections(predictions, points, decode_config)
