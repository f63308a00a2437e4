"""`mntp --eval_sts`: the encoder's own quality, in each evaluation of the run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from bidirect_patch import enable_bidirectional

from ...helpers.mntp_runs import refused, results, run, weights
from ...helpers.saved import told_of_causal_loading
from ...helpers.simcse_runs import BAD_PAIRS, write_pairs

pytest.importorskip("accelerate", reason="the training command needs the extra [train]")
pytest.importorskip("datasets", reason="the training command needs the extra [train]")
pytest.importorskip("peft", reason="the training command needs the extra [train]")


@pytest.fixture
def rows(tmp_path):
    """Pairs of sentences of several lengths, as they stand in pairs.jsonl."""
    rows = write_pairs(tmp_path / "pairs.jsonl")
    for number, row in enumerate(rows):
        row["sentence1"] += " w7" * (number % 5)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def evaluated(settings, rows, tmp_path):
    """Settings of a run that evaluates at steps 2 and 4 of 5, and trains an adapter with dropout."""
    settings |= {"do_eval": True, "eval_sts": str(tmp_path / "pairs.jsonl"), "per_device_eval_batch_size": 7}
    settings |= {"max_eval_samples": 4, "lora_dropout": 0.3, "line_by_line": True}
    return settings | {"eval_strategy": "steps", "eval_steps": 2, "stop_after_n_steps": 5}


def correlation(model, settings, rows, weighted=False):
    """The correlation by its definition, one sentence at a time and by another rule for ranks."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model_name_or_path"])

    def embed(text):
        with torch.no_grad():
            hidden = model.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))[0][0]
        of_tokens = torch.arange(1, len(hidden) + 1) if weighted else torch.ones(len(hidden))
        return (of_tokens[:, None] * hidden).sum(0) / of_tokens.sum()

    def ranks(values):
        return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]

    cosines = [cosine_similarity(embed(row["sentence1"]), embed(row["sentence2"]), 0).item() for row in rows]
    return np.corrcoef(ranks([row["score"] for row in rows]), ranks(cosines))[0, 1]


def trained(settings):
    """The bidirectional backbone that a run wrote."""
    if settings.get("lora_r") == 0:
        with told_of_causal_loading():
            model = AutoModel.from_pretrained(settings["output_dir"])
        return enable_bidirectional(model)
    from peft import PeftModel

    base = enable_bidirectional(AutoModel.from_pretrained(settings["model_name_or_path"]))
    return PeftModel.from_pretrained(base, settings["output_dir"])


def scheduled(settings):
    """The correlation at each step that was evaluated."""
    state = json.loads(Path(settings["output_dir"], "trainer_state.json").read_text())
    return {e["step"]: e["eval_sts_spearman"] for e in state["log_history"] if "eval_sts_spearman" in e}, state


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "pooling, by", [("mean", None), ("weighted_mean", "eval_sts_pooling"), ("weighted_mean", "pooling_mode")]
)
def test_before_training_the_causal_and_the_bidirectional_model(evaluated, rows, capsys, pooling, by):
    evaluated |= {"eval_strategy": "no"} | ({by: pooling} if by else {})
    assert run(evaluated) == 0
    found = results(evaluated)
    model = AutoModel.from_pretrained(evaluated["model_name_or_path"])
    causal = correlation(model, evaluated, rows, pooling == "weighted_mean")
    both_sides = correlation(enable_bidirectional(model), evaluated, rows, pooling == "weighted_mean")
    assert found["causal_sts_spearman"] == pytest.approx(causal, abs=1e-3)
    assert found["before_sts_spearman"] == pytest.approx(both_sides, abs=1e-3)
    assert abs(causal - both_sides) > 0.01 and found["eval_sts_spearman"] == found["before_sts_spearman"]
    table = capsys.readouterr().out.split("masked next token prediction\n")[-1].splitlines()
    assert table[0].split() == ["loss", "accuracy", "Spearman"]
    assert [line[:28].strip() for line in table[1:4]] == [
        "causal, before training",
        "bidirectional, untrained",
        "bidirectional",
    ]
    assert table[1].split()[-1] == f"{found['causal_sts_spearman']:.1%}"


def test_a_run_without_pairs_has_no_such_column(evaluated, capsys):
    del evaluated["eval_sts"]
    assert run(evaluated | {"eval_strategy": "no"}) == 0
    assert "Spearman" not in capsys.readouterr().out and "eval_sts_spearman" not in results(evaluated)


@pytest.mark.parametrize(
    "how",
    [{"padding_free": True}, pytest.param({"lora_r": 0}, marks=pytest.mark.slow)],
    ids=["adapter, padding-free", "all weights"],
)
def test_on_schedule_and_after_of_what_is_trained_which_is_the_same_without(evaluated, rows, tmp_path, capsys, how):
    evaluated |= {"do_train": True} | how
    assert run(evaluated) == 0
    found, _ = scheduled(evaluated)
    after = results(evaluated)["eval_sts_spearman"]
    assert list(found) == [2, 4] and len({*found.values(), after}) == 3
    assert after == pytest.approx(correlation(trained(evaluated), evaluated, rows), abs=1e-3)
    table = capsys.readouterr().out.split("masked next token prediction\n")[-1].splitlines()
    assert [line[:28].strip() for line in table[3:6]] == ["step 2", "step 4", "after 5 steps"]

    name = "model.safetensors" if how.get("lora_r") == 0 else "adapter_model.safetensors"
    no_pairs = evaluated | {"eval_sts": None, "output_dir": str(tmp_path / "no-pairs")}
    no_evaluation = no_pairs | {"do_eval": False, "eval_strategy": "no", "output_dir": str(tmp_path / "no-evaluation")}
    for other in (no_pairs, no_evaluation):
        assert run(other) == 0
        assert same(weights(evaluated, name), weights(other, name))


def test_the_best_encoder_is_kept_and_a_resumed_run_finds_the_same(evaluated, rows, tmp_path, capsys):
    """Training that goes astray. The loss would choose another checkpoint."""
    evaluated |= {"do_train": True, "load_best_model_at_end": True, "metric_for_best_model": "sts_spearman"}
    evaluated |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1, "stop_after_n_steps": 8}
    evaluated |= {"eval_baselines": False, "lr_scheduler_type": "constant"}
    whole = evaluated | {"output_dir": str(tmp_path / "whole")}
    assert run(whole) == 0
    found, state = scheduled(whole)
    at_checkpoints = {step: found[step] for step in (2, 4, 6, 8)}
    best = max(at_checkpoints, key=at_checkpoints.get)
    assert max(at_checkpoints.values()) - min(at_checkpoints.values()) > 0.01
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}") and state["best_metric"] == found[best]
    kept = weights(whole)
    assert same(kept, weights(whole, f"checkpoint-{best}/adapter_model.safetensors"))
    assert results(whole)["eval_sts_spearman"] == found[best]
    assert f"the best, of step {best}" in capsys.readouterr().out

    assert run(evaluated | {"stop_after_n_steps": 4}) == 0
    assert run(evaluated) == 0
    assert same(kept, weights(evaluated)) and scheduled(evaluated)[1]["best_metric"] == found[best]
    assert run(evaluated) == 0  # nothing is left to train
    assert same(kept, weights(evaluated)) and results(evaluated)["eval_sts_spearman"] == found[best]

    moved = evaluated | {"output_dir": str(tmp_path / "moved")}
    Path(evaluated["output_dir"]).rename(moved["output_dir"])
    assert run(moved) == 0
    assert same(kept, weights(moved))


def test_a_longer_sentence_is_cut_at_the_tokenizers_limit(place, evaluated, tmp_path):
    from bidirect_patch.cli.mntp.sentence_pairs import SentencePairs

    pairs = {"sentence1": ["w1 " * 300, "w2"], "sentence2": ["w1", "w2 " * 256], "score": [1.0, 2.0]}
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    assert [len(ids) for ids in SentencePairs(pairs, tokenizer, None, "mean").sentences] == [256, 1, 1, 256]
    assert [len(ids) for ids in SentencePairs(pairs, tokenizer, 20, "mean").sentences] == [20, 1, 1, 20]
    assert tokenizer.backend_tokenizer.truncation is None


@pytest.mark.parametrize("text, says", [*BAD_PAIRS, ("", "can't read")])
def test_pairs_that_cannot_be_used(evaluated, tmp_path, capsys, monkeypatch, text, says):
    from bidirect_patch.cli.mntp import training

    monkeypatch.setattr(training, "check_model", lambda *args: pytest.fail("a model was built"))
    path = tmp_path / "bad.csv"
    path.write_text(text)
    assert says in refused(capsys, evaluated | {"eval_sts": str(path)})


@pytest.mark.parametrize(
    "change, says",
    [
        ({"eval_sts": "pairs.txt"}, "no .csv or .jsonl file 'pairs.txt': give eval_sts, with sentence1"),
        ({"eval_sts": "nowhere.csv"}, "no .csv or .jsonl file 'nowhere.csv'"),
        ({"eval_sts": ["a.csv", "b.csv"]}, "eval_sts is one value"),
        ({"do_eval": False, "do_train": True, "eval_strategy": "no"}, "give do_eval, or eval_strategy"),
        ({"metric_for_best_model": "sts_spearman", "eval_sts": None}, "metric_for_best_model=sts_spearman needs eval_sts"),
        ({"eval_sts_pooling": "last"}, "argument --eval_sts_pooling"),
    ],
)
def test_settings_that_cannot_be_used(evaluated, capsys, monkeypatch, change, says):
    from bidirect_patch.cli.mntp import training

    monkeypatch.setattr(training, "check_model", lambda *args: pytest.fail("a model was built"))
    assert says in refused(capsys, evaluated | change)
