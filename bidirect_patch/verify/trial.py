"""A trial: a small random model of a class is patched as the real one will be, and run, to see what its layers depend on."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.handling import MaskHandling
from ..attention.padding_and_packing import Sequences
from ..attention.plan import bidirectional_plans
from ..errors import AttentionMaskError, UnseenLayersError, UnsupportedModelError
from ..model.decoder import Decoder
from ..model.find import decoders
from ..model.subject import Subject, subject_of
from ..model.tiny import tiny_like
from ..model.windows import Span
from ..swap.apply import apply
from ..swap.classes import original
from .dependence import relative_distance
from .probe import LENGTH, Case, Probe, left_as_it_was
from .report import BIDIRECTIONAL, AttentionReport, report_of

MOST_SINKS = 3  # in a small model: more show nothing else
LastTokens = dict[Case, tuple[Tensor, bool]]  # see `Observation.last_tokens`
SAME = 0.03  # relative distance of two outputs that are the same but for rounding, in bfloat16 too


class Trial(NamedTuple):
    """What became of a small model: the layers that were right, and what was wrong, "" if nothing was."""

    handling: MaskHandling
    right_layers: int
    problem: str


class Specimen(NamedTuple):
    """A small model of a class, and its decoders, with sinks that stand for those of the real one."""

    subject: Subject
    decoders: list[Decoder]


def best_trial(decoder: Decoder, handlings: tuple[MaskHandling, ...]) -> Trial | None:
    """The best trial with a small model of the class; None if such a model shows nothing of this one."""
    try:
        small = _specimen(decoder)
        classes = frozenset().union(*(each.classes for each in small.decoders))
        last = _causal_run(small.subject, _length(decoder))  # what its class keeps of it, the patched run must not take
    except Exception:  # it can't be made or run, for whatever reason
        return None
    if not decoder.classes <= classes:
        return None  # a layer or attention of another class was put in
    trial = _best(decoder, small, handlings, last)
    return trial if not trial.problem or _is_seen_unpatched(decoder) else None


def _is_seen_unpatched(decoder: Decoder) -> bool:
    """Whether the layers of a small model can be seen at work without the patch."""
    try:
        small = subject_of(_small(decoder))
        with left_as_it_was(small.model):
            Probe(small, LENGTH).observe()
    except Exception:  # for whatever reason
        return False
    return True


def _specimen(decoder: Decoder) -> Specimen:
    small = _small(decoder)
    return Specimen(subject_of(small), [each.with_sinks_like(decoder, MOST_SINKS) for each in decoders(small)])


def _best(decoder: Decoder, small: Specimen, handlings: tuple[MaskHandling, ...], last: LastTokens) -> Trial:
    best = _try(decoder, handlings[0], small, last)
    for handling in handlings[1:]:
        if not best.problem or (decoder.refusals and best.right_layers):
            break
        trial = _try(decoder, handling, _specimen(decoder), last)
        if not trial.problem or trial.right_layers > best.right_layers:
            best = trial
    return best


def _try(decoder: Decoder, handling: MaskHandling, small: Specimen, last: LastTokens) -> Trial:
    cls = original(type(decoder.module))
    handlings = [handling if original(type(each.module)) is cls else None for each in small.decoders]
    plans = [plan for each, how in zip(small.decoders, handlings) for plan in bidirectional_plans(each, how)]
    apply(plans)
    try:
        with left_as_it_was(small.subject.model):
            probe = Probe(small.subject, _length(decoder))
            seen = probe.observe()
            report = report_of(probe, seen)
    except (UnsupportedModelError, AttentionMaskError) as error:
        return Trial(handling, -1, f"a small random model of its class doesn't run any more: {error}")
    right = sum(layer.ok and layer.verdict == BIDIRECTIONAL for layer in report.layers)
    problem = problem_of(report, "a small random model of its class") or _beyond_span(report, small.decoders)
    return Trial(handling, right, problem or _last_token_moved(small.decoders[0], seen.last_tokens(), last))


def _causal_run(small: Subject, length: int) -> LastTokens:
    """What the first layer of a small model makes of the last token without the patch, as `last_tokens` gives it."""
    with left_as_it_was(small.model):
        probe = Probe(small, length)
        probe.gradients = False
        try:
            return probe.observe(brief=True).last_tokens()
        except UnseenLayersError:
            return {}


def _last_token_moved(decoder: Decoder, now: LastTokens, before: LastTokens) -> str:
    """Whether a mask was read the wrong way round by the model's own code: where all is hidden, all is seen alike.

    Where the last token sees all of a text and nothing else in the causal model already (there may be a window, and XLM's sees
    padding), the first attention does the same with it. That can't be said of one that doesn't see sinks, nor of two attention
    modules in one layer.

    Args:
        decoder: the small model's first one.
        now: of it with the patch.
        before: the same, without the patch.
    """
    first = decoder.attentions[0]
    is_alone = sum(attention.layer == first.layer for attention in decoder.attentions) == 1
    if not is_alone or not first.span.sees_sinks:
        return ""
    both = [(*now[case], *before[case]) for case in before if case in now]
    pairs = [(a, b) for a, sees_all, b, saw_all in both if sees_all and saw_all]
    if all(a.shape == b.shape and bool(relative_distance(a, b) < SAME) for a, b in pairs):
        return ""
    return "the first layer of a small random model of its class does something else with the last token than without the patch"


def _length(decoder: Decoder) -> int:
    """How many tokens the small model is run on."""
    return LENGTH + min(decoder.sinks.num_sink_tokens, MOST_SINKS)


def _small(decoder: Decoder) -> PreTrainedModel:
    small = tiny_like(decoder.outermost)
    if decoder.backend != "flash":
        return small.to(device="cpu", dtype=torch.float32)
    if small.dtype == torch.float32:  # FlashAttention takes no such thing; the model's own will be cast
        small = small.to(torch.bfloat16)
    return small.to("cuda") if small.device.type == "cpu" and torch.cuda.is_available() else small


def problem_of(report: AttentionReport, where: str) -> str:
    """What a report says to be wrong, and where it was seen, in words; "" if nothing is wrong."""
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
