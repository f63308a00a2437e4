"""Tokens per second of `MNTPCollator` and of `DataCollatorForLanguageModeling`, both masking 20% of 256x512 tokens.

    python -m benchmarks.collator [--rounds 15] [--quick]

From the features that a tokenizer gives (lists), from those with a `special_tokens_mask`, which spares the stock
collator a Python loop, and from arrays.
"""

import statistics
from functools import partial

import numpy as np
from transformers import DataCollatorForLanguageModeling

from benchmarks.measure import paired_times, table
from benchmarks.report import bars, goal, paired, parser, single_thread, spread
from benchmarks.texts import texts, tokenizer


def make_features(batch: int, length: int, vocab: int) -> dict[str, list[dict]]:
    """The same texts in three forms."""
    lists = [{**text, "attention_mask": [1] * length} for text in texts([length] * batch, vocab)]
    marked = [{**row, "special_tokens_mask": [int(i < 5) for i in row["input_ids"]]} for row in lists]
    arrays = [{key: np.array(value) for key, value in row.items()} for row in marked]
    return {"lists": lists, "lists, special_tokens_mask": marked, "arrays, special_tokens_mask": arrays}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    from bidirect_patch import MNTPCollator

    options = parser(__doc__, rounds=15).parse_args(arguments)
    single_thread()
    batch, length, vocab = (8, 32, 100) if options.quick else (256, 512, 32_000)
    words = tokenizer(vocab)
    collators = {
        "stock": DataCollatorForLanguageModeling(words, mlm_probability=0.2),
        "ours": MNTPCollator(words, mlm_probability=0.2),
    }
    rows, gains = [], {}
    for name, features in make_features(batch, length, vocab).items():
        steps = {way: partial(collate, features) for way, collate in collators.items()}
        times = paired_times(steps, 2 if options.quick else options.rounds)
        gains[name] = paired(times, "stock", "ours")
        speed = {way: batch * length / statistics.median(times[way]) / 1e6 for way in collators}
        rows.append(
            {
                "features": name,
                "stock, million tokens / s": f"{speed['stock']:.2f}",
                "ours, million tokens / s": f"{speed['ours']:.2f}",
                "ours / stock": spread(gains[name], 2),
            }
        )
    print(table(rows))
    if options.quick:
        return
    slowest = min(statistics.median(gain) for gain in gains.values())
    why = "With the mask of special tokens given, both spend most of the time on turning Python lists into arrays."
    goal("2 times the tokens per second of the stock collator, from each kind of features", slowest >= 2, why)
    bars("collator", "tokens per second, ours / DataCollatorForLanguageModeling", gains, 2)


if __name__ == "__main__":
    main()
