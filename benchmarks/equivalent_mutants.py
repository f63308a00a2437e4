"""Mutants that no test can tell from the original, each with the reason: (file, text of the line, change) -> why."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
