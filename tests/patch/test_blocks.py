"""`with bidirectional(model)`: blocks nest, and bring back what they found."""

import pytest
import torch
import torch.utils.checkpoint

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.errors import BidirectPatchError

from ..helpers.seeing import IDS, hidden, sees_all, sees_only_the_past
from ..helpers.snapshots import assert_same, snapshot


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
