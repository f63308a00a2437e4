"""The ways in which a model's own mask code can take a mask of ours; `verify` tries them one after another."""

from typing import Literal, NamedTuple

from ..model.decoder import Decoder
from ..model.facts import bias_parameter, builds_causal_mask, counts_mask
from ..swap.classes import original
from .versions import READY_MASKS_ARE_INVERTED


class MaskHandling(NamedTuple):
    """How a decoder's mask code takes a mask, and what its attention modules do without one."""

    # "ready": a finished 4D mask passes through. "counts": the code needs the 2D mask for more than attention (positions), so
    # that the mask it makes is mirrored, unless sequences are packed. "own": it always needs the 2D mask.
    kind: Literal["ready", "counts", "own"]
    # For "ready": the finished mask is ones and zeros, which the code inverts; else it is added to the scores, or bool.
    ready_is_ones: bool = False
    # For "counts" and "own": a bool mask that the code makes is True where it hides; else True where visible.
    made_is_hidden: bool = False
    # Whether an attention module without a mask sees everything, where its backend does.
    sees_all_without_mask: bool = True


def possible_handlings(decoder: Decoder) -> tuple[MaskHandling, ...]:
    """What to try, the likeliest and fastest first."""
    cls = original(type(decoder.module))
    classes = {original(type(attention.module)) for attention in decoder.attentions}
    alibi = any(bias_parameter(c) == "alibi" for c in classes)
    own = (
        MaskHandling("own"),
        MaskHandling("own", sees_all_without_mask=False),
        MaskHandling("own", made_is_hidden=True),
    )
    if not builds_causal_mask(cls) or (alibi and getattr(decoder.module.config, "alibi", True)):
        return own
    if decoder.refusals:  # what else mixes tokens takes the 2D mask
        return own
    if alibi or counts_mask(cls):
        return MaskHandling("counts"), MaskHandling("counts", sees_all_without_mask=False), *own
    is_ones = READY_MASKS_ARE_INVERTED and not hasattr(cls, "_update_causal_mask")
    ready = (
        MaskHandling("ready", is_ones),
        MaskHandling("ready", is_ones, sees_all_without_mask=False),
        MaskHandling("ready", not is_ones, sees_all_without_mask=False),
    )
    return *ready, *own
