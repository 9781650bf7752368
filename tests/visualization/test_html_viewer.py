import base64
import json
import re

import numpy as np
import pytest

from vrdistill_jax.visualization.html_viewer import write_viewer

BOXES = np.array([[1, 2, 0.5, 2.0, 1.0, 0.8, 0.6], [-3, 0, 1, 0.4, 0.3, 2.0, -2.5]], np.float32)
NAMES = ["chair", "table"]


def scene_of(path):
    page = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return page, json.loads(data)


def points_of(scene):
    raw = np.frombuffer(base64.b64decode(scene["points"]["xyz"]), "<i2").reshape(-1, 3)
    return raw * np.array(scene["points"]["step"]) + scene["points"]["origin"]


def make_cloud(rows=1000):
    rng = np.random.default_rng(0)
    return rng.uniform([-4, -3, 0], [4, 3, 2.6], (rows, 3)).astype(np.float32), rng.uniform(size=(rows, 3))


def test_page_holds_the_scene(tmp_path):
    xyz, color = make_cloud()
    truth = (BOXES[:1] + 0.125, np.array([1]))
    path = tmp_path / "new" / "view.html"
    assert write_viewer(path, xyz, color, BOXES, [0, 1], [0.9, 0.25], NAMES, truth, title="Room 7") == path
    page, scene = scene_of(path)
    np.testing.assert_allclose(points_of(scene), xyz, atol=8 / 65535)
    rgb = np.frombuffer(base64.b64decode(scene["points"]["rgb"]), np.uint8).reshape(-1, 3)
    np.testing.assert_allclose(rgb / 255, color, atol=0.5 / 255 + 1e-9)
    assert [box["label"] for box in scene["boxes"]] == [0, 1]
    assert [box["score"] for box in scene["boxes"]] == [0.9, 0.25]
    flat = [[*box["center"], *box["size"], box["yaw"]] for box in scene["boxes"]]
    np.testing.assert_allclose(flat, BOXES, atol=1e-4)
    assert scene["truth"][0]["label"] == 1
    np.testing.assert_allclose(scene["truth"][0]["center"], BOXES[0, :3] + 0.125, atol=1e-4)
    assert [entry["name"] for entry in scene["classes"]] == NAMES
    assert scene["notes"] == []
    assert "<title>Room 7</title>" in page


def test_page_needs_no_network_and_is_small(tmp_path):
    xyz, color = make_cloud(40_000)
    path = write_viewer(tmp_path / "a.html", xyz, color, BOXES, [0, 1], None, NAMES)
    assert path.stat().st_size < 700_000
    page, _ = scene_of(path)
    assert not re.search(r"https?:|<link|src=|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page  # and the browser enforces it
    assert "{{" not in page


def test_text_cannot_leave_its_place(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>{{data}}{{title}}"
    path = write_viewer(
        tmp_path / "a.html", *make_cloud(10), BOXES, [0, 1], None, [evil, "b"], title=evil, notes=[evil]
    )
    page, scene = scene_of(path)
    assert scene["classes"][0]["name"] == scene["title"] == scene["notes"][0] == evil
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "innerHTML" not in page


def test_large_clouds_are_thinned_with_a_note(tmp_path):
    xyz, color = make_cloud(5000)
    _, scene = scene_of(
        write_viewer(tmp_path / "a.html", xyz, color, BOXES, [0, 1], None, NAMES, max_points=2000)
    )
    assert scene["points"]["count"] == 2000
    assert scene["points"]["total"] == 5000
    assert "2,000 of 5,000" in scene["notes"][0]
    rgb = np.frombuffer(base64.b64decode(scene["points"]["rgb"]), np.uint8).reshape(-1, 3) / 255
    distance = np.abs(points_of(scene)[:, None] - xyz[None]).max(-1)
    rows = distance.argmin(1)
    assert len(np.unique(rows)) == 2000
    assert distance.min(1).max() < 2e-4
    np.testing.assert_allclose(rgb, color[rows], atol=0.01)


def test_strays_and_invalid_points_do_not_spoil_the_resolution(tmp_path):
    xyz, _ = make_cloud()
    bad = np.concatenate([xyz, [[1e6, 0, 0], [np.nan, 0, 0]]])
    _, scene = scene_of(write_viewer(tmp_path / "a.html", bad, None, BOXES, [0, 1], None, NAMES))
    np.testing.assert_allclose(points_of(scene), xyz, atol=2e-4)
    assert scene["points"]["rgb"] is None
    assert [note[:1] for note in scene["notes"]] == ["1", "1"]


@pytest.mark.parametrize("xyz", [np.zeros((0, 3)), np.ones((1, 3)), np.ones((50, 3))])
def test_empty_scenes(tmp_path, xyz):
    _, scene = scene_of(write_viewer(tmp_path / "a.html", xyz, None, np.zeros((0, 7)), [], [], NAMES))
    assert scene["boxes"] == []
    assert scene["truth"] is None
    np.testing.assert_allclose(points_of(scene), xyz, atol=1e-5)


def test_errors_name_the_value(tmp_path):
    xyz, color = make_cloud(10)
    path = tmp_path / "a.html"
    with pytest.raises(ValueError, match=r"labels 0..2, but there are 2"):
        write_viewer(path, xyz, color, BOXES, [0, 2], None, NAMES)
    with pytest.raises(ValueError, match="2 boxes, 1 labels"):
        write_viewer(path, xyz, color, BOXES, [0], None, NAMES)
    with pytest.raises(ValueError, match="NaN"):
        write_viewer(path, xyz, color, BOXES * np.nan, [0, 1], None, NAMES)
    with pytest.raises(ValueError, match=r"\[n, 3\]"):
        write_viewer(path, xyz, color[:5], BOXES, [0, 1], None, NAMES)
    with pytest.raises(ValueError, match="ground_truth"):
        write_viewer(path, xyz, color, BOXES, [0, 1], None, NAMES, (BOXES, [0, 5]))
    assert not path.exists()
