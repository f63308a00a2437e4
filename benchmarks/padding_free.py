"""Real tokens per second of MNTP training: padded batches, length-grouped padded batches, and padding-free rows.

    python -m benchmarks.padding_free [--rounds 3] [--quick]

Texts as long as sentences (median 40 tokens, long tail to 256), 32 a batch, on SDPA: forward and backward with
`apply_mntp_head` of layers of SmolLM2-135M's shape. Padded and padding-free batches hold the same texts and score the
same tokens, which is checked; the grouped ones are every fifth batch of 640 texts sorted by length.
"""

import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import paired_times, table
from benchmarks.report import bars, goal, parser, single_thread, spread
from benchmarks.texts import sentence_lengths, texts, tokenizer

VOCAB = 4096  # SmolLM2's 49,152 for 30 layers, in proportion
BATCH = 32


def make_model(layers: int, hidden: int = 576):
    from bidirect_patch import apply_mntp_head

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return apply_mntp_head(LlamaForCausalLM(config).train())


def make_batches(count: int, size: int, vocab: int = VOCAB) -> dict[str, list[dict[str, torch.Tensor]]]:
    """`count` batches of `size` texts for each way of laying them out."""
    from bidirect_patch import MNTPCollator

    made = texts(sentence_lengths(5 * count * size), vocab)
    ordered = sorted(made, key=lambda text: len(text["input_ids"]))
    sets = [made[i * size : (i + 1) * size] for i in range(count)]
    grouped = [ordered[i * size : (i + 1) * size] for i in range(2, 5 * count, 5)]
    words = tokenizer(vocab)

    def collate(batches, **settings):
        collator = MNTPCollator(words, seed=0, **settings)
        return [collator(batch) for batch in batches]

    return {
        "padded": collate(sets),
        "padded, grouped by length": collate(grouped),
        "padding_free": collate(sets, padding_free=True),
        "padding_free, grouped by length": collate(grouped, padding_free=True),
    }


def real_tokens(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = parser(__doc__, rounds=3).parse_args(arguments)
    single_thread()
    model = make_model(1, 72) if options.quick else make_model(2)
    batches = make_batches(1, 4) if options.quick else make_batches(2, BATCH)

    def step(way: str) -> float:
        total = 0.0
        for batch in batches[way]:
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            total += float(loss.detach())
        return total

    if abs(step("padded") - step("padding_free")) > 1e-4 * len(batches["padded"]):
        raise RuntimeError("padded and padding-free batches give different losses")
    rounds = 2 if options.quick else options.rounds
    times = paired_times({way: lambda way=way: step(way) for way in batches}, rounds)
    rate = {way: [real_tokens(batches[way]) / t for t in times[way]] for way in batches}
    gain = {way: [a / b for a, b in zip(rate[way], rate["padded"])] for way in batches}
    rows = [
        {
            "batches": way,
            "positions": sum(b["input_ids"].numel() for b in batches[way]),
            "real": f"{real_tokens(batches[way]) / sum(b['input_ids'].numel() for b in batches[way]):.0%}",
            "real tokens / s": f"{statistics.median(rate[way]):.0f}",
            "over padded": spread(gain[way], 2),
        }
        for way in batches
    ]
    print(table(rows))
    if options.quick:
        return
    met = statistics.median(gain["padding_free"]) >= 1.8
    why = "Attention runs over all pairs of the one row, other documents' too; see the positions for what was saved."
    goal("padding_free gives 1.8 times the real tokens per second of padded batches", met, why)
    bars("padding_free", "real tokens per second, over padded batches", gain, 1.8)


if __name__ == "__main__":
    main()
