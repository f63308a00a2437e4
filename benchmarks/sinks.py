"""What a sink token costs: forward and backward of a model with one, beside the same model without.

    python -m benchmarks.sinks [--rounds 9] [--quick]

Layers of SmolLM2-135M's shape, the last of them sinkless. FlexAttention has no backward on a CPU: its forward alone is run.
"""

import contextlib
import statistics

import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.measure import paired_times, table
from benchmarks.report import goal, paired, parser, single_thread, spread
from bidirect_patch import enable_bidirectional

SHAPES = {"2 x 512": (2, 512), "8 x 128": (8, 128)}
BACKENDS = ("eager", "sdpa", "flex_attention")


def make_model(layers: int, backend: str, sinks: int, hidden: int = 576) -> LlamaModel:
    """A random model with so many sink tokens, the last layer sinkless if there are any; the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        use_cache=False,
    )
    model = LlamaModel._from_config(config, attn_implementation=backend)
    return enable_bidirectional(model, num_sink_tokens=sinks, num_sinkless_layers=min(sinks, 1))


def make_inputs(batch: int, length: int, kind: str) -> dict[str, torch.Tensor]:
    """Texts of one length, texts that are padded on the right, or one row of the latter without their padding."""
    ids = torch.randint(1000, (batch, length), generator=torch.Generator().manual_seed(1))
    lengths = torch.linspace(length // 2, length, batch).long()
    real = torch.arange(length) < lengths[:, None]
    if kind == "padded":
        return {"input_ids": ids, "attention_mask": real.long()}
    if kind == "padding-free":
        positions = torch.arange(length).expand(batch, -1)
        return {"input_ids": ids[real][None], "position_ids": positions[real][None]}
    return {"input_ids": ids}


def make_step(model: LlamaModel, inputs: dict[str, torch.Tensor], backward: bool):
    """Forward, and backward if asked for."""

    def step() -> None:
        model.zero_grad()
        with contextlib.nullcontext() if backward else torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        if backward:
            hidden.sum().backward()

    return step


def main(arguments: list[str] | None = None) -> None:
    """Measure each backend, shape and kind of batch, and print them."""
    given = parser(__doc__, 9).parse_args(arguments)
    single_thread()
    layers, shapes = (1, {"2 x 16": (2, 16)}) if given.quick else (4, SHAPES)
    rows, worst = [], {}
    for backend in BACKENDS:
        models = {name: make_model(layers, backend, sinks) for name, sinks in (("without", 0), ("with", 1))}
        for shape, (batch, length) in shapes.items():
            for kind in ("no padding", "padded", "padding-free"):
                torch.compiler.reset()  # one length at a time: FlexAttention's code for several doesn't always compile on a CPU
                inputs, backward = make_inputs(batch, length, kind), backend != "flex_attention"
                steps = {name: make_step(model, inputs, backward) for name, model in models.items()}
                times = paired_times(steps, given.rounds)
                shares = paired(times, "with", "without")
                worst[f"{backend}, {shape}, {kind}"] = statistics.median(shares)
                rows.append(
                    {
                        "backend": backend + ("" if backward else ", forward"),
                        "batch": shape,
                        "texts": kind,
                        "without, ms": f"{1e3 * statistics.median(times['without']):.0f}",
                        "with a sink, ms": f"{1e3 * statistics.median(times['with']):.0f}",
                        "with / without": spread(shares),
                    }
                )
    print(table(rows))
    if not given.quick:
        over = ", ".join(f"{name} {share:.3f}" for name, share in worst.items() if share > 1.03)
        goal("at most 1.03 of the time without sinks", not over, f"Above: {over}")


if __name__ == "__main__":
    main()
