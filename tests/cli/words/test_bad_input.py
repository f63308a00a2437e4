"""Bad input of `bidirect-patch words`: one line, exit code 2, nothing made."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ...helpers.word_runs import HAS_CLASSES, error_line, refused, run

pytest.importorskip("accelerate", reason="the training commands need the extra [train]")
pytest.importorskip("datasets", reason="the training commands need the extra [train]")
pytest.importorskip("peft", reason="the training commands need the extra [train]")
needs_classes = pytest.mark.skipif(not HAS_CLASSES, reason="this transformers has no LlamaForTokenClassification")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"do_train": False}, "nothing to do: give do_train, do_eval, or a test_file"),
        ({"tsk": "pos_tags"}, "unknown key 'tsk'; did you mean 'task'?"),
        ({"retroactive_labels": "next_word"}, "argument --retroactive_labels"),
        ({"merge_subwords": "some"}, "argument --merge_subwords"),
        ({"train_file": "nowhere.conllu"}, "no such file or folder: nowhere.conllu"),
        ({"train_file": None}, "do_train needs dataset_name or train_file"),
        ({"dataset_name": "conll2003"}, "give dataset_name or files, not both"),
        ({"train_file": None, "validation_file": None, "dataset_name": "no/such-data"}, "can't read no/such-data"),
        ({"do_predict": True}, "do_predict needs dataset_name or test_file"),
        ({"task": "ner_tags"}, "has no column of labels ner_tags: give task; it has lemma, upos, xpos"),
        ({"columns": ["pos_tags"]}, "columns must name tokens and a kind of label at least; got pos_tags"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"model_name_or_path": "/no/such/folder"}, "there is no such folder"),
        ({"model_name_or_path": "no/such-model"}, "can't load 'no/such-model'"),
        ({"model_class": "auto"}, "model_class=auto is for encoders such as BERT"),
        ({"peft_addr": "a", "peft_model_name_or_path": "b"}, "peft_addr is another name of peft_model_name_or_path"),
        ({"cls_addr": "there"}, "cls_addr names a classifier to evaluate, and do_train trains a new one"),
        ({"cls_addr": "there", "do_train": False, "test_file": "t"}, "no such file or folder: t"),
        ({"classifier_dropout": 1}, "classifier_dropout must be in [0, 1); got 1.0"),
        ({"lora_r": -1}, "lora_r must be 0 or more; got -1"),
        ({"max_seq_length": 1}, "max_seq_length must be at least 2; got 1"),
        ({"max_train_samples": 0}, "max_train_samples must be at least 1"),
        ({"validation_split_percentage": 0}, "validation_split_percentage must be from 1 to 99; got 0"),
        (
            {"metric_for_best_model": "bleu"},
            "metric_for_best_model must be loss, accuracy, f1, precision or recall; got 'bleu'",
        ),
        ({"bidirectional": False, "num_sink_tokens": 1}, "a causal model has no sink tokens"),
        ({"num_sink_tokens": 1, "retroactive_labels": "next_token"}, "a sink token there sees no text"),
        ({"num_sink_tokens": 64}, "max_seq_length must be above num_sink_tokens=64; got 64"),
        ({"num_sink_tokens": 1, "num_sinkless_layers": 3}, "num_sinkless_layers must be at most 2"),
        ({"layers": 3}, "layers must be at most 2, the model's; got 3"),
        ({"sink_token": "nowhere"}, "sink_token=nowhere: this is no token"),
        ({"use_fast_tokenizer": False}, "words needs a tokenizer of the tokenizers library"),
        ({"learning_rate": -1}, "learning_rate must be 0 or more; got -1.0"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 4096},
            "a batch takes 4096 sentences, and there are 120",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not for words: take it out"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha is not for words: take it out"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere holds no whole checkpoint"),
    ],
)
@needs_classes
def test_before_the_weights_are_loaded(capsys, settings, monkeypatch, change, says):
    from bidirect_patch.cli.words import training

    monkeypatch.setattr(training, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert says in refused(capsys, settings | change)


@needs_classes
def test_an_unknown_backend(capsys, settings):
    assert "nonsense" in refused(capsys, settings | {"attn_implementation": "nonsense"})


def test_a_family_without_a_class_for_it(capsys, settings, place, tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    folder = shutil.copytree(place / "model", tmp_path / "opt")
    (folder / "model.safetensors").unlink()
    sizes = {"vocab_size": 10, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)).save_pretrained(folder)
    said = refused(capsys, settings | {"model_name_or_path": str(folder)})
    assert "has no class ...ForTokenClassification for model_type opt" in said


@pytest.mark.skipif(HAS_CLASSES, reason="this transformers has LlamaForTokenClassification")
def test_a_release_without_a_class_for_it(capsys, settings):
    assert "has no class ...ForTokenClassification for model_type llama" in refused(capsys, settings)


@needs_classes
def test_one_label_alone(capsys, settings, tmp_path):
    (tmp_path / "one.iob2").write_text("n0 O\nn1 O\n")
    said = refused(capsys, settings | {"train_file": str(tmp_path / "one.iob2"), "validation_file": None})
    assert "all words have one label, O: there is nothing to tell apart" in said


@needs_classes
def test_spans_without_seqeval(capsys, settings, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval", None)
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    said = refused(capsys, settings | {"train_file": str(place / "train.iob2"), "validation_file": None})
    assert said.endswith("F1 of spans needs seqeval: pip install 'bidirect-patch[words]'") or "needs seqeval" in said
    assert run(settings | {"max_steps": 1}) == 0  # parts of speech need none


@needs_classes
def test_a_model_without_a_classifier_is_not_evaluated(capsys, settings, place):
    settings |= {"do_train": False, "test_file": str(place / "test.conllu")}
    assert "has no classifier to evaluate: give do_train, or cls_addr" in refused(capsys, settings)


@needs_classes
def test_weights_that_are_not_there_are_not_drawn_at_random(capsys, settings, place, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(place / "model", tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks 1 weights of LlamaForTokenClassification: {name} first" in refused(
        capsys, settings | {"model_name_or_path": str(folder)}
    )
    weights[name] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in refused(capsys, settings | {"model_name_or_path": str(folder)})


@pytest.fixture
def classifier(settings, place):
    """A classifier that was trained with next_token, and the settings that evaluate it."""
    assert run(settings | {"retroactive_labels": "next_token", "max_steps": 1}) == 0
    kept = ("model_name_or_path", "cache_dir", "report_to", "use_cpu")
    tested = {name: settings[name] for name in kept} | {
        "cls_addr": settings["output_dir"],
        "test_file": str(place / "test.conllu"),
    }
    return tested | {"output_dir": settings["output_dir"] + "-tested"}


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, None),
        (
            {"retroactive_labels": "same_token"},
            "it was trained with retroactive_labels=next_token, merge_subwords=false, and this run",
        ),
        ({"merge_subwords": True}, "and this run has retroactive_labels=next_token, merge_subwords=true"),
        ({"bidirectional": False}, "it was trained with bidirectional=True, and this run has bidirectional=False"),
        ({"layers": 1}, "it was trained with num_hidden_layers=2, and this run has num_hidden_layers=1"),
        ({"cls_addr": "nowhere"}, "cls_addr: nowhere holds no words.json, so no classifier of this command"),
        ({"lora_r": 2}, "it was trained with lora_r=0, and this run has lora_r=2"),
    ],
)
@needs_classes
def test_a_classifier_of_another_kind(capsys, classifier, change, says):
    if says is None:
        assert run(classifier) == 0
    else:
        assert says in error_line(capsys, classifier | change)


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("words.json", b"{", "is not JSON"),
        ("words.json", b'{"labels": 3}', "labels must be a list of strings; got 3"),
        ("words.json", b'{"labels": ["a"], "merge": 1}', "next_token and merge must be true or false"),
        (
            "words.json",
            b'{"labels": ["a"], "next_token": true, "merge": true}',
            "lora_r must be a number of 0 or more; got None",
        ),
        (
            "words.json",
            b'{"labels": ["a"], "next_token": true, "merge": true, "adapters": [3]}',
            "adapters must be a list of folders or hub names; got [3]",
        ),
        ("classifier.safetensors", b"", "can't read the classifier in"),
    ],
)
@needs_classes
def test_a_broken_classifier(capsys, classifier, file, content, says):
    (Path(classifier["cls_addr"]) / file).write_bytes(content)
    assert says in error_line(capsys, classifier)


@needs_classes
def test_a_checkpoint_that_does_not_fit(capsys, settings, place, tmp_path):
    settings |= {"save_strategy": "steps", "save_steps": 1, "stop_after_n_steps": 1}
    assert run(settings) == 0
    further = settings | {"stop_after_n_steps": 2}
    said = error_line(capsys, further | {"merge_subwords": True})
    assert "can't resume from" in said and "merge_subwords=false, and this run has" in said
    other = tmp_path / "other.conllu"
    other.write_text((place / "train.conllu").read_text().replace("HIGH", "TALL"))
    said = error_line(capsys, further | {"train_file": str(other), "validation_file": None})
    assert "it was trained for the labels HIGH, LOW, and this run has LOW, TALL" in said
    assert "it was trained with num_sink_tokens=0" in error_line(capsys, further | {"num_sink_tokens": 1})
    assert "it holds no adapter, and lora_r is 4" in error_line(capsys, further | {"lora_r": 4})


@needs_classes
def test_a_disk_without_space_is_seen_before_the_first_step(settings, capsys, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "1000 bytes are free on its disk" in refused(capsys, settings)


@needs_classes
def test_a_tokenizer_with_more_tokens_than_the_model(capsys, settings, place, tmp_path):
    folder = shutil.copytree(place / "model", tmp_path / "more")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["n5"] = 11
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the tokenizer gives the id 11, and the model has 10 embeddings" in refused(
        capsys, settings | {"model_name_or_path": str(folder)}
    )
