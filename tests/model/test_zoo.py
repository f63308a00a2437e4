"""The zoo itself: every architecture builds, is small and does what is known of it; the oracle sees what is there."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from packaging.version import Version
from torch import nn

from ..helpers import zoo
from ..helpers.slow import some_slow

LENGTH = 12
PAST = torch.ones(LENGTH, LENGTH).tril().bool()


def banded(window):
    """(LENGTH, LENGTH) bool: the causal sliding window, `0 <= query - key < window`."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return (distance >= 0) & (distance < window)


IN_THE_MATRIX = {*zoo.UNLIKE_LLAMA, *zoo.NOT_CAUSAL}


@pytest.mark.parametrize("model_type", some_slow(zoo.buildable_types(), lambda name: name not in IN_THE_MATRIX))
@pytest.mark.skipif(zoo.RELEASE > zoo.NEWEST, reason=f"the zoo knows the types of {zoo.NEWEST} and older releases")
def test_stock_behaviour(model_type):
    model = zoo.build(model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) < 4e6
    assert not model.training
    # With a mask of ones, since a few families are causal only if they are given one (Moshi up to 5.2).
    seen = zoo.reach(model, LENGTH, attention_mask=torch.ones(LENGTH + 1, LENGTH, dtype=torch.long))
    if zoo.why_not_causal(model_type):
        assert seen.diagonal().all()
        assert (seen & ~PAST).any()
    else:
        assert torch.equal(seen, PAST)


# Gemma 4's assistants are made at full size before they fail.
@pytest.mark.parametrize("model_type", some_slow(zoo.WHY_NOT, lambda name: name.endswith("_assistant")))
@pytest.mark.skipif(zoo.RELEASE > zoo.NEWEST, reason=f"the zoo knows the types of {zoo.NEWEST} and older releases")
def test_a_reason_not_to_build_is_still_true(model_type):
    if model_type not in zoo.model_types() or not zoo.why_not(model_type):
        pytest.skip("not in this transformers, or it builds there")
    with pytest.raises(Exception, match=zoo.WHY_NOT[model_type][1]):
        zoo.reach(zoo.build(model_type))


def test_every_exception_is_a_known_type():
    """A typo in the data would do nothing: the newest transformers maps every name but the retired ones."""
    named = {*zoo.OVERRIDES, *zoo.WHY_NOT, *zoo.NOT_CAUSAL, *zoo.FOREIGN_TOWER}
    if zoo.RELEASE != zoo.NEWEST:
        pytest.skip(f"the names are those of transformers {zoo.NEWEST}")
    assert named - set(zoo.model_types()) <= zoo.RETIRED


@pytest.mark.parametrize(
    ("model_type", "windows"),
    [
        ("mistral", [4, 4, 4, 4]),
        ("gemma2", [4, None, 4, None]),
        ("gemma3_text", [4, None, 4, None]),
        ("gpt_neo", [None, 4, None, 4]),
        ("qwen3", [None, None, 4, 4]),
    ],
)
def test_windows_are_shorter_than_the_texts(model_type, windows):
    if model_type not in zoo.model_types():
        pytest.skip("not in this transformers")
    model = zoo.build(model_type)
    attentions = model(**zoo.inputs(model, 1, LENGTH), output_attentions=True).attentions
    slack = model_type == "mistral" and zoo.RELEASE < Version("4.40")  # its eager window reached one further then
    for probabilities, window in zip(attentions, windows, strict=True):
        assert torch.equal(probabilities[0].amax(0) > 0, banded(window + slack if window else LENGTH))


def test_building_is_reproducible():
    first, again, other = (zoo.build("llama", seed=seed) for seed in (0, 0, 1))
    ids = zoo.inputs(first, 2, LENGTH)
    assert torch.equal(first(**ids).logits, again(**ids).logits)
    assert not torch.equal(first(**ids).logits, other(**ids).logits)


@pytest.mark.parametrize(("backend", "calls"), [("eager", 0), ("sdpa", 4)])
def test_the_backend_is_the_one_asked_for(backend, calls):
    model = zoo.build("llama", backend)
    real = nn.functional.scaled_dot_product_attention
    with mock.patch.object(nn.functional, "scaled_dot_product_attention", side_effect=real) as kernel:
        assert torch.equal(zoo.reach(model, LENGTH, seeds=1), PAST)
    assert kernel.call_count == calls


class Toy(nn.Module):
    """Embeds, and mixes tokens by a known (LENGTH, LENGTH) matrix: output i is the sum of tokens j with mix[i, j]."""

    def __init__(self, mix):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(128, 16)
        self.mix = mix.float()

    def forward(self, input_ids, scale=1.0):
        return Outputs(logits=scale * self.mix @ self.embedding(input_ids))


class Outputs(SimpleNamespace):
    def __contains__(self, name):
        return hasattr(self, name)


@pytest.mark.parametrize(
    "mix",
    [PAST, ~PAST, banded(3), banded(1), PAST | ~PAST, PAST & ~PAST],
    ids=["past", "future", "window", "self", "all", "constant"],
)
def test_oracle_sees_exactly_what_is_mixed(mix):
    assert torch.equal(zoo.reach(Toy(mix), LENGTH), mix)


def test_oracle_passes_arguments_on_and_refuses_nan():
    assert not zoo.reach(Toy(PAST), LENGTH, scale=0.0).any()
    with pytest.raises(FloatingPointError, match="Toy"):
        zoo.reach(Toy(PAST), LENGTH, scale=float("nan"))
