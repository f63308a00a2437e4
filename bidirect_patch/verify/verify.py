"""The proof that a class can be made bidirectional by the installed transformers, and the form in which that works.

It runs once per class and backend: a small random model of the same class is patched like the real one, and
`attention_report` tells what its layers see. So a transformers that stopped honouring the patch is found before the
first real batch, and an error says so.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..attention import masks
from ..swap import swap
from ..errors import BidirectPatchError, UnseenLayersError, UnsupportedModelError
from ..model.find import Decoder, decoders
from ..attention.forms import Form, forms
from ..attention.forward import text_config
from ..verify.report import BIDIRECTIONAL, AttentionReport, attention_report
from ..model.tiny import tiny_like


class _Trial(NamedTuple):
    """What a form did: in how many layers it worked, and what was seen instead, "" if nothing was."""

    form: Form
    layers: int
    problem: str


_trials: dict[tuple, _Trial] = {}  # the best, by class and backend
_native: dict[tuple, bool] = {}


def prove(
    decoder: Decoder, enable: Callable[[nn.Module, type, Form], None], anyhow: bool = False
) -> Form | None:
    """The form in which the class of `decoder` was seen to become bidirectional; None if no small model of it can be run.

    enable: patches a model, its decoders of the given class in the given form. anyhow: on the meta device too, where there
    is no hurry before the first forward. Raises UnsupportedModelError if a layer was seen to stay causal, unless the
    decoder has some in the way and is patched all the same.
    """
    key = _key(decoder)
    if key not in _trials and _on_meta(decoder) and forms(decoder)[0].code == "ready" and not anyhow:
        return None
    if key not in _trials:
        try:
            small = _small(decoder)
            attention_report(small)
        except Exception:  # a small model that can't be made or run, for whatever reason, proves nothing
            _check_seen(decoder)
            return None
        if not _attention_classes(decoder) <= frozenset().union(*map(_attention_classes, decoders(small))):
            return None  # somebody put attention of another class in: the class of the model says nothing of it
        _trials[key] = _best(decoder, enable)
    trial = _trials[key]
    return trial.form if decoder.in_the_way or _accept(decoder, trial.problem) else None


def _best(decoder: Decoder, enable: Callable[[nn.Module, type, Form], None]) -> _Trial:
    best = None
    for form in forms(decoder):
        trial = _try(decoder, form, enable)
        if not trial.problem or best is None or trial.layers > best.layers:
            best = trial
        if not trial.problem or decoder.in_the_way and best.layers:
            break
    assert best is not None  # there is always a form
    return best


def _try(decoder: Decoder, form: Form, enable: Callable[[nn.Module, type, Form], None]) -> _Trial:
    small = _small(decoder)
    enable(small, swap.original(type(decoder.module)), form)
    try:
        report = attention_report(small)
    except UnsupportedModelError as error:
        return _Trial(form, -1, f"a small random model of its class doesn't run any more: {error}")
    works = sum(layer.ok and layer.verdict == BIDIRECTIONAL for layer in report.layers)
    return _Trial(form, works, _seen(report, "a small random model of its class") or _beyond(report, small))


def _small(decoder: Decoder) -> nn.Module:
    small = tiny_like(subject(decoder))
    if masks.backend_of(text_config(decoder.module.config)) != "flash":
        return small.to(device="cpu", dtype=torch.float32)
    if small.dtype == torch.float32:  # whose kernels take no such thing; the model's own will be cast
        small = small.to(torch.bfloat16)
    return small.to("cuda") if small.device.type == "cpu" and torch.cuda.is_available() else small


def _check_seen(decoder: Decoder) -> None:
    """Raise if the model itself runs, but not so that its layers can be seen at work: it could never be proven."""
    if _on_meta(decoder) or decoder.in_the_way:
        return
    try:
        attention_report(subject(decoder))
    except UnseenLayersError as error:
        _accept(decoder, f"nothing could be seen: {error}")
    except UnsupportedModelError:  # a kernel that isn't here, say: it will not run before it is
        return


def prove_itself(decoder: Decoder) -> bool:
    """The same proof on the patched model itself, where no small one could be made; False if it can't be run either."""
    if _on_meta(decoder):
        return False
    try:
        report = attention_report(subject(decoder))
    except UnsupportedModelError:  # as before
        return False
    return _accept(decoder, _seen(report, "the model itself"))


def subject(decoder: Decoder) -> nn.Module:
    """The outermost model that builds its mask."""
    return decoder.builders[0] if decoder.builders else decoder.module


def _on_meta(decoder: Decoder) -> bool:
    return all(p.is_meta for p in decoder.module.parameters())


def _key(decoder: Decoder) -> tuple:
    backend = masks.backend_of(text_config(decoder.module.config))
    model = swap.original(type(subject(decoder)))
    return model, _attention_classes(decoder), backend, decoder.reaches, forms(decoder), bool(decoder.in_the_way)


def _attention_classes(decoder: Decoder) -> frozenset[type]:
    return frozenset(swap.original(type(attention)) for _, attention, _ in decoder.attentions)


def _seen(report: AttentionReport, where: str) -> str:
    # Not compared with what the causal layers reached: older releases let windows reach too far, or ignored them.
    if report.is_bidirectional:
        return ""
    wrong = [f"{layer.name} {layer.class_name} ({layer.problems})" for layer in report.layers if not layer.ok]
    return f"this was seen in {where}: {'; '.join(wrong) or report.summary}"


def _beyond(report: AttentionReport, small: nn.Module) -> str:
    """Whether a window or chunk holds: mask code that takes no mask of ours (4.39's, with windows in some layers) loses it."""
    for decoder in decoders(small):
        prefix = f"{decoder.name}." if decoder.name else ""
        for layer in report.layers:
            inside = [r for path, _, r in decoder.attentions if f"{prefix}{path}".startswith(f"{layer.name}.")]
            limits = [min((n for n in reach if n is not None), default=report.length) for reach in inside]
            held = max(limits, default=report.length) >= report.length or layer.forward == max(limits) - 1
            if not held and layer.verdict == BIDIRECTIONAL:
                return f"{layer.name} {layer.class_name} reaches {layer.forward} tokens ahead, not {max(limits) - 1}"
    return ""


def _accept(decoder: Decoder, verdict: str) -> bool:
    if verdict:
        name = swap.original(type(subject(decoder))).__name__
        raise UnsupportedModelError(f"{name} was not made bidirectional: with the patch on, {verdict}")
    return True


def natively_bidirectional(decoder: Decoder) -> bool:
    """Whether the config says `is_causal: false` and transformers was seen to honour it for this architecture."""
    config = text_config(decoder.module.config)
    # Both: in a causal island the model has a view of its config, which says True.
    if any(getattr(c, "is_causal", True) is not False for c in {id(c): c for c in (config, decoder.module.config)}.values()):
        return False
    key = (swap.original(type(decoder.module)), masks.backend_of(config), decoder.reaches)
    if key not in _native:
        try:
            layers = attention_report(tiny_like(decoder.module)).layers
            # Packed documents see each other under the native switch; that alone doesn't make it causal.
            both = all(n.verdict in ("bidirectional", "no attention") and n.padding_ok is not False for n in layers)
            _native[key] = both
        except BidirectPatchError:
            return False
    return _native[key]
