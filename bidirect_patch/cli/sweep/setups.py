"""What is measured: kinds of attention, and setups, each of which turns a model into an encoder."""

from typing import Any, Literal, NamedTuple

PoolingMode = Literal["mean", "weighted_mean"]


class Attention(NamedTuple):
    """Who sees whom.

    Attributes:
        bidirectional: Whether tokens see those after them.
        sinks: How many tokens at the start stay causal.
        blind: In how many of the last layers the first token is hidden from the others.
    """

    bidirectional: bool
    sinks: int = 0
    blind: int = 0

    def __str__(self) -> str:
        name = "bidirectional" if self.bidirectional else "causal"
        if self.sinks:
            name += f", {self.sinks} sink token{'s' * (self.sinks > 1)}"
        if self.blind:
            last = "the last layer" if self.blind == 1 else f"the last {self.blind} layers"
            name += f", hidden from {last}" if self.sinks else f", first token hidden from {last}"
        return name

    @property
    def family(self) -> "Attention":
        """The same attention with no blind layers."""
        return self._replace(blind=0)

    @property
    def can_be_saved(self) -> bool:
        """Whether there is such a model; a causal one hides nothing from its last layer, and is only measured so."""
        return self.bidirectional or not self.blind


CAUSAL, OPEN, SINK = Attention(False), Attention(True), Attention(True, 1)
# How many of the last layers are tried blind, by family.
BLIND = {CAUSAL: 1, OPEN: 0, SINK: 2}


class Pooling(NamedTuple):
    """How token vectors become an embedding.

    Attributes:
        mode: "mean"; or "weighted_mean", where the n-th of the pooled tokens has the weight n.
        with_first: Whether the first token is pooled.
    """

    mode: PoolingMode
    with_first: bool

    def __str__(self) -> str:
        return self.mode.replace("_", " ") + (", with the first token" if self.with_first else "")


MODES: tuple[PoolingMode, ...] = ("mean", "weighted_mean")


def poolings(family: Attention) -> list[Pooling]:
    """The poolings that are tried with an attention. Sink tokens are not pooled, as everywhere in this package."""
    return [Pooling(mode, with_first) for mode in MODES for with_first in ((False,) if family.sinks else (False, True))]


class Setup(NamedTuple):
    """A whole setup.

    Attributes:
        attention: Who sees whom.
        first_token: The token that is put before each text; None if the tokenizer stays as it is.
        layers: How many layers are kept. The model's final norm comes after them.
        pooling: How token vectors become an embedding.
        centred: Whether the mean of the embeddings of the texts is subtracted.
    """

    attention: Attention
    first_token: str | None
    layers: int
    pooling: Pooling
    centred: bool

    @property
    def leaves_out_first(self) -> bool:
        """Whether the first token is not pooled."""
        return not self.pooling.with_first

    def to_settings(self) -> dict[str, Any]:
        """The settings of `mntp` and `simcse` that stand for it."""
        settings: dict[str, Any] = {"bidirectional": self.attention.bidirectional}
        if self.attention.bidirectional:
            settings |= {"num_sink_tokens": self.attention.sinks, "num_sinkless_layers": self.attention.blind}
        if self.first_token is not None:
            settings["sink_token"] = self.first_token
        return settings | {"layers": self.layers, "pooling_mode": self.pooling.mode}
