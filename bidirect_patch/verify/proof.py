"""The proof, once per class and backend, that the installed transformers lets a class be made bidirectional, and how.

A trial gives it (`trial`). So a transformers in which the patch has no effect is found before the first real batch, and is an
error. A proof is believed as long as nobody changes the code that was at work.
"""

from typing import Literal, NamedTuple, TypeVar

from transformers import PreTrainedModel

from ..attention.handling import MaskHandling, possible_handlings
from ..errors import AttentionMaskError, BidirectPatchError, UnseenLayersError, UnsupportedModelError
from ..model.code import Code
from ..model.config import says_bidirectional
from ..model.decoder import Decoder
from ..model.subject import subject_of
from ..model.tiny import tiny_like
from ..swap.classes import original
from .dependence import CAUSAL
from .probe import LENGTH, left_as_it_was
from .report import BIDIRECTIONAL, LONGEST, AttentionReport, run_and_report
from .trial import Trial, best_trial, problem_of

Kept = TypeVar("Kept")
Native = Literal["causal", "in part", "bidirectional"]


class Proof(NamedTuple):
    """How a class was seen to become bidirectional, and the code that was at work."""

    handling: MaskHandling
    code: Code


# The best trial, and whether a config has its effect, by class and backend; each with the code that was seen at work.
_trials: dict[tuple[object, ...], tuple[Trial, Code]] = {}
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
    handlings = possible_handlings(decoder)
    key = _key(decoder, handlings)
    if _found(_trials, key) is None:
        if decoder.is_on_meta and handlings[0].kind == "ready" and not even_on_meta:
            return None
        trial = best_trial(decoder, handlings)
        if trial is None:
            if not on_trust:
                _check_seen(decoder)
            return None
        _trials[key] = trial, _code(decoder)
    trial, code = _trials[key]
    if not decoder.refusals:
        _check(decoder, trial.problem)
    return Proof(trial.handling, code)


def verify_itself(decoder: Decoder) -> bool:
    """Verify a patched model itself, where no small one could be made; False if it can't be run either.

    Raises:
        UnsupportedModelError: a layer was seen to stay causal.
    """
    length = LENGTH + decoder.sinks.num_sink_tokens
    if decoder.is_on_meta or length > LONGEST:
        return False
    try:
        report = _report_on(decoder.outermost, length)
    except (UnsupportedModelError, AttentionMaskError):
        return False
    _check(decoder, problem_of(report, "the model itself"))
    return True


def native_attention(decoder: Decoder) -> Native:
    """What a decoder's attention is without the patch: causal, unless its config asks transformers for another.

    Then a small model of the class tells. Some get it in part: Gemma 1 on 5.2 and newer, without padding alone.
    """
    if not says_bidirectional(decoder.module.config):
        return "causal"
    config = decoder.config
    flags = getattr(config, "is_causal", None), str(getattr(config, "use_bidirectional_attention", None))
    key = (original(type(decoder.outermost)), decoder.kernel, decoder.spans, flags)
    native = _found(_native, key)
    if native is None:
        try:
            layers = _report_on(tiny_like(decoder.outermost), LENGTH).layers
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
    return Code([*makers, *decoder.classes, *decoder.part_classes], decoder.kernel)


def _check_seen(decoder: Decoder) -> None:
    """Raise if the model itself runs, but so that its layers can't be seen at work: it could never be verified."""
    if decoder.is_on_meta or decoder.refusals:
        return
    try:
        _report_on(decoder.outermost, LENGTH)
    except UnseenLayersError as error:
        _check(decoder, f"nothing could be seen: {error}")
    except UnsupportedModelError:  # a kernel that isn't here, for example: it will not run before it is
        return


def _key(decoder: Decoder, handlings: tuple[MaskHandling, ...]) -> tuple[object, ...]:
    classes = original(type(decoder.outermost)), decoder.classes, decoder.part_classes
    return *classes, decoder.kernel, decoder.spans, handlings, bool(decoder.refusals)


def _report_on(model: PreTrainedModel, length: int) -> AttentionReport:
    with left_as_it_was(model):
        return run_and_report(subject_of(model), length)


def _check(decoder: Decoder, problem: str) -> None:
    if problem:
        raise UnsupportedModelError(
            f"{original(type(decoder.outermost)).__name__} was not made bidirectional: with the patch on, {problem}"
        )
