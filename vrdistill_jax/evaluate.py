"""Measures a checkpoint on a labelled dataset.

python -m vrdistill_jax.evaluate --checkpoint=runs/synthrooms
python -m vrdistill_jax.evaluate --checkpoint=runs/synthrooms --split=train --json=result.json
python -m vrdistill_jax.evaluate --checkpoint=runs/synthrooms --dataset=scannet --data_dir=datasets
python -m vrdistill_jax.evaluate --checkpoint=runs/vrdistill_half --analysis
"""

import json
import pathlib
import shlex
import sys

from absl import flags

from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.loader import evaluation_batches
from vrdistill_jax.data.sources import open_source
from vrdistill_jax.detectors import find_detector
from vrdistill_jax.evaluation.average_precision import render_table
from vrdistill_jax.evaluation.evaluator import evaluate
from vrdistill_jax.experiments.analysis import analyse_run
from vrdistill_jax.recipes import densify
from vrdistill_jax.training.checkpoint import load_inference_checkpoint
from vrdistill_jax.training.logging import describe_environment
from vrdistill_jax.training.step import make_predict_step


def evaluate_checkpoint(
    checkpoint: str,
    split: str = "val",
    dataset: str | None = None,
    data_dir: str | None = None,
    density: int = 1,
) -> dict:
    """Loads a checkpoint and evaluates it.

    Args:
      checkpoint: folder of a run or of an imported checkpoint.
      split: "train" or "val".
      dataset: name of a dataset with the detector's classes; None for the one that it was trained on.
      data_dir: overrides where the dataset is looked for.
      density: how many times more points, centres and proposals than in training; see `recipes.densify`.

    Returns:
      What AveragePrecision.compute returns.

    Raises:
      ValueError: if the dataset's classes are not the detector's.
    """
    variables, config = load_inference_checkpoint(checkpoint)
    densify(config, density)
    if dataset is not None:
        config.dataset.name = dataset
    if data_dir is not None:
        config.dataset.data_dir = data_dir
    detector = find_detector(config.detector.name)
    predict = make_predict_step(detector.build(config.detector), detector.decode, config.detector)
    source = open_source(config.dataset, split)
    names = tuple(config.detector.class_names)
    found = tuple(getattr(source, "class_names", names))
    if found != names:
        raise ValueError(f"the dataset has the classes {found}, but the detector knows {names}")
    pyramid = detector.pyramid_config(config.detector)
    batches = evaluation_batches(source, config, pyramid, config.train.eval_batch_size)
    return evaluate(lambda points, geometry: predict(variables, points, geometry), batches, names)


def define_flags() -> None:
    """Declares the verb's flags; not at import, because other verbs use the same names."""
    flags.DEFINE_string("checkpoint", None, "A run's work directory or an imported checkpoint.")
    flags.DEFINE_enum("split", "val", ["train", "val"], "Which scenes.")
    flags.DEFINE_string("dataset", None, "Another dataset with the same classes, such as scannet.")
    flags.DEFINE_string("data_dir", None, "Where the dataset lies, if not where the run had it.")
    flags.DEFINE_integer("density", 1, "How many times more points the detector reads than in training.", 1)
    flags.DEFINE_bool(
        "analysis",
        False,
        "Also measure where votes are, how far a student agrees with its teacher, and recall by size of object.",
    )
    flags.DEFINE_string("json", None, "Also write the result to this file.")


def main() -> int:
    """Prints the per-class table."""
    options = flags.FLAGS
    if options.checkpoint is None:
        raise ValueError("--checkpoint is needed, for example --checkpoint=runs/synthrooms")
    result = evaluate_checkpoint(
        options.checkpoint, options.split, options.dataset, options.data_dir, options.density
    )
    print(render_table(result))
    if options.analysis:
        if options.density != 1:
            raise ValueError(f"--analysis reads clouds as in training; leave out --density={options.density}")
        result["analysis"] = analyse_run(options.checkpoint, options.split, options.dataset, options.data_dir)
        print(json.dumps(result["analysis"], indent=1))
    if options.json:
        write_result(options.json, options.checkpoint, result)
    return 0


def write_result(path: str, checkpoint: str, result: dict) -> None:
    """Writes a result as JSON, with what is needed to make it again."""
    _, config = load_inference_checkpoint(checkpoint)
    record = {
        "command": shlex.join(["python", "-m", "vrdistill_jax.evaluate", *sys.argv[1:]]),
        "environment": describe_environment(),
        "config": json.loads(config.to_json()),
        "result": result,
    }
    text = json.dumps(record, indent=1).replace(": NaN", ": null")  # NaN (nothing to find) is not JSON
    pathlib.Path(path).write_text(text + "\n")


if __name__ == "__main__":
    define_flags()
    run_verb(main)
