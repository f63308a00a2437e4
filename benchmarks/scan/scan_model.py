"""All cases of one model: the patched model beside an unpatched twin under explicit masks."""

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

import bidirect_patch.auto  # noqa: F401  (what is saved as bidirectional opens as bidirectional)
from bidirect_patch import enable_bidirectional
from bidirect_patch.checkpoints import policy
from bidirect_patch.errors import CausalMaskWarning
from tests.helpers import zoo

from .cases import BATCH, LENGTH, REAL, Case, cases, padded, parameters
from .outcomes import BY_DEPENDENCY, EQUAL, compared, raised, unlike
from .reference import explicit_masks, open_buffers, told_windows

NOT_CAUSAL = "bidirectional all the same"
FOLLOWED = "warned: CausalMaskWarning"
# Families whose layers, in some releases, hide what is before their window in a ready mask too: stock under that mask is right.
CUT_BY_LAYERS = ("gemma2", "cohere2")
# Until 4.40, an eager window of w reached distance w.
WINDOW_REACHES_FURTHER = zoo.RELEASE < Version("4.40")
NO_ROWS = torch.ones(1, 1, dtype=torch.bool)  # the real positions of what has none, as gradients
Build = Callable[[str], nn.Module]  # backend -> model, with the same weights each time


class Scan:
    """A model, its patched copy and its unpatched twin.

    Args:
        build: Makes the model on a backend.
        backend: That of the patched model; the twin is on eager attention.
        choose: What of the patched copy is enabled.
    """

    def __init__(self, build: Build, backend: str = "eager", choose: Callable[[nn.Module], nn.Module] = lambda m: m) -> None:
        model = build("eager")
        self.stock = copy.deepcopy(model) if backend == "eager" else build(backend)
        self.stock.load_state_dict(model.state_dict())  # some weights are drawn from memory as it is
        self.twin = open_buffers(model)
        self.patched = copy.deepcopy(self.stock)
        enable_bidirectional(choose(self.patched))
        self.ids = zoo.inputs(self.stock, BATCH, LENGTH)["input_ids"]
        self.windows: dict[str, Any] = {"windows": told_windows(self.twin)}
        if WINDOW_REACHES_FURTHER:
            self.windows["longest"] = getattr(self.twin.config, "sliding_window", None)
        base = [Case("no argument", {}), _case_of_padding()]
        self.has_reference = all(self._sees_all(case, self._twin) for case in base if not self._lacks(case))

    def outcomes(self, only_with_encoder: bool = False) -> dict[str, str]:
        """{case: outcome}; `only_with_encoder` those in which states of an encoder are given."""
        every = cases(self.stock, self.ids)
        if only_with_encoder:
            return {case.name: self.outcome(case) for case in every if "encoder_hidden_states" in case.arguments}
        runs = {
            "saved and opened": self._saved,
            "saved, opened causal and enabled": self._enabled_again,
            "gradients": lambda: self._gradients(False),
            "gradients, checkpointing": lambda: self._gradients(True),
            "vmap": self._vmap,
            "vmap of gradients": self._vmap_of_gradients,
        }
        # These first: a forward that raises may leave a wrapper of transformers on its modules (4.57 to 5.1), which copies share.
        found = {name: run() for name, run in runs.items()}
        return {case.name: self.outcome(case) for case in every} | found

    def _lacks(self, case: Case) -> bool:
        return bool(case.arguments.keys() - parameters(type(self.stock)).keys())

    def _call(self, model: nn.Module, arguments: dict[str, Any], ids: Tensor) -> Any:
        given = {"input_ids": ids, **copy.deepcopy(arguments)}  # CTRL scales inputs_embeds in place
        torch.manual_seed(0)  # dropout, jitter, hashes
        return model(**{name: value for name, value in given.items() if value is not None})

    def _patched(self, case: Case, ids: Tensor) -> Any:
        return self._call(self.patched, case.arguments, ids)

    def _twin(self, case: Case, ids: Tensor) -> Any:
        arguments = dict(case.arguments if case.twin is None else case.twin)
        if "use_cache" in parameters(type(self.twin)):
            arguments["use_cache"] = False  # BigBird would take keys of other layers from a cache
        if case.texts:
            return {"logits": torch.cat([self._alone(text) for text in ids.split(case.texts, 1)], 1)}
        if case.opens_windows and self.twin.config.model_type in CUT_BY_LAYERS:
            return self._call(self.twin, {**case.arguments, "use_cache": False}, ids)
        with explicit_masks(self.twin, case.allowed, case.opens_windows, **self.windows):
            output = self._call(self.twin, arguments, ids)
        if case.kept is not None:
            return {"logits": output.logits[:, case.kept]}
        return output

    def _alone(self, ids: Tensor) -> Tensor:
        """The logits of one of the texts of a packed row."""
        positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
        with explicit_masks(self.twin, torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool), **self.windows):
            return _by_token(self._call(self.twin, {"position_ids": positions}, ids), detached=False)

    def outcome(self, case: Case) -> str:
        """The outcome of one case; see `outcomes`."""
        outcome = self._outcome(case)
        asks_for_causal = case.arguments.get("is_causal") is True
        return NOT_CAUSAL if asks_for_causal and outcome in (EQUAL, BY_DEPENDENCY) else outcome

    @torch.no_grad()
    def _outcome(self, case: Case) -> str:
        def stock() -> Any:
            return self._call(self.stock, case.arguments, self.ids)

        def patched() -> Any:
            return self._patched(case, self.ids)

        if self.has_reference:
            return compared(patched, lambda: self._twin(case, self.ids), stock, case.real, case.kept)
        # Called and thrown away: the errors are told apart in one place.
        outcome = compared(patched, patched, stock, case.real, case.kept)
        if outcome != EQUAL:
            return outcome
        return BY_DEPENDENCY if self._sees_all(case, self._patched) else "differs: it does not see all tokens of a text alone"

    @torch.no_grad()
    def _sees_all(self, case: Case, run: Callable[[Case, Tensor], Any]) -> bool:
        """Whether the last token of each row moves the real positions that may see it, and padding moves none."""
        last = torch.tensor([int(row.nonzero().max()) for row in case.real])
        moved = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        for step in (17, 31):  # a router or a top-k may hide a change
            moved |= self._moved(case, run, last, step)
        may = case.allowed[torch.arange(BATCH), :, last] & case.real
        if not torch.equal(moved & case.real, may):
            return False
        for row, real in enumerate(case.real):
            for hidden in (~real).nonzero()[:, 0].tolist():
                at = last.clone()
                at[row] = hidden
                if bool((self._moved(case, run, at, 17)[row] & real).any()):
                    return False
        return True

    def _moved(self, case: Case, run: Callable[[Case, Tensor], Any], at: Tensor, step: int) -> Tensor:
        """(batch, length) bool: which positions move when one token of each row changes; what is not put out counts as moved."""
        other = self.ids.clone()
        rows = torch.arange(BATCH)
        other[rows, at] = zoo.FIRST_ID + (other[rows, at] - zoo.FIRST_ID + step) % (zoo.LAST_ID - zoo.FIRST_ID)
        again = next(c for c in (*cases(self.stock, other), case) if c.name == case.name)
        before, after = (_by_token(run(c, ids)) for c, ids in ((case, self.ids), (again, other)))
        moved = (after - before).abs().amax(-1) > 1e-5 * before.abs().max()
        if case.kept is None:
            return moved
        all_moved = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        all_moved[:, case.kept] = moved
        return all_moved

    # --- what is no argument ----------------------------------------------------------------------------------------

    def _base(self) -> list[Case]:
        return [case for case in (Case("no argument", {}), _case_of_padding()) if not self._lacks(case)]

    def _reopened(self, enables: bool) -> nn.Module:
        before, policy.auto_is_imported = policy.auto_is_imported, enables
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                zoo.foreign_tower(self.stock.config.model_type),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # that it is opened as a causal model, as is wanted
                self.patched.save_pretrained(folder)
                backend = self.stock.config._attn_implementation
                return type(self.stock).from_pretrained(folder, attn_implementation=backend).eval()
        finally:
            policy.auto_is_imported = before

    def _outcome_of(self, model: nn.Module) -> str:
        """The base cases on another model than the patched one."""
        kept, self.patched = self.patched, model
        try:
            outcomes = [self.outcome(case) for case in self._base()]
        finally:
            self.patched = kept
        return max(outcomes, key=lambda outcome: outcome not in (EQUAL, BY_DEPENDENCY))

    def _saved(self) -> str:
        return self._of_reopened(lambda: self._reopened(True))

    def _enabled_again(self) -> str:
        return self._of_reopened(lambda: enable_bidirectional(self._reopened(False)))

    def _of_reopened(self, reopen: Callable[[], nn.Module]) -> str:
        def stock() -> None:
            with tempfile.TemporaryDirectory() as folder, zoo.foreign_tower(self.stock.config.model_type):
                self.stock.save_pretrained(folder)
                opened = type(self.stock).from_pretrained(folder, attn_implementation="eager").eval()
                with torch.no_grad():
                    same = unlike(self._call(opened, {}, self.ids), self._call(self.stock, {}, self.ids), _case_of_padding().real)
                if same != EQUAL:
                    raise ValueError("the model that is opened is another one")

        outcome = compared(reopen, lambda: torch.zeros(0), stock, _case_of_padding().real)
        if outcome.startswith(("crash", "our error", "stock")):
            return outcome
        outcome = self._outcome_of(reopen())
        refusal = raised(stock) if outcome.startswith("differs") else None
        return f"stock refuses too: {refusal}" if refusal else outcome

    def _gradients(self, checkpoints: bool) -> str:
        case = self._base()[-1]
        kinds = ("token_type_ids", "mm_token_type_ids")  # some models want them in training
        case.arguments |= {name: torch.zeros_like(self.ids) for name in kinds if name in parameters(type(self.stock))}

        def gradients(model: nn.Module, run: Callable[..., Any]) -> dict[str, Tensor]:
            model.train()
            logits = _by_token(run(), detached=False)
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
            (logits * weights)[case.real[:, -logits.shape[1] :]].sum().backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

        def of_copy(model: nn.Module) -> dict[str, Tensor]:
            model = copy.deepcopy(model)
            if checkpoints:
                model.gradient_checkpointing_enable()
            return gradients(model, lambda: self._call(model, case.arguments, self.ids))

        def wanted() -> dict[str, Tensor]:
            model = copy.deepcopy(self.twin if self.has_reference else self.patched)
            with explicit_masks(model, case.allowed, **self.windows) if self.has_reference else contextlib.nullcontext():
                return gradients(model, lambda: self._call(model, case.arguments, self.ids))

        return compared(lambda: of_copy(self.patched), wanted, lambda: of_copy(self.stock), NO_ROWS)

    def _vmap(self) -> str:
        case = self._base()[-1]
        rows = (self.ids, *case.arguments.values())

        def mapped(model: nn.Module) -> Tensor:
            def one(ids: Tensor, *mask: Tensor) -> Tensor:
                given = dict(zip(case.arguments, (m[None] for m in mask)))
                return _by_token(model(input_ids=ids[None], **given), detached=False)[0]

            with torch.no_grad():
                return torch.func.vmap(one, randomness="different")(*rows)

        def wanted() -> Tensor:
            with torch.no_grad():
                return _by_token((self._twin if self.has_reference else self._patched)(case, self.ids))

        return compared(lambda: mapped(self.patched), wanted, lambda: mapped(self.stock), case.real)

    def _vmap_of_gradients(self) -> str:
        case = self._base()[-1]
        rows = (self.ids, *case.arguments.values())

        def loss(logits: Tensor) -> Tensor:
            return logits[:, 0].float().square().sum()

        def mapped(model: nn.Module) -> dict[str, Tensor]:
            weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

            def one(weights: dict[str, Tensor], ids: Tensor, *mask: Tensor) -> Tensor:
                given = {"input_ids": ids[None], **dict(zip(case.arguments, (m[None] for m in mask)))}
                return loss(_by_token(torch.func.functional_call(model, weights, (), given), detached=False))

            grad = torch.func.vmap(torch.func.grad(one), (None, *(0 for _ in rows)), randomness="different")
            return {name: g.sum(0) for name, g in grad(weights, *rows).items() if g.any()}

        def wanted() -> dict[str, Tensor]:
            model = self.twin if self.has_reference else self.patched
            logits = _by_token((self._twin if self.has_reference else self._patched)(case, self.ids), detached=False)
            loss(logits).backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            model.zero_grad()
            return found

        return compared(lambda: mapped(self.patched), wanted, lambda: mapped(self.stock), NO_ROWS)


def scan_inner(build: Build, choose: Callable[[nn.Module], nn.Module], backend: str = "eager") -> dict[str, str]:
    """{case: outcome} of a multimodal model of which the text model alone is enabled.

    The model around it may make a causal mask for it, which is followed: then a CausalMaskWarning has to say so.
    """
    found = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scan = Scan(build, backend, choose)
        enabled = scan.patched
        for case in cases(scan.stock, scan.ids):
            scan.patched = copy.deepcopy(enabled)  # it warns of the first mask that it is given
            before = len(caught)
            outcome = scan.outcome(case)
            warned = any(issubclass(each.category, CausalMaskWarning) for each in caught[before:])
            found[case.name] = FOLLOWED if outcome.startswith("differs") and warned else outcome
    return found


def _case_of_padding() -> Case:
    real = torch.arange(LENGTH) < torch.tensor(REAL)[:, None]
    return Case("padding", padded(), None, real, real[:, None, :].expand(-1, LENGTH, -1))


def _by_token(output: Any, detached: bool = True) -> Tensor:
    """The logits of an output, or else its first tensor with a vector for each token: (batch, length, width)."""
    values = [output.logits] if hasattr(output, "logits") else list(output.values() if hasattr(output, "values") else output)
    found = next(value for value in values if isinstance(value, Tensor) and value.dim() >= 3)
    return found.detach() if detached else found
