"""Verify, once per class and backend, that the installed transformers lets a class be made bidirectional, and how.

A small random model of the same class is patched as the real one will be, and `attention_report` tells what its layers see.
So a transformers in which the patch has no effect is found before the first real batch, and is an error.
"""

from typing import Literal, NamedTuple, TypeVar

import torch
from torch import nn

from ..attention.handling import MaskHandling, possible_handlings
from ..attention.padding_and_packing import Sequences
from ..attention.plan import bidirectional_plans
from ..errors import AttentionMaskError, BidirectPatchError, UnseenLayersError, UnsupportedModelError
from ..model.code import Code
from ..model.config import backend_of, text_config
from ..model.decoder import Decoder
from ..model.find import decoders, says_bidirectional
from ..model.sinks import Sinks
from ..model.tiny import tiny_like
from ..model.walk import modules_of
from ..model.windows import Span
from ..model.wrappers import pretrained
from ..swap.apply import apply
from ..swap.classes import is_sharded, original
from .dependence import CAUSAL
from .probe import decoder_layers, run_as_it_is
from .report import BIDIRECTIONAL, AttentionReport, attention_report

Kept = TypeVar("Kept")
Native = Literal["causal", "in part", "bidirectional"]

MOST_SINKS = 3  # in a small model: more show nothing else


class Proof(NamedTuple):
    """How a class was seen to become bidirectional, and the code that was at work."""

    handling: MaskHandling
    code: Code


class _Trial(NamedTuple):
    """What became of a small model: the layers that were right, and what was wrong, "" if nothing was."""

    handling: MaskHandling
    right_layers: int
    problem: str


# The best trial, and whether a config has its effect, by class and backend; each with the code that was seen at work.
_trials: dict[tuple[object, ...], tuple[_Trial, Code]] = {}
_native: dict[tuple[object, ...], tuple[Native, Code]] = {}


def verify(decoder: Decoder, *, even_on_meta: bool = False, on_trust: bool = False) -> Proof | None:
    """How the class of `decoder` was seen to become bidirectional; None if no small model of it can be run.

    Args:
        decoder: a decoder of the model to be patched, which is not changed.
        even_on_meta: whether to do so for weights on the meta device, where it can wait for the first forward.
        on_trust: whether a model is accepted of which nothing can be seen.

    Raises:
        UnsupportedModelError: a layer was seen to stay causal, in a decoder without unsupported layers; or the model runs, and
            none of its layers can be seen.
    """
    key = _key(decoder)
    if _found(_trials, key) is None:
        if decoder.is_on_meta and possible_handlings(decoder)[0].kind == "ready" and not even_on_meta:
            return None
        trial = _trial(decoder)
        if trial is None:
            if not on_trust:
                _check_seen(decoder)
            return None
        _trials[key] = trial, _code(decoder)
    trial, code = _trials[key]
    if not decoder.unsupported_layers:
        _check(decoder, trial.problem)
    return Proof(trial.handling, code)


def verify_itself(decoder: Decoder) -> bool:
    """Verify a patched model itself, where no small one could be made; False if it can't be run either.

    Raises:
        UnsupportedModelError: a layer was seen to stay causal.
    """
    if decoder.is_on_meta:
        return False
    try:
        report = attention_report(decoder.outermost)
    except (UnsupportedModelError, AttentionMaskError):
        return False
    _check(decoder, _problem(report, "the model itself"))
    return True


def native_attention(decoder: Decoder) -> Native:
    """What a decoder's attention is without the patch: causal, unless its config asks transformers for another.

    Then a small model of the class tells. Some get it in part: Gemma 1 on 5.2 and newer, without padding alone.
    """
    if not says_bidirectional(decoder.module.config):
        return "causal"
    config = text_config(decoder.module.config)
    flags = getattr(config, "is_causal", None), str(getattr(config, "use_bidirectional_attention", None))
    key = (original(type(decoder.outermost)), _kernel(config), decoder.spans, flags)
    native = _found(_native, key)
    if native is None:
        try:
            layers = attention_report(tiny_like(decoder.outermost)).layers
        except BidirectPatchError:
            return "causal"
        verdicts = {layer.verdict for layer in layers} - {"no attention"}
        native = "causal" if verdicts <= {CAUSAL} else "in part"
        # Natively, packed sequences see each other; that alone doesn't make a layer causal.
        if verdicts <= {BIDIRECTIONAL} and all(layer.padding_ok is not False for layer in layers):
            native = "bidirectional"
        _native[key] = native, _code(decoder)
    return native


def _found(kept: dict[tuple[object, ...], tuple[Kept, Code]], key: tuple[object, ...]) -> Kept | None:
    """What was found out before; None if nothing was, or if the code has changed since."""
    found, code = kept.get(key, (None, None))
    return found if code is not None and code.is_same() else None


def _code(decoder: Decoder) -> Code:
    """The code that decides what a decoder's attention does."""
    makers = [original(type(module)) for module in decoder.mask_makers]
    parts = {original(type(part)) for attention in decoder.attentions for part in modules_of(attention.module)}
    return Code([*makers, *_classes(decoder), *parts], _kernel(text_config(decoder.module.config)))


def _trial(decoder: Decoder) -> _Trial | None:
    """The best trial with a small model of the class; None if such a model shows nothing of this one."""
    try:
        small = _small(decoder)
        run_as_it_is(pretrained(small))  # what its class keeps of a causal run, the patched run must not take
    except Exception:  # it can't be made or run, for whatever reason
        return None
    if not _classes(decoder) <= frozenset().union(*map(_classes, decoders(small))):
        return None  # a layer or attention of another class was put in
    trial = _best(decoder, small)
    return trial if not trial.problem or _is_seen_unpatched(decoder) else None


def _is_seen_unpatched(decoder: Decoder) -> bool:
    """Whether the layers of a small model can be seen at work without the patch."""
    try:
        attention_report(_small(decoder))
    except Exception:  # for whatever reason
        return False
    return True


def _best(decoder: Decoder, small: nn.Module) -> _Trial:
    best: _Trial | None = None
    for handling in possible_handlings(decoder):
        trial = _try(decoder, handling, small if best is None else _small(decoder))
        if best is None or not trial.problem or trial.right_layers > best.right_layers:
            best = trial
        if not trial.problem or (decoder.unsupported_layers and best.right_layers):
            break
    assert best is not None  # there is always one handling to try
    return best


def _try(decoder: Decoder, handling: MaskHandling, small: nn.Module) -> _Trial:
    cls = original(type(decoder.module))
    found = decoders(small)
    handlings = [handling if original(type(d.module)) is cls else possible_handlings(d)[0] for d in found]
    found = [d.with_sinks(_sinks_of_small(decoder, d)) for d in found]
    apply([plan for d, how in zip(found, handlings) for plan in bidirectional_plans(d, how)])
    try:
        report = attention_report(small)
    except (UnsupportedModelError, AttentionMaskError) as error:
        return _Trial(handling, -1, f"a small random model of its class doesn't run any more: {error}")
    right = sum(layer.ok and layer.verdict == BIDIRECTIONAL for layer in report.layers)
    return _Trial(handling, right, _problem(report, "a small random model of its class") or _beyond_span(report, found))


def _sinks_of_small(decoder: Decoder, small: Decoder) -> Sinks:
    """The sinks that stand for a decoder's in a small model: few tokens, and layers of both kinds if the decoder has both."""
    tokens, sinkless = decoder.sinks
    layers, real_layers = ({attention.layer for attention in d.attentions} for d in (small, decoder))
    most = len(layers) if sinkless == len(real_layers) else max(1, len(layers) - 1)
    return Sinks(min(tokens, MOST_SINKS), min(sinkless, most))


def _small(decoder: Decoder) -> nn.Module:
    small = tiny_like(decoder.outermost)
    if backend_of(text_config(decoder.module.config)) != "flash":
        return small.to(device="cpu", dtype=torch.float32)
    if small.dtype == torch.float32:  # FlashAttention takes no such thing; the model's own will be cast
        small = small.to(torch.bfloat16)
    return small.to("cuda") if small.device.type == "cpu" and torch.cuda.is_available() else small


def _check_seen(decoder: Decoder) -> None:
    """Raise if the model itself runs, but so that its layers can't be seen at work: it could never be verified."""
    if decoder.is_on_meta or decoder.unsupported_layers:
        return
    try:
        attention_report(decoder.outermost)
    except UnseenLayersError as error:
        _check(decoder, f"nothing could be seen: {error}")
    except UnsupportedModelError:  # a kernel that isn't here, for example: it will not run before it is
        return


def _key(decoder: Decoder) -> tuple[object, ...]:
    kernel, handlings = _kernel(text_config(decoder.module.config)), possible_handlings(decoder)
    model_class = original(type(decoder.outermost))
    return model_class, _classes(decoder), kernel, decoder.spans, handlings, bool(decoder.unsupported_layers)


def _kernel(config: object) -> str:
    """The name of the attention function. Users register their own, so that one of a kind says nothing of another."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def _classes(decoder: Decoder) -> frozenset[type]:
    """The classes of a decoder's attention modules, and of the layers that these are in."""
    paths = [attention.path for attention in decoder.attentions]
    layers = [m for name, m in decoder_layers(decoder.module).items() if any(p.startswith(f"{name}.") for p in paths)]
    return frozenset((*map(_layer_class, layers), *(original(type(a.module)) for a in decoder.attentions)))


def _layer_class(layer: nn.Module) -> type:
    """The class of a layer inside torch's own wrappers (compiled, checkpointed, sharded)."""
    while type(layer).__module__.startswith("torch.") and len(layer._modules) == 1:
        (inner,) = layer.children()
        layer = inner
    return next(cls for cls in original(type(layer)).__mro__ if not is_sharded(cls))


def _problem(report: AttentionReport, where: str) -> str:
    # Not compared with what the causal layers reached: older releases let windows reach too far, or ignored them.
    if report.is_bidirectional:
        return ""
    wrong = [f"{layer.name} {layer.class_name} ({layer.problems})" for layer in report.layers if not layer.ok]
    return f"this was seen in {where}: {'; '.join(wrong) or report.summary}"


def _beyond_span(report: AttentionReport, found: list[Decoder]) -> str:
    """Whether a window or chunk holds: mask code that takes no ready mask (4.39's, with windows in some layers) loses it.

    And whether each sink token is seen where the span says so.
    """
    for decoder in found:
        prefix = f"{decoder.name}." if decoder.name else ""
        for layer in report.layers:
            spans = [a.span for a in decoder.attentions if f"{prefix}{a.path}.".startswith(f"{layer.name}.")]
            if layer.verdict != BIDIRECTIONAL or not spans:
                continue
            limit = max(span.limit or report.length for span in spans)
            if limit < report.length and layer.forward != limit - 1:
                return f"{layer.name} {layer.class_name} reaches {layer.forward} tokens ahead, not {limit - 1}"
            sinks = max(span.sinks for span in spans)
            # A module may keep its window in a buffer, of which its span doesn't know (gpt_neo).
            seen = _sees_sinks(spans, report.length).triu(-layer.backward)
            if sinks and not torch.equal(layer.matrix[:, :sinks], seen[:, :sinks]):
                return f"{layer.name} {layer.class_name} sees other sink tokens than its window reaches"
    return ""


def _sees_sinks(spans: list[Span], length: int) -> torch.Tensor:
    """bool (query, key): who sees whom in a layer whose attention modules have these spans."""
    whole = Sequences(1, length, torch.device("cpu"), None, None)
    return torch.stack([whole.visible(span)[0] for span in spans]).any(0)


def _check(decoder: Decoder, problem: str) -> None:
    if problem:
        raise UnsupportedModelError(
            f"{original(type(decoder.outermost)).__name__} was not made bidirectional: with the patch on, {problem}"
        )
