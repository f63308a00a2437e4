"""The patch: make a model's attention bidirectional, undo it, ask for it."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ContextDecorator
from enum import Enum
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import nn

from .attention.handling import possible_handlings
from .attention.labels import unwatch_labels, watch_labels
from .attention.model_forward import CausalBlock
from .attention.plan import MIXINS, bidirectional_plans, causal_block_plans
from .attention.recompute import forget_checkpoints
from .checkpoints import hooks
from .checkpoints.pickled import Pickled, pickled_plan
from .errors import ArgumentError, OrderError, UnsupportedModelError
from .model.find import Decoder, decoders, says_bidirectional, with_sinks, with_sinks_as_far_as_layers_go
from .model.sinks import NO_SINKS, Sinks, read_sinks
from .model.walk import modules_of
from .swap import modes
from .swap.apply import Change, apply, commit, prepare
from .swap.classes import Swapped, has_mixin, is_sharded
from .swap.instance_forward import calls_the_patch, name_and_place
from .swap.plan import Plan, before_patch, plans_of, record_of
from .verify.late import Unverified, is_unverified, unverified_plan, verify_now
from .verify.state import (
    as_patched,
    attends_both_ways,
    decoder_modules,
    has_any_patch,
    is_patched,
    is_verified_patch,
    sinks_of,
)
from .verify.verify import is_natively_bidirectional, verify

Model = TypeVar("Model", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])


def enable_bidirectional(
    model: Model, *, num_sink_tokens: int = 0, num_sinkless_layers: int = 0, allow_partial: bool = False
) -> Model:
    """Make every attention layer of `model` bidirectional, in place. Idempotent, like `model.train()`.

    Each attention module and each model that makes the mask gets a dynamic subclass of its own class. No weight, config or
    class is changed. While it is bidirectional, a model has no KV cache and no `generate`. The class is verified once, on a small
    random model. If the weights are on the meta device, or the kernel needs another device, the model is verified at its first
    forward.

    Args:
        model: any nn.Module that holds a transformers decoder: a `*ForCausalLM`, a bare `*Model`, a PEFT, DDP or compiled
            wrapper, a module of your own.
        allow_partial: also patch a hybrid model, in which only some layers use attention. Its other layers stay causal, and
            `is_bidirectional` stays False. Also accept a model that can't be verified.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: a layer can't be made bidirectional; the message names it. Nothing is changed, here and below.
        ArgumentError: `num_sink_tokens` or `num_sinkless_layers` is no int of 0 or more, or more layers than there are, or layers
            without sink tokens.
        ModeConflictError: another thread or task needs the model causal, or with other sink tokens.
        OrderError: the model or a part of it is already sharded.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...                                num_attention_heads=4))
        >>> is_bidirectional(enable_bidirectional(model))
        True
    """
    _check_flags(allow_partial=allow_partial)
    sinks = read_sinks(num_sink_tokens, num_sinkless_layers)
    _enable_for_good(model, [with_sinks(decoder, sinks) for decoder in decoders(model)], allow_partial)
    return model


def enable_with_sinks_found(model: Model) -> Model:
    """`enable_bidirectional` with the sink tokens that each decoder in `model` has already; with none if it has none."""
    _enable_for_good(model, [as_patched(decoder) for decoder in decoders(model)], False)
    return model


def disable_bidirectional(model: Model) -> Model:
    """The exact way back from `enable_bidirectional`, in place. Idempotent.

    Args:
        model: what `enable_bidirectional` was given.

    Returns:
        The same object.

    Raises:
        ForeignWrapperError: another tool changed a module's class after the patch (fully_shard, parametrize). Nothing is
            changed, here and below.
        ModeConflictError: another thread or task needs the model bidirectional.
        OrderError: the model is bidirectional by its config, so that nothing here can make it causal.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...                                num_attention_heads=4))
        >>> is_bidirectional(disable_bidirectional(enable_bidirectional(model)))
        False
    """
    found = decoders(model)
    with modes.lock:
        _check_modes(found, False)
        for decoder in found:
            _check_not_native(decoder)
        _take_off(model, [decoder for decoder in found if not _stays_in_block(decoder)], found)
        for decoder in found:
            modes.set_after_others(decoder.module, Found(State.AS_LOADED, NO_SINKS, False))
    return model


def bidirectional(
    model: Model,
    enabled: bool = True,
    *,
    num_sink_tokens: int = 0,
    num_sinkless_layers: int = 0,
    allow_partial: bool = False,
) -> "Block[Model]":
    """`with bidirectional(model):` makes a model bidirectional for a block. The state found on entry is brought back after it.

    Blocks nest, and an exception ends them too. `with bidirectional(model, enabled=False):` is a causal block, for `generate`
    for example, also in a model that is bidirectional by its config. Threads and asyncio tasks may share a model in one mode;
    the last block to end brings back what the first one found. While one of them is in a causal block of a bidirectional
    model, a forward of another one raises ModeConflictError.

    Args:
        model: as for `enable_bidirectional`.
        enabled: whether the block is bidirectional or causal.
        num_sink_tokens: as for `enable_bidirectional`; 0 for a causal block.
        num_sinkless_layers: as for `enable_bidirectional`; 0 for a causal block.
        allow_partial: as for `enable_bidirectional`.

    Returns:
        A context manager, also usable as a decorator, that gives `model`. Entering it raises what `enable_bidirectional` and
        `disable_bidirectional` raise.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...                                num_attention_heads=4))
        >>> with bidirectional(model):
        ...     is_bidirectional(model)
        True
        >>> is_bidirectional(model)
        False
    """
    _check_flags(enabled=enabled, allow_partial=allow_partial)
    sinks = read_sinks(num_sink_tokens, num_sinkless_layers)
    if not enabled and sinks != NO_SINKS:
        raise ArgumentError(f"a causal block has no sink tokens, got {sinks.in_words}: leave them out")
    return Block(model, sinks if enabled else False, allow_partial)


def is_bidirectional(model: nn.Module) -> bool:
    """Whether every layer of every decoder in `model` attends in both directions.

    By the patch, or by a config that asks for it (`is_causal: false`, Gemma's `use_bidirectional_attention`) on a transformers
    that does so for this architecture. Every attention module and every model that makes a mask is looked at.
    `attention_report(model)` runs the model instead.

    Args:
        model: as for `enable_bidirectional`.

    Raises:
        UnsupportedModelError: `model` is no nn.Module.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> is_bidirectional(LlamaModel(LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...                                         num_attention_heads=4)))
        False
    """
    try:
        found = decoders(model)
    except UnsupportedModelError:
        if isinstance(model, nn.Module):
            return False
        raise
    return all(map(attends_both_ways, found))


_MIXINS = {*MIXINS, Unverified, Pickled}  # what the patch puts on modules


class State(Enum):
    """What a decoder is, as far as the patch goes."""

    AS_LOADED = "as loaded"
    BIDIRECTIONAL = "bidirectional"
    CAUSAL_BLOCK = "in a causal block"


class Found(NamedTuple):
    """What a decoder was found to be."""

    state: State
    sinks: Sinks
    is_unverified: bool


class Block(ContextDecorator, Generic[Model]):
    """What `bidirectional` returns: enters a mode, and brings back the state found."""

    def __init__(self, model: Model, mode: "Sinks | Literal[False]", allow_partial: bool) -> None:
        self.model, self.mode, self.allow_partial = model, mode, allow_partial
        self._entered: list[tuple[Decoder, modes.Hold]] = []

    def _recreate_cm(self) -> "Block[Model]":  # each call of a decorated function is a block of its own
        return Block(self.model, self.mode, self.allow_partial)

    def __enter__(self) -> Model:
        found = [with_sinks(decoder, self.mode or NO_SINKS) for decoder in decoders(self.model)]
        if self._entered:
            raise OrderError("this block is entered already: call bidirectional(model) anew for each `with`")
        try:
            with modes.lock:
                _check_modes(found, self.mode)
                before = [_now(decoder) for decoder in found]
                for decoder, state in zip(found, before):
                    self._entered.append((decoder, modes.hold(decoder.module, self.mode, state, self)))
                if self.mode:
                    _check_not_sharded(self.model, found)
                    _enable(self.model, found, found, self.allow_partial)
                else:
                    commit([change for decoder in found for change in _to_causal_block(self.model, decoder, found)])
        except BaseException:
            self._leave_for_sure()
            raise
        return self.model

    def __exit__(self, *exception: object) -> None:
        self._leave_for_sure()

    def __call__(self, function: Function) -> Function:
        """The block as a decorator."""
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ArgumentError(
                f"{function.__qualname__} returns before its body runs, so that the block would be over by then: open the block "
                "inside it, `with bidirectional(model):`"
            )
        return super().__call__(function)

    def _leave_for_sure(self) -> None:
        """Leave, and only then raise what interrupted it (KeyboardInterrupt, SystemExit)."""
        interrupt: BaseException | None = None
        while self._entered:
            try:
                self._leave()
            except Exception:
                raise
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _leave(self) -> None:
        """Bring back what each decoder was, whatever happens to the others."""
        errors: list[Exception] = []
        found = [decoder for decoder, _ in self._entered]
        with modes.lock:
            while self._entered:
                decoder, hold = self._entered[-1]
                try:
                    before = modes.to_restore(decoder.module, hold)
                    if before is not None:
                        _bring_back(self.model, decoder, before, found)
                except Exception as error:
                    errors.append(error)
                modes.release(decoder.module, hold)
                self._entered.pop()
        if errors:
            raise errors[0]


def _state(decoder: Decoder) -> State:
    if has_mixin(decoder.module, CausalBlock):
        return State.CAUSAL_BLOCK
    return State.BIDIRECTIONAL if is_patched(decoder) else State.AS_LOADED


def _now(decoder: Decoder) -> Found:
    return Found(_state(decoder), sinks_of(decoder), is_unverified(decoder))


def _stays_in_block(decoder: Decoder) -> bool:
    """Whether a decoder is in a causal block, or is a copy from one of a model that is bidirectional by its config."""
    if _state(decoder) is not State.CAUSAL_BLOCK:
        return False
    return bool(modes.state_of(decoder.module).holds) or says_bidirectional(before_patch(decoder.module, "config"))


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, got {value!r}")


def _check_modes(found: list[Decoder], mode: "Sinks | Literal[False]") -> None:
    for decoder in found:
        modes.check(decoder.module, mode, _state(decoder) is State.BIDIRECTIONAL and sinks_of(decoder))


def _enable_for_good(model: nn.Module, found: list[Decoder], allow_partial: bool) -> None:
    with modes.lock:
        for decoder in found:
            _check_modes([decoder], decoder.sinks)
        _check_not_sharded(model, found)
        _enable(model, found, found, allow_partial)
        for decoder in found:
            modes.set_after_others(decoder.module, Found(State.BIDIRECTIONAL, decoder.sinks, is_unverified(decoder)))


def _enable(
    model: nn.Module,
    wanted: list[Decoder],
    found: list[Decoder],
    allow_partial: bool,
    unverified: Sequence[Decoder] = (),
) -> None:
    """Check, verify, plan, apply; for those of the `wanted` decoders that aren't wholly bidirectional with their sinks yet."""
    changing = [decoder for decoder in wanted if not _is_as_wanted(decoder)]
    if not changing:
        return
    _check_supported(changing, allow_partial)
    _check_forwards(changing)
    handlings = [verify(decoder, on_trust=allow_partial) for decoder in changing]
    hooks.install()
    add: list[tuple[nn.Module, Plan]] = []
    for decoder, handling in zip(changing, handlings):
        add += bidirectional_plans(decoder, handling or possible_handlings(decoder)[0])
        add.append(pickled_plan(decoder.module))
        if decoder in unverified or (handling is None and not allow_partial):
            add.append(unverified_plan(decoder))
    mixins = _patch_of(model, changing, found)
    before = [(module, plan) for module, mixin in mixins for plan in plans_of(module) if plan.mixin is mixin]
    apply(add, mixins)
    try:
        watch_labels(model)
        for decoder, handling in zip(changing, handlings):
            if handling is None and not allow_partial and not decoder.is_on_meta:
                verify_now(decoder.outermost, even_on_meta=False)
    except BaseException:
        _take_off(model, changing, found)
        apply(before)  # other sinks, where there were some
        raise


def _is_as_wanted(decoder: Decoder) -> bool:
    return is_verified_patch(decoder) and sinks_of(decoder) == decoder.sinks


def _take_off(model: nn.Module, going: list[Decoder], found: list[Decoder]) -> None:
    """Undo the patch of the decoders in `going`."""
    apply(remove=_patch_of(model, going, found))
    for decoder in going:
        forget_checkpoints(decoder.module)
    unwatch_labels(model)


def _patch_of(model: nn.Module, going: list[Decoder], found: list[Decoder]) -> list[tuple[nn.Module, type[Swapped]]]:
    """All that the patch put on modules for the decoders in `going`, and around them if no other of `found` keeps it."""
    modules = {id(module): module for decoder in going for module in decoder_modules(decoder)}
    staying = [decoder for decoder in found if id(decoder.module) not in modules and has_any_patch(decoder)]
    if not staying:
        modules |= {id(module): module for module in modules_of(model)}
    kept = {id(module) for decoder in staying for module in decoder_modules(decoder)}
    return [
        (module, plan.mixin)
        for key, module in modules.items()
        if key not in kept and (record := record_of(module)) is not None
        for plan in record.plans
        if plan.mixin in _MIXINS
    ]


def _to_causal_block(model: nn.Module, decoder: Decoder, found: list[Decoder]) -> list[Change]:
    """What has to change for `decoder` to be causal within a block; nothing if it is causal already."""
    if _state(decoder) is State.CAUSAL_BLOCK or not (has_any_patch(decoder) or is_natively_bidirectional(decoder)):
        return []
    plans = [*causal_block_plans(model, decoder), pickled_plan(decoder.module)]
    return prepare(plans, _patch_of(model, [decoder], found))


def _bring_back(model: nn.Module, decoder: Decoder, before: Found, found: list[Decoder]) -> None:
    """Bring one decoder to what a block found."""
    if before.state is State.BIDIRECTIONAL:
        # As it was found, and as it is now: a layer may have been taken out, put in or wrapped within the block.
        for each in (decoder, *(now for now in decoders(model) if now.module is decoder.module)):
            each = with_sinks_as_far_as_layers_go(each, before.sinks)
            _enable(model, [each], found, True, [each] if before.is_unverified else [])
    elif before.state is State.CAUSAL_BLOCK:
        commit(_to_causal_block(model, decoder, found))
    else:
        _take_off(model, [decoder], found)


def _check_supported(found: Iterable[Decoder], allow_partial: bool) -> None:
    for decoder in found:
        if decoder.unsupported_layers and not allow_partial:
            raise UnsupportedModelError(
                f"{type(decoder.module).__name__} can't be made fully bidirectional, since this mixes tokens by other means than "
                f"causal attention: {'; '.join(decoder.unsupported_layers)}. allow_partial=True patches its attention layers all "
                "the same"
            )


def _check_not_sharded(model: nn.Module, found: list[Decoder]) -> None:
    if all(map(is_patched, found)):
        return
    # One rule for both kinds of FSDP and for every part that was sharded, though not every mixture would go wrong.
    for module in modules_of(model):
        if is_sharded(type(module)):
            name = next(name for name, each in model.named_modules() if each is module)
            raise OrderError(
                f"{f'{name} ({type(module).__name__})' if name else type(module).__name__} is already sharded by FSDP: call "
                "enable_bidirectional(model) first, then shard"
            )


def _check_forwards(found: Iterable[Decoder]) -> None:
    for module in (module for decoder in found for module in decoder_modules(decoder)):
        if record_of(module) is not None and not calls_the_patch(module):
            by = name_and_place(module.__dict__.get("forward"))
            raise OrderError(
                f"{type(module).__name__}.forward was replaced on the instance by {by}, and nothing shows that this "
                "calls the patched forward: take it off, or call disable_bidirectional first"
            )


def _check_not_native(decoder: Decoder) -> None:
    if _state(decoder) is State.CAUSAL_BLOCK:  # in which its config is a view that says it is causal
        native = modes.only_others_hold(decoder.module) and says_bidirectional(before_patch(decoder.module, "config"))
    else:
        native = is_natively_bidirectional(decoder)
    if native:
        raise OrderError(
            f"{type(decoder.module).__name__} is bidirectional by its config, so that undoing the patch would not make it "
            "causal: load it with is_causal=True (Gemma: use_bidirectional_attention=False), or use a causal block, `with "
            "bidirectional(model, enabled=False):`"
        )
