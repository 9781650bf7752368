"""SUN RGB-D's depth images as points, read as the SUN RGB-D toolbox does, without Matlab.

The toolbox's upright frame (x right, y forward, z up) is the contract's frame.
"""

import io
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.sunrgbd_annotations import read_text, sample_from_points
from data_prep.sunrgbd_metadata import Frame, check_intrinsics, check_rotation

MAX_DEPTH = 8.0  # metres; farther points are moved here, as the toolbox does
MAX_PIXELS = 1 << 24  # the dataset's largest image has 0.4 million
MAX_IMAGE_BYTES = 1 << 27
UPRIGHT_FROM_CAMERA = np.array(
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]
)  # camera: y down, z forward

_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    EOFError,
)


def convert_frame(
    scene: str, split: str, root: str | os.PathLike, frames: Mapping[str, Frame | str], num_points: int
) -> dict:
    """Reads one frame of the metadata as a sample, for `convert_dataset`.

    Args:
      scene: key of `frames`.
      split: not used.
      root: the folder that holds SUNRGBD.
      frames: per scene its frame, or why it cannot be used.
      num_points: points kept per scene, 0 for all.

    Returns:
      The sample.

    Raises:
      ValueError: naming the file that cannot be read and why.
    """
    frame = frames[scene]
    if isinstance(frame, str):
        raise ValueError(frame)
    root = pathlib.Path(root)
    xyz, color = read_colored_points(
        root / frame.depth_path, root / frame.color_path, frame.intrinsics, frame.tilt
    )
    return sample_from_points(scene, xyz, color, frame.boxes, num_points)


def read_frame_folder(folder: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Reads one published frame folder by its own text files, without the Matlab metadata.

    Args:
      folder: holds depth_bfx/*.png, image/*.jpg, intrinsics.txt and extrinsics/*.txt (of several, the last
        by name).

    Returns:
      (xyz f32[m, 3] metres, upright; color f32[m, 3] in [0, 1]).

    Raises:
      ValueError: naming the file that is missing or damaged.
    """
    folder = pathlib.Path(folder)
    paths = []
    for pattern in ("depth_bfx/*.png", "image/*.jpg", "extrinsics/*.txt"):
        found = sorted(folder.glob(pattern))
        if not found:
            raise ValueError(f"{folder} holds no {pattern}; is it a frame folder of SUN RGB-D?")
        paths.append(found[-1])
    depth_path, color_path, extrinsics_path = paths
    intrinsics = _read_numbers(folder / "intrinsics.txt", 9).reshape(3, 3)
    extrinsics = _read_numbers(extrinsics_path, 12).reshape(3, 4)
    try:
        intrinsics = check_intrinsics(intrinsics)
        tilt = check_rotation(tilt_from_extrinsics(extrinsics[:, :3]))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return read_colored_points(depth_path, color_path, intrinsics, tilt)


def read_colored_points(
    depth_path: str | os.PathLike, color_path: str | os.PathLike, intrinsics: np.ndarray, tilt: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a depth image and its photograph as points; arguments and errors as in the functions below.

    Returns:
      (xyz f32[m, 3] metres, upright; color f32[m, 3] in [0, 1]).
    """
    encoded = read_depth_image(depth_path)
    image = read_color_image(color_path)
    if image.shape[:2] != encoded.shape:
        raise ValueError(
            f"{color_path} has {image.shape[:2]} rows and columns but {depth_path} has {encoded.shape}; they "
            "belong to different frames"
        )
    xyz, pixel = points_from_depth(encoded, intrinsics, tilt)
    if not len(xyz):
        raise ValueError(f"{depth_path} has no pixel with a depth; download it again")
    return xyz, image.reshape(-1, 3)[pixel].astype(np.float32) / np.float32(255)


def points_from_depth(
    encoded: np.ndarray, intrinsics: np.ndarray, tilt: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Turns a depth image into points.

    Args:
      encoded: u16[h, w] as the PNG has it: millimetres with the bits rotated left by three, 0 where nothing
        was measured.
      intrinsics: f64[3, 3] pixels, for pixel coordinates that count from 1.
      tilt: f64[3, 3] rotation to the upright frame.

    Returns:
      (f32[m, 3] metres, z up; i64[m] the points' pixels, row * w + column). Column by column, as Matlab
      counts; pixels without depth are left out.

    Source: SUN RGB-D toolbox, read3dPoints.m, in single precision like it.
    """
    height, width = encoded.shape
    millimetres = ((encoded >> np.uint16(3)) | (encoded << np.uint16(13))).T.ravel()
    order = np.flatnonzero(millimetres)
    depth = np.minimum(millimetres[order].astype(np.float32) / np.float32(1000), np.float32(MAX_DEPTH))
    column, row = order // height, order % height
    x = (column + 1 - intrinsics[0, 2]).astype(np.float32) * depth / np.float32(intrinsics[0, 0])
    y = (row + 1 - intrinsics[1, 2]).astype(np.float32) * depth / np.float32(intrinsics[1, 1])
    xyz = np.stack([x, depth, -y], axis=1) @ np.asarray(tilt, np.float32).T
    return xyz, row * width + column


def tilt_from_extrinsics(rotation: np.ndarray) -> np.ndarray:
    """Turns the rotation of a frame folder's extrinsics file into the metadata's Rtilt.

    Args:
      rotation: f64[3, 3] between camera frames (y down, z forward).

    Returns:
      f64[3, 3] rotates (x, depth, -y) to the upright frame.
    """
    return UPRIGHT_FROM_CAMERA @ rotation @ UPRIGHT_FROM_CAMERA.T


def read_depth_image(path: str | os.PathLike) -> np.ndarray:
    """Reads a 16-bit grey PNG as u16[h, w].

    Raises:
      ValueError: naming the file, if it is missing, damaged, too large or of another kind.
    """
    image = _read_image(path, "PNG")
    if not image.mode.startswith("I"):
        raise ValueError(
            f"{path} is no 16-bit grey image (Pillow's mode {image.mode}); use depth_bfx/*.png as published"
        )
    return np.array(image).astype(np.uint16)


def read_color_image(path: str | os.PathLike) -> np.ndarray:
    """Reads a photograph as u8[h, w, 3].

    Raises:
      ValueError: naming the file, if it is missing, damaged, too large or of another kind.
    """
    return np.array(_read_image(path, "JPEG", "PNG").convert("RGB"))


def import_pillow() -> Any:
    """Returns the package PIL with PIL.Image.

    Raises:
      ValueError: naming the extra to install, if it is missing.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise ValueError("reading images needs Pillow: pip install 'vrdistill-jax[data]'") from error
    return PIL


def _read_image(path: str | os.PathLike, *formats: str) -> Any:
    pillow = import_pillow()
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{path} has {size} bytes, more than {MAX_IMAGE_BYTES}; is it the right file?")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); unzip it again") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images; the limit here is lower
            with pillow.Image.open(io.BytesIO(data), formats=formats) as image:  # reads the header only
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(f"it has {width} x {height} pixels; at most {MAX_PIXELS} are read")
                image.verify()  # the checksums of a PNG, which loading ignores; the image is then used up
            with pillow.Image.open(io.BytesIO(data), formats=formats) as image:
                image.load()
                return image
    except pillow.UnidentifiedImageError as error:
        raise ValueError(f"{path} is no {' or '.join(formats)} image; unzip it again") from error
    except (pillow.Image.DecompressionBombError, *_IMAGE_ERRORS) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image: {reason}; unzip it again") from error


def _read_numbers(path: pathlib.Path, count: int) -> np.ndarray:
    words = read_text(path).split()
    try:
        values = np.array([float(word) for word in words])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; unzip it again") from error
    if values.size != count or not np.isfinite(values).all():
        raise ValueError(
            f"{path} holds {values.size} values, expected {count} finite numbers; unzip it again"
        )
    return values
