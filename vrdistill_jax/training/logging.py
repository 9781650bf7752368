"""What a run writes down: config.json, env.json, metrics.jsonl, optionally TensorBoard, and the progress bar."""

import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax
from tqdm import tqdm

import vrdistill_jax


class RunLog:
    """Metrics of a run, appended to workdir/metrics.jsonl (one JSON object per line) as they come.

    A resumed run drops the lines after the step that it resumes from, so that each step is there once.
    """

    def __init__(
        self, workdir: pathlib.Path, config: Any, start_step: int, num_steps: int, tensorboard: bool = False
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config.to_json(indent=2))
        (workdir / "env.json").write_text(json.dumps(describe_environment(), indent=2))
        path = workdir / "metrics.jsonl"
        kept = _lines_up_to(path, start_step)
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._writer = _open_tensorboard(workdir) if tensorboard else None
        interactive = sys.stderr.isatty()
        self.bar = tqdm(
            initial=start_step,
            total=num_steps,
            unit="step",
            mininterval=0.2 if interactive else 15,
            smoothing=0.05,
            dynamic_ncols=interactive,
        )

    def write(self, step: int, metrics: dict[str, float], prefix: str = "") -> None:
        """Appends one record; keys get `prefix`."""
        values = {prefix + name: float(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": time.time()} | values) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def show(self, metrics: dict[str, float]) -> None:
        """Puts values beside the progress bar."""
        self.bar.set_postfix({name: f"{float(value):.3g}" for name, value in metrics.items()}, refresh=False)

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        tqdm.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        """Ends the bar and the files."""
        self.bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def describe_environment() -> dict[str, Any]:
    """Versions, devices and revision that a result depends on."""
    try:
        root = pathlib.Path(vrdistill_jax.__file__).parent
        revision = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {
        "vrdistill_jax": vrdistill_jax.__version__,
        "revision": revision,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": [d.device_kind for d in jax.devices()],
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _lines_up_to(path: pathlib.Path, step: int) -> list[str]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the torn last line of a killed run
        if record["step"] <= step:
            lines.append(line)
    return lines


def _open_tensorboard(workdir: pathlib.Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "TensorBoard files need the extra: pip install 'vrdistill-jax[tensorboard]'"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"))
