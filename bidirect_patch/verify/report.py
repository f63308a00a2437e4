"""The report: which positions depend on which, layer by layer, as seen in the running model and not read from its flags.

`attention_report` gives the result. How it is measured stands in probe.py and dependence.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..attention.module_settings import AttentionSettings
from ..errors import ArgumentError, ConfigError, StillCausalError, UnsupportedModelError
from ..model.subject import Subject, subject_of
from ..model.wrappers import pretrained
from ..swap.record import settings_of
from .dependence import BIDIRECTIONAL as BIDIRECTIONAL
from .dependence import CAUSAL, NONE, PARTIAL, Verdict, count_sinks, verdict_of
from .probe import LENGTH, Case, LayerCall, Observation, Probe, left_as_it_was

LONGEST = 128  # tokens of the random sequence at most


@dataclass(frozen=True)
class LayerReport:
    """What one decoder layer does. Positions are counted in tokens of the short sequence that was run.

    Attributes:
        index: Place of the layer in the order in which the layers ran.
        name: Name of the layer, as in `model.named_modules()`.
        class_name: Name of its class.
        verdict: "bidirectional", "causal", "partial" or "no attention". Sink tokens that were asked for are as they are to
            be in a bidirectional layer; others make it partial.
        backward: The largest distance at which a position depends on an earlier one.
        forward: The largest distance at which a position depends on a later one.
        matrix: (length, length) bool, [q, k]: position q depends on position k, without a mask.
        padding_ok: Whether no token depends on padding and all outputs are finite. None if the model takes no mask.
        packing_ok: Whether no document depends on another one. None if the model takes no `position_ids`, or if the
            patch refuses packed documents.
        verdicts: The verdict for each way of calling the model: "no mask", "mask of ones", "padded right", "padded
            left" and "packed".
        causal_parts: Names of the modules in the layer that are causal, beside others that are not.
        num_sink_tokens: How many tokens at the start depend on no later one while others do, without a mask.
        sees_sinks: Whether any other token depends on these. True if there are none.
    """

    index: int
    name: str
    class_name: str
    verdict: Verdict
    backward: int
    forward: int
    matrix: Tensor = field(repr=False)
    padding_ok: bool | None
    packing_ok: bool | None
    verdicts: dict[Case, Verdict]
    causal_parts: tuple[str, ...] = ()
    num_sink_tokens: int = 0
    sees_sinks: bool = True

    @property
    def ok(self) -> bool:
        """Whether it is bidirectional or has no attention, and no token depends on padding or on another document."""
        return self.verdict in (BIDIRECTIONAL, NONE) and self.padding_ok is not False and self.packing_ok is not False

    @property
    def problems(self) -> str:
        """Why it is not `ok`, in words; "" if it is."""
        found = {
            self.verdict: self.verdict in (CAUSAL, PARTIAL),
            "padding reached": self.padding_ok is False,
            "documents mixed": self.packing_ok is False,
        }
        return ", ".join(problem for problem, there in found.items() if there)

    def _mirrored(self, causal: Tensor) -> Tensor:
        """A causal matrix with its mirror image in time, but for the sink tokens of this layer."""
        both = causal | causal.T
        both[: self.num_sink_tokens] = causal[: self.num_sink_tokens]
        if not self.sees_sinks:
            both[self.num_sink_tokens :, : self.num_sink_tokens] = False
        return both

    def _cells(self) -> tuple[str, ...]:
        padding = {True: "unseen", False: "REACHED", None: "-"}[self.padding_ok]
        packing = {True: "apart", False: "MIXED", None: "-"}[self.packing_ok]
        notes = [f"only looks back: {part}" for part in self.causal_parts]
        if self.num_sink_tokens:
            seen = "" if self.sees_sinks else ", which the others don't see"
            notes.append(f"{self.num_sink_tokens} sink token{'s' * (self.num_sink_tokens > 1)}{seen}")
        if len(set(self.verdicts.values())) > 1:
            notes += [f"{case}: {verdict}" for case, verdict in self.verdicts.items() if verdict != BIDIRECTIONAL]
        reach = f"-{self.backward} .. +{self.forward}"
        return self.name, self.class_name, self.verdict, reach, padding, packing, "; ".join(notes)


@dataclass(frozen=True)
class AttentionReport:
    """What the layers of a model do. `print(report)` shows them as a table.

    Attributes:
        model_class: Name of the class of the model.
        backend: The attention backend, such as "eager" or "sdpa"; None if the config names none.
        length: Number of tokens in the sequence that was run.
        layers: The layers in the order in which they ran.
    """

    model_class: str
    backend: str | None
    length: int
    layers: list[LayerReport]

    @property
    def is_bidirectional(self) -> bool:
        """Whether all layers are `ok` and at least one of them is bidirectional."""
        return any(layer.verdict == BIDIRECTIONAL for layer in self.layers) and all(layer.ok for layer in self.layers)

    @property
    def summary(self) -> str:
        """One line: how many layers have which verdict, and what else is wrong."""
        verdicts = [layer.verdict for layer in self.layers]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in (BIDIRECTIONAL, PARTIAL, CAUSAL, NONE) if v in verdicts)
        wrong = [
            f"{problem} in {sum(flags)} layers"
            for problem, flags in (
                ("padding reached", [layer.padding_ok is False for layer in self.layers]),
                ("documents mixed", [layer.packing_ok is False for layer in self.layers]),
            )
            if any(flags)
        ]
        backend = f" on {self.backend}" if self.backend else ""
        verdict = "bidirectional" if self.is_bidirectional else "not bidirectional"
        return f"{self.model_class}{backend}: {verdict} ({'; '.join([counts, *wrong])})"

    def unlike_mirror_of(self, causal: "AttentionReport") -> list[LayerReport]:
        """Find the layers that are not the same layers of `causal` together with their mirror image in time.

        A window of w tokens has to become |q - k| < w, and a chunk has to see all of itself. Sink tokens stay as in `causal`.

        Args:
            causal: The report of the same model, not patched, at the same length.

        Returns:
            The layers of this report that differ from that.

        Raises:
            ConfigError: If the two reports differ in length or in the number of layers.
            ArgumentError: If `causal` is no report.
        """
        return [new for new, old in self._beside(causal) if not torch.equal(new.matrix, new._mirrored(old.matrix))]

    def narrower_than(self, causal: "AttentionReport") -> list[LayerReport]:
        """Find the layers that look back less far than the same layers of `causal`.

        A window may be one position shorter than in `causal`: in some releases of transformers, such as 4.39, a causal
        window is one position longer than its size.

        Args:
            causal: The report of the same model, not patched, at the same length.

        Returns:
            The layers of this report that look back less far.

        Raises:
            ConfigError: If the two reports differ in length or in the number of layers.
            ArgumentError: If `causal` is no report.
        """
        lost = []
        for new, old in self._beside(causal):
            slack = 1 if old.backward < causal.length - 1 else 0
            if new.backward < old.backward - slack:
                lost.append(new)
        return lost

    def _beside(self, other: "AttentionReport") -> list[tuple[LayerReport, LayerReport]]:
        if not isinstance(other, AttentionReport):
            raise ArgumentError(f"expected an AttentionReport, got {type(other).__name__}: give attention_report(model)")
        if (self.length, len(self.layers)) != (other.length, len(other.layers)):
            raise ConfigError(
                f"reports of {len(self.layers)} layers at length {self.length} and of {len(other.layers)} layers at "
                f"length {other.length} can't be compared"
            )
        return list(zip(self.layers, other.layers, strict=True))

    def __str__(self) -> str:
        head = ("layer", "class", "verdict", "reach", "padding", "documents", "")
        rows = [head, *(layer._cells() for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.summary])


def attention_report(model: nn.Module, *, length: int | None = None) -> AttentionReport:
    """Run a model on short random sequences and report for each decoder layer which position depends on which.

    It costs five forwards of (length + 2) * length tokens, most of them with a backward through one layer at a time, and a sixth
    where packed documents do not come out as each of them alone.
    Hooks, training flags, gradients and the random state are the same afterwards as before.

    Args:
        model: What `enable_bidirectional` takes: a `*ForCausalLM`, a `*Model`, a PEFT, DDP or compiled wrapper, or
            another module that holds one of these. On any device and in any dtype.
        length: Number of tokens in a sequence, from 3 to 128, by default 7 more than there are sink tokens. A window or chunk
            of at least `length` tokens looks like full attention.

    Returns:
        The report, with one `LayerReport` for each call of a decoder layer.

    Raises:
        UnsupportedModelError: If `model` is no module or holds no transformers model, its weights are on the meta
            device, its forward fails on plain `input_ids`, or (as the subclass UnseenLayersError) it has no list of
            decoder layers that take hidden states.
        ConfigError: If `length` is not an integer from 3 to 128. It is a ValueError too.

    Example:
        >>> from transformers import LlamaConfig
        >>> from bidirect_patch.model.tiny import tiny_like
        >>> report = attention_report(tiny_like(LlamaConfig()))
        >>> [(layer.verdict, layer.backward, layer.forward) for layer in report.layers]
        [('causal', 6, 0), ('causal', 6, 0)]
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"attention_report takes a torch.nn.Module, not {type(model).__name__}")
    inner = pretrained(model)
    subject = subject_of(inner)
    most = max((count for count, _ in _sinks_by_layer(subject.layers).values()), default=0)
    length = LENGTH + most if length is None else length
    if not isinstance(length, int) or isinstance(length, bool) or not 3 + most <= length <= LONGEST:
        beyond = f" beside {most} sink tokens" if most else ""
        raise ConfigError(
            f"length must be an integer, at least {3 + most} to tell one direction from the other{beyond} and at most {LONGEST}, "
            f"since length * (length + 2) tokens are run in one row; not {length!r}"
        )
    if all(p.is_meta for p in inner.parameters()) and not any(hasattr(m, "_hf_hook") for m in inner.modules()):
        raise UnsupportedModelError(
            f"the weights of {type(inner).__name__} are on the meta device, so it can't be run; load them, or run "
            f"`bidirect-patch check`, which builds a small model from the config"
        )
    with left_as_it_was(model, inner):
        return run_and_report(subject, length)


def run_and_report(subject: Subject, length: int) -> AttentionReport:
    """`attention_report` of a transformers model, which is left as it was by the caller."""
    probe = Probe(subject, length)
    return report_of(probe, probe.observe())


def report_of(probe: Probe, seen: Observation) -> AttentionReport:
    """The report of what a probe saw of its model."""
    model, plain, sinks = probe.model, seen.calls["no mask"], _sinks_by_layer(probe.layers)
    layers = [_layer_report(index, seen, sinks) for index in range(len(plain))]
    backend = getattr(model.config, "_attn_implementation", None)
    backend = backend if isinstance(backend, str) else None
    return AttentionReport(type(model).__name__, backend, len(plain[0].matrix), layers)


def assert_bidirectional(model: nn.Module, *, length: int | None = None) -> None:
    """Raise an error unless all layers of a model are bidirectional, but for the sink tokens that were asked for.

    Args:
        model: As for `attention_report`.
        length: As for `attention_report`.

    Raises:
        StillCausalError: If `attention_report(model).is_bidirectional` is False; the message holds the table.
        UnsupportedModelError: As for `attention_report`.
        ConfigError: As for `attention_report`.

    Example:
        >>> from transformers import LlamaConfig
        >>> from bidirect_patch import enable_bidirectional
        >>> from bidirect_patch.model.tiny import tiny_like
        >>> assert_bidirectional(enable_bidirectional(tiny_like(LlamaConfig())))
    """
    report = attention_report(model, length=length)
    if not report.is_bidirectional:
        raise StillCausalError(f"{report.summary}\n{report}")


def _sinks_by_layer(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, bool]]:
    """What the patch is to make of each decoder layer: how many sink tokens, and whether the other tokens see them."""
    sinks = {}
    for name, layer in layers.items():
        found = (settings_of(module, AttentionSettings) for module in layer.modules())
        spans = [settings.span for settings in found if settings is not None and settings.span.sinks]
        if spans:
            sinks[name] = max(span.sinks for span in spans), any(span.sees_sinks for span in spans)
    return sinks


def _layer_report(index: int, seen: Observation, sinks: dict[str, tuple[int, bool]]) -> LayerReport:
    calls = {case: case_calls[index] for case, case_calls in seen.calls.items()}
    plain = calls["no mask"]
    apart = seen.apart[index] if seen.apart is not None else None
    wanted = sinks.get(plain.name, (0, True))
    verdicts = {case: verdict_of(call.matrix[seen.real[case], seen.real[case]], *wanted) for case, call in calls.items()}
    if apart is False:
        del verdicts["packed"]  # a document depends on others, so its own dependences can't be measured
    distinct = set(verdicts.values())
    verdict = distinct.pop() if len(distinct) == 1 else PARTIAL
    parts = tuple(plain.causal_parts) if verdict == BIDIRECTIONAL else ()
    padded = [_ignores_padding(call, seen.real[case]) for case, call in calls.items() if case.startswith("padded")]
    q, k = plain.matrix.nonzero(as_tuple=True)
    count = count_sinks(plain.matrix)
    return LayerReport(
        index=index,
        name=plain.name,
        class_name=plain.class_name,
        verdict=PARTIAL if parts else verdict,
        backward=max(0, int((q - k).max())) if len(q) else 0,
        forward=max(0, int((k - q).max())) if len(q) else 0,
        matrix=plain.matrix,
        padding_ok=all(padded) if padded else None,
        packing_ok=apart,
        verdicts=verdicts,
        causal_parts=parts,
        num_sink_tokens=count,
        sees_sinks=not count or bool(plain.matrix[count:, :count].any()),
    )


def _ignores_padding(call: LayerCall, real: slice) -> bool:
    """Whether no position of `real` depends on one outside of it, and all outputs are finite."""
    padded = torch.ones(len(call.matrix), dtype=torch.bool)
    padded[real] = False
    return call.finite and not bool(call.matrix[real][:, padded].any())
