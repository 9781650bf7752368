import io
import itertools
import time
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
from oracles.votenet_scannet import IDS, votes

from data_prep import scannet
from data_prep.scannet_raw import SCENE_PATTERN
from data_prep.votenet_prepared import (
    SUNRGBD_PATTERN,
    _pair_in_order,
    convert_votenet_scannet,
    convert_votenet_sunrgbd,
    find_sunrgbd_splits,
    list_scenes,
    match_instances,
)
from vrdistill_jax.data.builders import open_split
from vrdistill_jax.data.samples import labelled_scene
from vrdistill_jax.geometry.host.boxes import FACE_MARGIN, points_in_boxes

SCENE, SCAN = "scene0000_00", "000007"


def bounds_box(points, nyu40):
    low, high = points.min(0).astype(float), points.max(0).astype(float)
    return [*(low + high) / 2, *high - low, nyu40]


def made_scannet(folder, scene=SCENE, seed=0):
    """Six instances, of which one is a wall, one has the same class and nearly the same bounds as another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    classes = {1: 5, 2: 1, 4: 7, 5: 7, 7: 39, 9: 5}
    xyz, ids = [rng.uniform(-4, 4, (60, 3))], [np.zeros(60)]
    middles = {1: (0, 0, 0), 2: (3, 0, 0), 4: (0, 3, 0), 5: (0.05, 3, 0), 7: (-3, 0, 0), 9: (0, -3, 0)}
    for number in classes:
        xyz.append(rng.uniform(-0.5, 0.5, (40, 3)) + middles[number])
        ids.append(np.full(40, number))
    xyz, ids = np.concatenate(xyz).astype(np.float32), np.concatenate(ids).astype(np.uint32)
    order = rng.permutation(len(xyz))
    xyz, ids = xyz[order], ids[order]
    labels = np.array([classes.get(int(number), 0) for number in ids], np.uint32)
    boxes = [bounds_box(xyz[ids == number], nyu40) for number, nyu40 in classes.items() if nyu40 in IDS]
    rgb = rng.integers(0, 256, (len(xyz), 3))
    arrays = {
        "vert": np.concatenate([xyz, rgb], axis=1).astype(np.float32),
        "ins_label": ids,
        "sem_label": labels,
        "bbox": np.array(boxes),
    }
    save(folder, scene, arrays)
    return arrays


def save(folder, scene, arrays):
    for name, array in arrays.items():
        np.save(folder / f"{scene}_{name}.npy", array)


def made_sunrgbd(folder, scan=SCAN):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    boxes = np.array([[0, 2, -0.5, 0.5, 0.25, 0.5, 0.3, 3], [0.2, 2.1, -0.5, 1, 0.5, 0.25, -2.9, 1.0]])
    pc = np.concatenate(
        [rng.uniform([-1, 1, -1], [1, 3, 0], (400, 3)), rng.integers(0, 256, (400, 3)) / 255], axis=1
    )
    np.savez_compressed(folder / f"{scan}_pc.npz", pc=pc.astype(np.float32))
    np.save(folder / f"{scan}_bbox.npy", boxes)
    return pc.astype(np.float32), boxes


def rows_of(ids, pairs):
    want = np.full(len(ids), -1)
    for number, row in pairs.items():
        want[ids == number] = row
    return want


def test_scannet_arrays_become_a_sample(tmp_path):
    arrays = made_scannet(tmp_path)
    sample = convert_votenet_scannet(tmp_path, SCENE, "train")
    np.testing.assert_array_equal(sample["xyz"], arrays["vert"][:, :3])
    np.testing.assert_array_equal(np.rint(sample["color"] * 255), arrays["vert"][:, 3:])
    np.testing.assert_array_equal(
        sample["instance"], rows_of(arrays["ins_label"], {1: 0, 4: 1, 5: 2, 7: 3, 9: 4})
    )
    np.testing.assert_array_equal(sample["boxes_center"], arrays["bbox"][:, :3].astype(np.float32))
    np.testing.assert_array_equal(sample["boxes_size"], arrays["bbox"][:, 3:6].astype(np.float32))
    np.testing.assert_array_equal(sample["boxes_label"], [2, 4, 4, 17, 2])
    np.testing.assert_allclose(sample["vote_center"], sample["boxes_center"], atol=1e-6)
    assert sample["notes"] == []


def test_thinned_instances_find_their_boxes_and_the_rest_is_reported(tmp_path):
    arrays = made_scannet(tmp_path)
    keep = np.random.default_rng(2).random(len(arrays["vert"])) < 0.5
    keep[arrays["ins_label"] == 7] = False  # lost
    for name in ("vert", "ins_label", "sem_label"):
        arrays[name] = arrays[name][keep]
    arrays["bbox"] = np.delete(arrays["bbox"], 0, axis=0)  # chair 1 has no box
    save(tmp_path, SCENE, arrays)
    sample = convert_votenet_scannet(tmp_path, SCENE, "train")
    np.testing.assert_array_equal(sample["instance"], rows_of(arrays["ins_label"], {4: 0, 5: 1, 9: 3}))
    count = (arrays["ins_label"] == 1).sum()
    assert sample["notes"] == [
        f"instance 1 ({count} points) has no box; its points belong to no object",
        "box 2 (garbage_bin) has no instance among the points",
    ]
    np.testing.assert_array_equal(sample["vote_center"][2], sample["boxes_center"][2])


def test_the_class_of_an_instance_is_that_of_its_first_point():
    xyz = np.arange(12, dtype=np.float32).reshape(4, 3)
    box = np.array([bounds_box(xyz, 5)])
    ids = np.ones(4, int)
    assert match_instances(xyz, ids, np.array([5, 1, 1, 1]), box)[0] == {1: 0}
    assert match_instances(xyz, ids, np.array([1, 5, 5, 5]), box)[0] == {}
    with pytest.raises(ValueError, match="no box fits any instance"):
        match_instances(xyz + 1, ids, np.full(4, 5), box)
    with pytest.raises(ValueError, match="no box fits any instance"):
        match_instances(xyz, ids, np.full(4, 7), box)


def test_pairs_in_order_are_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, columns = rng.integers(0, 5, 2)
        gap = np.where(rng.random((rows, columns)) < 0.5, rng.random((rows, columns)), np.inf)
        best = (0, 0.0)
        for count in range(1, min(rows, columns) + 1):
            for a in itertools.combinations(range(rows), count):
                for b in itertools.combinations(range(columns), count):
                    best = max(best, (count, -gap[a, b].sum()) if np.isfinite(gap[a, b]).all() else best)
        pairs = _pair_in_order(gap)
        found = sorted(pairs.items())
        assert [j for _, j in found] == sorted(j for _, j in found)
        assert len(pairs) == best[0]
        assert sum(gap[i, j] for i, j in found) == pytest.approx(-best[1])


def test_sunrgbd_arrays_become_a_sample(tmp_path):
    pc, boxes = made_sunrgbd(tmp_path)
    sample = convert_votenet_sunrgbd({"val": tmp_path}, SCAN, "val")
    np.testing.assert_array_equal(sample["xyz"], pc[:, :3])
    np.testing.assert_allclose(sample["color"], pc[:, 3:], atol=1e-7)
    np.testing.assert_allclose(sample["boxes_size"], 2 * boxes[:, 3:6])
    np.testing.assert_allclose(sample["boxes_yaw"], [-0.3, 2.9], rtol=1e-6)  # clockwise in the files
    np.testing.assert_array_equal(sample["boxes_label"], [3, 1])
    inside = np.zeros((len(pc), 2), bool)
    for row, (x, y, z, length, width, height, heading, _) in enumerate(boxes):
        ahead = (pc[:, 0] - x) * np.cos(heading) - (pc[:, 1] - y) * np.sin(heading)
        aside = (pc[:, 0] - x) * np.sin(heading) + (pc[:, 1] - y) * np.cos(heading)
        inside[:, row] = (abs(ahead) <= length) & (abs(aside) <= width) & (abs(pc[:, 2] - z) <= height)
    assert (inside.sum(axis=1) == 2).sum() > 10
    want = np.where(inside[:, 0], 0, np.where(inside[:, 1], 1, -1))
    np.testing.assert_array_equal(sample["instance"], want)


def test_a_scan_without_objects_is_kept(tmp_path):
    made_sunrgbd(tmp_path)
    np.save(tmp_path / f"{SCAN}_bbox.npy", np.zeros((0, 8)))
    sample = convert_votenet_sunrgbd({"val": tmp_path}, SCAN, "val")
    assert sample["boxes_center"].shape == sample["boxes_size"].shape == (0, 3)
    assert (sample["instance"] == -1).all()
    made_scannet(tmp_path)
    np.save(tmp_path / f"{SCENE}_bbox.npy", np.zeros((0, 7)))
    sample = convert_votenet_scannet(tmp_path, SCENE, "train")
    assert (sample["instance"] == -1).all()
    assert len(sample["notes"]) == 5


def test_folders_and_scenes_are_found(tmp_path):
    made_sunrgbd(tmp_path / "sunrgbd_pc_bbox_votes_50k_v1_train", "000009")
    made_sunrgbd(tmp_path / "sunrgbd_pc_bbox_votes_50k_v1_train", "000003")
    with pytest.raises(ValueError, match=r"_val; found: none"):
        find_sunrgbd_splits(tmp_path)
    made_sunrgbd(tmp_path / "sunrgbd_pc_bbox_votes_50k_v1_val")
    folders = find_sunrgbd_splits(tmp_path)
    assert list_scenes(folders["train"], SUNRGBD_PATTERN) == ["000003", "000009"]
    assert list_scenes(folders["val"], SUNRGBD_PATTERN) == [SCAN]
    made_sunrgbd(tmp_path / "sunrgbd_pc_bbox_votes_50k_v2_val")
    with pytest.raises(ValueError, match="50k_v1_val, sunrgbd_pc_bbox_votes_50k_v2_val"):
        find_sunrgbd_splits(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        find_sunrgbd_splits(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vert", lambda a: a[:, :5], "not .n, 6."),
        ("vert", lambda a: a[:-1], "not integers of 299 points"),
        ("vert", lambda a: np.where(a == a[5, 1], np.nan, a), "rows are not finite"),
        ("vert", lambda a: a * 2, "no colours of 0 to 255"),
        ("ins_label", lambda a: a.astype(float), "not integers"),
        ("sem_label", lambda a: a[:, None], "not integers"),
        ("bbox", lambda a: a[:, :6], "not .k <= 1000, 7."),
        ("bbox", lambda a: a * [1, 1, 1, 1, 1, 1, 0] + [0, 0, 0, 0, 0, 0, 13], "row 0 is of class 13"),
        ("bbox", lambda a: a + [0, 0, 0, 0, 0, 0, 0.5], "row 0 is of class 5.5"),
        ("bbox", lambda a: a + np.inf, "not finite"),
        ("bbox", lambda a: a - [0, 0, 0, 9, 9, 9, 0], "no box fits any instance"),
        ("bbox", lambda a: a + [9, 0, 0, 0, 0, 0, 0], "not the one that the boxes were made of"),
        ("bbox", lambda a: np.array([{}]), "could run code"),
    ],
)
def test_malformed_scannet_arrays_are_named(tmp_path, name, change, message):
    arrays = made_scannet(tmp_path)
    np.save(tmp_path / f"{SCENE}_{name}.npy", change(arrays[name]), allow_pickle=True)
    with pytest.raises(ValueError, match=message) as error:
        convert_votenet_scannet(tmp_path, SCENE, "train")
    assert str(tmp_path / SCENE) in str(error.value)


def test_missing_and_mmdet3d_arrays_are_named(tmp_path):
    made_scannet(tmp_path)
    (tmp_path / f"{SCENE}_bbox.npy").rename(tmp_path / f"{SCENE}_aligned_bbox.npy")
    with pytest.raises(ValueError, match="as mmdetection3d writes it; convert with --mmdet3d"):
        convert_votenet_scannet(tmp_path, SCENE, "train")
    made_scannet(tmp_path)
    (tmp_path / f"{SCENE}_sem_label.npy").unlink()
    with pytest.raises(ValueError, match=r"sem_label\.npy: cannot be read"):
        convert_votenet_scannet(tmp_path, SCENE, "train")
    for scene in ("../scene0000_00", "scene0000_00/../scene0000_00"):
        with pytest.raises(ValueError, match="is no scene id"):
            convert_votenet_scannet(tmp_path, scene, "train")
        with pytest.raises(ValueError, match="is no scene id"):
            convert_votenet_sunrgbd({"train": tmp_path}, scene, "train")


def test_malformed_sunrgbd_arrays_are_named(tmp_path):
    pc, boxes = made_sunrgbd(tmp_path)
    for change, message in (
        (lambda a: a[:, :7], "not .k <= 1000, 8."),
        (lambda a: a + [0, 0, 0, 0, 0, 0, 0, 8], "row 0 is of class 11"),
        (lambda a: a - [0, 0, 0, 9, 0, 0, 0, 0], "chair of box 0 has a negative size"),
    ):
        np.save(tmp_path / f"{SCAN}_bbox.npy", change(boxes))
        with pytest.raises(ValueError, match=message) as error:
            convert_votenet_sunrgbd({"val": tmp_path}, SCAN, "val")
        assert f"{SCAN}_bbox.npy" in str(error.value)
    np.save(tmp_path / f"{SCAN}_bbox.npy", boxes)
    np.savez(tmp_path / f"{SCAN}_pc.npz", pc=pc[:, :3])
    with pytest.raises(ValueError, match=r"_pc\.npz: the points have no colours"):
        convert_votenet_sunrgbd({"val": tmp_path}, SCAN, "val")


def corrupted(data, rng):
    data = bytearray(data)
    head = min(len(data), 128)
    match int(rng.integers(4)):
        case 0:
            return bytes(data[: rng.integers(len(data))])
        case 1:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        case 2:
            data[int(rng.integers(head))] = int(rng.integers(256))
        case 3:
            start = int(rng.integers(len(data)))
            del data[start : start + int(rng.integers(1, 50))]
    return bytes(data)


def strange_array(rng):
    kinds = [np.float32, np.float64, np.uint32, np.int64, bool, "S3", complex, object]
    shapes = [(), (0,), (3,), (0, 7), (300, 6), (300,), (2, 7), (2, 8), (400, 6), (1, 1, 7)]
    array = np.zeros(shapes[int(rng.integers(len(shapes)))], kinds[int(rng.integers(len(kinds)))])
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def attempt(function, *arguments):
    """Gives (message, None) of a ValueError, or (None, result); anything else is raised."""
    try:
        return None, function(*arguments)
    except ValueError as error:
        return str(error), None


def test_damaged_files_give_a_value_error_that_names_them(tmp_path):
    rng = np.random.default_rng(0)
    made_scannet(tmp_path)
    made_sunrgbd(tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 6
    intact = {path: path.read_bytes() for path in paths}
    refused = 0
    began = time.monotonic()
    tracemalloc.start()
    for case in range(240):
        path = paths[case % len(paths)]
        content = strange_array(rng) if rng.random() < 0.3 else corrupted(intact[path], rng)
        if path.suffix == ".npz" and rng.random() < 0.5:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("pc.npy", strange_array(rng))
        else:
            path.write_bytes(content)
        if path.name.startswith(SCENE):
            problem, sample = attempt(convert_votenet_scannet, tmp_path, SCENE, "train")
        else:
            problem, sample = attempt(convert_votenet_sunrgbd, {"val": tmp_path}, SCAN, "val")
        if problem is not None:
            refused += 1
            assert problem.split(": ")[0] in map(str, paths), f"case {case}: {problem}"
        else:
            assert np.isfinite(sample["xyz"]).all()
            assert sample["boxes_size"].min(initial=1) > 0
            assert sample["instance"].max() < len(sample["boxes_label"])
        path.write_bytes(intact[path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 120
    assert peak < 16 << 20
    assert time.monotonic() - began < 60


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    made_sunrgbd(tmp_path)
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    header += b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000, 6), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / f"{SCAN}_pc.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pc.npy", header + bytes(1 << 20))
    with pytest.raises(ValueError, match="is truncated or its header is wrong"):
        convert_votenet_sunrgbd({"val": tmp_path}, SCAN, "val")


def test_the_verb_converts_prepared_scannet(tmp_path):
    folder = tmp_path / "votenet"
    for row, scene in enumerate(("scene0000_00", "scene0000_01", "scene0001_00")):
        made_scannet(folder / "scannet_train_detection_data", scene, row)
    (folder / "meta_data").mkdir()
    (folder / "meta_data" / "scannetv2_train.txt").write_text("scene0001_00\nscene0000_00\n")
    (folder / "meta_data" / "scannetv2_val.txt").write_text("scene0000_01\n")
    with pytest.raises(ValueError, match="train has 2 scenes, not 1201"):
        scannet.convert_prepared(str(folder), output=str(tmp_path / "out"))
    for given in (folder, folder / "scannet_train_detection_data"):
        out = tmp_path / given.name
        options = {"output": str(out), "allow_partial": True, "workers": 0, "progress": False}
        report = scannet.convert_prepared(str(given), **options)
        assert report.counts == {"train": 2, "val": 1}
        train = open_split(report.directory, "train")
        assert [sample["name"] for sample in train] == ["scene0001_00", "scene0000_00"]
        want = convert_votenet_scannet(folder / "scannet_train_detection_data", "scene0001_00", "train")
        np.testing.assert_array_equal(train[0]["instance"], want["instance"])


class Config(types.SimpleNamespace):
    """The fields of a config that `labelled_scene` reads."""


def voting_config(num_points, oriented):
    augment = Config(
        flip_x=0.5, flip_y=0.0 if oriented else 0.5, max_turn=0.08, max_scale=0.0, refit_boxes=not oriented
    )
    dataset = Config(num_points=num_points, max_boxes=64, augment=augment, oriented=oriented)
    return Config(dataset=dataset, detector=Config(input_features=("color",)))


def scene_and_rows(sample, num_points, oriented, train):
    """A network's input and the rows of the cloud that its points are, smuggled through in the colours."""
    rows = np.arange(len(sample["xyz"]), dtype=np.float32)
    marked = {**sample, "color": np.stack([rows, rows, rows], axis=1)}
    scene = labelled_scene(marked, 0, voting_config(num_points, oriented), np.random.default_rng(3), train)
    return scene, scene.points.features[scene.points.mask, 0].astype(int)


def scene_votes(scene):
    """f32[n, V, 3] votes and bool[n] mask that the loss derives from a scene."""
    slots, xyz = scene.point_instance[scene.points.mask], scene.points.xyz[scene.points.mask]
    vote = scene.boxes.vote_center[slots] - xyz[:, None]
    return np.where(slots[..., None] >= 0, vote, 0), slots[:, 0] >= 0


@pytest.mark.parametrize("train", [False, True])
def test_votes_of_made_scannet_arrays_are_votenets(tmp_path, train):
    arrays = made_scannet(tmp_path)
    check_scannet_votes(convert_votenet_scannet(tmp_path, SCENE, "train"), arrays, 200, train)


def check_scannet_votes(sample, arrays, num_points, train):
    scene, rows = scene_and_rows(sample, num_points, oriented=False, train=train)
    xyz = scene.points.xyz[scene.points.mask]
    want, mask = votes(xyz, arrays["ins_label"][rows], arrays["sem_label"][rows])
    got, got_mask = scene_votes(scene)
    np.testing.assert_array_equal(got_mask, mask)
    assert mask.any()
    np.testing.assert_allclose(got[:, 0], want, rtol=0, atol=1e-6)


@pytest.mark.data
@pytest.mark.parametrize("row", range(8))
def test_real_scannet_scenes(shared, row):
    folder = shared / "real/scannet/prepared"
    scene = list_scenes(folder, SCENE_PATTERN)[row]
    names = ("vert", "ins_label", "sem_label", "bbox")
    arrays = {name: np.load(folder / f"{scene}_{name}.npy") for name in names}
    sample = convert_votenet_scannet(folder, scene, "train")
    assert sample["notes"] == []
    np.testing.assert_array_equal(sample["boxes_center"], arrays["bbox"][:, :3].astype(np.float32))
    np.testing.assert_array_equal(sample["boxes_size"], arrays["bbox"][:, 3:6].astype(np.float32))
    assert [IDS[label] for label in sample["boxes_label"]] == arrays["bbox"][:, 6].tolist()
    # Every box has its instance, in the order of the ids, and nearly its bounds.
    ids = [
        number
        for number in np.unique(arrays["ins_label"])
        if number and arrays["sem_label"][arrays["ins_label"] == number][0] in IDS
    ]
    np.testing.assert_array_equal(
        sample["instance"], rows_of(arrays["ins_label"], {n: k for k, n in enumerate(ids)})
    )
    assert len(ids) == len(arrays["bbox"])
    assert np.abs(sample["vote_center"] - sample["boxes_center"]).max() < 0.1
    for train in (False, True):
        check_scannet_votes(sample, arrays, 40000, train)


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_sunrgbd_votes_are_the_files(shared, split):
    folders = find_sunrgbd_splits(shared / "real/sunrgbd")
    scans = list_scenes(folders[split], SUNRGBD_PATTERN)
    assert len(scans) >= 5
    differing = 0
    for scan in scans:
        sample = convert_votenet_sunrgbd(folders, scan, split)
        stored = np.load(folders[split] / f"{scan}_votes.npz")["point_votes"]
        scene, rows = scene_and_rows(sample, 50000, oriented=True, train=False)
        got, mask = scene_votes(scene)
        got = got[np.argsort(rows)]
        want = stored[:, 1:].reshape(-1, 3, 3)
        wrong = np.flatnonzero(np.abs(got - want).max(axis=(1, 2)) > 1e-6)
        differing += len(wrong)
        same = np.ones(len(got), bool)
        same[wrong] = False
        np.testing.assert_array_equal(mask[np.argsort(rows)][same], stored[same, 0] > 0)
        # Only points just outside a face, within our margin, differ from the file's convex hulls.
        boxes = np.concatenate(
            [sample["boxes_center"], sample["boxes_size"], sample["boxes_yaw"][:, None]], axis=1
        )
        smaller = boxes - np.array([0, 0, 0, *[2.2 * FACE_MARGIN] * 3, 0])
        uncertain = (points_in_boxes(sample["xyz"], boxes) != points_in_boxes(sample["xyz"], smaller)).any(
            axis=1
        )
        assert uncertain[wrong].all()
    assert differing <= 20
