"""Runs seeded cases of readers in a process of its own, and writes down what each gave.

    python tests/fuzz/worker.py PLAN.json

The plan has `groups` of readers, the `folder` to work in, the `log`, the `count` of cases of each reader
(`all_hostile` adds the hand-made ones beyond it), and where to begin (`first`, by reader; 0). A case is a reader and
a number. The log gets a JSON line before each case and one after it, so that a case that ends the process is known.

No limit is left to the reader's good will: processor time by a signal, wall time by one that
nobody handles, memory by the kernel and by the process's own peak, and whatever opens, imports or starts something it
should not is reported by the interpreter's audit events.
"""

import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

import numpy as np  # noqa: E402
from fuzz import file_mutations, mutations, readers, samples  # noqa: E402

CPU_SECONDS = 5.0  # of a case; a plan may set it
WALL_SECONDS = 120.0
ADDRESS_SPACE = 3 << 30  # on top of what the process has
RESULT_BYTES = (4 << 20, 300)  # of a result: constant, and per byte of the files
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pty.spawn",
    "socket.",
    "ctypes.",
)
FORBIDDEN += ("pickle.find_class", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.chmod", "os.link")
FORBIDDEN += ("os.symlink", "os.truncate", "os.putenv", "webbrowser.", "urllib.", "ftplib.", "builtins.input")


class TooSlow(BaseException):
    """Not an Exception, which a reader might take for a damaged file."""


class Watch:
    """What the interpreter reports while a reader runs."""

    def __init__(self):
        self.folder: pathlib.Path | None = None
        self.seen: list[str] = []
        self.allowed = [os.path.realpath(p) for p in {sys.prefix, sys.base_prefix, str(ROOT)}]

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = (*arguments, None, None)[:3]
            if isinstance(path, int):
                return
            written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            real = os.path.realpath(os.fsdecode(path))
            inside = real == str(self.folder) or real.startswith(str(self.folder) + os.sep)
            if (written and "__pycache__" not in real) or not (
                inside or any(real.startswith(a) for a in self.allowed)
            ):
                self.seen.append(f"open {real!a} mode {mode}")
        elif event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(arguments)[:200]}")


def run_case(name: str, reader: samples.Reader, number: int, folder: pathlib.Path, watch: Watch) -> dict:
    """Damages the files, reads them, puts them back."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), number])
    changed, kind = damaged_files(reader, number, rng)
    try:
        for path, content in changed.items():
            replace(folder / path, content)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        outcome = call(reader, folder, size, watch)
    finally:
        for path in changed:
            replace(folder / path, reader.files[path])
    if kind.startswith("! ") and not outcome["message"] and not outcome["problem"]:
        outcome["problem"] = "was accepted"
    return {"kind": kind, **outcome}


def replace(path: pathlib.Path, content: bytes | str | None) -> None:
    """Puts a file, a folder ("folder") or nothing (None) at a path."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()


def damaged_files(reader: samples.Reader, number: int, rng) -> tuple[dict[str, bytes | str | None], str]:
    """Case 0 is the intact sample; of the next ones every other is hand-made, as long as there are any."""
    hostile = sorted(reader.hostile)
    if number == 0:
        return {}, "intact"
    if number % 2 and number // 2 < len(hostile):
        return dict(reader.hostile[hostile[number // 2]]), hostile[number // 2]
    names = list(reader.targets or reader.files)
    chosen = [mutations.pick(rng, names)]
    if len(names) > 1 and rng.random() < 0.15:
        chosen.append(mutations.pick(rng, names))
    everything = list(reader.files.values())
    changed: dict[str, bytes | str | None] = {}
    for name in chosen:
        other = mutations.pick(rng, everything)
        if rng.random() < 0.02:
            changed[name] = mutations.pick(rng, [None, "folder", b"", other])
        else:
            changed[name] = file_mutations.damage_file(name, reader.files[name], rng, other)
    return changed, "random: " + ", ".join(changed)


def call(reader: samples.Reader, folder: pathlib.Path, size: int, watch: Watch) -> dict:
    """Calls the reader under all limits; "problem" is set if it broke a rule."""
    before = reset_peak()
    watch.seen, watch.folder = [], folder
    problem, message, result = "", "", None
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(
        signal.ITIMER_REAL, WALL_SECONDS
    )  # not handled: the kernel ends the process, whatever it does
    try:
        with (
            warnings.catch_warnings()
        ):  # a damaged number must not reach the user as a warning of NumPy either
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            result = reader.read(folder)
    except ValueError as error:
        message = str(error)
        problem = problem_of_error(error, message, folder, reader)
    except TooSlow as error:
        problem = f"took more than {CPU_SECONDS} s at {where(error)}"
    except BaseException as error:  # noqa: BLE001 - that is the question
        problem = f"raised {type(error).__name__}: {str(error)[:300]!a} at {where(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.folder = None
    seconds, peak = time.process_time() - start, peak_memory() - before
    if watch.seen:
        problem = f"did what no reader may: {watch.seen[:3]}"
    if os.path.lexists("MARK"):
        problem = "ran code of the file"
        os.unlink("MARK")
    if not problem and peak > reader.memory:
        problem = f"took {peak >> 20} MiB for files of {size} bytes ({message[:100]!a})"
    if not problem and result is not None:
        taken = count_bytes(result)
        if taken > RESULT_BYTES[0] + RESULT_BYTES[1] * size:
            problem = f"gave {taken} bytes for files of {size}"
    return {"message": message[:300], "problem": problem, "seconds": seconds, "peak": max(peak, 0)}


def problem_of_error(error: ValueError, message: str, folder: pathlib.Path, reader: samples.Reader) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"asked for more memory than there is: {message[:200]!a}"
        cause = cause.__cause__
    if reader.names_file and str(folder) not in message:
        return f"names no file: {message[:300]!a} at {where(error)}"
    try:
        samples.check_message(message)
    except AssertionError as found:
        return str(found)
    return ""


def where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/data_prep/" in f.filename or "/vrdistill_jax/" in f.filename] or frames
    return f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"


def count_bytes(value, limit: int = 2_000_000) -> int:
    """Memory of a result; what it shares is counted once, as is the memory below views."""
    seen: set[int] = set()
    total, todo = 0, [value]
    while todo and len(seen) < limit:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            base = item
            while isinstance(base.base, np.ndarray):
                base = base.base
            if id(base) not in seen or base is item:
                seen.add(id(base))
                total += base.nbytes
        elif isinstance(item, str | bytes | bytearray):
            total += len(item)
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            total += 8 * len(item)
            todo += item
    return total


def reset_peak() -> int:
    """Starts the measurement of the peak anew where the system can, and gives the memory in use."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak_memory()


def peak_memory() -> int:
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_memory() -> None:
    try:
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(plan_path: str) -> None:
    global CPU_SECONDS
    plan = json.loads(pathlib.Path(plan_path).read_text())
    CPU_SECONDS = plan.get("cpu_seconds", CPU_SECONDS)
    root = pathlib.Path(plan["folder"]).resolve()
    table = {name: reader for group in plan["groups"] for name, reader in readers.make_group(group).items()}
    (root / "readers.json").write_text(
        json.dumps({name: len(reader.hostile) for name, reader in table.items()})
    )
    os.chdir(root)  # where MARK would appear
    signal.signal(signal.SIGPROF, _too_slow)
    watch = Watch()
    sys.addaudithook(watch)
    for name, reader in table.items():
        shutil.rmtree(root / name, ignore_errors=True)
        for path, content in reader.files.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_bytes(content)
        if reader.warm_up:
            reader.read(root / name)
    limit_memory()
    with open(plan["log"], "a", buffering=1) as stream:
        for name, reader in table.items():
            last = max(plan["count"], 2 * len(reader.hostile)) if plan.get("all_hostile") else plan["count"]
            for number in range(plan["first"].get(name, 0), last):
                if number >= plan["count"] and number % 2 == 0:
                    continue
                stream.write(json.dumps({"reader": name, "case": number}) + "\n")
                outcome = run_case(name, reader, number, root / name, watch)
                stream.write(json.dumps({"reader": name, "case": number, **outcome}) + "\n")


def _too_slow(*_):
    raise TooSlow


if __name__ == "__main__":
    main(sys.argv[1])
