"""Whether a model has the attention and sinks that a loaded adapter or checkpoint was trained with; what to say if not."""

from collections.abc import Iterable

from torch import nn

from ..errors import UnsupportedModelError, warn_user
from ..model.config import says_bidirectional
from ..model.decoder import Decoder
from ..model.find import decoders
from ..model.sinks import NO_SINKS, Sinks
from ..swap import in_use
from ..swap.modes import Mode, Setting
from ..swap.record import before_patch
from ..verify.mode import is_verified_patch
from ..verify.proof import native_attention

State = Sinks | str  # the sinks of a bidirectional decoder, or in words what else it is
_CAUSAL, _IN_PART = "causal", Mode.MIXED.value


def warn_of_misfit(what: str, verb: str, model: nn.Module, sinks: Sinks) -> None:
    """Warn if the model attends otherwise than what was loaded was trained for, now and after the blocks that are open.

    Args:
        what: was loaded.
        verb: how, "is loaded as" or "is loaded onto".
        model: that has it now.
        sinks: with which it was trained.
    """
    try:
        with in_use.lock:
            found = decoders(model)
            now, later = [_now(decoder) for decoder in found], [_after_blocks(decoder) for decoder in found]
    except UnsupportedModelError:
        return warn_user(
            f"{what} was trained with bidirectional attention, and {verb} a {type(model).__name__}, which has no decoder that "
            "could be made bidirectional: load it onto the model that it was trained on"
        )
    if all(sinks in states for states in zip(now, later)):
        return None
    is_held = any(state is not None for state in later)
    numbers = "" if sinks == NO_SINKS else f", {sinks.in_words}"
    partial = ", allow_partial=True" * any(decoder.refusals for decoder in found)
    it = f"a model that is {_in_words(now)}"
    if is_held:
        it += f" within a block, and {_in_words(a if b is None else b for a, b in zip(now, later))} after it"
    call = f"enable_bidirectional(model{numbers}{partial}){' after the block' * is_held}"
    return warn_user(
        f"{what} was trained with bidirectional attention and {sinks.described}, and {verb} {it}: call {call}, or import "
        "bidirect_patch.auto before loading"
    )


def sinks_for_good(model: nn.Module) -> Sinks:
    """The sinks of the first decoder in `model` that has some, now or, within blocks, after these; none if none has any."""
    with in_use.lock:
        states = [_now(each) if (after := _after_blocks(each)) is None else after for each in decoders(model)]
    return next((state for state in states if isinstance(state, Sinks) and state != NO_SINKS), NO_SINKS)


def _now(decoder: Decoder) -> State:
    if is_verified_patch(decoder):
        return Sinks(*decoder.setting.sinks)
    if decoder.is_in_block:
        return _CAUSAL
    if decoder.is_patched:
        return "bidirectional by code that has changed since it was verified"
    return _IN_PART if decoder.is_mixed else _as_loaded(decoder)


def _after_blocks(decoder: Decoder) -> State | None:
    """What a decoder will be after the blocks that hold it; None if none does."""
    setting: Setting | None = in_use.after_all(decoder.module)
    if setting is None:
        return None
    if setting.mode in (Mode.BIDIRECTIONAL, Mode.UNVERIFIED):
        return Sinks(*setting.sinks)
    return _IN_PART if setting.mode is Mode.MIXED else _as_loaded(decoder)


def _as_loaded(decoder: Decoder) -> State:
    if decoder.is_in_block:  # in which its config is a view that says it is causal
        return NO_SINKS if says_bidirectional(before_patch(decoder.module, "config")) else _CAUSAL
    native = native_attention(decoder)
    return NO_SINKS if native == "bidirectional" else _CAUSAL if native == "causal" else _IN_PART


def _in_words(states: Iterable[State]) -> str:
    words = (each if isinstance(each, str) else f"bidirectional with {each.described}" for each in states)
    return " and ".join(dict.fromkeys(words))
