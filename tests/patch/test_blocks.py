"""`with bidirectional(model)`: blocks nest, and bring back what they found."""

import copy
import threading

import pytest
import torch
import torch.utils.checkpoint

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import ArgumentError, BidirectPatchError

from ..helpers.one_text import BOTH, CAUSAL, ONE_SINK, TWO_SINKS, moves
from ..helpers.seeing import IDS, hidden, reached, sees_all, sees_only_the_past
from ..helpers.snapshots import assert_same, snapshot
from ..helpers.tiny_models import llama, tiny_model


def test_an_exception_inside_the_block_changes_nothing(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    with pytest.raises(KeyError, match="mine"):
        with bidirectional(model) as same:
            assert same is model and sees_all(model)
            raise KeyError("mine")
    assert_same(before, snapshot(model))
    # not with output_hidden_states: transformers 4.57 to 5.1 leave a wrapper of their own when such a forward raises
    with pytest.raises(BidirectPatchError), bidirectional(model):
        model(IDS, attention_mask=torch.ones(2, 3, 4))
    with pytest.raises(IndexError), bidirectional(model):
        model(IDS + 1000)
    assert_same(before, snapshot(model))
    assert sees_only_the_past(model)


def test_blocks_nest_and_restore_what_they_found(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    with bidirectional(model):
        assert sees_all(model)
        with bidirectional(model, enabled=False):
            assert sees_only_the_past(model)
            attentions = {name: found for name, found in before[0].items() if name.endswith("self_attn")}
            assert_same((attentions, *before[1:]), ({name: snapshot(model)[0][name] for name in attentions}, *before[1:]))
            with bidirectional(model):
                assert sees_all(model)
            assert sees_only_the_past(model)
        assert sees_all(model)
        with bidirectional(model):
            assert sees_all(model)
        assert sees_all(model)
    assert_same(before, snapshot(model))
    enable_bidirectional(model)
    with bidirectional(model):
        pass
    assert sees_all(model)
    with pytest.raises(KeyError), bidirectional(model, enabled=False):
        assert sees_only_the_past(model)
        raise KeyError
    assert sees_all(model)


def test_toggled_inside_a_block_the_block_still_restores(make_model):
    model = make_model()
    with bidirectional(model):
        disable_bidirectional(model)
        assert sees_only_the_past(model)
    assert sees_only_the_past(model)
    with bidirectional(model, enabled=False):
        enable_bidirectional(model)
        assert sees_all(model)
    assert sees_only_the_past(model)


def test_blocks_bring_back_the_sinks_that_they_found(make_model):
    model = make_model()
    hidden(model)
    before = snapshot(model)
    enable_bidirectional(model, num_sink_tokens=2)
    with pytest.raises(KeyError), bidirectional(model):
        assert sees_all(model)
        raise KeyError
    assert moves(model) == TWO_SINKS
    with bidirectional(model, enabled=False):
        assert sees_only_the_past(model)
        with bidirectional(model, num_sink_tokens=1, num_sinkless_layers=2):
            assert moves(model) == ONE_SINK and not reached(model)[1:, 0].any()
            with bidirectional(model, num_sink_tokens=3):
                assert moves(model) == "000111111"
            assert moves(model) == ONE_SINK and not reached(model)[1:, 0].any()
        assert sees_only_the_past(model)
    assert moves(model) == TWO_SINKS and reached(model)[:, 0].all()
    with bidirectional(model, num_sink_tokens=1):
        enable_bidirectional(model, num_sink_tokens=3)
    assert moves(model) == TWO_SINKS
    disable_bidirectional(model)
    with bidirectional(model, num_sink_tokens=2):
        assert moves(model) == TWO_SINKS
    assert_same(before, snapshot(model))


def test_a_decorated_function_has_its_sinks(make_model):
    model = make_model()
    encode = bidirectional(model, num_sink_tokens=1)(lambda: moves(model))
    assert encode() == encode() == ONE_SINK
    assert sees_only_the_past(model)


def test_a_block_ends_where_fewer_layers_are_left_than_were_sinkless():
    model = tiny_model(head=False)
    enable_bidirectional(model, num_sink_tokens=1, num_sinkless_layers=len(model.layers))
    twin = tiny_model(head=False)
    del twin.layers[-1]
    with bidirectional(model, enabled=False):
        del model.layers[-1]
    ids = torch.tensor([[5, 6, 7, 8]])
    enable_bidirectional(twin, num_sink_tokens=1, num_sinkless_layers=len(twin.layers))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids)[0], twin(input_ids=ids)[0])


def test_a_layer_that_was_put_in_within_the_block_is_undone_with_it(make_model):
    model = make_model(head=False)
    with bidirectional(model):
        model.layers[1] = copy.deepcopy(model.layers[1])  # patched, as what it was copied from
        assert sees_all(model)
    assert sees_only_the_past(model) and not is_bidirectional(model)
    assert type(model.layers[1].self_attn) is type(make_model(head=False).layers[1].self_attn)


@pytest.mark.parametrize("kind", ["coroutine", "generator"])
def test_a_block_is_no_decorator_of_what_runs_later(kind):
    model = llama()

    async def coroutine():
        return moves(model)

    def generator():
        yield moves(model)

    with pytest.raises(ArgumentError, match="inside it"):
        bidirectional(model)({"coroutine": coroutine, "generator": generator}[kind])
    assert bidirectional(model)(lambda: moves(model))() == BOTH and moves(model) == CAUSAL


class Two(torch.nn.Module):
    """Two decoders side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = llama(), llama()


def test_an_error_in_one_decoder_leaves_the_other_undone():
    model = Two()
    block = bidirectional(model)
    block.__enter__()
    attention = model.a.layers[0].self_attn
    ours = type(attention)
    attention.__class__ = type("SomebodyElses", (ours,), {})
    with pytest.raises(Exception, match="SomebodyElses"):
        block.__exit__(None, None, None)
    assert moves(model.b) == CAUSAL
    attention.__class__ = ours
    thread = threading.Thread(target=disable_bidirectional, args=(model,))
    thread.start()
    thread.join()
    assert moves(model.a) == moves(model.b) == CAUSAL
