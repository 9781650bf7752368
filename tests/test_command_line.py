import subprocess
import sys

import pytest

from vrdistill_jax import command_line


def run(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, timeout=120, **kwargs
    )


def test_config_is_found_in_the_package_when_not_in_the_working_directory(tmp_path, monkeypatch):
    package = tmp_path / "site" / "vrdistill_jax"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "synthrooms.py").write_text("")
    monkeypatch.setattr(command_line, "__file__", str(package / "command_line.py"))
    monkeypatch.chdir(tmp_path)
    found = command_line.find_config(["train", "--config=configs/synthrooms.py:tiny", "--workdir=x"])
    assert found == ["train", f"--config={package}/configs/synthrooms.py:tiny", "--workdir=x"]
    assert command_line.find_config(["train", "--config=missing.py"]) == ["train", "--config=missing.py"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "synthrooms.py").write_text("")
    assert (
        command_line.find_config(["train", "--config=configs/synthrooms.py"])[1]
        == "--config=configs/synthrooms.py"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "nowhere.py"),
        ([], "--config is needed"),
        (["--confg=a"], "confg"),
        (["--config=configs/synthrooms.py:huge"], "unknown size 'huge'; known: full, small, tiny"),
        (["--config=configs/synthrooms.py:tiny", "--config.train.batchsize=3"], "batch_size"),
        (["configs/synthrooms.py"], "unexpected argument"),
    ],
)
def test_bad_flags_are_one_message_and_exit_2(arguments, message):
    done = run("vrdistill_jax.train", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "import_torch"])
def test_help_shows_an_example(verb):
    done = run(f"vrdistill_jax.{verb}", "--help")
    assert f"python -m vrdistill_jax.{verb}" in done.stdout
    assert "Traceback" not in done.stderr
