"""`supported_architectures()`: the conformance table as data. Reads conformance.json, which `benchmarks.conformance` writes.

It builds a tiny model of every entry of transformers' causal-LM mapping, patches it, and looks what depends on what.
"""

import json
from functools import cache
from importlib import resources
from typing import Any

from .errors import ConfigError

BIDIRECTIONAL = "bidirectional"


@cache
def conformance() -> dict[str, dict[str, dict[str, Any]]]:
    """{release: {model type: {"backends": {backend: verdict}, "why": str}}}; a verdict other than "bidirectional" is a
    refusal or what kept the type from being run."""
    return json.loads(resources.files("bidirect_patch").joinpath("conformance.json").read_text(encoding="utf-8"))


def supported_architectures(release: str | None = None) -> dict[str, tuple[str, ...]]:
    """Model types (`config.model_type`) that become bidirectional in each layer, with the backends where it was seen.

    release: a release of transformers in the table, such as "5.2.0"; None: the newest one in it that is not newer than
    the installed transformers, else the oldest.
    """
    from packaging.version import Version

    table = conformance()
    if release is None:
        from transformers import __version__

        known = sorted(table, key=Version)
        release = next((r for r in reversed(known) if Version(r) <= Version(__version__)), known[0])
    if not isinstance(release, str) or release not in table:
        raise ConfigError(f"no table for transformers {release}: there is one for each of {', '.join(sorted(table))}")
    seen = {t: tuple(b for b, v in row["backends"].items() if v == BIDIRECTIONAL) for t, row in table[release].items()}
    return {model_type: backends for model_type, backends in seen.items() if backends}
