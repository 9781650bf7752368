"""The protocol of repeated tests: a detector is trained several times, and each training is tested several times.

Every test draws other points of the scenes. Published results are the best and the mean of all of them (five trainings with
five tests each make 25). Where a network reads every point of a scene, tests of one training coincide.

Source: Group-Free-3D (2021), README; SR3D (2026), section 4.1.
"""

import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from vrdistill_jax.data.loader import evaluation_batches
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.evaluation.evaluator import evaluate
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.training.step import make_predict_step

METRICS = ("mAP@0.25", "mAP@0.5")
SEEDS_APART = 1000  # between the tests of one training, so that those of different trainings differ, too


class Summary(NamedTuple):
    """One metric over all tests."""

    best: float
    mean: float
    std: float | None  # over the means of the trainings; None for one training
    num_tests: int


def repeat_tests(workdir: str | pathlib.Path, record: dict[str, Any], num_tests: int) -> list[dict[str, Any]]:
    """Tests a trained run with other points of the scenes.

    Args:
      workdir: of the run.
      record: of the run; the evaluation at the end of its training is the first test.
      num_tests: wanted, those that the record has included.

    Returns:
      {"seed", "mAP@0.25", "mAP@0.5"} per test.
    """
    tests = list_tests(record)
    if len(tests) >= num_tests:
        return tests
    variables, config = load_inference_checkpoint(workdir)
    seed = config.seed
    detector = find_detector(config.detector.name)
    pyramid = detector.pyramid_config(config.detector)
    predict = make_predict_step(detector.build(config.detector), detector.decode, config.detector)
    source = open_source(config.dataset, "val")
    for number in range(len(tests), num_tests):
        config.seed = seed + number * SEEDS_APART  # decides which points of a scene are read
        batches = evaluation_batches(source, config, pyramid, config.train.eval_batch_size)
        result = evaluate(
            lambda *inputs: predict(variables, *inputs), batches, tuple(config.detector.class_names)
        )
        tests.append({"seed": config.seed} | {name: float(result[name]) for name in METRICS})
    return tests


def list_tests(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The tests of a run's record; a record of one test need not list it."""
    return record.get("tests") or [
        {"seed": record["config"]["seed"]} | {n: record["result"][n] for n in METRICS}
    ]


def summarize(records: Iterable[dict[str, Any]], metric: str) -> Summary | None:
    """Best and mean of a metric over all tests of some trainings; None without any."""
    scores = [[test[metric] for test in list_tests(record)] for record in records]
    if not scores:
        return None
    every = [score for of_training in scores for score in of_training]
    means = [float(np.mean(of_training)) for of_training in scores]
    std = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return Summary(max(every), float(np.mean(every)), std, len(every))
