"""What bfloat16 gains in an MNTP training step on this CPU.

    python -m benchmarks.precision [--rounds 5] [--quick]

float32, float32 weights under bfloat16 autocast (what `--bf16` of the training command does), and bfloat16 weights
(`--torch_dtype bfloat16`).
"""

import contextlib
import copy
import statistics

import torch

from benchmarks.head import Setting, make_batch, make_model
from benchmarks.measure import matmul_rate, paired_times, table
from benchmarks.report import bars, paired, parser, single_thread, spread


def units() -> str:
    """Which bfloat16 units this CPU has, as far as it says so (Linux on x86)."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith(("flags", "Features"))), [])
    except OSError:
        return "not known"
    return ", ".join(flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags) or "none"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    from bidirect_patch import apply_mntp_head

    options = parser(__doc__, rounds=5).parse_args(arguments)
    single_thread()
    sizes = dict(vocab=500, hidden=64, layers=1, length=32) if options.quick else dict(vocab=32_000, length=128)
    setting = Setting(batch=4, **sizes)
    model, inputs = make_model(setting), make_batch(setting)
    ways = {
        "float32": (copy.deepcopy(model), contextlib.nullcontext),
        "bfloat16 autocast": (copy.deepcopy(model), lambda: torch.autocast("cpu", torch.bfloat16)),
        "bfloat16 weights": (model.to(torch.bfloat16), contextlib.nullcontext),
    }
    losses: dict[str, float] = {}

    def make(way: str):
        trained, precision = ways[way]
        apply_mntp_head(trained)

        def step() -> None:
            trained.zero_grad()
            with precision():
                loss = trained(**inputs).loss
            loss.backward()
            losses[way] = float(loss.detach())

        return step

    times = paired_times({way: make(way) for way in ways}, 2 if options.quick else options.rounds)
    gain = {way: paired(times, "float32", way) for way in ways}
    rows = [
        {
            "precision": way,
            "seconds": f"{statistics.median(times[way]):.3f}",
            "speed over float32": spread(gain[way], 2),
            "loss": f"{losses[way]:.4f}",
        }
        for way in ways
    ]
    print(table(rows))
    size = 256 if options.quick else 2048
    single, half = (matmul_rate(size, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    print(f"\nbfloat16 units of this CPU: {units()}. Square matmul: {single:.0f} GFLOP/s float32, {half:.0f} bfloat16.")
    if not options.quick:
        bars("precision", "speed of an MNTP step, over float32", gain)


if __name__ == "__main__":
    main()
