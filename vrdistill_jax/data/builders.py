"""Prepared datasets on disk: TFDS builders with array_record files, written and read without TensorFlow.

Every dataset of detection scenes, made or converted, is stored in the same form, so one reader serves them
all.
"""

import contextlib
import functools
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

FORMAT_VERSION = "1.0.0"
_FLOAT_FIELDS = {
    "boxes_center": (None, 3),
    "boxes_size": (None, 3),
    "boxes_yaw": (None,),
    "vote_center": (None, 3),
}


def default_data_dir() -> pathlib.Path:
    """Gives the folder of prepared datasets: VRDISTILL_DATA, or ~/.cache/vrdistill_jax/datasets."""
    return pathlib.Path(os.environ.get("VRDISTILL_DATA") or "~/.cache/vrdistill_jax/datasets").expanduser()


def prepare_scenes(
    name: str,
    splits: Mapping[str, Callable[[], Iterable[dict]]],
    names: Sequence[str],
    description: str,
    data_dir: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Writes a dataset of detection scenes unless it is there already.

    It is written next to its final place and renamed when complete, so a killed preparation is made again
    and never read half done. Of several processes that prepare the same dataset, one works and the others
    wait for it.

    Args:
      name: name of the dataset's folder.
      splits: per split a function that gives its samples (fields as of `generate_scene`), called at most
        once.
      names: class names in label order, kept in the metadata.
      description: kept in the metadata.
      data_dir: folder of prepared datasets; None for `default_data_dir()`.

    Returns:
      The dataset's folder, for `open_split`.
    """
    root = pathlib.Path(data_dir).expanduser() if data_dir else default_data_dir()
    final = root / name
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    with _exclusive(root / f".{name}.lock"):
        if final.is_dir():
            return final
        partial = root / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        builder_class = _builder_class()
        builder = builder_class(splits, names, description, data_dir=partial, file_format="array_record")
        with _quiet_tfds():
            builder.download_and_prepare()
        os.replace(builder.data_dir, final)
        shutil.rmtree(partial, ignore_errors=True)
    return final


def open_split(directory: str | os.PathLike, split: str) -> "SceneSource":
    """Opens one split of a prepared dataset.

    Args:
      directory: what `prepare_scenes` returned.
      split: "train", "val", or a slice such as "train[:10%]".

    Returns:
      A sequence of samples: len(), [i]; it can be pickled and read from several threads.

    Raises:
      ValueError: if there is no prepared dataset or no such split.
    """
    source = SceneSource(directory, split)
    len(source)
    return source


class SceneSource(Sequence):
    """A split on disk as a sequence of sample dicts (NumPy)."""

    def __init__(self, directory: str | os.PathLike, split: str) -> None:
        """Remembers where the split is; files are opened on first use, in each process anew."""
        self.directory, self.split = pathlib.Path(directory), split
        self._lock = threading.Lock()
        self._source: Any = None
        self._class_names: tuple[str, ...] = ()

    def __getstate__(self) -> dict:
        return {"directory": self.directory, "split": self.split}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order."""
        self._open()
        return self._class_names

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, index: int) -> dict:  # type: ignore[override]
        source = self._open()
        count = len(source)
        if not -count <= index < count:
            raise IndexError(f"scene {index} of {count} in {self.directory} [{self.split}]")
        with (
            self._lock
        ):  # array_record's readers are not promised to be thread-safe; decoding dominates anyway
            record = source[int(index) % count]
        sample = {name: np.array(record[name], np.float32) for name in ("xyz", *_FLOAT_FIELDS)}
        sample["color"] = record["color"].astype(np.float32) / np.float32(255)
        sample["instance"] = record["instance"].astype(np.int32)
        sample["boxes_label"] = record["boxes_label"].astype(np.int32)
        name = record["name"]
        return {**sample, "name": name.decode() if isinstance(name, bytes) else str(name)}

    def _open(self) -> Any:
        with self._lock:
            if self._source is None:
                if not (self.directory / "dataset_info.json").is_file():
                    raise ValueError(
                        f"{self.directory} holds no prepared dataset (no dataset_info.json); make it with data_prep"
                    )
                tfds = _import_tfds()
                builder = tfds.builder_from_directory(self.directory)
                known = tuple(builder.info.splits)
                if self.split.split("[")[0] not in known:
                    raise ValueError(
                        f"no split {self.split!r} in {self.directory}; known are {', '.join(known)}"
                    )
                self._class_names = tuple(builder.info.metadata["class_names"])
                self._source = builder.as_data_source(split=self.split)
            return self._source


def map_in_processes(function: Callable, arguments: list[tuple], num_workers: int | None = None) -> Iterator:
    """Calls a function for every tuple of arguments in worker processes; results come in order.

    The workers are plain interpreters that import the function's module: they do not import the caller's
    main module (no `if __name__ == "__main__"` needed) and do not inherit its threads.

    Args:
      function: an importable function.
      arguments: one tuple per call.
      num_workers: processes; None for one per core, 0 to call the function in this process.

    Yields:
      The results, in the order of `arguments`.

    Raises:
      RuntimeError: if a worker dies; its own message is on stderr.
    """
    count = min(_core_count() if num_workers is None else num_workers, len(arguments))
    if count < 1:
        yield from (function(*values) for values in arguments)
        return
    command = [sys.executable, "-c", "from vrdistill_jax.data.builders import _serve; _serve()"]
    root = str(pathlib.Path(__file__).resolve().parents[2])
    paths = [root, *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        for _ in range(count)
    ]
    try:
        for row, worker in enumerate(workers):
            assert worker.stdin is not None
            pickle.dump((function, arguments[row::count]), worker.stdin)
            worker.stdin.close()
        for row in range(len(arguments)):
            worker = workers[row % count]
            try:
                yield pickle.load(worker.stdout)  # type: ignore[arg-type]
            except (EOFError, pickle.UnpicklingError) as error:
                raise RuntimeError(
                    f"worker {row % count} ended (exit status {worker.wait()}) before call {row}; "
                    "see its message above, or set num_workers=0 to run in this process"
                ) from error
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()


def _serve() -> None:
    """What a worker does: reads its calls from stdin, writes each result to stdout."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the function prints must not mix with the results
    function, arguments = pickle.load(sys.stdin.buffer)
    with contextlib.suppress(BrokenPipeError), out:
        for values in arguments:
            pickle.dump(function(*values), out, protocol=pickle.HIGHEST_PROTOCOL)
            out.flush()


def _core_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _import_tfds() -> Any:
    import tensorflow_datasets as tfds

    return tfds


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Leaves the progress bars to the samples' own one."""
    from tensorflow_datasets.core.utils import tqdm_utils

    tqdm_utils.disable_progress_bar()
    try:
        yield
    finally:
        tqdm_utils.enable_progress_bar()


@contextlib.contextmanager
def _exclusive(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock file that the system releases when the process ends, however it ends."""
    with open(path, "w") as file:
        try:
            import fcntl
        except ImportError:  # no such locks on this system: preparing twice at once is then up to the user
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _builder_class() -> type:
    """Defines the builder on first use, because importing TFDS takes seconds."""
    tfds = _import_tfds()
    encoding = tfds.features.Encoding.BYTES

    class DetectionScenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Point clouds with boxes: the stored form of every dataset here."""

        VERSION = tfds.core.Version(FORMAT_VERSION)
        code_path = (
            None  # nothing to look up beside this file; TFDS would need importlib_resources to find it
        )

        def __init__(self, splits, names, description, **kwargs) -> None:
            self._splits, self._names, self._description = splits, tuple(names), description
            super().__init__(**kwargs)

        def _info(self):
            def tensor(shape, dtype):
                return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)

            features = {name: tensor(shape, np.float32) for name, shape in _FLOAT_FIELDS.items()}
            features["xyz"] = tensor((None, 3), np.float32)
            features["color"] = tensor((None, 3), np.uint8)
            features["instance"] = tensor((None,), np.int16)
            features["boxes_label"] = tensor((None,), np.int32)
            features["name"] = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                description=self._description,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # row i of a split is sample i; the loader shuffles
                metadata=tfds.core.MetadataDict(class_names=list(self._names)),
            )

        def _log_download_bytes(self) -> None:  # nothing is downloaded: the message would alarm
            pass

        def _log_download_done(self) -> None:
            pass

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(samples) for split, samples in self._splits.items()}

        def _generate_examples(self, samples):
            for row, sample in enumerate(samples()):
                color = np.rint(np.clip(sample["color"], 0, 1) * 255).astype(np.uint8)
                yield row, {**sample, "color": color, "instance": sample["instance"].astype(np.int16)}

    return DetectionScenes
