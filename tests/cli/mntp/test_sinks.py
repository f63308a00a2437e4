"""Sink tokens and fewer layers in `bidirect-patch mntp`."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from bidirect_patch import enable_bidirectional
from bidirect_patch.checkpoints.guard import opening_sinks
from bidirect_patch.checkpoints.marks import sinks_on_disk
from bidirect_patch.cli.spearman import spearman
from bidirect_patch.model.sinks import NO_SINKS, Sinks

from ...helpers.explicit_masks import sink_masks, under
from ...helpers.mntp_runs import error_line, refused, results, run, weights
from ...helpers.seeing import reached
from ...helpers.simcse_runs import write_pairs

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")

BOS, EOS = 1, 2


@pytest.fixture
def sinks(settings):
    """A short run with one sink token and one sinkless layer."""
    return settings | {"num_sink_tokens": 1, "num_sinkless_layers": 1, "do_train": True, "stop_after_n_steps": 2}


def sees(model):
    """Whether the sink sees the text, whether the first other token sees the last one, and whether it sees the sink."""
    seen = reached(model.eval(), torch.tensor([[BOS, 6, 7, 8]]))
    return bool(seen[0, 3]), bool(seen[1, 3]), bool(seen[1, 0])


def test_an_adapter_is_trained_beside_sinks_and_says_so(sinks):
    from peft import PeftModel

    assert run(sinks, "--do_eval") == 0
    out = sinks["output_dir"]
    assert sinks_on_disk(out) == Sinks(1, 1)
    base = AutoModel.from_pretrained(sinks["model_name_or_path"])
    model = PeftModel.from_pretrained(enable_bidirectional(base, num_sink_tokens=1, num_sinkless_layers=1), out)
    assert sees(model)[:2] == (False, True)
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [BOS, 5, 6]
    found = results(sinks)
    assert found["causal_loss"] != found["before_loss"] != found["eval_loss"]


def test_all_weights_open_with_the_sinks_of_the_folder_and_go_on(sinks, tmp_path):
    """A second run on the folder takes its numbers and its token, without any flag."""
    sinks |= {"lora_r": 0, "sink_token": "eos"}
    assert run(sinks) == 0
    folder = sinks["output_dir"]
    with opening_sinks():
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.num_sink_tokens, model.config.num_sinkless_layers, model.config.is_causal) == (1, 1, False)
    again = {name: value for name, value in sinks.items() if not name.startswith("num_sink") and name != "sink_token"}
    again |= {"model_name_or_path": folder, "output_dir": str(tmp_path / "again")}
    assert run(again) == 0
    assert sinks_on_disk(again["output_dir"]) == Sinks(1, 1)
    with opening_sinks():
        assert AutoTokenizer.from_pretrained(again["output_dir"])("w1")["input_ids"] == [EOS, 5]
    without = again | {"num_sink_tokens": 0, "output_dir": str(tmp_path / "without")}
    assert run(without) == 0
    assert sinks_on_disk(without["output_dir"]) == NO_SINKS


def test_evaluation_scores_no_sink_and_sees_as_an_explicit_mask_says(settings):
    """Against stock transformers under explicit masks; each sequence is one sink token and a part of the text."""
    from bidirect_patch.cli.mntp.collator import RepeatableCollator

    settings |= {"do_eval": True, "seed": 7, "num_sink_tokens": 1, "sink_token": "bos", "max_seq_length": 16}
    settings |= {"attn_implementation": "eager"}
    assert run(settings) == 0
    found = results(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    words = tokenizer(Path(settings["validation_file"]).read_text())["input_ids"]
    rows = [[BOS, *words[i : i + 15]] for i in range(0, len(words) - 14, 15)]
    collator = RepeatableCollator(tokenizer, mlm_probability=0.2, seed=7, num_sink_tokens=1)
    model = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"], attn_implementation="eager").eval()
    causal, open_but_sink = [], []
    for row in rows:
        batch = collator([row])
        labels = batch["labels"][0, 1:]
        for losses, masks in ((causal, sink_masks(16, 2, sinks=16)), (open_but_sink, sink_masks(16, 2))):
            with torch.no_grad(), under(model.model.layers, masks):
                logits = model(input_ids=batch["input_ids"]).logits[0, :-1][labels != -100]
            losses.append(torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="none"))
    assert found["causal_masked_tokens"] == sum(map(len, causal))
    assert found["causal_loss"] == pytest.approx(torch.cat(causal).mean().item(), abs=1e-5)
    assert found["before_loss"] == pytest.approx(torch.cat(open_but_sink).mean().item(), abs=1e-5)


def test_padding_free_trains_to_the_same_weights_as_padding_beside_sinks(sinks):
    sinks |= {"line_by_line": True, "lora_dropout": 0.0, "num_sink_tokens": 2, "stop_after_n_steps": 3}
    packed = sinks | {"output_dir": sinks["output_dir"] + "-packed", "padding_free": True}
    assert run(sinks) == 0 and run(packed) == 0
    padded, packed = weights(sinks), weights(packed)
    assert all(torch.allclose(packed[key], padded[key], atol=2e-4) for key in padded)


def test_the_first_layers_are_kept(sinks, tmp_path):
    assert run(sinks | {"layers": 1, "lora_r": 0}) == 0
    config = json.loads((Path(sinks["output_dir"]) / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    with opening_sinks():
        model, loading = AutoModelForCausalLM.from_pretrained(sinks["output_dir"], output_loading_info=True)
    assert len(model.model.layers) == 1 and not any(loading.values())
    seen = reached(enable_bidirectional(model, num_sink_tokens=1, num_sinkless_layers=1).eval(), torch.tensor([[BOS, 6, 7, 8]]))
    assert seen.tolist() == [[True, False, False, False], *[[False, True, True, True]] * 3]  # one layer, which is sinkless


def test_eval_sts_pools_no_sink(settings, tmp_path):
    """Against a mean over the words, of the model under an explicit mask."""
    rows = write_pairs(tmp_path / "pairs.jsonl")
    for number, row in enumerate(rows):
        row["sentence1"] += " w7" * (1 + number % 5)  # else some cosines are 1 but for rounding
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings |= {"do_eval": True, "eval_sts": str(tmp_path / "pairs.jsonl"), "num_sink_tokens": 1, "attn_implementation": "eager"}
    assert run(settings) == 0
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])
    model = AutoModel.from_pretrained(settings["model_name_or_path"], attn_implementation="eager").eval()

    def embed(text):
        ids = torch.tensor([[BOS, *tokenizer(text)["input_ids"]]])
        with torch.no_grad(), under(model.layers, sink_masks(ids.shape[1], 2)):
            return model(input_ids=ids)[0][0, 1:].mean(0)

    cosines = [torch.cosine_similarity(embed(r["sentence1"]), embed(r["sentence2"]), 0).item() for r in rows]
    expected = spearman(np.array(cosines), np.array([row["score"] for row in rows]))
    assert results(settings)["before_sts_spearman"] == pytest.approx(expected, abs=1e-3)


def test_a_resumed_run_gives_what_an_uninterrupted_one_does(sinks, tmp_path, capsys):
    sinks |= {"save_strategy": "steps", "save_steps": 2, "stop_after_n_steps": 4}
    whole = sinks | {"output_dir": str(tmp_path / "whole")}
    assert run(whole) == 0
    assert run(sinks | {"stop_after_n_steps": 2}) == 0
    assert run(sinks) == 0
    ours, expected = weights(sinks), weights(whole)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    said = error_line(capsys, sinks | {"num_sinkless_layers": 0, "stop_after_n_steps": 6})
    assert "it was trained with num_sink_tokens=1, num_sinkless_layers=1, and this run has num_sink_tokens=1, num" in said


def test_the_next_command_makes_the_same_of_the_base(sinks, capsys):
    assert run(sinks | {"layers": 2, "sink_token": "w3"}) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    flags = ["--layers", "2", "--sink_token", "w3", "--num_sink_tokens", "1", "--num_sinkless_layers", "1"]
    assert words[words.index("--layers") :][: len(flags)] == flags


def test_a_token_alone_is_put_before_each_text(settings):
    settings |= {"do_train": True, "stop_after_n_steps": 1, "sink_token": "w7"}
    assert run(settings) == 0
    assert AutoTokenizer.from_pretrained(settings["output_dir"])("w1")["input_ids"] == [11, 5]
    assert sinks_on_disk(settings["output_dir"]) == NO_SINKS


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_sink_tokens": -1}, "num_sink_tokens must be 0 or more; got -1"),
        ({"num_sink_tokens": "one"}, "num_sink_tokens"),
        ({"num_sinkless_layers": 1}, "num_sinkless_layers=1 without sink tokens: give num_sink_tokens too"),
        ({"num_sink_tokens": 0, "num_sinkless_layers": 1}, "num_sinkless_layers=1 without sink tokens"),
        ({"num_sink_tokens": 1, "num_sinkless_layers": 3}, "num_sinkless_layers must be at most 2, the number of layers; got 3"),
        ({"num_sink_tokens": 1, "num_sinkless_layers": 2, "layers": 1}, "num_sinkless_layers must be at most 1"),
        ({"layers": 3}, "layers must be at most 2, the model's; got 3"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"num_sink_tokens": 32}, "max_seq_length must be above num_sink_tokens=32; got 32"),
        ({"sink_token": "nowhere"}, "sink_token=nowhere: this is no token of the tokenizer's vocabulary"),
        ({"sink_token": ""}, "sink_token is empty"),
    ],
)
def test_settings_that_cannot_be_used(settings, capsys, monkeypatch, change, says):
    """Each before the weights are loaded."""
    from bidirect_patch.cli.mntp import training

    monkeypatch.setattr(training, "load_model", lambda *args: pytest.fail("the model was loaded"))
    assert says in refused(capsys, settings | {"do_train": True} | change)
