"""Functions of transformers that somebody replaces after a class was verified: a forward, a kernel, what makes a mask."""

import sys
from functools import wraps

import torch

from bidirect_patch.swap.classes import original

NO_TABLE = "this transformers has no table of attention functions"


def causal_mask(length, dtype=torch.float32):
    """An additive mask (1, 1, length, length) that hides the future."""
    return torch.full((1, 1, length, length), torch.finfo(torch.float32).min, dtype=dtype).triu(1)


def with_causal_mask(forward):
    """A forward of a module that takes the hidden states, and hides the future whatever mask it is given."""

    def causal(self, hidden_states, attention_mask=None, *args, **kwargs):
        mask = causal_mask(hidden_states.shape[1], hidden_states.dtype)
        if args:  # under a checkpoint, older releases call a layer so
            return forward(self, hidden_states, mask, *args, **kwargs)
        return forward(self, hidden_states, attention_mask=mask, **kwargs)

    return causal


class Place:
    """Where one function stands: an attribute of a class or module, or an entry of a table.

    Args:
        kind: "attention", "layer", "kernel" (which `has_place` has to say is there) or "mask".
        decoder: the model that makes the mask.
        monkeypatch: what replaces the function, and puts it back.
    """

    def __init__(self, kind, decoder, monkeypatch):
        self.monkeypatch = monkeypatch
        layer, module = decoder.layers[0], module_of(decoder)
        self.table, self.name = None, "forward"
        if kind == "attention":
            self.holder = original(type(layer.self_attn))
        elif kind == "layer":
            self.holder = original(type(layer))
        elif kind == "kernel":
            self.table, self.name = module.ALL_ATTENTION_FUNCTIONS, "sdpa"
        elif hasattr(module, "create_causal_mask"):
            self.holder, self.name = module, "create_causal_mask"
        elif hasattr(original(type(decoder)), "_update_causal_mask"):
            self.holder, self.name = original(type(decoder)), "_update_causal_mask"
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
                module, query, key, value, causal_mask(query.shape[2], query.dtype), **kwargs
            )

        def create_mask(*args, **kwargs):
            hidden = next(each for each in (*args, *kwargs.values()) if getattr(each, "ndim", 0) == 3)
            return causal_mask(hidden.shape[1])

        return create_mask

    def same(self):
        """Another function for this place, which does the same."""
        return wraps(self.function)(lambda *args, **kwargs: self.function(*args, **kwargs))


def module_of(decoder):
    """The module of transformers that a decoder's class stands in."""
    return sys.modules[original(type(decoder)).__module__]


def has_place(kind, decoder):
    """Whether this transformers has such a function."""
    return kind != "kernel" or hasattr(module_of(decoder), "ALL_ATTENTION_FUNCTIONS")
