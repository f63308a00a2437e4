"""The experiment: a model is run on short random sequences, and each decoder layer is fed with random vectors.

The model is run once for each way of calling it: without a mask, with a mask of ones, padded on the right, padded on
the left, and with two or more documents packed into one row. Before a decoder layer runs, a hook replaces its input by
the rows that `dependence.random_rows` makes; after it, another hook measures which position depends on which. Since the
input of a layer is not the output of the layer before, a causal layer can't hide behind a bidirectional one.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import AttentionMaskError, UnseenLayersError, UnsupportedModelError
from ..model.facts import parameter_names
from ..model.subject import Subject
from ..swap.classes import original
from .dependence import CAUSAL, by_gradient, by_perturbation, random_rows, relative_distance, threshold, verdict_of
from .tensors import Grid, find_states, from_rows, output_rows, to_rows

LENGTH = 7  # tokens of a sequence, if nothing else is said
Case = Literal["no mask", "mask of ones", "padded right", "padded left", "packed"]  # a way of calling the model


@dataclass
class LayerCall:
    """One call of one layer.

    Attributes:
        name: Name of the layer, as in `model.named_modules()`.
        class_name: Name of its class.
        matrix: (length, length) bool, [q, k]: position q depends on position k.
        finite: Whether all outputs are finite.
        outputs: (length + 2, length, features), what the layer returned.
        noise: The largest relative distance between the two equal rows.
        causal_parts: Names of the modules that are causal in a layer that isn't, where parts were asked for.
    """

    name: str
    class_name: str
    matrix: Tensor
    finite: bool
    outputs: Tensor
    noise: float
    causal_parts: list[str] = field(default_factory=list)


@dataclass
class Observation:
    """What was seen of a model.

    Attributes:
        calls: By way of calling the model, the calls of the layers in the order in which they ran.
        real: By way of calling the model, the positions that are no padding.
        apart: For each layer, whether no packed document depends on another. None where packing was not tried.
    """

    calls: dict[Case, list[LayerCall]]
    real: dict[Case, slice]
    apart: list[bool] | None = None

    def last_tokens(self) -> dict[Case, tuple[Tensor, bool]]:
        """What the first layer made of the last real token, (features,), in each way of calling the model but packed.

        And whether that token depended on every real token and on nothing else.
        """
        found: dict[Case, tuple[Tensor, bool]] = {}
        for case, (first, *_) in self.calls.items():
            if case != "packed":
                positions = range(len(first.matrix))[self.real[case]]
                seen = first.matrix[positions[-1]].tolist()
                sees_all = seen == [position in positions for position in range(len(seen))]
                found[case] = first.outputs[0, positions[-1]], sees_all
        return found


class Probe:
    """Runs a model and watches its decoder layers."""

    def __init__(self, subject: Subject, length: int) -> None:
        """Prepare the input.

        Args:
            subject: A transformers model with weights.
            length: Number of positions in a sequence.
        """
        model, self.layers, special = subject
        self.model, self.grid = model, Grid(length + 2, length)
        self.gradients = True
        embedding = model.get_input_embeddings()
        weight = getattr(embedding, "weight", None)
        weight = next(model.parameters()) if weight is None else weight
        self.device = torch.device("cpu") if weight.is_meta else weight.device
        self.ids = _random_ids(special, weight.shape[0], length).to(self.device)  # (length,)
        self.takes = {*parameter_names(type(model)), *parameter_names(type(getattr(model, "base_model", model)))}
        self.few_logits = _few_logits(model)

    def observe(self, brief: bool = False) -> Observation:
        """Run the model in each way of calling it that its forward takes.

        Args:
            brief: leave out padding on the left, packed documents, and the causal modules inside the layers.
        """
        rows, length = self.grid
        ids = self.ids.expand(rows, length)
        seen = Observation({}, {})
        whole, padding = slice(0, length), max(1, length // 3)
        seen.calls["no mask"], seen.real["no mask"] = self.run({"input_ids": ids}, parts=not brief), whole
        if "attention_mask" in self.takes:
            real: dict[Case, slice] = {
                "mask of ones": whole,
                "padded right": slice(0, length - padding),
                "padded left": slice(padding, length),
            }
            if brief:
                del real["padded left"]
            for case, positions in real.items():
                mask = torch.zeros_like(ids)
                mask[:, positions] = 1
                seen.calls[case] = self.run({"input_ids": ids, "attention_mask": mask})
            seen.real |= real
        if not brief and "position_ids" in self.takes:
            self._observe_packed(seen)
        return seen

    def _observe_packed(self, seen: Observation) -> None:
        # One row, as collators without padding make it: FlashAttention looks for documents only there.
        positions = torch.arange(self.grid.length, device=self.device).repeat(self.grid.rows)[None]
        packed = {"input_ids": self.ids.repeat(self.grid.rows)[None], "position_ids": positions}
        plain = seen.calls["no mask"]
        try:
            calls = self.run(packed)
            apart = [_same_between(a, p, p.noise) for a, p in zip(calls, plain, strict=True)]
            if not all(apart):  # not as each document alone: replace some, and see whether the others change
                others = self.run(packed, replace_ends=True)
                apart = [_same_between(a, b, p.noise) for a, b, p in zip(calls, others, plain, strict=True)]
        except AttentionMaskError:  # the patch refuses packing where the mask code of the model can't do it
            return
        seen.calls["packed"], seen.real["packed"], seen.apart = calls, slice(0, self.grid.length), apart

    def run(self, inputs: Mapping[str, Tensor], parts: bool = False, replace_ends: bool = False) -> list[LayerCall]:
        """Run the model once.

        Args:
            inputs: Keyword arguments of the forward.
            parts: Whether to look for causal modules inside the layers.
            replace_ends: Whether the first and the last row become other sequences.

        Returns:
            The calls of the decoder layers in the order in which they ran.

        Raises:
            UnseenLayersError: If no decoder layer took hidden states of the size of the batch.
            UnsupportedModelError: If the forward failed.
            AttentionMaskError: If the patch refused the inputs.
        """
        calls: list[LayerCall] = []
        for gradients in (True, False) if self.gradients else (False,):
            recorder = _Recorder(self.grid, gradients, replace_ends)
            try:
                with recorder.watch(self.layers, parts), torch.set_grad_enabled(gradients):
                    self.model(**inputs, **self.few_logits)
                calls = recorder.calls
                break
            except AttentionMaskError:
                raise
            except Exception as error:
                # Some kernels have no backward and refuse to run where one may be asked for.
                if not gradients:
                    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__} failed on random {shapes}: {type(error).__name__}: {error}"
                    ) from error
                self.gradients = False
        if not calls:
            kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in self.layers.values())) or "none"
            raise UnseenLayersError(
                f"no decoder layer of {type(self.model).__name__} was seen at work: none of the layers that it lists "
                f"({kinds}) took hidden states of {self.grid.rows} rows by {self.grid.length} positions"
            )
        return calls


class _Recorder:
    """The hooks of one run of the model, and what they saw."""

    def __init__(self, grid: Grid, gradients: bool, replace_ends: bool) -> None:
        self.grid, self.gradients, self.replace_ends = grid, gradients, replace_ends
        self.calls: list[LayerCall] = []
        self.inputs: list[Tensor] = []  # of all layers: a layer may attend to keys that an earlier one made

    @contextmanager
    def watch(self, layers: Mapping[str, nn.Module], parts: bool) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            for name, layer in layers.items():
                handles += _LayerHooks(name, self).put_on(layer, parts)
            yield
        finally:
            for handle in handles:
                handle.remove()


class _LayerHooks:
    """The hooks of one layer."""

    def __init__(self, name: str, recorder: _Recorder) -> None:
        self.name, self.recorder = name, recorder
        self.given: list[Tensor] = []  # (rows, length, features), the inputs of the calls in progress
        self.looking_back: list[tuple[str, Tensor, Tensor]] = []  # modules inside that look causal: name, outputs, matrix

    def put_on(self, layer: nn.Module, parts: bool) -> list[RemovableHandle]:
        handles = [
            layer.register_forward_pre_hook(self.feed, with_kwargs=True),
            layer.register_forward_hook(self.read),
        ]
        if parts:
            inside = [(part, module) for part, module in layer.named_modules() if part]
            handles += [module.register_forward_hook(self.reader_of(part)) for part, module in inside]
        return handles

    def feed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        recorder = self.recorder
        place = find_states(args, kwargs, recorder.grid)
        if place is None:
            return None
        key, layout = place
        states = args[key] if isinstance(key, int) else kwargs[key]
        like = to_rows(states, layout, recorder.grid)
        rows = random_rows(like, seed=len(recorder.calls), replace_ends=recorder.replace_ends)
        self.given.append(rows.requires_grad_(recorder.gradients))
        recorder.inputs.append(rows)
        replaced = from_rows(rows, layout, states.shape)
        if isinstance(key, int):
            return (*args[:key], replaced, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: replaced}

    def read(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not self.given:
            return
        self.given.pop()
        outputs = output_rows(output, self.recorder.grid)
        if outputs is None:
            return
        matrix, noise = by_perturbation(outputs.detach())
        if not matrix.all():  # a gradient can only add to it
            matrix = matrix | self.gradient(outputs)
        finite = bool(torch.isfinite(outputs).all())
        parts: list[str] = []
        if verdict_of(matrix) != CAUSAL:  # the gradient costs a backward for each module
            parts = [n for n, out, seen in self.looking_back if verdict_of(seen | self.gradient(out)) == CAUSAL]
        self.looking_back = []
        call = LayerCall(self.name, type(module).__name__, matrix.cpu(), finite, outputs.detach().clone(), noise, parts)
        self.recorder.calls.append(call)

    def gradient(self, outputs: Tensor) -> Tensor:
        """Return the dependence matrix by gradient; all False where the outputs have no gradient."""
        recorder = self.recorder
        if recorder.gradients and outputs.requires_grad and not recorder.replace_ends:  # then the outputs alone are compared
            return by_gradient(outputs, recorder.inputs)
        length = recorder.grid.length
        return torch.zeros(length, length, dtype=torch.bool, device=outputs.device)

    def reader_of(self, part: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def read_part(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            outputs = output_rows(output, self.recorder.grid) if self.given else None
            if outputs is None:
                return
            matrix, _ = by_perturbation(outputs.detach())
            if verdict_of(matrix) == CAUSAL:
                self.looking_back.append((part, outputs.clone(), matrix))  # the layer may add to it in place

        return read_part


@contextmanager
def left_as_it_was(*models: nn.Module) -> Iterator[None]:
    """Switch dropout off and gradients on, with the CPU as default device; restore all flags and the random state at the end."""
    modules = {id(m): m for model in models for m in model.modules()}
    training = [(m, m.training) for m in modules.values()]
    devices = {p.device for m in models for p in m.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.empty(0).device.type != "cpu":  # a default device makes every operation slower, the CPU too
            stack.enter_context(torch.device("cpu"))
        # Hooks put on after compilation would not run. Importing Dynamo takes seconds; without it nothing is compiled.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, _ in training:
                module.training = False  # no dropout; not .eval(), which classes may override
            yield
        finally:
            for module, flag in training:
                module.training = flag


def _few_logits(model: nn.Module) -> dict[str, int]:
    """The argument by which a model computes the last logits alone. They say nothing of the layers, and may cost more than these.

    Only where transformers' own forward takes it and nobody else may read the logits.
    """
    forward: Any = original(type(model)).forward  # type: ignore[attr-defined]
    if "forward" in model.__dict__ or model._forward_hooks or not forward.__module__.startswith("transformers."):
        return {}
    named = inspect.signature(forward).parameters
    return {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in named}


def _random_ids(special: Collection[Any], vocabulary: int, length: int) -> Tensor:
    """Return (length,) int64: random tokens, none of the special ones, which may stand for an image or padding."""
    plain = [i for i in range(min(vocabulary, 1000)) if i not in special] or [0]
    picks = torch.randint(len(plain), (length,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(plain)[picks]


def _same_between(call: LayerCall, other: LayerCall, noise: float) -> bool:
    """Whether the documents between the first and the last are the same in both calls."""
    moved = relative_distance(other.outputs[1:-1], call.outputs[1:-1])
    return bool((moved <= threshold(noise, call.outputs.dtype)).all())
