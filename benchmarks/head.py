"""What the MNTP head saves: time and memory of a training step against the stock step, which computes all logits.

    python -m benchmarks.head [--rounds 5] [--threads 1] [--quick]

Llama-3's vocabulary (128,256), 8 layers of 512, 8x256 tokens, float32, all weights trained and with the vocabulary's
two matrices frozen, as under LoRA. Beside it: how both grow with the scored share, and the arithmetic's floor. On more than one
thread, times are of the wall clock.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.measure import matmul_rate, paired_times, peak_growth, quartiles, ratios, report_growth, table

SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)
WAYS = ("stock", "simplest", "ours")


@dataclass(frozen=True)
class Setting:
    share: float = 0.2
    frozen: bool = False
    vocab: int = 128_256
    hidden: int = 512
    intermediate: int = 1024
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2  # Llama-3's four queries a key
    batch: int = 8
    length: int = 256
    tied: bool = False  # one matrix for both ends of the vocabulary
    lora: bool = False  # the layers' weights are frozen too; the adapters' own arithmetic is not counted


def make_model(setting: Setting) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        tie_word_embeddings=setting.tied,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if setting.frozen:
        model.lm_head.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
    return model


def make_batch(setting: Setting) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.length)
    ids = torch.randint(setting.vocab, shape, generator=generator)
    scored = torch.rand(shape, generator=generator) < setting.share
    return dict(input_ids=ids, labels=torch.where(scored, ids, -100))


def make_step(way: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor]):
    """One forward and backward. "simplest": index the hidden states, one cross-entropy, no chunks."""
    from bidirect_patch import apply_mntp_head, enable_bidirectional

    model = apply_mntp_head(model) if way == "ours" else enable_bidirectional(model)

    def step() -> float:
        model.zero_grad()
        if way == "simplest":
            targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
            scored = targets != -100
            hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
            loss = F.cross_entropy(model.lm_head(hidden[scored]), targets[scored])
        else:
            loss = model(**inputs).loss
        loss.backward()
        return float(loss.detach())

    return step


def flops(setting: Setting, scored_only: bool) -> float:
    """Of one step's matmuls: 2 per weight and position forward, twice that backward (half that for frozen weights)."""
    s, tokens = setting, setting.batch * setting.length
    projections = 2 * s.hidden**2 * (1 + s.kv_heads / s.heads)
    layers = s.layers * (projections + 3 * s.hidden * s.intermediate)
    attention = s.layers * 2 * s.length * s.hidden
    rows = tokens * (s.share if scored_only else 1)
    body = (4 if s.lora else 6) * layers + 6 * attention
    return tokens * body + (4 if s.frozen or s.lora else 6) * rows * s.vocab * s.hidden


def _clock() -> Callable[[], float]:
    """CPU seconds on one thread; on more, where these add up, the wall clock."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _rate() -> float:
    return matmul_rate(clock=_clock())


def times(setting: Setting, rounds: int) -> dict[str, list[float]]:
    model, inputs = make_model(setting), make_batch(setting)
    twins = {way: copy.deepcopy(model) for way in WAYS}
    del model
    return paired_times({way: make_step(way, twin, inputs) for way, twin in twins.items()}, rounds, _clock())


def growth(setting: Setting, repeats: int = 2) -> dict[str, list[float]]:
    runs = [("--grow", way, str(setting.share), str(int(setting.frozen))) for way in WAYS for _ in range(repeats)]
    grown = peak_growth("benchmarks.head", *runs)
    return {way: grown[i * repeats : (i + 1) * repeats] for i, way in enumerate(WAYS)}


def compare(setting: Setting, rounds: int) -> list[dict[str, object]]:
    """One row for each way: seconds, their ratio to the stock step's, the arithmetic's floor, growth, its ratio."""
    seconds = times(setting, rounds)
    relative = ratios(seconds, "stock")
    grown = growth(setting)
    stock = statistics.median(grown["stock"])
    floor = {way: flops(setting, way != "stock") / _rate() / statistics.median(seconds["stock"]) for way in WAYS}
    return [
        {
            "scored": f"{setting.share:.0%}",
            "vocabulary": "frozen" if setting.frozen else "trained",
            "step": way,
            "seconds": f"{statistics.median(seconds[way]):.2f}",
            "time / stock": str(relative[way]),
            "floor / stock": f"{floor[way]:.3f}",
            "growth, MB": f"{statistics.median(grown[way]) / 1e6:.0f}",
            "growth / stock": str(quartiles([g / stock for g in grown[way]])),
        }
        for way in WAYS
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Print the table and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="only the 20%% share")
    parser.add_argument("--grow", nargs=3, metavar=("WAY", "SHARE", "FROZEN"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.grow:
        way, share, frozen = options.grow
        setting = Setting(share=float(share), frozen=frozen == "1")
        report_growth(make_step(way, make_model(setting), make_batch(setting)))
        return []
    settings = [Setting(), Setting(frozen=True)]
    if not options.quick:
        settings += [Setting(share=share) for share in SHARES if share != 0.2]
    rows = [row for setting in settings for row in compare(setting, options.rounds)]
    print(table(rows))
    threads = "one thread" if options.threads == 1 else f"{options.threads} threads"
    print(f"\nfloor: FLOPs of the step's matmuls at this machine's {_rate() / 1e9:.0f} GFLOP/s on {threads}")
    return rows


if __name__ == "__main__":
    main()
