"""Verification at the first forward, of what could not run when it was patched: weights on meta, a kernel of another device."""

from typing import Any

from torch import nn

from ..attention.plan import bidirectional_plans
from ..errors import UnsupportedModelError
from ..model.decoder import Decoder
from ..model.find import decoders
from ..model.sinks import Sinks
from ..swap import in_use
from ..swap.apply import apply
from ..swap.classes import Swapped, set_forward
from ..swap.modes import Mode, Setting
from ..swap.record import Plan, setting_of
from ..swap.recording import is_graph_captured
from .proof import verify, verify_itself

_under_way: set[int] = set()  # ids of models that are being verified now; only the thread that holds `in_use.lock` uses it


class Unverified(Swapped):
    """A patched model that could not run when it was patched: it verifies itself before its first forward.

    Its setting is UNVERIFIED, and BIDIRECTIONAL from then on.
    """

    rank = 5

    @classmethod
    def build(cls, below: type, original: type) -> None:
        """See `Swapped.build`."""

        def forward(inner: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_graph_captured() or _unverified(self) is None:
                return inner(self, *args, **kwargs)
            with in_use.lock:  # other threads wait here, so that none uses an unverified output
                is_seen = id(self) in _under_way or _verify_first(self)
            result = inner(self, *args, **kwargs)
            if not is_seen:  # not before: where the model doesn't run either, its own error says more
                raise UnsupportedModelError(
                    f"{original.__name__} runs, but neither a small random model of it nor itself could be run on random "
                    "tokens, so that nothing shows whether each layer is bidirectional. allow_partial=True takes it on trust"
                )
            return result

        set_forward(cls, forward, below)


def unverified_plan(decoder: Decoder) -> tuple[nn.Module, Plan]:
    """The plan that has a decoder verified at its first forward."""
    return decoder.outermost, Plan(Unverified, setting=Setting(Mode.UNVERIFIED, decoder.sinks))


def _unverified(model: nn.Module) -> Setting | None:
    """The setting of a model that is not verified yet; None of any other."""
    setting = setting_of(model)
    return setting if setting is not None and setting.mode is Mode.UNVERIFIED else None


def verify_kernel(model: nn.Module) -> None:
    """Verify the bidirectional decoders in `model` again, whose attention function was changed.

    Raises:
        UnsupportedModelError: with this function, a layer was seen to stay causal.
    """
    with in_use.lock:
        patched = [decoder.as_patched() for decoder in decoders(model) if decoder.is_patched]
        seen = [(decoder, verify(decoder, on_trust=True)) for decoder in patched]
        add = [plan for decoder, proof in seen for plan in bidirectional_plans(decoder, *(proof or ()))]
        add += [unverified_plan(decoder) for decoder, proof in seen if proof is None and not decoder.refusals]
        apply(add)


def _verify_first(model: nn.Module) -> bool:
    """`verify_now`, unless another thread did so meanwhile."""
    setting = _unverified(model)
    return setting is None or verify_now(model, Sinks(*setting.sinks))


def verify_now(model: nn.Module, sinks: Sinks, even_on_meta: bool = True) -> bool:
    """Verify a patched, unverified model, with the handling that turns out right; False if nothing could be seen yet.

    Args:
        model: the outermost model that makes the mask of a decoder.
        sinks: those that it has.
        even_on_meta: whether a small model may be run, which was not when the model was patched.

    Raises:
        UnsupportedModelError: a layer was seen to stay causal.
    """
    _under_way.add(id(model))
    try:
        is_seen = True
        for decoder in (d.as_patched() for d in decoders(model) if d.outermost is model):
            proof = verify(decoder, even_on_meta=True) if even_on_meta else None
            if proof is None:
                is_seen = verify_itself(decoder) and is_seen
            else:
                plans = list(bidirectional_plans(decoder, *proof))
                apply(plans)
        if is_seen:
            apply([(model, Plan(Unverified, setting=Setting(Mode.BIDIRECTIONAL, sinks)))])
        return is_seen
    finally:
        _under_way.discard(id(model))
