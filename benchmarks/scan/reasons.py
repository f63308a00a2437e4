"""Why outcomes that are not "equal" are right, or are known limits."""

import re

from .cases import BATCH, LENGTH

# What explains itself.
NEEDS_NO_REASON = re.compile(r"equal$|by dependency$|stock refuses too")

ANY, INNER = r".*", r"text model alone"

# Kind of model, case, outcome (patterns of the whole text), and the reason.
_REASONS: list[tuple[str, str, str, str]] = [
    (
        ANY,
        r"is_causal(, padded)?",
        r"our error: ArgumentError: is_causal=True was given .*",
        "it asks a bidirectional model for causal attention",
    ),
    (
        ANY,
        r"is_causal(, padded)?",
        r"bidirectional all the same",
        "the class does not hand the keyword to its attention: in stock it changes nothing either",
    ),
    (
        ANY,
        r"a cache",
        r"our error: CacheError: \w+ \(\w+\) was passed to a bidirectional model.*",
        "a bidirectional model keeps no KV cache",
    ),
    (
        ANY,
        r"(output_attentions, )?encoder_(hidden_states|attention_mask)(, padded)?",
        r"our error: ArgumentError: encoder_hidden_states were given to .*, which puts them before the tokens.*",
        "the model makes one sequence of the encoder's states and the tokens",
    ),
    (
        ANY,
        r"a ready mask, \w+",
        r"our error: AttentionMaskError: the ready 4D attention_mask of .* must .*",
        "the model's own mask code takes no ready mask, or another form of it; the error says what to give",
    ),
    (
        ANY,
        r"position_ids of two texts in a row",
        r"our error: AttentionMaskError: packed sequences .*can't be told apart by .*",
        "the model's own mask code takes nothing but a 2D mask; the error says to use padding",
    ),
    (
        ANY,
        r"gradients(, checkpointing)?",
        r"differs: has \['transformer\.blocks\.1\.ffn\.router\.layer\.weight'\] on one side alone",
        "DBRX's router: the weight of its one expert is normed to 1, so that its gradient is rounding alone (1e-9) or 0",
    ),
    (
        r".*",
        r"enabling",
        r"crash: RuntimeError: Error\(s\) in loading state_dict for UnlimitedOcrForConditionalGeneration: .*",
        "stock builds another vision tower for SDPA than for eager, so that the twin does not fit",
    ),
    (
        INNER,
        r".*",
        rf"our error: AttentionMaskError: a ready 4D attention_mask of shape \({BATCH}, 1, {LENGTH}, {LENGTH + 1}\).*",
        "the model around the text model makes a causal mask with a column too many; the error says to enable that model",
    ),
    (
        INNER,
        r".*",
        r"our error: CacheError: \w+ \(\w+\) was passed to a bidirectional model.*",
        "the model around the text model makes a KV cache for it; the error says to enable that model",
    ),
    (
        INNER,
        r".*",
        r"warned: CausalMaskWarning",
        "the model around the text model makes a causal mask for it, which is followed; the warning says to enable that model",
    ),
]


def why(kind: str, case: str, outcome: str) -> str | None:
    """The reason for the outcome of a case on a kind of model, None if there is none."""
    given = (kind, case, outcome)
    return next((reason for *patterns, reason in _REASONS if all(map(re.fullmatch, patterns, given))), None)
