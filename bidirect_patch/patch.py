"""The patch: make a model's attention bidirectional, undo it, ask for it."""

from typing import TypeVar

from torch import nn

from .block import Block
from .checks import check_free, check_not_native, check_not_sharded
from .errors import ArgumentError
from .model.decoder import Decoder
from .model.find import Survey, check_module, survey
from .model.sinks import NO_SINKS, Sinks, read_sinks
from .swap import in_use
from .swap.modes import Mode, Setting
from .transition import setting_to_come, stays_in_block, to_as_loaded, to_bidirectional
from .verify import mode

Model = TypeVar("Model", bound=nn.Module)


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
    with in_use.lock:
        seen = survey(model)
        _enable(seen, [decoder.with_sinks(sinks) for decoder in seen.decoders], allow_partial)
    return model


def enable_with_sinks_found(model: Model) -> Model:
    """`enable_bidirectional` with the sink tokens that each decoder in `model` has already; with none if it has none."""
    with in_use.lock:
        seen = survey(model)
        _enable(seen, [decoder.as_patched() for decoder in seen.decoders], False)
    return model


def enable_after_blocks(model: nn.Module, sinks: Sinks) -> None:
    """`enable_bidirectional`; a decoder in a block of the caller keeps the block's mode, and is enabled when the last block ends.

    For what was loaded into a model: it stays there when the block ends, so its mode does too. Where only others hold a block,
    the caller would run the model in their mode without a word: that is a ModeConflictError, as `enable_bidirectional` has it.
    """
    with in_use.lock:
        seen = survey(model)
        wanted = [decoder.with_sinks(sinks) for decoder in seen.decoders]
        later = [decoder for decoder in wanted if in_use.caller_holds(decoder.module)]
        now = [decoder for decoder in wanted if not in_use.caller_holds(decoder.module)]
        settings = [setting_to_come(decoder) for decoder in later]
        _enable(seen, now, False)
        for decoder, setting in zip(later, settings):
            if in_use.caller_holds(decoder.module):
                in_use.set_after_all(decoder.module, setting)
            else:  # a block that nobody kept is gone by now
                _enable(seen, [decoder], False)


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
    with in_use.lock:
        seen = survey(model)
        for decoder in seen.decoders:
            check_free(decoder, Setting(Mode.AS_LOADED))
            check_not_native(decoder)
        to_as_loaded(seen, [decoder for decoder in seen.decoders if not stays_in_block(decoder)])
        for decoder in seen.decoders:
            in_use.set_after_others(decoder.module, Setting(Mode.AS_LOADED))
    return model


def bidirectional(
    model: Model,
    enabled: bool = True,
    *,
    num_sink_tokens: int = 0,
    num_sinkless_layers: int = 0,
    allow_partial: bool = False,
) -> Block[Model]:
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
    return Block(model, Setting(Mode.BIDIRECTIONAL, sinks) if enabled else Setting(Mode.CAUSAL_BLOCK), allow_partial)


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
    check_module(model)
    return mode.is_bidirectional(model)


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, got {value!r}")


def _enable(seen: Survey, wanted: list[Decoder], allow_partial: bool) -> None:
    """Make a model bidirectional for good: also after blocks of others that are open now."""
    check_not_sharded(seen)
    for decoder in wanted:
        check_free(decoder, Setting(Mode.BIDIRECTIONAL, decoder.sinks))
    to_bidirectional(seen, wanted, allow_partial)
    for decoder in wanted:
        in_use.set_after_others(decoder.module, decoder.setting)
