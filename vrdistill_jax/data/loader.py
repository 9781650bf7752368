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
from vrdistill_jax.data.samples import labelled_scene, scene_with_pyramid
from vrdistill_jax.geometry.host.voxel_pyramid import pad_voxel_pyramids
from vrdistill_jax.structs import AnyPyramid, AnyPyramidConfig, Scene, VoxelPyramidConfig


class PreparedScenes:
    """A random-access sequence of prepared scenes: what Grain's threads call.

    Attributes:
      source: sequence of sample dicts.
      config: the whole config.
      pyramid: what is computed per cloud.
      train: whether to augment, and to draw other points in each epoch.
    """

    def __init__(self, source: Any, config: Any, pyramid: AnyPyramidConfig, train: bool):
        self.source, self.config, self.pyramid, self.train = source, config, pyramid, train

    def __len__(self) -> int:
        return len(self.source)

    def prepare(self, index: int, epoch: int = 0) -> tuple[Scene, AnyPyramid]:
        """One scene; evaluation draws the same points of a scene whenever it is read."""
        seed = [self.config.seed, self.train, epoch if self.train else 0, index]
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        scene = labelled_scene(self.source[index], index, self.config, rng, self.train)
        return scene_with_pyramid(scene, self.pyramid)


def train_batches(
    source: Any, config: Any, pyramid: AnyPyramidConfig, start_step: int = 0
) -> Iterator[tuple[Scene, AnyPyramid]]:
    """Endless shuffled, augmented batches.

    Args:
      source: sequence of sample dicts.
      config: the whole config: `seed`, `train.batch_size`, what `labelled_scene` reads, `dataset.num_threads` (batches made
        at a time) and `dataset.num_workers` (processes that each do that; 0 for threads of this process). Neither changes
        what is delivered.
      pyramid: what is computed per cloud.
      start_step: number of batches to skip, for a resumed run.

    Returns:
      An iterator over (Scene, PointPyramid) with a leading batch axis.

    Raises:
      ValueError: for an impossible `dataset.augment`.
    """
    import grain  # slow to import, and only training needs it

    read_augmentation(config.dataset.augment)  # a wrong entry is told here, not by a worker
    scenes = PreparedScenes(source, config, pyramid, train=True)
    count, num_threads = len(scenes), config.dataset.num_threads
    num_workers = config.dataset.get("num_workers", 0)
    order = grain.MapDataset.range(count).seed(config.seed).shuffle().repeat()
    rows = grain.MapDataset.source(_Positions(order, count)).map(lambda at: scenes.prepare(*at))
    stack = partial(stack_scenes, config=pyramid)
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


def _iterate(dataset: Any) -> Iterator[tuple[Scene, AnyPyramid]]:
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
    source: Any, config: Any, pyramid: AnyPyramidConfig, batch_size: int
) -> Iterator[tuple[Scene, AnyPyramid]]:
    """Every scene once, in order; the last batch is filled with copies whose scene.mask is False.

    Arguments as in `train_batches`.
    """
    from concurrent.futures import ThreadPoolExecutor

    scenes = PreparedScenes(source, config, pyramid, train=False)
    count = len(scenes)
    starts = range(0, count, batch_size)

    def prepare(start: int):
        rows = np.arange(start, start + batch_size)
        scene, built = stack_scenes([scenes.prepare(min(int(row), count - 1)) for row in rows], pyramid)
        return scene._replace(mask=rows < count), built

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
    prepared: Sequence[tuple[Scene, AnyPyramid]], config: AnyPyramidConfig
) -> tuple[Scene, AnyPyramid]:
    """Makes a batch.

    Args:
      prepared: scenes with their geometry, of `samples.scene_with_pyramid`.
      config: what the geometry was built with.

    Returns:
      Scene and geometry with a leading batch axis. Voxel pyramids are padded to the smallest capacities that hold all.

    Raises:
      ValueError: if a scene has more voxels than the largest capacities.
    """
    scenes, pyramids = zip(*prepared, strict=True)
    if isinstance(config, VoxelPyramidConfig):
        pyramids = tuple(pad_voxel_pyramids(pyramids, config))
    return stack_trees(list(zip(scenes, pyramids, strict=True)))


def stack_trees(trees: list) -> Any:
    """Stacks equal trees of (named) tuples and arrays along a new first axis."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        parts = [stack_trees(list(column)) for column in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return np.stack(trees)
