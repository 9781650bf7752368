import numpy as np
import pytest

from vrdistill_jax.data.class_tables import SCANNET_CLASSES, SUNRGBD_CLASSES
from vrdistill_jax.data.rooms.furniture import (
    FURNITURE_SIZES,
    build_furniture,
    class_from_kind,
    footprint_solids,
    sample_size,
)


@pytest.mark.parametrize("kind", FURNITURE_SIZES)
def test_mesh_fills_its_box_exactly(kind):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        size = sample_size(rng, kind)
        mesh = build_furniture(rng, kind, size)
        half = size * [0.5, 0.5, 0.0]
        np.testing.assert_allclose(mesh.vertices.min(0), -half, atol=1e-4)
        np.testing.assert_allclose(mesh.vertices.max(0), half + [0, 0, size[2]], atol=1e-4)
        assert mesh.faces.min() >= 0
        assert mesh.faces.max() < len(mesh.vertices)
        assert len(mesh.color) == len(mesh.absorption) == len(mesh.faces)
        assert (mesh.absorption >= 0).all()
        assert (mesh.absorption <= 1).all()


def test_every_class_of_both_benchmarks_can_be_built():
    built = {class_from_kind(kind) for kind in FURNITURE_SIZES}
    assert built >= set(SCANNET_CLASSES) | set(SUNRGBD_CLASSES)


def test_same_random_numbers_give_the_same_mesh_and_others_vary_it():
    for kind in ("chair:dining", "bookshelf:wide", "sofa:two"):
        size = np.array([0.8, 1.2, 1.0], np.float32)
        first, again, other = (build_furniture(np.random.default_rng(seed), kind, size) for seed in (3, 3, 4))
        np.testing.assert_array_equal(first.vertices, again.vertices)
        assert first.vertices.shape != other.vertices.shape or not np.allclose(first.vertices, other.vertices)


@pytest.mark.parametrize(
    "kind", ["chair:dining", "chair:office", "chair:shell", "sofa:two", "sofa:three", "toilet"]
)
def test_seats_face_plus_x(kind):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        size = sample_size(rng, kind)
        mesh = build_furniture(rng, kind, size)
        top = mesh.vertices[mesh.vertices[:, 2] > 0.92 * size[2]]
        assert top[:, 0].mean() < -0.15 * size[0], "the back rest belongs at -x"


@pytest.mark.parametrize("kind", ["sofa:corner", "desk:corner", "counter:corner"])
def test_corner_furniture_stays_inside_its_two_solids(kind):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        size = sample_size(rng, kind)
        xy = build_furniture(rng, kind, size).vertices[:, :2]
        solids = footprint_solids(kind, size)
        assert len(solids) == 2
        inside = [(np.abs(xy - s[:2]) <= s[2:] / 2 + 0.06).all(1) for s in solids]
        assert np.logical_or(*inside).all()
        assert solids[:, 2:].prod(1).sum() < 0.85 * size[0] * size[1], "the inner corner is free"


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'throne'.*known are"):
        build_furniture(np.random.default_rng(0), "throne", [1, 1, 1])
