"""A module that doubles, and two mixins that add 1 and 100 to what it gives: the numbers tell which of them ran."""

from dataclasses import dataclass

import torch
from torch import nn

from bidirect_patch.swap.classes import Swapped, set_forward
from bidirect_patch.swap.record import Plan, settings_of


class Double(nn.Module):
    def forward(self, x):
        return x * 2


@dataclass(frozen=True)
class One:
    pass


@dataclass(frozen=True)
class Hundred:
    pass


class PlusOne(Swapped):
    @classmethod
    def build(cls, below, original):
        def forward(inner, self, x):
            return inner(self, x) + (0 if settings_of(self, One) is None else 1)

        set_forward(cls, forward, below)


class PlusHundred(Swapped):
    rank = 1

    @classmethod
    def build(cls, below, original):
        def forward(inner, self, x):
            return inner(self, x) + (0 if settings_of(self, Hundred) is None else 100)

        set_forward(cls, forward, below)


ONE, HUNDRED = Plan(PlusOne, One()), Plan(PlusHundred, Hundred())
X = torch.tensor([3.0])
STOCK, PATCHED = 6.0, 7.0
