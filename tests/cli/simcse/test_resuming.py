"""Contrastive runs that stop and go on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ...helpers.simcse_runs import run

pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
pytest.importorskip("peft", reason="the contrastive step needs the extra [simcse]")


@pytest.fixture
def resumable(settings):
    """64 texts, 4 steps an epoch, a checkpoint a step."""
    settings |= {"save_steps": 1, "save_only_model": False, "overwrite_output_dir": False, "lora_dropout": 0.3}
    return settings | {"gradient_checkpointing": False, "num_train_epochs": 3, "learning_rate": 1e-3}


def weights(settings):
    return load_file(Path(settings["output_dir"]) / "model.safetensors")


@pytest.mark.parametrize(
    "stop, change",
    [
        (5, {}),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(5, {"lora_r": 0}, marks=pytest.mark.slow),
        pytest.param(3, {"mini_batch_size": 5, "matryoshka_dims": [32, 8]}, marks=pytest.mark.slow),
    ],
)
def test_resuming_gives_the_weights_of_an_uninterrupted_run(resumable, tmp_path, stop, change):
    """Stopped within the second epoch, between two, and within the first."""
    whole = resumable | change | {"output_dir": str(tmp_path / "whole")}
    resumable |= change
    assert run(whole | {"stop_after_n_steps": 7}) == 0
    assert run(resumable | {"stop_after_n_steps": stop}) == 0
    halfway = weights(resumable)
    assert run(resumable | {"stop_after_n_steps": 7}) == 0  # as the same command again: it finds the checkpoint
    resumed, expected = weights(resumable), weights(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert any(not torch.equal(halfway[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_resuming_several_tasks_within_the_second_epoch(supervised, tmp_path):
    supervised |= {"save_steps": 1, "save_only_model": False, "overwrite_output_dir": False, "lora_dropout": 0.3}
    supervised |= {"per_device_train_batch_size": 4, "num_train_epochs": 2, "gradient_checkpointing": False}
    whole = supervised | {"output_dir": str(tmp_path / "whole")}
    assert run(whole | {"stop_after_n_steps": 12}) == 0
    assert run(supervised | {"stop_after_n_steps": 10}) == 0
    assert run(supervised | {"stop_after_n_steps": 12}) == 0
    resumed, expected = weights(supervised), weights(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_checkpoint_holds_the_adapter_and_not_the_model(resumable):
    assert run(resumable | {"stop_after_n_steps": 1}) == 0
    names = {path.name for path in Path(resumable["output_dir"], "checkpoint-1").iterdir()}
    assert "adapter_model.safetensors" in names and "optimizer.pt" in names
    assert not names & {"model.safetensors", "modules.json", "tokenizer.json"}
    config = json.loads(Path(resumable["output_dir"], "checkpoint-1", "adapter_config.json").read_text())
    assert config["auto_mapping"]["is_causal"] is False


def test_a_finished_run_is_not_trained_further(resumable):
    assert run(resumable | {"stop_after_n_steps": 2}) == 0
    done = weights(resumable)
    assert run(resumable | {"stop_after_n_steps": 2}) == 0
    again = weights(resumable)
    assert all(torch.equal(again[name], done[name]) for name in done)


@pytest.mark.parametrize(
    "first, second, says",
    [
        ({"save_only_model": True}, {}, "holds no optimizer"),
        ({}, {"lora_r": 4}, "it holds an adapter of rank 16, and lora_r is 4"),
        ({"save_strategy": "no"}, {}, "isn't empty and holds no checkpoint"),
        ({}, {"resume_from_checkpoint": "nowhere"}, "nowhere holds no whole checkpoint"),
    ],
)
def test_checkpoints_that_do_not_fit(resumable, capsys, first, second, says):
    assert run(resumable | first | {"stop_after_n_steps": 1}) == 0
    assert run(resumable | {"stop_after_n_steps": 2} | second) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
