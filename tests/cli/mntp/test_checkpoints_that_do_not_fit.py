"""Checkpoints that can't be resumed from: one line and exit code 2, before the first step."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ...helpers.mntp_runs import error_line, run

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")

COMMON = {"do_train": True, "save_strategy": "steps", "save_steps": 1, "max_train_samples": 32, "report_to": "none"}


@pytest.fixture(scope="module")
def saved(place, tmp_path_factory):
    """For a rank, 0 or 4, settings whose output_dir holds checkpoint-1."""
    folder = tmp_path_factory.mktemp("saved")

    def make(lora_r):
        settings = COMMON | {"lora_r": lora_r, "output_dir": str(folder / f"rank{lora_r}"), "use_cpu": True}
        settings |= {"model_name_or_path": str(place / "model"), "train_file": str(place / "text" / "train.txt")}
        settings |= {"cache_dir": str(folder / "cache"), "max_seq_length": 32, "disable_tqdm": True}
        if not Path(settings["output_dir"]).exists():
            assert run(settings | {"stop_after_n_steps": 1}) == 0
        return settings

    return make


def truncate(name):
    def change(checkpoint):
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: len(data) // 2])

    return change


def write(name, text):
    return lambda checkpoint: (checkpoint / name).write_text(text)


def rename_weights(checkpoint):
    path = checkpoint / "adapter_model.safetensors"
    weights = {name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def widen_weights(checkpoint):
    path = checkpoint / "adapter_model.safetensors"
    weights = {name: torch.cat([tensor, tensor], 1) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "lora_r, change, settings_changed",
    [
        (4, rename_weights, {}),
        (4, widen_weights, {}),
        (4, truncate("adapter_model.safetensors"), {}),
        (4, truncate("optimizer.pt"), {}),
        (4, write("optimizer.pt", "no optimizer"), {}),
        (4, write("scheduler.pt", "no schedule"), {}),
        (4, write("rng_state.pth", "no numbers"), {}),
        (4, write("trainer_state.json", '{"steps": 1}'), {}),
        (4, write("trainer_state.json", '{"global_step": "one"}'), {}),
        (4, write("trainer_state.json", "[1]"), {}),
        (4, write("adapter_config.json", "{}"), {}),
        (4, None, {"lora_r": 8}),
        (4, None, {"lora_r": 0}),
        (0, None, {"lora_r": 4}),
        (0, truncate("model.safetensors"), {}),
        (0, None, {"num_hidden_layers": 3}),
        (0, None, {"num_hidden_layers": 1}),
        (0, None, {"hidden_size": 16}),
    ],
)
def test_it_is_one_line(capsys, saved, tmp_path, lora_r, change, settings_changed):
    settings = saved(lora_r)
    output = tmp_path / "out"
    shutil.copytree(settings["output_dir"], output)
    if change is not None:
        change(output / "checkpoint-1")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2} | settings_changed
    if sizes.keys() & settings_changed.keys() - {"lora_r"}:
        shutil.copytree(settings["model_name_or_path"], tmp_path / "model")
        rest = {"vocab_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
        sizes.pop("lora_r", None)
        LlamaForCausalLM(LlamaConfig(**sizes, **rest)).save_pretrained(tmp_path / "model")
        settings = settings | {"model_name_or_path": str(tmp_path / "model")}
        settings_changed = {}
    settings = settings | settings_changed | {"output_dir": str(output), "stop_after_n_steps": 3}
    before = json.loads((output / "config.json").read_text()) if not lora_r else None
    said = error_line(capsys, settings)
    assert f"can't resume from {output}/checkpoint-1: " in said and len(said) < 700
    assert not (output / "checkpoint-2").exists()
    assert before is None or json.loads((output / "config.json").read_text()) == before
