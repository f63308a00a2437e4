"""Runs of the training command that stop and go on."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from ...helpers.mntp_runs import results, run, weights
from ...helpers.processes import Fork, finish

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")


@pytest.mark.parametrize(
    "lora_r, stop, share",
    [
        pytest.param(4, 3, 0.2, marks=pytest.mark.slow),
        pytest.param(4, 4, 0.2, marks=pytest.mark.slow),
        (4, 5, [0.1, 0.5]),
        pytest.param(0, 5, 0.2, marks=pytest.mark.slow),
    ],
)
def test_resuming_gives_the_weights_of_an_uninterrupted_run(settings, lora_r, stop, share):
    """64 sequences, 4 steps an epoch: stopped within the first, between two, and within the second."""
    settings |= {"do_train": True, "per_device_train_batch_size": 16, "lora_r": lora_r, "lora_dropout": 0.3}
    settings |= {"max_train_samples": 64, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    settings |= {"line_by_line": True, "mlm_probability": share}
    whole = settings | {"output_dir": settings["output_dir"] + "-whole"}
    name = "adapter_model.safetensors" if lora_r else "model.safetensors"
    assert run(whole | {"stop_after_n_steps": 6}) == 0
    assert run(settings | {"stop_after_n_steps": stop}) == 0
    halfway = weights(settings, name)
    assert run(settings | {"stop_after_n_steps": 6}) == 0  # as the same command again: it finds the checkpoint
    resumed, expected = weights(settings, name), weights(whole, name)
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert any(not torch.equal(halfway[key], expected[key]) for key in expected)


@pytest.mark.parametrize("held_out", [pytest.param(0, marks=pytest.mark.slow), 20])
def test_a_stream_starts_over_and_is_resumed_in_its_second_pass(settings, held_out):
    """40 sequences of 16 a step: stopped after 5 steps, twice through."""
    settings |= {"do_train": True, "streaming": True, "max_train_samples": 40, "per_device_train_batch_size": 16}
    settings |= {"save_strategy": "steps", "save_steps": 5, "line_by_line": True, "lora_dropout": 0.3}
    if held_out:
        settings |= {"do_eval": True, "validation_file": None, "max_eval_samples": held_out}
    whole = settings | {"output_dir": settings["output_dir"] + "-whole"}
    assert run(whole | {"stop_after_n_steps": 8}) == 0
    assert run(settings | {"stop_after_n_steps": 5, "max_steps": 8}) == 0
    assert run(settings | {"stop_after_n_steps": 8}) == 0
    resumed, expected = weights(settings), weights(whole)
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


@pytest.mark.parametrize("limit", ["max_steps", "stop_after_n_steps"])
def test_a_finished_run_is_not_trained_further(settings, limit):
    settings |= {"do_train": True, "do_eval": True, "save_strategy": "steps", "save_steps": 2, limit: 2}
    assert run(settings) == 0
    done, loss = weights(settings), results(settings)["eval_loss"]
    assert run(settings) == 0
    again = weights(settings)
    assert all(torch.equal(again[key], done[key]) for key in done)
    assert results(settings)["eval_loss"] == loss
    assert json.loads((Path(settings["output_dir"]) / "trainer_state.json").read_text())["global_step"] == 2


def test_an_overwriting_run_is_not_resumed_from_the_run_before(settings):
    settings |= {"do_train": True, "save_strategy": "steps", "save_steps": 1}
    folder = Path(settings["output_dir"])
    assert run(settings | {"stop_after_n_steps": 4}) == 0
    assert run(settings | {"stop_after_n_steps": 2, "overwrite_output_dir": True}) == 0
    assert run(settings | {"stop_after_n_steps": 3, "overwrite_output_dir": True}, "--resume_from_checkpoint=true") == 0
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    assert (folder / "old-checkpoint-4").is_dir()  # nothing is lost


def test_a_half_written_checkpoint_is_passed_over(settings):
    settings |= {"do_train": True, "save_strategy": "steps", "save_steps": 1}
    assert run(settings | {"stop_after_n_steps": 2}) == 0
    folder = Path(settings["output_dir"])
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-9")
    (folder / "checkpoint-9" / "trainer_state.json").write_text('{"global_st')
    assert run(settings | {"stop_after_n_steps": 3}, "--resume_from_checkpoint", "true") == 0
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.parametrize(
    "kill, code",
    [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_can_be_resumed(settings, kill, code):
    settings |= {"do_train": True, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1000}
    folder = Path(settings["output_dir"])
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(settings))
    process = Fork("-m", "bidirect_patch", "mntp", path)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint-3").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(kill)
    _, err = finish(process, 60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    from bidirect_patch.cli.checkpoints import last_whole_checkpoint

    reached = int(last_whole_checkpoint(str(folder)).rpartition("-")[2])
    assert run(settings | {"stop_after_n_steps": reached + 1}) == 0
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == reached + 1
