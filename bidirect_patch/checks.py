"""Checks of a model's state (who uses it, what other tools did to it), which `patch`, `block` and `transition` call.

Each raises an error of the family, and nothing is changed. Kinds of models that nothing can mend: `model.refusals`. A forward
that was put on before the patch: `swap.instance_forward`; a class that another tool changed: `swap.apply`.
"""

from collections.abc import Iterable

from .errors import OrderError, UnsupportedModelError
from .model.config import says_bidirectional
from .model.decoder import Decoder
from .model.find import Survey
from .model.walk import name_and_class
from .swap import in_use
from .swap.classes import is_sharded
from .swap.instance_forward import calls_the_patch, name_and_place
from .swap.modes import Setting
from .swap.record import before_patch, record_of
from .verify.proof import native_attention


def check_free(decoder: Decoder, wanted: Setting) -> None:
    """Raise ModeConflictError if another thread or task needs a decoder in another mode."""
    in_use.check(decoder.module, wanted, decoder.setting)


def check_not_sharded(seen: Survey) -> None:
    """Raise OrderError if a model or a part of it that isn't patched yet is sharded."""
    if all(decoder.is_patched for decoder in seen.decoders):
        return
    # One rule for both kinds of FSDP and for every part that was sharded, though not every mixture would go wrong.
    for name, module in seen.named:
        if is_sharded(type(module)):
            raise OrderError(
                f"{name_and_class(name, module)} is already sharded by FSDP: call enable_bidirectional(model) first, then shard"
            )


def check_not_native(decoder: Decoder) -> None:
    """Raise OrderError if a decoder is bidirectional by its config, so that nothing here can make it causal for good."""
    if decoder.is_in_block:  # in which its config is a view that says it is causal
        native = in_use.only_others_hold(decoder.module) and says_bidirectional(before_patch(decoder.module, "config"))
    else:
        native = native_attention(decoder) != "causal"
    if native:
        raise OrderError(
            f"{type(decoder.module).__name__} is bidirectional by its config, so that undoing the patch would not make it "
            "causal: load it with is_causal=True (Gemma: use_bidirectional_attention=False), or use a causal block where one can "
            "be had, `with bidirectional(model, enabled=False):`"
        )


def check_supported(found: Iterable[Decoder], allow_partial: bool) -> None:
    """Raise UnsupportedModelError if a layer of a decoder would stay causal; see `model.refusals`."""
    for decoder in found:
        if decoder.refusals and not allow_partial:
            raise UnsupportedModelError(
                f"{type(decoder.module).__name__} can't be made fully bidirectional, since this mixes tokens by other means than "
                f"causal attention: {'; '.join(map(str, decoder.refusals))}. allow_partial=True patches its attention layers all "
                "the same"
            )


def check_forwards(found: Iterable[Decoder]) -> None:
    """Raise OrderError if another tool's forward on an instance goes around the patch."""
    for module in (module for decoder in found for module in decoder.modules):
        if record_of(module) is not None and not calls_the_patch(module):
            by = name_and_place(module.__dict__.get("forward"))
            raise OrderError(
                f"{type(module).__name__}.forward was replaced on the instance by {by}, and nothing shows that this "
                "calls the patched forward: take it off, or call disable_bidirectional first"
            )
