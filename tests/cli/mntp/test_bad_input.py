"""Bad input of the training command: one line, exit code 2, nothing started."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from bidirect_patch.cli import main

from ...helpers.mntp_runs import refused, run

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
        ({"mask_token_type": "mask"}, "'<mask>' gives 0"),
        ({"train_file": "nowhere.txt"}, "no such file: nowhere.txt"),
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
        ({"mlm_probability": [0.1]}, "mlm_probability is one value; got [0.1]"),
        ({"train_file": ["a", "b"]}, "train_file is one value"),
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
    settings |= {"do_train": True, "stop_after_n_steps": 1, "line_by_line": True, "validation_file": None}
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


def test_an_output_folder_that_cannot_be(capsys, settings, tmp_path):
    (tmp_path / "file").write_text("")
    settings |= {"do_train": True}
    path = tmp_path / "settings.json"
    for place_of_it in (tmp_path / "file", tmp_path / "file" / "out"):
        path.write_text(json.dumps(settings | {"output_dir": str(place_of_it)}))
        assert main(["mntp", str(path)]) == 2
        assert "output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("text, said", [("{", "is not JSON"), ("[1]", "it holds a list")])
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


def test_a_folder_that_holds_something_else_is_left_alone(capsys, settings):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert run(settings | {"do_train": True}) == 2
    assert "overwrite_output_dir" in capsys.readouterr().err
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
