"""Encoding with sentence-transformers: a patched model beside the same stock one under `is_causal: false`.

    python -m benchmarks.encode [--rounds 3] [--quick]

Two random layers of SmolLM2-135M's shape, mean pooling, 2,000 sentences of mixed length (median 40 tokens), batches of 32 in the
order of their lengths, as sentence-transformers makes them.
"""

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

from benchmarks.measure import paired_times, table
from benchmarks.report import goal, paired, parser, single_thread, spread
from benchmarks.steps import QUICK, SMOLLM2, Shape, save_model
from benchmarks.texts import sentence_lengths
from bidirect_patch import disable_bidirectional, enable_bidirectional

BATCH = 32
STOCK, OURS, SINK = "stock, is_causal: false", "enable_bidirectional", "the same, a sink token and a sinkless layer"


def sentences(count: int, vocab: int) -> list[str]:
    """Sentences of random words."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(5, vocab, (length,), generator=generator) for length in sentence_lengths(count))
    return [" ".join(f"w{i}" for i in words.tolist()) for words in drawn]


def encoder(shape: Shape, **settings: Any) -> Any:
    """A mean-pooled encoder of one random model of this shape, as it opens with these settings in its config."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, Path(folder))
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        module = Transformer(folder, max_seq_length=512)
    return SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension(), "mean")], device="cpu")


def padding(lengths: list[int]) -> float:
    """The share of the positions that is padding, in batches in the order of their lengths."""
    ordered = sorted(lengths, reverse=True)
    positions = sum(batch[0] * len(batch) for batch in (ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)))
    return 1 - sum(lengths) / positions


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = parser(__doc__, rounds=3).parse_args(arguments)
    single_thread()
    if Version(transformers.__version__) < Version("5.2"):
        print("No peer: before transformers 5.2, no config makes a decoder bidirectional.")
        return
    shape, count = (QUICK, 40) if options.quick else (replace(SMOLLM2, layers=2), 2000)
    texts = sentences(count, shape.vocab)
    stock, ours = encoder(shape, is_causal=False), encoder(shape)

    def encode(model: Any) -> torch.Tensor:
        return model.encode(texts, batch_size=BATCH, show_progress_bar=False, convert_to_tensor=True)

    def patched(**sinks: int) -> torch.Tensor:
        return encode(enable_bidirectional(ours, **sinks))

    torch.testing.assert_close(patched(), encode(stock), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(encode(disable_bidirectional(ours)), encode(stock), rtol=1e-3, atol=1e-4)
    ways = {STOCK: lambda: encode(stock), OURS: patched, SINK: lambda: patched(num_sink_tokens=1, num_sinkless_layers=1)}
    times = paired_times(ways, 1 if options.quick else options.rounds)
    rows = [
        {
            "model": way,
            "sentences / s": f"{count / statistics.median(times[way]):.0f}",
            "time / stock": spread(paired(times, way, STOCK)),
        }
        for way in ways
    ]
    print(table(rows))
    print(f"\n{padding(sentence_lengths(count)):.1%} of the positions are padding: so much could a way without padding gain.")
    if not options.quick:
        share = statistics.median(paired(times, OURS, STOCK))
        goal("at least as fast as the stock model, but for 2% of scatter", share <= 1.02, f"{share:.3f} of its time.")


if __name__ == "__main__":
    main()
