"""Converts SUN RGB-D, from the published files or from a folder that another project has prepared.

    python -m data_prep.sunrgbd --raw=SUNRGBD_FOLDER --output=DATASETS
    python -m data_prep.sunrgbd --trainval=votenet/sunrgbd/sunrgbd_trainval --output=DATASETS
    python -m data_prep.sunrgbd --prepared=votenet/sunrgbd --output=DATASETS
    python -m data_prep.sunrgbd --mmdet3d=mmdetection3d/data/sunrgbd --labels=v2 --output=DATASETS

The result is the folder DATASETS/sunrgbd_v1 (or _v2). docs/datasets_sunrgbd.md says how to get the data. A
killed run continues when it is started again. Exit code 1 if scenes could not be converted.
"""

import functools
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from data_prep.conversion import (
    ConversionReport,
    conversion_options,
    convert_by_split,
    convert_dataset,
    define_conversion_flags,
    print_report,
)
from data_prep.sunrgbd_metadata import Frame, read_frames, read_split
from data_prep.sunrgbd_raw import convert_frame, import_pillow
from data_prep.sunrgbd_trainval import convert_extracted, count_other_classes, list_scenes
from vrdistill_jax.command_line import run_verb
from vrdistill_jax.data.class_tables import SUNRGBD_CLASSES

EXPECTED_COUNTS = {"train": 5285, "val": 5050}
LABELS = ("v1", "v2")
NUM_POINTS = 0  # keep all: what a network reads is drawn anew in each epoch. VoteNet keeps 50,000 of a frame
FRAMES_FILE = "SUNRGBDMeta3DBB_v2.mat"
BOXES_2D_FILE = "SUNRGBDMeta2DBB_v2.mat"
LABELS_V1_FILE = "Metadata/SUNRGBDMeta.mat"
SPLIT_FILE = "traintestSUNRGBD/allsplit.mat"
_SENSORS = ("kv1", "kv2", "realsense", "xtion")
_TOOLBOX_FOLDERS = ("SUNRGBDtoolbox", "SUNRGBDtoolbox/SUNRGBDtoolbox")
_NAMED_CLASSES = 40
_MANY = 20  # missing images: more are no accident, and naming each of them helps nobody


def convert_raw(
    raw: str | os.PathLike,
    labels: str = "v1",
    num_points: int = NUM_POINTS,
    all_boxes: bool = False,
    **options: Any,
) -> ConversionReport:
    """Converts the published files: SUNRGBD.zip and SUNRGBDtoolbox.zip, unpacked, and the metadata.

    Args:
      raw: folder that holds SUNRGBD, SUNRGBDtoolbox and the .mat files.
      labels: "v1" (the benchmark's) or "v2".
      num_points: points kept per frame, 0 for all.
      all_boxes: keep the boxes that VoteNet's extraction loses, see `read_frames`.
      **options: output, workers, allow_partial, skip_failed, progress of `convert_dataset`.

    Returns:
      The report.

    Raises:
      ValueError: if a file that all frames need is missing or damaged, or images are missing.
    """
    import_pillow()
    folder = _folder(raw, "raw")
    root = _images_root(folder)
    v2 = _check_labels(labels) == "v2"
    frames = read_frames(
        _find_file(folder, FRAMES_FILE),
        labels_v1_path=None if v2 else _find_file(folder, LABELS_V1_FILE),
        boxes2d_path=_find_file(folder, BOXES_2D_FILE) if v2 and not all_boxes else None,
        all_boxes=all_boxes,
    )
    scenes = {f"{number:06d}": frame for number, frame in enumerate(frames, 1)}
    splits = _split_frames(scenes, read_split(_find_file(folder, SPLIT_FILE)))
    splits = _present(splits, scenes, root, bool(options.get("allow_partial")))
    known = [frame for frame in scenes.values() if isinstance(frame, Frame)]
    notes = _describe_left_out(sum((frame.boxes.other_classes for frame in known), Counter()))
    lost = sum(frame.unlisted for frame in known)
    if lost:
        notes.append(f"{lost} boxes after one without a 2D box are left out as VoteNet does; see --all_boxes")
    convert = functools.partial(convert_frame, root=str(root), frames=scenes, num_points=num_points)
    source = {"kind": "sunrgbd_raw", "num_points": num_points, "all_boxes": all_boxes}
    return _convert(labels, splits, convert, folder, source, {**options, "notes": notes})


def convert_trainval(
    trainval: str | os.PathLike, labels: str = "v1", num_points: int = NUM_POINTS, **options: Any
) -> ConversionReport:
    """Converts what VoteNet's Matlab scripts extracted: sunrgbd_trainval with depth/*.mat and label files.

    Args:
      trainval: that folder.
      labels: "v1" reads label_v1, "v2" label.
      num_points: points kept per frame, 0 for all.
      **options: as of `convert_raw`.

    Returns:
      The report.

    Raises:
      ValueError: if the folder or its split lists cannot be used.
    """
    folder = _folder(trainval, "trainval")
    splits = list_scenes(folder)
    notes = _describe_left_out(count_other_classes(folder, _check_labels(labels), splits))
    convert = functools.partial(convert_extracted, root=str(folder), labels=labels, num_points=num_points)
    source = {"kind": "sunrgbd_votenet_extracted", "num_points": num_points}
    return _convert(labels, splits, convert, folder, source, {**options, "notes": notes})


def convert_prepared(prepared: str | os.PathLike, labels: str = "v1", **options: Any) -> ConversionReport:
    """Converts the arrays that VoteNet's sunrgbd/sunrgbd_data.py has written.

    Args:
      prepared: folder that holds sunrgbd_pc_bbox_votes_50k_v1_train and _val.
      labels: what the arrays were made from; must not contradict the folders' names.
      **options: as of `convert_raw`.

    Returns:
      The report.

    Raises:
      ValueError: if scenes are missing or the labels are others.
    """
    from data_prep import votenet_prepared

    folder = _folder(prepared, "prepared")
    folders = votenet_prepared.find_sunrgbd_splits(folder)
    _check_labels(labels)
    other = next(name for name in LABELS if name != labels)
    if any(f"_{other}_" in path.name for path in folders.values()):
        names = " and ".join(path.name for path in folders.values())
        raise ValueError(f"{names} hold {other} labels by their names; add --labels={other}")
    splits = {
        split: votenet_prepared.list_scenes(path, votenet_prepared.SUNRGBD_PATTERN)
        for split, path in folders.items()
    }
    bound = {split: str(path) for split, path in folders.items()}
    convert = functools.partial(votenet_prepared.convert_votenet_sunrgbd, bound)
    return _convert(labels, splits, convert, folder, {"kind": "sunrgbd_votenet_prepared"}, options)


def convert_mmdet3d(folder: str | os.PathLike, labels: str, **options: Any) -> ConversionReport:
    """Converts mmdetection3d's `data/sunrgbd` folder (sunrgbd_infos_{train,val}.pkl and points).

    Args:
      folder: that folder.
      labels: what it was made from, "v1" or "v2"; the files do not say.
      **options: as of `convert_raw`.

    Returns:
      The report.

    Raises:
      ValueError: if an info file is missing or malformed.
    """
    from data_prep.mmdet3d import read_sunrgbd_infos

    root = _folder(folder, "mmdet3d")
    infos = {split: read_sunrgbd_infos(root, split) for split in EXPECTED_COUNTS}
    splits = {split: list(info.names) for split, info in infos.items()}
    convert = functools.partial(convert_by_split, {split: info.convert for split, info in infos.items()})
    notes = [f"{split}: {note}" for split, info in infos.items() for note in info.notes]
    options = {**options, "notes": notes}
    return _convert(_check_labels(labels), splits, convert, root, {"kind": "sunrgbd_mmdet3d"}, options)


def define_flags() -> None:
    """Declares the verb's flags."""
    flags.DEFINE_string("raw", None, "Folder of the published files: SUNRGBD, SUNRGBDtoolbox, *.mat.")
    flags.DEFINE_string("trainval", None, "sunrgbd_trainval, as VoteNet's Matlab scripts write it.")
    flags.DEFINE_string("prepared", None, "Folder of VoteNet's sunrgbd_pc_bbox_votes_50k_v1_{train,val}.")
    flags.DEFINE_string("mmdet3d", None, "mmdetection3d's data/sunrgbd folder.")
    flags.DEFINE_enum("labels", None, LABELS, "Version of the 3D boxes; v1, the benchmark's, by default.")
    flags.DEFINE_integer(
        "num_points", NUM_POINTS, "Points kept of a frame (--raw, --trainval); 0 for all.", 0
    )
    flags.DEFINE_bool("all_boxes", False, "With --raw: keep the boxes that VoteNet's extraction loses.")
    define_conversion_flags()


def main() -> int:
    """Converts what the flags name."""
    options = flags.FLAGS
    chosen = [name for name in ("raw", "trainval", "prepared", "mmdet3d") if options[name].value]
    if len(chosen) != 1:
        raise ValueError(
            "name the data with one of --raw, --trainval, --prepared and --mmdet3d, for example "
            "--raw=sunrgbd --output=datasets; docs/datasets_sunrgbd.md says how to get it"
        )
    if options.all_boxes and not options.raw:
        raise ValueError("--all_boxes goes with --raw only; the other folders hold the extracted boxes")
    if options.num_points != NUM_POINTS and not (options.raw or options.trainval):
        raise ValueError("--num_points goes with --raw and --trainval only; the others hold drawn points")
    shared = conversion_options()
    labels, num_points = options.labels or "v1", options.num_points
    if options.raw:
        report = convert_raw(options.raw, labels, num_points, options.all_boxes, **shared)
    elif options.trainval:
        report = convert_trainval(options.trainval, labels, num_points, **shared)
    elif options.prepared:
        report = convert_prepared(options.prepared, labels, **shared)
    elif options.labels:
        report = convert_mmdet3d(options.mmdet3d, options.labels, **shared)
    else:
        raise ValueError(
            "mmdetection3d's files do not say which boxes they hold (its converter takes version 2 "
            "unless told otherwise); add --labels=v2 or --labels=v1"
        )
    return print_report(report)


def _convert(
    labels: str,
    splits: dict[str, list[str]],
    convert: Callable[..., dict],
    folder: pathlib.Path,
    source: dict[str, Any],
    options: dict[str, Any],
) -> ConversionReport:
    return convert_dataset(
        f"sunrgbd_{labels}",
        {split: scenes for split, scenes in splits.items() if scenes},  # a stored split cannot be empty
        convert,
        SUNRGBD_CLASSES,
        f"SUN RGB-D, 10 classes, oriented boxes of label version {labels[1:]}",
        {**source, "folder": str(folder.resolve()), "labels": labels},
        expected_counts=EXPECTED_COUNTS,
        **options,
    )


def _split_frames(
    scenes: Mapping[str, Frame | str], split_of_folder: Mapping[str, str]
) -> dict[str, list[str]]:
    """Assigns the scenes to splits; one whose metadata is unusable goes to "train" or "val" by its number."""
    splits: dict[str, list[str]] = {split: [] for split in EXPECTED_COUNTS}
    for scene, frame in scenes.items():
        if isinstance(frame, str):  # it fails by name later; official scenes up to 5050 are val
            splits["val" if int(scene) <= EXPECTED_COUNTS["val"] else "train"].append(scene)
        elif frame.folder in split_of_folder:
            splits[split_of_folder[frame.folder]].append(scene)
        else:
            raise ValueError(
                f"the frame {frame.folder} of {FRAMES_FILE} is in neither list of {SPLIT_FILE}; the files "
                "do not belong together, download them again"
            )
    return splits


def _present(
    splits: dict[str, list[str]], scenes: Mapping[str, Frame | str], root: pathlib.Path, allow_partial: bool
) -> dict[str, list[str]]:
    """Finds the frames whose images are there, before hours are spent on the others."""
    missing = {}
    for scene, frame in scenes.items():
        if isinstance(frame, Frame):
            absent = [path for path in (frame.depth_path, frame.color_path) if not (root / path).is_file()]
            if absent:
                missing[scene] = absent[0]
    if allow_partial:
        return {split: [scene for scene in ids if scene not in missing] for split, ids in splits.items()}
    if len(missing) > _MANY:
        first = next(iter(missing.values()))
        raise ValueError(
            f"the images of {len(missing)} of {len(scenes)} frames are not there, such as {root / first}; "
            "unpack SUNRGBD.zip again, or convert what is there with --allow_partial"
        )
    return splits


def _describe_left_out(others: Counter[str]) -> list[str]:
    if not others:
        return []
    ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{count} {name}" for name, count in ordered[:_NAMED_CLASSES])
    more = ", ..." if len(ordered) > _NAMED_CLASSES else ""
    counted = f"{others.total()} boxes of {len(others)} classes outside the benchmark are left out"
    return [f"{counted}: {named}{more}"]


def _check_labels(labels: str) -> str:
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r}; known are {' and '.join(LABELS)}")
    return labels


def _folder(path: str | os.PathLike, flag: str) -> pathlib.Path:
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--{flag}={path} is no folder")
    return folder


def _images_root(folder: pathlib.Path) -> pathlib.Path:
    """Finds the folder in which the metadata's paths, SUNRGBD/kv2/..., begin."""
    for root in (folder, folder / "SUNRGBD", folder.parent):
        if any((root / "SUNRGBD" / sensor).is_dir() for sensor in _SENSORS):
            return root
    raise ValueError(
        f"{folder} holds no SUNRGBD/kv1, kv2, realsense or xtion; unpack SUNRGBD.zip there "
        "(docs/datasets_sunrgbd.md)"
    )


def _find_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Finds a metadata file in the usual places."""
    file_name = pathlib.PurePosixPath(name).name
    candidates = [base / file_name for base in (folder, folder / "SUNRGBD", folder.parent)]
    for base in (folder, folder / "SUNRGBD", folder.parent):
        candidates += [base / toolbox / name for toolbox in _TOOLBOX_FOLDERS]
        candidates += [base / toolbox / "Metadata" / file_name for toolbox in _TOOLBOX_FOLDERS]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"{name} is neither in {folder} nor in its SUNRGBDtoolbox; docs/datasets_sunrgbd.md says where "
            "to download it"
        )
    return found


if __name__ == "__main__":
    define_flags()
    run_verb(main, uses_jax=False)
