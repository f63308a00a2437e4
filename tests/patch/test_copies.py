"""Copies and files of a bidirectional model."""

import copy
import io
import pickle
from dataclasses import fields

import pytest
import torch
import torch.utils.checkpoint

from bidirect_patch import disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.attention.module_settings import AttentionSettings, ModelSettings
from bidirect_patch.errors import ConfigError
from bidirect_patch.swap.record import Plan, plans_of

from ..helpers import zoo
from ..helpers.one_text import BOTH, moves
from ..helpers.processes import in_a_new_process
from ..helpers.seeing import IDS, hidden, reached, sees_all, sees_only_the_past


def test_a_deep_copy_is_a_model_of_its_own(make_model):
    model = enable_bidirectional(make_model())
    clone = copy.deepcopy(model)
    assert is_bidirectional(clone) and sees_all(clone)
    assert torch.equal(hidden(clone), hidden(model))
    disable_bidirectional(clone)
    assert sees_only_the_past(clone) and sees_all(model)
    assert {n: type(m) for n, m in clone.named_modules()} == {n: type(m) for n, m in make_model().named_modules()}
    with torch.no_grad():
        before = hidden(model).clone()
        for parameter in clone.parameters():
            parameter.zero_()
        assert torch.equal(hidden(model), before)
    enable_bidirectional(clone)
    disable_bidirectional(model)
    assert is_bidirectional(clone) and sees_only_the_past(model)


def test_torch_save_of_the_whole_model(make_model):
    model = enable_bidirectional(make_model())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_bidirectional(loaded) and sees_all(loaded)
    assert torch.equal(hidden(loaded), hidden(model))
    disable_bidirectional(loaded)
    disable_bidirectional(model)
    assert sees_only_the_past(loaded)
    assert torch.equal(hidden(loaded), hidden(model))
    assert {n: type(m) for n, m in loaded.named_modules()} == {n: type(m) for n, m in model.named_modules()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_sinks(make_model, copied):
    model = enable_bidirectional(make_model(), num_sink_tokens=2, num_sinkless_layers=2)
    made = copied(model)  # before any forward: transformers 5 puts hooks on that pickle can't take
    other = copied(enable_bidirectional(model, num_sink_tokens=1))
    seen = torch.ones(8, 8, dtype=torch.bool)
    seen[0, 1:] = False
    assert torch.equal(reached(other), seen) and torch.equal(reached(model), seen)
    seen[1, 2:] = seen[2:, :2] = False
    assert torch.equal(reached(made), seen) and is_bidirectional(made)
    disable_bidirectional(made)
    assert sees_only_the_past(made) and is_bidirectional(other)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_a_pickle_keeps_a_window_that_the_patch_has_set(flash_double, model_type):
    """On FlashAttention before 4.56 it is one shorter. A number in a pickle is another object."""
    flash_double.install(2)
    model = enable_bidirectional(zoo.build(model_type, "flash_attention_2", sliding_window=1024))
    opened = pickle.loads(pickle.dumps(model))
    assert is_bidirectional(opened)
    assert moves(opened) == BOTH


def test_a_pickle_of_another_version_is_named(make_model):
    """It lacks what the settings of a patched module have by now."""
    for kind in (ModelSettings, AttentionSettings, Plan):
        model = enable_bidirectional(make_model())
        for module in model.modules():
            for plan in plans_of(module):
                kept = plan if kind is Plan else plan.settings
                if isinstance(kept, kind):
                    del vars(kept)[fields(kept)[0].name]
        with pytest.raises(ConfigError, match=f"another version.*{kind.__name__} lacks.*enable_bidirectional"):
            pickle.loads(pickle.dumps(model))


def test_a_saved_model_opens_in_another_process(make_model, tmp_path):
    model = enable_bidirectional(make_model())
    torch.save((model, model(IDS).logits.detach()), tmp_path / "model.pt")
    code = f"""
import torch
model, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
from bidirect_patch import disable_bidirectional, is_bidirectional
assert is_bidirectional(model)
ids = torch.tensor({IDS.tolist()})
assert torch.allclose(model(ids).logits, expected, atol=1e-5)
disable_bidirectional(model)
assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
"""
    in_a_new_process("-c", code)
