"""The model and the texts that the demo needs no network for."""

from pathlib import Path

from ...errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "demo_model"
HELD_OUT = ("calls", "comparisons", "execmodel", "import", "naming")  # topics to evaluate on, a tenth of all text


def held_out_and_training_topics() -> tuple[list[str], list[str]]:
    """Read Python's language reference, which comes with every Python for `help()`.

    Returns:
        Texts to evaluate on, and texts to train on. No paragraph is in both.

    Raises:
        ConfigError: This Python has no language reference.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(f"the demo reads Python's own documentation, and this Python lacks it: {error}") from error
    held_out = [topics[name] for name in HELD_OUT if name in topics]
    secret = {paragraph for text in held_out for paragraph in paragraphs(text)}
    kept = ((part for part in text.split("\n\n") if part.strip() not in secret) for text in topics.values())
    return held_out, [text for text in map("\n\n".join, kept) if text]


def paragraphs(text: str) -> set[str]:
    """Return the paragraphs of a text that tell it apart from others.

    The shortest, such as "Note:" alone, are left out.
    """
    return {part for part in map(str.strip, text.split("\n\n")) if len(part) > 40}
