"""The house rules: who may import whom, how long files are, and what the NumPy-only layers stay free of."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "vrdistill_jax"
LAYERS = {
    "structs": 1,
    "geometry": 1,
    "nn": 2,
    "losses": 2,
    "assigners": 2,
    "detectors": 3,
    "distillers": 3,
    "data": 3,
    "evaluation": 3,
    "training": 4,
    "interop": 4,
    "visualization": 4,
}
VERBS = 5
FOUNDATION = ("command_line", "recipes")  # verbs and configs share them
WITHOUT_JAX = ("data", "geometry/host")
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: pathlib.Path) -> set[str]:
    """Full names of the modules that a file imports anywhere (also inside functions)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_lower_layers(path):
    own = part_of(path)
    own_layer = LAYERS.get(own, VERBS)
    for name in imports_of(path):
        if not name.startswith("vrdistill_jax."):
            continue
        other = name.split(".")[1]
        if other == own or other == "__version__" or own == "__init__" or other in FOUNDATION:
            continue
        layer = LAYERS.get(other, VERBS)
        siblings = layer == own_layer and layer > 1
        assert layer <= own_layer, f"{own} imports {name}, which lies higher"
        assert not siblings or own_layer == VERBS, f"{own} imports its sibling {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_host_layers_import_no_jax(path):
    if not str(path.relative_to(PACKAGE)).startswith(WITHOUT_JAX):
        return
    todo, seen = [path], set()
    while todo:  # follow imports inside the package
        current = todo.pop()
        for name in imports_of(current):
            assert name.split(".")[0] not in ("jax", "flax", "optax", "orbax", "chex"), (
                f"{path} reaches {name} in {current}"
            )
            target = PACKAGE.parent / (name.replace(".", "/") + ".py")
            if name.startswith("vrdistill_jax") and target.exists() and target not in seen:
                seen.add(target)
                todo.append(target)


def test_only_parallel_names_pmap():
    users = {path.name for path in MODULES if ".pmap" in path.read_text()}
    assert users == {"parallel.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 500
    assert path.name != "utils.py"
