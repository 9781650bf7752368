"""Datasets by name: sequences of sample dicts (see `data.augment` for their fields)."""

import pathlib
from collections.abc import Callable, Sequence
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
    from vrdistill_jax.data.builders import open_split
    from vrdistill_jax.data.synthrooms import SynthRoomsConfig, prepare_synthrooms

    rooms = SynthRoomsConfig(
        style=config.style,
        num_train=config.num_train,
        num_val=config.num_val,
        room_size=config.get("room_size", 1.0),  # older checkpoints do not name it
    )
    return open_split(prepare_synthrooms(rooms, config.data_dir or None), split)


def _open_prepared(config: Any, split: str) -> Sequence[dict]:
    from vrdistill_jax.data.builders import open_split

    if not config.data_dir:
        raise ValueError("config.dataset.data_dir is empty; name the folder that a data_prep verb wrote")
    return open_split(config.data_dir, split)


def _open_converted(folder: str, verb: str, guide: str) -> Callable[[Any, str], Sequence[dict]]:
    """An opener of DATA_DIR/folder, as a data_prep verb writes it; says how to make it where it is missing."""

    def open_it(config: Any, split: str) -> Sequence[dict]:
        from vrdistill_jax.data.builders import default_data_dir, open_split

        root = pathlib.Path(config.data_dir).expanduser() if config.data_dir else default_data_dir()
        if not (root / folder).is_dir():
            raise ValueError(
                f"no prepared dataset {root / folder}. Make it with\n  python -m data_prep.{verb} --raw=DOWNLOAD "
                f"--output={root}\n({guide} says how to get the data), or name another folder with "
                "--config.dataset.data_dir=DIR"
            )
        return open_split(root / folder, split)

    return open_it


SOURCES = {
    "synthrooms": _open_synthrooms,
    "scannet": _open_converted("scannet", "scannet", "docs/datasets.md"),
    "sunrgbd": _open_converted("sunrgbd_v1", "sunrgbd", "docs/datasets_sunrgbd.md"),
    "sunrgbd_v2": _open_converted("sunrgbd_v2", "sunrgbd", "docs/datasets_sunrgbd.md"),
    "prepared": _open_prepared,
}
