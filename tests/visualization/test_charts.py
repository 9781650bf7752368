import numpy as np
import pytest

from vrdistill_jax.visualization.charts import AlignmentSeries, write_alignment_chart, write_lines_chart


def test_charts_are_written(tmp_path):
    curve = np.array([[50, 0.3], [100, 0.2]])
    one = AlignmentSeries(
        "a", curve, np.zeros((0, 2)), np.array([0.5]), np.array([0.4]), np.array([1, 0]), 0.5
    )
    nothing = one._replace(label="b", score=np.zeros(0), iou=np.zeros(0), histogram=np.array([0, 0]))
    lines = {"moves": {"x": [0, 1], "iou": [1, 0]}, "grows": {"x": [0, 1], "iou": [1, 0.5]}}
    for path in (
        write_alignment_chart(tmp_path / "new" / "a.6", [one, nothing], "title"),
        write_lines_chart(tmp_path / "new" / "b", lines, "title", "y"),
    ):
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.6.png", "b.png"]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        write_alignment_chart(tmp_path / "a", [])
    with pytest.raises(ValueError, match="nothing to draw"):
        write_lines_chart(tmp_path / "a", {})
