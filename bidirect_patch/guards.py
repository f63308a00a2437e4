"""The proof that a class can be made bidirectional by the installed transformers.

It runs once per class and backend: a small random model of the same class is patched like the real one, and
`attention_report` tells what its layers see. So a transformers that stopped honouring the patch is found before the
first real batch, and an error says so.
"""

from collections.abc import Callable

import torch
from torch import nn

from . import masks, swap
from .errors import BidirectPatchError, UnsupportedModelError
from .find import Decoder
from .forward import text_config
from .report import AttentionReport, attention_report
from .tiny import tiny_like

_verdicts: dict[tuple, str] = {}  # by class and backend: "" if seen to be bidirectional, else what was seen


def prove(decoder: Decoder, enable: Callable[[nn.Module], None]) -> bool:
    """Whether the class of `decoder` was seen to become bidirectional; False if no small model of it can be run.

    enable: patches a model without asking for proof. Raises UnsupportedModelError if a layer was seen to stay causal.
    """
    key = _key(decoder)
    if key not in _verdicts and not _on_meta(decoder):  # without weights there is nothing to be wrong about yet
        try:
            small = tiny_like(_subject(decoder))
            if masks.backend_of(text_config(decoder.module.config)) != "flash":
                small = small.to(device="cpu", dtype=torch.float32)
            attention_report(small)
        except Exception:  # a small model that can't be made or run, for whatever reason, proves nothing
            return False
        enable(small)
        try:
            _verdicts[key] = _seen(attention_report(small), "a small random model of its class")
        except UnsupportedModelError as error:
            _verdicts[key] = f"a small random model of its class doesn't run any more: {error}"
    return key in _verdicts and _accept(decoder, _verdicts[key])


def prove_itself(decoder: Decoder) -> None:
    """The same proof on the patched model itself, where no small one could be made. On meta there is nothing to run."""
    if _on_meta(decoder):
        return
    try:
        report = attention_report(_subject(decoder))
    except UnsupportedModelError:  # a kernel that isn't here, say: it will not run before it is
        return
    _verdicts[_key(decoder)] = _seen(report, "the model itself")
    _accept(decoder, _verdicts[_key(decoder)])


def _subject(decoder: Decoder) -> nn.Module:
    return decoder.builders[0] if decoder.builders else decoder.module


def _on_meta(decoder: Decoder) -> bool:
    return all(p.is_meta for p in decoder.module.parameters())


def _key(decoder: Decoder) -> tuple:
    backend = masks.backend_of(text_config(decoder.module.config))
    return swap.original(type(_subject(decoder))), backend, decoder.reaches, decoder.mask_code


def _seen(report: AttentionReport, where: str) -> str:
    # Not compared with what the causal layers reached: older releases let windows reach too far, or ignored them.
    return "" if report.is_bidirectional else f"this was seen in {where}:\n{report}"


def _accept(decoder: Decoder, verdict: str) -> bool:
    if verdict:
        name = swap.original(type(decoder.module)).__name__
        raise UnsupportedModelError(f"{name} was not made bidirectional: with the patch on, {verdict}")
    return True


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
