"""Writes a small SUN RGB-D as it was published, and reads its depth images pixel by pixel."""

import pathlib

import numpy as np
import scipy.io
from PIL import Image

PUBLISHED_ROOT = "/n/fs/sun3d/data/"
INTRINSICS = np.array([[30.0, 0.0, 11.5], [0.0, 31.0, 8.25], [0.0, 0.0, 1.0]])


def slow_points(encoded, intrinsics, tilt):
    """The toolbox's formulas, one pixel at a time, in double precision: (points, (row, column) of each)."""
    points, pixels = [], []
    height, width = encoded.shape
    for u in range(1, width + 1):
        for v in range(1, height + 1):
            code = int(encoded[v - 1, u - 1])
            millimetres = code // 8 + (code % 8) * 8192
            if millimetres == 0:
                continue
            depth = min(millimetres / 1000, 8.0)
            x = (u - intrinsics[0, 2]) * depth / intrinsics[0, 0]
            y = (v - intrinsics[1, 2]) * depth / intrinsics[1, 1]
            points.append(tilt @ np.array([x, depth, -y]))
            pixels.append((v - 1, u - 1))
    return np.array(points).reshape(-1, 3), pixels


def tilt_down(degrees):
    """Upright from a camera that looks down by an angle: straight ahead becomes ahead and down."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1.0, 0, 0], [0, c, s], [0, -s, c]])


def encode(millimetres):
    code = np.asarray(millimetres, np.uint16)
    return (code << np.uint16(3)) | (code >> np.uint16(13))


def struct_array(items):
    """A 1 x n Matlab struct array for savemat."""
    if not items:
        return np.zeros((0, 0))
    out = np.empty((1, len(items)), [(name, object) for name in items[0]])
    for column, item in enumerate(items):
        for name, value in item.items():
            out[0, column][name] = value
    return out


def make_object(name, centroid=(0.1, 2.0, -0.5), coeffs=(-0.4, 0.6, 0.5), direction=(1.0, 0.0)):
    return {
        "basis": np.eye(3),
        "coeffs": np.array([coeffs], float),
        "centroid": np.array([centroid], float),
        "classname": name,
        "labelname": [],
        "sequenceName": "SUNRGBD/x",
        "orientation": np.array([[*direction, 0.0]]),
        "label": np.zeros((0, 0)),
    }


def flat_boxes(objects):
    return struct_array(
        [{"objid": 1, "gtBb2D": np.ones((1, 4)), "classname": o["classname"]} for o in objects]
    )


class PublishedTree:
    """A folder laid out like the unpacked downloads; change `entries` and call `write_metadata` to alter it."""

    def __init__(
        self, root: pathlib.Path, train: int = 2, val: int = 2, shape=(17, 23), seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.root, self.entries, self.v1, self.flat = pathlib.Path(root), [], [], []
        self.depths, self.colors, self.tilts = [], [], []
        self.splits = {"alltest": [], "alltrain": []}
        for number in range(1, val + train + 1):  # the published test frames come first
            folder = f"SUNRGBD/kv2/kinect2data/{number:06d}_scan-resize"
            tilt = tilt_down(rng.uniform(0, 30))
            millimetres = rng.integers(500, 9000, shape) * (rng.random(shape) < 0.8)
            depth = encode(millimetres)
            color = np.kron(rng.integers(0, 255, (1, 2, 3)), np.ones((shape[0], -(-shape[1] // 2), 1)))
            color = color[:, : shape[1]].astype(np.uint8)
            self.depths.append(depth)
            self.colors.append(color)
            self.tilts.append(tilt)
            for part, image in (("depth_bfx/d.png", depth), ("image/c.jpg", color)):
                path = self.root / folder / part
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, **({"quality": 95} if image is color else {}))
            objects = [
                make_object("chair", rng.uniform(-1, 1, 3), rng.uniform(-1, 1, 3), rng.normal(size=2)),
                make_object("lamp"),
                make_object("bed", (0, 3, -1), (1.0, 0.75, 0.5), (0.0, -1.0)),
            ][: number % 4]  # 1, 2, 3, 0 objects
            self.entries.append(
                {
                    "sequenceName": folder,
                    "Rtilt": tilt,
                    "K": INTRINSICS,
                    "depthpath": f"{PUBLISHED_ROOT}{folder}/depth_bfx/d.png",
                    "rgbpath": f"{PUBLISHED_ROOT}{folder}/image/c.jpg",
                    "anno_extrinsics": np.eye(3),
                    "depthname": "d.png",
                    "rgbname": "c.jpg",
                    "sensorType": "kv2",
                    "valid": 1,
                    "groundtruth3DBB": objects,
                }
            )
            self.v1.append([{**o, "centroid": o["centroid"] + 0.25} for o in objects])
            self.flat.append([{"classname": o["classname"]} for o in objects])
            self.splits["alltest" if number <= val else "alltrain"].append(f"{PUBLISHED_ROOT}{folder}")
        self.write_metadata()

    def depth_path(self, number: int) -> pathlib.Path:
        return self.root / self.entries[number - 1]["sequenceName"] / "depth_bfx" / "d.png"

    def write_metadata(self) -> None:
        toolbox = self.root / "SUNRGBDtoolbox"
        for folder in ("Metadata", "traintestSUNRGBD"):
            (toolbox / folder).mkdir(parents=True, exist_ok=True)
        v2 = [{**e, "groundtruth3DBB": struct_array(e["groundtruth3DBB"])} for e in self.entries]
        v1 = [
            {**e, "groundtruth3DBB": struct_array(o), "groundtruth2DBB": flat_boxes(f)}
            for e, o, f in zip(self.entries, self.v1, self.flat, strict=True)
        ]
        flat = [
            {"sequenceName": e["sequenceName"], "groundtruth2DBB": flat_boxes(f)}
            for e, f in zip(self.entries, self.flat, strict=True)
        ]
        for path, variables in (
            (self.root / "SUNRGBDMeta3DBB_v2.mat", {"SUNRGBDMeta": struct_array(v2)}),
            (self.root / "SUNRGBDMeta2DBB_v2.mat", {"SUNRGBDMeta2DBB": struct_array(flat)}),
            (toolbox / "Metadata" / "SUNRGBDMeta.mat", {"SUNRGBDMeta": struct_array(v1)}),
            (
                toolbox / "traintestSUNRGBD" / "allsplit.mat",
                {name: np.array([paths], object) for name, paths in self.splits.items()},
            ),
        ):
            scipy.io.savemat(path, variables, do_compression=True)
