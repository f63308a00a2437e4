"""`modules_of` and `parameters_of` against torch's own walks."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from bidirect_patch.model.walk import modules_of, parameters_of

from ..helpers.tiny_models import tiny_model


def shared():
    part = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    return nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), part), "b": part, "c": nn.ModuleList([part[0], part, nn.ReLU()])})


def ring():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[1].back = model
    return model


def empty_slots():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.LayerNorm(2, elementwise_affine=False))
    model.register_module("nothing", None)
    model[1].register_module("nothing", None)
    model[1].register_parameter("no_weight", None)
    return model


def tied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ParameterList([torch.zeros(1), torch.ones(1)]))
    model[1].weight = model[0].weight
    return model


def scripted():
    return nn.Sequential(nn.ReLU(), torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))))


@pytest.mark.parametrize(
    "build", [nn.Identity, shared, ring, empty_slots, tied, scripted, lambda: weight_norm(nn.Linear(2, 2)), tiny_model]
)
def test_walks_are_torchs_own(build):
    model = build()
    assert list(map(id, modules_of(model))) == list(map(id, model.modules()))
    # By their storage, since a scripted module makes the object of a parameter anew.
    assert list(dict.fromkeys(p.data_ptr() for p in parameters_of(model))) == [p.data_ptr() for p in model.parameters()]


def test_a_walk_follows_what_was_replaced():
    model = shared()
    assert len(list(modules_of(model))) == len(list(model.modules()))
    model["a"][1] = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 2))
    del model["b"]
    assert list(modules_of(model)) == list(model.modules())


def test_what_is_replaced_during_a_walk_is_walked():
    """As in torch's own walk: what a module holds is read after the module was handed out."""

    def replaced(walk):
        model, seen = shared(), []
        for module in walk(model):
            seen.append(type(module))
            if isinstance(module, nn.ModuleDict):
                module["a"] = nn.Dropout()
        return seen

    assert nn.Dropout in replaced(modules_of)
    assert replaced(modules_of) == replaced(nn.Module.modules)
