"""How many sink tokens and sinkless layers a command gives a model: what it is asked for, else what the model was saved with."""

from typing import Any

from ..errors import ConfigError
from ..model.sinks import NO_SINKS, Sinks, read_sinks
from .ranges import COUNT, COUNT_OR_ZERO, check_range


def check_sinks(settings: Any) -> None:
    """Check the numbers that are asked for, each None if it is not.

    Args:
        settings: Has `num_sink_tokens`, `num_sinkless_layers` and `layers`, and `bidirectional` where that may be false.

    Raises:
        ConfigError: One is no such number, or one contradicts another.
    """
    check_range("num_sink_tokens", settings.num_sink_tokens, COUNT_OR_ZERO)
    check_range("num_sinkless_layers", settings.num_sinkless_layers, COUNT_OR_ZERO)
    check_range("layers", settings.layers, COUNT)
    if settings.num_sink_tokens == 0 and settings.num_sinkless_layers:
        raise ConfigError(
            f"num_sinkless_layers={settings.num_sinkless_layers} without sink tokens: give num_sink_tokens too, 1 for example"
        )
    if not getattr(settings, "bidirectional", True) and (settings.num_sink_tokens or settings.num_sinkless_layers):
        raise ConfigError("a causal model has no sink tokens: give bidirectional, or no num_sink_tokens and num_sinkless_layers")
    if settings.layers is not None:
        check_sinkless(settings.num_sinkless_layers or 0, settings.layers)


def check_sinkless(sinkless: int, layers: Any) -> None:
    """Check that a model has as many layers as are to be sinkless.

    Args:
        sinkless: How many.
        layers: How many it has; None if that is not known.

    Raises:
        ConfigError: It has fewer.
    """
    if isinstance(layers, int) and sinkless > layers:
        raise ConfigError(f"num_sinkless_layers must be at most {layers}, the number of layers; got {sinkless}")


def choose_sinks(settings: Any, *saved: Sinks) -> Sinks:
    """The numbers for a model.

    Args:
        settings: What is asked for: `num_sink_tokens` and `num_sinkless_layers`, each None if it is not.
        *saved: What the model and its adapter were saved with. The first that has sink tokens counts.

    Raises:
        ArgumentError: There are sinkless layers and no sink tokens.
    """
    own = next((sinks for sinks in saved if sinks != NO_SINKS), NO_SINKS)
    tokens, sinkless = settings.num_sink_tokens, settings.num_sinkless_layers
    tokens = own.num_sink_tokens if tokens is None else tokens
    if sinkless is None:
        sinkless = own.num_sinkless_layers if tokens else 0
    return read_sinks(tokens, sinkless)
