"""A model of fewer layers: its first ones, since the last layers of a language model are seldom the best for an encoder."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints.policy import caller_enables
from ..errors import ConfigError, one_line
from ..model.config import text_config
from ..model.decoder import Decoder
from ..model.find import decoders
from ..swap.classes import original

# Fields of a config that count all layers; of a config with an encoder too, those of the decoder. The first one that it has.
_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
# Fields that count layers of one kind: at the start, or at the end.
_AT_START = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
_AT_END = ("num_kv_shared_layers",)
# The ends of the names of fields that list some layers by their index.
_INDEXES = ("layers", "idxs", "ids", "indices", "indexes")


def check_layers(config: Any, count: int) -> None:
    """Check the number of layers to keep by the config alone.

    Raises:
        ConfigError: The model has fewer.
    """
    there = number_of_layers(config)
    if isinstance(there, int):
        _check(count, there)


def number_of_layers(config: Any) -> Any:
    """How many layers a model of this config has, as far as the config says; else None."""
    config = text_config(config)
    return getattr(config, _count_name(config), None)


def keep_layers(model: nn.Module, count: int) -> None:
    """Keep the first `count` layers of the decoder in a model, in place. What comes after the layers, such as a norm, stays.

    The config says so too, in each field that counts or lists the layers, so that the saved model opens.

    Args:
        model: A transformers model that holds one decoder, without adapters.
        count: 1 or more.

    Raises:
        ConfigError: The model has fewer layers, or another weight than those of the layers depends on their number.
        UnsupportedModelError: There is no decoder in it.
    """
    decoder = decoders(model)[0]
    config = decoder.module.config
    lists = _lists_of_layers(decoder)
    there = len(next(iter(lists.values())))
    _check(count, there)
    if count == there:
        return
    changes = _in_config(config, there, count)
    _check_rest(decoder.module, changes, [f"{name}.{i}." for name in lists for i in range(count, there)])
    for layers in lists.values():
        del layers[count:]
    for name, value in vars(decoder.module).items():
        if name in ("n_layers", "num_layers", "num_hidden_layers") and value == there:
            setattr(decoder.module, name, count)
    for each in _configs(model, config):
        for name, value in changes.items():
            setattr(each, name, value)


def _check(count: int, there: int) -> None:
    if count > there:
        raise ConfigError(f"layers must be at most {there}, the model's; got {count}")


def _count_name(config: Any) -> str:
    """The name of the field that counts the layers."""
    name = next((name for name in _COUNTS if isinstance(vars(config).get(name), int)), _COUNTS[-1])
    return (getattr(config, "attribute_map", None) or {}).get(name, name)


def _check_rest(decoder: Any, changes: dict[str, Any], cut: list[str]) -> None:
    """Check that a model of the changed config lacks the weights that are cut, and differs in nothing else.

    Raises:
        ConfigError: It differs, or none can be built.
    """
    cls = original(type(decoder))
    config = copy.deepcopy(decoder.config)
    whole = _weights(cls, copy.deepcopy(config))
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        type(config).from_dict(config.to_dict())  # which checks more than assignment does
        fewer = _weights(cls, config)
    except Exception as error:  # each class has its own
        raise ConfigError(f"layers: {cls.__name__} can't be cut: {one_line(error)}") from error
    kept = {name: shape for name, shape in whole.items() if not name.startswith(tuple(cut))}
    if fewer != kept:
        name = min(name for name in {**fewer, **kept} if fewer.get(name) != kept.get(name))
        raise ConfigError(f"layers: {cls.__name__} can't be cut, since {name} depends on the number of its layers")


def _weights(cls: Any, config: Any) -> dict[str, torch.Size]:
    """The shape of each weight that a model has, by name."""
    with torch.device("meta"), caller_enables():
        return {name: weight.shape for name, weight in cls._from_config(config).named_parameters()}


def _lists_of_layers(decoder: Decoder) -> dict[str, nn.ModuleList]:
    """Every list of the decoder's own that has one entry for each of its layers, by name: the layers, and what goes with each."""
    holders = {attention.layer.rpartition(".")[0] for attention in decoder.attentions}
    holder = holders.pop()
    layers = decoder.module.get_submodule(holder)
    if holders or not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"layers: {type(decoder.module).__name__} has no list of layers that could be cut; leave it out")
    parent = holder.rpartition(".")[0]
    beside = decoder.module.get_submodule(parent).named_children()
    prefix = f"{parent}." if parent else ""
    return {f"{prefix}{n}": m for n, m in beside if isinstance(m, nn.ModuleList) and len(m) == len(layers)}


def _in_config(config: Any, there: int, count: int) -> dict[str, Any]:
    """The fields of a config that change, by name."""
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            if name in _AT_START:
                changes[name] = min(value, count)
            elif name in _AT_END:
                changes[name] = max(0, value - (there - count))
        elif isinstance(value, (list, tuple)):
            if name.endswith(_INDEXES) and _are_indexes(value, there):
                changes[name] = type(value)(index for index in value if index < count)
            elif len(value) == there:
                changes[name] = value[:count]
    if "attention_types" in vars(config) and "attention_layers" in changes:  # GPT-Neo's: the same, as kinds that are repeated
        changes["attention_types"] = [[changes["attention_layers"], 1]]
    if isinstance(getattr(config, "scale_depth", None), float):  # MiniCPM's: each layer's share is this / sqrt(all layers)
        changes["scale_depth"] = config.scale_depth * math.sqrt(count / there)
    return changes | {_count_name(config): count}


def _are_indexes(values: Sequence[Any], there: int) -> bool:
    """Whether these are increasing numbers of layers."""
    numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    return numbers and list(values) == sorted(set(values)) and all(value < there for value in values)


def _configs(model: nn.Module, config: Any) -> list[Any]:
    """The decoder's config, and every copy of it that a module of the model or a config around it has."""
    held = [getattr(module, "config", None) for module in model.modules()]
    inner = [value for each in held if each is not None for value in vars(each).values()]
    found = {id(each): each for each in (config, *held, *inner) if type(each) is type(config)}
    return list(found.values())
