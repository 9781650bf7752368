"""ScanNet, SUN RGB-D and mmdetection3d folders, original and prepared."""

import io
import json
import os
import pickle
import struct

import numpy as np
from fuzz import file_mutations, mutations
from fuzz.hdf5_bombs import HDF5_BOMBS
from fuzz.samples import (
    EVIL,
    MIB,
    Evil,
    Reader,
    check_message,
    checked,
    folder_files,
    helpers,
    npy,
    npy_header,
    npy_with,
    put,
)


def scannet() -> dict[str, Reader]:
    raw, prepared = helpers("data_prep/test_scannet_raw.py"), helpers("data_prep/test_votenet_prepared.py")
    tsv = "scannetv2-labels.combined.tsv"

    def make(root):
        raw.write_label_map(root / tsv)
        raw.made_scan(root / "scans" / raw.SCENE)
        (root / "train.txt").write_text("scene0000_00\nscene0000_01\n")

    files = folder_files(make)
    start = f"scans/{raw.SCENE}/{raw.SCENE}"
    aggregation = json.loads(files[f"{start}.aggregation.json"])
    segment = aggregation["segGroups"][0]["segments"][:1]
    groups = [{"id": i, "objectId": i, "segments": segment, "label": "thing 5a"} for i in range(100_000)]
    shift = "axisAlignment = 1 0 0 1e308 0 1 0 0 0 0 1 0 0 0 0 1\n"
    hostile = {
        "! 100,000 objects": {f"{start}.aggregation.json": json.dumps({"segGroups": groups}).encode()},
        "! shift of 1e308": {f"{start}.txt": shift.encode()},
        "label with escapes": {
            f"{start}.aggregation.json": files[f"{start}.aggregation.json"].replace(
                b"thing 5a", b"\\u001b[31m\\ud800"
            )
        },
    }

    def read(folder):
        return checked(raw.convert(folder), 18)

    def read_list(folder):
        from data_prep.scannet_raw import read_split_list

        return read_split_list(folder / "train.txt")

    box_files = folder_files(prepared.made_scannet)
    count = len(np.load(io.BytesIO(box_files["scene0000_00_ins_label.npy"])))
    many = 20_000
    vert = np.zeros((many, 6), np.float32)
    floods = {
        "! every point an instance": {
            "scene0000_00_vert.npy": npy(vert),
            "scene0000_00_ins_label.npy": npy(np.arange(1, many + 1)),
            "scene0000_00_sem_label.npy": npy(np.full(many, 5)),
            "scene0000_00_bbox.npy": npy(np.tile([0, 0, 0, 1, 1, 1, 5.0], (1000, 1))),
        },
        "classes of 2^62": {"scene0000_00_sem_label.npy": npy(np.full(count, 1 << 62))},
        "! object array": {"scene0000_00_bbox.npy": npy_with(npy_header("(1,)", "'|O'"), EVIL)},
    }

    def read_votenet(folder):
        from data_prep.votenet_prepared import convert_votenet_scannet

        return checked(convert_votenet_scannet(folder, "scene0000_00", "train"), 18)

    def read_votenet_sunrgbd(folder):
        from data_prep.votenet_prepared import convert_votenet_sunrgbd

        return checked(convert_votenet_sunrgbd({"val": folder}, prepared.SCAN, "val"), 10)

    return {
        "scannet_raw": Reader(files, read, tuple(n for n in files if n != "train.txt"), hostile),
        "scannet_list": Reader({"train.txt": files["train.txt"]}, read_list),
        "votenet_scannet": Reader(box_files, read_votenet, hostile=floods),
        "votenet_sunrgbd": Reader(folder_files(prepared.made_sunrgbd), read_votenet_sunrgbd),
    }


def sunrgbd() -> dict[str, Reader]:
    import h5py
    import scipy.io
    from oracles.sunrgbd_raw import INTRINSICS, PublishedTree
    from PIL import Image

    damaged = helpers("data_prep/test_sunrgbd_damaged.py")
    frames, flat, v1 = "SUNRGBDMeta3DBB_v2.mat", "SUNRGBDMeta2DBB_v2.mat", "v1.mat"

    def frame_folder(root):
        rng = np.random.default_rng(0)
        for name in ("depth_bfx", "image", "extrinsics"):
            (root / name).mkdir()
        Image.fromarray((rng.integers(500, 8000, (17, 23)) << 3).astype(np.uint16)).save(
            root / "depth_bfx/d.png"
        )
        Image.fromarray(rng.integers(0, 255, (17, 23, 3)).astype(np.uint8)).save(root / "image/c.jpg")
        (root / "intrinsics.txt").write_text(" ".join(map(str, INTRINSICS.ravel())))
        (root / "extrinsics/e.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n")

    def read_folder(folder):
        from data_prep.sunrgbd_raw import read_frame_folder

        xyz, color = read_frame_folder(folder)
        assert np.isfinite(xyz).all()
        assert xyz.shape == color.shape
        return xyz, color

    def metadata(root):
        tree = PublishedTree(root / "tree")
        (root / frames).write_bytes((tree.root / frames).read_bytes())
        (root / flat).write_bytes((tree.root / flat).read_bytes())
        (root / v1).write_bytes((tree.root / "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat").read_bytes())
        (root / "split.mat").write_bytes(
            (tree.root / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat").read_bytes()
        )
        damaged.write_version_73(root / "new.mat", {"SUNRGBDMeta": tree.entries})
        damaged.write_version_73(root / "split73.mat", tree.splits)
        damaged.write_version_73(
            root / "points73.mat", {"instance": np.random.default_rng(0).random((50, 6))}
        )

    files = {n: d for n, d in folder_files(metadata).items() if not n.startswith("tree")}
    plain = folder_files(lambda root: _uncompressed(scipy.io, files, root))

    def check_frames(found):
        for item in found:
            if not isinstance(item, str):
                assert not item.depth_path.startswith("/")
                assert ".." not in item.depth_path + item.color_path
                assert np.isfinite(item.boxes.boxes).all()
                assert (item.boxes.boxes[:, 3:6] > 0).all()
            else:
                check_message(item)
        return found

    def read_meta(folder):
        from data_prep.sunrgbd_metadata import read_frames

        return check_frames(read_frames(folder / frames, boxes2d_path=folder / flat))

    def read_v1(folder):
        from data_prep.sunrgbd_metadata import read_frames

        return check_frames(read_frames(folder / frames, labels_v1_path=folder / v1))

    def read_new(folder):
        from data_prep.sunrgbd_metadata import read_frames

        return check_frames(read_frames(folder / "new.mat", all_boxes=True))

    def read_split(name):
        def read(folder):
            from data_prep import sunrgbd_metadata

            split = sunrgbd_metadata.read_split(folder / name)
            assert all(path.startswith("SUNRGBD/") and ".." not in path for path in split)
            return split

        return read

    def read_points(name):
        def read(folder):
            from data_prep.sunrgbd_trainval import read_extracted_points

            points = read_extracted_points(folder / name)
            assert np.isfinite(points).all()
            return points

        return read

    def extracted(root):
        for name in ("depth", "label_v1", "calib"):
            (root / name).mkdir()
        points = np.random.default_rng(0).random((50, 6)).astype(np.float32)
        scipy.io.savemat(root / "depth/000001.mat", {"instance": points}, do_compression=True)
        scipy.io.savemat(root / "depth/000002.mat", {"instance": points})
        label = "chair 1 2 3 4 0.5 1 -1 0.2 0.4 0.6 0 1\nbed 1 2 3 4 1 2 3 .1 .2 .3 -1 0\n"
        (root / "label_v1/000001.txt").write_text(label)
        (root / "label_v1/000002.txt").write_text(label)
        rows = [" ".join(map(str, matrix.ravel(order="F"))) for matrix in (np.eye(3), INTRINSICS)]
        (root / "calib/000001.txt").write_text("\n".join(rows))
        (root / "train_data_idx.txt").write_text("1\n2\n")

    def read_extracted(folder):
        from data_prep.sunrgbd_trainval import convert_extracted, list_scenes, read_calibration

        for matrix in read_calibration(folder / "calib/000001.txt"):
            assert np.isfinite(matrix).all()
        scenes = list_scenes(folder)
        samples = [
            checked(convert_extracted(scene, "train", folder, "v1", 20), 10)
            for scene in ("000001", "000002")
            if scene in scenes["train"] or scene in scenes["val"]
        ]
        return scenes, samples

    def hdf5(change) -> bytes:
        def make(root):
            with h5py.File(root / "x.mat", "w", userblock_size=512) as file:
                change(file)
            data = bytearray((root / "x.mat").read_bytes())
            data[:128] = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
            (root / "x.mat").write_bytes(data)

        return folder_files(make)["x.mat"]

    def far_points(root):
        damaged.write_version_73(root / "points73.mat", {"instance": np.full((50, 6), 1e300)})

    extracted_files = folder_files(extracted)
    nan = bytearray(extracted_files["depth/000002.mat"])
    nan[-4:] = struct.pack("<I", 0x7FA00000)
    flood = b"chair 1 2 3 4 0.5 1 -1 0.2 0.4 0.6 0 1\n" * 20_000
    strange_field = {frames: plain[frames].replace(b"Rtilt\0", b"Rt\x1b[m\0")}
    hostile_hdf5 = {name: hdf5(change) for name, change in HDF5_BOMBS.items()}
    png = file_mutations.png_chunk

    def image(width, height, body=b"", depth=16, kind=0):
        header = png(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + png(b"IDAT", body) + png(b"IEND", b"")

    images = {
        "! huge": {"depth_bfx/d.png": image(2**31 - 1, 2**31 - 1)},
        "palette": {"depth_bfx/d.png": image(5, 5, depth=8, kind=3)},
        "missing": {"image/c.jpg": None},
        "PNG for JPEG": {"image/c.jpg": image(23, 17)},
        "huge focal length": {"intrinsics.txt": b"1e308 0 1e308 0 1e308 1e308 0 0 1"},
    }
    compressed = {
        name: data for name, data in files.items() if not name.endswith("73.mat") and name != "new.mat"
    }
    bomb = folder_files(
        lambda root: scipy.io.savemat(
            root / "x.mat", {"instance": np.zeros((1_200_000, 6))}, do_compression=True
        )
    )
    return {
        "sunrgbd_folder": Reader(folder_files(frame_folder), read_folder, hostile=images),
        "sunrgbd_meta": Reader(compressed, read_meta, (frames, flat), memory=256 * MIB),
        "sunrgbd_meta_plain": Reader(
            {**compressed, **plain},
            read_meta,
            (frames, flat),
            hostile={"escapes in a field's name": strange_field},
            memory=256 * MIB,
        ),
        "sunrgbd_meta_v1": Reader(compressed, read_v1, (v1,), memory=256 * MIB),
        "sunrgbd_split": Reader({"split.mat": files["split.mat"]}, read_split("split.mat"), memory=256 * MIB),
        "sunrgbd_extracted": Reader(
            extracted_files,
            read_extracted,
            memory=256 * MIB,
            hostile={
                "! bomb": {"depth/000001.mat": bomb["x.mat"]},
                "! 20,000 objects": {"label_v1/000001.txt": flood},
                "! long number": {"train_data_idx.txt": b"9" * 5000},
                "! signalling NaN": {"depth/000002.mat": bytes(nan)},
            },
        ),
        "sunrgbd_meta_73": Reader({"new.mat": files["new.mat"]}, read_new),
        "sunrgbd_split_73": Reader({"split73.mat": files["split73.mat"]}, read_split("split73.mat")),
        "sunrgbd_points_73": Reader(
            {"points73.mat": files["points73.mat"]},
            read_points("points73.mat"),
            hostile={name: {"points73.mat": data} for name, data in hostile_hdf5.items()}
            | {"! far points": folder_files(far_points)},
        ),
    }


def _uncompressed(scipy_io, files, root):
    for name, variable in (
        ("SUNRGBDMeta3DBB_v2.mat", "SUNRGBDMeta"),
        ("SUNRGBDMeta2DBB_v2.mat", "SUNRGBDMeta2DBB"),
    ):
        content = scipy_io.loadmat(io.BytesIO(files[name]))[variable]
        scipy_io.savemat(root / name, {variable: content})


# Of an HDF5 file with the variable `instance`.


def mmdet3d() -> dict[str, Reader]:
    maker = helpers("data_prep/test_mmdet3d.py")

    def reader(write, read_name, split, version, extra=None):
        info = f"{read_name.split('_')[1]}_infos_{split}.pkl"
        files = folder_files(lambda root: write(root, version))

        def read(folder):
            import data_prep.mmdet3d

            found = getattr(data_prep.mmdet3d, read_name)(folder, split)
            for note in found.notes:
                check_message(note)
            return [checked(found.convert(name), 18) for name in found.names]

        hostile = {name: {info: data} for name, data in info_bombs(files[info]).items()} | (extra or {})
        return Reader(files, read, hostile=hostile, memory=300 * MIB)

    points = folder_files(lambda root: maker.write_scannet(root, "list"))
    count = len(points["instance_mask/scene0001_00.bin"]) // 8
    masks = {
        "! classes of 2^40": {"semantic_mask/scene0001_00.bin": np.full(count, 1 << 40).tobytes()},
        "! every point an instance": {
            "points/scene0001_00.bin": np.random.default_rng(0).random((30_000, 6)).astype("<f4").tobytes(),
            "semantic_mask/scene0001_00.bin": np.full(30_000, 5).tobytes(),
            "instance_mask/scene0001_00.bin": np.arange(1, 30_001).tobytes(),
        },
    }
    return {
        "mmdet3d_scannet_list": reader(maker.write_scannet, "read_scannet_infos", "train", "list", masks),
        "mmdet3d_scannet_11": reader(maker.write_scannet, "read_scannet_infos", "train", "1.1"),
        "mmdet3d_sunrgbd_list": reader(maker.write_sunrgbd, "read_sunrgbd_infos", "val", "list"),
        "mmdet3d_sunrgbd_11": reader(maker.write_sunrgbd, "read_sunrgbd_infos", "val", "1.1"),
    }


def info_bombs(data: bytes) -> dict[str, bytes]:
    """Info files with one field replaced by what is slow, huge or hostile."""
    content = pickle.loads(data)
    is_list = isinstance(content, list)
    values = {
        "doubling tuple": mutations.doubling(),
        "doubling list": mutations.doubling(list),
        "endless list": mutations.endless_list(),
        "infinite": float("inf"),
        "wide integer": 1 << 100_000,
        "surrogate": "\ud800.bin",
        "escapes": "\x1b[31m.bin",
        "traversal": "../../etc/passwd",
        "name too long": "x" * 400 + ".bin",
        "text of no characters": np.array(["\U0001f600"]),
        "number": 7,
        "deep list": mutations.deep_list(3_000),
        "! os.system": Evil(os.system, ("touch MARK",)),
        "! open": Evil(open, ("MARK", "w")),
    }
    places: list[tuple] = []

    def visit(node, keys, depth):
        if isinstance(node, dict | list) and len(node):
            keys_here = list(node) if isinstance(node, dict) else [0]
            if len(keys_here) > 9:  # the classes
                keys_here = keys_here[:1]
            for key in keys_here:
                places.append((*keys, key))
                visit(node[key], (*keys, key), depth + 1)

    visit(content, (), 0)
    bombs = {}
    if not is_list:
        put("data_list", 0, "instances", 0, "bbox_3d", 4)(content, 1e-320)
        bombs["! a size that float32 cannot hold"] = pickle.dumps(content)
    for keys in places:
        for name, value in values.items():
            changed = pickle.loads(data)
            put(*keys)(changed, value)
            try:
                program = pickle.dumps(changed, 4)
                if name == "text of no characters":
                    program = program.replace(b"\x00\xf6\x01\x00", b"\xff\xff\xff\x7f")
                bombs[f"{name} at {'.'.join(map(str, keys))}"] = program
            except RecursionError:  # the deep list, by hand
                holder = pickle.loads(data)
                put(*keys)(holder, "@@@@")
                text = pickle.dumps(holder, 2)
                at = text.index(b"X\x04\x00\x00\x00@@@@")
                bombs[f"{name} at {'.'.join(map(str, keys))}"] = text[:at] + _deep_program() + text[at + 9 :]
    assert is_list or "data_list" in content
    return bombs


def _deep_program(depth: int = 3_000) -> bytes:
    return b"]" * (depth + 1) + b"a" * depth
