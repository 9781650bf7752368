"""The table of readers, and the readers that break the rules: what watches over the others must notice."""

import functools
import os
import pathlib
import pickle
import signal

import numpy as np
from fuzz.checkpoint_samples import checkpoints, keras
from fuzz.dataset_samples import mmdet3d, scannet, sunrgbd
from fuzz.samples import EVIL, MIB, Reader
from fuzz.scan_samples import custom, scans


def broken() -> dict[str, Reader]:
    def unpickle(folder):
        return pickle.loads((folder / "a.bin").read_bytes())

    def evaluate(folder):
        return eval("__import__('os').system('true')")

    def loop(folder):
        while True:
            pass

    def hoard(folder):
        return len(b"x" * (200 * MIB))

    def ask_for_everything(folder):
        try:
            return np.ones(1 << 45)
        except MemoryError as error:
            raise ValueError(f"{folder}: too large") from error

    def stumble(folder):
        raise KeyError(folder)

    def crash(folder):
        os.kill(os.getpid(), signal.SIGSEGV)

    def leave(folder):
        os._exit(0)

    def stay_vague(folder):
        raise ValueError("the file is damaged")

    def paint(folder):
        raise ValueError(f"{folder}: \x1b[31m")

    def warn(folder):
        return np.array([1e300]).astype(np.float32)

    def write(folder):
        (folder / "new").write_text("x")

    def wander(folder):
        return pathlib.Path("/etc/passwd").read_bytes()

    def inflate(folder):
        return np.zeros(10 * MIB, np.uint8)

    def accept(folder):
        return None

    table = [
        unpickle,
        evaluate,
        loop,
        hoard,
        ask_for_everything,
        stumble,
        crash,
        leave,
        stay_vague,
        paint,
        warn,
    ]
    table += [write, wander, inflate, accept]
    hostile: dict[str, dict[str, bytes | None]] = {"! anything": {"a.bin": EVIL}}
    return {read.__name__: Reader({"a.bin": EVIL}, read, hostile=hostile, warm_up=False) for read in table}


GROUPS = {
    "points": scans,
    "custom": custom,
    "scannet": scannet,
    "sunrgbd": sunrgbd,
    "mmdet3d": mmdet3d,
    "torch": checkpoints,
    "keras": keras,
}


@functools.cache
def make_group(name: str) -> dict[str, Reader]:
    """The readers of a group by name."""
    return broken() if name == "broken" else GROUPS[name]()
