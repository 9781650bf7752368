"""Readers for the scans that people bring: `.ply`, `.pcd`, `.las`, `.npy`, `.npz`, mmdetection3d's `.bin`.

Coordinates are returned as the file has them; `point_checks` deals with units, axes and invalid rows.
`point_tables` and `point_formats` read the formats without trusting them; here it is decided what the
columns mean.
"""

import io
import os
import pathlib
import struct
import zipfile
import zlib
from typing import BinaryIO, NamedTuple

import numpy as np

from vrdistill_jax.data.point_formats import read_las_table, read_pcd_table
from vrdistill_jax.data.point_tables import (
    MAX_ARRAY_BYTES,
    PlyTable,
    PointFileError,
    expansion_limit,
    read_npy_table,
    read_ply_table,
)

__all__ = ["FORMATS", "PointCloud", "PointFileError", "read_points"]

FORMATS = (".ply", ".pcd", ".las", ".npy", ".npz", ".bin")
XYZ_KEYS = (
    *("points", "pc", "xyz", "point_cloud", "pointcloud", "cloud", "coord", "coords"),
    *("vertices", "verts", "pos", "positions"),
)
COLOR_KEYS = ("color", "colors", "colour", "colours", "rgb")

_COLOR_NAMES = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
_ARCHIVE_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError),
    *(ValueError, OverflowError, struct.error),
)


class PointCloud(NamedTuple):
    """A scan as its file has it."""

    xyz: (
        np.ndarray
    )  # f32[n, 3] in the units and axes of the file; may hold NaN. f64 where float32 would lose the scan
    # (coordinates far from the origin), until `check_points` moves it
    color: np.ndarray | None  # f32[n, 3] in [0, 1]
    info: str  # what was read, for a log line
    warnings: tuple[str, ...] = ()  # what was assumed or ignored


def read_points(path: str | os.PathLike, columns: int | None = None) -> PointCloud:
    """Reads a point cloud from a file of one of the `FORMATS`.

    Columns of an array: the first three are x, y, z; of six or more, columns 4 to 6 are red, green, blue
    (0..1 or 0..255, told apart by their range); any other column is ignored with a warning. A `.bin` is
    float32 without a header: six columns if they look like points with colours, else the only column count
    that fits.

    Args:
      path: the file; its ending chooses the reader.
      columns: values per point of a `.bin`, at least 3; None guesses.

    Returns:
      The points in the file's own units and axes.

    Raises:
      PointFileError: if the file is missing, empty, truncated, damaged, of another kind or ambiguous.
    """
    path = pathlib.Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, False for names that no system allows
        raise PointFileError(path, "is not a file but a folder", "name the scan in it")
    suffix = path.suffix.lower()
    if suffix == ".laz":
        raise PointFileError(path, "is compressed (LAZ)", "unpack it to .las, for example with laszip")
    if suffix not in FORMATS:
        raise PointFileError(path, f"unknown ending {suffix!r}", f"convert it to one of {', '.join(FORMATS)}")
    if columns is not None and columns < 3:
        raise PointFileError(path, f"columns={columns}", "a point has at least 3 columns (x, y, z)")
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise PointFileError(path, what, "check the path")
        size = path.stat().st_size
        if size == 0:
            raise PointFileError(path, "the file is empty (0 bytes)", "export it again")
        with path.open("rb") as stream:
            match suffix:
                case ".ply":
                    return _read_ply(path, stream, size)
                case ".pcd":
                    return _cloud_from_table(path, read_pcd_table(path, stream, size), "PCD")
                case ".las":
                    return _cloud_from_table(path, read_las_table(path, stream, size), "LAS")
                case ".npy":
                    return _cloud_from_array(path, read_npy_table(path, stream, size), "npy")
                case ".npz":
                    return _read_npz(path, stream)
                case _:
                    return _read_bin(path, stream, size, columns)
    except OSError as error:
        raise PointFileError(
            path, f"cannot be read ({error.strerror or error})", "check the path and its permissions"
        ) from error
    except MemoryError as error:
        raise PointFileError(path, "does not fit into memory", "thin the cloud first") from error


def _read_ply(path: pathlib.Path, stream: BinaryIO, size: int) -> PointCloud:
    names = ("x", "y", "z", *(name for triple in _COLOR_NAMES for name in triple))
    return _cloud_from_table(path, read_ply_table(path, stream, size, names), "PLY")


def _cloud_from_table(path: pathlib.Path, table: PlyTable, kind: str) -> PointCloud:
    colors = next((triple for triple in _COLOR_NAMES if set(triple) <= table.columns.keys()), ())
    color = None
    if colors:
        values = _stack([table.columns[name] for name in colors])
        color = _scale_color(values, table.warnings, table.kinds[colors[0]])
    xyz = _stack([table.columns[name] for name in "xyz"])
    return _cloud(path, xyz, color, f"{kind}, {table.layout}", table.warnings)


def _read_npz(path: pathlib.Path, stream: BinaryIO) -> PointCloud:
    try:
        with zipfile.ZipFile(stream) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            listed = ", ".join(ascii(key)[1:-1] for key in keys[:30]) or "none"
            key = next((key for key in XYZ_KEYS if key in keys), keys[0] if len(keys) == 1 else None)
            if key is None:
                raise PointFileError(
                    path,
                    f"no known array of points (arrays: {listed})",
                    f"name it one of {', '.join(XYZ_KEYS)}",
                )
            array = _read_member(path, archive, key)
            color_key = next((key for key in COLOR_KEYS if key in keys), None)
            color = None if color_key is None else _read_member(path, archive, color_key)
    except PointFileError:
        raise
    except _ARCHIVE_ERRORS as error:
        raise PointFileError(
            path, f"is not an intact .npz archive ({error})", "save it again with numpy.savez"
        ) from error
    cloud = _cloud_from_array(path, array, f"npz, array '{ascii(key)[1:-1]}'")
    if color is None or cloud.color is not None:
        return cloud
    if color.shape != cloud.xyz.shape or color.dtype.kind not in "iuf":
        note = f"array '{color_key}' of shape {color.shape} does not match the points and was ignored"
        return cloud._replace(warnings=(*cloud.warnings, note))
    notes = list(cloud.warnings)
    scaled = _scale_color(color, notes, color.dtype.str[1:])
    return cloud._replace(
        color=scaled, warnings=tuple(notes), info=cloud.info + f", colours from '{color_key}'"
    )


def _read_member(path: pathlib.Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    member = archive.getinfo(key + ".npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise PointFileError(
            path,
            f"array {key!a} is packed by method {member.compress_type}, which NumPy never uses",
            "save it again with numpy.savez_compressed",
        )
    limit = expansion_limit(member.compress_size)
    if member.compress_type != zipfile.ZIP_STORED and member.file_size > limit:
        raise PointFileError(
            path,
            f"array {key!a} unpacks from {member.compress_size} to {member.file_size} bytes, more than {limit}",
            "save it again with numpy.savez, uncompressed",
        )
    if member.file_size > MAX_ARRAY_BYTES:
        raise PointFileError(
            path,
            f"array {key!a} takes {member.file_size} bytes, more than {MAX_ARRAY_BYTES}",
            "thin the cloud first",
        )
    with archive.open(member) as stream:
        data = stream.read(member.file_size)
        stream.read(1)  # reaches the end of the member, where its checksum is compared
    return read_npy_table(path, io.BytesIO(data), len(data), f"array {key!a}: ")


def _cloud_from_array(path: pathlib.Path, array: np.ndarray, info: str) -> PointCloud:
    warnings: list[str] = []
    if array.dtype.names:
        names = {name.lower(): name for name in array.dtype.names}
        if array.ndim != 1 or not {"x", "y", "z"} <= names.keys():
            raise PointFileError(
                path,
                f"a structured array of fields {', '.join(names)}",
                "give it fields x, y, z, or save [n, 3]",
            )
        colors = next(
            ([names[name] for name in triple] for triple in _COLOR_NAMES if set(triple) <= names.keys()), []
        )
        xyz = _stack([array[names[name]] for name in "xyz"])
        if not colors:
            return _cloud(path, xyz, None, info, warnings)
        color = _scale_color(
            _stack([array[name] for name in colors]), warnings, array.dtype[colors[0]].str[1:]
        )
        return _cloud(path, xyz, color, info, warnings)
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "iuf":
        raise PointFileError(
            path,
            f"an array of shape {array.shape} and type {array.dtype}",
            "save points as rows: [n, 3] or [n, 6]",
        )
    if array.shape[0] <= 9 and array.shape[1] > 2 * max(array.shape[0], 6):
        raise PointFileError(
            path,
            f"an array of shape {array.shape} seems to hold points as columns",
            "save its transpose, [n, 3] or [n, 6]",
        )
    color = None
    used = 3
    if array.shape[1] >= 6:
        color, used = _scale_color(array[:, 3:6], warnings, array.dtype.str[1:]), 6
    if array.shape[1] > used:
        warnings.append(
            f"columns {used + 1} to {array.shape[1]} of the array (height, intensity, label ...) were ignored"
        )
    return _cloud(path, array[:, :3], color, f"{info}, {array.shape[1]} columns", warnings)


def _read_bin(path: pathlib.Path, stream: BinaryIO, size: int, columns: int | None) -> PointCloud:
    start = stream.read(6)
    stream.seek(0)
    if start == b"\x93NUMPY" or start[:4] in (b"PK\x03\x04", b"ply\n", b"ply\r"):
        raise PointFileError(
            path,
            f"starts with {start!r}: it has another format than its name says",
            "rename it to .npy, .npz or .ply",
        )
    if size % 4:
        raise PointFileError(
            path,
            f"{size} bytes are not a whole number of float32 values",
            "the file is truncated or not float32",
        )
    if size > MAX_ARRAY_BYTES:
        raise PointFileError(path, f"{size} bytes, more than {MAX_ARRAY_BYTES}", "thin the cloud first")
    values = np.frombuffer(stream.read(size), "<f4")
    if columns is not None:
        if values.size % columns:
            raise PointFileError(
                path, f"{values.size} values do not fill rows of {columns} columns", "give another --columns"
            )
        return _cloud_from_array(path, values.reshape(-1, columns), "bin")
    fits = [count for count in (6, 3, 4, 5, 7, 8, 9) if _bin_columns_fit(values, count)]
    if 6 in fits and _looks_like_color(values.reshape(-1, 6)[:, 3:]):
        fits = [6]
    if len(fits) != 1:
        what = (
            f"could have {' or '.join(map(str, fits))} columns"
            if fits
            else "has no plausible number of columns"
        )
        raise PointFileError(
            path,
            f"{values.size} float32 values: the file {what}",
            "say how many values a point has with --columns",
        )
    cloud = _cloud_from_array(path, values.reshape(-1, fits[0]), "bin")
    if fits[0] == 6 and cloud.color is not None:
        return cloud
    note = f"assumed {fits[0]} float32 values per point; override with --columns"
    return cloud._replace(warnings=(note, *cloud.warnings))


def _bin_columns_fit(values: np.ndarray, columns: int) -> bool:
    """Whether rows of this length make sense.

    With the right length every residue class of rows has the same distribution in each column; with a wrong
    one the meaning of a column changes from row to row with a short period. A length is also wrong when the
    halves or thirds of a row have the same distribution: then a half or a third of it is right.
    """
    if values.size % columns or values.size < columns * 64:
        return False
    table = values[: values.size // columns * columns].reshape(-1, columns)
    table = table[: 1 << 18]
    if (~np.isfinite(table[:, :3]) | (np.abs(table[:, :3]) > 1e6)).any(1).mean() > 0.3:
        return False  # text or another number format
    if ((table[:, :3] != 0) & (np.abs(table[:, :3]) < 1e-20)).mean() > 0.1:
        return False  # integers read as floats
    for parts in (2, 3):
        if (
            columns % parts == 0
            and columns // parts >= 3
            and _same_distribution(np.split(table, parts, axis=1))
        ):
            return False
    periods = [period for period in (2, 3, 4, 5, 7) if len(table) >= 50 * period]  # fewer rows are too noisy
    return all(_same_distribution([table[phase::period] for phase in range(period)]) for period in periods)


def _same_distribution(parts: list[np.ndarray]) -> bool:
    """Compares quartiles of each column, relative to the column's whole spread."""
    levels = (0.1, 0.25, 0.5, 0.75, 0.9)
    with np.errstate(all="ignore"):
        quantiles = np.array(
            [np.quantile(np.where(np.isfinite(part), part, 0), levels, axis=0) for part in parts], np.float64
        )
        spread = quantiles.max((0, 1)) - quantiles.min((0, 1))
        return bool((np.ptp(quantiles, axis=0) <= 0.25 * spread + 1e-12).all())


def _looks_like_color(values: np.ndarray) -> bool:
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
        return False
    return bool(values.max() <= 1 or (values == np.rint(values)).all())


def _scale_color(values: np.ndarray, warnings: list[str], kind: str) -> np.ndarray | None:
    """Brings colours to [0, 1] by their type and range; None where they cannot be colours."""
    values = _float64(values)
    finite = np.isfinite(values)
    if not finite.all():
        warnings.append(
            f"{int((~finite).any(1).sum())} points have a NaN or infinite colour; it was set to grey"
        )
    low, high = values.min(initial=np.inf, where=finite), values.max(initial=-np.inf, where=finite)
    if not finite.any() or low < -1e-6 or high > 65535:
        warnings.append(f"the colour values range from {low:.4g} to {high:.4g} (normals?) and were ignored")
        return None
    if kind in ("u1", "i1"):
        scale = 255.0
    elif high <= 1 + 1e-6:
        scale = 1.0
    else:
        scale = 255.0 if high <= 255 else 65535.0
    if scale == 65535.0 and kind != "u2":
        warnings.append(f"the colour values range from {low:.4g} to {high:.4g} and were ignored")
        return None
    return np.clip(np.where(finite, values / scale, 0.5), 0, 1).astype(np.float32)


def _cloud(
    path: pathlib.Path, xyz: np.ndarray, color: np.ndarray | None, info: str, warnings: list[str]
) -> PointCloud:
    if len(xyz) == 0:
        raise PointFileError(path, "holds 0 points", "export it again")
    xyz = _float64(xyz)
    finite = np.isfinite(xyz).all(1) & (np.abs(xyz) < 1e30).all(1)
    xyz = np.where(finite[:, None], xyz, np.nan)
    single = xyz.astype(np.float32)
    kept = single
    if finite.any():
        extent = float(np.ptp(xyz[finite], axis=0).max())
        step = float(np.spacing(np.float32(np.abs(xyz[finite]).max())))
        if extent > 0 and step > 1e-4 * extent:  # survey coordinates
            if not np.array_equal(single, xyz, equal_nan=True):
                kept = xyz
            else:
                warnings.append(
                    f"coordinates lie far from the origin and the file's float32 keeps steps of {step:.3g} only; "
                    "export it with double precision or with an offset subtracted"
                )
    return PointCloud(kept, color, f"{info}, {len(xyz)} points", tuple(warnings))


def _float64(values: np.ndarray) -> np.ndarray:
    with np.errstate(
        invalid="ignore"
    ):  # damaged floats may be signalling NaNs, which warn when they are converted
        return values.astype(np.float64)


def _stack(columns: list[np.ndarray]) -> np.ndarray:
    return np.stack([_float64(column) for column in columns], 1)
