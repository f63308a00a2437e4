"""What a step of both training commands costs, beside what its matrix products alone cost on this CPU.

    python -m benchmarks.steps [--rounds 3] [--quick] [--only ROW ...]

Random weights of SmolLM2-135M's shape. A command runs twice, for a few and for more steps: the difference of CPU seconds is
that of the steps, with the collator, the optimizer and the trainer; the floor is the floating point operations that torch
counts in a forward and a backward of the same batch, at the speed of a square matrix product in the same precision (`--bf16`),
taken in the same round.
Then a forward and a backward of `mntp` under bfloat16 autocast are profiled, with LoRA and without.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.head import Setting, make_batch, make_model, make_step
from benchmarks.measure import ROOT, matmul_rate, table
from benchmarks.report import goal, parser, single_thread
from benchmarks.texts import tokenizer

FEW, MORE = 1, 5  # steps
MNTP, SIMCSE = "mntp", "simcse, no checkpoints"
FLOORS = {MNTP: 1.4, f"{MNTP}, bf16": 1.4, SIMCSE: 1.5, f"{SIMCSE}, bf16": 1.5}  # goals: so many times the floor
PEAK = 3.1  # GB of simcse at most: a goal
WITH_LORA, WITHOUT = "LoRA on all linear layers", "no LoRA, all weights frozen"
PRODUCTS, CASTS, REST = "matrix products", "casts and copies", "the rest, element by element"
KINDS = {"aten::mm": PRODUCTS, "aten::bmm": PRODUCTS, "aten::addmm": PRODUCTS, "aten::copy_": CASTS}
BF16 = {"bf16": True}
LORA = {"lora_r": 16, "lora_dropout": 0.0}
EITHER_WAY = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True}


@dataclass(frozen=True)
class Shape(Setting):
    """Sizes of the model and of MNTP's batches, and of SimCSE's.

    Args:
        pairs: Texts of a batch of SimCSE, each of which is read twice.
        words: Tokens of each.
    """

    pairs: int = 32
    words: int = 32


class Round(NamedTuple):
    """What one round has measured: CPU seconds of a step, operations of a square matmul a second, peak of memory in bytes."""

    seconds: float
    rate: float
    peak: float


SMOLLM2 = Shape(vocab=49_152, hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, length=128, tied=True)
TINY = dict(vocab=200, hidden=32, intermediate=64, layers=1, heads=1, kv_heads=1, batch=2, length=16, pairs=3, words=8)
QUICK = replace(SMOLLM2, **TINY)


def save_model(shape: Shape, folder: Path) -> None:
    """A Llama of this shape with a tokenizer of words."""
    from tokenizers.pre_tokenizers import WhitespaceSplit

    make_model(shape).save_pretrained(folder)
    words = tokenizer(shape.vocab)
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    words.save_pretrained(folder)


def save_lines(shape: Shape, path: Path, count: int, words: int) -> None:
    """Lines of `words` made-up words each."""
    drawn = torch.randint(5, shape.vocab, (count, words), generator=torch.Generator().manual_seed(0))
    path.write_text("\n".join(" ".join(f"w{i}" for i in line) for line in drawn.tolist()))


def cpu_seconds(command: str, settings: dict[str, Any], steps: int, folder: Path) -> tuple[float, float]:
    """CPU seconds of `bidirect-patch COMMAND` for so many steps, and its peak of resident memory in bytes."""
    more = {"max_steps": steps, "do_train": True, "output_dir": str(folder / "out"), "overwrite_output_dir": True}
    file = folder / "settings.json"
    file.write_text(json.dumps(settings | more | LORA | EITHER_WAY))
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "bidirect_patch", command, str(file)]
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{output}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def one_round(command: str, settings: dict[str, Any], folder: Path) -> Round:
    """A few and more steps of a command, and the speed of this machine before and after them, which changes by the minute."""
    rates = [_rate(settings)]
    few, _ = cpu_seconds(command, settings, FEW, folder)
    more, peak = cpu_seconds(command, settings, MORE, folder)
    rates.append(_rate(settings))
    return Round((more - few) / (MORE - FEW), statistics.mean(rates), peak)


def _rate(settings: dict[str, Any]) -> float:
    return matmul_rate.__wrapped__(dtype=torch.bfloat16 if "bf16" in settings else torch.float32)  # not the one it keeps


def operations(shape: Shape, folder: Path, command: str) -> int:
    """Floating point operations of the matrix products in a forward and a backward, with the adapter alone trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    decoder = adapted.get_base_model().model
    if command == "simcse":
        ids = torch.randint(5, shape.vocab, (2 * shape.pairs, shape.words))
    else:
        ids = torch.randint(5, shape.vocab, (shape.batch, shape.length))
    with FlopCounterMode(display=False) as counter:
        hidden = decoder(input_ids=ids, use_cache=False)[0]
        if command == "mntp":
            scored = hidden.reshape(-1, shape.hidden)[: max(1, ids.numel() // 5)]
            model.lm_head(scored).float().logsumexp(-1).sum().backward()
        else:
            hidden.sum().backward()
    return counter.get_total_flops()


def made_of(shape: Shape, folder: Path, steps: int = 5) -> dict[str, dict[str, float]]:
    """CPU seconds of a forward and a backward of mntp in bfloat16, by the kind of operation, with LoRA and without.

    Of each kind the least of a few steps: what others do on the machine only adds.
    """
    found = {}
    for name, lora in ((WITH_LORA, True), (WITHOUT, False)):
        step = make_step("ours", _adapted(folder, lora), make_batch(shape))
        with torch.autocast("cpu", torch.bfloat16):
            step()
            seen = [_by_kind(step) for _ in range(steps)]
        found[name] = {kind: min(seconds[kind] for seconds in seen) for kind in seen[0]}
    return found


def _by_kind(step: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    seconds = dict.fromkeys((PRODUCTS, CASTS, REST), 0.0)
    for event in profiled.key_averages():
        seconds[KINDS.get(event.key, REST)] += event.self_cpu_time_total / 1e6
    return seconds


def in_bf16(parts: dict[str, dict[str, float]]) -> str:
    """Why bfloat16 misses its goal, from what `made_of` gives."""
    step = parts[WITH_LORA]
    whole, lora = sum(step.values()), sum(step.values()) - sum(parts[WITHOUT].values())
    products, casts, rest = (f"{100 * step[kind] / whole:.0f}%" for kind in (PRODUCTS, CASTS, REST))
    return (
        "Matrix products are four times as fast in bfloat16, so that the rest weighs more. Of a profiled forward and backward of "
        f"mntp {products} are these, {casts} casts and copies (torch's autocast, and PEFT's of what LoRA reads) and {rest} what "
        "transformers' layers take element by element (norms, rotations, activations, softmax). "
        f"LoRA, with its own products, is {100 * lora / whole:.0f}% of it all"
    )


def _adapted(folder: Path, lora: bool) -> Any:
    """The model, with an adapter to train or with nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    if lora:
        return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    model.requires_grad_(False)
    model.enable_input_require_grads()  # a gradient goes back through all layers, as with LoRA
    return model


def commands(shape: Shape, folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is measured: a command and its settings."""
    mntp = {
        "train_file": [str(folder / "paragraphs.txt")],
        "mlm_probability": 0.2,
        "max_seq_length": shape.length,
        "per_device_train_batch_size": shape.batch,
    }
    simcse = {
        "dataset_file_path": str(folder / "sentences.txt"),
        "max_seq_length": shape.words,
        "per_device_train_batch_size": shape.pairs,
    }
    whole = simcse | {"gradient_checkpointing": False}
    few = whole | {"mini_batch_size": min(8, shape.pairs)}
    return {
        MNTP: ("mntp", mntp),
        f"{MNTP}, bf16": ("mntp", mntp | BF16),
        SIMCSE: ("simcse", whole),
        f"{SIMCSE}, bf16": ("simcse", whole | BF16),
        "simcse": ("simcse", simcse),
        "simcse, 8 texts at a time, no checkpoints": ("simcse", few),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    flags = parser(__doc__, rounds=3)
    rows_there_are = list(commands(QUICK, Path()))
    flags.add_argument("--only", nargs="*", choices=rows_there_are, help="the rows that are measured (default: all)")
    options = flags.parse_args(arguments)
    single_thread()
    shape = QUICK if options.quick else SMOLLM2
    rows, over = [], {}
    measured: dict[str, list[Round]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(shape, folder / "model")
        save_lines(shape, folder / "paragraphs.txt", MORE * shape.batch, shape.length)
        save_lines(shape, folder / "sentences.txt", MORE * shape.pairs, shape.words - 2)
        wanted = {name: row for name, row in commands(shape, folder).items() if name in (options.only or (name,))}
        for name, (command, settings) in wanted.items():
            settings = settings | {"model_name_or_path": str(folder / "model")}
            rounds = options.rounds if name in FLOORS and not options.quick else 1
            measured[name] = [one_round(command, settings, folder) for _ in range(rounds)]
        # Last: a process's peak counts that of the process it was forked from, and this one grows here.
        counted = {command: operations(shape, folder / "model", command) for command in ("mntp", "simcse")}
        parts = made_of(shape, folder / "model")
        for name, (command, _) in wanted.items():
            seconds, rate, peak = (statistics.median(each) for each in zip(*measured[name]))
            over[name] = statistics.median(each.seconds * each.rate / counted[command] for each in measured[name])
            rows.append(
                {
                    "command": name,
                    "CPU seconds per step": f"{seconds:.2f}",
                    "square matmul, GFLOP/s": f"{rate / 1e9:.0f}",
                    "floor": f"{counted[command] / rate:.2f}",
                    "times the floor": f"{over[name]:.2f}",
                    "peak memory, GB": f"{peak / 1e9:.2f}",
                }
            )
    print(table(rows))
    seconds = [{"of a step of mntp in bf16": name} | {k: f"{v:.2f}" for k, v in kinds.items()} for name, kinds in parts.items()]
    print(f"\n{table(seconds)}")
    if options.quick:  # of other sizes than the goals
        return
    for name in [name for name in FLOORS if name in over]:
        most = FLOORS[name]
        why = in_bf16(parts) if "bf16" in name else ""
        goal(f"{name}: at most {most} times the floor: {over[name]:.2f}", over[name] <= most, why)
    peaks = {name: statistics.median(each.peak for each in rounds) / 1e9 for name, rounds in measured.items()}
    least = min(((peak, name) for name, peak in peaks.items() if not name.startswith(MNTP)), default=None)
    if least is not None and not options.only:
        goal(f"simcse: at most {PEAK} GB: {least[0]:.2f} ({least[1]})", least[0] <= PEAK)


if __name__ == "__main__":
    main()
