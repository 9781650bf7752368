"""Measures a checkpoint on a labelled dataset.

python -m vrdistill_jax.evaluate --checkpoint=runs/synthrooms
python -m vrdistill_jax.evaluate --checkpoint=runs/synthrooms --split=train --json=train.json
"""

import json
import pathlib

from absl import flags

from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.loader import evaluation_batches
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.evaluation.average_precision import render_table
from vrdistill_jax.evaluation.evaluator import evaluate
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.training.step import make_predict_step

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's work directory or an imported checkpoint.")
_SPLIT = flags.DEFINE_enum("split", "val", ["train", "val"], "Which scenes.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the dataset lies, if not where the run had it.")
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")


def evaluate_checkpoint(checkpoint: str, split: str = "val", data_dir: str | None = None) -> dict:
    """Loads a checkpoint and evaluates it on the dataset that it was configured for.

    Args:
      checkpoint: folder of a run or of an imported checkpoint.
      split: "train" or "val".
      data_dir: overrides where the dataset is looked for.

    Returns:
      What AveragePrecision.compute returns.
    """
    variables, config = load_inference_checkpoint(checkpoint)
    if data_dir is not None:
        config.dataset.data_dir = data_dir
    detector = find_detector(config.detector.name)
    predict = make_predict_step(detector.build(config.detector), detector.decode, config.detector)
    source = open_source(config.dataset, split)
    pyramid = detector.pyramid_config(config.detector)
    batches = evaluation_batches(source, config, pyramid, config.train.eval_batch_size)
    return evaluate(
        lambda points, p: predict(variables, points, p), batches, tuple(config.detector.class_names)
    )


def main() -> int:
    """Prints the per-class table."""
    if _CHECKPOINT.value is None:
        raise ValueError("--checkpoint is needed, for example --checkpoint=runs/synthrooms")
    result = evaluate_checkpoint(_CHECKPOINT.value, _SPLIT.value, _DATA_DIR.value)
    print(render_table(result))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    run_verb(main)
