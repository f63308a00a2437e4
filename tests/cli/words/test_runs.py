"""Runs of `bidirect-patch words`, and what their folders give."""

import json
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from bidirect_patch import attention_report, enable_bidirectional, is_bidirectional
from bidirect_patch.checkpoints.guard import opening_sinks
from bidirect_patch.cli import main

from ...helpers.explicit_masks import sink_masks
from ...helpers.processes import in_two_ranks
from ...helpers.word_runs import (
    BOS,
    HAS_CLASSES,
    expected_tags,
    results,
    run,
    sentences,
    tags_of,
    write_sentences,
)

pytest.importorskip("accelerate", reason="the training commands need the extra [train]")
pytest.importorskip("datasets", reason="the training commands need the extra [train]")
pytest.importorskip("peft", reason="the training commands need the extra [train]")
if not HAS_CLASSES:
    pytest.skip("this transformers has no LlamaForTokenClassification", allow_module_level=True)
from transformers import LlamaForTokenClassification

TEST = list(sentences(24, seed=2))
CAUSAL, OPEN = 99, 0  # how many sinks make a mask so


def stock(folder):
    """The model in a folder as transformers' class alone would run it, with eager attention."""
    config = json.loads((Path(folder) / "config.json").read_text())
    for name in ("configuration_files", "is_causal", "num_sink_tokens", "num_sinkless_layers"):
        config.pop(name, None)
    from safetensors.torch import load_file
    from transformers import LlamaConfig

    model = LlamaForTokenClassification._from_config(LlamaConfig(**config), attn_implementation="eager").eval()
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=True)
    return model


@pytest.mark.parametrize(
    "change, masks",
    [
        ({}, partial(sink_masks, layers=2, sinks=OPEN)),
        ({"num_sink_tokens": 1, "lora_r": 4}, partial(sink_masks, layers=2)),
        ({"num_sink_tokens": 1, "num_sinkless_layers": 1}, partial(sink_masks, layers=2, sinkless=1)),
        ({"bidirectional": False}, partial(sink_masks, layers=2, sinks=CAUSAL)),
    ],
    ids=["frozen", "LoRA beside a sink", "a sinkless layer", "causal"],
)
def test_the_folder_opens_in_transformers_pipeline_and_gives_the_same_tags(settings, place, auto, change, masks):
    """Against the stock class under an explicit mask, which was never patched; the accuracy is that of the run."""
    settings |= {"test_file": str(place / "test.conllu"), "torch_dtype": "float32"} | change
    assert run(settings) == 0
    folder = settings["output_dir"]
    tagger = pipeline("token-classification", folder, device="cpu")
    assert type(tagger.model).__name__ == "LlamaForTokenClassification"
    predicted = (Path(folder) / "predictions.jsonl").read_text().splitlines()
    right = words = 0
    for row, line in zip(TEST, predicted, strict=True):
        found = tags_of(tagger, row["tokens"])
        assert json.loads(line) == {"tokens": row["tokens"], "labels": found}
        assert found == expected_tags(stock(folder), tagger.tokenizer, row["tokens"], masks)
        right += sum(one == other for one, other in zip(found, row["pos_tags"]))
        words += len(found)
    assert results(settings)["test_accuracy"] == pytest.approx(right / words)
    assert results(settings)["test_words"] == words
    assert not [name for name in json.loads((Path(folder) / "config.json").read_text()) if "quant" in name]


def test_a_pipeline_puts_the_subwords_of_a_word_together(settings, place, auto):
    settings |= {"train_file": str(place / "train.iob2"), "task": "ner_tags", "validation_file": None}
    pytest.importorskip("seqeval", reason="F1 of spans needs the extra [words]")
    assert run(settings | {"max_steps": 40}) == 0
    tagger = pipeline("token-classification", settings["output_dir"], device="cpu")
    text = "n0s n4 n5s n0 n1s"
    spans = [(span["start"], span["end"]) for span in tagger(text, aggregation_strategy="first")]
    tags = tags_of(tagger, text.split())
    begun = [tag for before, tag in zip(["O", *tags], tags) if tag == "B-ODD" or (tag == "I-ODD" and before == "O")]
    assert begun and len(spans) == len(begun)
    assert all(text[end : end + 1] in ("", " ") for _, end in spans)


def test_frozen_states_stay_what_they_were_and_the_classifier_learns(settings, place):
    from safetensors.torch import load_file

    assert run(settings | {"max_steps": 60}, "--do_eval") == 0
    saved, base = (load_file(Path(f) / "model.safetensors") for f in (settings["output_dir"], place / "model"))
    assert all(torch.equal(saved[name], base[name]) for name in saved if not name.startswith("score"))
    found = results(settings)
    assert found["before_accuracy"] < 0.7 and found["eval_accuracy"] > 0.8
    assert found["eval_loss"] < found["before_loss"]
    assert found["baseline_accuracy"] == 1.0  # a word alone says whether its number is high


def test_labels_that_depend_on_the_next_word_need_both_directions(settings, tmp_path):
    pytest.importorskip("seqeval", reason="F1 of spans needs the extra [words]")
    for name, count in (("train", 300), ("dev", 60)):
        pairs = (row["tokens"][:2] for row in sentences(count, seed=len(name)))
        rows = ({"tokens": words, "ner_tags": ["B-ODD" if int(words[1][1]) % 2 else "O"] * 2} for words in pairs)
        write_sentences(tmp_path / f"{name}.iob2", list(rows))
    settings |= {
        "train_file": str(tmp_path / "train.iob2"),
        "validation_file": str(tmp_path / "dev.iob2"),
        "do_eval": True,
    }
    settings |= {"max_steps": 100, "learning_rate": 0.1, "per_device_train_batch_size": 32}
    causal = settings | {"bidirectional": False, "output_dir": settings["output_dir"] + "-causal"}
    assert run(settings) == run(causal) == 0
    both, one = results(settings), results(causal)
    assert both["eval_f1"] > one["eval_f1"] + 0.2 and both["eval_accuracy"] > both["baseline_accuracy"]
    assert {"eval_precision", "eval_recall"} <= both.keys()


def test_lora_is_trained_and_merged(settings, place):
    from safetensors.torch import load_file

    assert run(settings | {"lora_r": 4, "layers": 1}) == 0
    saved, base = (load_file(Path(f) / "model.safetensors") for f in (settings["output_dir"], place / "model"))
    assert not torch.equal(
        saved["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )
    assert not [name for name in saved if "lora" in name or "layers.1" in name]
    assert not list(Path(settings["output_dir"]).glob("adapter*"))


def test_the_adapter_of_the_step_before_is_merged_first(settings, place, tmp_path):
    """As LLM2Vec's settings name it: an adapter over the model, or an adapter in the place of the model."""
    import peft
    from safetensors.torch import load_file
    from transformers import LlamaModel

    base = enable_bidirectional(LlamaModel.from_pretrained(place / "model"))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "mntp")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path / "mntp")
    merged = adapted.merge_and_unload().state_dict()["layers.0.self_attn.q_proj.weight"]
    over = {"peft_addr": str(tmp_path / "mntp")}
    instead = {"model_name_or_path": str(tmp_path / "mntp"), "output_dir": str(tmp_path / "instead")}
    for change in (over, instead):
        assert run(settings | change) == 0
        saved = load_file(Path((settings | change)["output_dir"]) / "model.safetensors")
        torch.testing.assert_close(saved["model.layers.0.self_attn.q_proj.weight"], merged)


@pytest.mark.parametrize("reading", [("next_token", True), ("next_token", False), ("same_token", True)])
def test_what_transformers_class_can_not_read_is_written_as_a_classifier_alone(
    settings, place, tmp_path, capsys, reading
):
    """And the command that is printed evaluates it: the same figures."""
    labels, merge = reading
    settings |= {
        "retroactive_labels": labels,
        "merge_subwords": merge,
        "test_file": str(place / "test.conllu"),
        "lora_r": 2,
    }
    assert run(settings) == 0
    out = capsys.readouterr().out
    assert "reads a word at its own first token, and this one was trained with retroactive_labels=" in out
    folder = Path(settings["output_dir"])
    assert not (folder / "config.json").exists() and not list(folder.glob("model*"))
    words = shlex.split(out.splitlines()[-1])
    words[words.index("FILE")], words[words.index("TESTED")] = settings["test_file"], str(tmp_path / "tested")
    assert words[:2] == ["Next:", "bidirect-patch"]
    assert main([*words[2:], "--use_cpu"]) == 0
    again = results({"output_dir": str(tmp_path / "tested")})
    for name in ("test_accuracy", "test_loss", "test_words"):
        assert again[name] == pytest.approx(results(settings)[name], rel=1e-5)


def test_a_classifier_is_evaluated_on_the_model_that_it_was_trained_on_without_a_flag(settings, place, tmp_path):
    """Its adapter, its sinks and the token that was put before each sentence; a checkpoint as well as a result."""
    settings |= {
        "merge_subwords": True,
        "lora_r": 2,
        "num_sink_tokens": 2,
        "num_sinkless_layers": 1,
        "sink_token": "eos",
    }
    settings |= {"test_file": str(place / "test.conllu"), "save_strategy": "steps", "save_steps": 10}
    assert run(settings) == 0
    kept = {name: settings[name] for name in ("model_name_or_path", "test_file", "use_cpu", "report_to")}
    for number, folder in enumerate((settings["output_dir"], f"{settings['output_dir']}/checkpoint-10")):
        tested = kept | {"cls_addr": folder, "output_dir": str(tmp_path / f"tested{number}")}
        assert run(tested) == 0
        assert results(tested)["test_loss"] == pytest.approx(results(settings)["test_loss"], rel=1e-5)


@pytest.mark.parametrize("next_token", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_where_labels_are_read(settings, place, next_token, merge):
    """Each word's logits depend on the tokens that it is read at: seen with causal attention, where later ones change nothing."""
    from bidirect_patch.cli.words.collator import WordCollator
    from bidirect_patch.cli.words.tagger import WordTagger
    from bidirect_patch.cli.words.tokens import Reading

    torch.manual_seed(0)
    model = LlamaForTokenClassification.from_pretrained(place / "model", num_labels=5).eval()
    tagger = WordTagger(model, Reading(next_token, merge)).eval()
    words = [-1, 0, 0, 1, 2, 2]  # the word of each token
    read = [*words[1:], -1] if next_token else words
    row = {"input_ids": [BOS, 4, 3, 5, 6, 3], "word_ids": read, "labels": [0, 1, 2]}
    for place_changed in range(6):
        other = row | {"input_ids": [n if i != place_changed else 9 for i, n in enumerate(row["input_ids"])]}
        with torch.no_grad():
            one, two = (tagger(**WordCollator(0)([r]))["logits"][0] for r in (row, other))
        moved = (one - two).abs().amax(-1) > 1e-6
        at = [[i for i, number in enumerate(read) if number == word] for word in range(3)]
        last = [places[-1] if merge else places[0] for places in at]
        assert moved.tolist() == [place_changed <= place for place in last]


def test_the_tagger_gives_the_logits_of_the_stock_class(place):
    """In a batch too; and a bidirectional one sees every token of its sentence and no padding."""
    from bidirect_patch.cli.words.collator import WordCollator
    from bidirect_patch.cli.words.tagger import WordTagger
    from bidirect_patch.cli.words.tokens import Reading

    torch.manual_seed(0)
    model = enable_bidirectional(LlamaForTokenClassification.from_pretrained(place / "model", num_labels=5).eval())
    assert is_bidirectional(model) and str(attention_report(model))
    rows = [
        {"input_ids": [BOS, 4, 3, 5], "word_ids": [-1, 0, 0, 1], "labels": [0, 1]},
        {"input_ids": [BOS, 6], "word_ids": [-1, 0], "labels": [2]},
    ]
    with torch.no_grad():
        found = WordTagger(model, Reading()).eval()(**WordCollator(0)(rows))
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    torch.testing.assert_close(found["logits"][0], alone[0][[1, 3]])
    torch.testing.assert_close(found["logits"][1, 0], alone[1][1])
    labels = torch.tensor([0, 1, 2])
    expected = torch.nn.functional.cross_entropy(torch.cat([alone[0][[1, 3]], alone[1][[1]]]), labels)
    torch.testing.assert_close(found["loss"], expected)


def test_evaluation_is_over_words_and_not_over_batches(settings, place, tmp_path):
    rows = [
        {"tokens": ["n0"] * 6, "pos_tags": ["LOW"] * 6},
        *({"tokens": ["n5"], "pos_tags": ["LOW"]} for _ in range(3)),
    ]
    write_sentences(tmp_path / "dev.conllu", rows)
    settings |= {"validation_file": str(tmp_path / "dev.conllu"), "do_eval": True, "max_steps": 80}
    assert run(settings | {"per_device_eval_batch_size": 1}) == 0
    found = results(settings)
    assert found["eval_accuracy"] == pytest.approx(6 / 9) and found["eval_words"] == 9
    assert run(settings | {"per_device_eval_batch_size": 4, "overwrite_output_dir": True}) == 0
    assert results(settings)["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-4)


def test_a_saved_model_is_evaluated_and_trained_further(settings, place, tmp_path, capsys):
    """It keeps its labels, its sinks and its token, without any flag."""
    settings |= {"num_sink_tokens": 1, "sink_token": "eos", "test_file": str(place / "test.conllu")}
    assert run(settings) == 0
    again = {
        k: v
        for k, v in settings.items()
        if k not in ("do_train", "num_sink_tokens", "sink_token", "train_file", "validation_file")
    }
    again |= {"model_name_or_path": settings["output_dir"], "output_dir": str(tmp_path / "again")}
    assert run(again) == 0
    assert results(again)["test_loss"] == pytest.approx(results(settings)["test_loss"], rel=1e-5)
    assert "Wrote" not in capsys.readouterr().out.splitlines()[-1]
    further = again | {"do_train": True, "train_file": settings["train_file"], "learning_rate": 0.0, "max_steps": 1}
    assert run(further | {"output_dir": str(tmp_path / "further"), "torch_dtype": "float32"}) == 0
    with opening_sinks():
        config = LlamaForTokenClassification.from_pretrained(tmp_path / "further").config
        ids = AutoTokenizer.from_pretrained(tmp_path / "further")("n0")["input_ids"]
    assert (config.num_sink_tokens, config.is_causal, ids[:2]) == (1, False, [2, BOS])
    found = results({"output_dir": str(tmp_path / "further")})
    assert found["test_loss"] == pytest.approx(results(settings)["test_loss"], rel=1e-5), (
        "it went on from the classifier"
    )


def test_unknown_labels_count_as_errors(settings, place, tmp_path):
    assert run(settings | {"max_steps": 80}) == 0
    # A sentence without labels keeps its line among the predictions.
    rows = [{"tokens": ["n1"], "pos_tags": ["_"]}, {"tokens": ["n0", "n0s"], "pos_tags": ["LOW", "NEW"]}]
    write_sentences(tmp_path / "test.conllu", rows)
    tested = {
        "model_name_or_path": settings["output_dir"],
        "test_file": str(tmp_path / "test.conllu"),
        "output_dir": str(tmp_path / "t"),
    }
    assert run(tested | {"use_cpu": True, "report_to": "none"}) == 0
    found = results(tested)
    assert found["test_accuracy"] == 0.5 and np.isfinite(found["test_loss"])
    one, two = map(json.loads, (tmp_path / "t" / "predictions.jsonl").read_text().splitlines())
    assert one == {"tokens": ["n1"], "labels": ["_"]} and two["labels"] == ["LOW", "LOW"]


def test_the_best_checkpoint_is_the_result(settings, place, auto):
    settings |= {
        "do_eval": True,
        "evaluation_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    settings |= {
        "max_steps": 20,
        "learning_rate": 30.0,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    assert run(settings) == 0
    folder = Path(settings["output_dir"])
    state = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry}
    assert results(settings)["eval_accuracy"] == pytest.approx(max(scores.values()))
    assert len(set(scores.values())) > 1
    assert {path.name for path in (folder / "checkpoint-5").iterdir()} >= {
        "classifier.safetensors",
        "words.json",
        "optimizer.pt",
    }
    assert not (folder / "checkpoint-5" / "model.safetensors").exists()


def test_the_table_shows_each_evaluation(settings, place, capsys):
    settings |= {
        "do_eval": True,
        "test_file": str(place / "test.conllu"),
        "evaluation_strategy": "steps",
        "eval_steps": 5,
    }
    assert run(settings) == 0
    out = capsys.readouterr().out
    table = [line.split("  ")[0] for line in out[out.rindex("word-level task") :].splitlines()[2:9]]
    assert table[:4] == ["each word's commonest label", "before training", "step 5", "after 10 steps"]
    assert table[4:6] == ["test data: the commonest", "test data"]


@pytest.mark.parametrize("change", [{}, {"lora_r": 4, "retroactive_labels": "next_token"}], ids=["frozen", "LoRA"])
def test_a_resumed_run_gives_what_an_uninterrupted_one_does(settings, tmp_path, change):
    from safetensors.torch import load_file

    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 40, "lora_dropout": 0.3} | change
    whole = settings | {"output_dir": str(tmp_path / "whole")}
    assert run(whole | {"stop_after_n_steps": 20}) == 0  # in the second pass over 120 sentences, 15 steps each
    assert run(settings | {"stop_after_n_steps": 4}) == 0
    name = "classifier.safetensors" if change else "model.safetensors"
    halfway = load_file(Path(settings["output_dir"]) / name)
    assert run(settings | {"stop_after_n_steps": 20}) == 0
    ours, expected = (load_file(Path(each["output_dir"]) / name) for each in (settings, whole))
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert any(not torch.equal(halfway[key], expected[key]) for key in expected)


def test_in_the_folder_the_sink_stays_causal(settings, auto):
    settings |= {"num_sink_tokens": 1, "layers": 1}
    assert run(settings) == 0
    model = LlamaForTokenClassification.from_pretrained(settings["output_dir"]).eval()
    ids = torch.tensor([[BOS, 4, 5, 6], [BOS, 4, 5, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.equal(logits[0, 0], logits[1, 0]) and not torch.equal(logits[0, 1], logits[1, 1])


@pytest.mark.slow
def test_two_processes_train_and_evaluate_what_one_does(settings):
    """With an evaluation before, after which accelerate would leave each to its own gradients."""
    from safetensors.torch import load_file

    settings |= {"do_eval": True, "max_steps": 6, "lora_r": 4, "lora_dropout": 0.0, "classifier_dropout": 0.0}
    settings |= {"per_device_train_batch_size": 4}
    alone = settings | {"gradient_accumulation_steps": 2, "output_dir": settings["output_dir"] + "-alone"}
    path = Path(settings["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(settings))
    out = "".join(in_two_ranks("-m", "bidirect_patch", "words", path))
    assert out.count("after 6 steps") == 1
    assert run(alone) == 0
    ours, expected = (load_file(Path(each["output_dir"]) / "model.safetensors") for each in (settings, alone))
    assert all(torch.allclose(ours[key], expected[key], atol=1e-4) for key in expected)
    for name in ("before_loss", "eval_loss", "eval_accuracy", "eval_words"):
        assert results(settings)[name] == pytest.approx(results(alone)[name], rel=1e-3)


def test_checkpointing_and_batches_of_like_lengths_train_to_the_same_weights(settings):
    """Layers that are computed again in the backward pass give the same; sentences in another order do not, but train too."""
    from safetensors.torch import load_file

    settings |= {"lora_r": 4, "lora_dropout": 0.0, "classifier_dropout": 0.0, "max_steps": 3}
    found = []
    for number, change in enumerate(({}, {"gradient_checkpointing": True}, {"group_by_length": True})):
        own = settings | change | {"output_dir": f"{settings['output_dir']}-{number}"}
        assert run(own) == 0
        found.append(load_file(Path(own["output_dir"]) / "model.safetensors"))
    plain, again, grouped = found
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(grouped[name], plain[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "Bloom",
        "Falcon",
        "Gemma",
        "GPT2",
        "GPTBigCode",
        "GPTNeoX",
        "Mistral",
        "Mpt",
        "Persimmon",
        "Phi",
        "Phi3",
        "Qwen2",
    ],
)
def test_the_tagger_gives_the_logits_of_the_stock_class_of_a_family(kind):
    import transformers

    from bidirect_patch.cli.words.collator import WordCollator
    from bidirect_patch.cli.words.tagger import WordTagger
    from bidirect_patch.cli.words.tokens import Reading
    from bidirect_patch.errors import UnsupportedModelError
    from bidirect_patch.model.shrink import shrink

    if not hasattr(transformers, f"{kind}ForTokenClassification"):
        pytest.skip(f"this transformers has no {kind}ForTokenClassification")
    torch.manual_seed(0)
    config = shrink(getattr(transformers, f"{kind}Config")(num_labels=5))
    model = getattr(transformers, f"{kind}ForTokenClassification")(config).eval()
    try:
        enable_bidirectional(model)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    rows = [{"input_ids": [1, 4, 3, 5], "word_ids": [-1, 0, 0, 1], "labels": [0, 1]}]
    rows.append({"input_ids": [1, 6], "word_ids": [-1, 0], "labels": [2]})
    with torch.no_grad():
        found = WordTagger(model, Reading()).eval()(**WordCollator(0)(rows))["logits"]
        one, other = (model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows)
    torch.testing.assert_close(found[0], one[[1, 3]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, 0], other[1], rtol=1e-4, atol=1e-5)
