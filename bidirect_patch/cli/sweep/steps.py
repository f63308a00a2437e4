"""The steps of the command, from its flags to the folder that it writes. `measure` measures."""

import argparse
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from ...errors import ConfigError
from ...model.config import text_config
from ..pairs import load_pairs
from ..progress import hide_bars_in_files
from ..sink_token import candidates, first_token
from .best_settings import encoder_settings, lacking
from .measure import Row, Tokens, first_tokens, measure, sweep
from .model import Source, load_model, load_tokenizer
from .parts import take_apart
from .setups import CAUSAL
from .table import best_of, drawn, in_words, is_sure, table
from .texts import Pairs, token_ids, with_first_token

FEWEST = 20  # pairs to choose on


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        files: The rows and the pairs of each file; the first one is the one that was chosen on.
        layers: How many layers the model has.
        notes: What could not be measured, in words.
    """

    files: dict[str, tuple[list[Row], Pairs]]
    layers: int
    notes: list[str]


def measure_and_write(flags: argparse.Namespace) -> None:
    """Measure a model, print a table, and write the best setup.

    Raises:
        BackendError: The attention backend is not installed.
        ConfigError: A file of pairs, the model or the folder cannot be used.
        UnsupportedModelError: The model cannot be made bidirectional.
    """
    hide_bars_in_files(SimpleNamespace(disable_tqdm=False))
    pairs = {flags.eval_sts: _read("eval_sts", flags.eval_sts, FEWEST)}
    if flags.test_file:
        pairs[flags.test_file] = _read("test_file", flags.test_file, 2)
    source = Source.of(
        flags.model, flags.gguf_file, torch_dtype=flags.torch_dtype, attn_implementation=flags.attn_implementation
    )
    measured = _measure(source, pairs)
    best = best_of(*measured.files[flags.eval_sts])
    _show(measured, best)
    if flags.output_dir:
        from .folder import save  # needs sentence-transformers

        save(best, source, flags.output_dir)
    _say_what_is_next(encoder_settings(source, best.setup), best, flags.output_dir)


def _read(flag: str, path: str, fewest: int) -> Pairs:
    pairs = Pairs.of(load_pairs(flag, path, None))
    if len(pairs.scores) < fewest:
        raise ConfigError(f"{path} holds {len(pairs.scores)} pairs, too few: {flag} needs {fewest} at least")
    return pairs


def _measure(source: Source, files: Mapping[str, Pairs]) -> Measured:
    """Choose on the first file, measure what was chosen on the others. The model is let go at the end."""
    (dev, pairs), *others = files.items()
    tokenizer = load_tokenizer(source)
    tried = first_tokens(first_token(tokenizer), candidates(tokenizer))
    tokenizers = {token: with_first_token(tokenizer, token) for family in tried.values() for token in family}
    model = load_model(source)
    limit = positions(model)
    short = torch.tensor(token_ids(tokenizers[None], pairs.texts[:1], limit), device=next(model.parameters()).device)
    parts = take_apart(model, short)
    rows, notes = sweep(parts, tokens_by_first_token(tokenizers, pairs, limit), tried, pairs)
    if not any(np.isfinite(row.cosines).all() for row in rows if row.setup.attention.can_be_saved):
        raise ConfigError("no setup gives embeddings that are numbers: give --torch_dtype float32, or look at the weights")
    measured = {dev: (rows, pairs)}
    for name, other in others:
        measured[name] = measure(parts, tokens_by_first_token(tokenizers, other, limit), rows, other), other
    return Measured(measured, len(parts.layers), notes)


def positions(model: Any) -> int | None:
    """The number of positions that the model has by its config."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def tokens_by_first_token(tokenizers: Mapping[str | None, Any], pairs: Pairs, limit: int | None) -> Tokens:
    return {token: token_ids(tokenizer, pairs.texts, limit) for token, tokenizer in tokenizers.items()}


def _show(measured: Measured, best: Row) -> None:
    (dev, (rows, pairs)), *others = measured.files.items()
    values = {name: drawn(*each) for name, each in measured.files.items()}
    print("Spearman's correlation x 100; in brackets, the middle 95 % of other draws of the same pairs.")
    print(f"{dev}: {len(pairs.scores)} pairs, on which the setups were chosen, so that these numbers are a little high.")
    for name, (_, other) in others:
        print(f"{name}: {len(other.scores)} pairs, on which nothing was chosen.")
    print("", table(rows, values, measured.layers), "", *measured.notes, sep="\n")
    print(f"Best: {best.setup.attention}; {in_words(best.setup, measured.layers)}.")
    if best.setup.attention != CAUSAL and not is_sure(best, rows, values[dev]):
        print("It may be above the causal model by chance: more pairs would tell.")


def _say_what_is_next(settings: Mapping[str, Any], best: Row, folder: str | None) -> None:
    print(json.dumps(settings, indent=2, ensure_ascii=False))
    without = lacking(best.setup)
    if without:
        print(f"The settings don't hold {without}; {folder or 'the folder that --output_dir writes'} does.")
    if folder:
        needs = ", after import bidirect_patch.auto" if best.setup.attention.bidirectional else ""
        print(f"Wrote the encoder and settings.json to {folder}.")
        print(f"Next: from Python{needs}: SentenceTransformer({folder!r}).encode(texts); or train it further:")
    else:
        print("Next: the same command with --output_dir writes this encoder; or save these settings and train it further:")
    print(f"bidirect-patch simcse {folder + '/' if folder else ''}settings.json --dataset_file_path texts.txt --do_train ...")
