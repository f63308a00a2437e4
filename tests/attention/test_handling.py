"""Families whose mask code is unlike Llama's, most of them in some releases only: each takes its mask in another form.

End to end, by the zoo's oracle and not by attention_report: change a token, see which outputs move.
"""

import pytest
import torch

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional

from ..helpers import zoo

LENGTH, PAD = 8, 3

# The mask as ones and zeros (bart, mpt), as an extended mask (bert), from triangular buffers (gpt2, gpt_bigcode, gpt_neo), a
# matrix beside it (ctrl), a flag (xlm), code of its own (git, opt), attention that takes no mask for causal (nemotron).
FAMILIES = ["bart", "bert", "ctrl", "falcon", "git", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "nemotron", "opt", "xlm"]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_token_moves_each_real_one(model_type, backend):
    if model_type not in zoo.model_types():
        pytest.skip("not in this transformers")
    try:
        model = zoo.build(model_type, backend)
    except (ValueError, ImportError) as error:
        pytest.skip(f"not offered: {error}")
    ids = zoo.inputs(model, 2, LENGTH)["input_ids"]
    before = model(input_ids=ids).logits
    for side in ("none", "right", "left"):
        mask = torch.ones(LENGTH + 1, LENGTH, dtype=torch.long)
        real = slice(0, LENGTH)
        if side != "none":
            real = slice(0, LENGTH - PAD) if side == "right" else slice(PAD, LENGTH)
            mask[:] = 0
            mask[:, real] = 1
        with bidirectional(model):
            seen = zoo.reach(model, LENGTH, seeds=2, attention_mask=mask)[real]
        assert seen[:, real].all(), side
        seen[:, real] = False
        assert not seen.any(), side
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("model_type", FAMILIES + ["bloom", "codegen", "gpt_neox", "gptj", "openai-gpt", "xglm"])
def test_on_again_and_off_again(model_type):
    """The verbs know their own work, in families that say nothing of causality on their attention modules too."""
    if model_type not in zoo.model_types():
        pytest.skip("not in this transformers")
    model = zoo.build(model_type)
    ids = zoo.inputs(model, 2, LENGTH)["input_ids"]
    before = model(input_ids=ids).logits
    kinds = [(type(m), set(vars(m))) for m in model.modules()]
    assert enable_bidirectional(enable_bidirectional(model)) is model and is_bidirectional(model)
    both = model(input_ids=ids).logits
    with bidirectional(model, enabled=False):
        assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, both) and not torch.equal(both, before)
    disable_bidirectional(disable_bidirectional(model))
    assert not is_bidirectional(model) and torch.equal(model(input_ids=ids).logits, before)
    assert [(type(m), set(vars(m))) for m in model.modules()] == kinds


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_weights_of_padded_texts(backend):
    """Falcon's SDPA, where it is asked for the weights, adds its mask to the scores, since transformers 5 a bool one too."""
    if "falcon" not in zoo.model_types():
        pytest.skip("not in this transformers")
    model = enable_bidirectional(zoo.build("falcon", backend, alibi=False))
    ids = zoo.inputs(model, 2, LENGTH)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -PAD:] = 0
    with torch.no_grad():
        alone = model(input_ids=ids[:, :-PAD]).logits
        padded = model(input_ids=ids, attention_mask=mask, output_attentions=True).logits
    torch.testing.assert_close(padded[:, :-PAD], alone, rtol=1e-4, atol=1e-4)
