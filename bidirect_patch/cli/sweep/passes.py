"""Hidden states after every layer, out of few forwards.

A model whose last layer does not see the first token differs from the model whose layers all see it in that last layer alone.
So one forward gives the states after each layer; in a second one, under attention that is blind in all layers, each layer is
given the state that it had in the first one, and so gives what it would as the last one of a cut model. A third forward in
which each layer is given the second one's states does the same for two blind layers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...model.decoder import Attention as AttentionModule
from ...model.facts import mask_parameter, parameter_names
from ...patch import bidirectional
from ...swap.classes import original
from .parts import Parts, called_by, state_of
from .setups import Attention


class Depth(NamedTuple):
    """A model that is cut after some layers, of which the last ones are blind."""

    blind: int
    layers: int


def states(parts: Parts, family: Attention, depths: Iterable[Depth], ids: Tensor, mask: Tensor) -> Iterator[tuple[Depth, Tensor]]:
    """What the cut models give, (texts, length, width) each.

    Args:
        parts: The model.
        family: Its attention.
        depths: Where it is cut, and how many layers are blind.
        ids: (texts, length), int64.
        mask: (texts, length), int64: 1 for a token, 0 for padding on the right.

    Raises:
        UnsupportedModelError: The model cannot have this attention.
    """
    wanted = set(depths)
    before: dict[int, Any] = {}
    for blind in range(1 + max(depth.blind for depth in wanted)):
        # What a deeper pass needs of this one.
        needed = {depth.layers - (depth.blind - blind) for depth in wanted if depth.blind >= blind} - {0}
        before = _one_pass(parts, family._replace(blind=blind), needed, before, ids, mask)
        for depth in sorted(wanted):
            if depth.blind == blind:
                yield depth, before[depth.layers] if parts.after is None else parts.embeddings_of(state_of(before[depth.layers]))


def _one_pass(
    parts: Parts, attention: Attention, needed: set[int], before: dict[int, Any], ids: Tensor, mask: Tensor
) -> dict[int, Any]:
    """The outputs of layers by their number from 1 on; of the whole model for the last one, if it is not known what follows.

    Args:
        parts: The model.
        attention: Who sees whom. In a blind pass all layers are blind, and each gets the state of the pass before.
        needed: Which layers are needed.
        before: The outputs of the pass before.
        ids: (texts, length), int64.
        mask: (texts, length), int64.
    """
    found: dict[int, Any] = {}
    deepest = max(needed, default=0)

    def call(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = index + 1
        if attention.blind:
            if number not in needed:
                return _any_output(found, before)
            if number - 1 in before:
                args, kwargs = _given(parts.layers[index], state_of(before[number - 1]), args, kwargs)
        elif number > max(deepest, 1):
            return found[max(deepest, 1)]
        found[number] = forward(*args, **kwargs)
        return found[number]

    with attending(parts, attention), called_by(parts.layers, call):
        output = parts.model(input_ids=ids, attention_mask=mask)[0]
    if parts.after is None:
        found[len(parts.layers)] = output
    return found


def _any_output(found: dict[int, Any], before: dict[int, Any]) -> Any:
    """What stands for the output of a layer that isn't needed: it has the form of one."""
    return next(iter((found or before).values()))


def _given(
    layer: nn.Module, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of a layer, with another state."""
    if args:
        return (state, *args[1:]), kwargs
    return args, {**kwargs, parameter_names(type(layer))[0]: state}


@contextmanager
def attending(parts: Parts, attention: Attention) -> Iterator[None]:
    """The model under an attention; under a blind one, all its layers are blind."""
    if not attention.bidirectional:
        with bidirectional(parts.model, enabled=False), _first_hidden(parts.decoder.attentions if attention.blind else ()):
            yield
        return
    layers = len({each.layer for each in parts.decoder.attentions}) if attention.blind else 0
    with bidirectional(parts.model, num_sink_tokens=attention.sinks, num_sinkless_layers=layers):
        yield


@contextmanager
def _first_hidden(modules: Sequence[AttentionModule]) -> Iterator[None]:
    """Causal attention in which nobody sees the first token but itself, in these modules."""
    hooks = [each.module.register_forward_pre_hook(_hide_first(each), with_kwargs=True) for each in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hide_first(attention: AttentionModule) -> Callable[..., Any]:
    cls = original(type(attention.module))
    names, name = parameter_names(cls), mask_parameter(cls)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(names, args)), **kwargs}
        hidden, mask = given[names[0]], given.get(str(name))
        length = hidden.shape[1]
        if mask is None and length <= (attention.span.limit or length):
            mask = torch.full((1, 1, length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
            mask = mask.triu(1)
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != length:
            raise UnsupportedModelError(f"it is not known how {cls.__name__} could hide one token more")
        mask = mask.expand(*mask.shape[:2], length, length).clone()
        mask[..., 1:, 0] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return (), {**given, str(name): mask}

    return hook
