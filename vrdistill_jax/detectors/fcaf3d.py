"""FCAF3D: a sparse convolutional network that predicts a box at every voxel of four levels.

Source: Rukhovich et al., "FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection" (2022), and the repositories fcaf3d,
tr3d and mmdetection3d. Inside, the reference's parametrisation is kept: an anchor is the lower corner of its voxel, a box is
six distances from it to the faces, a turned one has two more numbers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vrdistill_jax.assigners import ASSIGNERS, find_assigner
from vrdistill_jax.assigners.assignment import Anchors, Assignment, Task
from vrdistill_jax.assigners.fcaf3d import centerness, face_distances
from vrdistill_jax.detectors.decoding import DecodeConfig
from vrdistill_jax.detectors.dense_decoding import evaluation_protocol, select_dense_detections
from vrdistill_jax.detectors.tr3d import LARGEST_SCENES, ClassHead, count_positives, outline_from_angle
from vrdistill_jax.detectors.votenet import feature_size as feature_size
from vrdistill_jax.geometry.boxes import join_boxes
from vrdistill_jax.geometry.host.voxel_pyramid import make_capacities
from vrdistill_jax.geometry.indexing import gather_rows
from vrdistill_jax.losses.box import iou_loss
from vrdistill_jax.losses.classification import focal_loss
from vrdistill_jax.losses.reduction import masked_mean
from vrdistill_jax.nn.mlp import Dense, scale_size
from vrdistill_jax.nn.norm import MaskedBatchNorm, NormFactory
from vrdistill_jax.nn.sparse_conv import voxel_features
from vrdistill_jax.nn.sparse_resnet import (
    BackboneOutput,
    FCAF3DNeck,
    PrunedFeatures,
    SparseResNet,
    fcaf3d_pyramid_config,
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

STRIDES = (8, 16, 32, 64)  # voxels between the anchors of the levels, fine to coarse
NUM_RUNGS = 9


def largest_levels(scene: Sequence[int]) -> tuple[int, ...]:
    """Capacities for scenes of a size.

    Args:
      scene: voxels per level that TR3D needs for them: strides 1 to 64 come first.

    Returns:
      Voxels of strides 1 to 64, then of 32, 16 and 8 as generated, each with eight times as many as the one before.
    """
    return (*scene[:7], *(8**n * scene[6] for n in (1, 2, 3)))


class HeadOutput(NamedTuple):
    """What the head says at all anchors, fine level first; the reference's parametrisation."""

    points: Array  # f32[B, A, 3] anchors, metres: lower corners of their voxels
    box_channels: (
        Array  # f32[B, A, 6 or 8] distances to the faces in metres (-x, +x, -y, +y, -z, +z), two of the angle
    )
    center_logit: Array  # f32[B, A] of the centreness
    class_logits: Array  # f32[B, A, K]
    mask: Array  # bool[B, A] False in pads and where pruned
    level: Array  # i32[A] 0 is the finest one


class FCAF3DRaw(NamedTuple):
    """Everything between cloud and boxes."""

    head: HeadOutput
    backbone: BackboneOutput
    neck: tuple[PrunedFeatures, ...]  # what the head reads, fine to coarse, and what was pruned


class FCAF3D(nn.Module):
    """The network.

    Attributes:
      num_classes: K.
      oriented: whether boxes are turned (8 box channels) or axis-aligned (6).
      input_size: feature channels of the cloud.
      voxel_size: metres, that of the pyramid.
      stem_size: channels of the first convolution.
      stage_sizes: channels of the four stages.
      head_size: channels of what the head reads.
      num_blocks: residual blocks of the four stages.
      prune_threshold: voxels that are kept per scene and level, those with the highest class logits.
      num_candidates: anchors per level that become predictions.
      voxel_reduction: the features of a voxel: those of its "first" point, or the "mean" of its points.
      norm: makes the norm layers.
    """

    num_classes: int
    oriented: bool
    input_size: int = 3
    voxel_size: float = 0.01
    stem_size: int = 64
    stage_sizes: tuple[int, ...] = (64, 128, 256, 512)
    head_size: int = 128
    num_blocks: tuple[int, ...] = (3, 4, 6, 3)
    prune_threshold: int = 100_000
    num_candidates: int = 1000
    voxel_reduction: str = "first"
    norm: NormFactory = MaskedBatchNorm

    def setup(self) -> None:
        """Makes the parameters and layers."""
        sizes = tuple(self.stage_sizes)
        self.backbone = SparseResNet(
            self.input_size, self.stem_size, sizes, self.num_blocks, "instance", norm=self.norm
        )
        self.neck = FCAF3DNeck(sizes, self.head_size, self.prune_threshold, norm=self.norm)
        small = nn.initializers.normal(0.01)
        channels = 8 if self.oriented else 6
        self.box_head = Dense(self.head_size, channels, use_bias=False, kernel_init=small)
        self.center_head = Dense(self.head_size, 1, use_bias=False, kernel_init=small)
        self.class_head = ClassHead(self.head_size, self.num_classes, kernel_init=small)
        self.scales = [self.param(f"scale_{n}", nn.initializers.ones, ()) for n in range(len(STRIDES))]

    def __call__(
        self,
        points: Points,
        pyramid: VoxelPyramid,
        *,
        train: bool,
        kept: tuple[Bool[Array, "b v"], ...] | None = None,
    ) -> DetectorOutput:
        """Detects objects.

        Args:
          points: the clouds.
          pyramid: their geometry, built with `pyramid_config`.
          train: batch statistics (written to `batch_stats`) or running ones.
          kept: voxels of the three finer levels that are not pruned; None for the network's own choice.

        Returns:
          DetectorOutput with taps "level0" to "level3" (what the head reads; their points are voxels, not rows of the cloud)
          and an FCAF3DRaw.
        """
        features = voxel_features(points.features, pyramid, self.voxel_reduction)
        backbone = self.backbone(features, pyramid, train=train)
        neck = self.neck(backbone.stages, pyramid, self._prune_score, train=train, kept=kept)
        xyz = [level.coords.astype(jnp.float32) * self.voxel_size for level in neck]
        joined = jnp.concatenate([level.features for level in neck], 1)
        channels = self.box_head(joined)
        sizes = np.array([x.shape[1] for x in xyz])
        level = jnp.repeat(jnp.arange(len(xyz)), sizes, total_repeat_length=joined.shape[1])
        distances = jnp.exp(channels[..., :6] * jnp.stack(self.scales)[level][:, None])
        head = HeadOutput(
            points=jnp.concatenate(xyz, 1),
            box_channels=jnp.concatenate([distances, channels[..., 6:]], -1),
            center_logit=self.center_head(joined)[..., 0],
            class_logits=self.class_head(joined),
            mask=jnp.concatenate([level.mask for level in neck], 1),
            level=level,
        )
        taps = {
            f"level{n}": PointSet(at, level.features, level.mask, None)
            for n, (at, level) in enumerate(zip(xyz, neck, strict=True))
        }
        predictions = predictions_from_head(head, sizes.tolist(), self.num_candidates)
        return DetectorOutput(predictions, taps, FCAF3DRaw(head, backbone, neck))

    def _prune_score(self, features: Float[Array, "b v c"]) -> Float[Array, "b v"]:
        return jnp.max(self.class_head(features), -1)


def default_config(class_names, mean_sizes, oriented: bool) -> ConfigDict:
    """The published detector as `config.detector`.

    Args:
      class_names: K names.
      mean_sizes: not used; other detectors need them.
      oriented: whether boxes are turned.

    Returns:
      A ConfigDict with
        class_names, oriented: the task,
        input_features: of "color" and "height",
        voxel_size: metres,
        voxel_reduction: features of a voxel, those of its "first" point or the "mean",
        stem_size, stage_sizes, head_size, num_blocks: see FCAF3D; width: multiplier of the first three,
        prune_threshold: voxels that are kept per scene and level,
        capacities: rungs of voxels per level that scenes are padded to,
        norm_epsilon: of the batch norms,
        label_levels: level of each class, for assigners that restrict classes to levels (FCAF3D's does not),
        num_candidates: anchors per level that go on to suppression,
        assigner: name of the one to use; assigners: the knobs of each of them.
    """
    del mean_sizes
    config = ConfigDict()
    config.name = "fcaf3d"
    config.class_names = tuple(class_names)
    config.oriented = oriented
    config.input_features = ("color",)
    config.voxel_size = 0.01
    config.voxel_reduction = "first"
    config.stem_size, config.stage_sizes, config.head_size = 64, (64, 128, 256, 512), 128
    config.width = 1.0
    config.num_blocks = (3, 4, 6, 3)
    config.prune_threshold = 100_000
    config.capacities = make_capacities(largest_levels(LARGEST_SCENES[bool(oriented)]), NUM_RUNGS)
    config.norm_epsilon = 1e-5
    config.label_levels = ()
    config.num_candidates = 1000
    config.assigner = "fcaf3d"
    config.assigners = ConfigDict({name: file.default_config() for name, file in ASSIGNERS.items()})
    return config


def build(config: Any, norm_axis_name: str | None = None) -> FCAF3D:
    """The network that `config.detector` describes; `norm_axis_name` synchronises its batch norm over that device axis."""
    return FCAF3D(
        num_classes=len(config.class_names),
        oriented=config.oriented,
        input_size=feature_size(config.input_features),
        voxel_size=config.voxel_size,
        stem_size=scale_size(config.stem_size, config.width),
        stage_sizes=tuple(scale_size(size, config.width) for size in config.stage_sizes),
        head_size=scale_size(config.head_size, config.width),
        num_blocks=tuple(config.num_blocks),
        prune_threshold=config.prune_threshold,
        num_candidates=config.num_candidates,
        voxel_reduction=config.voxel_reduction,
        norm=partial(MaskedBatchNorm, epsilon=config.norm_epsilon, axis_name=norm_axis_name),
    )


def pyramid_config(config: Any) -> VoxelPyramidConfig:
    """What the loader computes for each cloud."""
    return fcaf3d_pyramid_config(config.voxel_size, tuple(tuple(rung) for rung in config.capacities))


def boxes_from_head(points: Float[Array, "*b 3"], channels: Float[Array, "*b c"]) -> Float[Array, "*b 7"]:
    """Decodes the channels of the head.

    Args:
      points: f32[..., 3] anchors, metres.
      channels: f32[..., 6 or 8]: distances > 0 to the lower and the upper face in x, in y and in z (metres), and for turned
        boxes the two of `tr3d.outline_from_angle`.

    Returns:
      f32[..., 7] centre, full size, yaw. Turned boxes share the sum of the four distances in x and y between length and
      width; their centre is found as if they were not turned.

    Source: fcaf3d, _bbox_pred_to_bbox.
    """
    low, high = channels[..., 0:6:2], channels[..., 1:6:2]
    center, size = points + (high - low) / 2, low + high
    if channels.shape[-1] == 6:
        return join_boxes(center, size, jnp.zeros_like(size[..., 0]))
    outline, yaw = outline_from_angle(size[..., 0] + size[..., 1], channels[..., 6], channels[..., 7])
    return join_boxes(center, jnp.concatenate([outline, size[..., 2:]], -1), yaw)


def scores_from_head(head: HeadOutput) -> Float[Array, "b a k"]:
    """Class probability times centreness."""
    return jax.nn.sigmoid(head.class_logits) * jax.nn.sigmoid(head.center_logit)[..., None]


def predictions_from_head(head: HeadOutput, level_sizes: list[int], num_candidates: int) -> Predictions:
    """The best anchors of each level.

    Args:
      head: of the network.
      level_sizes: anchors of each level.
      num_candidates: how many of each level are taken, those with the highest score of any class.

    Returns:
      Predictions, Q = sum of min(num_candidates, size); objectness is the centreness, so that a class's score is its
      probability times objectness.
    """
    best = jnp.where(head.mask, jnp.max(scores_from_head(head), -1), -1.0)
    rows = candidates_by_level(best, level_sizes, num_candidates)
    boxes = gather_rows(boxes_from_head(head.points, head.box_channels), rows)
    return Predictions(
        boxes[..., :3],
        boxes[..., 3:6],
        boxes[..., 6],
        class_logits=gather_rows(head.class_logits, rows),
        objectness=jax.nn.sigmoid(gather_rows(head.center_logit, rows)),
        mask=gather_rows(head.mask, rows),
    )


def candidates_by_level(best: Float[Array, "b a"], sizes: list[int], count: int) -> Array:
    """Rows of the `count` best anchors of each level: i32[B, sum of min(count, size)].

    Args:
      best: f32[B, A] what anchors are ranked by, levels one after the other.
      sizes: anchors of each level.
      count: anchors per level.
    """
    start, rows = 0, []
    for size in sizes:
        rows.append(start + jax.lax.top_k(best[:, start : start + size], min(count, size))[1])
        start += size
    return jnp.concatenate(rows, 1)


def assign_targets(head: HeadOutput, scene: Scene, config: Any) -> Assignment:
    """Which box each anchor is trained to find.

    Args:
      head: of the network.
      scene: with boxes.
      config: config.detector.

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
    assign = find_assigner(config.assigner).assign
    task = Task(config.oriented, tuple(config.label_levels))
    return assign(anchors, scene.boxes, config.assigners[config.assigner], task)


def loss(output: DetectorOutput, scene: Scene, config: Any, axis_name: str | None = None):
    """The training loss.

    Args:
      output: of the network; `raw.head` is read.
      scene: with boxes.
      config: config.detector.
      axis_name: mapped device axis over which sums are divided, or None.

    Returns:
      (scalar total, dict of scalar terms). total = center + box + class, each a mean over scenes: the binary entropy of the
      centreness, averaged over the scene's positives; 1 - IoU of positives, averaged with the true centreness as weight;
      the focal loss summed over anchors and classes, divided by the number of positives. Besides: "quality", the mean IoU of
      positives; "positives" per box; "missed", the share of boxes without any positive.

    Raises:
      ValueError: if the scene has no boxes, or for an unknown assigner.

    Source: fcaf3d, Fcaf3DNeckWithHead._loss_single.
    Differs: with several devices the reference divides by numbers of positives that are averaged over the devices.
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
    central = jnp.where(positive, centerness(face_distances(head.points, target)), 0.0)
    box = iou_loss(predicted, target, rotated=config.oriented)
    center = optax.sigmoid_binary_cross_entropy(head.center_logit, central)
    classes = jnp.sum(focal_loss(head.class_logits, label), -1)

    def sum_rows(values, where):
        return jnp.sum(jnp.where(where, values, 0.0), 1)

    count = jnp.maximum(jnp.sum(positive, 1, dtype=jnp.float32), 1.0)
    by_scene = {
        "center": sum_rows(center, positive) / count,
        "box": sum_rows(box * central, positive) / jnp.maximum(sum_rows(central, positive), 1e-6),
        "class": sum_rows(classes, valid) / count,
    }
    mean = partial(masked_mean, axis_name=axis_name)
    terms = {name: mean(values, scene.mask) for name, values in by_scene.items()}
    total = terms["center"] + terms["box"] + terms["class"]
    per_box, real = (
        count_positives(assignment.gt_index, boxes.mask.shape[1]),
        boxes.mask & scene.mask[:, None],
    )
    terms |= {
        "quality": mean(assignment.quality, positive),
        "positives": mean(per_box, real),
        "missed": mean((per_box == 0).astype(jnp.float32), real),
    }
    return total, terms


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
    predictions = output.predictions
    scores = jax.nn.sigmoid(predictions.class_logits) * predictions.objectness[..., None]
    decode_config = decode_config or evaluation_protocol(config.oriented)
    count = config.num_candidates * len(STRIDES)
    return select_dense_detections(predictions, points, decode_config, count, scores)
