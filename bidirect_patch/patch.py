"""The patch: make a model's attention bidirectional, undo it, ask for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from . import guards, swap, switch
from .errors import OrderError, UnsupportedModelError
from .find import Decoder, decoders
from .forward import BidirectionalAttention, BidirectionalModel, attention_attributes, rebound_forward, text_config
from .masks import backends_without_mask

Model = TypeVar("Model", bound=nn.Module)


def enable_bidirectional(model: Model, *, allow_partial: bool = False) -> Model:
    """Make every attention layer of `model` bidirectional, in place, and return `model`.

    model: any nn.Module that holds a transformers decoder: a `*ForCausalLM`, a bare `*Model`, a PEFT, DDP or compiled
        wrapper, your own module. Idempotent, like `model.train()`.
    allow_partial: patch the attention layers of a hybrid too, whose other layers stay causal; `is_bidirectional` then
        stays False.

    Each attention instance and the model that builds the mask get a dynamic subclass of their own class; no weight,
    config or class is touched. While bidirectional there is no KV cache and no `generate`.

    Raises UnsupportedModelError, before anything is changed, if a layer can't be made bidirectional, naming it;
    ModeConflictError if another thread needs the model causal; OrderError if it is already sharded.
    """
    found = decoders(model)
    with switch.lock:
        _check(found, True)
        _set(found, True, allow_partial)
    return model


def disable_bidirectional(model: Model) -> Model:
    """The exact way back from `enable_bidirectional`, in place; returns `model`. Idempotent.

    Raises ForeignWrapperError if another tool swapped a module's class after us (fully_shard, parametrize), and
    ModeConflictError if another thread needs the model bidirectional; nothing is changed then.
    """
    found = decoders(model)
    with switch.lock:
        _check(found, False)
        _set(found, False)
    return model


@contextmanager
def bidirectional(model: Model, enabled: bool = True, *, allow_partial: bool = False) -> Iterator[Model]:
    """`with bidirectional(model):` for a block; the state found on entry is restored, after an exception too.

    Blocks nest: `with bidirectional(model, enabled=False):` is a causal island (for `generate`) inside one. Threads may
    share a model in one mode; the last one out restores what the first one found.
    """
    found = decoders(model)
    with switch.lock:
        _check(found, enabled)
        modes = [_is_on(d) for d in found]
        _set(found, enabled, allow_partial)
        holders = [switch.enter(d.module, enabled, mode) for d, mode in zip(found, modes)]
    try:
        yield model
    finally:
        with switch.lock:
            restore = [switch.leave(d.module, h) for d, h in zip(found, holders)]
            for decoder, mode in zip(found, restore):
                if mode is not None:
                    _set([decoder], mode, True)


def is_bidirectional(model: nn.Module) -> bool:
    """Whether every layer of every decoder in `model` attends both ways: by this patch, or by a config that says
    `is_causal: false` on a transformers that honours it for this architecture.

    This reads state; `attention_report(model)` runs the model and looks.
    """
    try:
        found = decoders(model)
    except UnsupportedModelError:
        if isinstance(model, nn.Module):
            return False
        raise
    return all(not d.in_the_way and (_is_on(d) or guards.natively_bidirectional(d)) for d in found)


def _is_on(decoder: Decoder) -> bool:
    return swap.is_swapped(decoder.module, BidirectionalModel)


def _check(found: list[Decoder], mode: bool) -> None:
    for decoder in found:
        switch.check(decoder.module, mode, _is_on(decoder))


def _set(found: list[Decoder], mode: bool, allow_partial: bool = False) -> None:
    changing = [d for d in found if _is_on(d) != mode]
    if not changing:
        return
    if mode:
        _enable(changing, allow_partial)
    else:
        _disable(changing)


def _enable(found: list[Decoder], allow_partial: bool) -> None:
    plan: list[tuple[nn.Module, type[swap.Swapped], dict]] = []
    without_mask = backends_without_mask()
    for decoder in found:
        if decoder.in_the_way and not allow_partial:
            raise UnsupportedModelError(
                f"{type(decoder.module).__name__} can't be made fully bidirectional: {len(decoder.in_the_way)} of its "
                f"{len(decoder.layers)} layers mix tokens by other means than attention ({'; '.join(decoder.in_the_way)}). "
                "allow_partial=True patches its attention layers all the same"
            )
        config = text_config(decoder.module.config)
        reaches = decoder.reaches
        for _, attention, reach in decoder.attentions:
            cls = swap.subclass(type(attention), BidirectionalAttention)
            attributes = attention_attributes(attention, reach, reaches, config, without_mask)
            plan.append((attention, BidirectionalAttention, {**attributes, **rebound_forward(attention, cls)}))
        for module in (decoder.module, *decoder.builders):
            if swap.is_swapped(module, BidirectionalModel) or any(module is m for m, _, _ in plan):
                continue  # a builder around two decoders
            cls = swap.subclass(type(module), BidirectionalModel)
            attributes = {"_bidirect_patch_reaches": reaches, **rebound_forward(module, cls)}
            plan.append((module, BidirectionalModel, attributes))
    for module, _, _ in plan:
        _check_not_sharded(module)
    guards.prove(found)
    guards.install()
    for module, mixin, attributes in plan:
        swap.swap(module, mixin, attributes)


def _disable(found: list[Decoder]) -> None:
    modules: list[tuple[nn.Module, type[swap.Swapped]]] = []
    for decoder in found:
        modules += [(a, BidirectionalAttention) for _, a, _ in decoder.attentions]
        for module in (decoder.module, *decoder.builders):
            if swap.is_swapped(module, BidirectionalModel) and all(module is not m for m, _ in modules):
                modules.append((module, BidirectionalModel))
    for module, mixin in modules:
        swap.check_restorable(module, mixin)
    for module, mixin in modules:
        swap.restore(module, mixin)


def _check_not_sharded(module: nn.Module) -> None:
    if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
        raise OrderError(
            f"{type(module).__name__} is already sharded by fully_shard: call enable_bidirectional(model) first, then shard"
        )
