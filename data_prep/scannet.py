"""Converts ScanNet v2, from the original scans or from a folder that another project has prepared.

    python -m data_prep.scannet --raw=SCANNET --output=DATASETS
    python -m data_prep.scannet --prepared=votenet/scannet --output=DATASETS
    python -m data_prep.scannet --mmdet3d=mmdetection3d/data/scannet --output=DATASETS

The result is the folder DATASETS/scannet. docs/datasets.md says how to get the data. A killed run continues
when it is started again. Exit code 1 if scenes could not be converted.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

from absl import flags

from data_prep.conversion import (
    ConversionReport,
    conversion_options,
    convert_by_split,
    convert_dataset,
    define_conversion_flags,
    print_report,
)
from data_prep.scannet_raw import LABEL_FILE, SCENE_PATTERN, convert_scan, read_label_map, read_split_list
from data_prep.votenet_prepared import convert_votenet_scannet, list_scenes
from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.class_tables import SCANNET_CLASSES

EXPECTED_COUNTS = {"train": 1201, "val": 312}
SPLIT_FILES = {"train": "scannetv2_train.txt", "val": "scannetv2_val.txt"}
_LIST_FOLDERS = ("", "tasks", "Tasks/Benchmark", "meta_data", "splits")
_LIST_SOURCE = "https://github.com/ScanNet/ScanNet/tree/master/Tasks/Benchmark"
DESCRIPTION = "ScanNet v2, 18 classes, axis-aligned boxes"


def convert_raw(raw: str, split_dir: str | None = None, **options) -> ConversionReport:
    """Converts the scans as ScanNet's download script leaves them.

    Args:
      raw: folder of the download: scan folders in it or in its `scans`, and the label file.
      split_dir: folder of scannetv2_train.txt and scannetv2_val.txt; None searches `raw`.
      **options: output, workers, allow_partial, skip_failed, progress of `convert_dataset`.

    Returns:
      The report.

    Raises:
      ValueError: if files that all scans need, or scans, are missing.
    """
    root = _folder(raw, "raw")
    splits = read_splits([root], split_dir)
    scans = next((path for path in (root / "scans", root) if any(path.glob("scene????_??"))), None)
    if scans is None:
        raise ValueError(f"{root} holds no scan folders (scene0000_00 ...), nor does {root / 'scans'}")
    label_path = _find([root], LABEL_FILE)
    if label_path is None:
        raise ValueError(f"{LABEL_FILE} is not in {root}; ScanNet's download script gets it with --label_map")
    splits = _present(
        splits, lambda scene: (scans / scene).is_dir(), scans, bool(options.get("allow_partial"))
    )
    source = {"kind": "scannet_raw", "folder": str(root.resolve())}
    convert = functools.partial(convert_scan, str(scans), read_label_map(label_path))
    return _convert(splits, convert, source, options)


def convert_prepared(prepared: str, split_dir: str | None = None, **options) -> ConversionReport:
    """Converts the arrays that VoteNet's scannet/batch_load_scannet_data.py has written.

    Args:
      prepared: VoteNet's `scannet` folder, or its `scannet_train_detection_data`.
      split_dir: folder of the split lists; None searches `prepared`, its parent and their `meta_data`.
      **options: as of `convert_raw`.

    Returns:
      The report.

    Raises:
      ValueError: if the lists or scenes are missing.
    """
    root = _folder(prepared, "prepared")
    arrays = root / "scannet_train_detection_data"
    folder = arrays if arrays.is_dir() else root
    splits = read_splits([root, root.parent], split_dir)
    there = set(list_scenes(folder, SCENE_PATTERN))
    if not there:
        raise ValueError(
            f"{folder} holds no scene????_??_bbox.npy files, as VoteNet's preparation writes them"
        )
    splits = _present(splits, there.__contains__, folder, bool(options.get("allow_partial")))
    source = {"kind": "scannet_votenet_prepared", "folder": str(folder.resolve())}
    return _convert(splits, functools.partial(convert_votenet_scannet, str(folder)), source, options)


def convert_mmdet3d(folder: str, **options) -> ConversionReport:
    """Converts mmdetection3d's `data/scannet` folder (scannet_infos_{train,val}.pkl and what they name).

    Args:
      folder: that folder.
      **options: as of `convert_raw`.

    Returns:
      The report.

    Raises:
      ValueError: if an info file is missing or malformed.
    """
    from data_prep.mmdet3d import read_scannet_infos

    root = _folder(folder, "mmdet3d")
    infos = {split: read_scannet_infos(root, split) for split in EXPECTED_COUNTS}
    splits = {split: list(info.names) for split, info in infos.items()}
    convert = functools.partial(convert_by_split, {split: info.convert for split, info in infos.items()})
    notes = [f"{split}: {note}" for split, info in infos.items() for note in info.notes]
    source = {"kind": "scannet_mmdet3d", "folder": str(root.resolve())}
    return _convert(splits, convert, source, {**options, "notes": notes})


def read_splits(folders: Sequence[pathlib.Path], split_dir: str | None = None) -> dict[str, list[str]]:
    """Reads the official lists of training and validation scenes.

    Args:
      folders: where they are searched, also in the usual sub-folders.
      split_dir: the one folder where they are, if the user names it.

    Returns:
      Scene ids per split.

    Raises:
      ValueError: if a list is not found, saying where it can be downloaded, or holds something else.
    """
    if split_dir:
        folders = [_folder(split_dir, "split_dir")]
    splits = {}
    for split, name in SPLIT_FILES.items():
        path = _find(folders, name)
        if path is None:
            searched = ", ".join(str(folder) for folder in folders)
            raise ValueError(
                f"the list of {split} scenes, {name}, is not in {searched}; get it from {_LIST_SOURCE} into "
                "one of these, or name its folder with --split_dir"
            )
        splits[split] = read_split_list(path)
    return splits


def define_flags() -> None:
    """Declares the verb's flags."""
    flags.DEFINE_string("raw", None, "Folder of ScanNet's own download script.")
    flags.DEFINE_string("prepared", None, "Folder that VoteNet's preparation script has written.")
    flags.DEFINE_string("mmdet3d", None, "mmdetection3d's data/scannet folder.")
    flags.DEFINE_string("split_dir", None, "Folder of scannetv2_train.txt and scannetv2_val.txt.")
    define_conversion_flags()


def main() -> int:
    """Converts what the flags name."""
    options = flags.FLAGS
    chosen = [name for name in ("raw", "prepared", "mmdet3d") if options[name].value]
    if len(chosen) != 1:
        raise ValueError(
            "name the data with one of --raw, --prepared and --mmdet3d, for example --raw=scannet "
            "--output=datasets; docs/datasets.md says how to get it"
        )
    shared = conversion_options()
    if options.mmdet3d:
        return print_report(convert_mmdet3d(options.mmdet3d, **shared))
    if options.prepared:
        return print_report(convert_prepared(options.prepared, options.split_dir, **shared))
    return print_report(convert_raw(options.raw, options.split_dir, **shared))


def _convert(
    splits: dict[str, list[str]], convert: Callable, source: dict, options: dict
) -> ConversionReport:
    return convert_dataset(
        "scannet",
        splits,
        convert,
        SCANNET_CLASSES,
        DESCRIPTION,
        source,
        expected_counts=EXPECTED_COUNTS,
        **options,
    )


def _present(
    splits: dict[str, list[str]], is_there: Callable[[str], bool], folder: pathlib.Path, allow_partial: bool
) -> dict[str, list[str]]:
    """Checks that every listed scene is there, before hours are spent on the others."""
    missing = [scene for scenes in splits.values() for scene in scenes if not is_there(scene)]
    total = sum(len(scenes) for scenes in splits.values())
    if missing and not allow_partial:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing)} of the {total} listed scenes are not in {folder} ({named}); get them, or "
            "convert what is there with --allow_partial"
        )
    return {split: [scene for scene in scenes if is_there(scene)] for split, scenes in splits.items()}


def _folder(path: str, flag: str) -> pathlib.Path:
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--{flag}={path} is no folder")
    return folder


def _find(folders: Sequence[pathlib.Path], name: str) -> pathlib.Path | None:
    candidates = (folder / sub / name for folder in folders for sub in _LIST_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


if __name__ == "__main__":
    define_flags()
    run_verb(main, uses_jax=False)
