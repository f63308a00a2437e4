"""The settings that a patched model or attention module keeps, for its forward to read."""

from dataclasses import dataclass
from typing import Any

from ..model.code import Code
from ..model.places import Channel, Channels, Place
from .handling import MaskHandling


@dataclass(frozen=True)
class ModelSettings(Channels):
    """What the patch knows of a model that makes the mask."""

    handling: MaskHandling
    code: Code | None  # the code with which the class was seen to become bidirectional; None if that was not seen
    has_outer_maker: bool  # whether a model around it was patched with it, which makes its mask
    places: tuple[Place, ...]  # of the attention modules in its layers; none for a model around the decoder
    config_is_causal: bool  # whether its config says so, which reaches the forward as a keyword


@dataclass(frozen=True)
class AttentionSettings(Channel):
    """What the patch knows of one attention module."""

    config: Any  # the decoder's, for modules that keep none
    handling: MaskHandling
    omits_mask_on: tuple[str, ...]  # backends on which the module sees everything without a mask
    needs_shorter_window: bool  # FlashAttention would have to be given a window one shorter, and isn't
    compares_positions: bool  # a part of it finds the past by position_ids
