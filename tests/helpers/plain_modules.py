"""A plain module, two mixins for it, and all that there is to see of it."""

from dataclasses import dataclass

import torch
from torch import nn

from bidirect_patch.swap.classes import Swapped, set_forward
from bidirect_patch.swap.record import Plan, settings_of


class Scale(nn.Module):
    """(x * weight) * scale + offset, with an attribute of the class and one of the instance."""

    of_class = "class"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 3.0))
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))
        self.register_buffer("unsaved", torch.tensor([5.0]), persistent=False)
        self.register_buffer("empty", None)
        self.of_instance = ["instance"]
        self.offset = 0.0

    def forward(self, x):
        return x * self.weight * self.scale + self.offset

    def extra_repr(self):
        return "2"


@dataclass(frozen=True)
class Factor:
    value: float


@dataclass(frozen=True)
class Addend:
    value: float


class Times(Swapped):
    """Multiplies what comes out."""

    note = "times"

    @classmethod
    def build(cls, below, original):
        def forward(inner, self, x):
            return inner(self, x) * settings_of(self, Factor).value

        set_forward(cls, forward, below)


class Plus(Swapped):
    """Adds to what comes out, after Times."""

    rank = 1
    note = "plus"

    @classmethod
    def build(cls, below, original):
        def forward(inner, self, x):
            return inner(self, x) + settings_of(self, Addend).value

        set_forward(cls, forward, below)


X = torch.tensor([[1.0, 10.0]])
STOCK = torch.tensor([[3.0, 60.0]])


def times(value=2.0, **more):
    return Plan(Times, Factor(value), **more)


def plus(value=1.0, **more):
    return Plan(Plus, Addend(value), **more)


def state(module):
    """Class, attributes and buffers of a module: the objects themselves."""
    return type(module), dict(vars(module)), dict(module._buffers), list(module._buffers)


def assert_same(before, after):
    """The very same class, attributes and buffers, in the same order of buffers."""
    assert before[0] is after[0]
    for then, now in ((before[1], after[1]), (before[2], after[2])):
        assert then.keys() == now.keys()
        for name in then:
            assert then[name] is now[name], name
    assert before[3] == after[3]
