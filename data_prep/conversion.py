"""Converts a dataset scene by scene: in parallel, resumable, with a manifest of what came out.

Each reader gives a function from a scene's id to a sample; everything else (worker processes, the progress
bar, continuing a killed run, naming what cannot be read, counting, the manifest) is done here once.
"""

import functools
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from vrdistill_jax import __version__
from vrdistill_jax.data.builders import FORMAT_VERSION, default_data_dir, map_in_processes, prepare_scenes

CONVERSION_VERSION = (
    "1"  # raise it when a reader's result changes: kept scenes of older code are then not reused
)
MIN_SIZE = 1e-3  # metres; a flat instance's box is made this thick, because sizes must be positive
_MAX_WORKER_DEATHS = 5
_SHARED_FLAGS = ("output", "workers", "allow_partial", "skip_failed")
_SCENE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)
_ARRAYS = {  # the stored form: name -> type, columns
    "xyz": (np.float32, 3),
    "color": (np.uint8, 3),
    "instance": (np.int16, None),
    "boxes_center": (np.float32, 3),
    "boxes_size": (np.float32, 3),
    "boxes_yaw": (np.float32, None),
    "boxes_label": (np.int32, None),
    "vote_center": (np.float32, 3),
}


class Failure(NamedTuple):
    """A scene that could not be converted."""

    split: str
    scene: str
    reason: str


class ConversionReport(NamedTuple):
    """What a conversion did."""

    directory: pathlib.Path | None  # the dataset, for `open_split`; None where it was not written
    counts: dict[str, int]  # scenes converted, per split
    failures: tuple[Failure, ...]
    notes: tuple[str, ...] = ()  # what was assumed or changed, as in the manifest
    reused: bool = False  # the same dataset was there already


def convert_dataset(
    name: str,
    splits: Mapping[str, Sequence[str]],
    convert: Callable[[str, str], dict],
    class_names: Sequence[str],
    description: str,
    source: Mapping[str, Any],
    output: str | os.PathLike | None = None,
    expected_counts: Mapping[str, int] | None = None,
    workers: int | None = None,
    allow_partial: bool = False,
    skip_failed: bool = False,
    notes: Sequence[str] = (),
    progress: bool = True,
) -> ConversionReport:
    """Converts all scenes and writes `OUTPUT/NAME` with its `manifest.json`.

    Converted scenes are kept in `OUTPUT/.scenes`, each with a checksum, until the dataset is written, so a
    killed run continues where it was. A scene that cannot be read does not stop the others; unless
    `skip_failed`, the dataset is then not written and a later call tries the failed scenes again.

    Args:
      name: folder of the dataset under `output`.
      splits: scene ids per split, in the order of the rows.
      convert: called as convert(scene_id, split) in worker processes: a function that can be imported, or a
        `functools.partial` of one (what it binds is pickled, once per worker). Returns a sample: xyz
        f32[n, 3] metres, color f32[n, 3] in [0, 1], instance i32[n] (row of the boxes or -1),
        boxes_center f32[g, 3], boxes_size f32[g, 3], boxes_yaw f32[g], boxes_label i32[g], vote_center
        f32[g, 3], and optionally notes, a list of sentences for the manifest. Raises ValueError or OSError
        if the scene is unreadable.
      class_names: in label order.
      description: kept in the dataset's metadata.
      source: what kind of files and from where; goes into the manifest and tells conversions apart.
      output: folder of prepared datasets; None for `default_data_dir()`.
      expected_counts: scenes that each split must have.
      workers: processes; None for one per core, 0 to convert in this process.
      allow_partial: accept other counts than expected; the manifest says so.
      skip_failed: write the dataset without the scenes that fail; the manifest names them.
      notes: sentences about the whole dataset for the manifest.
      progress: whether to show a progress bar.

    Returns:
      The report; its `directory` is None if scenes failed.

    Raises:
      ValueError: for bad or repeated ids, other counts than expected, or an `output` that holds another
        dataset of this name.
    """
    _check_ids(splits)
    if not allow_partial:
        _check_counts(name, splits, expected_counts)
    root = pathlib.Path(output).expanduser() if output else default_data_dir()
    identity = {
        "dataset": name,
        "format_version": FORMAT_VERSION,
        "conversion_version": CONVERSION_VERSION,
        "code_version": __version__,
        "source": dict(source),
        "class_names": list(class_names),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    kept = root / ".scenes" / f"{name}_{key}"
    there = _existing_dataset(root / name, identity, splits, skip_failed)
    if there is not None:
        return there
    kept.mkdir(parents=True, exist_ok=True)
    tasks = [(split, scene) for split, scenes in splits.items() for scene in scenes]
    results = _convert_all(tasks, convert, kept, len(class_names), workers, progress)
    failures = tuple(
        Failure(*task, result) for task, result in zip(tasks, results, strict=True) if isinstance(result, str)
    )
    done = {task: result for task, result in zip(tasks, results, strict=True) if not isinstance(result, str)}
    rows = {split: [scene for scene in scenes if (split, scene) in done] for split, scenes in splits.items()}
    counts = {split: len(scenes) for split, scenes in rows.items()}
    scene_notes = (f"{scene}: {note}" for (_, scene), entry in done.items() for note in entry["notes"])
    all_notes = (*notes, *scene_notes)
    if (failures and not skip_failed) or not done:
        return ConversionReport(None, counts, failures, all_notes)
    # TFDS knows no empty splits: a split without scenes is left out, and opening it says so.
    generators = {
        split: functools.partial(_kept_samples, kept, scenes) for split, scenes in rows.items() if scenes
    }
    # Built beside the kept scenes and moved when its manifest is in it: OUTPUT/NAME is complete or absent.
    built = kept / f"built_{os.getpid()}"
    shutil.rmtree(built, ignore_errors=True)
    directory = prepare_scenes(name, generators, class_names, description, built)
    complete = not failures and (expected_counts is None or counts == dict(expected_counts))
    manifest = {
        **identity,
        "description": description,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "complete": complete,
        "counts": counts,
        "expected_counts": dict(expected_counts) if expected_counts else None,
        "notes": list(notes),
        "failed": [failure._asdict() for failure in failures],
        "scenes": {split: [done[split, scene] for scene in scenes] for split, scenes in rows.items()},
    }
    _write_atomically(directory / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    os.replace(directory, root / name)
    shutil.rmtree(kept, ignore_errors=True)
    if not any(kept.parent.iterdir()):
        kept.parent.rmdir()
    return ConversionReport(root / name, counts, failures, all_notes)


def hash_sample(sample: Mapping[str, Any]) -> str:
    """Gives the SHA-256 of a sample's arrays in their stored form, as the manifest lists it.

    Args:
      sample: of a reader or of `open_split`; the name does not count.

    Returns:
      64 hexadecimal digits, the same before and after storing.
    """
    digest = hashlib.sha256()
    for name, array in _stored_arrays(sample).items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_scene_id(scene: str, pattern: str | None = None) -> str:
    """Returns the id unless it could leave its folder or is not of the expected form.

    Args:
      scene: an id as a list or a file gives it.
      pattern: regular expression that the whole id must match, if any.

    Raises:
      ValueError: naming the id.
    """
    if not isinstance(scene, str) or not _SCENE_ID.fullmatch(scene):
        raise ValueError(f"{str(scene)[:120]!r} is no scene id; ids are made of letters, digits, _ and -")
    if pattern is not None and not re.fullmatch(pattern, scene, re.ASCII):
        raise ValueError(f"{scene!r} is no scene id of this dataset; ids look like {pattern}")
    return scene


def convert_by_split(converters: Mapping[str, Callable[[str], dict]], scene: str, split: str) -> dict:
    """Calls the converter of a split; bind the converters with `functools.partial`."""
    return converters[split](scene)


def positive_sizes(size: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Makes flat boxes `MIN_SIZE` thick.

    Args:
      size: f32[g, 3] metres.
      names: of the boxes, for the notes.

    Returns:
      f32[g, 3], and a note for each box that was changed.

    Raises:
      ValueError: if a size is negative.
    """
    if (size < 0).any():
        raise ValueError(f"the {names[int((size < 0).any(axis=1).argmax())]} has a negative size")
    flat = (size < MIN_SIZE).any(axis=1)
    notes = [
        f"the {names[row]} is {size[row].min():.3g} m thin and was made {MIN_SIZE} m thick"
        for row in np.flatnonzero(flat)
    ]
    return np.maximum(size, np.float32(MIN_SIZE)), notes


def define_conversion_flags() -> None:
    """Declares the flags that all conversions share."""
    flags.DEFINE_string(
        "output",
        None,
        "Folder of prepared datasets; the dataset becomes a folder in it. Default: VRDISTILL_DATA or the cache.",
    )
    flags.DEFINE_integer("workers", None, "Worker processes; one per core by default, 0 for none.", 0)
    flags.DEFINE_bool("allow_partial", False, "Convert what is there, though scenes are missing.")
    flags.DEFINE_bool("skip_failed", False, "Write the dataset without the scenes that cannot be read.")
    for name in _SHARED_FLAGS:  # so that --help lists them beside the verb's own
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def conversion_options() -> dict[str, Any]:
    """Gives the shared flags' values as arguments of `convert_dataset`."""
    options = flags.FLAGS
    return {name: options[name].value for name in _SHARED_FLAGS}


def print_report(report: ConversionReport) -> int:
    """Prints what a conversion did and returns the verb's exit code: 0 done, 1 scenes failed."""
    counts = ", ".join(f"{count} {split}" for split, count in report.counts.items())
    for note in report.notes[:20]:
        print(f"note: {note}")
    if len(report.notes) > 20:
        print(f"note: {len(report.notes) - 20} more notes stand in the manifest")
    for failure in report.failures:
        print(f"failed: {failure.scene} ({failure.split}): {failure.reason}", file=sys.stderr)
    if report.directory is None:
        print(
            f"error: {len(report.failures)} scenes could not be converted ({counts} could and are kept); "
            "repair them and run the same command again, or leave them out with --skip_failed",
            file=sys.stderr,
        )
        return 1
    was = "was there already" if report.reused else "is written"
    print(f"{report.directory} {was}: {counts} scenes; its manifest.json lists them")
    if report.failures:
        print(f"{len(report.failures)} scenes were left out (--skip_failed); the manifest names them")
    return 0


def _check_ids(splits: Mapping[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    for split, scenes in splits.items():
        for scene in scenes:
            check_scene_id(scene)
            if scene in seen:
                raise ValueError(
                    f"scene {scene} is listed twice (in {seen[scene]} and {split}); list it once"
                )
            seen[scene] = split
    if not seen:
        raise ValueError("there are no scenes to convert; check the input folder")


def _check_counts(name: str, splits: Mapping[str, Sequence[str]], expected: Mapping[str, int] | None) -> None:
    wrong = [
        f"{split} has {len(splits.get(split, ()))} scenes, not {count}"
        for split, count in (expected or {}).items()
        if len(splits.get(split, ())) != count
    ]
    if wrong:
        raise ValueError(
            f"{name} is not complete: {'; '.join(wrong)}. Add the missing scenes, or convert what is there "
            "with --allow_partial"
        )


def _existing_dataset(
    directory: pathlib.Path, identity: dict, splits: Mapping[str, Sequence[str]], skip_failed: bool
) -> ConversionReport | None:
    """Reports a dataset that was made from the same source; None where it is still to be made."""
    if not directory.is_dir():
        return None
    remedy = "remove that folder or choose another --output"
    path = directory / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{directory} exists without a manifest.json, so what it holds is unknown; {remedy}")
    try:
        manifest = json.loads(path.read_text())
        same = all(manifest[field] == value for field, value in identity.items())
        rows = {split: [entry["scene"] for entry in scenes] for split, scenes in manifest["scenes"].items()}
        failures = tuple(Failure(**failure) for failure in manifest["failed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; {remedy}") from error
    asked = {split: list(scenes) for split, scenes in splits.items()}
    lost = {failure.scene for failure in failures}
    found = {split: [scene for scene in scenes if scene not in lost] for split, scenes in asked.items()}
    if not same or rows != found:
        raise ValueError(f"{directory} was converted from another source or version; {remedy}")
    if failures and not skip_failed:
        raise ValueError(f"{directory} was made without {len(failures)} scenes (--skip_failed); {remedy}")
    counts = {split: len(scenes) for split, scenes in rows.items()}
    return ConversionReport(directory, counts, failures, reused=True)


def _convert_all(
    tasks: list[tuple[str, str]],
    convert: Callable[[str, str], dict],
    kept: pathlib.Path,
    num_classes: int,
    workers: int | None,
    progress: bool,
) -> list[dict | str]:
    """Gives a manifest entry, or the reason of the failure, for each task."""
    from tqdm import tqdm

    results: list[dict | str] = []
    deaths = 0
    with tqdm(total=len(tasks), unit="scene", disable=not progress) as bar:
        while len(results) < len(tasks):
            calls = [(convert, split, scene, kept, num_classes) for split, scene in tasks[len(results) :]]
            try:
                for result in map_in_processes(_convert_and_keep, calls, workers):
                    results.append(result)
                    bar.update()
            except RuntimeError as error:
                if workers == 0:
                    raise
                # Results come in order, so the first one missing is the scene at which the worker ended.
                deaths += 1
                if deaths > _MAX_WORKER_DEATHS:
                    raise ValueError(f"{deaths} worker processes died; the last: {error}") from error
                results.append("the worker process ended here (see its message above; out of memory?)")
                bar.update()
    return results


def _convert_and_keep(
    convert: Callable[[str, str], dict], split: str, scene: str, kept: pathlib.Path, num_classes: int
) -> dict | str:
    """Converts one scene in a worker unless its kept file is intact."""
    path = kept / f"{scene}.scene"
    try:
        entry = _kept_entry(path)
        if entry is not None:
            return entry
        sample = convert(scene, split)
        notes = [str(note) for note in sample.get("notes", ())]
        _check_sample(sample, num_classes)
        arrays = _stored_arrays(sample)
        entry = {
            "scene": scene,
            "sha256": hash_sample(arrays),
            "points": len(arrays["xyz"]),
            "boxes": len(arrays["boxes_label"]),
            "notes": notes,
        }
        stream = io.BytesIO()
        np.savez(stream, entry=np.array(json.dumps(entry)), **arrays)  # type: ignore[arg-type]
        data = stream.getvalue()
        _write_atomically(path, hashlib.sha256(data).digest() + data)
    except (ValueError, OSError, MemoryError) as error:
        return str(error).strip() or type(error).__name__
    return entry


def _kept_samples(kept: pathlib.Path, scenes: Sequence[str]) -> Iterator[dict]:
    for scene in scenes:
        arrays = _read_kept(kept / f"{scene}.scene")
        if arrays is None:
            raise ValueError(f"{kept / scene}.scene was changed while it was in use; run the command again")
        sample = {name: arrays[name] for name in _ARRAYS}
        yield {**sample, "color": sample["color"].astype(np.float32) / np.float32(255), "name": scene}


def _kept_entry(path: pathlib.Path) -> dict | None:
    arrays = _read_kept(path)
    return None if arrays is None else json.loads(str(arrays["entry"]))


def _read_kept(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Reads a kept scene; None if there is none or its checksum is wrong."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    try:
        with np.load(io.BytesIO(content[32:]), allow_pickle=False) as archive:
            return {name: archive[name] for name in ("entry", *_ARRAYS)}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile):
        return None


def _stored_arrays(sample: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (dtype, _) in _ARRAYS.items():
        array = np.asarray(sample[name])
        if name == "color" and array.dtype != np.uint8:
            array = np.rint(np.clip(array, 0, 1) * 255)  # as prepare_scenes stores it
        arrays[name] = np.ascontiguousarray(array, dtype)
    return arrays


def _check_sample(sample: Mapping[str, Any], num_classes: int) -> None:
    rows = {name: np.shape(sample[name])[0] if name in sample else None for name in _ARRAYS}
    for name, (_, columns) in _ARRAYS.items():
        count = rows["xyz"] if name in ("xyz", "color", "instance") else rows["boxes_label"]
        shape = (count,) if columns is None else (count, columns)
        found = np.shape(sample[name]) if name in sample else None
        if found != shape:
            raise ValueError(f"the reader gave {name} of shape {found}, expected {shape}")
        if not np.isfinite(sample[name]).all():
            raise ValueError(f"{name} holds NaN or infinity")
    if not rows["xyz"]:
        raise ValueError("the scene has no points")
    count = rows["boxes_label"] or 0
    if count > np.iinfo(np.int16).max:
        raise ValueError(f"the scene has {count} boxes, more than {np.iinfo(np.int16).max}")
    for name, low, high in (("instance", -1, count), ("boxes_label", 0, num_classes)):
        values = np.asarray(sample[name])
        if values.size and not (values.min() >= low and values.max() < high):
            raise ValueError(f"{name} must lie in [{low}, {high}), got {values.min()}..{values.max()}")
    if count and not np.asarray(sample["boxes_size"]).min() > 0:
        raise ValueError("boxes_size holds a value <= 0; sizes are full extents in metres")


def _write_atomically(path: pathlib.Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
