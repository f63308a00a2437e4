"""Embeddings of `load_llm2vec` beside those of llm2vec 0.2.3 with the same weights: the largest differences.

    python -m benchmarks.llm2vec_embeddings [--quick]

It needs an environment with llm2vec 0.2.3 and transformers 4.44.2, which `tox -e t4442` makes. The models are tiny and
random, in float32. Each difference is the largest over five texts and every number of an embedding; in the first table also
over two tokenizers, of which one splits a word at the beginning of a text as after a space, and the other otherwise.
"""

import sys
import tempfile
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.measure import table
from benchmarks.report import goal, parser, single_thread

LIMIT = 1e-5


def difference(base: str, options: dict[str, Any], instructions: tuple[str, ...], causal: bool = False) -> float:
    """The largest difference between LLM2Vec's embeddings and ours."""
    from llm2vec import LLM2Vec

    from bidirect_patch import disable_bidirectional, load_llm2vec
    from tests.helpers.llm2vec_folders import TEXTS

    theirs, ours = LLM2Vec.from_pretrained(base, **options), load_llm2vec(base, **options)
    if causal:
        disable_bidirectional(ours)
    found = []
    for instruction in instructions:
        want = theirs.encode([[instruction, text] for text in TEXTS], show_progress_bar=False).numpy()
        found.append(float(np.abs(ours.encode(TEXTS, prompt=instruction or None) - want).max()))
    return max(found)


def poolings(quick: bool) -> list[dict[str, Any]]:
    """Pooling x instruction x BOS, on Llama."""
    from tests.helpers.llm2vec_folders import INSTRUCTION, POOLINGS, make_tokenizer, write_base

    rows = []
    for pooling in POOLINGS[:1] if quick else POOLINGS:
        for bos in (True, False):
            if pooling == "bos_token" and not bos:
                continue
            bases = [tempfile.mkdtemp() for _ in range(2)]
            for base, prepend in zip(bases, ("always", "never")):
                write_base(base, tokenizer=make_tokenizer(bos=bos, prepend=prepend))
            row: dict[str, Any] = {"pooling": pooling, "tokenizer": "with BOS" if bos else "without BOS"}
            for title, instruction, skip in (
                ("no instruction", "", True),
                ("instruction, skipped", INSTRUCTION, True),
                ("instruction, pooled too", INSTRUCTION, False),
            ):
                options = {"pooling_mode": pooling, "skip_instruction": skip}
                row[title] = max(difference(base, options, (instruction,)) for base in bases)
            rows.append(row)
    return rows


def names(quick: bool) -> list[dict[str, Any]]:
    """The names of models that LLM2Vec wraps, and its families, each with and without an instruction."""
    from tests.helpers.llm2vec_folders import INSTRUCTION, NAMES, make_tokenizer, write_base

    cases = [("llama", name, False) for name in NAMES]
    cases += [("mistral", "", False), ("gemma", "", False), ("qwen2", "", True)]
    rows = []
    for family, name, causal in cases[:1] if quick else cases:
        base = tempfile.mkdtemp()
        write_base(base, family, name, make_tokenizer())
        row: dict[str, Any] = {"model": name or f"{family}{', made causal by disable_bidirectional' if causal else ''}"}
        for pooling in ("mean", "eos_token"):
            row[pooling] = difference(base, {"pooling_mode": pooling}, ("", INSTRUCTION), causal)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    options = parser(__doc__, rounds=1).parse_args(arguments)
    if find_spec("llm2vec") is None:
        sys.exit(__doc__)
    warnings.filterwarnings("ignore", message="LLM2Vec 0.2.3 leaves Qwen2 causal")
    single_thread()
    tables = [poolings(options.quick), names(options.quick)]
    print("\n\n".join(table([{k: _shown(v) for k, v in row.items()} for row in rows]) for rows in tables))
    largest = max(value for rows in tables for row in rows for value in row.values() if isinstance(value, float))
    goal(f"every difference below {LIMIT:g}", largest < LIMIT, f"The largest is {largest:.1e}.")


def _shown(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)



if __name__ == "__main__":
    main()
