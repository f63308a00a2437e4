"""The steps of a change of mode, for the decoders of one model. Call each with `in_use.lock` held."""

from collections.abc import Mapping, Sequence

from torch import nn

from .attention.labels import unwatch_labels, watch_labels, watch_only, watched_among
from .attention.plan import MIXINS, OF_ATTENTION, bidirectional_plans, causal_block_plans
from .attention.recompute import forget_checkpoints
from .checkpoints import hooks
from .checkpoints.pickled import Pickled, pickled_plan
from .checks import check_forwards, check_supported
from .model.config import says_bidirectional
from .model.decoder import Decoder
from .model.find import Survey, decoders
from .model.sinks import Sinks
from .swap import in_use
from .swap.apply import Change, apply, commit, prepare
from .swap.classes import Swapped
from .swap.modes import Mode, Setting
from .swap.record import Found, Plan, before_patch, plans_of, plans_on, record_of
from .verify.late import Unverified, unverified_plan, verify_now
from .verify.mode import is_verified_patch
from .verify.proof import native_attention, verify

_MIXINS = {*MIXINS, Unverified, Pickled}  # what the patch puts on modules


def to_bidirectional(
    seen: Survey, wanted: list[Decoder], allow_partial: bool = False, unverified: Sequence[Decoder] = ()
) -> None:
    """Make the `wanted` decoders of a model bidirectional with their sinks, those that aren't so yet.

    Args:
        seen: the model.
        wanted: some of its decoders.
        allow_partial: see `enable_bidirectional`.
        unverified: decoders that are to be verified at their first forward, whatever is known of them.
    """
    changing = [decoder for decoder in wanted if not _is_so(decoder)]
    if not changing:
        return
    patch = _patch_of(seen, changing)
    check_supported(changing, allow_partial)
    check_forwards(changing)
    proofs = [verify(decoder, on_trust=allow_partial) for decoder in changing]
    late = [
        unverified_plan(decoder)
        for decoder, proof in zip(changing, proofs)
        if decoder in unverified or (proof is None and not allow_partial)
    ]
    hooks.install()
    add: list[tuple[nn.Module, Plan]] = []
    for decoder, proof in zip(changing, proofs):
        add += bidirectional_plans(decoder, *(proof or ()))
        add.append(pickled_plan(decoder.module))
    plans, watched = plans_on(module for module, _ in patch), watched_among(seen.modules)
    try:
        watch_labels(seen.modules)
        apply([*add, *late], patch)
        for decoder, proof in zip(changing, proofs):
            if proof is None and not allow_partial and not decoder.is_on_meta:
                verify_now(decoder.outermost, decoder.sinks, even_on_meta=False)
    except BaseException:
        _put_back(seen, changing, plans)
        watch_only(seen.modules, watched)
        raise


def to_as_loaded(seen: Survey, going: list[Decoder]) -> None:
    """Undo the patch of the decoders in `going`."""
    try:
        apply(remove=_patch_of(seen, going))
    finally:  # also where an interrupt came right after the change
        for decoder in going:
            if not decoder.has_any_patch:
                forget_checkpoints(decoder.module)
        unwatch_labels(seen.modules)


def to_causal_block(seen: Survey, decoder: Decoder) -> list[Change]:
    """What has to change for `decoder` to be causal within a block; nothing if it is causal already."""
    if decoder.is_in_block:  # what attends in both directions in it came with a layer, and goes
        modules = [part.module for attention in decoder.attentions for part in attention.parts]
        put_on = ((module, plan.mixin) for module in modules for plan in plans_of(module))
        return prepare(remove=[(module, mixin) for module, mixin in put_on if mixin in OF_ATTENTION])
    is_native = native_attention(decoder) != "causal"
    if not (is_native or decoder.has_any_patch):
        return []
    check_forwards([decoder])  # or its end could not bring the patch back
    plans = [*causal_block_plans(seen.model, decoder, is_native), pickled_plan(decoder.module)]
    return prepare(plans, _patch_of(seen, [decoder]))


def find(seen: Survey, decoder: Decoder) -> Found:
    """What a block finds on one decoder, for `bring_back`."""
    setting = decoder.setting
    plans = plans_on(module for module, _ in _patch_of(seen, [decoder])) if setting.mode is Mode.MIXED else {}
    return Found(setting, plans, watched_among(seen.modules))


def bring_back(seen: Survey, decoder: Decoder, before: Found) -> None:
    """Bring one decoder to what a block found."""
    mode, sinks = before.setting
    if mode is Mode.AS_LOADED:
        to_as_loaded(seen, [decoder])
    elif mode is Mode.CAUSAL_BLOCK:
        commit(to_causal_block(seen, decoder))
    elif mode is Mode.MIXED:
        _put_back(seen, _as_it_was_and_is(seen, decoder), before.plans)
    else:
        for each in _as_it_was_and_is(seen, decoder):
            each = each.with_sinks_as_far_as_layers_go(Sinks(*sinks))
            to_bidirectional(seen, [each], True, [each] if mode is Mode.UNVERIFIED else [])
    if before.watched is not None:
        watch_only(seen.modules, before.watched)


def setting_to_come(decoder: Decoder) -> Setting:
    """The setting that the end of a block is to bring a decoder to; raises what `to_bidirectional` would, but for wrappers."""
    if _is_so(decoder):
        return decoder.setting
    check_supported([decoder], False)
    return Setting(Mode.UNVERIFIED if verify(decoder) is None else Mode.BIDIRECTIONAL, decoder.sinks)


def stays_in_block(decoder: Decoder) -> bool:
    """Whether a decoder is in a causal block, or is a copy from one of a model that is bidirectional by its config."""
    if not decoder.is_in_block:
        return False
    return bool(in_use.state_of(decoder.module).holds) or says_bidirectional(before_patch(decoder.module, "config"))


def _patch_of(seen: Survey, going: list[Decoder]) -> list[tuple[nn.Module, type[Swapped]]]:
    """All that the patch put on modules for the decoders in `going`, and around them if no other decoder keeps it."""
    modules = {id(module): module for decoder in going for module in decoder.modules}
    staying = [decoder for decoder in seen.decoders if id(decoder.module) not in modules and decoder.has_any_patch]
    if not staying:
        modules |= {id(module): module for module in seen.modules}
    kept = {id(module) for decoder in staying for module in decoder.modules}
    return [
        (module, plan.mixin)
        for key, module in modules.items()
        if key not in kept and (record := record_of(module)) is not None
        for plan in record.plans
        if plan.mixin in _MIXINS
    ]


def _put_back(seen: Survey, going: list[Decoder], plans: Mapping[nn.Module, tuple[Plan, ...]]) -> None:
    """Undo the patch of the decoders in `going`, and put on again what was there before: one change, of both."""
    patch = _patch_of(seen, going)
    apply([(module, plan) for module, found in plans.items() for plan in found if plan.mixin in _MIXINS], patch)
    for decoder in going:
        if not decoder.has_any_patch:
            forget_checkpoints(decoder.module)


def _as_it_was_and_is(seen: Survey, decoder: Decoder) -> list[Decoder]:
    """A decoder as a block found it, and as it is now: a layer may have been taken out, put in or wrapped within the block."""
    return [decoder, *(now for now in decoders(seen.model) if now.module is decoder.module)]


def _is_so(decoder: Decoder) -> bool:
    """Whether a decoder is bidirectional with its sinks already."""
    return is_verified_patch(decoder) and decoder.setting.sinks == decoder.sinks
