"""Batches of prepared scenes, from Grain.

Everything about batch k follows from (seed, k): the shuffle, the points taken, the augmentation. So a run resumes by
starting the pipeline at its step; there is no iterator state to save.
"""

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np

from vrdistill_jax.data.samples import labelled_scene, scene_with_pyramid
from vrdistill_jax.structs import PointPyramid, PyramidConfig, Scene


class PreparedScenes:
    """A random-access sequence of prepared scenes: what Grain's threads call.

    Attributes:
      source: sequence of sample dicts.
      config: the whole config.
      pyramid: what is computed per cloud.
      train: whether to augment, and to draw other points in each epoch.
    """

    def __init__(self, source: Any, config: Any, pyramid: PyramidConfig, train: bool):
        self.source, self.config, self.pyramid, self.train = source, config, pyramid, train

    def __len__(self) -> int:
        return len(self.source)

    def prepare(self, index: int, epoch: int = 0) -> tuple[Scene, PointPyramid]:
        """One scene; evaluation draws the same points of a scene whenever it is read."""
        seed = [self.config.seed, self.train, epoch if self.train else 0, index]
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        scene = labelled_scene(self.source[index], index, self.config, rng, self.train)
        return scene_with_pyramid(scene, self.pyramid)


def train_batches(
    source: Any, config: Any, pyramid: PyramidConfig, start_step: int = 0
) -> Iterator[tuple[Scene, PointPyramid]]:
    """Endless shuffled, augmented batches.

    Args:
      source: sequence of sample dicts.
      config: the whole config: `seed`, `train.batch_size`, `dataset.num_threads`, ....
      pyramid: what is computed per cloud.
      start_step: number of batches to skip, for a resumed run.

    Returns:
      An iterator over (Scene, PointPyramid) with a leading batch axis.
    """
    import grain  # slow to import, and only training needs it

    scenes = PreparedScenes(source, config, pyramid, train=True)
    count = len(scenes)
    order = grain.MapDataset.range(count).seed(config.seed).shuffle().repeat()
    rows = grain.MapDataset.source(_Positions(order, count)).map(lambda at: scenes.prepare(*at))
    batches = rows.batch(config.train.batch_size, drop_remainder=True)[start_step:]
    threads = grain.ReadOptions(num_threads=config.dataset.num_threads, prefetch_buffer_size=2)
    return iter(batches.to_iter_dataset(threads))


class _Positions:
    """Position in the endless order -> (row of the dataset, epoch)."""

    def __init__(self, order, count: int):
        self._order, self._count = order, count

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> tuple[int, int]:
        return self._order[position], int(position) // self._count


def evaluation_batches(
    source: Any, config: Any, pyramid: PyramidConfig, batch_size: int
) -> Iterator[tuple[Scene, PointPyramid]]:
    """Every scene once, in order; the last batch is filled with copies whose scene.mask is False.

    Arguments as in `train_batches`.
    """
    from concurrent.futures import ThreadPoolExecutor

    scenes = PreparedScenes(source, config, pyramid, train=False)
    count = len(scenes)
    starts = range(0, count, batch_size)

    def prepare(start: int):
        rows = np.arange(start, start + batch_size)
        batch = stack_trees([scenes.prepare(min(int(row), count - 1)) for row in rows])
        scene, built = batch
        return scene._replace(mask=rows < count), built

    with ThreadPoolExecutor(max(config.dataset.num_threads, 1)) as pool:
        ahead = collections.deque(pool.submit(prepare, start) for start in starts[:2])
        for start in [*starts[2:], None, None]:
            if not ahead:
                return
            yield ahead.popleft().result()
            if start is not None:
                ahead.append(pool.submit(prepare, start))


def stack_trees(trees: list) -> Any:
    """Stacks equal trees of (named) tuples and arrays along a new first axis."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, tuple):
        parts = [stack_trees(list(column)) for column in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return np.stack(trees)
