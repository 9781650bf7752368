"""Pictures and pages of votes, masks and detections: what is drawn, where, in which colour."""

import base64
import json
import re
import sys

import numpy as np
import pytest

from vrdistill_jax.visualization import figures
from vrdistill_jax.visualization.figures import (
    image_from_scene,
    write_detection_figure,
    write_vote_figure,
)
from vrdistill_jax.visualization.html_viewer import write_viewer
from vrdistill_jax.visualization.layers import BLUE, RED, BoxSet, PointLayer, heat_colors

NAMES = ["chair", "table", "sofa"]
BOXES = np.array([[1, 1, 0.5, 1.0, 0.8, 1.0, 0.0], [-1, -1, 0.4, 1.2, 0.8, 0.8, 0.7]], np.float32)
TRUTH = BoxSet("Ground truth", BOXES, np.array([0, 1]))


def make_room():
    """A floor of 4 by 4 metres."""
    xy = np.random.default_rng(0).uniform(-2, 2, (500, 2))
    return np.concatenate([xy, np.zeros((500, 1))], 1).astype(np.float32)


def page_data(path):
    (data,) = re.findall(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    return json.loads(data)


def layer_points(layer):
    return np.frombuffer(base64.b64decode(layer["xyz"]), "<f4").reshape(-1, 3)


def layer_colors(layer):
    return np.frombuffer(base64.b64decode(layer["rgb"]), np.uint8).reshape(-1, 3)


def read_picture(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    return np.rint(image[..., :3] * 255).astype(int)


def share_of_color(path, color):
    """Share of the pixels that have a colour, nearly."""
    return (np.abs(read_picture(path) - np.array(color)).max(-1) < 12).mean()


def test_votes_are_in_the_picture_and_on_the_page(tmp_path):
    votes = np.array([[0.5, 0.5, 0.5], [-1, -1, 0.4], [1.9, -1.9, 2.5]], np.float32)
    layers = [PointLayer("Votes", votes, BLUE), PointLayer("Refined", votes[:2] + 0.3, RED)]
    picture, page = write_vote_figure(
        tmp_path / "new" / "v0.5", make_room(), layers, TRUTH, NAMES, "Two <votes>"
    )
    assert (picture.name, page.name) == ("v0.5.png", "v0.5.html")  # a dot in the name is kept
    assert share_of_color(picture, BLUE) > 3e-5
    assert share_of_color(picture, RED) > 3e-5
    data = page_data(page)
    assert [(layer["name"], layer["color"], layer["count"]) for layer in data["layers"]] == [
        ("Votes", list(BLUE), 3),
        ("Refined", list(RED), 2),
    ]
    np.testing.assert_array_equal(layer_points(data["layers"][0]), votes)
    assert data["layers"][0]["scale"] is None
    assert [box["label"] for box in data["boxes"]] == [0, 1]
    assert [box["score"] for box in data["boxes"]] == [None, None]
    assert data["title"] == "Two <votes>"


def test_layers_that_are_not_drawn_leave_no_color(tmp_path):
    """The check of the test above would notice if nothing was drawn."""
    picture, page = write_vote_figure(tmp_path / "v", make_room(), [], TRUTH, NAMES)
    assert share_of_color(picture, BLUE) == share_of_color(picture, RED) == 0
    assert page_data(page)["layers"] == []


def test_close_up_shows_less_of_the_room(tmp_path):
    layers = [PointLayer("Votes", np.array([[1, 1, 0.5]], np.float32), BLUE)]
    near, far = BoxSet("Ground truth", BOXES[:1], [0]), make_room() * 5

    def width(close_up):
        path, _ = write_vote_figure(tmp_path / str(close_up), far, layers, near, NAMES, close_up=close_up)
        columns = (read_picture(path).max(-1) < 100).any(0)  # boxes, the scale and writing are dark
        return np.ptp(np.flatnonzero(columns))

    assert width(True) > 1.2 * width(False)


def test_a_layer_with_values_is_shaded_dark_for_high(tmp_path):
    votes = np.array([[0, 0, 0.5], [1, 1, 0.5], [-1, 1, 0.5]], np.float32)
    mask = np.array([0.1, 0.5, 0.9])
    _, page = write_vote_figure(
        tmp_path / "m", make_room(), [PointLayer("Soft mask", votes, values=mask)], TRUTH, NAMES
    )
    (layer,) = page_data(page)["layers"]
    brightness = layer_colors(layer).astype(int).sum(-1)
    assert brightness[0] > brightness[1] > brightness[2]
    assert (layer["scale"]["low"], layer["scale"]["high"]) == (0.1, 0.9)
    assert layer["scale"]["colors"][0] == list(layer_colors(layer)[0])
    assert layer["scale"]["colors"][-1] == list(layer_colors(layer)[2])


def test_shades_fall_all_the_way():
    shades = heat_colors(np.linspace(-1, 2, 301), 0, 1).astype(int)
    assert (shades[:101] == shades[0]).all()
    assert (shades[200:] == shades[-1]).all()
    luminance = shades @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance[100:201]) <= 1).all()
    assert luminance[0] - luminance[-1] > 150
    np.testing.assert_array_equal(heat_colors(np.ones(2), 1, 1), heat_colors(np.zeros(2), 0, 1))


def test_detections_side_by_side(tmp_path):
    found = [
        TRUTH,
        BoxSet("Teacher", BOXES, [0, 1], [0.9, 0.8]),
        BoxSet("Student", BOXES[:1] + 0.1, [2], [0.7]),
        BoxSet("Nothing found", np.zeros((0, 7)), [], []),
    ]
    picture, page = write_detection_figure(tmp_path / "d", make_room(), found, NAMES, "Detections")
    data = page_data(page)
    assert data["sets"] == ["Ground truth", "Teacher", "Student", "Nothing found"]
    assert [(box["set"], box["label"], box["score"]) for box in data["boxes"]] == [
        *((0, 0, None), (0, 1, None), (1, 0, 0.9), (1, 1, 0.8), (2, 2, 0.7))
    ]
    from vrdistill_jax.visualization.ply import class_color

    for label in (0, 1, 2):
        assert share_of_color(picture, class_color(label)) > 1e-4
    assert share_of_color(picture, class_color(3)) == 0


def test_picture_is_a_view_from_above_without_perspective():
    metre = np.linalg.norm(image_from_scene(np.eye(3)) - image_from_scene(np.zeros(3)), axis=-1)
    assert (metre <= 1).all()
    assert metre[2] == pytest.approx(np.cos(figures.ELEVATION))
    assert image_from_scene([0, 0, 1])[1] > 0  # up is up
    moved = image_from_scene([[5, 6, 7], [5, 6, 8]])
    np.testing.assert_allclose(moved[1] - moved[0], image_from_scene([0, 0, 1]), atol=1e-12)


def test_edges_join_neighbouring_corners():
    assert len(figures.EDGES) == len({tuple(edge) for edge in figures.EDGES.tolist()}) == 12
    assert all(bin(a ^ b).count("1") == 1 for a, b in figures.EDGES)


def test_the_same_input_gives_the_same_picture(tmp_path):
    layers = [PointLayer("Votes", make_room()[:20], RED)]
    first, _ = write_vote_figure(tmp_path / "a", make_room(), layers, TRUTH, NAMES)
    second, _ = write_vote_figure(tmp_path / "b", make_room(), layers, TRUTH, NAMES)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (PointLayer("far", np.full((1, 3), np.inf)), "'far' holds NaN"),
        (PointLayer("mask", np.zeros((1, 3)), values=np.array([np.nan])), "'mask' holds NaN"),
        (PointLayer("flat", np.zeros((4, 2))), r"'flat': xyz \(4, 2\)"),
        (PointLayer("few", np.zeros((4, 3)), values=np.zeros(3)), r"'few': .* values \(3,\)"),
    ],
)
def test_bad_layers_are_named(tmp_path, layer, match):
    with pytest.raises(ValueError, match=match):
        write_vote_figure(tmp_path / "x", make_room(), [layer], TRUTH, NAMES)
    with pytest.raises(ValueError, match=match):
        write_viewer(tmp_path / "x.html", make_room(), None, BOXES, [0, 1], None, NAMES, layers=[layer])
    assert not list(tmp_path.iterdir())


def test_bad_boxes_of_a_set_are_named(tmp_path):
    found = [TRUTH, BoxSet("Student", BOXES, [0, 7])]
    with pytest.raises(ValueError, match="student: labels 0..7"):
        write_viewer(tmp_path / "x.html", make_room(), None, BOXES, [0, 1], None, NAMES, more_boxes=found[1:])
    with pytest.raises(ValueError, match="nothing to draw"):
        write_detection_figure(tmp_path / "x", make_room(), [], NAMES)


@pytest.mark.parametrize("count", [0, 1])
def test_empty_rooms(tmp_path, count):
    nothing = BoxSet("Ground truth", np.zeros((0, 7)), [])
    votes = PointLayer("Votes", np.zeros((0, 3)), values=np.zeros(0))
    for close_up in (False, True):
        paths = write_vote_figure(
            tmp_path / "e", make_room()[:count], [votes], nothing, NAMES, close_up=close_up
        )
        assert all(path.stat().st_size > 0 for path in paths)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'vrdistill-jax\[figures\]'"):
        write_vote_figure(tmp_path / "x", make_room(), [], TRUTH, NAMES)


def test_pages_without_layers_have_no_legend_of_them(tmp_path):
    path = write_viewer(tmp_path / "a.html", make_room(), None, BOXES, [0, 1], None, NAMES)
    data = page_data(path)
    assert data["layers"] == []
    assert data["sets"] == ["Boxes"]
    assert {box["set"] for box in data["boxes"]} == {0}
