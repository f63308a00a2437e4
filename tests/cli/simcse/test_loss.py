"""GradCache and Matryoshka, each by one setting."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize

from ...helpers.simcse_runs import run

st = pytest.importorskip("sentence_transformers", "6", reason="the contrastive step needs the extra [simcse]")
pytest.importorskip("peft", reason="the contrastive step needs the extra [simcse]")


@pytest.fixture
def once(supervised):
    """One step on triplets without dropout."""
    supervised |= {"stop_after_n_steps": 1, "lora_dropout": 0.0, "logging_steps": 1, "peft_model_name_or_path": None}
    return supervised | {"max_steps": 5}


def logged_loss(settings):
    history = json.loads(Path(settings["output_dir"], "trainer_state.json").read_text())["log_history"]
    return next(entry["loss"] for entry in history if "loss" in entry)


@pytest.mark.parametrize("change", [{}, {"matryoshka_dims": [32, 8]}])
def test_gradcache_takes_the_same_step_with_few_texts_at_a_time(once, tmp_path, ids_read, monkeypatch, change):
    from sentence_transformers.base.modules import Transformer

    whole, cached = once | change, once | change | {"mini_batch_size": 3, "output_dir": str(tmp_path / "cached")}
    assert run(whole) == 0
    sizes = []
    forward = Transformer.forward

    def recorded(self, features, **kwargs):
        sizes.append(len(features["input_ids"]))
        return forward(self, features, **kwargs)

    monkeypatch.setattr(Transformer, "forward", recorded)
    assert run(cached) == 0
    assert max(sizes) == 3
    one, two = (load_file(Path(s["output_dir"], "model.safetensors")) for s in (whole, cached))
    assert logged_loss(cached) == pytest.approx(logged_loss(whole), rel=1e-4)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_matryoshka_adds_the_losses_of_the_first_numbers(once, place, monkeypatch):
    from sentence_transformers.sentence_transformer.modules import Pooling

    seen = []
    forward = Pooling.forward

    def recorded(self, features, **kwargs):
        features = forward(self, features, **kwargs)
        if self.training:
            seen.append(features["sentence_embedding"].detach())
        return features

    monkeypatch.setattr(Pooling, "forward", recorded)
    assert run(once, "--matryoshka_dims", "32", "8") == 0
    query, *documents = seen
    documents = torch.cat(documents)
    expected = sum(
        cross_entropy(50 * normalize(query[:, :size]) @ normalize(documents[:, :size]).T, torch.arange(len(query)))
        for size in (32, 8)
    )
    assert logged_loss(once) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"mini_batch_size": 0}, "mini_batch_size must be at least 1; got 0"),
        ({"matryoshka_dims": [0]}, "matryoshka_dims must be 1 or more each; got [0]"),
        ({"matryoshka_dims": ["many"]}, "argument --matryoshka_dims: invalid int value: 'many'"),
        ({"matryoshka_dims": [33]}, "matryoshka_dims must be at most 32, the model's; got 33"),
    ],
)
def test_settings_that_cannot_be_used(once, capsys, change, says):
    assert run(once | change) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
