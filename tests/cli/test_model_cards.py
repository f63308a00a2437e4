"""The model cards that the training commands write: valid for the hub, true of the run, and their code runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from bidirect_patch.cli import main

from ..helpers.sentences import write_folder
from ..helpers.simcse_runs import write_pairs
from ..helpers.word_runs import HAS_CLASSES, sentences, write_model, write_sentences

pytest.importorskip("accelerate", reason="the training commands need the extra [train]")
pytest.importorskip("datasets", reason="the training commands need the extra [train]")
pytest.importorskip("peft", reason="the training commands need the extra [train]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    write_folder(folder)
    write_pairs(folder / "sts.csv")
    write_model(folder / "tagged")
    write_sentences(folder / "words.conllu", list(sentences(60)))
    return folder


def card(place, monkeypatch, command, *flags):
    """The card that a run writes, what it says in its table by name, and what its code leaves."""
    monkeypatch.chdir(place)
    out = f"out_{command}_{len(flags)}"
    always = [
        "--output_dir",
        out,
        "--overwrite_output_dir",
        "--do_train",
        "--use_cpu",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
    ]
    assert main([command, *flags, *always, "--max_steps", "2", "--cache_dir", "cache"]) == 0
    written = ModelCard.load(Path(out) / "README.md")
    assert "bidirect-patch" in written.data.tags and str(place) not in written.content
    table = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", written.text.split("## Use")[0], re.MULTILINE))
    (code,) = re.findall(r"```python\n(.*?)```", written.text, re.DOTALL)
    names = {}
    exec(code, names)
    results = json.loads((Path(out) / "all_results.json").read_text())
    return written, table, names, results


def test_of_an_encoder(place, monkeypatch, auto, capsys):
    pytest.importorskip("sentence_transformers", "6", reason="simcse needs the extra [simcse]")
    flags = ["--model_name_or_path", "model", "--peft_model_name_or_path", "mntp", "--dataset_file_path", "texts.txt"]
    flags += ["--validation_file", "sts.csv", "--num_sink_tokens", "1", "--num_sinkless_layers", "1", "--lora_r", "4"]
    flags += ["--pooling_mode", "weighted_mean", "--layers", "2", "--per_device_train_batch_size", "8"]
    written, table, names, results = card(place, monkeypatch, "simcse", *flags)
    assert (written.data.library_name, written.data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert table["base model"] == "`model`" and table["adapter of the step before"] == "`mntp`"
    assert table["attention"].startswith("bidirectional, but for the first token of each text (`<s>`, a sink), causal")
    assert "in the last layer no other token sees it" in table["attention"]
    assert table["pooling"] == "weighted_mean, without the sink token" and table["layers"] == "the first 2"
    assert table["training data"] == "`texts.txt`: 64 single texts, each its own positive"
    assert table["training"].startswith("2 steps of 8, learning rate 5e-05, contrastive, scale 20")
    assert table["evaluation"] == "cosines on `sts.csv`" and "prompts" not in table
    assert f"| after 2 steps | {results['eval_spearman_cosine']:.1%} |" in written.text
    assert f"| before training | {results['before_spearman_cosine']:.1%} |" in written.text
    assert tuple(map(int, capsys.readouterr().out.splitlines()[-1].strip("()").split(","))) == (1, 32)


def test_of_an_encoder_from_pairs_and_without_an_evaluation(place, monkeypatch, auto):
    pytest.importorskip("sentence_transformers", "6", reason="simcse needs the extra [simcse]")
    flags = [
        "--model_name_or_path",
        "model",
        "--dataset_file_path",
        "tasks",
        "--no_bidirectional",
        "--per_device_train_batch_size",
        "4",
    ]
    written, table, names, _ = card(place, monkeypatch, "simcse", *flags)
    assert table["attention"] == "causal" and table["pooling"] == "mean" and "evaluation" not in table
    assert table["training data"] == "`tasks`: 32 rows of query, positive and negative"
    assert "## Evaluation" not in written.text


@pytest.mark.parametrize("lora_r", ["4", "0"])
def test_of_masked_next_token_prediction(place, monkeypatch, auto, lora_r):
    flags = [
        "--model_name_or_path",
        "model",
        "--train_file",
        "texts.txt",
        "--validation_file",
        "texts.txt",
        "--do_eval",
    ]
    flags += [
        "--mask_token_type",
        "eos",
        "--lora_r",
        lora_r,
        "--num_sink_tokens",
        "1",
        "--max_seq_length",
        "16",
        *([] if lora_r == "4" else ["--line_by_line"]),
    ]
    written, table, names, results = card(place, monkeypatch, "mntp", *flags)
    assert written.data.library_name == ("peft" if lora_r == "4" else "transformers")
    assert table["trained"] == ("a LoRA adapter of rank 4" if lora_r == "4" else "all weights")
    assert "`num_sink_tokens=1`, `num_sinkless_layers=0`" in table["attention"]
    assert table["training data"] == "`texts.txt`" and table["masking"] == "a share of 0.15 of the tokens"
    assert f"| causal, before training | {results['causal_loss']:.3f} |" in written.text
    assert f"| after 2 steps | {results['eval_loss']:.3f} |" in written.text
    ids = torch.tensor([[1, 5, 6, 7], [1, 5, 6, 8]])
    with torch.no_grad():
        states = names["model"].eval()(input_ids=ids)[0]
    assert torch.equal(states[0, 0], states[1, 0]) and not torch.equal(states[0, 1], states[1, 1])


@pytest.mark.skipif(not HAS_CLASSES, reason="this transformers has no LlamaForTokenClassification")
@pytest.mark.parametrize("reading", ["same_token", "next_token"])
def test_of_a_word_level_model(place, monkeypatch, auto, reading):
    flags = [
        "--model_name_or_path",
        "tagged",
        "--train_file",
        "words.conllu",
        "--do_eval",
        "--retroactive_labels",
        reading,
    ]
    flags += ["--num_sink_tokens", "1"] if reading == "same_token" else []
    written, table, names, results = card(place, monkeypatch, "words", *flags)
    assert (written.data.library_name, written.data.pipeline_tag) == ("transformers", "token-classification")
    assert table["training data"] == "`words.conllu`: 57 sentences" and table["labels"] == "`HIGH`, `LOW`"
    assert table["trained"] == f"a linear layer on frozen states (retroactive_labels={reading}, merge_subwords=false)"
    assert f"| after 2 steps | {results['eval_loss']:.3f} | {results['eval_accuracy']:.1%} |" in written.text
    assert ("tagger" in names) == (reading == "same_token")


def test_a_hub_name_is_said_to_the_hub_and_a_folder_is_not(place, monkeypatch, tmp_path):
    from types import SimpleNamespace

    from bidirect_patch.cli.model_card import files_in_words, write_card
    from bidirect_patch.cli.run_report import Column, Report

    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), is_world_process_zero=lambda: True)
    report = Report(trainer, "", (Column("loss", "loss", 8, ".3f"),))
    for base, said in (("someone/model", "someone/model"), (str(place / "model"), None)):
        how = {
            "title": "A",
            "facts": {"a|b": "c|d", "none": None},
            "use": "pass",
            "library_name": "peft",
            "pipeline_tag": None,
        }
        write_card(trainer, report, base=base, **how)
        written = ModelCard.load(tmp_path / "README.md")
        assert written.data.get("base_model") == said
        assert "| a\\|b | c\\|d |" in written.text and "none" not in written.text
    assert (
        files_in_words([str(place / "texts.txt"), "someone/texts"], count=1200)
        == "`texts.txt`, `someone/texts`: 1,200 texts"
    )
