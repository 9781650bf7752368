import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from vrdistill_jax import benchmark
from vrdistill_jax.benchmarks import cases, peers, recorder, sparse
from vrdistill_jax.benchmarks.recorder import QUICK, Effort, Recorder, compare, measure
from vrdistill_jax.benchmarks.torch_votenet import import_torch

TIMES = ("min_ms", "p50_ms", "p95_ms", "cpu_ms")


def quiet():
    return Recorder(QUICK, say=lambda line: None)


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "vrdistill_jax.benchmark", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
        env=os.environ,
    )


@pytest.fixture(scope="module")
def result():
    """All default suites, quick."""
    return benchmark.benchmark(effort=QUICK)


def stages(result, suite, case=""):
    return {
        row["stage"]: row for row in result["rows"] if row["suite"] == suite and row["case"].startswith(case)
    }


def test_measure_reports_what_a_call_takes():
    calls = []

    def work():
        calls.append(None)
        time.sleep(0.01 if len(calls) > 2 else 0.2)  # the two first calls warm up and must not count

    row = measure(work, Effort(seconds=0.05, min_calls=3, max_calls=100))
    assert len(calls) == row["calls"] + 2
    assert 10 <= row["min_ms"] <= row["p50_ms"] <= row["p95_ms"]
    assert row["min_ms"] < 100
    assert row["cpu_ms"] < 9  # sleeping costs no processor time


def test_measure_keeps_to_its_limits():
    assert measure(lambda: None, Effort(seconds=10, min_calls=1, max_calls=7))["calls"] == 7
    assert measure(lambda: time.sleep(0.01), Effort(seconds=0, min_calls=4, max_calls=7))["calls"] == 4


def test_ratio_is_the_peers_time_over_ours():
    ours, peer = {"p50_ms": 2.0, "min_ms": 1.0}, {"p50_ms": 5.0, "min_ms": 4.0}
    compare(ours, peer)
    assert peer["ratio"] == 2.5
    assert peer["ratio_of_minima"] == 4.0


def test_every_row_is_complete_and_plausible(result):
    json.dumps(result)
    assert result["schema"] == 1
    assert result["failures"] == []
    assert {row["suite"] for row in result["rows"]} == set(benchmark.DEFAULT_SUITES)
    for row in result["rows"]:
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p95_ms"], row
        assert row["calls"] >= QUICK.min_calls, row
    machine = result["environment"]
    assert machine["usable_cores"] >= 1
    assert machine["cpu"]
    assert machine["jax"]
    assert len(result["load_average"]) == 2


@pytest.mark.parametrize(
    ("suite", "case", "whole"),
    [("votenet", "width 1/4", "total: cloud to boxes"), ("pyramid", "2000", "host: whole pyramid")],
)
def test_the_total_covers_its_stages(result, suite, case, whole):
    rows = stages(result, suite, case)
    total = rows.pop(whole)
    parts = [row["min_ms"] for name, row in rows.items() if not name.startswith("device")]
    assert len(parts) >= 3
    # Minima, since other programs may hold the cores; some slack, since the fused program may beat its two halves.
    assert 0.5 * sum(parts) <= total["min_ms"] <= 4 * sum(parts) + 5
    assert total["scenes_per_s"] == pytest.approx(1e3 / total["p50_ms"], rel=1e-3)


def test_the_training_step_says_what_memory_it_needs(result):
    step = stages(result, "train_step")["step: forward, backward, update"]
    parameters_mib = step["parameters"] * 4 / 2**20
    assert step["memory_mib"] > 4 * parameters_mib  # parameters, two moments, gradients


def test_peers_are_measured_or_their_absence_is_noted(result):
    reasons = {entry["stage"]: entry["reason"] for entry in result["skipped"]}
    names = " ".join(row["stage"] for row in result["rows"] if "ratio" in row)
    for peer in ("torch", "fpsample", "scipy"):
        assert (peer in names) != (peer in reasons)
    for reason in reasons.values():
        assert "pip install" in reason


def test_torch_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    with pytest.raises(ImportError, match=r"not installed: pip install 'vrdistill-jax\[torch\]'"):
        import_torch()


def test_a_peer_that_computes_something_else_is_a_failure():
    record = quiet()
    ours = np.random.default_rng(0).normal(size=(256, 97)).astype(np.float32)
    assert peers._share_same(record, ours * (1 + 1e-5), ours) == 1.0
    one_cluster_differs = np.where(np.arange(256)[:, None] == 3, 9.0, ours)
    assert 0.99 < peers._share_same(record, one_cluster_differs, ours) < 1.0
    assert record.failures == []
    assert peers._share_same(record, ours[::-1], ours) < 0.1
    assert len(record.failures) == 1
    assert "void" in record.failures[0]


def test_the_cloud_is_a_room_and_always_the_same():
    xyz = cases.room_cloud(3000)
    assert xyz.shape == (3000, 3)
    assert len(np.unique(xyz, axis=0)) == 3000
    extent = np.ptp(xyz, axis=0)
    assert (extent > 1).all()
    assert (extent < 20).all()
    np.testing.assert_array_equal(xyz, cases.room_cloud(3000))
    with pytest.raises(ValueError, match="90000 points"):
        cases.scanned_room(90000)


def test_a_sparse_convolution_is_measured_in_both_forms_and_beside_its_peer():
    record = quiet()
    sparse._time_convolution(record, cases.room_cloud(500), 0.1)
    names = {row["stage"] for row in record.rows}
    assert {
        "map, dense (host)",
        "convolution, dense",
        "map, by pairs (host)",
        "convolution, by pairs",
    } <= names
    (case,) = {row["case"] for row in record.rows}
    assert "voxels" in case
    if record.skipped:
        assert record.skipped[0]["reason"].startswith("not installed: pip install torch spconv")
    else:
        assert {row["stage"] for row in record.rows if "ratio" in row} == {
            "spconv with map",
            "spconv, map cached",
        }
    assert record.failures == []


@pytest.mark.slow
def test_suite_sparse_times_tr3d_from_cloud_to_head():
    rows = stages(benchmark.benchmark(("sparse",), QUICK), "sparse", "TR3D")
    assert set(rows) == {"pyramid (host, one core)", "network", "total: cloud to head", sparse.PRODUCT}
    assert rows["network"]["parameters"] > 10_000
    assert rows["total: cloud to head"]["peak_memory_mib"] > 50
    total, parts = rows["total: cloud to head"]["min_ms"], rows["network"]["min_ms"]
    assert total > 0.5 * parts


def test_suite_attention_sets_our_drawing_beside_that_of_jax():
    rows = stages(benchmark.benchmark(("attention",), QUICK), "attention")
    assert len(rows) == 4
    assert rows["draw_kept"]["min_ms"] < rows["jax.random.bernoulli"]["min_ms"]


def test_clouds_too_small_for_a_case_are_skipped():
    record = Recorder(Effort(seconds=0, min_calls=1, max_calls=1), say=lambda line: None)
    sparse.run(record, cases.room_cloud(400))
    assert [entry["stage"] for entry in record.skipped[:2]] == ["20000 points", "5000 points"]


def test_unknown_suites_list_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown suite 'speed'; known: pyramid, votenet, train_step, distill_step, peers"
    ):
        benchmark.benchmark(("speed",), QUICK)


def test_the_verb_prints_a_table_and_writes_the_file(tmp_path):
    path = tmp_path / "out.json"
    done = run("--suite=pyramid", "--quick", f"--json={path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(path.read_text())
    assert result["quick"] is True
    table = done.stdout.partition("\n\n")[2]
    for row in result["rows"]:
        assert row["suite"] == "pyramid"
        line = next(line for line in table.splitlines() if line.strip().startswith(row["stage"]))
        shown = line.strip().removeprefix(row["stage"]).split()[:4]
        assert shown == [f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "min_ms", "cpu_ms")]
    assert "quick run" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite=speed"], "pyramid"),
        (["--json=nowhere/out.json", "--quick"], "nowhere does not exist"),
        (["--suite=pyramid", "--cloud=scan.ply"], "--cloud goes with --suite=sparse"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_failures_exit_with_1(monkeypatch, capsys):
    def broken(record):
        record.time("broken", "case", "stage", lambda: None)
        record.failures.append("the peer disagrees")

    class Options:
        suite, json, seconds, quick, cloud = "broken", None, 0.1, True, None

    monkeypatch.setitem(benchmark.SUITES, "broken", broken)
    monkeypatch.setattr(benchmark.flags, "FLAGS", Options)
    assert benchmark.main() == 1
    assert "failed: the peer disagrees" in capsys.readouterr().err


def test_the_machine_is_described():
    machine = recorder.describe_machine()
    assert {
        "cpu",
        "cores",
        "usable_cores",
        "memory_gib",
        "load_average",
        "variables",
        "jax",
        "devices",
    } <= set(machine)
