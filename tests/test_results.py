import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_readme_shows_what_the_result_files_hold():
    done = subprocess.run([sys.executable, ROOT / "results" / "render.py", "--check"], check=False)
    assert done.returncode == 0, "run python results/render.py"


def test_readme_links_exist():
    import re

    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
