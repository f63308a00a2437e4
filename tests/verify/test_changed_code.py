"""Code that somebody changes after a class was verified: what was found out about it before is not believed any more."""

import sys
from functools import partial, wraps

import pytest
import torch

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.model.facts import builds_causal_mask, parameter_names
from bidirect_patch.swap.classes import original

from ..helpers.seeing import moved_by_last
from ..helpers.tiny_models import tiny_model

IDS = torch.arange(5, 14)[None]
moved = partial(moved_by_last, ids=IDS)
KINDS = ["attention", "layer", "kernel", "mask"]


def causal_mask(length):
    return torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)


def with_causal_mask(forward):
    """A forward of a module that takes the hidden states, and hides the future whatever mask it is given."""

    def causal(self, hidden_states, attention_mask=None, **kwargs):
        return forward(self, hidden_states, attention_mask=causal_mask(hidden_states.shape[1]), **kwargs)

    return causal


class Place:
    """Where one function stands: an attribute of a class or module, or an entry of a table."""

    def __init__(self, kind, model, monkeypatch):
        self.monkeypatch = monkeypatch
        layer, module = model.layers[0], sys.modules[original(type(model)).__module__]
        self.table, self.name = None, "forward"
        if kind == "attention":
            self.holder = original(type(layer.self_attn))
        elif kind == "layer":
            self.holder = original(type(layer))
        elif kind == "kernel":
            table = getattr(module, "ALL_ATTENTION_FUNCTIONS", None)
            if table is None:
                pytest.skip("this transformers has no table of attention functions")
            self.table, self.name = table, "sdpa"
        elif hasattr(module, "create_causal_mask"):
            self.holder, self.name = module, "create_causal_mask"
        elif hasattr(original(type(model)), "_update_causal_mask"):
            self.holder, self.name = original(type(model)), "_update_causal_mask"
        self.function = self.table["sdpa"] if self.table is not None else getattr(self.holder, self.name)

    def put(self, function):
        if self.table is not None:
            self.monkeypatch.setitem(self.table, self.name, function)
        else:
            self.monkeypatch.setattr(self.holder, self.name, function)

    def causal(self):
        """A function for this place that makes the model causal."""
        if self.name == "forward":
            return with_causal_mask(self.function)
        if self.name == "sdpa":
            return lambda module, query, key, value, mask, **kwargs: self.function(
                module, query, key, value, causal_mask(query.shape[2]), **kwargs
            )

        def create_mask(*args, **kwargs):
            hidden = next(each for each in (*args, *kwargs.values()) if getattr(each, "ndim", 0) == 3)
            return causal_mask(hidden.shape[1])

        return create_mask

    def same(self):
        """Another function for this place, which does the same."""
        return wraps(self.function)(lambda *args, **kwargs: self.function(*args, **kwargs))


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_became_causal_is_refused_as_in_a_new_process(kind, monkeypatch):
    model = enable_bidirectional(tiny_model(head=False))
    place = Place(kind, model, monkeypatch)
    place.put(place.causal())
    if kind == "mask" and place.name == "_update_causal_mask":  # the patch's own method stands above it
        assert moved(model).all()
        return
    assert not moved(model)[:-1].any()
    assert not is_bidirectional(model)
    with pytest.raises(UnsupportedModelError, match="was not made bidirectional"):
        enable_bidirectional(model)
    with pytest.raises(UnsupportedModelError, match="was not made bidirectional"):
        enable_bidirectional(tiny_model(head=False))
    with pytest.raises(UnsupportedModelError), bidirectional(model):
        raise AssertionError("the block was entered")
    assert not is_bidirectional(model)
    place.put(place.function)
    assert is_bidirectional(enable_bidirectional(model)) and moved(model).all()
    assert not moved(disable_bidirectional(model))[:-1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_was_changed_to_no_effect_is_verified_anew(kind, monkeypatch):
    model = enable_bidirectional(tiny_model(head=False))
    place = Place(kind, model, monkeypatch)
    place.put(place.same())
    if kind != "mask" or place.name == "create_causal_mask":
        assert not is_bidirectional(model)  # nobody has looked yet
    assert is_bidirectional(enable_bidirectional(model)) and moved(model).all()
    with bidirectional(model, enabled=False):
        assert not moved(model)[:-1].any()
    assert is_bidirectional(model) and moved(model).all()
    assert not moved(disable_bidirectional(model))[:-1].any()


def test_code_that_runs_again_as_it_was_is_believed(monkeypatch):
    """Patched and put back in between, as a context manager does: nothing is verified a second time."""
    model = enable_bidirectional(tiny_model(head=False))
    place = Place("attention", model, monkeypatch)
    place.put(place.causal())
    assert not is_bidirectional(model)
    place.put(place.function)
    assert is_bidirectional(model)


def test_what_a_class_says_of_itself_is_read_anew(monkeypatch):
    cls = type(tiny_model(head=False))
    assert "input_ids" in parameter_names(cls) and builds_causal_mask(cls)
    monkeypatch.setattr(cls, "forward", lambda self, tokens, attention_mask=None: None)
    assert parameter_names(cls) == ("tokens", "attention_mask")
    for name, value in list(vars(cls).items()):
        if callable(value) and name != "__init__":
            monkeypatch.setattr(cls, name, lambda self: None)
    assert not builds_causal_mask(cls)
    monkeypatch.undo()
    assert "input_ids" in parameter_names(cls) and builds_causal_mask(cls)
