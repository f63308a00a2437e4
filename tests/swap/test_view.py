"""A view of a module: its own code on other parts, while the module stays as it is."""

import torch
from torch import nn

from bidirect_patch.swap.view import view


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(2, 2), nn.Linear(2, 2), 3.0

    def forward(self, x):
        return self.second(self.first(x)) * self.factor


X = torch.ones(1, 2)


def test_a_view_runs_the_modules_code_on_its_parts():
    module = Chain()
    plain = view(module)
    assert type(plain) is Chain and plain is not module and torch.equal(plain(X), module(X))
    assert plain.first is module.first and plain._parameters is module._parameters


def test_other_parts_stand_in_for_some_and_the_module_keeps_its_own():
    module = Chain()
    before, names, out = dict(vars(module)), dict(module._modules), module(X)
    other = view(module, {"second": nn.Identity()}, {"factor": 2.0})
    assert torch.equal(other(X), module.first(X) * 2)
    assert list(other._modules) == list(module._modules)
    assert torch.equal(view(module, attributes={"factor": 6.0})(X), out * 2)
    assert torch.equal(view(module, {"first": nn.Identity()})(X), module.second(X) * 3)
    assert vars(module) == before and module._modules == names and torch.equal(module(X), out)


def test_what_is_set_on_a_view_is_not_set_on_the_module():
    module = Chain()
    other = view(module)
    other.factor = 1.0
    other.second = nn.Identity()
    assert module.factor == 3.0 and type(module.second) is nn.Linear
