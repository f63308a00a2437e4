"""How a step's time and memory grow with vocabulary, length, layers and scored share, beside the arithmetic's floor.

    python -m benchmarks.growth [--rounds 2] [--quick]

One thing is changed at a time from 32,000 words, 4x128 tokens, 4 layers of 512, 20% scored; all weights trained. The
floor is the FLOPs of the step's matmuls at this machine's measured matmul rate.
"""

import argparse
import json
import statistics
from dataclasses import asdict, replace

from benchmarks.head import Setting, flops, make_batch, make_model, make_step
from benchmarks.measure import matmul_rate, paired_times, peak_growth, report_growth, table
from benchmarks.report import curves, paired, parser, single_thread, spread

BASE = Setting(vocab=32_000, layers=4, batch=4, length=128)
SWEEPS = {
    "vocab": (8_000, 32_000, 128_256),
    "length": (64, 128, 256, 512),
    "layers": (1, 4, 8, 16),
    "share": (0.05, 0.2, 0.5, 1.0),
}
WAYS = ("stock", "ours")


def times(setting: Setting, rounds: int) -> dict[str, list[float]]:
    # One model a way: applying the head changes it.
    steps = {way: make_step(way, make_model(setting), make_batch(setting)) for way in WAYS}
    return paired_times(steps, rounds)


def growth(setting: Setting) -> dict[str, float]:
    """MB by which each way's step grows at its peak."""
    grown = peak_growth("benchmarks.growth", *(("--grow", way, json.dumps(asdict(setting))) for way in WAYS))
    return {way: grew / 1e6 for way, grew in zip(WAYS, grown)}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = parser(__doc__, rounds=2)
    options.add_argument("--grow", nargs=2, metavar=("WAY", "SETTING"), help=argparse.SUPPRESS)
    options = options.parse_args(arguments)
    single_thread()
    if options.grow:
        way, setting = options.grow[0], Setting(**json.loads(options.grow[1]))
        report_growth(make_step(way, make_model(setting), make_batch(setting)))
        return
    rate = matmul_rate(256 if options.quick else 2048)
    base = Setting(vocab=500, hidden=64, layers=1, batch=1, length=16) if options.quick else BASE
    sweeps = {"share": (0.2,)} if options.quick else SWEEPS
    rows, panels, done = [], {}, {}
    for name, values in sweeps.items():
        seconds = {f"{way}{kind}": [] for way in WAYS for kind in ("", ", floor")}
        memory = {way: [] for way in WAYS}
        for value in values:
            setting = replace(base, **{name: value})
            if setting not in done:
                grown = {} if options.quick else growth(setting)
                done[setting] = times(setting, options.rounds), grown
            took, grown = done[setting]
            floor = {way: flops(setting, way == "ours") / rate for way in WAYS}
            for way in WAYS:
                seconds[way].append(statistics.median(took[way]))
                seconds[f"{way}, floor"].append(floor[way])
                memory[way].append(grown.get(way, float("nan")))
            rows.append(
                {
                    "changed": name,
                    "to": value,
                    "stock, s": f"{statistics.median(took['stock']):.2f}",
                    "its floor, s": f"{floor['stock']:.2f}",
                    "ours, s": f"{statistics.median(took['ours']):.2f}",
                    "our floor, s": f"{floor['ours']:.2f}",
                    "time, ours / stock": spread(paired(took, "ours", "stock")),
                    "stock, MB": f"{memory['stock'][-1]:.0f}",
                    "ours, MB": f"{memory['ours'][-1]:.0f}",
                    "memory, ours / stock": f"{memory['ours'][-1] / memory['stock'][-1]:.3f}",
                }
            )
        panels[f"seconds a step, by {name}"] = (name, values, seconds)
        panels[f"peak growth in MB, by {name}"] = (name, values, memory)
    print(table(rows))
    print(f"\nfloor: FLOPs of the step's matmuls at this machine's {rate / 1e9:.0f} GFLOP/s on one thread")
    if not options.quick:
        curves("growth_time", {title: panel for title, panel in panels.items() if title.startswith("seconds")})
        curves("growth_memory", {title: panel for title, panel in panels.items() if title.startswith("peak")})


if __name__ == "__main__":
    main()
