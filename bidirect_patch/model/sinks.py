"""Sink tokens: the first tokens of each sequence, which attend as in the causal model, and the layers that don't see them."""

from typing import NamedTuple

from torch import nn

from ..errors import ArgumentError
from ..swap.record import setting_of


class Sinks(NamedTuple):
    """What `enable_bidirectional` takes of that name, and what config.json and adapter_config.json say."""

    num_sink_tokens: int = 0
    num_sinkless_layers: int = 0

    @property
    def in_words(self) -> str:
        """As in a call."""
        return ", ".join(f"{name}={value}" for name, value in self._asdict().items())

    @property
    def described(self) -> str:
        """As in a sentence."""
        return self.in_words if any(self) else "no sink tokens"


NO_SINKS = Sinks()
_MOST = 2**31 - 1  # places in a sequence are counted in int32 where FlashAttention runs


def read_sinks(num_sink_tokens: object, num_sinkless_layers: object) -> Sinks:
    """The two numbers, checked.

    Raises:
        ArgumentError: one is no int from 0 to 2147483647, or there are sinkless layers without sink tokens.
    """
    for name, value in (("num_sink_tokens", num_sink_tokens), ("num_sinkless_layers", num_sinkless_layers)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ArgumentError(f"{name} must be an int of 0 or more, got {value!r}")
        if value > _MOST:
            raise ArgumentError(f"{name} must be {_MOST} at most, got {value}")
    sinks = Sinks(num_sink_tokens, num_sinkless_layers)  # type: ignore[arg-type]  # checked
    if sinks.num_sinkless_layers and not sinks.num_sink_tokens:
        raise ArgumentError(
            f"num_sinkless_layers={num_sinkless_layers} without sink tokens: give num_sink_tokens too, 1 for example"
        )
    return sinks


def sinks_of(model: nn.Module) -> Sinks:
    """The sinks that the patch has given a model that makes a mask; none for every other module."""
    setting = setting_of(model)
    return NO_SINKS if setting is None else Sinks(*setting.sinks)
