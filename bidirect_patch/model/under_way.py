"""Which models run now in this thread, as the calls that are under way show."""

import sys
from collections.abc import Iterator
from types import FrameType

from transformers import PreTrainedModel

from .facts import names_causal_mask


def models_under_way(making_masks: bool = False, in_backward: bool = False) -> Iterator[PreTrainedModel]:
    """The models whose methods run now in this thread, the innermost first; one with several methods comes several times.

    Args:
        making_masks: only where the method that runs makes a causal mask. Before Python 3.13 a function's variables stay alive
            until it returns once they were read from outside, so that few are to be.
        in_backward: only within the backward pass that is under way, and not who called it.
    """
    for frame in _frames():
        if in_backward and frame.f_globals.get("__name__", "").startswith("torch.autograd"):
            return
        code = frame.f_code
        if "self" in code.co_varnames and (not making_masks or names_causal_mask(code)):
            model = frame.f_locals.get("self")
            if isinstance(model, PreTrainedModel):
                yield model


def is_under_construction() -> bool:
    """Whether the constructor of a model of transformers runs now in this thread."""
    constructors = (frame for frame in _frames() if frame.f_code.co_name == "__init__")
    return any(isinstance(frame.f_locals.get("self"), PreTrainedModel) for frame in constructors)


def _frames() -> Iterator[FrameType]:
    """The calls that are under way in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
