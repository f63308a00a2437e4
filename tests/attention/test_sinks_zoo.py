"""Sink tokens in every architecture: seen by changing one token, or what one layer is given, and by the causal model itself."""

import copy

import pytest
import torch

from bidirect_patch import enable_bidirectional
from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.model.find import decoders

from ..helpers import zoo
from ..helpers.slow import THOROUGH, some_slow
from ..helpers.snapshots import assert_same, snapshot

LENGTH = 12  # the zoo's windows and chunks are of 4: layer by layer, all the text is reached
SINKS = 2
# One of each way in which a family makes its masks, and of these the ones that take sinks in every release.
FEW = ("bloom", "ctrl", "gemma3", "gpt_neo", "gpt_oss", "llama4_text", "mpt", "openai-gpt", "opt", "xlm")
TAKE_SINKS = ("bloom", "gpt_neo", "llama", "mpt", "openai-gpt", "opt")


def enabled(model, **sinks):
    """`model`, or None if it is refused by name; then it is what it was."""
    before = snapshot(model)
    try:
        return enable_bidirectional(model, **sinks)
    except UnsupportedModelError as error:
        assert any(type(module).__name__ in str(error) for module in model.modules()), error
        assert_same(before, snapshot(model))
        return None


def reach(model):
    """With a mask of ones, since a few families are causal only if they are given one (Moshi up to 5.2)."""
    return zoo.reach(model, LENGTH, seeds=2, attention_mask=torch.ones(LENGTH + 1, LENGTH, dtype=torch.long))


@torch.no_grad()
def states_of_sinks(model):
    """(2, SINKS, width): what the first tokens of two rows come out as."""
    outputs = model(**zoo.inputs(model, 2, LENGTH, seed=5), attention_mask=torch.ones(2, LENGTH, dtype=torch.long))
    return (outputs.logits if "logits" in outputs else outputs.last_hidden_state)[:, :SINKS].float()


def check(model_type, backend):
    """See that sink tokens are right in a type. Whether it takes them, in some layers or in all."""
    model = zoo.build(model_type, backend)
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config.use_cache = False  # Gemma 3n of 4.57 shares keys only through a cache
    try:
        found = decoders(model)[0]
    except UnsupportedModelError:
        return enabled(model, num_sink_tokens=SINKS) is not None
    causal = reach(model)
    wanted = causal | causal.T  # to see both ways is to see the mirror image too
    wanted[:SINKS] = causal[:SINKS]
    blind = wanted.clone()
    blind[SINKS:, :SINKS] = False
    layers = len({attention.layer for attention in found.attentions})
    took = []
    for sinkless in (1, layers, 0):
        if sinkless == 0 and all(took) and model_type not in FEW and not THOROUGH:
            break  # beside one sinkless layer the others are as in a model with none, which has one mask as that of all sinkless
        with_sinks = enabled(copy.deepcopy(model), num_sink_tokens=SINKS, num_sinkless_layers=sinkless)
        took.append(with_sinks is not None)
        if with_sinks is not None:
            assert torch.equal(reach(with_sinks), blind if sinkless == layers else wanted), sinkless
            stock = states_of_sinks(model)
            torch.testing.assert_close(states_of_sinks(with_sinks), stock, atol=2e-5 * float(stock.abs().max()), rtol=1e-4)
    return all(took)


@pytest.mark.parametrize("model_type", some_slow(zoo.buildable_types(), lambda name: name not in FEW))
@pytest.mark.skipif(zoo.RELEASE > zoo.NEWEST, reason=f"the zoo knows the types of {zoo.NEWEST} and older releases")
def test_sinks_are_causal_and_sinkless_layers_do_not_see_them(model_type):
    """On the eager backend, where each family's own mask code is used."""
    takes = check(model_type, "eager")
    assert takes or model_type not in TAKE_SINKS
