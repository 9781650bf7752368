"""The notebook as a stranger meets it: without outputs, and every cell runs (at tiny size)."""

import json
import pathlib
import re

import pytest

NOTEBOOK = pathlib.Path(__file__).resolve().parents[2] / "notebooks" / "distill_a_student.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(notebook):
    return "".join(
        output.get("text", "") for cell in code_cells(notebook) for output in cell.get("outputs", [])
    )


def test_outputs_are_stripped():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in code_cells(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert len(code_cells(notebook)) > 10


def test_cells_are_short():
    for cell in code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8"))):
        assert len(cell["source"]) <= 32, cell["source"][0]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its outputs, and the folder that it wrote to; a cell that fails raises here."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    workdir = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VRDISTILL_SMALL", "1")
        patch.setenv("IPYTHONDIR", str(workdir / "ipython"))
        client = nbclient.NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(workdir)}}
        )
        client.execute()
    return notebook, workdir / "distill_a_student"


def test_trains_both_and_prints_their_scores(executed):
    notebook, folder = executed
    printed = text_of(notebook)
    for name in ("teacher", "student"):
        assert re.search(rf"^{name}: mAP@0.25 [01]\.\d+, mAP@0.5", printed, re.M)
        (steps,) = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]]
        assert [record["step"] for record in steps if "train/total" in record] == [1, 2, 3, 4]
    parameters = [
        int(count.replace(",", "")) for count in re.findall(r": ([\d,]+) parameters$", printed, re.M)
    ]
    assert parameters[0] < parameters[1]  # the student is the smaller one


def test_shows_curves_and_pages(executed):
    notebook, folder = executed
    shown = [
        output["data"] for cell in code_cells(notebook) for output in cell["outputs"] if "data" in output
    ]
    assert sum("image/png" in data for data in shown) == 1
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert len(pages) == 3
    assert all("<iframe srcdoc=" in page and "&lt;canvas" in page for page in pages)
    student = (folder / "student.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'id="data">(.*?)</script>', student, re.S)
    scene = json.loads(data)
    assert scene["boxes"]
    assert scene["truth"]
    assert all(0 < box["score"] <= 1 for box in scene["boxes"])


def test_draws_the_refined_votes(executed):
    _, folder = executed
    page = (folder / "figures" / "figure1_scene0.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.S)
    before, after = json.loads(data)["layers"]
    assert before["count"] == after["count"]
    assert (folder / "figures" / "figure1_scene0.png").stat().st_size > 10_000


def test_says_nothing_on_the_error_stream_but_progress(executed):
    notebook, _ = executed
    errors = "".join(
        output["text"]
        for cell in code_cells(notebook)
        for output in cell["outputs"]
        if output.get("name") == "stderr"
    )
    assert "Warning" not in errors
    assert "Error" not in errors
