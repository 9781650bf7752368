"""TR3D: a sparse convolutional network that predicts a box at every voxel of two levels.

Source: Rukhovich et al., "TR3D: Towards Real-Time Indoor 3D Object Detection" (2023), and the repositories tr3d and
mmdetection3d (projects/TR3D). Inside, the reference's parametrisation is kept: an anchor is the lower corner of its voxel,
sizes are exponentials, a turned box has eight numbers.

The same network with another assigner and classification loss is SR3D (`detectors.sr3d`).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vrdistill_jax.assigners import ASSIGNERS, find_assigner
from vrdistill_jax.assigners.assignment import Anchors, Assignment, Task
from vrdistill_jax.detectors.decoding import DecodeConfig
from vrdistill_jax.detectors.dense_decoding import evaluation_protocol, select_dense_detections
from vrdistill_jax.detectors.votenet import feature_size as feature_size
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.geometry.host.voxel_pyramid import make_capacities
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.geometry.iou import box_iou
from vrdistill_jax.losses import ranking
from vrdistill_jax.losses.box import diou_loss
from vrdistill_jax.losses.classification import (
    focal_loss,
    quality_focal_loss,
    sum_per_positive,
    varifocal_loss,
)
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.nn.mlp import Dense, scale_size
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.nn.sparse_conv import voxel_features
from vrdistill_jax.nn.sparse_resnet import (
    FIRST_STAGE,
    BackboneOutput,
    SparseResNet,
    TR3DNeck,
    VoxelFeatures,
    stage_sizes,
    tr3d_pyramid_config,
)
from vrdistill_jax.structs import (
    Detections,
    DetectorOutput,
    Points,
    PointSet,
    Predictions,
    Scene,
    VoxelPyramid,
    VoxelPyramidConfig,
)

STRIDES = (16, 32)  # voxels between the anchors of the two levels, fine to coarse
# Voxels per level (strides 1 to 64, then 32 and 16 as generated) of the largest scenes that the published configs meet, by
# whether boxes are turned: whole rooms (ScanNet), single views (SUN RGB-D). Smaller scenes use smaller rungs.
LARGEST_SCENES = {
    False: (160_000, 160_000, 150_000, 96_000, 36_000, 9_600, 2_560, 28_800, 230_400),
    True: (100_000, 72_000, 38_400, 14_400, 5_120, 1_920, 640, 8_960, 92_160),
}
NUM_RUNGS = 9
PRIOR = 0.01  # class probability of an untrained network
NUM_PROPOSALS = 256  # anchors that distillers compare, as many as VoteNet has clusters
SEED_STAGE = 2  # of the backbone: stride 32, where a room has about as many voxels as VoteNet has seeds
LARGE_DIAGONAL = 1.14  # metres seen from above: classes of larger objects belong to the coarse level
CLASSIFICATION_LOSSES = ("focal", "qfl", "vfl", "ras")


class HeadOutput(NamedTuple):
    """What the head says at all anchors, fine level first; the reference's parametrisation."""

    points: Array  # f32[B, A, 3] anchors, metres: lower corners of their voxels
    box_channels: (
        Array  # f32[B, A, 6 or 8] offset of the centre in metres, exponentials of the sizes, two of the angle
    )
    class_logits: Array  # f32[B, A, K]
    mask: Array  # bool[B, A]
    level: Array  # i32[A] 0 is the fine one


class TR3DRaw(NamedTuple):
    """Everything between cloud and boxes."""

    head: HeadOutput
    backbone: BackboneOutput
    neck: tuple[VoxelFeatures, VoxelFeatures]  # what the head reads, fine to coarse
    proposal_index: Array | None = None  # i32[B, Q] anchors that `propose_like` chose; None: all of them


class ClassHead(Dense):
    """A linear layer whose untrained probabilities are PRIOR."""

    def _init_bias(self, key):
        del key
        return jnp.full((self.size,), -math.log((1 - PRIOR) / PRIOR))


class TR3D(nn.Module):
    """The network.

    Attributes:
      num_classes: K.
      oriented: whether boxes are turned (8 box channels) or axis-aligned (6).
      input_size: feature channels of the cloud.
      voxel_size: metres, that of the pyramid.
      stem_size: channels of the first convolution; stages double them up to
      max_size: channels of the later stages, the neck and what the head reads.
      num_blocks: residual blocks of the four stages.
      voxel_reduction: the features of a voxel: those of its "first" point, or the "mean" of its points.
      norm: makes the norm layers.
    """

    num_classes: int
    oriented: bool
    input_size: int = 3
    voxel_size: float = 0.01
    stem_size: int = 64
    max_size: int = 128
    num_blocks: tuple[int, ...] = (3, 4, 6, 3)
    voxel_reduction: str = "first"
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        sizes = stage_sizes(self.max_size, self.stem_size)
        self.backbone = SparseResNet(self.input_size, self.stem_size, sizes, self.num_blocks, norm=self.norm)
        self.neck = TR3DNeck(sizes[1:], self.max_size, norm=self.norm)
        small = nn.initializers.normal(0.01)
        self.box_head = Dense(self.max_size, 8 if self.oriented else 6, kernel_init=small)
        self.class_head = ClassHead(self.max_size, self.num_classes, kernel_init=small)

    def __call__(self, points: Points, pyramid: VoxelPyramid, *, train: bool) -> DetectorOutput:
        """Detects objects.

        Args:
          points: the clouds.
          pyramid: their geometry, built with `pyramid_config`.
          train: batch statistics (written to `batch_stats`) or running ones.

        Returns:
          DetectorOutput of all anchors, fine level first, with a TR3DRaw and taps whose points are voxels, not rows of the
          cloud: "level0" and "level1" (what the head reads), "seeds" (the backbone's voxels of stride 32). `head` holds
          what is said of each anchor: offset of the centre, logarithms of the sizes, class logits.
        """
        features = voxel_features(points.features, pyramid, self.voxel_reduction)
        backbone = self.backbone(features, pyramid, train=train)
        neck = self.neck(backbone.stages, pyramid, train=train)
        xyz = [level.coords.astype(jnp.float32) * self.voxel_size for level in neck]
        joined = jnp.concatenate([level.features for level in neck], 1)
        channels = self.box_head(joined)
        log_sizes = channels[..., 3:6]
        channels = jnp.concatenate([channels[..., :3], jnp.exp(log_sizes), channels[..., 6:]], -1)
        head = HeadOutput(
            points=jnp.concatenate(xyz, 1),
            box_channels=channels,
            class_logits=self.class_head(joined),
            mask=jnp.concatenate([level.mask for level in neck], 1),
            level=jnp.asarray(np.repeat(np.arange(2, dtype=np.int32), [x.shape[1] for x in xyz])),
        )
        taps = {
            f"level{n}": PointSet(at, level.features, level.mask, None)
            for n, (at, level) in enumerate(zip(xyz, neck, strict=True))
        }
        coarse = pyramid.levels[FIRST_STAGE + SEED_STAGE]
        seeds = coarse.coords.astype(jnp.float32) * self.voxel_size
        taps["seeds"] = PointSet(seeds, backbone.stages[SEED_STAGE], coarse.mask, None)
        groups = {"center": channels[..., :3], "size": log_sizes, "class": head.class_logits}
        return DetectorOutput(predictions_from_head(head), taps, TR3DRaw(head, backbone, neck), groups)

    def propose_like(self, output: DetectorOutput, other: DetectorOutput, *, train: bool) -> DetectorOutput:
        """`output` at a few anchors alone: where `other`, of the same clouds, is most certain of an object.

        Args:
          output: of this network.
          other: of a network with the same anchors; `output` itself for its own best ones.
          train: not used.

        Returns:
          The output with predictions, head and the taps "clusters" and "proposals" (both: anchors with the features that
          the head reads) of NUM_PROPOSALS anchors, or all if there are fewer. What has been chosen already stays.
        """
        del train
        if output.raw.proposal_index is not None:
            return output
        index = other.raw.proposal_index
        if index is None:
            certain = jnp.where(other.predictions.mask, other.predictions.objectness, -1.0)
            index = jax.lax.top_k(certain, min(NUM_PROPOSALS, certain.shape[1]))[1]
        pick = partial(gather_rows, index=jax.lax.stop_gradient(index))
        features = jnp.concatenate([level.features for level in output.raw.neck], 1)
        mask = pick(output.predictions.mask)
        chosen = PointSet(pick(output.raw.head.points), pick(features), mask, None)
        return DetectorOutput(
            Predictions(*map(pick, output.predictions)),
            output.taps | {"clusters": chosen, "proposals": chosen},
            output.raw._replace(proposal_index=index),
            {name: pick(group) for name, group in (output.head or {}).items()},
        )


def label_levels(class_names, mean_sizes, oriented: bool) -> tuple[int, ...]:
    """The level that each class is learned on.

    Args:
      class_names: K names.
      mean_sizes: K rows (length, width, height) in metres.
      oriented: whether boxes are turned.

    Returns:
      K rows of STRIDES. Classes whose mean outline has a diagonal above 1.14 m belong to the coarse level. For ScanNet and
      SUN RGB-D this gives the published tables (SUN RGB-D's bathtub is an exception to it).

    Source: `label2level` in tr3d's configs.
    """
    exceptions = {"bathtub": 0} if oriented else {}
    return tuple(
        exceptions.get(name, int(np.hypot(size[0], size[1]) > LARGE_DIAGONAL))
        for name, size in zip(class_names, mean_sizes, strict=True)
    )


def default_config(class_names, mean_sizes, oriented: bool) -> ConfigDict:
    """The published detector as `config.detector`.

    Args:
      class_names: K names.
      mean_sizes: K rows (length, width, height) in metres; they only decide the levels of the classes.
      oriented: whether boxes are turned.

    Returns:
      A ConfigDict with
        class_names, oriented: the task,
        input_features: of "color" and "height",
        voxel_size: metres,
        voxel_reduction: features of a voxel, those of its "first" point or the "mean",
        stem_size, max_size, num_blocks: see TR3D; width: multiplier of the first two,
        capacities: rungs of voxels per level that scenes are padded to,
        norm_epsilon: of the batch norms,
        label_levels: level of each class (0 fine, 1 coarse), read by assigners that restrict classes to levels,
        num_candidates: anchors that go on to suppression,
        assigner: name of the one to use; assigners: the knobs of each of them,
        classification_loss: "focal", "qfl", "vfl" or "ras"; ras: the knobs of the last,
        reference_diou: for turned boxes, reproduces the reference's slip in the centre distance of the box loss.
    """
    config = ConfigDict()
    config.name = "tr3d"
    config.class_names = tuple(class_names)
    config.oriented = oriented
    config.input_features = ("color",)
    config.voxel_size = 0.01
    config.voxel_reduction = "first"
    config.stem_size, config.max_size, config.width = 64, 128, 1.0
    config.num_blocks = (3, 4, 6, 3)
    config.capacities = make_capacities(LARGEST_SCENES[bool(oriented)], NUM_RUNGS)
    config.norm_epsilon = 1e-5
    config.label_levels = label_levels(class_names, mean_sizes, oriented)
    config.num_candidates = 1000
    config.assigner = "top_k"
    config.assigners = ConfigDict({name: file.default_config() for name, file in ASSIGNERS.items()})
    config.classification_loss = "focal"
    config.ras = ranking.default_config()
    config.reference_diou = False
    return config


def build(config: Any, norm_axis_name: str | None = None) -> TR3D:
    """The network that `config.detector` describes; `norm_axis_name` synchronises its batch norm over that device axis."""
    return TR3D(
        num_classes=len(config.class_names),
        oriented=config.oriented,
        input_size=feature_size(config.input_features),
        voxel_size=config.voxel_size,
        stem_size=scale_size(config.stem_size, config.width),
        max_size=scale_size(config.max_size, config.width),
        num_blocks=tuple(config.num_blocks),
        voxel_reduction=config.voxel_reduction,
        norm=partial(MaskedBatchNorm, epsilon=config.norm_epsilon, axis_name=norm_axis_name),
    )


def pyramid_config(config: Any) -> VoxelPyramidConfig:
    """What the loader computes for each cloud; on a CPU the maps of the first stage list their pairs too."""
    capacities = tuple(tuple(rung) for rung in config.capacities)
    return tr3d_pyramid_config(config.voxel_size, capacities, tiles=jax.default_backend() == "cpu")


def boxes_from_head(points: Float[Array, "*b 3"], channels: Float[Array, "*b c"]) -> Float[Array, "*b 7"]:
    """Decodes the channels of the head.

    Args:
      points: f32[..., 3] anchors, metres.
      channels: f32[..., 6 or 8]: offset of the centre (metres), e0, e1, e2 > 0, and for turned boxes a, b.

    Returns:
      f32[..., 7] centre, full size, yaw. Six channels: sizes e0, e1, e2 and yaw 0. Eight: the angle channels have the length
      log q and the direction 2 yaw; with s = e0 + e1 the sizes are s / (1 + q), s q / (1 + q) and e1 + e2, and the yaw lies
      in (-pi/2, pi/2].

    Source: tr3d, _bbox_pred_to_bbox. That e1 enters both s and the height comes from FCAF3D's six face distances.
    """
    center = points + channels[..., :3]
    e = channels[..., 3:6]
    if channels.shape[-1] == 6:
        return join_boxes(center, e, jnp.zeros_like(e[..., 0]))
    outline, yaw = outline_from_angle(e[..., 0] + e[..., 1], channels[..., 6], channels[..., 7])
    return join_boxes(center, jnp.concatenate([outline, (e[..., 1] + e[..., 2])[..., None]], -1), yaw)


def outline_from_angle(
    total: Float[Array, "*b"], a: Float[Array, "*b"], b: Float[Array, "*b"]
) -> tuple[Float[Array, "*b 2"], Float[Array, "*b"]]:
    """Decodes the two channels that say how a box is turned and how long it is for its width.

    Args:
      total: f32[...] length + width, metres.
      a: f32[...] log q * sin(2 yaw).
      b: f32[...] log q * cos(2 yaw).

    Returns:
      (f32[..., 2] total / (1 + q) and q times that, f32[...] yaw in (-pi/2, pi/2]); where a = b = 0 a square of yaw 0.

    Source: FCAF3D, section 3.3: a square has no yaw, and both names of a rectangle have the same channels.
    """
    squared = a**2 + b**2
    known = squared > 0  # the angle of (0, 0) has no gradient
    a, squared = jnp.where(known, a, 1.0), jnp.where(known, squared, 1.0)
    ratio = jnp.where(known, jnp.exp(jnp.sqrt(squared)), 1.0)
    yaw = jnp.where(known, 0.5 * jnp.arctan2(a, b), 0.0)
    width = total / (1 + ratio)
    return jnp.stack([width, width * ratio], -1), yaw


def predictions_from_head(head: HeadOutput) -> Predictions:
    """The boxes and scores of all anchors; objectness is the highest class probability."""
    boxes = boxes_from_head(head.points, head.box_channels)
    objectness = jnp.max(jax.nn.sigmoid(head.class_logits), -1)
    return Predictions(
        boxes[..., :3], boxes[..., 3:6], boxes[..., 6], head.class_logits, objectness, head.mask
    )


def assign_targets(head: HeadOutput, scene: Scene, config: Any, assigner: str = "") -> Assignment:
    """Which box each anchor is trained to find.

    Args:
      head: of the network.
      scene: with boxes.
      config: config.detector.
      assigner: name of another one than the config's.

    Returns:
      The assignment, without gradients; masked anchors and the padding scenes of a batch have none.
    """
    anchors = Anchors(
        xyz=head.points,
        mask=head.mask & scene.mask[:, None],
        boxes=boxes_from_head(head.points, head.box_channels),
        class_logits=head.class_logits,
        level=head.level,
        stride=jnp.asarray(STRIDES, jnp.float32)[head.level] * config.voxel_size,
    )
    name = assigner or config.assigner
    task = Task(config.oriented, tuple(config.label_levels))
    return find_assigner(name).assign(anchors, scene.boxes, config.assigners[name], task)


def loss(output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None):
    """The training loss.

    Args:
      output: of the network; `raw.head` is read.
      scene: with boxes.
      config: config.detector.
      axis_name: mapped device axis over which sums are divided, or None.

    Returns:
      (scalar total, dict of scalar terms). total = class + box: the classification loss summed over anchors and classes and
      divided by the number of positives, and the mean DIoU loss of positives. Besides: "quality", the mean IoU of
      positives; "aic", the mean |score - IoU| of positives (SR3D's average inconsistency coefficient), and "aic_top_k", the
      same of the anchors that TR3D's assigner would choose, so that methods with different assigners can be compared, and
      "score_top_k" and "quality_top_k", the mean score and the mean IoU of these;
      "positives" per box; "missed", the share of boxes without any positive.

    Raises:
      ValueError: if the scene has no boxes, or for an unknown assigner or classification loss.

    Source: tr3d, TR3DHead._loss.
    Differs: without any positive the reference divides by 0.
    """
    if scene.boxes is None:
        raise ValueError("the loss needs scene.boxes; this scene has no labels")
    head, boxes = output.raw.head, scene.boxes
    assignment = assign_targets(head, scene, config)
    row = jnp.maximum(assignment.gt_index, 0)
    positive = assignment.gt_index >= 0
    valid = head.mask & scene.mask[:, None]
    label = jnp.where(positive, gather_rows(boxes.label, row), -1)

    predicted = boxes_from_head(head.points, head.box_channels)
    target = gather_rows(join_boxes(boxes.center, boxes.size, boxes.yaw), row)
    box = diou_loss(predicted, target, rotated=config.oriented, reference=config.reference_diou)
    quality = assignment.quality
    if config.classification_loss == "ras" and not config.ras.detach:
        quality = jnp.where(positive, box_iou(predicted, target, rotated=config.oriented), 0.0)
    classes = classification_loss(head.class_logits, label, quality, assignment.gt_index, config)

    mean = partial(masked_mean, axis_name=axis_name)
    terms = {
        "class": sum_per_positive(jnp.sum(classes, -1), valid, positive, axis_name),
        "box": mean(box, positive),
    }
    total = terms["class"] + terms["box"]
    real = boxes.mask & scene.mask[:, None]
    per_box = count_positives(assignment.gt_index, boxes.mask.shape[1])
    score = ranking.labelled_scores(head.class_logits, label)
    common = assign_targets(head, scene, config, "top_k")
    in_common = common.gt_index >= 0
    common_label = jnp.where(in_common, gather_rows(boxes.label, jnp.maximum(common.gt_index, 0)), -1)
    common_score = ranking.labelled_scores(head.class_logits, common_label)
    terms |= {
        "quality": mean(assignment.quality, positive),
        "aic": mean(jnp.abs(score - assignment.quality), positive),
        "aic_top_k": mean(jnp.abs(common_score - common.quality), in_common),
        "score_top_k": mean(common_score, in_common),
        "quality_top_k": mean(common.quality, in_common),
        "positives": mean(per_box, real),
        "missed": mean((per_box == 0).astype(jnp.float32), real),
    }
    return total, terms


def count_positives(gt_index: Int[Array, "b a"], num_boxes: int) -> Float[Array, "b g"]:
    """How many anchors each box trains."""
    return jnp.sum(gt_index[..., None] == jnp.arange(num_boxes), axis=1).astype(jnp.float32)


def classification_loss(
    logits: Float[Array, "b a k"],
    label: Int[Array, "b a"],
    quality: Float[Array, "b a"],
    gt_index: Int[Array, "b a"],
    config: Any,
) -> Float[Array, "b a k"]:
    """The loss that config.classification_loss names, unreduced.

    Args:
      logits: f32[B, A, K].
      label: i32[B, A] class of the assigned box, -1 for background.
      quality: f32[B, A] IoU of the predicted with the assigned box.
      gt_index: i32[B, A] row of the assigned box, -1 for background.
      config: config.detector.

    Raises:
      ValueError: for an unknown name.
    """
    if config.classification_loss not in CLASSIFICATION_LOSSES:
        raise ValueError(
            f"unknown classification_loss {config.classification_loss!r}; known: {', '.join(CLASSIFICATION_LOSSES)}"
        )
    if config.classification_loss == "focal":
        return focal_loss(logits, label)
    if config.classification_loss == "ras":
        return ranking.rank_aware_loss(logits, label, quality, gt_index, config.ras)
    quality_aware = quality_focal_loss if config.classification_loss == "qfl" else varifocal_loss
    return quality_aware(logits, label, quality)


def decode(
    output: DetectorOutput, points: Points, config: Any, decode_config: DecodeConfig | None = None
) -> Detections:
    """Turns the predictions of all anchors into final boxes.

    Args:
      output: of the network, in evaluation mode; only its predictions are read.
      points: the clouds that it read.
      config: config.detector.
      decode_config: thresholds; None for the evaluation protocol.

    Returns:
      Detections sorted by falling score.
    """
    decode_config = decode_config or evaluation_protocol(config.oriented)
    return select_dense_detections(output.predictions, points, decode_config, config.num_candidates)
