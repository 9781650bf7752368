"""Measures speed and memory on this machine.

    python -m vrdistill_jax.benchmark
    python -m vrdistill_jax.benchmark --suite=votenet --json=votenet.json

Suites: pyramid (sampling and neighbour search, host and device), votenet (cloud to boxes at batch 1, three widths),
train_step (configs/synthrooms.py, batch 8), distill_step (VRDistill's step beside the teacher's forward pass and the plain
step, timed in turn), peers (the same work by torch, scipy and fpsample, where installed). Only on request: loader (from a
stored scene to the network's input), sparse (TR3D, and single sparse convolutions beside spconv), attention (what dropout of
its weights costs), train_step_full (train_step at VoteNet's published size). Needs no download: it measures on procedural
rooms; --cloud=FILE gives sparse a scan of yours.

Every stage is called twice to compile and warm up, then timed call by call until --seconds have passed; JAX results are
waited for. The file of --json holds
  schema        1
  date, command, seconds, quick
  environment   versions, processor, cores, memory, environment variables that set threads or memory
  load_average  [before, after], 1, 5 and 15 minutes: figures of a busy machine are upper bounds
  rows          one per stage: suite, case, stage, p50_ms, p95_ms, min_ms (wall clock), cpu_ms (least processor time of
                all threads), calls; where they apply scenes_per_s (at the median), memory_mib (arguments, results and
                temporaries of the compiled step), peak_memory_mib (the most that the process has held so far),
                parameters, cloud_points (before subsampling), fine_rows (voxels of TR3D's finest output), ratio_to_sum
                (distillation step / its two parts), and for peers ratio and ratio_of_minima (peer's time / ours) and
                share_same (outputs that agree with ours)
  skipped       suite, stage, reason
  failures      messages; the verb then exits with 1
"""

import datetime
import json
import pathlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from absl import flags

from vrdistill_jax.benchmarks import (
    attention,
    distill_step,
    loader,
    peers,
    pyramid,
    sparse,
    train_step,
    votenet,
)
from vrdistill_jax.benchmarks.recorder import QUICK, Effort, Recorder, describe_machine
from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.point_checks import check_points
from vrdistill_jax.data.point_files import read_points

SUITES: dict[str, Callable[[Recorder], None]] = {
    "pyramid": pyramid.run,
    "votenet": votenet.run,
    "train_step": train_step.run,
    "distill_step": distill_step.run,
    "peers": peers.run,  # after our own suites: torch keeps threads once it is imported
    "loader": loader.run,
    "sparse": sparse.run,
    "attention": attention.run,
    "train_step_full": partial(train_step.run, size="full"),
}
DEFAULT_SUITES = ("pyramid", "votenet", "train_step", "distill_step", "peers")


def benchmark(
    suites: tuple[str, ...] = DEFAULT_SUITES, effort: Effort | None = None, cloud: np.ndarray | None = None
) -> dict[str, Any]:
    """Runs suites and prints a line per stage as it goes.

    Args:
      suites: names of SUITES.
      effort: how long each stage is measured; None for the default.
      cloud: f32[n, 3] metres, what suite sparse measures on; None for a generated room.

    Returns:
      What --json holds.

    Raises:
      ValueError: for an unknown suite.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"unknown suite {unknown[0]!r}; known: {', '.join(SUITES)}")
    recorder = Recorder(effort or Effort())
    environment = describe_machine()
    for name in suites:
        recorder.say(f"{name}:")
        if name == "sparse":
            sparse.run(recorder, cloud)
        else:
            SUITES[name](recorder)
    return {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seconds": recorder.effort.seconds,
        "quick": recorder.effort.quick,
        "load_average": [environment.pop("load_average"), describe_machine()["load_average"]],
        "environment": environment,
        "rows": recorder.rows,
        "skipped": recorder.skipped,
        "failures": recorder.failures,
    }


def render(result: dict[str, Any]) -> str:
    """The table that the verb prints."""
    machine = result["environment"]
    lines = [
        f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores, {', '.join(machine['devices'])}; "
        f"jax {machine['jax']}; load average {result['load_average'][0][0]} before, {result['load_average'][1][0]} after",
        f"{'':47s}{'p50 ms':>10s}{'p95 ms':>10s}{'min ms':>10s}{'cpu ms':>10s}{'calls':>7s}",
    ]
    title = None
    for row in result["rows"]:
        if title != (title := (row["suite"], row["case"])):
            lines.append(f"{row['suite']}: {row['case']}")
        times = "".join(f"{row[name]:10.2f}" for name in ("p50_ms", "p95_ms", "min_ms", "cpu_ms"))
        notes = [
            text.format(row[name])
            for name, text in (
                ("scenes_per_s", "{:.1f} scenes/s"),
                ("memory_mib", "{:.0f} MiB"),
                ("peak_memory_mib", "process: {:.0f} MiB at most"),
                ("ratio", "{:.2f} x ours"),
                ("ratio_of_minima", "(minima {:.2f} x)"),
                ("ratio_to_sum", "{:.2f} x the two above"),
            )
            if row.get(name) is not None
        ]
        lines.append(f"  {row['stage']:45s}{times}{row['calls']:7d}  {' '.join(notes)}".rstrip())
    lines += [f"skipped {entry['suite']} {entry['stage']}: {entry['reason']}" for entry in result["skipped"]]
    if result["quick"]:
        lines.append("quick run: small inputs, few calls; these figures say only that everything runs")
    return "\n".join(lines)


def define_flags() -> None:
    """Declares the verb's flags; not at import, because other verbs use the same names."""
    flags.DEFINE_enum("suite", None, list(SUITES), f"Which suite; by default {', '.join(DEFAULT_SUITES)}.")
    flags.DEFINE_string("json", None, "Also write the result to this file.")
    flags.DEFINE_string("cloud", None, "A scan for suite sparse, read as predict reads it.")
    flags.DEFINE_float("seconds", Effort().seconds, "Timed seconds per stage.", 0.0)
    flags.DEFINE_bool("quick", False, "Small inputs and few calls, to see that everything runs.")


def main() -> int:
    """Measures, prints the table, writes the file."""
    options = flags.FLAGS
    output = pathlib.Path(options.json) if options.json else None
    if output and not output.parent.is_dir():
        raise ValueError(f"--json={output}: the folder {output.parent} does not exist")
    effort = QUICK if options.quick else Effort(seconds=options.seconds)
    if options.cloud and options.suite != "sparse":
        raise ValueError("--cloud goes with --suite=sparse; the other suites measure on generated rooms")
    cloud = check_points(read_points(options.cloud)).cloud.xyz if options.cloud else None
    result = benchmark((options.suite,) if options.suite else DEFAULT_SUITES, effort, cloud)
    print("\n" + render(result))
    if output:
        output.write_text(json.dumps(result, indent=1))
    for message in result["failures"]:
        print(f"failed: {message}", file=sys.stderr)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    define_flags()
    run_verb(main, large_memory=True)  # train_step is to be measured as train runs it
