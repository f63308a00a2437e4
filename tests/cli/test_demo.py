"""The demo, run as a newcomer runs it, and the model that comes with it."""

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from bidirect_patch import enable_bidirectional
from bidirect_patch.cli import main
from bidirect_patch.cli.demo import SHIPPED, held_out_and_training_topics
from bidirect_patch.cli.demo.progress import ProgressBar

from ..helpers.paths import ROOT
from ..helpers.tiny_models import tiny_model

for extra in ("accelerate", "datasets", "peft"):
    pytest.importorskip(extra, reason="the demo trains, which needs the extra [train]")

LAYERS = 4
BASELINES = ("causal, as it was loaded", "bidirectional, untrained")
TEXT = "The import statement combines two operations: it searches for the named module, then it binds the results."
LOSS = 4.33417  # of TEXT in nats a token, by transformers 4.39.3


@pytest.fixture(autouse=True)
def loud_again():
    """The demo silences what the other tests may want to hear."""
    import datasets
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(stdout, stderr, output folder) of a short demo, run outside the repository, the network out of reach."""
    place = tmp_path_factory.mktemp("demo")
    # A proxy that isn't there: whoever looks for the network fails.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, **nowhere, "PYTHONPATH": paths, "HF_HOME": str(place / "hf")}
    environment.pop("HF_HUB_OFFLINE", None)  # it mustn't need that either
    command = [sys.executable, "-m", "bidirect_patch", "demo", "--steps", "30", "--output-dir", str(place / "out")]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, place / "out"


@pytest.mark.slow
def test_each_layer_is_seen_causal_before_and_bidirectional_after(shown):
    out, _, _ = shown
    rows = re.findall(r"^model\.layers\.(\d) +causal +-6 \.\. \+0 +bidirectional +-6 \.\. \+6$", out, re.MULTILINE)
    assert rows == [str(i) for i in range(LAYERS)]


@pytest.mark.slow
def test_training_beats_the_causal_model_and_the_untrained_one(shown):
    loss = losses(shown[0])
    causal, untrained, trained = (loss.pop(label) for label in (*BASELINES, "bidirectional, after 30 steps"))
    assert trained < min(causal, untrained) - 0.1
    assert loss == {"bidirectional, opened again": trained}


@pytest.mark.slow
def test_in_a_pipe_it_shows_neither_progress_nor_warnings_in_80_columns(shown):
    out, err, _ = shown
    assert not err.strip()
    assert max(len(line) for line in out.splitlines() if str(shown[2]) not in line and str(SHIPPED) not in line) <= 80


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_one_line_of_a_terminal(monkeypatch, is_terminal):
    err = io.StringIO()
    err.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", err)
    bar, state = ProgressBar(), SimpleNamespace(max_steps=2)
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 1.5})
    for _ in range(2):
        bar.on_step_end(None, state, None)
    bar.on_train_end(None, state, None)
    written = err.getvalue()
    assert "\n" not in written
    assert ("training:" in written and "loss 1.50" in written) if is_terminal else written == ""


@pytest.mark.slow
def test_what_was_saved_opens_bidirectional_without_the_demo(shown):
    from peft import PeftModel

    ids = torch.tensor([AutoTokenizer.from_pretrained(shown[2])(TEXT)["input_ids"]] * 2)
    ids[1, -1] = 5
    model = enable_bidirectional(shipped(AutoModel))
    with torch.no_grad():
        untrained = model(input_ids=ids)[0]
        trained = PeftModel.from_pretrained(model, shown[2]).eval()(input_ids=ids)[0]
    assert (trained[0, 0] - trained[1, 0]).abs().max() > 1e-3  # the first position depends on the last
    assert (trained - untrained).abs().max() > 0.1


def test_the_shipped_model_is_causal_and_the_same_on_every_transformers():
    tokenizer, model = AutoTokenizer.from_pretrained(SHIPPED), shipped()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    assert tokenizer.decode(ids[0]) == TEXT and len(tokenizer) == model.config.vocab_size
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        assert out.loss.item() == pytest.approx(LOSS, abs=1e-4)
        changed = ids.clone()
        changed[0, -1] = 5
        assert torch.equal(model(input_ids=changed).logits[0, :-1], out.logits[0, :-1])


def test_the_shipped_tokenizer_gives_what_the_model_takes():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert list(tokenizer("A cat")) == ["input_ids", "attention_mask"]


def test_the_shipped_model_is_small():
    sizes = {path.name: path.stat().st_size for path in SHIPPED.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} == set(sizes)
    assert max(sizes.values()) < 2_000_000 and sum(sizes.values()) < 3_000_000


def test_no_long_paragraph_is_both_trained_and_evaluated_on():
    held_out, training = held_out_and_training_topics()
    assert 30_000 < sum(map(len, held_out)) < sum(map(len, training)) / 5
    text = "\n\n".join(training)
    found = [part for whole in held_out for part in re.split(r"\n\s*\n", whole) if len(part.strip()) > 40]
    assert len(found) > 100
    assert [part for part in found if part.strip() in text] == []


def test_another_model(tmp_path, capsys):
    other = str(tmp_path / "other")
    tiny_model("mistral", vocab_size=2048).save_pretrained(other)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(other)
    assert main(["demo", "--model", other, "--steps", "1", "--output-dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{other}: MistralForCausalLM, ")
    assert len(re.findall(r"causal +-6 \.\. \+0 +bidirectional +-6 \.\. \+6$", out, re.MULTILINE)) == 2
    assert {*BASELINES} < set(losses(out))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--steps", "0"], "whole number of at least 1, not '0'"),
        (["--steps", "many"], "'many'"),
        (["--seed", "-1"], "--seed"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--gguf-file", "x.gguf"], "--model"),
        (["--gguf_file", "x.gguf"], "--model"),
        (["--modle", "x"], "--modle"),
        (["x.json"], "x.json"),
        (["--output-dir", "{full}"], "isn't an empty folder"),
        (["--output-dir", "{full}/file"], "isn't an empty folder"),
        (["--output-dir", "{full}/file/new"], "can't be made"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, said, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["demo", *(flag.format(full=tmp_path) for flag in flags)]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("bidirect-patch: error: ") and err.count("\n") == 1
    assert out == "" and (tmp_path / "file").read_text() == "mine"


def losses(out: str) -> dict[str, float]:
    rows = re.findall(r"^(.{32}) +(\d+\.\d{3}) +\d+\.\d%$", out, re.MULTILINE)
    return {label.strip(): float(loss) for label, loss in rows}


def shipped(kind=AutoModelForCausalLM):
    return kind.from_pretrained(SHIPPED, torch_dtype=torch.float32).eval()
