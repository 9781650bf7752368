"""What predict makes of awkward scans: a right result with a warning, or one clear message; a tiny random network."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from scenes import make_batch, tiny_config

from vrdistill_jax import predict as predict_verb
from vrdistill_jax.detectors import votenet
from vrdistill_jax.predict import Predictor, make_output_folder, name_results, predict_files
from vrdistill_jax.training.checkpoint import save_inference_checkpoint
from vrdistill_jax.visualization.ply import write_points_ply

Y_UP = np.array(
    [[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]
)  # (x, y, z) of a z-up room -> (x, z, -y), which has y up


def make_room(count=4000, seed=0):
    """A floor of 4 x 3 m, two walls and a table: f32[count, 3], z up."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform([-2, -1.5, 0], [2, 1.5, 2.4], (count, 3))
    part = rng.integers(0, 10, count)
    xyz[part < 5, 2] = 0
    xyz[part == 5, 0], xyz[part == 6, 1] = -2, 1.5
    table = part > 6
    xyz[table] = rng.uniform([0, -0.6, 0.7], [1.2, 0.2, 0.72], (int(table.sum()), 3))
    return xyz.astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = tiny_config()
    batch = make_batch(config)
    init = jax.jit(votenet.build(config.detector).init, static_argnames="train")
    variables = init(jax.random.key(0), batch.scene.points, batch.pyramid, train=False)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_inference_checkpoint(folder, variables, config)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Calls of the module share a Predictor, and with it what JAX has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_verb, "Predictor", functools.cache(Predictor))
        yield


@pytest.fixture
def predict(checkpoint, tmp_path, capsys):
    """predict(array or path, **options) -> (record of detections.json, standard error)."""

    def run(scan, **options):
        path = scan
        if isinstance(scan, np.ndarray):
            path = tmp_path / "room.npy"
            np.save(path, scan)
        # A random network is certain of nothing: every box is kept.
        predict_files(checkpoint, [str(path)], str(tmp_path / "out"), min_score=0.0, **options)
        folder = tmp_path / "out" / path.stem
        assert sorted(os.listdir(folder)) == ["boxes.ply", "detections.json", "viewer.html"]
        record = json.loads((folder / "detections.json").read_text())
        assert record["detections"], "the tiny network proposes boxes everywhere"
        return record, capsys.readouterr().err

    return run


def input_corners(record):
    return np.array([found["input_corners"] for found in record["detections"]])


def assert_same_boxes(record, original, forward, tolerance):
    """The boxes in the file's frame are the original's, carried by `forward` (points -> points)."""
    assert [f["class"] for f in record["detections"]] == [f["class"] for f in original["detections"]]
    np.testing.assert_allclose(input_corners(record), forward(input_corners(original)), atol=tolerance)


def test_the_record_is_complete(predict):
    record, errors = predict(make_room())
    assert errors == ""
    assert record["warnings"] == []
    assert record["scene_from_input"] == np.eye(4).tolist()
    assert (record["num_points"], record["num_points_per_pass"], record["num_passes"]) == (4000, 256, 4)
    for found in record["detections"]:
        assert set(found) == {"class", "score", "center", "size", "yaw", "input_center", "input_corners"}
        assert found["class"] in record["class_names"]
        assert 0 < found["score"] <= 1
        assert min(found["size"]) > 0
        np.testing.assert_allclose(found["input_center"], found["center"], atol=1e-6)
        edges = np.ptp(np.array(found["input_corners"]), axis=0)
        np.testing.assert_allclose(
            edges, found["size"], atol=1e-5
        )  # the tiny detector's boxes are not turned
    scores = [found["score"] for found in record["detections"]]
    assert scores == sorted(scores, reverse=True)


def test_millimetres_and_y_up(predict):
    room = make_room()
    original, _ = predict(room)
    record, errors = predict((room @ Y_UP.T * 1000).astype(np.float32))
    assert "assumed millimetres" in errors
    assert "assumed that y points up" in errors
    assert len(record["warnings"]) == 2
    assert_same_boxes(record, original, lambda p: p @ Y_UP.T * 1000, 0.1)  # a tenth of a millimetre
    stated, errors = predict((room @ Y_UP.T * 1000).astype(np.float32), units="mm", up="y")
    assert errors == ""
    np.testing.assert_array_equal(input_corners(stated), input_corners(record))


def test_far_from_the_origin(predict):
    room = make_room()
    original, _ = predict(room)
    offset = np.array([700.0, -1500.0, 20.0])
    record, errors = predict((room + offset).astype(np.float32))
    assert "1,500 m from the origin" in errors
    assert "(-700, 1500, 0) m" in errors
    assert_same_boxes(record, original, lambda p: p + offset, 2e-3)  # float32 keeps steps of 0.1 mm there
    boxes = np.array([found["center"] for found in record["detections"]])
    assert np.abs(boxes[:, :2]).max() < 10
    np.testing.assert_allclose(np.array(record["scene_from_input"])[:3, 3], [-700, 1500, 0])


def test_survey_coordinates(predict):
    room = make_room()
    original, _ = predict(room)
    offset = np.array([512345.678, 5403210.987, 431.5])
    record, errors = predict(room + offset)  # float64: float32 would keep steps of half a metre
    assert "5,403,211 m from the origin" in errors
    assert "float32" not in errors
    assert_same_boxes(record, original, lambda p: p + offset, 1e-5)
    record, errors = predict((room + offset).astype(np.float32))
    assert "float32 keeps steps of 0.5 only" in errors


def test_a_hundred_points(predict):
    record, errors = predict(make_room(100))
    assert "only 100 points" in errors
    assert record["num_passes"] == 1


def test_invalid_rows(predict):
    room = make_room()
    bad = np.insert(room, 7, [np.nan, 1, 1], axis=0)
    bad = np.insert(bad, 100, [np.inf, 0, -np.inf], axis=0)
    record, errors = predict(bad)
    assert f"removed 2 of {len(bad)} points" in errors
    assert_same_boxes(record, predict(room)[0], lambda p: p, 1e-6)


def test_five_million_points(predict):
    record, errors = predict(make_room(5_000_000))
    assert errors == ""
    assert record["num_points"] == 5_000_000
    assert record["num_passes"] == 4
    assert all(np.isfinite(found["center"]).all() for found in record["detections"])


def test_results_of_one_name_are_kept_apart(checkpoint, tmp_path, capsys):
    paths = []
    for number, name in enumerate(("a/room.ply", "b/room.npy", "c/room_2.npy", "d/ROOM.npy")):
        path = tmp_path / name
        path.parent.mkdir()
        room = make_room(seed=number)
        write_points_ply(path, room) if path.suffix == ".ply" else np.save(path, room)
        paths.append(str(path))
    predict_files(checkpoint, paths, str(tmp_path / "out"), min_score=0.0)
    folders = sorted(os.listdir(tmp_path / "out"))
    assert folders == sorted(["room", "room_2", "room_2_2", "ROOM_3"])
    sources = {json.loads((tmp_path / "out" / f / "detections.json").read_text())["input"] for f in folders}
    assert sources == set(paths)
    assert capsys.readouterr().out.count("viewer.html") == 4
    assert name_results(["x/a.ply", "y/a.ply", "z/a.ply", "a_2.ply"]) == ["a", "a_2", "a_3", "a_2_2"]


HEADER = "ply\nformat binary_little_endian 1.0\nelement vertex 500\n{}end_header\n"
TRUNCATED = HEADER.format("".join(f"property float {axis}\n" for axis in "xyz")).encode() + bytes(1200)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.npy", np.zeros((0, 3), np.float32), "0 points"),
        ("nan.npy", np.full((500, 3), np.nan, np.float32), "0 of 500 points are valid"),
        ("same.npy", np.full((500, 3), 1.5, np.float32), "all 500 points are the same"),
        ("line.npy", np.linspace(0, 1, 500)[:, None] * np.float32([1, 2, 3]), "on one line"),
        ("truncated.ply", TRUNCATED, "truncated"),
        ("text.ply", b"x y z\n0 0 0\n", "is not a PLY file"),
        ("empty.npz", b"", "0 bytes"),
        ("scan.xyz", b"0 0 0\n", "unknown ending '.xyz'"),
        ("folder.ply", None, "is not a file"),
        ("missing.ply", ..., "does not exist"),
    ],
)
def test_useless_scans_are_one_message_that_names_the_file(checkpoint, tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not ...:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        predict_files(checkpoint, [str(path)], str(tmp_path / "out"))
    assert str(error.value).count(str(path)) == 1
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_no_use_is_found_before_anything_is_computed(checkpoint, tmp_path):
    np.save(tmp_path / "room.npy", make_room())
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="--output=.*file.* cannot be made"):
            predict_files("no-checkpoint-is-read", [str(tmp_path / "room.npy")], str(output))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:
        return  # no folder is locked to root
    with pytest.raises(ValueError, match="cannot be written to"):
        make_output_folder(str(locked))


def test_the_predictor_refuses_what_would_give_nonsense(checkpoint):
    predictor = Predictor(checkpoint)
    room = make_room(300)
    for xyz in (room[:0], room[:, :2], room[0], np.where(np.arange(300)[:, None] == 5, np.nan, room)):
        with pytest.raises(ValueError, match="finite"):
            predictor(xyz)
    with pytest.raises(ValueError, match="color has shape"):
        predictor(room, np.zeros((299, 3), np.float32))
    with pytest.raises(ValueError, match="at least once"):
        Predictor(checkpoint, max_passes=0)


def test_every_point_of_a_scan_is_read_if_the_passes_suffice(checkpoint):
    predictor = Predictor(checkpoint, max_passes=3)
    room = make_room(700)  # 256 points a pass
    scenes = list(predictor._cut_passes(room, None))
    assert len(scenes) == predictor.count_passes(700) == 3
    assert all(scene.points.mask.all() for scene in scenes)
    read = np.concatenate([scene.points.xyz for scene in scenes])
    assert len(np.unique(read, axis=0)) == len(np.unique(room, axis=0))
    height = np.concatenate([scene.points.features[:, 0] for scene in scenes])
    np.testing.assert_allclose(height, read[:, 2] - np.percentile(room[:, 2], 0.99), atol=1e-6)
    (only,) = predictor._cut_passes(room[:100], None)
    assert only.points.mask.sum() == 100


def test_float64_and_order_in_memory_change_nothing(checkpoint):
    predictor, room = Predictor(checkpoint, min_score=0.0), make_room(600)
    first = predictor(room)
    for other in (room.astype(np.float64), np.asfortranarray(room)):
        for before, after in zip(first, predictor(other), strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("case", ["good", "bad", "two"])
def test_exit_codes_of_the_command(checkpoint, tmp_path, case):
    np.save(tmp_path / "room.npy", make_room())
    (tmp_path / "text.ply").write_text("no points")
    names = {"good": ["room.npy"], "bad": ["text.ply"], "two": ["room.npy", "text.ply"]}[case]
    command = [sys.executable, "-m", "vrdistill_jax.predict", f"--checkpoint={checkpoint}", "--min_score=0.0"]
    command += [f"--input={name}" for name in names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    if case == "good":
        assert done.returncode == 0, done.stderr
        assert "objects" in done.stdout
        assert (tmp_path / "predictions" / "room" / "viewer.html").exists()
        return
    assert done.returncode == 2
    assert "error: text.ply: is not a PLY file" in done.stderr
    assert not (tmp_path / "predictions").exists()
