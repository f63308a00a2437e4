"""A model that makes the mask of the decoder inside it, where only one of the two was changed: it is right, or it is said."""

import copy
import threading
import warnings

import pytest
import torch
from transformers import LlamaModel, LlamaPreTrainedModel

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import CausalMaskWarning, ModeConflictError, OrderError
from bidirect_patch.model.find import decoders

from ..helpers import zoo
from ..helpers.one_text import BOTH, CAUSAL, IDS, ONE_SINK, TWO_SINKS, moves, output
from ..helpers.tiny_models import tiny_config

TYPES = [name for name in ("gemma3", "gemma4", "gemma4_unified") if name in zoo.buildable_types()]
pytestmark = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def each_type(test):
    missing = pytest.mark.skipif(not TYPES, reason="no causal LM of this transformers makes the mask of a decoder inside it")
    return missing(pytest.mark.parametrize("model_type", TYPES)(test))


FULL = {"text_config": {"layer_types": ["full_attention"] * 4}}


def changed_inside(outer):
    inner = decoders(outer)[0].module
    assert inner is not outer
    return inner


def refuses(outer, tmp_path):
    """Neither runs, generates nor is saved."""
    for use in (
        lambda: outer(input_ids=IDS),
        lambda: copy.deepcopy(outer)(input_ids=IDS),
        lambda: outer.generate(IDS, max_new_tokens=1),
        lambda: outer.save_pretrained(tmp_path),
    ):
        with pytest.raises(OrderError, match="language_model.*enable_bidirectional.*disable_bidirectional"):
            use()
    assert not is_bidirectional(outer) and not list(tmp_path.iterdir())


@each_type
@pytest.mark.parametrize("overrides", [{}, FULL], ids=["windows", "full"])
def test_a_causal_decoder_in_a_bidirectional_model(model_type, backend, overrides, tmp_path):
    outer = enable_bidirectional(zoo.build(model_type, backend, **overrides))
    want = output(outer)
    disable_bidirectional(changed_inside(outer))
    refuses(outer, tmp_path)
    assert moves(changed_inside(outer)) == CAUSAL
    twin = copy.deepcopy(outer)
    assert torch.equal(output(enable_bidirectional(outer)), want) and is_bidirectional(outer)
    assert moves(disable_bidirectional(twin)) == CAUSAL
    twin.generate(IDS, max_new_tokens=1, do_sample=False, pad_token_id=0)


@each_type
def test_a_causal_block_of_the_decoder_alone(model_type, backend, tmp_path):
    outer = enable_bidirectional(zoo.build(model_type, backend))
    want, inner = output(outer), changed_inside(outer)
    with bidirectional(inner, enabled=False):
        refuses(outer, tmp_path)
        assert moves(inner) == CAUSAL
    assert torch.equal(output(outer), want) and is_bidirectional(outer)


@each_type
def test_other_sinks_in_the_decoder_than_around_it(model_type, backend, tmp_path):
    outer = enable_bidirectional(zoo.build(model_type, backend), num_sink_tokens=1)
    inner = changed_inside(outer)
    want = output(outer)
    enable_bidirectional(inner, num_sink_tokens=2)
    refuses(outer, tmp_path)
    assert moves(inner) == TWO_SINKS and is_bidirectional(inner)
    with bidirectional(outer, num_sink_tokens=1):
        assert torch.equal(output(outer), want)
    refuses(outer, tmp_path)
    assert torch.equal(output(enable_bidirectional(outer, num_sink_tokens=1)), want)
    assert moves(outer) == ONE_SINK and is_bidirectional(outer)


@each_type
def test_a_decoder_alone_is_bidirectional_or_it_is_said(model_type, backend):
    """The model around it makes a causal mask, which is followed."""
    outer = zoo.build(model_type, backend)
    enable_bidirectional(changed_inside(outer))
    assert not is_bidirectional(outer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved = moves(outer)
    assert any(issubclass(each.category, CausalMaskWarning) for each in caught) or moved == BOTH
    with warnings.catch_warnings():
        warnings.simplefilter("error", CausalMaskWarning)
        assert moves(enable_bidirectional(outer)) == BOTH and is_bidirectional(outer)


def while_it_runs(outer, change):
    """Runs `outer` and calls `change` before the decoder inside it runs, as a vision tower would leave the time for."""
    errors = []

    def hook(*_):
        try:
            change()
        except Exception as error:
            errors.append(error)

    handle = outer.get_input_embeddings().register_forward_pre_hook(hook)
    try:
        return output(outer), errors
    finally:
        handle.remove()


def in_another_thread(change):
    errors = []

    def run():
        try:
            change()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if errors:
        raise errors[0]


@each_type
@pytest.mark.parametrize("part", ["outer", "inner"])
@pytest.mark.parametrize("overrides", [{}, FULL], ids=["windows", "full"])
def test_another_thread_changes_a_decoder_while_the_model_around_it_runs(model_type, backend, overrides, part):
    """The mask is made already, for the sinks that the decoder had."""
    outer = enable_bidirectional(zoo.build(model_type, backend, **overrides), num_sink_tokens=1)
    model, want = {"outer": outer, "inner": changed_inside(outer)}[part], output(outer)
    for change in (
        lambda: enable_bidirectional(model, num_sink_tokens=2),
        lambda: enable_bidirectional(model, num_sink_tokens=1, num_sinkless_layers=1),
        lambda: bidirectional(model, num_sink_tokens=2).__enter__(),
        lambda: bidirectional(model, enabled=False).__enter__(),
        lambda: disable_bidirectional(model),
    ):
        got, errors = while_it_runs(outer, lambda change=change: in_another_thread(change))
        assert [type(error) for error in errors] == [ModeConflictError] and torch.equal(got, want)
    assert torch.equal(output(outer), want) and is_bidirectional(outer)
    enable_bidirectional(outer, num_sink_tokens=2)  # it runs no more
    assert moves(outer) == TWO_SINKS


@each_type
def test_a_hook_changes_the_decoder_while_the_model_around_it_runs(model_type, backend):
    outer = enable_bidirectional(zoo.build(model_type, backend, **FULL), num_sink_tokens=1)
    with pytest.raises(OrderError, match="language_model.*other sink tokens"):
        while_it_runs(outer, lambda: enable_bidirectional(changed_inside(outer), num_sink_tokens=2))


@pytest.mark.skipif("blt" not in zoo.buildable_types(), reason="this transformers has no Blt")
def test_a_decoder_alone_in_a_model_that_stays_causal(backend):
    """Blt's patcher makes its own mask, and the model around it those of all other parts."""
    whole = zoo.build("blt", backend)
    want, patcher = output(whole), enable_bidirectional(changed_inside(whole))
    patcher(input_ids=IDS)
    assert is_bidirectional(patcher) and not is_bidirectional(whole)
    for model in (whole, whole.model, copy.deepcopy(whole)):
        with pytest.raises(OrderError, match="BltModel: patcher is bidirectional.*stay causal .local_encoder.*local_decoder"):
            output(model)
    with bidirectional(patcher, enabled=False):
        assert torch.equal(output(whole), want)
    disable_bidirectional(whole)
    assert torch.equal(output(whole), want)
    with bidirectional(patcher), pytest.raises(OrderError, match="BltModel: patcher"):
        output(whole)
    assert torch.equal(output(whole), want)


class Retrieving(LlamaPreTrainedModel):
    """A user's model: a decoder that embeds the text, and one that goes on with it under the mask that this one makes."""

    def __init__(self, config):
        super().__init__(config)
        self.retriever, self.generator = LlamaModel(config), LlamaModel(config)
        self.post_init()

    def forward(self, input_ids):
        found = self.retriever(input_ids=input_ids)[0]
        causal_mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()[None, None]
        causal_mask = torch.zeros(causal_mask.shape).masked_fill(~causal_mask, torch.finfo(torch.float32).min)
        return found, self.generator(inputs_embeds=found, attention_mask=causal_mask)[0]


def test_who_wrote_the_model_around_may_open_a_part_of_it(backend):
    model = Retrieving(tiny_config("llama", attn_implementation=backend)).eval()
    enable_bidirectional(model.retriever)
    with torch.no_grad():
        one, two = model(IDS), model(torch.cat([IDS[:, :-1], IDS[:, -1:] + 1], 1))
    assert not torch.equal(one[0][:, 0], two[0][:, 0])  # the last token was changed
    assert not is_bidirectional(model) and is_bidirectional(model.retriever)
