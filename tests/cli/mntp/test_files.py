"""Texts in several files and folders, and how long a sequence may be."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from bidirect_patch.errors import ConfigError

from ...helpers.mntp_runs import refused, run, weights

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")


def test_files_and_folders_are_read_one_after_the_other(settings, tmp_path):
    lines = Path(settings["train_file"]).read_text().splitlines()
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, part in (("first.txt", lines[:50]), ("folder/a.txt", lines[50:120]), ("folder/b.txt", lines[120:])):
        (tmp_path / path).write_text("\n".join(part) + "\n")
    (folder / "notes.md").write_text("no text to train on")
    (folder / "empty.txt").write_text("")
    settings |= {"do_train": True, "stop_after_n_steps": 2, "line_by_line": True}
    parts = settings | {"output_dir": settings["output_dir"] + "-parts"}
    parts["train_file"] = [str(tmp_path / "first.txt"), str(folder)]
    flags = settings | {"output_dir": settings["output_dir"] + "-flags"}
    assert run(settings) == 0 and run(parts) == 0
    assert run(flags, "--train_file", *parts["train_file"]) == 0
    expected = weights(settings)
    for other in (parts, flags):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(other).items())
    # Lines were cut at max_seq_length; the saved tokenizer cuts no text.
    saved = json.loads((Path(settings["output_dir"]) / "tokenizer.json").read_text())
    assert saved["truncation"] is None


@pytest.mark.parametrize(
    "files, said",
    [
        (["a.txt", "b.jsonl"], "all be of one kind"),
        (["a.txt", "folder"], "holds no file that ends in .txt, .json, .jsonl, .csv"),
        (["notes.md"], "files must end in .txt, .json, .jsonl, .csv"),
        (["empty.txt"], "there is no text in"),
    ],
)
def test_files_that_cannot_be_read_together(capsys, settings, tmp_path, files, said):
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.jsonl", "notes.md", "folder/notes.md"):
        (tmp_path / name).write_text("w1 w2\n")
    (tmp_path / "empty.txt").write_text("")
    settings |= {"do_train": True, "train_file": [str(tmp_path / name) for name in files], "validation_file": None}
    assert said in refused(capsys, settings)


def words_trained_on(settings, rows, **options):
    """The texts that the sequences to train on stand for, where the files hold these rows."""
    from bidirect_patch.cli.mntp import data
    from bidirect_patch.cli.mntp.settings import parse

    path = Path(settings["output_dir"]).with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings | {"do_train": True, "train_file": str(path), "validation_file": None, "line_by_line": True} | options
    path = path.with_suffix(".json")
    path.write_text(json.dumps(settings))
    parsed = parse([str(path)])
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    sequences = data.load_sequences(tokenizer, parsed.model, parsed.data, parsed.training)["train"]
    sequences = islice(sequences, len(rows)) if options.get("streaming") else sequences.sequences
    return [tokenizer.decode(sequence["input_ids"], skip_special_tokens=True) for sequence in sequences]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [{"title": "w9 w8", "text": "w1 w2"}, {"title": "w9 w8", "text": "w3 w4"}],
        [{"number": 1, "passage": "w1 w2"}, {"number": 2, "passage": "w3 w4"}],
        [{"number": [1], "passage": "w1 w2"}, {"number": [], "passage": "w3 w4"}],
    ],
)
def test_of_several_columns_text_is_read_or_the_only_one_of_text(settings, rows, streaming):
    assert words_trained_on(settings, rows, streaming=streaming) == ["w1 w2", "w3 w4"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "row, said",
    [
        ({"query": "w1 w2", "positive": "w3 w4", "negative": "w5 w6"}, "3 columns of text (query, positive, negative)"),
        ({"id": "w9 w8", "passage": "w1 w2"}, "2 columns of text (id, passage)"),
        ({"id": "w9 w8", "passages": ["w1 w2"]}, "2 columns of text (id, passages)"),
        ({"id": "w9 w8", "turns": [{"from": "me", "value": "w1 w2"}]}, "2 columns of text (id, turns)"),
        ({"number": 1, "other": 2}, "no column of text, but (number, other)"),
    ],
)
def test_where_several_columns_may_be_the_text_it_is_not_guessed(settings, row, said, streaming):
    with pytest.raises(ConfigError) as refused:
        words_trained_on(settings, [row, row], streaming=streaming)
    assert f"{said}: rename the one to train on to text" in str(refused.value)


def test_a_sequence_is_no_longer_than_the_table_of_positions(settings, tmp_path, caplog):
    folder = tmp_path / "gpt2"
    shutil.copytree(settings["model_name_or_path"], folder)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    settings |= {"do_train": True, "do_eval": True, "stop_after_n_steps": 1, "model_name_or_path": str(folder)}
    if not GPT2LMHeadModel._supports_sdpa:  # so on 4.39
        settings["attn_implementation"] = "eager"
    assert run(settings) == 0
    assert "max_seq_length is 16 instead of 32" in caplog.text


def test_rotary_positions_are_no_limit(tmp_path):
    from bidirect_patch.cli.mntp.model import check_model
    from bidirect_patch.cli.mntp.settings import ModelArguments

    config = LlamaConfig(max_position_embeddings=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert check_model(ModelArguments(model_name_or_path=str(tmp_path))).limit is None
