"""Bad input of the training command: one line, exit code 2, nothing started."""

import errno
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import SchedulerType

from bidirect_patch.cli import main

from ...helpers.mntp_runs import error_line, refused, run

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"do_train": False}, "nothing to do: give do_train, do_eval or both"),
        ({"mlm_probabilty": 0.3}, "unknown key 'mlm_probabilty'; did you mean 'mlm_probability'?"),
        ({"mlm_probability": 0}, "mlm_probability must be in (0, 1]; got 0.0"),
        ({"mlm_probability": 1.5}, "mlm_probability must be in (0, 1]; got 1.5"),
        ({"mlm_probability": "much"}, "argument --mlm_probability"),
        ({"mask_token_type": "star"}, "argument --mask_token_type"),
        ({"mask_token": "w1 w2"}, "must be exactly one id of the tokenizer; 'w1 w2' gives 2"),
        ({"train_file": "nowhere.txt"}, "no such file or folder: nowhere.txt"),
        ({"train_file": ["nowhere.txt", "a"]}, "no such file or folder: nowhere.txt"),
        ({"train_file": ["a", 3]}, "train_file takes one value or a list of them; got ['a', 3]"),
        ({"train_file": None, "validation_file": None}, "do_train needs dataset_name or train_file"),
        ({"train_file": None, "validation_file": None, "dataset_name": "no/such-data"}, "can't read no/such-data"),
        ({"dataset_name": "wikitext"}, "give dataset_name or files, not both"),
        ({"model_name_or_path": "no/such-model"}, "can't load 'no/such-model'"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"max_seq_length": 100000, "validation_file": None}, None),
        ({"max_seq_length": 0}, "max_seq_length must be at least 2, since no first token is predicted; got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1; got 0"),
        ({"per_device_train_batch_size": -3}, "per_device_train_batch_size must be at least 1; got -3"),
        ({"learning_rate": -1}, "learning_rate must be 0 or more; got -1.0"),
        ({"num_train_epochs": "nan"}, "num_train_epochs must be above 0; got nan"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"seed": 2**32}, "seed must be at most 4294967295; got 4294967296"),
        ({"max_seq_length": 10**30}, "max_seq_length must be at most 16777216"),
        ({"per_device_train_batch_size": 10**20}, "per_device_train_batch_size must be at most 2147483647"),
        ({"warmup_ratio": "nan"}, "must be"),
        ({"adam_beta1": 1.5}, "adam_beta1 must be in [0, 1); got 1.5"),
        ({"adam_beta2": "nan"}, "adam_beta2 must be in [0, 1); got nan"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be 0 or more; got -1"),
        ({"lora_r": 10**12}, "lora_r must be at most 65536"),
        ({"max_steps": 10**30}, "max_steps must be at most 2147483647"),
        ({"max_train_samples": 10**30}, "max_train_samples must be at most 2147483647"),
        ({"preprocessing_num_workers": 10**9}, "preprocessing_num_workers must be at most 4096"),
        ({"learning_rate": "inf"}, "learning_rate must be at most 1e+36; got inf"),
        ({"label_smoothing_factor": "nan"}, "label_smoothing_factor must be in [0, 1); got nan"),
        ({"max_grad_norm": "nan"}, "max_grad_norm must be 0 or more; got nan"),
        ({"train_file": "a\0b"}, "train_file holds a character that no path and no name can have: 'a\\x00b'"),
        ({"model_name_or_path": "/tmp/\udc80"}, "model_name_or_path holds a character"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model must be loss, accuracy or sts_spearman; got 'f1'"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 4096}, "a batch takes 4096 sequences"),
        ({"mlm_probability": [0.5, 0.1]}, "takes one number, or two, the lower one first; got 0.5 0.1"),
        ({"mlm_probability": [0.1, 0.2, 0.3]}, "takes one number, or two, the lower one first; got 0.1 0.2 0.3"),
        ({"mlm_probability": [0, 0.5]}, "mlm_probability must be in (0, 1]; got 0.0"),
        ({"mlm_probability": [0.5, 1.5]}, "mlm_probability must be in (0, 1]; got 1.5"),
        ({"mlm_probability": [float("nan"), 0.5]}, "mlm_probability must be in (0, 1]; got nan"),
        ({"mlm_probability": ["low", "high"]}, "argument --mlm_probability: invalid float value: 'low'"),
        ({"mlm_probability": [True, 0.5]}, "argument --mlm_probability: invalid float value: 'True'"),
        ({"mlm_probability": True}, "argument --mlm_probability: invalid float value: 'True'"),
        ({"mlm_probability": [[0.1, 0.5]]}, "argument --mlm_probability: invalid float value: '[0.1, 0.5]'"),
        ({"mlm_probability": []}, "argument --mlm_probability: expected at least one argument"),
        ({"mlm_probability": {"low": 0.1}}, "mlm_probability takes one value or a list of them"),
        ({"learning_rate": [1]}, "learning_rate is one value"),
        ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs"),
        ({"model_name_or_path": "/no/such/folder"}, "there is no such folder"),
        ({"lora_dropout": 1}, "lora_dropout must be in [0, 1); got 1.0"),
        ({"lora_r": -1}, "lora_r must be 0 or more; got -1"),
        ({"learning_rate": "fast"}, "argument --learning_rate"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
        ({"evaluation_strategy": "sometimes"}, "sometimes"),
        ({"pad_to_max_length": True, "padding_free": True}, "contradict each other"),
        ({"streaming": True, "do_eval": True, "validation_file": None}, "a stream has no percentage"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere holds no whole checkpoint"),
    ],
)
def test_bad_settings(capsys, settings, change, said):
    settings |= {"do_train": True, "stop_after_n_steps": 1} | change
    if said is None:  # longer than the tokenizer's limit is cut to it, as in run_mlm
        assert run(settings) == 0
    else:
        assert said in refused(capsys, settings)


@pytest.mark.parametrize(
    "text, said", [("", "there is no text"), ("\n  \n", "no line of two tokens"), ("w1", "no line of two tokens")]
)
def test_text_with_nothing_in_it(capsys, settings, tmp_path, text, said):
    path = tmp_path / "empty.txt"
    path.write_text(text)
    settings |= {"do_train": True, "train_file": str(path), "validation_file": None, "line_by_line": True}
    if text == "w1":  # one word is a line, if not a chunk
        settings["line_by_line"], said = False, "less than one chunk of max_seq_length=32"
    assert said in refused(capsys, settings)


def test_texts_with_gaps_are_read_and_other_things_refused(capsys, settings, tmp_path):
    settings |= {
        "do_train": True,
        "stop_after_n_steps": 1,
        "line_by_line": True,
        "validation_file": None,
        "mlm_probability": 1,
    }
    path = tmp_path / "texts.jsonl"
    settings["train_file"] = str(path)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (None, "", "w1 w2 w3 w4 w5 w6", "w2 w3 w4")))
    assert run(settings) == 0
    path.write_text("".join(json.dumps({"text": number}) + "\n" for number in (3, 4)))
    assert "no column of text: 'text' holds int '3'" in refused(
        capsys, settings | {"output_dir": str(tmp_path / "other")}
    )


def test_blank_lines_are_no_text_in_chunks_either(capsys, settings, tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text("   \n\t\n" * 200)
    settings |= {"do_train": True, "train_file": str(path), "validation_file": None}
    assert "less than one chunk" in refused(capsys, settings)


def test_text_that_the_tokenizer_does_not_know(capsys, settings, tmp_path):
    """Nothing of it could be predicted. Loss and gradients would be 0 in every step."""
    path = tmp_path / "unknown.txt"
    path.write_text("these are other words\n" * 20)
    settings |= {"do_train": True, "train_file": str(path), "validation_file": None, "line_by_line": True}
    assert "holds nothing to predict" in refused(capsys, settings)
    assert "holds nothing to predict" in refused(capsys, settings | {"streaming": True})


@pytest.mark.parametrize(
    "change, said",
    [
        ({"mlm_probability": 1e-9}, "nothing was trained: no token was chosen"),
        ({"learning_rate": 1e36}, "lower learning"),
    ],
)
def test_a_run_that_learned_nothing_saves_nothing(capsys, settings, change, said):
    assert said in error_line(capsys, settings | {"do_train": True, "stop_after_n_steps": 2} | change)
    assert not list(Path(settings["output_dir"]).glob("*.safetensors"))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "foo"),
        pytest.param(
            {"optim": "adamw_bnb_8bit"},
            "install",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here"),
        ),
    ],
)
def test_an_optimizer_or_a_schedule_that_cannot_be_made(capsys, settings, change, said):
    if "min_lr" in said and "cosine_with_min_lr" not in list(SchedulerType):
        pytest.skip("this transformers has no such schedule")
    assert said in error_line(capsys, settings | {"do_train": True} | change)


def test_a_disk_with_too_little_space_is_noticed_before_the_first_step(capsys, settings, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    settings |= {"do_train": True, "save_strategy": "steps"}
    assert "and 5000 bytes are free on its disk" in refused(capsys, settings)


def test_a_disk_that_fills_up_is_named(capsys, settings, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    settings |= {"do_train": True, "save_strategy": "steps", "save_steps": 1, "stop_after_n_steps": 1}
    assert "can't write to" in error_line(capsys, settings)


def test_an_output_folder_that_cannot_be(capsys, settings, tmp_path):
    (tmp_path / "file").write_text("")
    settings |= {"do_train": True}
    path = tmp_path / "settings.json"
    places = [tmp_path / "file", tmp_path / "file" / "out"]
    if Path("/proc").is_dir():  # where not even root can make a file
        places.append(Path("/proc/here/out"))
    for place_of_it in places:
        path.write_text(json.dumps(settings | {"output_dir": str(place_of_it)}))
        assert main(["mntp", str(path)]) == 2
        assert "output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said", [("{", "is not JSON"), ("[1]", "it holds a list"), ("[" * 10**6, "is nested too deep")]
)
def test_a_settings_file_that_is_none(capsys, tmp_path, text, said):
    path = tmp_path / "settings.json"
    path.write_text(text)
    assert main(["mntp", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_cannot_be_bidirectional(capsys, settings, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    shutil.copytree(settings["model_name_or_path"], tmp_path / "mamba")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 64}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "mamba")
    settings |= {"do_train": True, "model_name_or_path": str(tmp_path / "mamba")}
    assert "Mamba" in refused(capsys, settings)


def test_a_backend_that_is_not_installed(capsys, settings):
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed here, so there is nothing to refuse")
    said = refused(capsys, settings | {"do_train": True, "attn_implementation": "flash_attention_2"})
    assert "flash" in said.lower() and said.rstrip().endswith("Install it, or give --attn_implementation sdpa.")


def test_a_kernel_that_is_not_installed(capsys, settings):
    if find_spec("liger_kernel"):
        pytest.skip("liger-kernel is installed here, so there is nothing to refuse")
    said = refused(capsys, settings | {"do_train": True, "use_liger_kernel": True})
    assert "use_liger_kernel" in said  # releases before 4.45 have no such setting


def test_a_folder_that_holds_something_else_is_left_alone(capsys, settings):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert run(settings | {"do_train": True}) == 2
    assert "overwrite_output_dir" in capsys.readouterr().err
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
