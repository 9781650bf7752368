"""Brings a stranger's scan to the contract's frame (metres, z up) and says what had to be assumed for it.

A detector fed with millimetres or with y up does not fail, it answers nonsense. So units and axes are
inferred where the evidence is strong, every inference is reported together with the option that overrides
it, and where the evidence is weak the scan is left as it is.
"""

from typing import NamedTuple

import numpy as np

from vrdistill_jax.data.point_files import PointCloud

METERS_PER_UNIT = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254, "ft": 0.3048}
UP_AXES = ("x", "y", "z", "-x", "-y", "-z")

# Automatic units: the longest side of a room lies between these, in metres.
_LARGEST_SCENE = 50.0
_SMALLEST_SCENE = 1.5
_FAR = 100.0  # metres: a scan whose middle is farther from the origin than this, and its size, is moved there
# Floors: flat pieces of surface are cells of this many metres whose points lie in a plane.
_CELL = 0.2
_FLOOR_BAND = 0.1  # metres in which a floor's pieces lie
_FLOOR_MARGIN = 0.12  # of the extent: how far from the end a floor may lie
_CONFIDENT = (
    (0.14, 2.0),
    (0.10, 4.0),
)  # least evidence and least ratio to the next best direction; one must hold
_SUSPICIOUS_FLOOR = 0.08
_SUSPICIOUS_RATIO = 1.7


class PointCheckError(ValueError):
    """A scan that no useful result can be expected of."""


class CheckedCloud(NamedTuple):
    """A scan in the contract's frame."""

    cloud: PointCloud  # metres, z up, finite
    warnings: list[str]  # what was removed or assumed, and the option that overrides it
    scene_from_input: np.ndarray  # f64[4, 4]: file's frame and units -> cloud


class UpEvidence(NamedTuple):
    """How much of the flat surface would be floor if an axis pointed up, in [0, 1]."""

    floor: dict[str, float]  # of the six directions
    looks_along: str | None  # axis along which a camera at the origin looks, which cannot be vertical


def check_points(
    cloud: PointCloud, *, units: str = "auto", up: str = "auto", min_points: int = 32, few_points: int = 500
) -> CheckedCloud:
    """Cleans a scan, converts it to metres with z up, and moves it to the origin if it lies far from there.

    Args:
      cloud: as `read_points` returns it; coordinates may be float64.
      units: "auto" (metres, centimetres or millimetres, by the extent), "m", "cm", "mm", "in" or "ft".
      up: "auto" (z unless there is strong evidence for y or -y), "x", "y", "z", "-x", "-y" or "-z".
      min_points: fewer valid points than this are an error.
      few_points: fewer valid points than this are a warning.

    Returns:
      The cloud in metres with z up, the warnings (those of the reader first) and the transform.

    Raises:
      PointCheckError: if the scan is empty, has too few valid points, or all of them lie on a point or a
      line. ValueError: if `units` or `up` is unknown.
    """
    if units != "auto" and units not in METERS_PER_UNIT:
        raise ValueError(f"units={units!r} is unknown; use auto, {', '.join(METERS_PER_UNIT)}")
    if up != "auto" and up not in UP_AXES:
        raise ValueError(f"up={up!r} is unknown; use auto, {', '.join(UP_AXES)}")
    warnings = list(cloud.warnings)
    cloud = _remove_invalid(cloud, warnings, min_points, few_points)
    low, high = np.percentile(cloud.xyz.astype(np.float64), [0.5, 99.5], axis=0)
    extent = high - low
    rounding = float(np.spacing(np.abs(cloud.xyz).max()))
    if extent.max() <= max(1e-6, 2 * rounding):
        raise PointCheckError(f"all {len(cloud.xyz)} points are the same; there is nothing to detect")
    unit = _guess_unit(float(extent.max()), warnings) if units == "auto" else units
    scale = METERS_PER_UNIT[unit]
    offset = _offset_of_far_axes(low * scale, high * scale, warnings)
    xyz = cloud.xyz.astype(np.float64) * scale - offset
    direction = _guess_up(xyz, warnings) if up == "auto" else up
    rotation = _z_up_rotation(direction)
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = rotation * scale, -rotation @ offset
    xyz = xyz @ rotation.T
    _check_extent(xyz, unit, warnings)
    return CheckedCloud(cloud._replace(xyz=xyz.astype(np.float32), warnings=()), warnings, transform)


def input_from_scene_boxes(boxes: np.ndarray, scene_from_input: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps boxes of the checked cloud back to the frame and units of the input file.

    Args:
      boxes: f32[d, 7] centre, full size, yaw in the contract's frame.
      scene_from_input: f64[4, 4] a rotation times one scale, and a shift, as `check_points` returns it.

    Returns:
      center: f64[d, 3] in the file's frame and units.
      corners: f64[d, 8, 3] likewise. Corners, because a yaw has no meaning where the file's z is not up.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 7)
    inverse = np.linalg.inv(scene_from_input)
    signs = np.array([[x, y, z] for z in (-1, 1) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
    local = signs * boxes[:, None, 3:6] / 2
    c, s = np.cos(boxes[:, None, 6]), np.sin(boxes[:, None, 6])
    x, y = c * local[..., 0] - s * local[..., 1], s * local[..., 0] + c * local[..., 1]
    turned = np.stack([x, y, local[..., 2]], -1)
    corners = boxes[:, None, :3] + turned
    return boxes[:, :3] @ inverse[:3, :3].T + inverse[:3, 3], corners @ inverse[:3, :3].T + inverse[:3, 3]


def measure_up_evidence(xyz: np.ndarray) -> UpEvidence:
    """Measures for each direction how likely it points up.

    The cloud is cut into cells of 0.2 m; a cell whose points lie in a plane is a piece of surface with a
    normal, so that dense parts count no more than sparse ones. If a direction is up, many pieces lie in one
    thin layer near the low end (the floor), hardly any in a layer at the other end (most scans lack a
    ceiling), and nearly all pieces are upright or level. The evidence is the share of pieces in the low
    layer, less that in the high layer, times the squared share of pieces that are upright or level.

    Args:
      xyz: f64[n, 3] metres.

    Returns:
      The evidence of the six directions and the viewing axis, if the scan is a single view with the camera
      at the origin.
    """
    floor = dict.fromkeys(UP_AXES, 0.0)
    centers, normals = _surface_pieces(xyz)
    low, high = np.percentile(xyz, [0.5, 99.5], axis=0)
    straddles = (low < -0.1) & (high > 0.1)
    # A depth camera sees nothing nearer than about half a metre, and only what lies in front of it.
    ahead = [axis for axis in range(3) if (low[axis] > 0.4 or high[axis] < -0.4) and straddles.sum() == 2]
    looks_along = "xyz"[ahead[0]] if len(ahead) == 1 else None
    if len(centers) < 30:
        return UpEvidence(floor, looks_along)
    for axis, name in enumerate("xyz"):
        if name == looks_along:
            continue
        tilt = np.abs(normals[:, axis])
        level = centers[tilt > 0.97, axis]
        consistency = np.mean((tilt > 0.97) | (tilt < 0.2))
        margin = _FLOOR_MARGIN * (high[axis] - low[axis])
        bottom = _fullest_band(level[level < low[axis] + margin]) / len(centers)
        top = _fullest_band(level[level > high[axis] - margin]) / len(centers)
        floor[name] = float(max(bottom - top, 0) * consistency**2)
        floor["-" + name] = float(max(top - bottom, 0) * consistency**2)
    return UpEvidence(floor, looks_along)


def _remove_invalid(cloud: PointCloud, warnings: list[str], min_points: int, few_points: int) -> PointCloud:
    total = len(cloud.xyz)
    if total == 0:
        raise PointCheckError("the cloud holds 0 points; there is nothing to detect")
    valid = np.isfinite(cloud.xyz).all(1)
    if not valid.all():
        warnings.append(
            f"removed {total - int(valid.sum())} of {total} points with NaN or infinite coordinates"
        )
    color = None if cloud.color is None else cloud.color[valid]
    cloud = cloud._replace(xyz=cloud.xyz[valid], color=color)
    zero = (cloud.xyz == 0).all(1)
    if zero.sum() > max(0.02 * len(zero), 1):  # depth cameras write missing pixels as the origin
        warnings.append(
            f"removed {int(zero.sum())} of {total} points at exactly (0, 0, 0), which mark missing depth"
        )
        color = None if cloud.color is None else cloud.color[~zero]
        cloud = cloud._replace(xyz=cloud.xyz[~zero], color=color)
    count = len(cloud.xyz)
    if count < min_points:
        problem = f"only {count} of {total} points are valid, at least {min_points} are needed"
        raise PointCheckError(f"{problem}; scan more densely")
    if count < few_points:
        usual = "detectors are trained on 20,000 or more"
        warnings.append(f"only {count} points: results are unreliable below {few_points}, {usual}")
    return cloud


def _guess_unit(longest: float, warnings: list[str]) -> str:
    """Takes metres unless a room would be longer than 50 m; then the unit that makes it closer to 6 m."""
    if longest <= _LARGEST_SCENE:
        return "m"
    if longest < _SMALLEST_SCENE * 100:
        return "m"  # a hall in metres or a table top in centimetres: _check_extent warns
    candidates = [unit for unit in ("cm", "mm") if longest * METERS_PER_UNIT[unit] <= _LARGEST_SCENE]
    if not candidates:
        return "m"
    unit = min(candidates, key=lambda unit: abs(np.log(longest * METERS_PER_UNIT[unit] / 6.0)))
    name = {"cm": "centimetres", "mm": "millimetres"}[unit]
    assumed = f"assumed {name} and converted to metres; override with --units"
    warnings.append(f"the scan is {longest:.4g} units long: {assumed}")
    return unit


def _offset_of_far_axes(low: np.ndarray, high: np.ndarray, warnings: list[str]) -> np.ndarray:
    """What to subtract, in metres along the file's axes: survey coordinates leave float32 no digits for the scan."""
    middle = (low + high) / 2
    offset = np.where(np.abs(middle) > max(_FAR, (high - low).max()), np.rint(middle), 0.0)
    if offset.any():
        by = ", ".join(f"{value:.0f}" for value in 0.0 - offset)
        warnings.append(
            f"the scan lies {np.abs(offset).max():,.0f} m from the origin: moved it by ({by}) m along its own axes; "
            "boxes are given in both places"
        )
    return offset


def _guess_up(xyz: np.ndarray, warnings: list[str]) -> str:
    if np.ptp(xyz, axis=0).max() > 200:  # not a room: nothing below would make sense
        return "z"
    evidence = measure_up_evidence(xyz)
    floor = evidence.floor
    z = max(floor["z"], floor["-z"])
    best = max(("y", "-y"), key=lambda name: floor[name])
    rival = max(z, floor["-y" if best == "y" else "y"])
    if any(floor[best] >= least and floor[best] >= ratio * rival for least, ratio in _CONFIDENT):
        share = f"{floor[best]:.0%} of the surface lies at the low end of {best}, {z:.0%} at an end of z"
        warnings.append(
            f"assumed that {best} points up ({share}) and turned the scan to z up; override with --up"
        )
        return best
    doubtful = max(UP_AXES, key=lambda name: floor[name])
    if (
        doubtful != "z"
        and floor[doubtful] >= _SUSPICIOUS_FLOOR
        and floor[doubtful] >= _SUSPICIOUS_RATIO * floor["z"]
    ):
        warnings.append(f"kept z up, but {doubtful} may point up instead; if so, pass --up={doubtful}")
    elif floor["z"] < 0.05 and _is_flattest_along_y(xyz):  # a room with a ceiling as large as its floor
        warnings.append("kept z up, but the scan is flattest along y; if y points up, pass --up=y (or -y)")
    elif evidence.looks_along == "z":
        warnings.append(
            "kept z up, but the scan looks like a camera frame (z forward); if so, pass --up=-y (or y)"
        )
    return "z"


def _is_flattest_along_y(xyz: np.ndarray) -> bool:
    x, y, z = np.ptp(np.percentile(xyz, [0.5, 99.5], axis=0), axis=0)
    return bool(1.8 < y < 3.6 and y < 0.75 * min(x, z))


def _check_extent(xyz: np.ndarray, unit: str, warnings: list[str]) -> None:
    low, high = np.percentile(xyz, [0.5, 99.5], axis=0)
    extent = high - low
    size = " x ".join(f"{value:.3g}" for value in extent)
    spread = np.linalg.svd(xyz[:: max(1, len(xyz) // 20000)] - xyz.mean(0), compute_uv=False)
    if spread[1] < 1e-4 * spread[0]:
        raise PointCheckError("all points lie on one line; there is nothing to detect")
    if spread[2] < 1e-4 * spread[0]:
        warnings.append("all points lie in one plane: no object can be told apart")
    if extent.max() > _LARGEST_SCENE:
        warnings.append(f"the scan measures {size} m, more than any room (units are {unit}): check --units")
    elif extent.max() < 0.8:
        warnings.append(
            f"the scan measures {size} m, less than a piece of furniture (units are {unit}): check --units"
        )
    elif extent[2] > 6:
        warnings.append(
            f"the scan measures {size} m: {extent[2]:.3g} m is tall for a room, check --units and --up"
        )
    far = (xyz < low - 2 * extent.max()) | (xyz > high + 2 * extent.max())
    if far.any():
        warnings.append(
            f"{int(far.any(1).sum())} stray points lie far outside the scan; remove them for better results"
        )


def _z_up_rotation(direction: str) -> np.ndarray:
    """The rotation that takes the given direction to +z; the other axes turn as little as possible."""
    return np.array(
        {
            "z": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            "y": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
            "x": [[0, 0, -1], [0, 1, 0], [1, 0, 0]],
            "-z": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
            "-y": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
            "-x": [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
        }[direction],
        np.float64,
    )


def _surface_pieces(xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and unit normals of the cells whose points lie in a plane."""
    cell = np.floor((xyz - xyz.min(0)) / _CELL).astype(np.int64)
    shape = cell.max(0) + 1
    key = (cell[:, 0] * shape[1] + cell[:, 1]) * shape[2] + cell[:, 2]
    _, row, count = np.unique(key, return_inverse=True, return_counts=True)
    center = np.stack([np.bincount(row, xyz[:, a]) for a in range(3)], 1) / count[:, None]
    offset = xyz - center[row]
    products = [np.bincount(row, offset[:, a] * offset[:, b]) for a in range(3) for b in range(3)]
    covariance = np.stack(products, 1).reshape(-1, 3, 3) / count[:, None, None]
    variance, vectors = np.linalg.eigh(covariance)
    planar = (count >= 8) & (variance[:, 0] < 0.05 * variance[:, 1]) & (variance[:, 1] > (0.15 * _CELL) ** 2)
    return center[planar], vectors[planar, :, 0]


def _fullest_band(levels: np.ndarray) -> int:
    if len(levels) == 0:
        return 0
    levels = np.sort(levels)
    return int((np.searchsorted(levels, levels + _FLOOR_BAND, side="right") - np.arange(len(levels))).max())
