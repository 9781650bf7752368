import json

from scenes import tiny_config

from vrdistill_jax.training.logging import RunLog, describe_environment


def read(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_records_and_resume(tmp_path):
    log = RunLog(tmp_path, tiny_config(), 0, 10)
    for step in (1, 2, 3):
        log.write(step, {"total": step * 1.0}, "train/")
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tra')  # a killed run
    log = RunLog(tmp_path, tiny_config(), 2, 10)
    log.write(3, {"total": 30.0}, "train/")
    log.close()
    assert [(r["step"], r["train/total"]) for r in read(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert json.loads((tmp_path / "config.json").read_text())["detector"]["name"] == "votenet"
    assert json.loads((tmp_path / "env.json").read_text())["jax"]


def test_environment_names_versions():
    assert {"vrdistill_jax", "revision", "python", "jax", "devices"} <= set(describe_environment())
