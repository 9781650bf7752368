import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scenes import tiny_config

from vrdistill_jax.training.checkpoint import (
    RunCheckpoints,
    check_same_config,
    load_inference_checkpoint,
    save_inference_checkpoint,
)
from vrdistill_jax.training.state import init_state

CONFIG = tiny_config()


def state_at(step: int):
    variables = {"params": {"w": jnp.full(3, float(step))}, "batch_stats": {"m": jnp.ones(2)}}
    state = init_state(variables, optax.adam(0.1))
    return state._replace(step=jnp.int32(step))


def test_best_and_latest_survive_and_best_is_loaded(tmp_path):
    with RunCheckpoints(tmp_path, CONFIG) as checkpoints:
        for step, score in ((1, 0.2), (2, 0.6), (3, 0.4), (4, 0.1)):
            checkpoints.save(state_at(step), {"mAP@0.25": score, "mAP@0.5": 0.0})
        checkpoints.save(state_at(5))
        assert checkpoints.latest_step() == 5
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]
    variables, config = load_inference_checkpoint(tmp_path)
    np.testing.assert_array_equal(variables["params"]["w"], 2.0)
    assert tuple(config.detector.class_names) == ("a", "b", "c", "d")
    assert load_inference_checkpoint(tmp_path / "checkpoints", 5)[0]["params"]["w"][0] == 5.0
    with pytest.raises(ValueError, match="has no step 3; it has 2, 5"):
        load_inference_checkpoint(tmp_path, 3)


def test_restore_gives_back_every_leaf_and_type(tmp_path):
    state = state_at(7)
    with RunCheckpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore(state_at(0))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_torn_checkpoint_is_ignored(tmp_path):
    with RunCheckpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(state_at(1))
    torn = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "variables").mkdir()
    with RunCheckpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_inference_checkpoint_round_trip(tmp_path):
    variables = {
        "params": {"w": np.arange(3.0, dtype=np.float32)},
        "batch_stats": {"m": np.ones(1, np.float32)},
    }
    save_inference_checkpoint(tmp_path / "out", variables, CONFIG)
    loaded, config = load_inference_checkpoint(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert config.dataset.num_points == 256
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        save_inference_checkpoint(tmp_path / "out", variables, CONFIG)


def test_missing_checkpoint_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_inference_checkpoint(tmp_path)


def test_another_config_is_refused(tmp_path):
    check_same_config(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    check_same_config(tmp_path, tiny_config())
    check_same_config(tmp_path, tiny_config(**{"dataset.num_threads": 7, "train.log_every": 3}))
    with pytest.raises(ValueError, match=r"train.batch_size: 2 there, 4 here"):
        check_same_config(tmp_path, tiny_config(**{"train.batch_size": 4}))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
