"""`bidirect-patch check`: tables and exit codes, for folders that hold a config alone, and with weights."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from bidirect_patch import cli, enable_bidirectional
from bidirect_patch.cli import check
from bidirect_patch.errors import StillCausalError
from bidirect_patch.verify.report import attention_report

from ..helpers.tiny_models import tiny_config, tiny_model


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but the config.json of a large Llama."""
    config = tiny_config("llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 32, 8, 128
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_config_alone(folder, capsys):
    assert cli.main(["check", folder]) == 0
    before, after = capsys.readouterr().out.split("bidirectional:\nlayer")
    assert before.count("causal  ") == 2 and "not bidirectional" in before
    assert after.count("bidirectional  ") == 2 and "on sdpa: bidirectional" in after


@pytest.mark.parametrize("flags", [["--attn-implementation", "eager"], ["--attn_implementation=eager"]])
def test_backend_and_length(folder, capsys, flags):
    assert cli.main(["check", folder, *flags, "--length", "5"]) == 0
    out = capsys.readouterr().out
    assert "on eager" in out and "-4 .. +4" in out


def test_weights(tmp_path, capsys):
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), "--weights"]) == 0
    out = capsys.readouterr().out
    assert out.count("model.layers.2") == 2 and "stands for" not in out
    assert max(len(line) for line in out.splitlines() if line.startswith(("layer", "model.layers"))) <= 80


def test_sinks(tmp_path, capsys):
    """A last layer that doesn't see the sink looks back less far, which is no failure."""
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), "--weights", "--num_sink_tokens", "2", "--num_sinkless_layers", "1"]) == 0
    before, after = capsys.readouterr().out.split("bidirectional:\nlayer")
    assert "-8 .. +0" in before and after.count("2 sink tokens") == 3 and "on sdpa: bidirectional" in after
    assert after.count("which the others don't see") == 1 and "note:" not in after


def test_sinks_on_a_small_model_and_of_a_folder(folder, tmp_path, capsys):
    """The small model has two layers, of which no more than two can be sinkless."""
    assert cli.main(["check", folder, "--num_sink_tokens=1", "--num_sinkless_layers=3"]) == 0
    assert capsys.readouterr().out.count("which the others don't see") == 2
    model = enable_bidirectional(tiny_model("llama"), num_sink_tokens=1)
    model.save_pretrained(tmp_path / "saved")
    assert cli.main(["check", str(tmp_path / "saved")]) == 0
    assert capsys.readouterr().out.split("bidirectional:\nlayer")[1].count("1 sink token") == 2


def test_a_model_without_attention_is_refused_by_name(tmp_path, capsys):
    AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=4).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "causal" in out and "refused: MambaForCausalLM" in out


def test_the_patch_giving_up_is_a_failure(folder, capsys, monkeypatch):
    def give_up(model, **sinks):
        raise StillCausalError("LlamaDecoderLayer stayed causal")

    monkeypatch.setattr(check, "bidirectional", give_up)
    assert cli.main(["check", folder]) == 1
    assert "refused: LlamaDecoderLayer stayed causal" in capsys.readouterr().out


def test_a_layer_that_stays_causal_is_a_failure(folder, capsys, monkeypatch):
    monkeypatch.setattr(check, "bidirectional", lambda model, **sinks: nullcontext(model))
    assert cli.main(["check", folder]) == 1
    assert "2 causal" in capsys.readouterr().out.split("bidirectional:\nlayer")[1]


def test_a_layer_that_sees_less_than_before_is_a_failure(folder, capsys, monkeypatch):
    """Bidirectional, but in a window where the model as it is has none."""

    band = torch.ones(7, 7).triu(-2).tril(2).bool()

    def report(model, length):
        seen = attention_report(model, length=length)
        if seen.is_bidirectional:
            layers = [replace(layer, matrix=band, backward=2, forward=2) for layer in seen.layers]
            seen = replace(seen, layers=layers)
        return seen

    monkeypatch.setattr(check, "attention_report", report)
    assert cli.main(["check", folder]) == 1
    out = capsys.readouterr().out
    assert "looked back 6 positions and now reaches -2 .. +2" in out


def test_a_value_keeps_its_hyphens(capsys):
    assert cli.main(["check", "no/such-folder", "--attn-implementation=not-there"]) == 2
    assert "'no/such-folder'" in capsys.readouterr().err
    assert cli.underscored("--attn-implementation=not-there") == "--attn_implementation=not-there"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["no/such/folder/here"], "no model could be read from 'no/such/folder/here'"),
        ([], "NAME_OR_PATH"),
        (["FOLDER", "--length", "2"], "from 3 to 128"),
        (["FOLDER", "--length", "many"], "from 3 to 128"),
        (["FOLDER", "--length", "300"], "from 3 to 128"),
        (["FOLDER", "--nonsense"], "--nonsense"),
        (["FOLDER", "--num_sink_tokens", "one"], "--num_sink_tokens"),
        (["FOLDER", "--num_sink_tokens", "-1"], "num_sink_tokens must be 0 or more; got -1"),
        (["FOLDER", "--num_sinkless_layers", "1"], "num_sinkless_layers=1 without sink tokens"),
        (["FOLDER", "--num_sink_tokens=1", "--num_sinkless_layers=33"], "at most 32, the number of layers; got 33"),
        (["FOLDER", "--attn-implementation", "nonsense"], "nonsense"),
        (["FOLDER", "--weights"], "no model could be read from"),
    ],
)
def test_bad_input_is_one_line_and_two(folder, capsys, argv, message):
    assert cli.main(["check", *(folder if a == "FOLDER" else a for a in argv)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
