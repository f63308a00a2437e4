"""benchmarks/SCAN.md: a section for each release."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import transformers

from .outcomes import BY_DEPENDENCY, EQUAL
from .reasons import NEEDS_NO_REASON, why
from .scan_release import CROSS, NOT_BUILT, NOT_RUN, REFUSED, Row

FILE = Path(__file__).parent.parent / "SCAN.md"
COLUMNS = (EQUAL, BY_DEPENDENCY, "our error", "stock refuses too", "other")
INTRODUCTION = """# Scan

Every decoder class of a release of transformers, and the multimodal classes around them, small and random, called with each
argument that the signature of their forward names, with and without padding. The reference is the same model without the
patch, on eager attention, whose attention modules are handed explicit masks. Every output is compared at each real position:
logits, loss, hidden states, attention weights.

    python -m benchmarks.scan

replaces the section of the installed release. `--only llama,gemma3` prints the section of these types, and `--rows FILE ...`
writes it from what several runs have printed. Releases before the newest were
scanned on classes that differ in kind.

| outcome | what was seen |
|---|---|
| equal | the same outputs as the reference, up to rounding (1e-4 of the largest value of each tensor) |
| by dependency | no mask can be handed to it; the last token moves each real position of its text, and padding moves none |
| our error | an error of this package |
| stock refuses too | the unpatched model raises an error for this call too |
| other | listed below with its reason |

"with cross-attention": the config asks for it, and states of an encoder are given. "text model alone": a multimodal model of
which only the text model inside is enabled.
"""


def section(rows: list[Row]) -> tuple[str, list[str]]:
    """The section of a release in Markdown, and what has no explanation."""
    seen = [row for row in rows if row.outcomes]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    exceptions: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    unexplained = []
    for row in seen:
        for case, outcome in row.outcomes.items():
            counts[case][_column(outcome)] += 1
            if NEEDS_NO_REASON.match(outcome):
                continue
            reason = why(row.kind, case, outcome)
            if reason is None:
                unexplained.append(f"{row.kind} {row.model_type} on {row.backend}, {case}: {outcome}")
            exceptions[(_short(outcome), reason or "UNEXPLAINED", case)].append(_name(row))
    total = sum(counts.values(), Counter())
    lines = [f"## transformers {transformers.__version__}", ""]
    on = Counter(row.backend for row in seen if row.kind != CROSS)
    classes = ", ".join(f"{count} models on {backend}" for backend, count in on.items())
    lines += [f"{classes}: " + ", ".join(f"{total[c]} {c}" for c in COLUMNS if total[c]) + ".", ""]
    columns = [column for column in COLUMNS if total[column]]
    lines += [f"| case | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {case} | " + " | ".join(str(n[c] or "") for c in columns) + " |" for case, n in counts.items()]
    by_reason: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(dict)
    for (outcome, reason, case), names in exceptions.items():
        by_reason[outcome, reason][case] = names
    lines += ["", "| outcome | why | cases | classes |", "|---|---|---|---|"]
    for (outcome, reason), by_case in sorted(by_reason.items()):
        names = list(dict.fromkeys(name for each in by_case.values() for name in each))
        where = ", ".join(names) if len(names) <= 12 else f"{len(names)}: {', '.join(names[:6])}, ..."
        lines.append(f"| {outcome} | {reason} | {_joined(by_case)} | {where} |")
    lines += ["", *_without_outcomes(rows)]
    return "\n".join(lines) + "\n", unexplained


def write(text: str) -> None:
    """Put the section of the installed release into the file, newest release first."""
    old = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    sections = {re.match(r"\S+", s)[0]: f"## transformers {s}" for s in old.split("## transformers ")[1:]}  # type: ignore[index]
    sections[transformers.__version__] = text
    newest_first = sorted(sections, key=lambda release: [int(n) for n in release.split(".")], reverse=True)
    FILE.write_text(INTRODUCTION + "\n" + "\n".join(sections[r].strip() + "\n" for r in newest_first), encoding="utf-8")


def _without_outcomes(rows: list[Row]) -> list[str]:
    found: dict[str, dict[str, None]] = {REFUSED: {}, NOT_BUILT: {}, NOT_RUN: {}}
    for row in rows:
        kind = row.why.split(":")[0]
        if kind in found:
            found[kind][f"{row.model_type} on {row.backend}" if kind == NOT_RUN else row.model_type] = None
    words = {
        REFUSED: "Refused by `enable_bidirectional`, with the reason",
        NOT_BUILT: "Not built small, or not run on text alone",
        NOT_RUN: "transformers has no such backend",
    }
    return [f"{words[kind]}: {len(names)} ({', '.join(names)})." + "\n" for kind, names in found.items() if names]


def _column(outcome: str) -> str:
    return next((c for c in COLUMNS if outcome.startswith(c)), "other")


def _short(outcome: str) -> str:
    """Without the message of an error of this package, which the reason stands for, and without figures."""
    outcome = re.sub(r"(our error: \w+): .*", r"\1", outcome)
    return re.sub(r" by \de[-+]\d+ of its largest value", "", outcome).replace("|", "/")


def _name(row: Row) -> str:
    return row.model_type if row.kind in ("causal LM", "multimodal") else f"{row.model_type}, {row.kind}"


def _joined(cases: dict[str, list[str]]) -> str:
    return "; ".join(cases)
