"""Makes a dataset of a folder of your own scans and their boxes.

    python -m data_prep.custom --input=my_scans --output=datasets/my_rooms
    python -m vrdistill_jax.train --config=configs/custom.py:datasets/my_rooms

The folder holds scans (.ply, .pcd, .las, .npy, .npz, .bin; metres, z up) and for each a .json of the same
name:

    {"boxes": [{"label": "chair", "center": [1.2, 0.4, 0.45], "size": [0.6, 0.6, 0.9], "yaw": 0.1}]}

`size` is the full extent along the box's own axes and `yaw` (optional, radians) turns them counter-clockwise
about z. docs/custom_dataset.md has the whole schema.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from data_prep.annotations import Annotation, AnnotationError, read_annotation
from data_prep.conversion import ConversionReport, convert_dataset, print_report
from data_prep.own_scans import convert_scan, scene_id
from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.point_checks import METERS_PER_UNIT
from vrdistill_jax.data.point_files import FORMATS

SUMMARY_FILE = "mean_sizes.json"  # what configs/custom.py reads


def find_scans(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Lists the scans of a folder.

    Args:
      folder: searched without its sub-folders. Files that a .json names as its `instance` are no scans.

    Returns:
      Scene id -> file, sorted.

    Raises:
      ValueError: if there is no such folder, no scan, two scans of one name, or a .json without a scan.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the one that holds the scans and their .json files")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    named = set()
    for path in files:
        if path.suffix.lower() == ".json":
            try:
                named.add(read_annotation(path).instance)
            except (AnnotationError, TypeError):
                continue  # reported for its scan
    scans: dict[str, pathlib.Path] = {}
    for path in files:
        if path.suffix.lower() not in FORMATS or path.name in named:
            continue
        name = scene_id(path)
        if name in scans:
            raise ValueError(f"{scans[name]} and {path} are both called {name}; rename or remove one")
        scans[name] = path
    if not scans:
        raise ValueError(f"{folder} holds no scan; known endings are {', '.join(FORMATS)}")
    stems = {path.stem for path in scans.values()}
    lonely = [path for path in files if path.suffix.lower() == ".json" and path.stem not in stems]
    if lonely:
        raise ValueError(
            f"{lonely[0]} has no scan of the same name; add or remove ({len(lonely)} such files)"
        )
    return scans


def split_scans(
    names: Sequence[str], val_fraction: float = 0.1, split_file: str | os.PathLike | None = None
) -> dict[str, list[str]]:
    """Divides scans into train and val.

    Args:
      names: scene ids.
      val_fraction: share for validation, at least one scan; which ones depends on the names alone, so
        that adding a scan does not shuffle the others.
      split_file: JSON with lists of names, "train" and "val", instead.

    Returns:
      Sorted names per split.

    Raises:
      ValueError: if a split would be empty, or the file names unknown scans or one twice.
    """
    names = sorted(names)
    if split_file is None:
        if len(names) < 2:
            raise ValueError(f"{len(names)} scan cannot be divided into train and val; at least 2 are needed")
        count = min(max(round(val_fraction * len(names)), 1), len(names) - 1)
        order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        return {"train": sorted(order[count:]), "val": sorted(order[:count])}
    try:
        data = pathlib.Path(split_file).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{split_file}: cannot be read ({error.strerror or error}); check the path"
        ) from error
    try:
        content = json.loads(data)
        splits = {
            split: [scene_id(pathlib.Path(name + ".x")) for name in content[split]]
            for split in ("train", "val")
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        form = '{"train": [names], "val": [names]}'
        raise ValueError(f"{split_file}: is not of the form {form} ({str(error)[:80]})") from error
    listed = splits["train"] + splits["val"]
    unknown = [name for name in listed if name not in names]
    twice = [name for name in listed if listed.count(name) > 1] if len(set(listed)) < len(listed) else []
    if unknown or twice or not splits["train"] or not splits["val"]:
        what = f"names {unknown[0]!r}, which is no scan" if unknown else "leaves train or val empty"
        raise ValueError(f"{split_file}: {f'names {twice[0]!r} twice' if twice else what}")
    return {split: sorted(chosen) for split, chosen in splits.items()}


def prepare_custom(
    input_folder: str | os.PathLike,
    output: str | os.PathLike,
    val_fraction: float = 0.1,
    split_file: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    unit: str = "m",
    columns: int | None = None,
    workers: int | None = None,
    skip_failed: bool = False,
    progress: bool = True,
) -> ConversionReport:
    """Converts a folder of scans; arguments as the flags of this verb.

    Returns:
      The report of the conversion. The dataset also gets `mean_sizes.json`: class names, their mean sizes
      over the training split, and whether any box is turned.

    Raises:
      ValueError: for bad input, naming the file and the reason.
    """
    scans = find_scans(input_folder)
    splits = split_scans(list(scans), val_fraction, split_file)
    annotations: dict[str, Annotation] = {}
    for name, scan in scans.items():
        try:
            annotations[name] = read_annotation(scan.with_suffix(".json"))
        except AnnotationError:
            continue  # the conversion names it among the failures
    found = sorted({label for annotation in annotations.values() for label in annotation.labels})
    if class_names is None:
        class_names = found
    if not class_names or len(set(class_names)) != len(class_names):
        raise ValueError(f"classes {list(class_names)}: at least one is needed, each once")
    convert = functools.partial(
        convert_scan, {n: str(s) for n, s in scans.items()}, tuple(class_names), unit, columns
    )
    digest = hashlib.sha256()
    for split in splits:
        for name in splits[split]:
            digest.update(f"{split} {name} {_hash_files(scans[name], annotations.get(name))}\n".encode())
    directory = pathlib.Path(output).expanduser()
    source = {"kind": "custom", "unit": unit, "columns": columns}
    report = convert_dataset(
        name=directory.name,
        splits=splits,
        convert=convert,
        class_names=class_names,
        description=f"Own scans from {input_folder}",
        source={**source, "sha256": digest.hexdigest()},
        output=directory.parent,
        workers=workers,
        skip_failed=skip_failed,
        progress=progress,
    )
    left_out = len(scans) - sum(len(chosen) for chosen in splits.values())
    if left_out:
        report = report._replace(
            notes=(f"{left_out} scans are in neither list of {split_file}", *report.notes)
        )
    if report.directory is None:
        return report
    lost = {failure.scene for failure in report.failures}
    kept = {split: [annotations[n] for n in chosen if n not in lost] for split, chosen in splits.items()}
    summary, notes = summarize_boxes(kept, class_names, METERS_PER_UNIT[unit])
    partial = report.directory / f".{SUMMARY_FILE}.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(partial, report.directory / SUMMARY_FILE)
    return report._replace(notes=(*notes, *report.notes))


def summarize_boxes(
    annotations: Mapping[str, Sequence[Annotation]], class_names: Sequence[str], scale: float = 1.0
) -> tuple[dict[str, Any], list[str]]:
    """Gathers what a config needs to know of a dataset.

    Args:
      annotations: per split.
      class_names: in label order.
      scale: metres per unit of the annotations.

    Returns:
      The content of `mean_sizes.json`, and notes on classes without boxes.

    Raises:
      ValueError: if no scan has a box.
    """
    sizes: dict[str, dict[str, list]] = {split: {name: [] for name in class_names} for split in annotations}
    for split, scenes in annotations.items():
        for scene in scenes:
            for label, size in zip(scene.labels, scene.size * scale, strict=True):
                sizes[split][label].append(size)
    everything = [size for split in sizes.values() for rows in split.values() for size in rows]
    if not everything:
        raise ValueError("no scan has a box; there is nothing to learn")
    means, notes = [], []
    for name in class_names:
        mine, where = sizes["train"][name], ""
        if not mine:
            mine, where = [size for split in sizes.values() for size in split[name]], "its boxes in val"
        if not mine:
            mine, where = everything, "all boxes"
        if where:
            notes.append(f"class {name!r} has no box in train; its mean size is that of {where}")
        means.append([round(float(value), 6) for value in np.mean(mine, axis=0)])
    scenes = [scene for group in annotations.values() for scene in group]
    summary = {
        "class_names": list(class_names),
        "mean_sizes": means,
        "oriented": any(bool((scene.yaw != 0).any()) for scene in scenes),
        "max_boxes": max(len(scene.labels) for scene in scenes),
        "scenes": {split: len(group) for split, group in annotations.items()},
        "boxes": {split: {name: len(rows) for name, rows in table.items()} for split, table in sizes.items()},
    }
    return summary, notes


def _hash_files(scan: pathlib.Path, annotation: Annotation | None) -> str:
    digest = hashlib.sha256()
    paths = [scan, scan.with_suffix(".json")]
    if annotation is not None and isinstance(annotation.instance, str):
        paths.append(scan.with_name(annotation.instance))
    for path in paths:
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def define_flags() -> None:
    """Declares the verb's flags."""
    flags.DEFINE_string("input", None, "Folder of scans and their .json files.")
    flags.DEFINE_string("output", None, "Folder that becomes the dataset.")
    flags.DEFINE_float("val_fraction", 0.1, "Share of the scans for validation.", 0.0, 1.0)
    flags.DEFINE_string("split", None, 'JSON file {"train": [names], "val": [names]} instead.')
    flags.DEFINE_list("classes", None, "Class names in label order; sorted by name by default.")
    flags.DEFINE_enum("units", "m", sorted(METERS_PER_UNIT), "Unit of scans and boxes.")
    flags.DEFINE_integer("columns", None, "Values per point of .bin files.", 3)
    flags.DEFINE_integer("workers", None, "Worker processes; one per core by default, 0 for none.", 0)
    flags.DEFINE_bool("skip_failed", False, "Leave out scans that cannot be read.")


def main() -> int:
    """Converts the folder and says how to go on."""
    options = flags.FLAGS
    if not options.input or not options.output:
        raise ValueError("--input=FOLDER and --output=FOLDER are needed")
    report = prepare_custom(
        options.input,
        options.output,
        options.val_fraction,
        options.split,
        options.classes,
        options.units,
        options.columns,
        options.workers,
        options.skip_failed,
    )
    code = print_report(report)
    if report.directory is not None:
        print(
            f"\nNext:\n  python -m data_prep.verify {report.directory}\n"
            f"  python -m vrdistill_jax.train --config=configs/custom.py:{report.directory}"
        )
    return code


if __name__ == "__main__":
    define_flags()
    run_verb(main, uses_jax=False)
