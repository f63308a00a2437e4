"""The modes of a decoder: as loaded, bidirectional, unverified, causal within a block, mixed."""

from enum import Enum
from typing import NamedTuple


class Mode(Enum):
    """How a decoder attends, as far as the patch goes."""

    AS_LOADED = "as loaded"  # without the patch: causal, or bidirectional by its config
    BIDIRECTIONAL = "bidirectional"
    UNVERIFIED = "bidirectional, but not verified yet"  # it could not run when it was patched
    CAUSAL_BLOCK = "inside a causal block"  # it was bidirectional before the block
    MIXED = "bidirectional in part"  # some of its modules have the patch, or a call of one goes around it, or one was moved


class Setting(NamedTuple):
    """A mode, and how many sink tokens and sinkless layers the decoder has in it."""

    mode: Mode
    sinks: tuple[int, int] = (0, 0)

    @property
    def attends(self) -> "Setting":
        """The same for two settings in which a decoder attends in the same way."""
        if self.mode in (Mode.BIDIRECTIONAL, Mode.UNVERIFIED):
            return Setting(Mode.BIDIRECTIONAL, self.sinks)
        return Setting(Mode.MIXED if self.mode is Mode.MIXED else Mode.CAUSAL_BLOCK)

    def in_words(self, other: "Setting") -> str:
        """In words; with the sinks if `other` differs in nothing else."""
        if self.attends.mode is Mode.CAUSAL_BLOCK:
            return "causal"
        if self.mode is Mode.MIXED:
            return self.mode.value
        numbers = f"{self.sinks[0]} sink tokens and {self.sinks[1]} sinkless layers" if any(self.sinks) else "no sink tokens"
        sinks = f" with {numbers}"
        return "bidirectional" + sinks * (other.attends.mode is Mode.BIDIRECTIONAL)
