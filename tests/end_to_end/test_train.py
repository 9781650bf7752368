"""The whole way: generate rooms, train, resume bit for bit, evaluate, predict."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from vrdistill_jax.training.checkpoint import load_inference_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALLER = [
    "--config.dataset.num_train=6",
    "--config.dataset.num_val=3",
    "--config.train.checkpoint_every=2",
    "--config.train.eval_every=4",
]


def run(verb, *arguments, env=None):
    import os

    done = subprocess.run(
        [sys.executable, "-m", f"vrdistill_jax.{verb}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=ROOT,
        env=os.environ | (env or {}),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def train(data, workdir, steps, *extra, env=None):
    config = "--config=configs/synthrooms.py:tiny"
    settings = [f"--workdir={workdir}", f"--config.train.num_steps={steps}", *SMALLER, *extra]
    return run("train", config, f"--config.dataset.data_dir={data}", *settings, env=env)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of four steps that was not interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = train(data, workdir, 4)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_training_prints_the_table_and_what_comes_next(trained):
    workdir, out = trained
    assert "mAP" in out
    assert "shower" in out
    assert f"python -m vrdistill_jax.predict --checkpoint={workdir}" in out
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/total" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "val/mAP@0.25" in r] == [4]
    assert (workdir / "report.txt").read_text().strip() in out


def test_two_plus_two_steps_equal_four(data, trained, tmp_path):
    """A run killed after two steps goes on where its checkpoint ends, bit for bit."""
    workdir = tmp_path / "resumed"
    # The interrupted run is the same command; it dies after the checkpoint of step 2.
    killed = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "end_to_end" / "train_until.py"),
            "2",
            str(data),
            str(workdir),
            *SMALLER,
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=600,
    )
    assert killed.returncode == 9, killed.stderr
    done = train(data, workdir, 4)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout
    whole, _ = load_inference_checkpoint(trained[0], 4)
    resumed, _ = load_inference_checkpoint(workdir, 4)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]


def test_evaluate_gives_the_trained_result_and_keeps_what_it_compiled(trained, data, tmp_path):
    workdir, out = trained
    cache = {
        "VRDISTILL_CACHE": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": "",  # the tests' own
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = run("evaluate", f"--checkpoint={workdir}", f"--json={tmp_path / 'r.json'}", env=cache)
    assert any((tmp_path / "cache" / "compiled").iterdir())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in out
    assert 0 <= json.loads((tmp_path / "r.json").read_text())["result"]["mAP@0.25"] <= 1


def test_predict_from_the_checkpoint_folder_alone(trained, tmp_path):
    import shutil

    rng = np.random.default_rng(0)
    scan = tmp_path / "scan.npy"
    np.save(scan, rng.uniform(0, 3, (3000, 3)).astype(np.float32))
    alone = tmp_path / "alone"
    shutil.copytree(trained[0] / "checkpoints", alone / "checkpoints")
    arguments = (f"--checkpoint={alone}", f"--input={scan}", "--min_score=0", f"--output={tmp_path / 'out'}")
    done = run("predict", *arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "scan" / "detections.json").read_text())
    assert record["detections"]
    assert {d["class"] for d in record["detections"]} <= set(record["class_names"])
    assert (tmp_path / "out" / "scan" / "boxes.ply").stat().st_size > 0
    assert "<html" in (tmp_path / "out" / "scan" / "viewer.html").read_text()[:200].lower()


def test_another_config_in_the_same_workdir_is_refused(trained, data):
    done = train(data, trained[0], 4, "--config.train.batch_size=4")
    assert done.returncode == 2
    assert "train.batch_size: 2 there, 4 here" in done.stderr


def test_non_finite_loss_stops_with_step_and_terms(data, tmp_path):
    done = train(
        data,
        tmp_path / "run",
        4,
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.warmup_steps=0",
    )
    assert done.returncode == 1
    assert "step 1: parameter_norm not finite" in done.stdout
