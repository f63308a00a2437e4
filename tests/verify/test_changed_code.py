"""Code that somebody changes after a class was verified: what was found out about it before is not believed any more."""

import copy
import pickle

import pytest

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import UnsupportedModelError
from bidirect_patch.model.facts import builds_causal_mask, parameter_names

from ..helpers.changed_code import NO_TABLE, Place, has_place
from ..helpers.one_text import moved_by_last
from ..helpers.tiny_models import tiny_model

KINDS = ["attention", "layer", "kernel", "mask"]


def place_of(kind, model, monkeypatch):
    if not has_place(kind, model):
        pytest.skip(NO_TABLE)
    return Place(kind, model, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_became_causal_is_refused_as_in_a_new_process(kind, monkeypatch):
    model = enable_bidirectional(tiny_model(head=False))
    place = place_of(kind, model, monkeypatch)
    place.put(place.causal())
    if kind == "mask" and place.name == "_update_causal_mask":  # the patch's own method stands above it
        assert moved_by_last(model).all()
        return
    assert not moved_by_last(model)[:-1].any()
    assert not is_bidirectional(model)
    with pytest.raises(UnsupportedModelError, match="was not made bidirectional"):
        enable_bidirectional(model)
    with pytest.raises(UnsupportedModelError, match="was not made bidirectional"):
        enable_bidirectional(tiny_model(head=False))
    with pytest.raises(UnsupportedModelError), bidirectional(model):
        raise AssertionError("the block was entered")
    assert not is_bidirectional(model)
    place.put(place.function)
    assert is_bidirectional(enable_bidirectional(model)) and moved_by_last(model).all()
    assert not moved_by_last(disable_bidirectional(model))[:-1].any()


@pytest.mark.parametrize("kind", ["attention", "layer", "kernel"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_code_that_is_changed_after_a_copy_is_seen_in_the_copy(kind, how, monkeypatch):
    model = how(enable_bidirectional(tiny_model(head=False)))
    assert is_bidirectional(model)
    place = place_of(kind, model, monkeypatch)
    place.put(place.causal())
    assert not moved_by_last(model)[:-1].any() and not is_bidirectional(model)
    place.put(place.function)
    assert is_bidirectional(model) and moved_by_last(model).all()


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_was_changed_to_no_effect_is_verified_anew(kind, monkeypatch):
    model = enable_bidirectional(tiny_model(head=False))
    place = place_of(kind, model, monkeypatch)
    place.put(place.same())
    if kind != "mask" or place.name == "create_causal_mask":
        assert not is_bidirectional(model)  # nobody has looked yet
    assert is_bidirectional(enable_bidirectional(model)) and moved_by_last(model).all()
    with bidirectional(model, enabled=False):
        assert not moved_by_last(model)[:-1].any()
    assert is_bidirectional(model) and moved_by_last(model).all()
    assert not moved_by_last(disable_bidirectional(model))[:-1].any()


def test_code_that_runs_again_as_it_was_is_believed(monkeypatch):
    """Patched and put back in between, as a context manager does: nothing is verified a second time."""
    model = enable_bidirectional(tiny_model(head=False))
    place = place_of("attention", model, monkeypatch)
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
