import concurrent.futures
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vrdistill_jax.data.builders import (
    default_data_dir,
    map_in_processes,
    open_split,
    prepare_scenes,
)
from vrdistill_jax.data.rooms.depth_camera import CameraConfig
from vrdistill_jax.data.synthrooms import (
    SynthRoomsConfig,
    class_names,
    generate_scene,
    prepare_synthrooms,
    split_seed,
)

TINY = SynthRoomsConfig(num_train=5, num_val=2, num_views=4, camera=CameraConfig(width=32, height=24))


def make_samples(count, boxes=2):
    rng = np.random.default_rng(0)
    for row in range(count):
        yield {
            "xyz": rng.normal(size=(10 + row, 3)).astype(np.float32),
            "color": rng.random((10 + row, 3)).astype(np.float32),
            "instance": rng.integers(-1, boxes, 10 + row).astype(np.int32)
            if boxes
            else np.full(10 + row, -1, np.int32),
            "boxes_center": rng.normal(size=(boxes, 3)).astype(np.float32),
            "boxes_size": rng.random((boxes, 3)).astype(np.float32),
            "boxes_yaw": rng.random(boxes).astype(np.float32),
            "boxes_label": rng.integers(0, 3, boxes).astype(np.int32),
            "vote_center": rng.normal(size=(boxes, 3)).astype(np.float32),
            "name": f"scene_{row}",
        }


def assert_same(read, made):
    assert set(read) == set(made)
    for name, value in made.items():
        if name == "name":
            assert read[name] == value
        elif name == "color":
            np.testing.assert_allclose(read[name], value, atol=0.5 / 255 + 1e-6)
        else:
            np.testing.assert_array_equal(read[name], value, err_msg=name)
            assert read[name].dtype == value.dtype


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return prepare_synthrooms(TINY, tmp_path_factory.mktemp("data"), progress=False, num_workers=2)


def test_rooms_read_back_are_the_rooms_generated_in_order(rooms):
    for split, count in (("train", 5), ("val", 2)):
        source = open_split(rooms, split)
        assert len(source) == count
        assert source.class_names == class_names("scan")
        for index in range(count):
            assert_same(source[index], generate_scene(split_seed(TINY, split), index, TINY))
    assert_same(source[-1], generate_scene(split_seed(TINY, "val"), 1, TINY))
    with pytest.raises(IndexError, match="scene 2 of 2"):
        source[2]


def test_a_prepared_dataset_is_not_made_again_but_another_config_is(rooms):
    before = {path: path.stat().st_mtime_ns for path in rooms.iterdir()}
    assert prepare_synthrooms(TINY, rooms.parent, progress=False) == rooms
    assert {path: path.stat().st_mtime_ns for path in rooms.iterdir()} == before
    other = prepare_synthrooms(
        TINY._replace(seed=1, num_train=1, num_val=1), rooms.parent, False, num_workers=0
    )
    assert other != rooms
    assert len(open_split(other, "train")) == 1


def test_sources_pickle_and_serve_threads(rooms):
    source = pickle.loads(pickle.dumps(open_split(rooms, "train")))
    want = [source[index]["xyz"].sum() for index in range(5)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda index: source[index % 5]["xyz"].sum(), range(100)))
    assert got == want * 20


def test_scenes_without_boxes_are_kept(tmp_path):
    made = {"train": lambda: make_samples(3, boxes=0), "val": lambda: make_samples(2)}
    folder = prepare_scenes("empty", made, ("a", "b", "c"), "hand-made", tmp_path)
    for read, want in zip(open_split(folder, "train"), make_samples(3, boxes=0), strict=True):
        assert_same(read, want)
    assert open_split(folder, "val").class_names == ("a", "b", "c")


def test_a_failed_preparation_leaves_nothing_that_is_read(tmp_path):
    def fail():
        yield from make_samples(2)
        raise OSError("disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        prepare_scenes("rooms", {"train": fail}, ("a",), "", tmp_path)
    assert not (tmp_path / "rooms").exists()
    with pytest.raises(ValueError, match="holds no prepared dataset"):
        open_split(tmp_path / "rooms", "train")
    folder = prepare_scenes("rooms", {"train": lambda: make_samples(4)}, ("a",), "", tmp_path)
    assert len(open_split(folder, "train")) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [".rooms.lock", "rooms"]


def test_a_killed_preparation_is_made_again(tmp_path, tmp_path_factory):
    half_way = tmp_path_factory.mktemp("signal") / "half_way"
    script = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_builders import make_samples, prepare_scenes
def slow():
    yield from make_samples(3)
    open({str(half_way)!r}, "w").close()
    time.sleep(60)
prepare_scenes("rooms", {{"train": slow}}, ("a",), "", {str(tmp_path)!r})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while not half_way.exists():
                assert process.poll() is None, "the preparation ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert (tmp_path / ".rooms.partial").is_dir()
        finally:
            process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "rooms").exists()
    folder = prepare_scenes("rooms", {"train": lambda: make_samples(4)}, ("a",), "", tmp_path)
    assert len(open_split(folder, "train")) == 4


def test_two_preparers_make_it_once(tmp_path):
    calls = []

    def samples():
        calls.append(1)
        time.sleep(0.3)
        return make_samples(3)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = [
            pool.submit(prepare_scenes, "rooms", {"train": samples}, ("a",), "", tmp_path) for _ in range(2)
        ]
        folders = {future.result() for future in made}
    assert len(calls) == 1
    assert len(folders) == 1


def test_unknown_splits_are_named(rooms):
    with pytest.raises(ValueError, match="no split 'test'.*train, val"):
        open_split(rooms, "test")


def test_data_dir_can_be_set_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VRDISTILL_DATA", str(tmp_path))
    assert default_data_dir() == tmp_path
    monkeypatch.delenv("VRDISTILL_DATA")
    assert default_data_dir().parts[-3:] == (".cache", "vrdistill_jax", "datasets")


def test_processes_give_results_in_order_and_report_a_dead_worker():
    arguments = [(row,) for row in range(7)]
    assert list(map_in_processes(str, arguments, 3)) == [str(row) for row in range(7)]
    assert list(map_in_processes(str, arguments, 0)) == [str(row) for row in range(7)]
    assert list(map_in_processes(str, [], 3)) == []
    with pytest.raises(RuntimeError, match="worker 0 ended .*before call 0"):
        list(map_in_processes(os._exit, [(3,)], 1))


def test_neither_tensorflow_nor_jax_is_imported(rooms):
    script = (
        "import sys; from vrdistill_jax.data.builders import open_split; "
        "assert 'tensorflow_datasets' not in sys.modules; "
        f"open_split({str(rooms)!r}, 'train')[0]; "
        "sys.exit(int('tensorflow' in sys.modules or 'jax' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=os.getcwd()).returncode == 0
