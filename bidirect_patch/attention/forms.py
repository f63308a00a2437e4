"""In which form a decoder takes its mask. No table by family or release says so: a small model shows it (`guards`)."""

from typing import NamedTuple

from ..attention import masks
from ..model.find import Decoder, bias_parameter, builds_causal_mask, counts_mask
from ..swap.swap import original


class Form(NamedTuple):
    """How a decoder's own mask code takes a mask, and its attention modules none.

    code: "ready": a finished 4D mask passes through. "counts": it needs the 2D mask for more than attention (positions),
        so that what it makes of that is mirrored, unless there are documents. "own": it always needs the 2D mask.
    inverted: "ready": as ones and zeros, not additive. "own": the bool mask that it makes is True where it hides.
    drops: an attention module that is handed no mask sees everything, where its backend does.
    """

    code: str
    inverted: bool = False
    drops: bool = True


def forms(decoder: Decoder) -> tuple[Form, ...]:
    """The forms to try, the likeliest and fastest first."""
    cls = original(type(decoder.module))
    classes = {type(attention) for _, attention, _ in decoder.attentions}
    alibi = any(bias_parameter(c) == "alibi" for c in classes)
    own = (Form("own"), Form("own", drops=False), Form("own", inverted=True))
    if not builds_causal_mask(cls) or (alibi and getattr(decoder.module.config, "alibi", True)):
        return own
    if decoder.in_the_way:  # what else mixes tokens takes the 2D mask
        return own
    if alibi or counts_mask(cls):
        return Form("counts"), Form("counts", drops=False), *own
    inverted = masks.ONES_AND_ZEROS and not hasattr(cls, "_update_causal_mask")
    ready = (Form("ready", inverted), Form("ready", inverted, drops=False), Form("ready", not inverted, drops=False))
    return *ready, *own
