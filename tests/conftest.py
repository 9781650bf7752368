"""Shared fixtures. The process environment is set before jax is imported anywhere."""

import atexit
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

if importlib.metadata.version("jax").startswith("0.10."):
    # Tests compile hundreds of small programs and call each a few times: without optimisation they take about 60 % of the time.
    # (Only for the version that it was tried with: XLA refuses to start with a flag that it does not know.)
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
os.environ.setdefault(
    "NPROC", "16"
)  # several simulated CPU devices on few cores deadlock without it (XLA CPU)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one test, worker or started program has compiled, the others load.
    cache = tempfile.mkdtemp(prefix="vrdistill_jax_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of golden data and real scans; VRDISTILL_SHARED overrides where it is looked for."""
    path = pathlib.Path(os.environ.get("VRDISTILL_SHARED", ROOT.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"golden data and real scans are not at {path} (set VRDISTILL_SHARED)")
    return path
