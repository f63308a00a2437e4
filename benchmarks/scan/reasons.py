"""Why outcomes that are not "equal" are right, or are known limits."""

import re
from typing import Any

# What explains itself.
NEEDS_NO_REASON = re.compile(r"equal$|by dependency$|stock refuses too")

# (kind of model, model type, case, outcome), each a pattern of the whole text, and the reason.
_REASONS: list[tuple[str, str, str, str, str]] = [
    (".*", ".*", r"is_causal(, padded)?", "our error: ArgumentError", "it asks a bidirectional model for causal attention"),
    (".*", ".*", "a cache", "our error: CacheError", "a bidirectional model keeps no KV cache"),
]


def why(row: Any, case: str, outcome: str) -> str | None:
    """The reason for an outcome of a `Row`, None if there is none."""
    given = (row.kind, row.model_type, case, outcome)
    return next((reason for *patterns, reason in _REASONS if all(map(re.fullmatch, patterns, given))), None)
