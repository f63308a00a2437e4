"""The best setup as settings of the training commands."""

from typing import Any

from .model import Source
from .setups import Setup

# What both commands take a setting for by default. `mntp` has no `bidirectional`: it trains no causal model.
_DEFAULTS = {"bidirectional": True}


def encoder_settings(source: Source, setup: Setup) -> dict[str, Any]:
    """The settings by which `simcse` loads a model so. `mntp` takes them too, but for a causal model.

    Args:
        source: Where the model comes from.
        setup: The setup. Centring, and leaving out a first token that is no sink, have no setting.
    """
    own = {"model_name_or_path": source.name} | source.options | {"torch_dtype": source.torch_dtype}
    settings = setup.to_settings()
    return own | {name: value for name, value in settings.items() if value != _DEFAULTS.get(name)}


def lacking(setup: Setup) -> str:
    """What of a setup has no setting, in words."""
    parts = ["the centring"] if setup.centred else []
    if setup.leaves_out_first and not setup.attention.sinks:
        parts.append("that the first token is not pooled")
    return " and ".join(parts)
