"""The patch: make a model's attention bidirectional, undo it, ask for it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from .verify import verify as guards
from .checkpoints import hooks
from .swap import swap
from .swap import modes as switch
from .errors import OrderError, UnsupportedModelError
from .model.find import Decoder, causal_flags, decoders
from .attention.forms import Form, forms
from .attention.forward import (
    BidirectionalAttention,
    BidirectionalModel,
    BidirectionalPart,
    ConfigView,
    attention_attributes,
    rebound_forward,
    text_config,
)
from .attention.mirror import mirrored_buffer, triangular_buffers

Model = TypeVar("Model", bound=nn.Module)


def enable_bidirectional(model: Model, *, allow_partial: bool = False) -> Model:
    """Make every attention layer of `model` bidirectional, in place, and return `model`.

    model: any nn.Module that holds a transformers decoder: a `*ForCausalLM`, a bare `*Model`, a PEFT, DDP or compiled
        wrapper, your own module. Idempotent, like `model.train()`.
    allow_partial: patch the attention layers of a hybrid too, whose other layers stay causal; `is_bidirectional` then
        stays False. And take a model on trust of which nothing can be seen at work.

    Each attention instance and the model that builds the mask get a dynamic subclass of their own class; no weight,
    config or class is touched. While bidirectional there is no KV cache and no `generate`. The class is proven on a small
    random model once; what can't run yet (weights on meta, a kernel of another device) is proven at its first forward.

    Raises UnsupportedModelError, before anything is changed, if a layer can't be made bidirectional, naming it;
    ModeConflictError if another thread needs the model causal; OrderError if it or a part of it is already sharded.
    """
    found = decoders(model)
    with switch.lock:
        _check(model, found, True)
        _set(found, True, allow_partial)
    return model


def disable_bidirectional(model: Model) -> Model:
    """The exact way back from `enable_bidirectional`, in place; returns `model`. Idempotent.

    Raises ForeignWrapperError if another tool swapped a module's class after us (fully_shard, parametrize), and
    ModeConflictError if another thread needs the model bidirectional; nothing is changed then.
    """
    found = decoders(model)
    with switch.lock:
        _check(model, found, False)
        _set(found, False)
    return model


@contextmanager
def bidirectional(model: Model, enabled: bool = True, *, allow_partial: bool = False) -> Iterator[Model]:
    """`with bidirectional(model):` for a block; the state found on entry is restored, after an exception too.

    Blocks nest: `with bidirectional(model, enabled=False):` is a causal island (for `generate`) inside one, also in a model
    that is bidirectional by its config. Threads and asyncio tasks may share a model in one mode; the last one out
    restores what the first one found.
    """
    found = decoders(model)
    with switch.lock:
        _check(model, found, enabled)
        causal = {} if enabled else {id(d): _causal_config(model, d) for d in found}  # may raise, so before all else
        modes = [_is_on(d) for d in found]
        _set(found, enabled, allow_partial)
        holders = [
            switch.enter(d.module, enabled, partial(_undo, d, mode, _put(causal.get(id(d), ()))))
            for d, mode in zip(found, modes)
        ]
    try:
        yield model
    finally:
        with switch.lock:
            for decoder, holder in zip(found, holders):
                switch.leave(decoder.module, holder)


def _undo(decoder: Decoder, mode: bool, configs: list[tuple[nn.Module, Any]]) -> None:
    """What a block does to one decoder at its end."""
    _put(configs)
    _set([decoder], mode, True)


def _causal_config(model: nn.Module, decoder: Decoder) -> list[tuple[nn.Module, Any]]:
    """For an island in a model that is bidirectional by its config: which modules get which config in its stead."""
    config = decoder.module.config
    if not guards.natively_bidirectional(decoder):
        return []
    if decoder.builders or config is not text_config(config):
        raise OrderError(
            f"the config of {type(decoder.module).__name__} says is_causal: false, and the model around it reads that too, so "
            "that no block can make it causal: load it with is_causal=True in its text config, then enable_bidirectional"
        )
    view = ConfigView(config, is_causal=True)
    return [(module, view) for module in model.modules() if module.__dict__.get("config") is config]


def _put(configs: Iterable[tuple[nn.Module, Any]]) -> list[tuple[nn.Module, Any]]:
    """Give each module its config; those that they had."""
    before = []
    for module, config in configs:
        before.append((module, module.__dict__["config"]))
        module.__dict__["config"] = config
    return before


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


def _check(model: nn.Module, found: list[Decoder], mode: bool) -> None:
    for decoder in found:
        switch.check(decoder.module, mode, _is_on(decoder))
    if mode and not all(map(_is_on, found)):
        _check_not_sharded(model)


def _set(found: list[Decoder], mode: bool, allow_partial: bool = False) -> None:
    changing = [d for d in found if _is_on(d) != mode]
    if not changing:
        return
    if mode:
        _enable(changing, allow_partial)
    else:
        _disable(changing)


def _enable(found: list[Decoder], allow_partial: bool) -> None:
    for decoder in found:
        if decoder.in_the_way and not allow_partial:
            raise UnsupportedModelError(
                f"{type(decoder.module).__name__} can't be made fully bidirectional, since this mixes tokens by other means "
                f"than causal attention: {'; '.join(decoder.in_the_way)}. "
                "allow_partial=True patches its attention layers all the same"
            )
    proven = [guards.prove(d, _enable_small) for d in found]
    install_hooks()
    _swap(found, [form or forms(d)[0] for d, form in zip(found, proven)])
    try:
        for decoder, form in zip(found, proven):
            if form is None and not allow_partial and not guards.prove_itself(decoder):
                guards.subject(decoder).__dict__["_bidirect_patch_proof"] = _prove_at_first_forward
    except BaseException:
        _disable(found)
        raise


def install_hooks(_: Any = None) -> None:
    """Put the hooks on generate, save and load in place, once; here, so that imports go one way."""
    hooks.install(enable_bidirectional, is_bidirectional)


def _prove_at_first_forward(model: nn.Module) -> bool:
    """The proof that enabling had to leave out, on what can run by now; False if still nothing could be seen."""
    seen = True
    for decoder in (d for d in decoders(model) if guards.subject(d) is model):
        form = guards.prove(decoder, _enable_small, anyhow=True)
        if form is None:
            seen = guards.prove_itself(decoder) and seen
            continue
        for module in (decoder.module, *decoder.builders):
            module.__dict__["_bidirect_patch_form"] = form
        for _, attention, reach in decoder.attentions:
            attention.__dict__.update(attention_attributes(decoder, attention, reach, form))
    return seen


def _enable_small(small: nn.Module, cls: type, form: Form) -> None:
    found = decoders(small)
    _swap(found, [form if type(d.module) is cls else forms(d)[0] for d in found])


def _swap(found: list[Decoder], their_forms: list[Form]) -> None:
    # all of them before the first: one may raise, and one builder may serve two decoders
    steps = {id(step.module): step for decoder, form in zip(found, their_forms) for step in _steps(decoder, form)}
    for step in steps.values():
        swap.swap(step.module, step.mixin, step.attributes, step.buffers)


class _Step(NamedTuple):
    """What enabling does to one module."""

    module: nn.Module
    mixin: type[swap.Swapped]
    attributes: dict[str, Any]
    buffers: dict[str, Tensor]


def _steps(decoder: Decoder, form: Form) -> Iterator[_Step]:
    for _, attention, reach in decoder.attentions:
        cls = swap.subclass(type(attention), BidirectionalAttention)
        attributes = {**attention_attributes(decoder, attention, reach, form), **rebound_forward(attention, cls)}
        yield _Step(attention, BidirectionalAttention, attributes, _mirrored(attention))
        for part in attention.modules():
            flags, buffers = dict.fromkeys(causal_flags(part), False), _mirrored(part)
            if part is not attention and (flags or buffers):
                yield _Step(part, BidirectionalPart, flags, buffers)
    for module in (decoder.module, *decoder.builders):
        if not swap.is_swapped(module, BidirectionalModel):
            cls = swap.subclass(type(module), BidirectionalModel)
            attributes = {"_bidirect_patch_reaches": decoder.reaches, "_bidirect_patch_form": form, "_bidirect_patch_proof": None}
            attributes |= {**dict.fromkeys(causal_flags(module), False), **rebound_forward(module, cls)}
            yield _Step(module, BidirectionalModel, attributes, _mirrored(module))


def _mirrored(module: nn.Module) -> dict[str, Tensor]:
    if any(buffer.is_meta for buffer in triangular_buffers(module).values()):
        raise OrderError(f"{type(module).__name__} keeps its causal mask in a buffer, which is on meta: load the model first")
    return {name: mirrored_buffer(buffer) for name, buffer in triangular_buffers(module).items()}


def _disable(found: list[Decoder]) -> None:
    models = [m for d in found for m in (d.module, *d.builders)]
    parts = [p for d in found for _, a, _ in d.attentions for p in a.modules()]
    mixins = (BidirectionalModel, BidirectionalAttention, BidirectionalPart)
    undo = {id(m): (m, mixin) for m in (*models, *parts) for mixin in mixins if swap.is_swapped(m, mixin)}
    for module, mixin in undo.values():
        swap.check_restorable(module, mixin)
    for module, mixin in undo.values():
        swap.restore(module, mixin)


def _check_not_sharded(model: nn.Module) -> None:
    # One rule for both kinds of FSDP and for every part that was sharded, though not every mixture would go wrong.
    for name, module in model.named_modules():
        if swap.is_sharded(type(module)):
            raise OrderError(
                f"{f'{name} ({type(module).__name__})' if name else type(module).__name__} is already sharded by FSDP: call "
                "enable_bidirectional(model) first, then shard"
            )
