"""What a class tells by its names: patterns for attention, recurrent layers and mask code, and a forward's mask and caches.

A new kind of layer, or a mask argument with another name, goes here. The patterns are guesses. Each says what happens where it
misses, and where it matches by mistake. What they decide is never trusted: `verify` runs a small model and looks.
"""

import dis
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, wraps
from types import CellType, CodeType, FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..swap.classes import original
from ..swap.record import own_before_patch

# Mixes tokens from left to right by other means than attention, and compressors (DeepSeek-V4), which pool each run of tokens
# with the run before. A miss: verification sees the causal layer and refuses it. A wrong match: the model is refused by name.
RECURRENT = re.compile(
    r"Mamba|SSM|R[Ww][Kk][Vv]|Delta(Net|Attention|Rule)|LinearAttention|Lightning|Recurrent(?!Gemma)|R[gG]L?RU|LSTM"
    r"|ShortConv|Retention|Hyena|Compressor$"
)
# An attention module, where it has no `is_causal` of its own. A miss: the layer counts as unsupported and the model is
# refused. A wrong match: the module gets a mask that it does not use.
ATTENTION = re.compile(r"[Aa]ttention|Attn$")
# A part of a layer that treats each position alone. A miss: a layer without attention is refused. A wrong match:
# verification sees the layer.
POSITIONWISE = re.compile(r"MLP|M[oO]E|Experts?|FeedForward|FFN|Norm|Linear|Dropout|Identity|Router|Activation")
# The model's forward reads the kind of each layer. A miss: a window is taken for the window of every layer, and verification
# sees layers that look back less far than before. A wrong match: a list of kinds that the model ignores is followed.
LAYER_KIND = re.compile(r"layer_type|attention_type|is_sliding|is_chunked")
# The model makes a causal mask. A miss: the model is taken for an encoder and refused. A wrong match: an encoder is taken
# for a decoder, and its other signs (`is_causal`, `is_decoder`) decide.
CAUSAL_MASK = re.compile(r"causal_mask|causal_attention_mask|masks_for_generate|prepare_decoder_attention_mask")
TRIANGLE = re.compile(r"^tri[lu]$")  # made on the spot, as CTRL and GIT do; as above
EXTENDED_MASK = re.compile(r"get_extended_attention_mask")  # BERT and models of its time, until 5.3
CUMSUM = re.compile(r"^cumsum$")  # counts positions from the 2D mask; a miss: verification sees wrong outputs

# The forward makes a KV cache. A miss: where a model around a decoder makes one for it, the decoder refuses the cache. A wrong
# match: the model is called with use_cache=False, with which its decoder is called in any case.
CACHE_CLASS = re.compile(r"\wCache$")

# What an attention module reads to set its `is_causal`: whether it is one of the few that aren't, or whether it is causal.
_LEAVE_CAUSAL = {"use_bidirectional_attention", "is_cross_attention"}
_DECIDE = {"is_decoder"}

# Names of parameters, by family and release.
_FLAGS = ("is_causal", "causal")  # what an attention module, or in XLM the model, says of itself
CROSS_ATTENTION = ("encoder_hidden_states", "key_value_states", "cross_attention_states", "kv")  # another sequence
CACHES = ("past_key_values", "cache", "cache_params", "layer_past", "past")  # a KV cache

Function = TypeVar("Function", bound=Callable[..., Any])


def per_class(function: Function) -> Function:
    """Keep what a function finds out about a class, as long as the class has the same forward and `__init__`."""

    @cache
    def find(cls: type, *code: Any) -> Any:
        return function(cls)

    @wraps(function)
    def found(cls: Any) -> Any:
        return find(cls, getattr(cls, "forward", None), cls.__init__)

    return found  # type: ignore[return-value]  # it is called in the same way


def per_methods(function: Function) -> Function:
    """Keep what a function finds out about a class, as long as the class has the same methods."""

    @cache
    def find(cls: type, *code: Any) -> Any:
        return function(cls)

    @wraps(function)
    def found(cls: type) -> Any:
        return find(cls, *_methods(cls))

    return found  # type: ignore[return-value]  # it is called in the same way


def forwards(cls: type) -> Iterator[Any]:
    """The class's forward, and those that it overrides and may call."""
    return (base.__dict__["forward"] for base in cls.__mro__ if base is not nn.Module and "forward" in base.__dict__)


@per_class
def parameter_names(cls: type) -> tuple[str, ...]:
    """The names that `cls.forward` takes, in order; where it hands on *args or **kwargs, those of what it overrides too."""
    names: dict[str, None] = {}
    for forward in forwards(cls):
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        rest = [p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names |= dict.fromkeys(p.name for p in parameters if p.name not in rest)
        if not rest:
            break
    return tuple(names)


@per_class
def takes_any_keyword(cls: type) -> bool:
    """Whether `cls.forward` has **kwargs."""
    parameters = inspect.signature(cls.forward).parameters.values()  # type: ignore[attr-defined]  # a module
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


@per_class
def mask_parameter(cls: type) -> str | None:
    """The name of the mask among the parameters of `cls.forward`."""
    return next((n for n in ("attention_mask", "attn_mask", "mask") if n in parameter_names(cls)), None)


@per_class
def bias_parameter(cls: type) -> str | None:
    """The name of an ALiBi bias among the parameters of `cls.forward`."""
    return next((n for n in ("alibi", "position_bias") if n in parameter_names(cls)), None)


@per_class
def adds_bias_by_key(cls: type) -> bool:
    """Whether attention code with ALiBi takes one bias for each key, the same for all queries: Falcon's, until 4.44.

    A miss: the forward fails on the shape of the mirrored bias. A wrong match: a model is refused where it could be patched.
    """
    return "Falcon" in cls.__name__ and bias_parameter(cls) is not None and "cache_position" not in parameter_names(cls)


@per_class
def is_named_attention(cls: type) -> bool:
    """Whether a class is attention by its name, or by the name of a class that it inherits from."""
    if cls.__module__.startswith("torch."):  # nn.MultiheadAttention, in a pooler for example
        return False
    return any(ATTENTION.search(c.__name__) for c in cls.__mro__) and not RECURRENT.search(cls.__name__)


@per_class
def is_recurrent(cls: type) -> bool:
    """Whether a class mixes tokens by other means than attention, by its name."""
    return RECURRENT.search(cls.__name__) is not None and "norm" not in cls.__name__.lower()


@per_methods
def builds_causal_mask(cls: type) -> bool:
    """Whether the class makes a causal mask: in its forward or where it is built, or in a method that these call.

    A method that only the text model calls may stand in a base class that the vision tower has too (Mllama, until 4.57).
    """
    return any(_names_any(f, CAUSAL_MASK, TRIANGLE) for f in _methods_in_use(cls))


@per_class
def is_built_causal(cls: type) -> bool:
    """Whether the class's `__init__` sets `is_causal` to True, but for cross-attention and for what a Gemma config asks for.

    A miss: the module's own flag decides, which a user may have changed. A wrong match: verification sees an encoder.
    """
    for code in (code for base in cls.__mro__ for code in _codes(vars(base).get("__init__"))):
        if stored := list(_stored(code, "is_causal")):
            named = {*code.co_names, *code.co_consts, *code.co_varnames}
            computed = stored[-1] is None and bool(named & _LEAVE_CAUSAL) and not named & _DECIDE
            return stored[-1] is True or computed
    return False


def _codes(function: Any) -> Iterator[CodeType]:
    """The code of a function, and of the functions that it closes over: one of them is what a decorator was put around."""
    function = inspect.unwrap(function) if callable(function) else None
    return (each.__code__ for each in with_closures(function))


def with_closures(function: Any) -> Iterator[FunctionType]:
    """A function, and those that it closes over: one of them is what a decorator was put around."""
    waiting, seen = [function], set()
    while waiting:
        function = waiting.pop()
        if isinstance(function, FunctionType) and function not in seen:
            seen.add(function)
            yield function
            waiting += map(_content, function.__closure__ or ())


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _stored(code: CodeType, attribute: str) -> Iterator[Any]:
    """What `self.ATTRIBUTE = ...` stores, in order: the constant, or None where it is none."""
    steps = list(dis.get_instructions(code))
    for at, step in enumerate(steps):
        if step.opname == "STORE_ATTR" and step.argval == attribute:
            value = steps[at - 2] if at > 1 else step  # before it, self is loaded
            yield value.argval if value.opname == "LOAD_CONST" else None


@per_class
def forward_builds_mask(cls: type) -> bool:
    """Whether the class's forward itself makes a causal mask."""
    return any(_names_any(f, CAUSAL_MASK) for f in forwards(cls))


@lru_cache(maxsize=4096)
def names_causal_mask(code: CodeType) -> bool:
    """Whether a function makes a causal mask, by its code."""
    return any(CAUSAL_MASK.search(name) for name in names_in(code))


@per_class
def makes_cache(cls: type) -> bool:
    """Whether the class's forward itself makes a KV cache."""
    return "use_cache" in parameter_names(cls) and any(_names_any(f, CACHE_CLASS) for f in forwards(cls))


@per_methods
def extends_mask(cls: type) -> bool:
    """Whether the class makes its mask by `get_extended_attention_mask`, causal only where the config says is_decoder."""
    return any(_names_any(f, EXTENDED_MASK) for f in _methods(cls))


@per_class
def counts_mask(cls: type) -> bool:
    """Whether the class's forward counts the real tokens of the 2D mask."""
    return any(_names_any(f, CUMSUM) for f in forwards(cls))


@per_class
def puts_states_first(cls: type) -> bool:
    """Whether the class's forward puts `encoder_hidden_states` before the tokens (MusicGen Melody), by the name of `torch.cat`.

    A miss: the model fails, since the mask is shorter than what it is for. A wrong match: cross-attention is refused.
    """
    return "encoder_hidden_states" in parameter_names(cls) and "cat" in names_in_forward(cls)


@per_class
def reads_layer_kinds(cls: type) -> bool:
    """Whether the class's forward reads which kind each layer is."""
    return any(_names_any(f, LAYER_KIND) for f in forwards(cls))


def is_attention(module: nn.Module) -> bool:
    """Whether a module mixes tokens under a mask that it is given."""
    cls = original(type(module))
    return mask_parameter(cls) is not None and ("is_causal" in module.__dict__ or is_named_attention(cls))


def causal_flags(module: nn.Module) -> tuple[str, ...]:
    """The names of the flags by which the module itself says that it is causal, as they are without the patch."""
    return tuple(name for name in _FLAGS if own_before_patch(module, name) is True)


def given_input(kwargs: dict[str, Any]) -> Tensor | None:
    """What a forward is to run on: `inputs_embeds` (batch, length, width) or `input_ids` (batch, length)."""
    embeds = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeds is None else embeds


def names_in_forward(cls: type) -> set[str]:
    """The attributes and variables that the class's forward names."""
    codes = [inspect.unwrap(forward).__code__ for forward in forwards(cls)]
    return {name for code in codes for name in (*code.co_names, *code.co_varnames)}


def _methods(cls: type) -> Iterator[Any]:
    return (method for _, method in _named_methods(cls))


def _named_methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The methods of the class by the names that it has them under. A function may have another name itself."""
    for base in cls.__mro__:
        if base is PreTrainedModel:
            return
        yield from ((name, f) for name, f in vars(base).items() if callable(f))


def _methods_in_use(cls: type) -> list[Any]:
    """The methods of the class that build and run it, those that they name, and so on."""
    found: list[Any] = []
    names = {"__init__", "_init_weights", "forward"}
    while called := [f for name, f in _named_methods(cls) if name in names and f not in found]:
        found += called
        names.update(name for f in called for name in _names_of(f))
    return found


def _names_any(function: Any, *patterns: re.Pattern[str]) -> bool:
    return any(p.search(n) for n in _names_of(function) for p in patterns)


def _names_of(function: Any) -> Iterator[str]:
    return (name for code in _codes(function) for name in names_in(code))


def names_in(code: CodeType) -> Iterator[str]:
    """What a code object names: variables of its module and attributes, also in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
