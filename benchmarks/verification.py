"""What it costs to know that a model is bidirectional: its report, the first patch of a class, and the import.

    python -m benchmarks.verification [--rounds 5] [--quick]

The report is beside a forward of as many tokens as one of its runs has. The first patch of a class, which verifies it on a
small model, and the import are measured in a process of their own each round.
"""

import os
import statistics
import subprocess
import sys

import torch

from benchmarks.head import make_model
from benchmarks.measure import ROOT, paired_times, table
from benchmarks.report import goal, paired, parser, single_thread, spread
from benchmarks.steps import QUICK, SMOLLM2
from bidirect_patch import attention_report, disable_bidirectional, enable_bidirectional

LENGTH = 7  # of a report, where nothing else is said

FIRST_PATCH = """
import time
from transformers import LlamaConfig, LlamaForCausalLM
from bidirect_patch import enable_bidirectional
sizes = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes))
start = time.process_time()
enable_bidirectional(model)
print(time.process_time() - start)
"""
IMPORT = """
import sys, time
start = time.process_time()
import bidirect_patch
print(time.process_time() - start)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def in_a_process(program: str) -> float:
    """What a program prints, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def report_cost(rounds: int, quick: bool) -> None:
    """Print the cost of a report in forwards."""
    model = make_model(QUICK if quick else SMOLLM2).eval()
    ids = torch.randint(5, model.config.vocab_size, (LENGTH + 2, LENGTH), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, use_cache=False)

    rows, most = [], 0.0
    for mode, switch in (("causal", disable_bidirectional), ("bidirectional", enable_bidirectional)):
        switch(model)
        times = paired_times({"forward": forward, "report": lambda: attention_report(model)}, rounds)
        shares = paired(times, "report", "forward")
        most = max(most, statistics.median(shares))
        milliseconds = {name: f"{1e3 * statistics.median(values):.0f}" for name, values in times.items()}
        rows.append(
            {
                "model": mode,
                "forward, ms": milliseconds["forward"],
                "report, ms": milliseconds["report"],
                "report / forward": spread(shares, 2),
            }
        )
    print(table(rows))
    why = "It runs the model in five ways of calling it; a third of its time is the gradients of two padded runs."
    goal("attention_report costs at most 2.5 forwards", most <= 2.5, why)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    options = parser(__doc__, rounds=5).parse_args(arguments)
    single_thread()
    rounds = 1 if options.quick else options.rounds
    report_cost(rounds, options.quick)
    first, imported = ([1e3 * in_a_process(program) for _ in range(rounds)] for program in (FIRST_PATCH, IMPORT))
    print()
    print(table([{"first patch of a class, CPU ms": spread(first, 1), "import bidirect_patch, CPU ms": spread(imported, 1)}]))
    why = "Most of it is the proof: a small model is made, run as it is in three ways, patched, and looked at in six."
    goal("the first patch of a class costs at most 40 ms", statistics.median(first) <= 40, why)


if __name__ == "__main__":
    main()
