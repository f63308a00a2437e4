"""Which positions depend on which, layer by layer, seen in the running model and not read from its flags.

A short random text is run through the model once for each way of calling it (without a mask, with one, padded on
either side, two or more documents packed into a row). Before each decoder layer its input is replaced: row 0 and the
last row of the batch get the same random vectors, row 1 + p gets them too, but for another vector at position p.
After the layer two witnesses say what depends on what:

- perturbation: position q of row 1 + p differs from position q of row 0 by more than the two equal rows differ, so q
  depends on p;
- gradient: the derivative of position p of row 1 + p by position k of the same row isn't zero, so p depends on k. A
  masked weight is exactly zero and so is its gradient, while a weight too small for the first witness isn't.

A layer's input is ours and not the previous layer's output, so one causal layer doesn't hide behind another.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import AttentionMaskError, StillCausalError, UnseenLayersError, UnsupportedModelError
from ..model.facts import parameter_names
from ..model.tiny import pretrained

LONGEST = 128  # tokens of the random text at most
BIDIRECTIONAL, CAUSAL, PARTIAL, NONE = "bidirectional", "causal", "partial", "no attention"


@dataclass(frozen=True)
class LayerReport:
    """What one decoder layer does; positions are counted in tokens of the short text that was run."""

    index: int
    name: str  # as in model.named_modules()
    class_name: str
    verdict: str  # "bidirectional", "causal", "partial" or "no attention"
    backward: int  # the furthest distance at which a position depends on an earlier one
    forward: int  # ... and on a later one
    matrix: Tensor = field(repr=False)  # (length, length) bool, [q, k]: position q depends on position k; no mask given
    padding_ok: bool | None  # real positions don't depend on padding and all is finite; None: the model takes no mask
    packing_ok: bool | None  # no document depends on another; None: the model takes no position_ids, or no packing
    verdicts: dict[str, str]  # by way of calling: "no mask", "mask of ones", "padded right", "padded left", "packed"
    causal_parts: tuple[str, ...] = ()  # modules in the layer that only look back, beside others that don't

    @property
    def ok(self) -> bool:
        """Bidirectional, or mixing no positions at all, with padding and other documents out of reach."""
        return self.verdict in (BIDIRECTIONAL, NONE) and self.padding_ok is not False and self.packing_ok is not False

    @property
    def problems(self) -> str:
        """What keeps it from being `ok`, in words."""
        found = {
            self.verdict: self.verdict in (CAUSAL, PARTIAL),
            "padding reached": self.padding_ok is False,
            "documents mixed": self.packing_ok is False,
        }
        return ", ".join(problem for problem, there in found.items() if there)

    def _cells(self) -> tuple[str, ...]:
        padding = {True: "out of reach", False: "REACHED", None: "-"}[self.padding_ok]
        packing = {True: "apart", False: "MIXED", None: "-"}[self.packing_ok]
        notes = [f"only looks back: {part}" for part in self.causal_parts]
        if len(set(self.verdicts.values())) > 1:
            notes += [f"{case}: {verdict}" for case, verdict in self.verdicts.items() if verdict != BIDIRECTIONAL]
        reach = f"-{self.backward} .. +{self.forward}"
        return self.name, self.class_name, self.verdict, reach, padding, packing, "; ".join(notes)


@dataclass(frozen=True)
class AttentionReport:
    """The layers of a model in the order in which they ran. `print(report)` shows them as a table."""

    model_class: str
    backend: str | None
    length: int
    layers: list[LayerReport]

    @property
    def is_bidirectional(self) -> bool:
        """Each layer that mixes positions does so in both directions, at least one does, and each layer is `ok`."""
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
        """The layers here that don't see what the layers of `causal` see together with its mirror image in time.

        This holds a window to |q - k| < w and a chunk to its whole, where `causal` reports the same model unpatched.
        """
        pairs = self._beside(causal)
        return [new for new, old in pairs if not torch.equal(new.matrix, old.matrix | old.matrix.T)]

    def narrower_than(self, causal: "AttentionReport") -> list[LayerReport]:
        """The layers here that look back less far than the same layers of `causal`, the same model unpatched.

        One position of a window is forgiven: some releases, 4.39 among them, let it reach one further than its size.
        """
        lost = []
        for new, old in self._beside(causal):
            slack = 1 if old.backward < causal.length - 1 else 0
            if new.backward < old.backward - slack:
                lost.append(new)
        return lost

    def _beside(self, other: "AttentionReport") -> list[tuple[LayerReport, LayerReport]]:
        if (self.length, len(self.layers)) != (other.length, len(other.layers)):
            raise ValueError(
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


def attention_report(model: nn.Module, *, length: int = 7) -> AttentionReport:
    """Run `model` on short random texts of `length` tokens and tell for each decoder layer what depends on what.

    Takes what `enable_bidirectional` takes: a `*ForCausalLM`, a bare `*Model`, a PEFT, DDP or compiled wrapper, or a
    module of your own that holds one. It costs six forwards of (length + 2) * length tokens, most of them with a
    backward through one layer at a time. Windows and chunks of `length` tokens or more can't be told from full
    attention. Nothing stays behind: hooks, training flags, gradients and the random state are as before.

    Raises `UnsupportedModelError` where there is nothing to run: no transformers model inside, weights on the meta
    device, a forward that fails on plain `input_ids`, or no list of decoder layers.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"attention_report takes a torch.nn.Module, not {type(model).__name__}")
    if not 3 <= length <= LONGEST:
        raise ValueError(
            f"length must be at least 3 to tell one direction from the other and at most {LONGEST}, since length * (length + 2) "
            f"tokens are run in one row; not {length}"
        )
    inner = pretrained(model)
    if all(p.is_meta for p in inner.parameters()) and not any(hasattr(m, "_hf_hook") for m in inner.modules()):
        raise UnsupportedModelError(
            f"the weights of {type(inner).__name__} are on the meta device, so it can't be run; load them, or run "
            f"`bidirect-patch check`, which builds a small model from the config"
        )
    with _left_as_it_was(model, inner), torch.device("cpu"):  # whatever device is the default around
        return _Experiment(inner, length).report()


def assert_bidirectional(model: nn.Module, *, length: int = 7) -> None:
    """Raise `StillCausalError` with the table unless `attention_report(model)` sees a fully bidirectional model."""
    report = attention_report(model, length=length)
    if not report.is_bidirectional:
        raise StillCausalError(f"{report.summary}\n{report}")


@contextmanager
def _left_as_it_was(*models) -> Iterator[None]:
    modules = {id(m): m for model in models for m in model.modules()}
    training = [(m, m.training) for m in modules.values()]
    devices = {p.device for m in models for p in m.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
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


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Candidates for decoder layers by name: entries of the outermost `ModuleList`s that have modules inside."""
    found: dict[str, nn.Module] = {}
    containers = (nn.ModuleList, nn.ModuleDict)

    def walk(module, prefix):
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(module, nn.ModuleList) and not isinstance(child, containers):
                if any(True for _ in child.children()):
                    found[path] = child
            else:
                walk(child, f"{path}.")

    walk(model, "")
    return found


@dataclass
class _Call:
    """One call of one layer in one way of calling the model."""

    name: str
    class_name: str
    matrix: Tensor  # (length, length) bool
    finite: bool
    outputs: Tensor  # (rows, length, features)
    noise: float
    parts: list[str] = field(default_factory=list)


class _Experiment:
    def __init__(self, model, length):
        self.model, self.length, self.rows = model, length, length + 2
        self.layers = decoder_layers(model)
        self.gradients = True
        embedding = model.get_input_embeddings()
        weight = getattr(embedding, "weight", None)
        weight = next(model.parameters()) if weight is None else weight
        self.device = torch.device("cpu") if weight.is_meta else weight.device
        self.ids = self._random_ids(weight.shape[0])  # (length,)
        self.takes = {*parameter_names(type(model)), *parameter_names(type(getattr(model, "base_model", model)))}

    def _random_ids(self, vocab):
        # Special tokens may stand for images, padding or other things than text.
        config = self.model.config
        configs = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
        special = {
            value
            for c in configs
            for name, values in vars(c).items()
            if name.endswith(("token_id", "token_index", "pad_index"))
            for value in (values if isinstance(values, list) else [values])
        }
        plain = [i for i in range(min(vocab, 1000)) if i not in special] or [0]
        picks = torch.randint(len(plain), (self.length,), generator=torch.Generator().manual_seed(0))
        return torch.tensor(plain)[picks].to(self.device)

    def report(self) -> AttentionReport:
        length, rows = self.length, self.rows
        ids = self.ids.expand(rows, length)
        pad = max(1, length // 3)
        cases = {"no mask": {"input_ids": ids}}
        real = {"no mask": slice(0, length)}
        if "attention_mask" in self.takes:
            ones = torch.ones_like(ids)
            right, left = ones.clone(), ones.clone()
            right[:, -pad:] = 0
            left[:, :pad] = 0
            cases["mask of ones"] = {"input_ids": ids, "attention_mask": ones}
            cases["padded right"] = {"input_ids": ids, "attention_mask": right}
            cases["padded left"] = {"input_ids": ids, "attention_mask": left}
            real |= {"mask of ones": slice(0, length), "padded right": slice(0, length - pad)}
            real["padded left"] = slice(pad, length)
        calls = {case: self._run(inputs, parts=case == "no mask") for case, inputs in cases.items()}
        apart = None
        if "position_ids" in self.takes:
            # One row, as collators without padding make it: FlashAttention looks for documents only there.
            positions = torch.arange(length, device=self.device).repeat(rows)[None]
            packed = {"input_ids": ids.reshape(1, -1), "position_ids": positions}
            try:
                calls["packed"] = self._run(packed)
                others = self._run(packed, replace_ends=True)
                real["packed"] = slice(0, length)
                apart = [
                    self._same_between(a, b, plain.noise)
                    for a, b, plain in zip(calls["packed"], others, calls["no mask"], strict=True)
                ]
            except AttentionMaskError:  # the patch refuses what this family's mask code can't tell apart
                calls.pop("packed", None)

        layers = []
        for index, plain in enumerate(calls["no mask"]):
            same = {case: case_calls[index] for case, case_calls in calls.items()}
            verdicts = {case: _verdict(call.matrix[real[case], real[case]]) for case, call in same.items()}
            if apart and not apart[index]:
                del verdicts["packed"]  # what a document depends on can't be told from what the others do
            distinct = set(verdicts.values())
            verdict = distinct.pop() if len(distinct) == 1 else PARTIAL
            parts = tuple(plain.parts) if verdict == BIDIRECTIONAL else ()
            padded = [case for case in same if case.startswith("padded")]
            q, k = plain.matrix.nonzero(as_tuple=True)
            layers.append(
                LayerReport(
                    index=index,
                    name=plain.name,
                    class_name=plain.class_name,
                    verdict=PARTIAL if parts else verdict,
                    backward=max(0, int((q - k).max())) if len(q) else 0,
                    forward=max(0, int((k - q).max())) if len(q) else 0,
                    matrix=plain.matrix,
                    padding_ok=all(_sees_only(same[c], real[c]) for c in padded) if padded else None,
                    packing_ok=apart[index] if apart else None,
                    verdicts=verdicts,
                    causal_parts=parts,
                )
            )
        backend = getattr(self.model.config, "_attn_implementation", None)
        backend = backend if isinstance(backend, str) else None
        return AttentionReport(type(self.model).__name__, backend, length, layers)

    @staticmethod
    def _same_between(call, other, noise):
        """Documents between the first and the last are the same although those two were replaced."""
        moved = _distance(other.outputs[1:-1], call.outputs[1:-1])
        return bool((moved <= _threshold(noise, call.outputs.dtype)).all())

    def _run(self, inputs, parts=False, replace_ends=False) -> list[_Call]:
        for gradients in (True, False) if self.gradients else (False,):
            calls: list[_Call] = []
            leaves: list[Tensor] = []
            handles = []
            try:
                for name, layer in self.layers.items():
                    handles += _watch(
                        name, layer, calls, leaves, self.rows, self.length, gradients, parts, replace_ends
                    )
                with torch.set_grad_enabled(gradients):
                    self.model(**inputs)
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
            finally:
                for handle in handles:
                    handle.remove()
        if not calls:
            kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in self.layers.values())) or "none"
            raise UnseenLayersError(
                f"no decoder layer of {type(self.model).__name__} was seen at work: none of the layers that it lists "
                f"({kinds}) took hidden states of {self.rows} rows by {self.length} positions"
            )
        return calls


def _watch(name, layer, calls, leaves, rows, length, gradients, parts, replace_ends) -> list:
    """Put the hooks on one layer that feed it and add a `_Call` for each time it runs; returns their handles."""
    given: list[Tensor] = []  # leaves, (rows, length, features), of the calls in progress
    seen: list[tuple[str, Tensor]] = []

    def feed(module, args, kwargs):
        place = _find_states(args, kwargs, rows, length)
        if place is None:
            return None
        key, layout = place
        states = args[key] if isinstance(key, int) else kwargs[key]
        leaf, replaced = _perturbed(states, layout, rows, length, seed=len(calls), replace_ends=replace_ends)
        given.append(leaf.requires_grad_(gradients))
        leaves.append(leaf)  # a layer may attend to the keys that an earlier one made of its own input
        replaced = _from_rows(leaf, layout, states.shape)
        if isinstance(key, int):
            args = (*args[:key], replaced, *args[key + 1 :])
        else:
            kwargs = {**kwargs, key: replaced}
        return args, kwargs

    def read(module, args, kwargs, output):
        if not given:
            return
        leaf = given.pop()
        outputs = _output_rows(output, rows, length)
        if outputs is None:
            return
        matrix, noise = _by_perturbation(outputs.detach())
        if leaf.requires_grad and outputs.requires_grad:
            matrix = matrix | _by_gradient(outputs, leaves)
        finite = bool(torch.isfinite(outputs).all())
        call = _Call(name, type(module).__name__, matrix.cpu(), finite, outputs.detach().clone(), noise)
        call.parts = [part for part, m in seen if _verdict(m) == CAUSAL]
        calls.append(call)
        seen.clear()

    def read_part(part):
        def hook(module, args, output):
            if given and (outputs := _output_rows(output, rows, length)) is not None:
                seen.append((part, _by_perturbation(outputs.detach())[0].cpu()))

        return hook

    handles = [
        layer.register_forward_pre_hook(feed, with_kwargs=True),
        layer.register_forward_hook(read, with_kwargs=True),
    ]
    if parts:
        inside = [(part, module) for part, module in layer.named_modules() if part]
        handles += [module.register_forward_hook(read_part(part)) for part, module in inside]
    return handles


# --- the two witnesses ------------------------------------------------------------------------------------------------


def _perturbed(states, layout, rows, length, seed, replace_ends):
    generator = torch.Generator().manual_seed(seed)
    like = _to_rows(states, layout, rows, length)  # (rows, length, features)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(like)

    features = like.shape[-1]
    text, other = random(length, features), random(length, features)
    new = text.repeat(rows, 1, 1)
    positions = torch.arange(length, device=new.device)
    new[1 + positions, positions] = other
    if replace_ends:
        new[0], new[-1] = random(length, features), random(length, features)
    return new, None


def _by_perturbation(outputs):
    """(rows, length, features) -> (length, length) bool [q, k], and how far the two equal rows are apart."""
    noise = _distance(outputs[-1], outputs[0]).max().item()
    moved = _distance(outputs[1:-1], outputs[:1]) > _threshold(noise, outputs.dtype)  # [perturbed, position]
    return moved.T, noise


def _by_gradient(outputs, leaves):
    length = outputs.shape[1]
    positions = torch.arange(length, device=outputs.device)
    chosen = outputs[1 + positions, positions]  # (length, features)
    weights = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0)).to(chosen)
    gradients = torch.autograd.grad((chosen * weights).sum(), leaves, allow_unused=True, retain_graph=True)
    depends = torch.zeros(length, length, dtype=torch.bool, device=outputs.device)
    for gradient in gradients:
        if gradient is not None:
            depends |= (gradient[1:-1].to(outputs.device) != 0).any(-1)
    return depends


def _distance(a, b):
    a, b = a.double(), b.double()
    distance = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
    return distance.nan_to_num(nan=float("inf"))


# Rounding of equal rows that a kernel (an expert's matrix product, say) computes at different places; what truly
# depends but moves less than this, the gradient shows.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _threshold(noise, dtype):
    return max(10 * noise, _ROUNDING.get(dtype, torch.finfo(dtype).eps)) if noise < float("inf") else 0.0


def _sees_only(call, real):
    """No real position depends on a padded one, and no position is infinite or NaN."""
    padded = torch.ones(len(call.matrix), dtype=torch.bool)
    padded[real] = False
    return call.finite and not bool(call.matrix[real][:, padded].any())


def _verdict(matrix):
    """`matrix` (n, n) bool, [q, k]: q depends on k."""
    if not (matrix.tril(-1) | matrix.triu(1)).any():
        return NONE
    if not matrix.triu(1).any():
        return CAUSAL
    return BIDIRECTIONAL if torch.equal(matrix, matrix.T) else PARTIAL


# --- where rows and positions are in a tensor -------------------------------------------------------------------------


def _layout(tensor, rows, length):
    """(axis, kind) of rows and positions: neighbouring axes in either order, or one axis that holds both."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return None
    shape = tuple(tensor.shape)
    for axis in range(len(shape) - 1):
        if shape[axis : axis + 2] == (rows, length):
            return axis, "rows first"
        if shape[axis : axis + 2] == (length, rows):
            return axis, "positions first"
        if shape[axis] == rows * length:
            return axis, "flat"
    return None


def _to_rows(tensor, layout, rows, length):
    """-> (rows, length, features)"""
    axis, kind = layout
    if kind == "flat":
        tensor = tensor.unflatten(axis, (rows, length))
    elif kind == "positions first":
        tensor = tensor.transpose(axis, axis + 1)
    return tensor.movedim((axis, axis + 1), (0, 1)).reshape(rows, length, -1)


def _from_rows(states, layout, shape):
    """The inverse of `_to_rows`, as a new tensor that the layer may write into."""
    axis, kind = layout
    rest = shape[:axis] + shape[axis + (1 if kind == "flat" else 2) :]
    tensor = states.clone().unflatten(2, rest).movedim((0, 1), (axis, axis + 1))
    if kind == "flat":
        return tensor.flatten(axis, axis + 1)
    return (tensor.transpose(axis, axis + 1) if kind == "positions first" else tensor).contiguous()


def _find_states(args, kwargs, rows, length):
    """Where the hidden states are among a layer's arguments, and their layout."""
    named = [("hidden_states", kwargs["hidden_states"])] if "hidden_states" in kwargs else []
    for key, value in [*named, *enumerate(args), *kwargs.items()]:
        if (layout := _layout(value, rows, length)) is not None:
            return key, layout
    return None


def _output_rows(output, rows, length):
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    for value in values:
        if (layout := _layout(value, rows, length)) is not None:
            return _to_rows(value, layout, rows, length)
    return None
