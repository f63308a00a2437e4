"""The cases of the scan: which arguments a model is called with, read from its signature."""

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .not_tried import NOT_TRIED

BATCH, LENGTH = 2, 10
REAL = (10, 7)  # tokens of each row, where it is padded
TEXT = (6, 4)  # lengths of two texts that are packed into one row
OTHERS = 5  # length of another sequence, for cross-attention

# What a forward with **kwargs hands on to the layers and takes out again.
KNOWN_KEYWORDS = ("output_attentions", "output_hidden_states", "return_dict", "is_causal")

# What is given beside an argument, without which it does nothing.
BESIDE = {
    "encoder_attention_mask": ("encoder_hidden_states",),
    "cross_attn_head_mask": ("encoder_hidden_states",),
    "output_router_logits": ("labels",),
}

KEEPS = ("logits_to_keep", "num_logits_to_keep")
CACHES = ("past_key_values", "cache", "cache_params", "past_buckets_states", "mems", "state")


@dataclass
class Case:
    """One way to call a model.

    Attributes:
        name: The argument, and its value where it has several.
        arguments: What the patched model is called with beside `input_ids`.
        twin: What the unpatched twin is called with; None: the same.
        real: (batch, length) bool: the positions that are compared.
        allowed: (batch, length, length) bool: who may see whom at most.
        opens_windows: Whether windows are open too.
        kept: Which positions' logits there are; the twin makes all and these are taken.
        texts: Lengths of texts that are packed into one row; the twin is given each alone.
    """

    name: str
    arguments: dict[str, Any]
    twin: dict[str, Any] | None = None
    real: Tensor = field(default_factory=lambda: torch.ones(BATCH, LENGTH, dtype=torch.bool))
    allowed: Tensor = field(default_factory=lambda: torch.ones(BATCH, LENGTH, LENGTH, dtype=torch.bool))
    opens_windows: bool = False
    kept: Any = None
    texts: tuple[int, ...] = ()


@cache
def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class's forward."""
    return dict(list(inspect.signature(cls.forward).parameters.items())[1:])  # type: ignore[attr-defined]  # a module


def not_covered(cls: type) -> list[str]:
    """The arguments of a class's forward that neither are tried nor have a reason not to be."""
    known = {*_values(torch.zeros(BATCH, LENGTH, dtype=torch.long), None), *NOT_TRIED, *CACHES, "inputs_embeds"}
    return [name for name, each in parameters(cls).items() if name not in known and "VAR" not in each.kind.name]


def padded(left: bool = False) -> dict[str, Any]:
    """`attention_mask` (batch, length), with padding on the right or on the left, and what goes with it."""
    mask = torch.arange(LENGTH) < torch.tensor(REAL)[:, None]
    mask = mask.flip(1) if left else mask
    return {"attention_mask": mask.long()}


def cases(model: nn.Module, ids: Tensor) -> list[Case]:
    """Every case of a model.

    Args:
        model: The unpatched model.
        ids: (batch, length) int64.
    """
    cls = type(model)
    takes = {*parameters(cls)}
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters(cls).values())
    single = [("no argument", {})]
    values = _values(ids, model)
    for name, variants in values.items():
        if name in takes or (hands_on and name in KNOWN_KEYWORDS):
            beside = {each: values[each][""] for each in BESIDE.get(name, ()) if each in takes}
            single += [(f"{name}{label}", {name: value, **beside}) for label, value in variants.items()]
    if "encoder_hidden_states" in takes and ("output_attentions" in takes or hands_on):
        both = {"output_attentions": True, "encoder_hidden_states": values["encoder_hidden_states"][""]}
        single.append(("output_attentions, encoder_hidden_states", both))
    if "inputs_embeds" in takes:
        table = model.get_input_embeddings()
        table = table[0] if isinstance(table, nn.ModuleList) else table  # of Musicgen, which has one codebook here
        embeds = table(ids).detach()
        if embeds.dim() == 3:
            single.append(("inputs_embeds", {"inputs_embeds": embeds, "input_ids": None}))
    made = [Case(name, arguments, _for_twin(arguments), kept=_kept(arguments)) for name, arguments in single]
    real = padded()["attention_mask"].bool()
    for case in made:
        if case.name == "lengths":  # of XLM: where padding begins
            case.real, case.allowed = real, _among(real)
    if "attention_mask" in takes:
        for name, arguments in single:
            arguments = arguments | padded()
            if "labels" in arguments:
                arguments["labels"] = arguments["labels"].masked_fill(~real, -100)
            made.append(Case(f"{name}, padded", arguments, _for_twin(arguments), real, _among(real), kept=_kept(arguments)))
        real = real.flip(1)
        made.append(Case("padding on the left", padded(left=True), None, real, _among(real)))
        visible = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
        made.append(Case("a ready mask, bool", {"attention_mask": visible}, {}, opens_windows=True))
        made.append(Case("a ready mask, float", {"attention_mask": torch.zeros(visible.shape)}, {}, opens_windows=True))
    if "position_ids" in takes:
        positions = torch.cat([torch.arange(n) for n in TEXT]).expand(BATCH, -1)
        text = torch.cat([torch.full((n,), i) for i, n in enumerate(TEXT)]).expand(BATCH, -1)
        same = text[:, :, None] == text[:, None]
        made.append(Case("position_ids of two texts in a row", {"position_ids": positions}, None, allowed=same, texts=TEXT))
    past = next((name for name in CACHES if name in takes), None)
    if past is not None:
        made.append(Case("a cache", {past: _cache(model), "use_cache": True}, None))
    return made


def _values(ids: Tensor, model: nn.Module | None) -> dict[str, dict[str, Any]]:
    """{argument: {label: value}}."""
    positions, zeros = torch.arange(LENGTH), torch.zeros_like(ids)
    kinds = zeros.clone()
    kinds[:, 3:6] = 1
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    shape = (getattr(config, "num_hidden_layers", 1), getattr(config, "num_attention_heads", 1))
    heads = torch.ones(shape if all(isinstance(n, int) for n in shape) else (1, 1))
    heads[0, 0] = 0
    width = getattr(config, "hidden_size", 32)
    generator = torch.Generator().manual_seed(3)
    other = torch.randn(BATCH, OTHERS, width if isinstance(width, int) else 32, generator=generator)
    both = {"": True, " off": False}
    return {
        "use_cache": both,
        "output_attentions": {"": True},
        "output_hidden_states": {"": True},
        "return_dict": {" off": False},
        "is_causal": both,
        "labels": {"": torch.roll(ids, 3, 1)},
        "logits_to_keep": {"": 3, " by index": torch.tensor([0, 2])},
        "num_logits_to_keep": {"": 3},
        "output_router_logits": {"": True},
        "position_ids": {"": positions.expand(BATCH, -1), " for all rows": positions[None], " from 3 on": positions[None] + 3},
        "cache_position": {"": positions},
        "token_type_ids": {"": zeros, " of two kinds": kinds},
        "moe_mm_token_type_ids": {"": zeros},
        "mm_token_type_ids": {"": zeros},
        "task_type_ids": {"": zeros},
        "head_mask": {"": heads},
        "cross_attn_head_mask": {"": heads},
        "encoder_hidden_states": {"": other},
        "encoder_attention_mask": {"": torch.tensor([[1] * OTHERS, [1] * (OTHERS - 2) + [0] * 2])},
        "langs": {"": zeros},
        "lang_ids": {"": zeros[:, 0]},
        "lengths": {"": torch.tensor(REAL)},
        "input_shape_ids": {"": ids % 32},
        "input_pronunciation_ids": {"": ids % 32},
        "num_hashes": {"": 1},
        "perm_mask": {"": torch.zeros(BATCH, LENGTH, LENGTH)},
        "target_mapping": {"": torch.eye(LENGTH).expand(BATCH, -1, -1)},
        "input_mask": {"": torch.zeros(BATCH, LENGTH)},
        "use_mems": {"": True},
    }


def _for_twin(arguments: dict[str, Any]) -> dict[str, Any]:
    """The twin's arguments: its masks say what `is_causal` would, and its logits are cut afterwards."""
    return {name: value for name, value in arguments.items() if name not in ("is_causal", *KEEPS)}


def _kept(arguments: dict[str, Any]) -> Any:
    kept = next((arguments[name] for name in KEEPS if name in arguments), None)
    return slice(-kept, None) if isinstance(kept, int) else kept


def _among(real: Tensor) -> Tensor:
    return real[:, None, :].expand(-1, LENGTH, -1)


def _cache(model: nn.Module) -> Any:
    try:
        from transformers import DynamicCache
    except ImportError:
        return ()
    return DynamicCache()
