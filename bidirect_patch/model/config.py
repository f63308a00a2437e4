"""Reading configs: which attention backend a model has (a new one starts at `backend_of`), its text part, and a view of it."""

import copy
from collections.abc import Iterator
from typing import Any, Literal

# transformers' own attention functions, between which a model may change.
_STOCK_KERNELS = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
Backend = Literal["flash", "flex", "sdpa", "eager"]


def text_config(config: Any) -> Any:
    """The text part of a config that may have parts (before 4.42 no config has)."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def parts(config: Any) -> Iterator[Any]:
    """A config and the configs in it, at any depth, each once."""
    seen: dict[int, Any] = {}

    def walk(each: Any) -> Iterator[Any]:
        if id(each) not in seen:
            seen[id(each)] = each
            yield each
            for value in vars(each).values():
                if hasattr(value, "to_dict"):
                    yield from walk(value)

    yield from walk(config)


def special_token_ids(config: Any) -> set[Any]:
    """The tokens that a config and the configs in it name: padding, an image, the end of a text, and so on."""
    named = ("token_id", "token_index", "pad_index")
    values = [value for part in parts(config) for name, value in vars(part).items() if name.endswith(named)]
    return {each for value in values for each in (value if isinstance(value, list) else [value])}


def backend_of(config: Any) -> Backend:
    """The attention backend; "eager" stands for every other function that takes an additive mask."""
    name = str(getattr(config, "_attn_implementation", None) or "eager")
    for kind in ("flash", "flex", "sdpa"):
        if kind in name:
            return kind
    return "eager"


def kernel_of(config: Any) -> str:
    """The name of a text config's attention function. Users register their own, so that one of a kind says nothing of another."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def is_known_kernel(kernel: str, seen: str) -> bool:
    """Whether what was found out with the attention function `seen` holds for `kernel`: the same, or one of transformers' own."""
    return kernel == seen or kernel in _STOCK_KERNELS


def says_bidirectional(config: Any) -> bool:
    """Whether a config asks transformers itself for bidirectional attention.

    By `is_causal: false` (5.2 and newer), or by `use_bidirectional_attention` (Gemma: true, or "all" since Gemma 4).
    """
    # Both: in a causal block, the model has a view of its config, which says True.
    causal = {id(part): getattr(part, "is_causal", True) for part in (text_config(config), config)}
    own = getattr(text_config(config), "use_bidirectional_attention", None)
    return own is True or own == "all" or all(flag is False for flag in causal.values())


class ConfigView:
    """A config in which some attributes have other values. All others are read from the original, and written to it.

    A deep copy is a real config with the other values.
    """

    def __init__(self, config: Any, **changed: Any) -> None:
        self.__dict__.update(_config=config, _changed=changed)

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_changed") or name.startswith("__"):  # not there yet while it is unpickled
            raise AttributeError(name)
        return self._changed[name] if name in self._changed else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._changed:
            self._changed[name] = value
        else:
            setattr(self._config, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        config = copy.copy(copy.deepcopy(self._config, memo))
        for name, value in self._changed.items():
            setattr(config, name, value)
        memo[id(self)] = config
        return config
