"""The conformance table: every entry of the causal-LM mapping of the installed transformers, on every backend.

    python -m benchmarks.conformance [--only TYPE ...] [--missing]

Each type is built tiny and random, patched, and looked at with `attention_report`; FlashAttention is the tests' double
of version 2, or of version 4 (4) where a type runs on that alone. "not offered": transformers has no such backend for
the type; "not run": the type doesn't run on it here without the patch either. A type that this transformers can't build
at all counts as refused.
Rows of the installed release are replaced in bidirect_patch/conformance.json and the table in
benchmarks/CONFORMANCE.md is written anew from it.
"""

import argparse
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bidirect_patch import attention_report, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import UnsupportedModelError
from tests.helpers import zoo
from tests.helpers.flash_double import FlashDouble

BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention")
BACKENDS_OF_FLASH = {"flash_attention_2": 2, "flash_attention_4": 4}
DATA = Path(__file__).parent.parent / "bidirect_patch" / "conformance.json"
TABLE = Path(__file__).parent / "CONFORMANCE.md"
SEEN, REFUSED, NOT_OFFERED, NOT_RUN, CAUSAL = "bidirectional", "refused", "not offered", "not run", "not fully bidirectional"


def verdict(model_type: str, backend: str) -> tuple[str, str]:
    """What becomes of one type on one backend, and why."""
    try:
        model = zoo.build(model_type, attn_implementation=backend)
    except (ImportError, NotImplementedError, ValueError, RuntimeError, TypeError, KeyError) as error:
        return (NOT_OFFERED if backend != "eager" else NOT_RUN), _short(error)
    try:
        causal = attention_report(model)
    except UnsupportedModelError as error:
        causal, stock = None, f"unpatched on {backend}: {_short(error)}"
    if causal is None and backend.startswith("flash"):  # whose kernels take half precision alone
        model = model.to(torch.bfloat16)
    try:
        enable_bidirectional(model)
        report = attention_report(model)
    except UnsupportedModelError as error:
        if causal is None and backend != "eager":
            return NOT_RUN, stock
        return (CAUSAL if is_bidirectional(model) else REFUSED), _short(error)
    if not report.is_bidirectional or any(layer.backward != layer.forward for layer in report.layers):
        return CAUSAL, report.summary
    unlike = report.unlike_mirror_of(causal) if causal else ()
    return SEEN, f"its window holds on {backend}, where stock ignores it in {len(unlike)} layers" if unlike else ""


def _short(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def row(model_type: str) -> dict[str, Any]:
    """{"backends": {backend: verdict}, "why": str} of one type."""
    reason = zoo.why_not(model_type)
    if reason:
        return _of_what_cannot_run(model_type, reason)
    backends, why = {}, ""
    for backend in (*BACKENDS[:-1], _flash(model_type)):
        with pytest.MonkeyPatch.context() as monkeypatch, torch.random.fork_rng():
            if backend in BACKENDS_OF_FLASH:
                FlashDouble(monkeypatch).install(BACKENDS_OF_FLASH[backend])
            backends[backend], reason = verdict(model_type, backend)
        why = why or (reason if backends[backend] != NOT_OFFERED else "")
        if backend == "eager" and backends[backend] in (REFUSED, NOT_RUN):
            break  # the same on all
    return {"backends": backends, "why": why}


def _of_what_cannot_run(model_type: str, reason: str) -> dict[str, Any]:
    try:
        enable_bidirectional(zoo.build(model_type))
    except UnsupportedModelError as error:
        return {"backends": {"eager": REFUSED}, "why": _short(error)}
    except ImportError:
        pass
    except Exception:  # there is nothing that could be patched
        return {"backends": {"eager": REFUSED}, "why": f"this transformers builds no such model: {reason}"}
    return {"backends": {}, "why": reason}


def _flash(model_type: str) -> str:
    """FlashAttention 2, or 4 where transformers runs a type on that and not on 2 (with sinks, say)."""
    compatible = getattr(zoo.model_class(model_type), "_compatible_flash_implementations", None) or ()
    return "flash_attention_4" if "flash_attention_4" in compatible else "flash_attention_2"


def write_table(table: dict[str, dict[str, dict[str, Any]]]) -> None:
    """benchmarks/CONFORMANCE.md from the data."""
    lines = ["# Conformance", "", __doc__.strip(), ""]
    for release in sorted(table, key=lambda r: [int(n) for n in r.split(".")], reverse=True):
        rows = table[release]
        counts: dict[str, int] = {}
        for entry in rows.values():
            kind = SEEN if SEEN in entry["backends"].values() else entry["backends"].get("eager", NOT_RUN)
            counts[kind] = counts.get(kind, 0) + 1
        lines += [f"## transformers {release}: " + ", ".join(f"{n} {k}" for k, n in sorted(counts.items())), ""]
        lines += ["| type | " + " | ".join(BACKENDS) + " | why |", "|---" * (len(BACKENDS) + 2) + "|"]
        for model_type, entry in rows.items():
            flash = [f"{v} (4)" if b.endswith("4") else v for b, v in entry["backends"].items() if b.startswith("flash")]
            cells = [*(entry["backends"].get(b, "") for b in BACKENDS[:-1]), *(flash or [""])]
            lines.append(f"| {model_type} | " + " | ".join(cells) + f" | {entry['why'].replace('|', '/')[:200]} |")
        lines.append("")
    TABLE.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Look at the types, write the data and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="TYPE", help="these types alone")
    parser.add_argument("--missing", action="store_true", help="only types that have no row yet")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    release = transformers.__version__
    types = options.only or zoo.model_types()
    if options.missing:
        types = [t for t in types if t not in _read().get(release, {})]
    for model_type in types:
        new = row(model_type)
        print(model_type, new, flush=True)
        table = _read()  # another release may be at work beside this one
        table[release] = dict(sorted({**table.get(release, {}), model_type: new}.items()))
        DATA.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_table(_read())


def _read() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}


if __name__ == "__main__":
    main()
