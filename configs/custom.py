"""VoteNet on your own scans, prepared by data_prep.custom.

    python -m data_prep.custom --input=my_scans --output=datasets/my_rooms
    python -m vrdistill_jax.train --config=configs/custom.py:datasets/my_rooms

Class names, mean sizes and whether boxes are turned come from the prepared folder. The model is that of
configs/synthrooms.py, sized for two CPU cores; train longer (--config.train.num_steps) with many scans.
"""

import json
import pathlib

from ml_collections import ConfigDict

from vrdistill_jax.recipes import Task, votenet_config


def get_config(dataset_dir: str = "") -> ConfigDict:
    if not dataset_dir:
        raise ValueError("name the dataset: --config=configs/custom.py:FOLDER, as data_prep.custom wrote it")
    directory = pathlib.Path(dataset_dir).expanduser().absolute()
    try:
        summary = json.loads((directory / "mean_sizes.json").read_text())
    except OSError as error:
        raise ValueError(
            f"{directory} has no mean_sizes.json; make it with python -m data_prep.custom"
        ) from error
    task = Task(
        tuple(summary["class_names"]),
        tuple(tuple(float(x) for x in row) for row in summary["mean_sizes"]),
        oriented=bool(summary["oriented"]),
    )
    config = votenet_config(task, "small")
    config.dataset.name = "prepared"
    config.dataset.data_dir = str(directory)
    config.dataset.max_boxes = max(64, summary["max_boxes"])
    config.train.batch_size = min(config.train.batch_size, summary["scenes"]["train"])
    return config
