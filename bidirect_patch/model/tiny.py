"""A small random model of the same class as a real one, for questions that its structure answers and its weights don't.

`shrink` works on the names of a config's fields, by one table of rules for all families: heads and head size are
brought to 4 and 16, every width keeps its ratio to them, and layers are thinned out until one of each kind is left.
"""

import copy
import re
from collections.abc import Callable
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, TypeGuard

import torch
from torch import nn

from ..errors import BackendError, UnsupportedModelError
from ..swap.classes import original

HEADS, HEAD_DIM, VOCAB, POSITIONS, EXPERTS, WINDOW = 4, 16, 256, 256, 4, 4


def shrink(config):
    """A deep copy of `config` (a transformers config) with small sizes; the given one is not touched.

    Kept: class, backend, which kinds of layer there are and in which order, ratios of heads and widths. Windows and
    chunks become 4 positions, the vocabulary 256 tokens, position tables 256 rows.
    """
    small = copy.deepcopy(config)
    _shrink(small, None)
    return small


def tiny_like(model_or_config, attn_implementation: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """A small random model in eval mode of the class of `model_or_config`.

    A model gives its class, dtype, device and backend; a config gives the class that `AutoModelForCausalLM` names for
    it, in float32 on CPU. The global random state stays as it was.

    Raises `UnsupportedModelError` with the reason for a config that can't be shrunk to something that builds, and
    `BackendError` for a backend or package that isn't installed.
    """
    from transformers import AutoModelForCausalLM

    dtype, device = torch.float32, torch.device("cpu")
    if isinstance(model_or_config, nn.Module):
        model = pretrained(model_or_config)
        config, build = model.config, original(type(model))._from_config  # type: ignore[attr-defined]
        tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        dtype = tensor.dtype
        device = device if tensor.is_meta else tensor.device
    else:
        config, build = model_or_config, AutoModelForCausalLM.from_config
    # A config that no one gave a backend says "eager" on older releases, and means the model's default.
    chosen = "_attn_implementation" if isinstance(model_or_config, nn.Module) else "_attn_implementation_internal"
    backend = attn_implementation or getattr(config, chosen, None)
    options: dict[str, Any] = {"attn_implementation": backend} if isinstance(backend, str) else {}
    if trust_remote_code:
        options["trust_remote_code"] = True
    with _undisturbed(), torch.device("cpu"):
        try:
            small = build(shrink(config), **options)
        except ImportError as error:
            raise BackendError(
                f"a small model of {type(config).__name__} needs what isn't installed: {error}"
            ) from error
        except Exception as error:
            raise UnsupportedModelError(
                f"no small model could be built from {type(config).__name__}: {type(error).__name__}: {error}"
            ) from error
        _randomize(small)
    return small.to(device=device, dtype=dtype).eval()


def pretrained(module: nn.Module) -> nn.Module:
    """The outermost transformers model in `module`, through PEFT, DDP, compiled or home-made wrappers."""
    from transformers import PreTrainedModel

    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            return inner
    raise UnsupportedModelError(f"{type(module).__name__} holds no transformers model (a PreTrainedModel)")


@contextmanager
def _undisturbed():
    """A random state of its own, and no DeepSpeed: ZeRO-3 would partition the weights of every model that is built."""
    from transformers.integrations import deepspeed

    weak_ref = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = weak_ref


def _randomize(model: nn.Module) -> None:
    # Not the model's own initialization: that may leave gates and output projections at zero, where nothing moves.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                # Normalized queries and keys without a scale of their own would give a softmax that sees one key.
                small = 0.3 if re.search(r"(^|[._])(q|k|query|key)_?(layer)?norm", name) else 1.0
                # What starts small is rescaled by its own forward (nGPT); at 1 it would make a softmax as sharp.
                own = torch.where((parameter != 0) & (parameter.abs() < 1), parameter, 1.0)
                parameter.copy_(own * torch.empty_like(parameter).uniform_(0.5 * small, 1.5 * small))
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)


# --- sizes ------------------------------------------------------------------------------------------------------------


def _at_most(limit: int) -> Callable:
    return lambda value, scale: min(value, limit)


def _heads(value, scale):
    exact = value * scale.heads
    return int(exact) if exact == int(exact) and exact >= 1 else 1 << max(0, int(exact).bit_length() - 1)


def _even(value, scale):
    return max(2, 2 * round(value * scale.head_dim / 2))


def _width(value, scale):
    exact = value * scale.heads * scale.head_dim
    return max(8, 8 * round(exact / 8))  # grouped matrix products want strides of 16 bytes


# The first rule whose pattern is found in the field's name decides. Each takes (value, scale).
_RULES: list[tuple[str, Callable]] = [
    (r"vocab(_size.*)?$", _at_most(VOCAB)),
    (r"_token_(id|index)(s|es)?$", _at_most(VOCAB - 1)),
    (r"max_position|n_positions|n_ctx|max_seq_len|max_(target|source)_pos|max_length", _at_most(POSITIONS)),
    (r"index_topk|topk_blocks", lambda value, scale: POSITIONS),  # an indexer that may choose all shows whence it chooses
    (r"per_tok|top_?k(?!_)|moe_k$", _at_most(2)),
    (r"n_groups?$|topk_group$|expert_group$|ngroups$|o_groups$", _at_most(2)),
    (r"expert_num$|(?<!per_)experts$", _at_most(EXPERTS)),
    (r"sliding_window(_size)?$|attention_chunk_size$|^(attention_|keep_)?window_size$", _at_most(WINDOW)),
    (r"local_attention$", _at_most(2 * WINDOW)),  # both sides together
    (r"head_?dim|d_head|dim_head|d_kv$|kv_channels|rotary_dim|head_size", _even),
    (r"(?<!_per)_?heads?(_per_layer)?$|query_groups$", _heads),
    (r"hidden_(size|dim)|d_model|n_embd|model_dim|dim_model$|embd?s?_dim|embedding_(dim|size)|embed_dim", _width),
    (r"intermediate_(size|dim)|ffn_(dim|hidden)|_inner|dim_ff$|d_?ff$|feed_forward_size", _width),
    (r"proj_dim|lru_width|d_ssm|_rank$", _width),
]
_LAYER_COUNT = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|depth|num_blocks)$")
_PERIOD = re.compile(r"(pattern|period|interval|_step|every_n_layers|group_size)$")
_INDEXES = re.compile(r"(layers|idxs|ids|indices|indexes)$")
_FIRST = re.compile(r"^(first_k_dense_replace|max_window_layers|num_dense_layers)$")
_LAST = re.compile(r"^num_kv_shared_layers$")


class _Scale:
    """Ratios small / real of the number of heads and of the size of one."""

    def __init__(self, config):
        heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        if not _is_int(width):
            raise AttributeError
        if not _is_int(heads) or heads < 1:  # no attention: as if it had heads of 64
            heads = max(1, width // 64)
        rope_dim = getattr(config, "qk_rope_head_dim", None)
        given = getattr(config, "head_dim", None)
        dim = rope_dim if _is_int(rope_dim) and rope_dim else given if _is_int(given) else Fraction(width, heads)
        self.heads = Fraction(min(HEADS, heads), heads)
        self.head_dim = min(Fraction(1), HEAD_DIM / Fraction(dim))


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shrink(config, outer):
    fields = vars(config)
    # Where transformers lets layers differ from the config, the global value can't be read while that is so.
    mixed = fields.pop("_heterogeneity_spec", None)
    overrides = dict(mixed.per_layer_overrides) if mixed else {}
    try:
        scale = _Scale(config)
    except AttributeError:
        scale = outer
    settled, kept = _thin_out(config, overrides)
    for name, value in list(fields.items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _shrink(value, scale)
        elif name == "quantization_config":
            delattr(config, name)
        elif name.startswith("rope_") and isinstance(value, dict) and scale:
            setattr(config, name, _shrink_rope(value, scale))
        elif name not in settled:
            small = _resize(name, value, scale)
            if small != value:
                setattr(config, name, small)
    if overrides:
        config.per_layer_config = {
            i: {name: _resize(name, value, scale) for name, value in overrides[layer].items()}
            for i, layer in enumerate(kept)
            if layer in overrides
        }


def _resize(name, value, scale):
    rule = next((rule for pattern, rule in _RULES if re.search(pattern, name)), None)
    if rule is None or (scale is None and rule in (_even, _heads, _width)):
        return value
    if isinstance(value, (list, tuple)) and value and all(map(_is_int, value)):
        return type(value)(_resize(name, item, scale) for item in value)
    return rule(value, scale) if _is_int(value) and value > 1 else value


def _shrink_rope(rope, scale):
    small = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            value = _shrink_rope(value, scale)
        elif isinstance(value, list) and value and all(map(_is_int, value)):  # sections of the rotary dimensions
            value = _apportion(value, scale.head_dim)
        elif isinstance(value, list):  # a factor for each frequency
            value = value[: max(1, round(len(value) * scale.head_dim))]
        else:
            value = _resize(name, value, None)
        small[name] = value
    return small


def _apportion(parts, ratio):
    """`parts` scaled so that their sum is the scaled sum: [24, 20, 20] by 1/8 is [3, 3, 2]."""
    ends = [round(sum(parts[: i + 1]) * ratio) for i in range(len(parts))]
    return [end - start for start, end in zip([0, *ends], ends)]


# --- layers -----------------------------------------------------------------------------------------------------------


def _thin_out(config, overrides):
    """Keep one layer of each kind, at least two in all; returns the names of the settled fields and the kept layers."""
    fields = vars(config)
    layers = getattr(config, "num_hidden_layers", None)
    count = layers if _is_int(layers) else 0
    periods = [n for n, v in fields.items() if _PERIOD.search(n) and _is_int(v) and v > 1]
    per_layer, indexes, firsts, lasts = [], [], [], []
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and _INDEXES.search(name) and _increasing(value):
            indexes.append(name)
        elif isinstance(value, (list, tuple)) and value and (len(value) == count or name.endswith("_types")):
            per_layer.append(name)  # or repeated until there are enough
        elif isinstance(value, str) and "pattern" in name and len(value) == count:
            per_layer.append(name)
        elif _is_int(value) and _FIRST.match(name):
            firsts.append(name)
        elif _is_int(value) and _LAST.match(name):
            lasts.append(name)

    def kind(layer):
        return (
            tuple(str(fields[name][layer % len(fields[name])]) for name in per_layer),
            tuple(layer in fields[name] for name in indexes),
            tuple(layer < fields[name] for name in firsts),
            tuple(layer >= count - fields[name] for name in lasts),
            str(overrides.get(layer)),
            layer % 2 if periods else 0,
        )

    kept = sorted({kind(layer): layer for layer in reversed(range(count))}.values())
    if len(kept) == 1 < count:
        kept.append(kept[0] + 1)
    values = {}
    for name in per_layer:
        picked = [fields[name][layer % len(fields[name])] for layer in kept]
        values[name] = "".join(picked) if isinstance(fields[name], str) else type(fields[name])(picked)
    for name in indexes:
        values[name] = type(fields[name])(i for i, layer in enumerate(kept) if layer in fields[name])
    for name in firsts:
        values[name] = sum(layer < fields[name] for layer in kept)
    for name in lasts:
        values[name] = sum(layer >= count - fields[name] for layer in kept)
    for name in periods:
        values[name] = 2
    for name, value in fields.items():
        if _LAYER_COUNT.match(name) and _is_int(value):
            values[name] = len(kept) if value == count else min(value, 2)
        elif re.search(r"(period|layer)_offset$", name) and _is_int(value):
            values[name] = min(value, 1)
    for name, value in values.items():
        setattr(config, name, value)
    # A list of head counts or widths by layer is picked here and still has to be resized.
    return {n for n in values if not (n in per_layer and all(map(_is_int, values[n])))}, kept


def _increasing(value) -> bool:
    return all(map(_is_int, value)) and all(a < b for a, b in zip(value, value[1:]))
