import pytest

from vrdistill_jax.detectors import votenet
from vrdistill_jax.experiments.cost import count_multiply_adds
from vrdistill_jax.recipes import SCANNET


@pytest.mark.parametrize(("width", "paper"), [(1.0, 5.84e9), (0.5, 1.53e9), (0.25, 0.42e9)])
def test_multiply_adds_are_the_papers(width, paper):
    config = votenet.default_config(SCANNET.class_names, SCANNET.mean_sizes, oriented=False)
    config.width = width
    assert count_multiply_adds(config) == pytest.approx(paper, rel=0.01)
