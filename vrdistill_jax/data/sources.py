"""Datasets by name: sequences of sample dicts (see `data.augment` for their fields)."""

from collections.abc import Sequence
from typing import Any


def open_source(config: Any, split: str) -> Sequence[dict]:
    """Opens (and where it can be made, makes) a dataset.

    Args:
      config: config.dataset; `name` picks the dataset.
      split: "train" or "val".

    Returns:
      A sequence with len() and [i], safe to read from several threads.

    Raises:
      ValueError: for an unknown name or split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; known: train, val")
    if config.name not in SOURCES:
        raise ValueError(f"unknown dataset {config.name!r}; known: {', '.join(sorted(SOURCES))}")
    return SOURCES[config.name](config, split)


def _open_synthrooms(config: Any, split: str) -> Sequence[dict]:
    from vrdistill_jax.data.builders import open_split, prepare_synthrooms
    from vrdistill_jax.data.synthrooms import SynthRoomsConfig

    rooms = SynthRoomsConfig(style=config.style, num_train=config.num_train, num_val=config.num_val)
    return open_split(prepare_synthrooms(rooms, config.data_dir or None), split)


def _open_prepared(config: Any, split: str) -> Sequence[dict]:
    from vrdistill_jax.data.builders import open_split

    if not config.data_dir:
        raise ValueError("config.dataset.data_dir is empty; name the folder that a data_prep verb wrote")
    return open_split(config.data_dir, split)


SOURCES = {"synthrooms": _open_synthrooms, "prepared": _open_prepared}
