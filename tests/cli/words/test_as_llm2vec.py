"""LLM2Vec's word tasks: what its scripts compute, stated anew from what they do, on LLM2Vec's own model where it runs.

Its script puts a label at the first token of a word, or at the token before that; averages the states of a word's tokens, or of
the tokens before each of them; and has a linear layer on top. Its settings files run with only model, data and backend replaced.
"""

import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoTokenizer, LlamaModel

from bidirect_patch import enable_bidirectional
from bidirect_patch.cli import main

from ...helpers.explicit_masks import sink_masks, under
from ...helpers.slow import some_slow
from ...helpers.versions import TRANSFORMERS
from ...helpers.word_runs import HAS_CLASSES, results, run, sentences, write_sentences

pytest.importorskip("accelerate", reason="the training commands need the extra [train]")
pytest.importorskip("datasets", reason="the training commands need the extra [train]")
peft = pytest.importorskip("peft", reason="the training commands need the extra [train]")
if not HAS_CLASSES:
    pytest.skip("this transformers has no LlamaForTokenClassification", allow_module_level=True)

READINGS = [(labels, merge) for labels in ("same_token", "next_token") for merge in (False, True)]


def of_llm2vec(folder):
    """LLM2Vec's own model, which gives the states of a batch."""
    module = pytest.importorskip("llm2vec", reason="llm2vec isn't installed", exc_type=ImportError)
    if Version("4.44.2") != TRANSFORMERS:
        pytest.skip(f"llm2vec 0.2.3 is written for transformers 4.44, not {TRANSFORMERS}")
    model = module.LLM2Vec.from_pretrained(folder, enable_bidirectional=True, attn_implementation="sdpa").model.eval()
    assert type(model).__name__ == "LlamaBiModel"
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state


def of_stock(folder):
    """The same from stock transformers, sentence by sentence, under a mask in which every token sees every token."""
    model = LlamaModel.from_pretrained(folder, attn_implementation="eager").eval()

    def states(ids, mask):
        found = torch.zeros(*ids.shape, model.config.hidden_size)
        for row, (own, count) in enumerate(zip(ids, mask.sum(1).tolist())):
            with under(model.layers, sink_masks(count, 2, sinks=0)):
                found[row, :count] = model(input_ids=own[None, :count]).last_hidden_state[0]
        return found

    return states


def word_task(states_of, tokenizer, classifier, rows, numbers, labels_at, merge):
    """Logits (tokens, labels) and labels (tokens,) of every scored token, and its state, as LLM2Vec's script makes them."""
    batch = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, padding=True, return_tensors="pt")
    states = states_of(batch["input_ids"], batch["attention_mask"])
    kept, wanted = [], []
    for place, row in enumerate(rows):
        words = batch.word_ids(place)
        is_first = [word is not None and word not in words[:i] for i, word in enumerate(words)]
        for i, word in enumerate(words):
            if is_first[i]:
                step = 1 if labels_at == "next_token" else 0  # how far before a token it is read
                read = [j - step for j, other in enumerate(words) if other == word] if merge else [i - step]
                kept.append(states[place, read].mean(0))
                wanted.append(numbers[row["pos_tags"][word]])
    kept = torch.stack(kept)
    return classifier(kept), torch.tensor(wanted), kept


@pytest.mark.parametrize("reference", [of_llm2vec, of_stock])
@pytest.mark.parametrize("labels_at, merge", READINGS)
def test_states_labels_loss_and_predictions(settings, place, tmp_path, reference, labels_at, merge):
    """Of a run: the test data's figures; and of the trained tagger on a batch, number by number."""
    from safetensors.torch import load_file

    from bidirect_patch.cli.words.collator import WordCollator
    from bidirect_patch.cli.words.data import Sentence
    from bidirect_patch.cli.words.tagger import WordTagger, word_states
    from bidirect_patch.cli.words.tokens import Reading, encode

    states_of = reference(place / "model")
    rows = list(sentences(24, seed=2))
    settings |= {"retroactive_labels": labels_at, "merge_subwords": merge, "test_file": str(place / "test.conllu")}
    settings |= {"per_device_eval_batch_size": 5, "classifier_dropout": 0.0}
    assert run(settings) == 0
    folder = Path(settings["output_dir"])
    is_whole = (folder / "model.safetensors").exists()
    saved = load_file(folder / ("model.safetensors" if is_whole else "classifier.safetensors"))
    weight, bias = (saved[f"{'score' if is_whole else '1'}.{name}"] for name in ("weight", "bias"))
    classifier = torch.nn.Linear(*weight.T.shape)
    classifier.load_state_dict({"weight": weight, "bias": bias})
    tokenizer = AutoTokenizer.from_pretrained(place / "model", pad_token="</s>")
    numbers = {"HIGH": 0, "LOW": 1}
    with torch.no_grad():
        logits, wanted, states = word_task(states_of, tokenizer, classifier, rows, numbers, labels_at, merge)
    found = results(settings)
    assert found["test_words"] == len(wanted)
    assert found["test_accuracy"] == pytest.approx((logits.argmax(-1) == wanted).double().mean().item())
    assert found["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, wanted).item(), rel=1e-4)

    from transformers import LlamaForTokenClassification

    model = enable_bidirectional(LlamaForTokenClassification.from_pretrained(place / "model", num_labels=2))
    model.score.load_state_dict({"weight": weight, "bias": bias})
    reading = Reading(labels_at == "next_token", merge)
    encoded = encode(
        [Sentence(row["tokens"], row["pos_tags"]) for row in rows], tokenizer, list(numbers), 64, reading, "test"
    )
    batch = WordCollator(tokenizer.pad_token_id)(encoded)
    scored = batch["labels"] != -100
    with torch.no_grad():
        ours = WordTagger(model, reading).eval()(**batch)
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    assert torch.equal(batch["labels"][scored], wanted)
    read = word_states(hidden, batch["word_ids"], batch["labels"].shape[1], merge=merge)
    torch.testing.assert_close(read[scored], states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["logits"][scored], logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours["logits"][scored].argmax(-1), logits.argmax(-1))


# What the twelve train_configs/word-task/*.json have in common, and what the four of each model have of their own.
COMMON = {
    "model_class": "custom",
    "bidirectional": True,
    "classifier_dropout": 0.1,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "merge_subwords": True,
    "dataset_name": "conll2003",
    "task": "pos_tags",
}
TRAIN = COMMON | {
    "num_train_epochs": 10,
    "learning_rate": 5e-4,
    "do_train": True,
    "save_steps": 250,
    "logging_steps": 50,
    "save_strategy": "steps",
    "do_eval": True,
    "eval_steps": 500,
    "evaluation_strategy": "steps",
    "overwrite_output_dir": True,
    "stop_after_n_steps": 4000,
    "remove_unused_columns": False,
}
TEST = COMMON | {"max_seq_length": 512}
KINDS = {
    "uni": {"bidirectional": False, "retroactive_labels": "same_token"},
    "bi": {"retroactive_labels": "same_token"},
    "bi-mntp": {"retroactive_labels": "next_token", "peft_addr": "McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp"},
    "bi-mntp-simcse": {
        "retroactive_labels": "next_token",
        "model_name_or_path": "McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp",
        "peft_addr": "McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp-unsup-simcse",
    },
}


@pytest.fixture(scope="module")
def published_place(place, tmp_path_factory):
    """`data`, a data set of three splits, and adapters `mntp` and `simcse`, the second over the model with the first merged."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "data").mkdir()
    for seed, (split, count) in enumerate({"train": 40, "validation": 8, "test": 8}.items()):
        write_sentences(folder / "data" / f"{split}.jsonl", list(sentences(count, seed)))
    for name in ("mntp", "simcse"):
        torch.manual_seed(len(name))
        model = enable_bidirectional(LlamaModel.from_pretrained(place / "model"))
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        peft.get_peft_model(model, lora).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(place / "model").save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("kind", some_slow(KINDS, lambda kind: kind == "bi"))
def test_a_published_file_of_each_kind_trains_and_its_pair_tests(published_place, place, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    name = f"output/word-task/pos_tags/Mistral/{kind}"
    train = {"model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2"} | TRAIN | KINDS[kind] | {"output_dir": name}
    test = {"model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2"} | TEST | KINDS[kind]
    test |= {"cls_addr": f"{name}/checkpoint-3000", "output_dir": f"{name}/results/checkpoint-3000"}
    for file, written in (("train.json", train), ("test.json", test)):
        Path(file).write_text(json.dumps(written))
    replaced = {
        "dataset_name": published_place / "data",
        "attn_implementation": "sdpa",
        "cache_dir": tmp_path / "cache",
    }
    if kind == "bi-mntp-simcse":
        replaced |= {"model_name_or_path": published_place / "mntp", "peft_addr": published_place / "simcse"}
    else:
        replaced |= {"model_name_or_path": place / "model"}
        replaced |= {"peft_addr": published_place / "mntp"} if kind == "bi-mntp" else {}
    flags = [f"--{key}={value}" for key, value in (replaced | {"report_to": "none"}).items()]
    assert main(["words", "train.json", *flags, "--save_steps", "25"]) == 0
    found = results({"output_dir": name})
    assert {"before_accuracy", "eval_accuracy", "train_loss"} <= found.keys()
    assert main(["words", "test.json", *flags, f"--cls_addr={name}/checkpoint-50"]) == 0
    assert 0 <= results({"output_dir": f"{name}/results/checkpoint-3000"})["test_accuracy"] <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", [TRAIN, TEST | {"cls_addr": "checkpoint"}], ids=["train", "test"])
def test_each_setting_is_read_as_it_is_written(tmp_path, kind, written):
    from dataclasses import asdict

    from bidirect_patch.cli.settings_by_release import translate_settings
    from bidirect_patch.cli.words.settings import parse

    written = {"model_name_or_path": "m"} | written | KINDS[kind] | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "published.json").write_text(json.dumps(written))
    settings = parse([str(tmp_path / "published.json"), "--report_to", "none"])
    read = {key: value for part in settings for key, value in asdict(part).items()}
    expected = translate_settings(written, set(read))
    assert {key: getattr(read[key], "value", read[key]) for key in expected} == expected
    assert settings.model.peft_model_name_or_path == KINDS[kind].get("peft_addr")
    assert settings.training.do_predict == ("cls_addr" in written)
