"""Batches of prepared scenes, from Grain.

Everything about batch k follows from (seed, k): the shuffle, the points taken, the augmentation. So a run resumes by
starting the pipeline at its step; there is no iterator state to save.
"""

import collections
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from vrdistill_jax.data.augment import read_augmentation
from vrdistill_jax.data.samples import labelled_scene, scene_with_pyramid, select_features
from vrdistill_jax.geometry.host.voxel_pyramid import pad_voxel_pyramids
from vrdistill_jax.structs import (
    AnyPyramid,
    AnyPyramidConfig,
    InputConfig,
    NetworkInput,
    VoxelPyramidConfig,
)

# A scene, the geometry that the network reads, and what a teacher reads if that is something else.
Prepared = tuple[Any, ...]


class PreparedScenes:
    """A random-access sequence of prepared scenes: what Grain's threads call.

    Attributes:
      source: sequence of sample dicts.
      config: the whole config.
      pyramid: what is computed per cloud.
      train: whether to augment, and to draw other points in each epoch.
      teacher: what a second network reads of the same clouds, None if there is none or it reads the same.
    """

    def __init__(
        self,
        source: Any,
        config: Any,
        pyramid: AnyPyramidConfig,
        train: bool,
        teacher: InputConfig | None = None,
    ):
        self.source, self.config, self.pyramid, self.train = source, config, pyramid, train
        self.teacher = teacher

    def __len__(self) -> int:
        return len(self.source)

    def prepare(self, index: int, epoch: int = 0) -> Prepared:
        """One scene; evaluation draws the same points of a scene whenever it is read."""
        seed = [self.config.seed, self.train, epoch if self.train else 0, index]
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        own, teacher = tuple(self.config.detector.input_features), self.teacher
        names = own if teacher is None else tuple(dict.fromkeys(own + teacher.features))
        scene = labelled_scene(self.source[index], index, self.config, rng, self.train, names)
        if teacher is None:
            return scene_with_pyramid(scene, self.pyramid)
        points = select_features(scene.points, names, teacher.features)
        scene = scene._replace(points=select_features(scene.points, names, own))
        scene, built = scene_with_pyramid(scene, self.pyramid)
        if teacher.pyramid == self.pyramid:
            return scene, built, NetworkInput(points, built)
        return scene, built, NetworkInput(points, scene_with_pyramid(scene, teacher.pyramid)[1])


def train_batches(
    source: Any,
    config: Any,
    pyramid: AnyPyramidConfig,
    start_step: int = 0,
    teacher: InputConfig | None = None,
) -> Iterator[Prepared]:
    """Endless shuffled, augmented batches.

    Args:
      source: sequence of sample dicts.
      config: the whole config: `seed`, `train.batch_size`, what `labelled_scene` reads, `dataset.num_threads` (batches made
        at a time) and `dataset.num_workers` (processes that each do that; 0 for threads of this process). Neither changes
        what is delivered.
      pyramid: what is computed per cloud.
      start_step: number of batches to skip, for a resumed run.
      teacher: what a teacher reads of the same clouds, None if that is what the network reads.

    Returns:
      An iterator over (Scene, pyramid), or (Scene, pyramid, NetworkInput) with a teacher's input, with a leading batch axis.

    Raises:
      ValueError: for an impossible `dataset.augment`.
    """
    import grain  # slow to import, and only training needs it

    read_augmentation(config.dataset.augment)  # a wrong entry is told here, not by a worker
    scenes = PreparedScenes(source, config, pyramid, True, teacher)
    count, num_threads = len(scenes), config.dataset.num_threads
    num_workers = config.dataset.get("num_workers", 0)
    order = grain.MapDataset.range(count).seed(config.seed).shuffle().repeat()
    rows = grain.MapDataset.source(_Positions(order, count)).map(lambda at: scenes.prepare(*at))
    stack = partial(stack_scenes, config=pyramid, teacher=teacher)
    batches = rows.batch(config.train.batch_size, drop_remainder=True, batch_fn=stack)[start_step:]
    # The buffer bounds how many batches are under way: with fewer than threads, the others would idle.
    ahead = max(num_threads, 2)
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead))
    if num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads its own flags; outside of a verb nobody has parsed any
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return _iterate(dataset)


def _iterate(dataset: Any) -> Iterator[Prepared]:
    """Ends threads and workers when the caller drops the iterator."""
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


class _Positions:
    """Position in the endless order -> (row of the dataset, epoch)."""

    def __init__(self, order, count: int):
        self._order, self._count = order, count

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> tuple[int, int]:
        return self._order[position], int(position) // self._count


def evaluation_batches(
    source: Any,
    config: Any,
    pyramid: AnyPyramidConfig,
    batch_size: int,
    teacher: InputConfig | None = None,
) -> Iterator[Prepared]:
    """Every scene once, in order; the last batch is filled with copies whose scene.mask is False.

    Arguments as in `train_batches`.
    """
    from concurrent.futures import ThreadPoolExecutor

    scenes = PreparedScenes(source, config, pyramid, False, teacher)
    count = len(scenes)
    starts = range(0, count, batch_size)

    def prepare(start: int):
        rows = np.arange(start, start + batch_size)
        prepared = [scenes.prepare(min(int(row), count - 1)) for row in rows]
        scene, *geometry = stack_scenes(prepared, pyramid, teacher)
        return scene._replace(mask=rows < count), *geometry

    num_threads = max(config.dataset.num_threads, 1)
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: collections.deque = collections.deque()
        for start in starts:
            waiting.append(pool.submit(prepare, start))
            if len(waiting) > num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def stack_scenes(
    prepared: Sequence[tuple], config: AnyPyramidConfig, teacher: InputConfig | None = None
) -> tuple:
    """Makes a batch.

    Args:
      prepared: scenes with their geometry, of `samples.scene_with_pyramid` or `PreparedScenes.prepare`.
      config: what the geometry was built with.
      teacher: what the teacher's input was made with, if there is one.

    Returns:
      Scene, geometry and, if there is one, the teacher's input, with a leading batch axis. Voxel pyramids are padded to the
      smallest capacities that hold all.

    Raises:
      ValueError: if a scene has more voxels than the largest capacities.
    """
    scenes, pyramids, *inputs = zip(*prepared, strict=True)
    parts = [scenes, _pad_pyramids(pyramids, config)]
    if teacher is not None:
        points, read = zip(*inputs[0], strict=True)
        padded = _pad_pyramids(read, teacher.pyramid)
        parts.append([NetworkInput(*pair) for pair in zip(points, padded, strict=True)])
    return stack_trees(list(zip(*parts, strict=True)))


def _pad_pyramids(pyramids: Sequence[Any], config: AnyPyramidConfig) -> Sequence[AnyPyramid]:
    return pad_voxel_pyramids(pyramids, config) if isinstance(config, VoxelPyramidConfig) else pyramids


def stack_trees(trees: list) -> Any:
    """Stacks equal trees of (named) tuples and arrays along a new first axis."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        parts = [stack_trees(list(column)) for column in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return np.stack(trees)
