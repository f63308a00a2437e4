"""All that there is to see of a model, before and after."""

import copy

import torch
import torch.utils.checkpoint


class Same:
    """An object that is equal to itself alone (and is kept alive, so that its id isn't given to another)."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Same) and self.value is other.value

    def __repr__(self):
        return f"<{type(self.value).__name__}>"


def seen(value, depth=2):
    """Containers by content, plain values by value, all else by identity."""
    if isinstance(value, dict) and depth:
        return {k: seen(v, depth - 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and depth:
        return [seen(v, depth - 1) for v in value]
    return value if isinstance(value, (bool, int, float, str, torch.dtype)) else Same(value)


def snapshot(model):
    """What there is to see: each module's class and attributes, the buffers' values, the config."""
    modules = {name: (type(module), seen(vars(module))) for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return modules, buffers, copy.deepcopy(model.config.to_dict()), seen(vars(model.config))


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, (cls, attributes) in before[0].items():
        assert after[0][name][0] is cls, f"the class of {name!r}"
        assert after[0][name][1] == attributes, f"the attributes of {name!r}"
    assert before[1].keys() == after[1].keys()
    for name, buffer in before[1].items():
        assert torch.equal(buffer, after[1][name]), f"the buffer {name}"
    assert before[2:] == after[2:], "the config"
