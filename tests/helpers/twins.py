"""A model beside a twin that was never patched: bit for bit the same, and nothing is left of the patch."""

import copy

import torch

from .one_text import output


def leftovers(model):
    """Names of attributes that the patch has left on a module of `model`."""
    return [name for module in model.modules() for name in vars(module) if "bidirect" in name]


def described(model):
    """Class, attribute names, plain attributes, hooks and buffers of every module, and the config."""

    def plain(value):
        return value if isinstance(value, (bool, int, float, str, type(None), torch.dtype)) else type(value).__name__

    modules = {
        name: (type(m), {k: plain(v) for k, v in vars(m).items()}, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    return modules, model.config.to_json_string()


def assert_twins(model, twin):
    """`model` is what `twin`, which was never patched, is: bit for bit."""
    mine, other = copy.deepcopy(described(model)), described(twin)
    assert mine[0].keys() == other[0].keys()
    for name, (cls, attributes, *hooks) in mine[0].items():
        theirs = other[0][name][1]
        differ = {k: (attributes.get(k), theirs.get(k)) for k in attributes.keys() | theirs.keys()}
        differ = {k: pair for k, pair in differ.items() if pair[0] != pair[1]}
        assert not differ, f"attributes of {name!r}, the model's and its twin's: {differ}"
        assert (cls, *hooks) == (other[0][name][0], *other[0][name][2:]), name
    assert mine[1] == other[1]
    for (name, a), (_, b) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(output(model), output(twin))
