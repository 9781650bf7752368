"""Timing: how often, what is kept of it, and on which machine."""

import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from vrdistill_jax.training.logging import describe_environment


class Effort(NamedTuple):
    """How long a stage is measured.

    Attributes:
      seconds: of timed calls per stage.
      min_calls: timed calls, however long they take.
      max_calls: timed calls, however short they are.
      quick: small inputs, for a look at whether everything runs; such figures mean nothing.
    """

    seconds: float = 4.0
    min_calls: int = 5
    max_calls: int = 200
    quick: bool = False


QUICK = Effort(seconds=0.1, min_calls=3, max_calls=20, quick=True)


class Recorder:
    """Times stages, prints a line for each and keeps the rows.

    Attributes:
      effort: how long each stage is measured.
      rows: one dict per stage; their fields are described in vrdistill_jax.benchmark.
      skipped: what could not be measured, and why.
      failures: what was measured but does not compute what it should.
    """

    def __init__(self, effort: Effort, say: Callable[[str], None] = print):
        """Keeps rows of `effort`; `say` receives the progress lines."""
        self.effort, self.say = effort, say
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.failures: list[str] = []

    def time(
        self, suite: str, case: str, stage: str, function: Callable[[], Any], *, scenes: int = 0, **more: Any
    ) -> dict[str, Any]:
        """Measures one stage.

        Args:
          suite: name of the suite.
          case: what the stage belongs to, for example "width 1, 20000 points".
          stage: what is timed.
          function: without arguments; its result is waited for.
          scenes: clouds that one call handles; adds `scenes_per_s`.
          **more: further fields of the row.

        Returns:
          The row, which is also kept; the caller may add fields.
        """
        return self._keep(suite, case, stage, measure(function, self.effort), scenes, more)

    def time_in_turn(
        self, suite: str, case: str, stages: dict[str, Callable[[], Any]], *, scenes: int = 0
    ) -> dict[str, dict[str, Any]]:
        """Measures several stages in turn (see `measure_in_turn`); returns their rows by stage."""
        measured = measure_in_turn(stages, self.effort)
        return {stage: self._keep(suite, case, stage, row, scenes, {}) for stage, row in measured.items()}

    def _keep(self, suite: str, case: str, stage: str, measured: dict, scenes: int, more: dict) -> dict:
        row = {"suite": suite, "case": case, "stage": stage} | measured
        if scenes:
            row["scenes_per_s"] = _round(1e3 * scenes / row["p50_ms"])
        row |= more
        self.rows.append(row)
        self.say(f"  {suite:10s} {case:28s} {stage:34s} {row['p50_ms']:10.2f} ms  (min {row['min_ms']:.2f})")
        return row

    def skip(self, suite: str, stage: str, reason: str) -> None:
        """Notes that something was not measured."""
        self.skipped.append({"suite": suite, "stage": stage, "reason": reason})
        self.say(f"  {suite:10s} {stage}: {reason}")


def measure(function: Callable[[], Any], effort: Effort) -> dict[str, Any]:
    """Calls a function twice to compile and warm up, then times it call by call.

    Args:
      function: without arguments; JAX arrays in its result are waited for inside the timed span.
      effort: how often.

    Returns:
      p50_ms, p95_ms and min_ms of the wall clock; cpu_ms, the least processor time of all threads that a call took;
      calls, their number.
    """
    return measure_in_turn({"": function}, effort)[""]


def measure_in_turn(functions: dict[str, Callable[[], Any]], effort: Effort) -> dict[str, dict[str, Any]]:
    """Times several functions in turn, call by call: what else the machine does then hits all of them alike.

    Args:
      functions: by name, as for `measure`.
      effort: how often each of them.

    Returns:
      What `measure` returns, by name.
    """
    for function in functions.values():
        for _ in range(2):
            jax.block_until_ready(function())
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    seconds, calls = effort.seconds * len(functions), 0
    began = time.perf_counter()
    while calls < effort.min_calls or (calls < effort.max_calls and time.perf_counter() - began < seconds):
        calls += 1
        for name, function in functions.items():
            cpu_begin, begin = time.process_time(), time.perf_counter()
            jax.block_until_ready(function())
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - cpu_begin)
    return {
        name: {
            "p50_ms": _round(1e3 * np.percentile(wall[name], 50)),
            "p95_ms": _round(1e3 * np.percentile(wall[name], 95)),
            "min_ms": _round(1e3 * min(wall[name])),
            "cpu_ms": _round(1e3 * min(cpu[name])),
            "calls": calls,
        }
        for name in functions
    }


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """Adds to the peer's row how many times longer than ours it takes, at the median and at the minimum."""
    peer["ratio"] = _round(peer["p50_ms"] / ours["p50_ms"])
    peer["ratio_of_minima"] = _round(peer["min_ms"] / ours["min_ms"])


def describe_machine() -> dict[str, Any]:
    """What a figure depends on besides the code: describe_environment plus processor, cores, threads, current load."""
    threads = (
        "NPROC",
        "OMP_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "XLA_FLAGS",
        "GLIBC_TUNABLES",
        "MALLOC_MMAP_MAX_",
    )
    return describe_environment() | {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "variables": {name: os.environ[name] for name in threads if name in os.environ},
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _round(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
