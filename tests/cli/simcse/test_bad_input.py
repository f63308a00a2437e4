"""What would train nothing, fail late or die in a traceback: one line, exit code 2, and nothing is made."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ...helpers.simcse_runs import run

pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
pytest.importorskip("peft", reason="the contrastive step needs the extra [simcse]")


def refused(capsys, settings):
    assert run(settings) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("bidirect-patch: error: ") and "Traceback" not in "".join(lines)
    assert not Path(settings["output_dir"]).exists()
    return lines[-1]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size is 1: an example alone has no negatives"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 65}, "a batch takes 65 examples"),
        ({"seed": 2**32}, "seed must be at most 4294967295"),
        ({"max_seq_length": 10**30}, "max_seq_length must be at most"),
        ({"per_device_train_batch_size": 10**20}, "per_device_train_batch_size must be at most"),
        ({"adam_beta1": 1.5}, "adam_beta1 must be in [0, 1)"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be 0 or more"),
        ({"lora_r": 10**12}, "lora_r must be at most"),
        ({"loss_scale": float("nan")}, "loss_scale must be above 0; got nan"),
        ({"max_train_samples": 0}, "max_train_samples must be at least 1"),
        ({"mini_batch_size": 10**20}, "mini_batch_size must be at most"),
        ({"dataset_file_path": "a\0b"}, "dataset_file_path holds a character that no path"),
        ({"optim": "adamw_bnb_8bit_of_mine"}, "optim"),
        ({"label_smoothing_factor": 0.3}, "label_smoothing_factor is not for simcse"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha is not for simcse"),
        ({"group_by_length": True}, "group_by_length is not for simcse"),
    ],
)
def test_before_a_model_is_loaded(settings, capsys, monkeypatch, change, says):
    from bidirect_patch.cli.simcse import training

    monkeypatch.setattr(training, "load_encoder", lambda *args: pytest.fail("a model was loaded"))
    assert says in refused(capsys, settings | change)


def test_one_example_alone(settings, tmp_path, capsys):
    path = tmp_path / "one.txt"
    path.write_text("w1 w2\n")
    assert "the file holds 1: an example alone" in refused(capsys, settings | {"dataset_file_path": str(path)})


def test_triplets_have_a_negative_in_a_batch_of_one(supervised):
    assert run(supervised | {"per_device_train_batch_size": 1, "stop_after_n_steps": 1}) == 0


def test_texts_of_unknown_words(settings, tmp_path, capsys):
    path = tmp_path / "unknown.txt"
    path.write_text("good morning\ngood night\n")
    assert "every token of the texts is <unk>" in refused(capsys, settings | {"dataset_file_path": str(path)})
    path.write_text("good morning\ngood w1\n")
    assert run(settings | {"dataset_file_path": str(path), "stop_after_n_steps": 1}) == 0


def test_a_disk_without_space_is_seen_before_the_first_step(settings, capsys, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "1000 bytes are free on its disk" in refused(capsys, settings)


def test_a_model_with_fewer_positions_than_max_seq_length(settings, place, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    folder = tmp_path / "gpt2"
    tokenizer.save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_head=2, n_layer=2, n_positions=16)).save_pretrained(folder)
    path = tmp_path / "long.jsonl"
    long = [" ".join([f"w{i}", "w1"] * 40) for i in range(4)]
    path.write_text("".join(json.dumps({"query": text, "positive": text}) + "\n" for text in long))
    settings |= {"model_name_or_path": str(folder), "peft_model_name_or_path": None, "dataset_file_path": str(path)}
    assert run(settings | {"stop_after_n_steps": 1, "gradient_checkpointing": False}) == 0
