"""The data contract: what every reader, network, loss and evaluator passes to the next one.

Frame: right-handed, z up, metres. Yaw is counter-clockwise about +z from +x, in [-pi, pi). A box is its centre, full
size along its own axes, and yaw. `*_mask` is True where a row is real, `*_index` is -1 where there is nothing.

The structs are NamedTuples: immutable, and JAX treats them as pytrees without registration, so that the NumPy-only
layers (`data`, `geometry.host`, `data_prep`) build the very same structs without importing JAX. Fields hold NumPy or JAX
arrays; a single sample has the same fields without the leading batch axis B. `validate` is called explicitly at the edges
(readers, loaders, tests), never inside a traced function.

Axes: B batch, N points, G ground-truth boxes, Q predictions, D detections, M points of a set, V vote slots, F and C features.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # a NumPy or a JAX array


class Points(NamedTuple):
    """A padded point cloud."""

    xyz: Array  # f32[B, N, 3] metres
    features: Array  # f32[B, N, F] colour in [0, 1] and/or height in metres, as the config names them
    mask: Array  # bool[B, N]


class Boxes(NamedTuple):
    """Padded ground-truth boxes. Pads: centre 0, size 1, yaw 0, label -1, vote centre 0."""

    center: Array  # f32[B, G, 3] metres
    size: Array  # f32[B, G, 3] metres, full extents along the box axes
    yaw: Array  # f32[B, G] radians
    label: Array  # i32[B, G] class row, -1 in pads
    mask: Array  # bool[B, G]
    vote_center: (
        Array  # f32[B, G, 3] where the votes of the object's points should land: the middle of its sampled
    )
    # points where instances are labelled (ScanNet), the box centre elsewhere


class Scene(NamedTuple):
    """One batch of clouds with, for training and evaluation, their boxes."""

    points: Points
    boxes: Boxes | None
    point_instance: (
        Array | None
    )  # i32[B, N, V] rows of `boxes` that hold the point, -1 none; the first slot is the main one.
    # V = 1 for instance labels; V = 3 where boxes overlap (SUN RGB-D), filled as VoteNet does
    scene_from_input: (
        Array  # f32[B, 4, 4] undoes nothing by itself: maps the file's frame to this (augmented) one
    )
    index: Array  # i32[B] row of the dataset, -1 unknown
    mask: Array  # bool[B] False for the padding of a last, partial batch


class PyramidLevel(NamedTuple):
    """One set-abstraction level: which points are its centres and which points of the level above surround them."""

    xyz: Array  # f32[B, M, 3] centres
    mask: Array  # bool[B, M]
    index: Array  # i32[B, M] rows of the level above (of the cloud, for the first level)
    source_index: Array  # i32[B, M] rows of the cloud
    neighbor_index: Array  # i32[B, M, S] rows of the level above; short balls repeat their first hit


class Interpolation(NamedTuple):
    """Three-nearest-neighbour interpolation from a coarse level to a finer one."""

    index: Array  # i32[B, M, 3] rows of the coarse level, for each of the M points of the fine one
    weight: Array  # f32[B, M, 3] sums to 1


class PointPyramid(NamedTuple):
    """All that a PointNet++ network needs to know of a cloud's geometry; depends on coordinates only."""

    levels: tuple[PyramidLevel, ...]  # fine to coarse
    interpolations: tuple[Interpolation, ...]  # in the order of PyramidConfig.interpolations


class LevelConfig(NamedTuple):
    """How one level of a point pyramid is built."""

    num_centers: int
    radius: float  # metres
    num_neighbors: int


class PyramidConfig(NamedTuple):
    """How a point pyramid is built."""

    levels: tuple[LevelConfig, ...]
    interpolations: tuple[tuple[int, int], ...] = ()  # (from coarse level, to fine level), rows of `levels`


class PointSet(NamedTuple):
    """A set of points with features inside a network: what a tap offers to a distiller."""

    xyz: Array  # f32[B, M, 3]
    features: Array  # f32[B, M, C]
    mask: Array  # bool[B, M]
    seed_index: Array  # i32[B, M] row of the input cloud that the point goes back to; None for voxels


class Predictions(NamedTuple):
    """What every detector says about its Q candidates, in the contract's frame."""

    center: Array  # f32[B, Q, 3]
    size: Array  # f32[B, Q, 3]
    yaw: Array  # f32[B, Q]
    class_logits: Array  # f32[B, Q, K]
    objectness: Array  # f32[B, Q] probability
    mask: Array  # bool[B, Q]


class DetectorOutput(NamedTuple):
    """A detector's forward pass.

    Common taps: "seeds" (what the backbone puts out), "votes", "clusters" (where candidates are, with the features that they
    are made of), "proposals" (the same points with the features that the last layer of the head reads). A network that
    predicts at every anchor offers the last two once `propose_like` has chosen the anchors.
    """

    predictions: Predictions
    taps: dict[str, PointSet]
    raw: Any  # the detector's own pytree, in its reference's parametrisation
    head: dict[str, Array] | None = (
        None  # f32[B, Q, *] what the head says of each candidate, by HEAD_GROUPS; for distillers
    )


# Groups of a head's channels, in this order where they are joined; a detector leaves out what it does not have.
# "heading": H logits, then H residuals in units of half a bin.
HEAD_GROUPS = ("objectness", "center", "heading", "size", "class")


class Detections(NamedTuple):
    """Final boxes, sorted by falling score."""

    boxes: Array  # f32[B, D, 7] centre, size, yaw
    score: Array  # f32[B, D] in [0, 1]
    label: Array  # i32[B, D]
    mask: Array  # bool[B, D]


def pad_boxes(
    center: np.ndarray, size: np.ndarray, yaw: np.ndarray, label: np.ndarray, capacity: int, vote_center=None
) -> Boxes:
    """Pads the boxes of one scene to a fixed capacity.

    Args:
      center: f32[g, 3] metres.
      size: f32[g, 3] metres.
      yaw: f32[g] radians.
      label: i32[g].
      capacity: G, rows of the result.
      vote_center: f32[g, 3], or None for the box centres.

    Returns:
      Boxes without a batch axis.

    Raises:
      ValueError: if the scene has more boxes than the capacity.
    """
    count = len(center)
    if count > capacity:
        raise ValueError(
            f"the scene has {count} boxes but the config holds {capacity}; raise config.dataset.max_boxes to {count}"
        )
    boxes = Boxes(
        center=np.zeros((capacity, 3), np.float32),
        size=np.ones((capacity, 3), np.float32),
        yaw=np.zeros(capacity, np.float32),
        label=np.full(capacity, -1, np.int32),
        mask=np.arange(capacity) < count,
        vote_center=np.zeros((capacity, 3), np.float32),
    )
    boxes.center[:count], boxes.size[:count] = center, size
    boxes.yaw[:count], boxes.label[:count] = yaw, label
    boxes.vote_center[:count] = center if vote_center is None else vote_center
    return boxes


def validate(scene: Scene) -> Scene:
    """Checks shapes, dtypes, ranges and index bounds of a concrete batch.

    Args:
      scene: a batched scene of NumPy or JAX arrays (not tracers).

    Returns:
      The same scene, so that a call can be chained.

    Raises:
      ValueError: naming the field, what it holds and what is expected.
    """
    batch, count = np.shape(scene.points.mask)
    _check(scene.points.xyz, "points.xyz", (batch, count, 3), np.float32)
    _check(scene.points.features, "points.features", (batch, count, None), np.float32)
    _check(scene.points.mask, "points.mask", (batch, count), np.bool_)
    _check(scene.scene_from_input, "scene_from_input", (batch, 4, 4), np.float32)
    _check(scene.index, "index", (batch,), np.int32)
    _check(scene.mask, "mask", (batch,), np.bool_)
    for name, array in (("xyz", scene.points.xyz), ("features", scene.points.features)):
        if not np.isfinite(np.asarray(array)[np.asarray(scene.points.mask)]).all():
            raise ValueError(f"points.{name} holds NaN or infinity; remove those rows before batching")
    if scene.boxes is None:
        return scene
    boxes = scene.boxes
    rows = np.shape(boxes.mask)[-1]
    for name, shape in (("center", (3,)), ("size", (3,)), ("yaw", ()), ("vote_center", (3,))):
        _check(getattr(boxes, name), f"boxes.{name}", (batch, rows, *shape), np.float32)
    _check(boxes.label, "boxes.label", (batch, rows), np.int32)
    mask = np.asarray(boxes.mask)
    if (np.asarray(boxes.size)[mask] <= 0).any():
        raise ValueError("boxes.size holds a value <= 0; sizes are full extents in metres")
    if (np.asarray(boxes.label)[mask] < 0).any():
        raise ValueError("boxes.label is negative on a valid box")
    if scene.point_instance is not None:
        instance = np.asarray(scene.point_instance)
        _check(instance, "point_instance", (batch, count, None), np.int32)
        if instance.min(initial=-1) < -1 or instance.max(initial=-1) >= rows:
            raise ValueError(
                f"point_instance must lie in [-1, {rows}), got {instance.min()}..{instance.max()}"
            )
    return scene


def _check(array: Array, name: str, shape: tuple[int | None, ...], dtype) -> None:
    got = np.shape(array)
    if len(got) != len(shape) or any(want not in (None, have) for want, have in zip(shape, got, strict=True)):
        raise ValueError(f"{name} has shape {got}, expected {shape}")
    if array.dtype != dtype:
        raise ValueError(f"{name} has dtype {array.dtype}, expected {np.dtype(dtype)}")


class PairTiles(NamedTuple):
    """The pairs of a kernel map once more, T at a time of the same tap: a faster form where few taps are present."""

    tap: Array  # i32[B, S] of each tile; -1 behind the last one; all -2 where there were more pairs than room
    fine: Array  # i32[B, S, T] rows of the finer level, -1 in pads
    coarse: Array  # i32[B, S, T] rows of the coarser level (of the same level for stride 1), -1 in pads


class KernelMap(NamedTuple):
    """Which voxels the taps of a sparse kernel read. One map serves the forward and the backward pass of every layer.

    `index` belongs to the rows of the coarser level (of the level itself for a kernel of stride 1). A convolution reads it
    forwards; a transposed one, from the coarser to the finer level, backwards.
    """

    index: Array  # i32[B, V, K] rows of the finer level, -1 none
    reverse: Array  # i32[B, W, R] the same pairs from the finer level's side: row * K + tap, -1 none;
    # None for stride 1, where the pair of row v and tap k is also that of row index[v, k] and tap K - 1 - k
    tiles: PairTiles | None = None


class VoxelLevel(NamedTuple):
    """The occupied voxels of one stride, sorted by (x, y, z), and the maps that lead to them."""

    coords: Array  # i32[B, V, 3] lower corners in units of the input voxels: multiples of the stride; pads 0
    mask: Array  # bool[B, V]
    same3: KernelMap | None  # 3^3 taps, stride 1, on the level itself (submanifold)
    down2: KernelMap | None  # 2^3 taps, stride 2, from the level before
    down3: KernelMap | None  # 3^3 taps, stride 2, from the level before
    up: KernelMap | None  # generated levels: the taps of the source level's rows, which made this level
    skip: KernelMap | None  # generated levels: one tap, the row of the encoder's level of the same stride


class VoxelPyramid(NamedTuple):
    """All that a sparse convolutional network needs to know of a cloud's geometry; depends on coordinates only."""

    levels: tuple[VoxelLevel, ...]  # the encoder's, strides 1, 2, 4, ..., then the generated ones
    point_index: (
        Array  # i32[B, V] row of the cloud that a voxel of levels[0] takes its features from, -1 in pads
    )
    voxel_index: Array  # i32[B, N] voxel of each point, -1 for masked points


class VoxelLevelConfig(NamedTuple):
    """Which maps an encoder level gets; the `down` maps come from the level before."""

    same3: bool = False
    down2: bool = False
    down3: bool = False
    tiles: bool = False  # whether same3 and down3 list their pairs in tiles too: on a CPU faster
    # where less than a third of the taps are present, as at strides where voxels hold about one point each


class GeneratedLevelConfig(NamedTuple):
    """A level that a generative transposed convolution of stride 2 makes: everything that its taps reach."""

    source: int  # row of the pyramid's levels
    kernel_size: int  # 3: the 27 fine voxels around each source voxel's corner; 2: its 8 children
    skip: bool = True  # whether the encoder's level of the same stride is added
    same3: bool = True


class VoxelPyramidConfig(NamedTuple):
    """How a voxel pyramid is built."""

    voxel_size: float  # metres
    levels: tuple[VoxelLevelConfig, ...]
    generated: tuple[GeneratedLevelConfig, ...] = ()
    capacities: tuple[tuple[int, ...], ...] = ()  # rungs, each with the rows of every level, small to large


# What the loader hands to a network beside the points, and how it is built.
AnyPyramid = PointPyramid | VoxelPyramid
AnyPyramidConfig = PyramidConfig | VoxelPyramidConfig


class InputConfig(NamedTuple):
    """What a network reads of a cloud."""

    features: tuple[str, ...]  # of "color" and "height", in the order of their columns
    pyramid: AnyPyramidConfig


class NetworkInput(NamedTuple):
    """A batch of clouds as one network reads them."""

    points: Points
    pyramid: AnyPyramid
