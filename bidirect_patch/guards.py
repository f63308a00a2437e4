"""The proof that a class can be made bidirectional by the installed transformers.

It runs once per class and backend: a small random model of the same class is patched like the real one, and
`attention_report` tells what its layers see. So a transformers that stopped honouring the patch is found before the
first real batch, and an error says so.
"""

from typing import Any

import torch
from torch import nn

from . import masks, swap
from .errors import BidirectPatchError, UnsupportedModelError
from .find import Decoder
from .forward import text_config
from .report import attention_report
from .tiny import tiny_like

_verdicts: dict[tuple, str] = {}  # by class and backend: "" if seen to be bidirectional, else what was seen


def prove(decoder: Decoder, enable: Any) -> bool:
    """Whether the class of `decoder` was seen to become bidirectional; False if it can't be run here and now.

    enable: patches a model without asking for proof. Raises UnsupportedModelError if a layer was seen to stay causal.
    """
    model = decoder.builders[0] if decoder.builders else decoder.module
    backend = masks.backend_of(text_config(decoder.module.config))
    key = (swap.original(type(model)), backend, decoder.reaches, decoder.mask_code)
    if key not in _verdicts:
        if all(p.is_meta for p in model.parameters()):
            return False
        verdict = _look(model, backend, enable)
        if verdict is None:
            return False
        _verdicts[key] = verdict
    if _verdicts[key]:
        raise UnsupportedModelError(
            f"{type(model).__name__} was not made bidirectional: with the patch on, {_verdicts[key]}"
        )
    return True


def _look(model: nn.Module, backend: str, enable: Any) -> str | None:
    try:
        small = tiny_like(model)
        if backend != "flash":
            small = small.to(device="cpu", dtype=torch.float32)
        causal = attention_report(small)
    except BidirectPatchError:
        return None
    if not any(layer.verdict == "causal" for layer in causal.layers):
        return None  # it doesn't show what the real one does
    enable(small)
    report = attention_report(small)
    # Not compared with what the causal layers reached: older releases let windows reach too far, or ignored them.
    if report.is_bidirectional:
        return ""
    return f"this was seen in a small random model of its class:\n{report}"


def natively_bidirectional(decoder: Decoder) -> bool:
    """Whether the config says `is_causal: false` and transformers was seen to honour it for this architecture."""
    config = text_config(decoder.module.config)
    if getattr(config, "is_causal", True) is not False:
        return False
    key = ("native", swap.original(type(decoder.module)), masks.backend_of(config), decoder.reaches)
    if key not in _verdicts:
        try:
            layers = attention_report(tiny_like(decoder.module)).layers
            # Packed documents see each other under the native switch; that alone doesn't make it causal.
            both = all(n.verdict in ("bidirectional", "no attention") and n.padding_ok is not False for n in layers)
            _verdicts[key] = "" if both else "causal"
        except BidirectPatchError:
            return False
    return not _verdicts[key]
