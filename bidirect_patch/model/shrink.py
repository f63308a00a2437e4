"""The rules by which a config is made small.

The rules look at the names of a config's fields, in one table for all architectures: the number of heads and the size of
a head become 4 and 16, all widths keep their ratio to them, and one layer of each kind is kept.
"""

import copy
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, TypeGuard

from transformers import PretrainedConfig

from ..errors import UnsupportedModelError

HEADS, HEAD_DIM, VOCAB, POSITIONS, EXPERTS, WINDOW = 4, 16, 256, 256, 4, 4


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Make a small copy of a config.

    The class, the backend, the kinds of layers and their order, and the ratios of heads and widths stay the same.
    Windows and chunks become 4 positions, the vocabulary at most 256 tokens, position tables at most 256 rows.

    Args:
        config: The config of a model. It is not changed.

    Returns:
        A deep copy with small sizes.

    Raises:
        UnsupportedModelError: If a size is zero or negative.

    Example:
        >>> from transformers import LlamaConfig
        >>> small = shrink(LlamaConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=80))
        >>> small.hidden_size, small.num_attention_heads, small.num_hidden_layers
        (64, 4, 2)
    """
    small = copy.deepcopy(config)
    _shrink(small, None)
    return small


# The least value of a field that makes sense. A head_dim of 0 means that none is given; GLM-5 has it by default.
_LEAST = {
    "hidden_size": 1,
    "head_dim": 0,
    "qk_rope_head_dim": 0,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 0,
    "vocab_size": 1,
}


def _check_sizes(config: PretrainedConfig) -> None:
    for name, least in _LEAST.items():
        value = getattr(config, name, None)
        if _is_int(value) and value < least:
            raise UnsupportedModelError(
                f"{type(config).__name__} has {name} = {value}; a model can be built only if it is at least {least}"
            )


# --- sizes ------------------------------------------------------------------------------------------------------------


class _Scale(NamedTuple):
    """Ratios small / real of the number of heads and of the size of one."""

    heads: Fraction
    head_dim: Fraction


def _scale_of(config: PretrainedConfig, outer: _Scale | None) -> _Scale | None:
    """Return the scale of a config, or `outer`, that of the config around it, if it has no width of its own."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not _is_int(width):
        return outer
    if not _is_int(heads) or heads < 1:  # no attention: as if it had heads of 64
        heads = max(1, width // 64)
    rope_dim = getattr(config, "qk_rope_head_dim", None)
    given = getattr(config, "head_dim", None)
    dim = next((Fraction(size) for size in (rope_dim, given) if _is_int(size) and size), Fraction(width, heads))
    return _Scale(Fraction(min(HEADS, heads), heads), min(Fraction(1), HEAD_DIM / dim))


Limit = Callable[[int], int]
Ratio = Callable[[int, _Scale], int]


def _at_most(limit: int) -> Limit:
    return lambda value: min(value, limit)


def _vocabulary(value: int) -> int:
    return min(value, VOCAB)


def _token(value: int) -> int:
    return min(value, VOCAB - 1)


def _all_positions(value: int) -> int:
    return POSITIONS


def _heads(value: int, scale: _Scale) -> int:
    exact = value * scale.heads
    return int(exact) if exact == int(exact) and exact >= 1 else 1 << max(0, int(exact).bit_length() - 1)


def _even(value: int, scale: _Scale) -> int:
    return max(2, 2 * round(value * scale.head_dim / 2))


def _width(value: int, scale: _Scale) -> int:
    exact = value * scale.heads * scale.head_dim
    return max(8, 8 * round(exact / 8))  # grouped matrix products want strides of 16 bytes


# The first pattern that is found in the name of a field decides.
_RULES: list[tuple[str, Limit | None, Ratio | None]] = [
    (r"vocab(_size.*)?$", _vocabulary, None),
    (r"_token_(id|index)(s|es)?$", _token, None),
    (r"max_position|n_positions|n_ctx|max_seq_len|max_(target|source)_pos|max_length", _at_most(POSITIONS), None),
    # The number of keys that a query chooses by their content, wherever they are. So it is no window: with fewer keys
    # than tokens, which position depends on which would be a matter of chance.
    (r"index_topk|topk_blocks|keep_window_size", _all_positions, None),
    (r"per_tok|top_?k(?!_)|moe_k$", _at_most(2), None),
    (r"n_groups?$|topk_group$|expert_group$|ngroups$|o_groups$", _at_most(2), None),
    (r"expert_num$|(?<!per_)experts$", _at_most(EXPERTS), None),
    (r"sliding_window(_size)?$|attention_chunk_size$|^(attention_)?window_size$", _at_most(WINDOW), None),
    (r"local_attention$", _at_most(2 * WINDOW), None),  # both sides together
    (r"head_?dim|d_head|dim_head|d_kv$|kv_channels|rotary_dim|head_size", None, _even),
    (r"(?<!_per)_?heads?(_per_layer)?$|query_groups$", None, _heads),
    (r"hidden_(size|dim)|d_model|n_embd|model_dim|dim_model$|embd?s?_dim|embedding_(dim|size)|embed_dim", None, _width),
    (r"intermediate_(size|dim)|ffn_(dim|hidden)|_inner|dim_ff$|d_?ff$|feed_forward_size", None, _width),
    (r"proj_dim|lru_width|d_ssm|_rank$", None, _width),
]


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ints(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, (list, tuple)) and all(map(_is_int, value))


def _increasing(values: Sequence[int]) -> bool:
    return all(a < b for a, b in zip(values, values[1:]))


def _shrink(config: PretrainedConfig, outer: _Scale | None) -> None:
    fields = vars(config)
    # Since 5.17, transformers lets a layer differ from the config. A field that differs can't be read while that is so.
    mixed = fields.pop("_heterogeneity_spec", None)
    overrides = dict(mixed.per_layer_overrides) if mixed else {}
    _check_sizes(config)
    scale = _scale_of(config, outer)
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


def _resize(name: str, value: Any, scale: _Scale | None) -> Any:
    """Return the small value of a field: an integer or a sequence of integers is resized, all else stays."""
    if _are_ints(value) and value:
        return type(value)(_resize(name, item, scale) for item in value)
    if not _is_int(value) or value <= 1:
        return value
    for pattern, limit, ratio in _RULES:
        if re.search(pattern, name):
            if limit is not None:
                return limit(value)
            return ratio(value, scale) if ratio is not None and scale is not None else value
    return value


def _shrink_rope(rope: Mapping[str, Any], scale: _Scale) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            value = _shrink_rope(value, scale)
        elif isinstance(value, list) and value and _are_ints(value):  # sections of the rotary dimensions
            value = _apportion(value, scale.head_dim)
        elif isinstance(value, list):  # a factor for each frequency
            value = value[: max(1, round(len(value) * scale.head_dim))]
        else:
            value = _resize(name, value, None)
        small[name] = value
    return small


def _apportion(parts: Sequence[int], ratio: Fraction) -> list[int]:
    """Scale `parts` so that their sum is the scaled sum: [24, 20, 20] by 1/8 is [3, 3, 2]."""
    ends = [round(sum(parts[: i + 1]) * ratio) for i in range(len(parts))]
    return [end - start for start, end in zip([0, *ends], ends)]


# --- layers -----------------------------------------------------------------------------------------------------------

_LAYER_COUNT = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|depth|num_blocks)$")
_PERIOD = re.compile(r"(pattern|period|interval|_step|every_n_layers|group_size)$")
_OFFSET = re.compile(r"(period|layer)_offset$")
_INDEXES = re.compile(r"(layers|idxs|ids|indices|indexes)$")
_FIRST = re.compile(r"^(first_k_dense_replace|max_window_layers|num_dense_layers)$")
_LAST = re.compile(r"^num_kv_shared_layers$")


@dataclass
class _Layers:
    """What a config says of its layers: by name of the field, in the order of the fields.

    Attributes:
        count: Number of layers.
        listed: An entry for each layer, or a shorter list that is repeated.
        indexes: Increasing indexes of some layers.
        firsts: How many layers at the start are of one kind.
        lasts: How many layers at the end are of one kind.
        periods: Every how many layers one is of another kind.
        overrides: What differs from the config, by layer.
    """

    count: int
    listed: dict[str, Sequence[Any]]
    indexes: dict[str, Collection[int]]
    firsts: dict[str, int]
    lasts: dict[str, int]
    periods: list[str]
    overrides: Mapping[int, Any]

    def kind(self, layer: int) -> tuple[object, ...]:
        return (
            tuple(str(values[layer % len(values)]) for values in self.listed.values()),
            tuple(layer in values for values in self.indexes.values()),
            tuple(layer < first for first in self.firsts.values()),
            tuple(layer >= self.count - last for last in self.lasts.values()),
            str(self.overrides.get(layer)),
            layer % 2 if self.periods else 0,
        )

    def first_of_each_kind(self) -> list[int]:
        """Return the first layer of each kind, in order, and a second layer if all are of one kind."""
        kept = sorted({self.kind(layer): layer for layer in reversed(self._candidates())}.values())
        return [*kept, 1] if len(kept) == 1 < self.count else kept

    def _candidates(self) -> Sequence[int]:
        """Return layers in order, among them the first of each kind.

        Kinds repeat with a period, except at a few layers where one kind ends; so one period after each of these is
        enough, however many layers there are.
        """
        ends = {0, *self.firsts.values(), *(self.count - last for last in self.lasts.values())}
        for layers in (*self.indexes.values(), self.overrides):
            ends |= {end for layer in layers for end in (layer, layer + 1)}
        starts = [start for start in ends if 0 <= start < self.count]
        period = math.lcm(2, *(len(values) for values in self.listed.values()))
        if period * len(starts) >= self.count:
            return range(self.count)
        return sorted({layer for start in starts for layer in range(start, min(start + period, self.count))})


def _read_layers(config: PretrainedConfig, overrides: Mapping[int, Any]) -> _Layers:
    fields = vars(config)
    count = getattr(config, "num_hidden_layers", None)
    layers = _Layers(count if _is_int(count) else 0, {}, {}, {}, {}, [], overrides)
    for name, value in fields.items():
        if _INDEXES.search(name) and _are_ints(value) and _increasing(value):
            layers.indexes[name] = frozenset(value)
        elif isinstance(value, (list, tuple)) and value and (len(value) == layers.count or name.endswith("_types")):
            layers.listed[name] = value
        elif isinstance(value, str) and "pattern" in name and len(value) == layers.count:
            layers.listed[name] = value
        elif _is_int(value) and _FIRST.match(name):
            layers.firsts[name] = value
        elif _is_int(value) and _LAST.match(name):
            layers.lasts[name] = value
        if _is_int(value) and value > 1 and _PERIOD.search(name):
            layers.periods.append(name)
    return layers


def _thin_out(config: PretrainedConfig, overrides: Mapping[int, Any]) -> tuple[set[str], list[int]]:
    """Keep one layer of each kind, at least two in all.

    Args:
        config: The config, which is changed.
        overrides: What differs from the config, by layer.

    Returns:
        The names of the fields that have their final value, and the indexes of the layers that are kept.
    """
    fields, layers = vars(config), _read_layers(config, overrides)
    kept = layers.first_of_each_kind()
    values: dict[str, Any] = {}
    for name, listed in layers.listed.items():
        picked = [listed[layer % len(listed)] for layer in kept]
        values[name] = "".join(picked) if isinstance(listed, str) else type(listed)(picked)  # type: ignore[call-arg]
    for name, indexes in layers.indexes.items():
        values[name] = type(fields[name])(i for i, layer in enumerate(kept) if layer in indexes)
    for name, first in layers.firsts.items():
        values[name] = sum(layer < first for layer in kept)
    for name, last in layers.lasts.items():
        values[name] = sum(layer >= layers.count - last for layer in kept)
    for name in layers.periods:
        values[name] = 2
    for name, value in fields.items():
        if _LAYER_COUNT.match(name) and _is_int(value):
            values[name] = len(kept) if value == layers.count else min(value, 2)
        elif _OFFSET.search(name) and _is_int(value):
            values[name] = min(value, 1)
    for name, value in values.items():
        setattr(config, name, value)
    # A list of head counts or widths by layer is picked here and still has to be resized.
    return {name for name in values if not (name in layers.listed and _are_ints(values[name]))}, kept
