"""The figures of small runs that were never trained: what they show is computed anew from the pages."""

import base64
import copy
import functools
import json
import re

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from scenes import make_batch, make_sample, tiny_config

from vrdistill_jax.detectors import find_detector
from vrdistill_jax.distillers import vrdistill
from vrdistill_jax.experiments import figures
from vrdistill_jax.experiments.figures import FIGURES, draw_figure
from vrdistill_jax.recipes import default_teacher_config
from vrdistill_jax.training.checkpoint import RunCheckpoints, save_inference_checkpoint
from vrdistill_jax.training.distill import init_distillers, make_distillation
from vrdistill_jax.training.state import init_state, init_variables
from vrdistill_jax.training.teacher import load_teacher
from vrdistill_jax.visualization.layers import heat_colors

SCENES = [make_sample(seed) for seed in (5, 6)]


@functools.cache
def new_network():
    """A config, its network as it starts (a little disturbed, so that nothing is zero by construction) and a batch."""
    config = tiny_config(**{"detector.width": 0.0625})
    batch = make_batch(config)
    model = find_detector(config.detector.name).build(config.detector)
    variables = init_variables(model, jax.random.key(1), batch.scene.points, batch.pyramid)
    return config, model, disturb(variables, 1), batch


def disturb(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + 0.05 * rng.random(x.shape), np.float32), tree)


def save_student(folder, teacher_folder, **entries):
    """A run of VRDistill before its first step, except for the refinement's random weights."""
    config, model, variables, batch = new_network()
    config = copy.deepcopy(config)
    config.teacher = default_teacher_config()
    config.teacher.checkpoint = str(teacher_folder)
    config.distiller = ConfigDict({"methods": {"vrdistill": vrdistill.default_config()}})
    config.distiller.methods.vrdistill.update(entries)
    teacher = load_teacher(config, folder)
    distillation = make_distillation(config, teacher, optax.constant_schedule(0.1))
    learned = init_distillers(distillation, jax.random.key(3), model, variables, batch)
    learned = learned._replace(params=disturb(learned.params, 4))
    with RunCheckpoints(folder, config) as checkpoints:
        checkpoints.save(init_state(variables, optax.sgd(0.1))._replace(distiller=learned))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories by label; the plain student has the weights of the distilled one."""
    folder = tmp_path_factory.mktemp("runs")
    config, _, variables, _ = new_network()
    plain = folder / "plain"
    save_inference_checkpoint(plain, variables, config)
    student = save_student(folder / "vrdistill", plain, layers=1, sigma=0.5)
    return {"Teacher": plain, "Student": plain, "VRDistill": student}


@pytest.fixture(autouse=True, scope="module")
def load_each_run_once():
    """Every test draws from the same runs; compiling them anew would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "load_run", functools.cache(figures.load_run))
        yield


def page_data(path):
    (data,) = re.findall(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    return json.loads(data)


def layer_points(layer):
    return np.frombuffer(base64.b64decode(layer["xyz"]), "<f4").reshape(-1, 3).astype(np.float64)


def draw(number, runs, labels, output, row=0):
    """The files of one scene, and what its page holds."""
    picture, page = draw_figure(number, {n: runs[n] for n in labels}, output, [row], SCENES)
    assert (picture.name, page.name) == (f"figure{number}_scene{row}.png", f"figure{number}_scene{row}.html")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    return page_data(page)


@pytest.fixture(scope="module")
def refinement(runs, tmp_path_factory):
    """Figures 1, 5 and 6 of the same scene."""
    output = tmp_path_factory.mktemp("figures")
    return {number: draw(number, runs, ["VRDistill"], output, row=1) for number in (1, 5, 6)}


def test_votes_before_and_after_refinement(refinement):
    for number in (1, 5):
        before, after = refinement[number]["layers"]
        assert before["name"].startswith("Votes: ")
        assert after["name"].startswith("Refined votes: ")
        assert before["count"] == after["count"] > 0
        assert not np.allclose(layer_points(before), layer_points(after), atol=1e-3)
    assert refinement[5]["layers"][0]["count"] == tiny_config().detector.num_proposals


def test_near_view_shows_the_votes_on_objects_and_says_how_far_they_are(refinement):
    """A cluster of a seed on an object is one of all votes, and its distance is to one of the boxes' centres."""
    for n in (0, 1):
        near, every = (layer_points(refinement[number]["layers"][n]) for number in (1, 5))
        assert len(near) < len(every)
        assert {tuple(row) for row in near.tolist()} <= {tuple(row) for row in every.tolist()}
        said = float(re.search(r"([\d.]+) m", refinement[1]["layers"][n]["name"])[1])
        assert refinement[5]["layers"][n]["name"] == refinement[1]["layers"][n]["name"]
        distance = np.linalg.norm(near[:, None] - SCENES[1]["boxes_center"][None], axis=-1)
        assert distance.min(1).mean() - 0.006 <= said <= distance.max(1).mean() + 0.006


def test_boxes_are_the_ground_truth(refinement):
    for data in refinement.values():
        centers = np.array([box["center"] for box in data["boxes"]])
        np.testing.assert_allclose(centers, SCENES[1]["boxes_center"], atol=1e-4)
        assert [box["label"] for box in data["boxes"]] == SCENES[1]["boxes_label"].tolist()


def test_mask_is_equation_3_at_the_refined_votes(refinement):
    (layer,) = refinement[6]["layers"]
    votes = layer_points(layer)
    np.testing.assert_array_equal(votes, layer_points(refinement[5]["layers"][1]))
    centers, sizes = SCENES[1]["boxes_center"], SCENES[1]["boxes_size"]
    nearest = np.linalg.norm(votes[:, None] - centers[None], axis=-1).argmin(1)
    mask = 1 / ((((votes - centers[nearest]) / sizes[nearest]) ** 2).sum(-1) + 0.5)
    shades = np.frombuffer(base64.b64decode(layer["rgb"]), np.uint8).reshape(-1, 3).astype(int)
    assert np.abs(shades - heat_colors(mask, mask.min(), mask.max()).astype(int)).max() <= 1
    assert layer["scale"]["low"] == pytest.approx(mask.min(), abs=1e-3)
    assert layer["scale"]["high"] == pytest.approx(mask.max(), abs=1e-3)


def test_votes_of_two_students(runs, tmp_path):
    layers = draw(7, runs, ["Student", "VRDistill"], tmp_path)["layers"]
    assert [layer["name"].partition(":")[0] for layer in layers] == [
        "Votes of Student",
        "Votes of VRDistill",
    ]
    assert layers[0]["color"] != layers[1]["color"]
    # The same weights and the same points.
    np.testing.assert_allclose(layer_points(layers[0]), layer_points(layers[1]), atol=1e-5)


def test_detections_after_the_ground_truth(runs, tmp_path):
    data = draw(4, runs, ["Teacher", "VRDistill"], tmp_path)
    assert data["sets"] == ["Ground truth", "Teacher", "VRDistill"]
    true = [box for box in data["boxes"] if box["set"] == 0]
    assert len(true) == 3
    assert all(box["score"] > 0.5 for box in data["boxes"] if box["set"] > 0)
    for number in (1, 2):
        scores = [box["score"] for box in data["boxes"] if box["set"] == number]
        assert scores == sorted(scores, reverse=True)


def test_every_figure_names_runs_of_the_tables():
    from vrdistill_jax.experiments.vrdistill_tables import table_rows

    labels = {row.label for row in table_rows(1)}
    for figure in FIGURES.values():
        assert set(figure.runs) <= labels
    assert FIGURES[1].rows != FIGURES[5].rows


def test_what_cannot_be_drawn_is_named(runs, tmp_path, monkeypatch):
    one = {"VRDistill": runs["VRDistill"]}
    with pytest.raises(ValueError, match="no figure 2 to draw; known: 1, 4, 5, 6, 7"):
        draw_figure(2, one, tmp_path)
    with pytest.raises(ValueError, match="figure 1 needs one run"):
        draw_figure(1, one | {"Student": runs["Student"]}, tmp_path)
    with pytest.raises(ValueError, match="figure 4 needs runs, for example Teacher"):
        draw_figure(4, {}, tmp_path)
    with pytest.raises(ValueError, match="no scene 2; the dataset has the scenes 0 to 1"):
        draw_figure(1, one, tmp_path, [2], SCENES)
    with pytest.raises(ValueError, match="figure 1: Student was not trained with VRDistill"):
        draw_figure(1, {"Student": runs["Student"]}, tmp_path, [0], SCENES)
    monkeypatch.setattr(figures, "vote_level", lambda run: str("distiller" in run.config))
    with pytest.raises(ValueError, match="figure 7: these runs call different points votes"):
        draw_figure(7, {n: runs[n] for n in ("Student", "VRDistill")}, tmp_path, [0], SCENES)
    assert not list(tmp_path.iterdir())
