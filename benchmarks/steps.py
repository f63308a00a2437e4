"""What a step of both training commands costs, beside what its matrix products alone cost on this CPU.

    python -m benchmarks.steps [--rounds 3] [--quick]

Random weights of SmolLM2-135M's shape. A command runs twice, for a few and for more steps: the difference of CPU seconds is
that of the steps, with the collator, the optimizer and the trainer; the floor is the floating point operations that torch
counts in a forward and a backward of the same batch, at the speed of a matrix product of these sizes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import ROOT, paired_times, table
from benchmarks.report import parser, single_thread
from benchmarks.texts import tokenizer

WORDS = 49_152
FEW, MORE = 2, 6  # steps
LORA = {"lora_r": 16, "lora_dropout": 0.0}
EITHER_WAY = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the batches."""

    vocab: int = WORDS
    hidden: int = 576
    layers: int = 30
    batch: int = 8
    length: int = 128
    pairs: int = 32
    words: int = 32


QUICK = Shape(vocab=200, hidden=32, layers=1, batch=2, length=16, pairs=3, words=8)


def save_model(shape: Shape, folder: Path) -> None:
    """A Llama of this shape with a tokenizer of words."""
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, shape.hidden // 64)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
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


def matmul_rate(shape: Shape) -> float:
    """Operations a second of the product of a batch with a layer's largest weight."""
    a, b = torch.randn(shape.batch * shape.length, shape.hidden), torch.randn(shape.hidden * 8 // 3, shape.hidden)
    times = paired_times({"product": lambda: torch.nn.functional.linear(a, b)}, rounds=5)["product"]
    return 2 * a.numel() * len(b) / statistics.median(times)


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
    return {
        "mntp": ("mntp", mntp),
        "simcse": ("simcse", simcse),
        "simcse, no checkpoints": ("simcse", simcse | {"gradient_checkpointing": False}),
        "simcse, 8 pairs at a time, no checkpoints": (
            "simcse",
            simcse | {"gradient_checkpointing": False, "mini_batch_size": min(8, shape.pairs)},
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = parser(__doc__, rounds=3).parse_args(arguments)
    single_thread()
    shape = QUICK if options.quick else Shape()
    rate = matmul_rate(shape)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(shape, folder / "model")
        save_lines(shape, folder / "paragraphs.txt", MORE * shape.batch, shape.length)
        save_lines(shape, folder / "sentences.txt", MORE * shape.pairs, shape.words - 2)
        for name, (command, settings) in commands(shape, folder).items():
            settings = settings | {"model_name_or_path": str(folder / "model")}
            floor = operations(shape, folder / "model", command) / rate
            steps, peaks = [], []
            for _ in range(1 if options.quick else options.rounds):
                few, _ = cpu_seconds(command, settings, FEW, folder)
                more, peak = cpu_seconds(command, settings, MORE, folder)
                steps.append((more - few) / (MORE - FEW))
                peaks.append(peak)
            rows.append(
                {
                    "command": name,
                    "CPU seconds a step": f"{statistics.median(steps):.2f}",
                    "floor": f"{floor:.2f}",
                    "times the floor": f"{statistics.median(steps) / floor:.2f}",
                    "peak memory, GB": f"{statistics.median(peaks) / 1e9:.2f}",
                }
            )
    print(table(rows))
    print(f"\nA product of {shape.batch * shape.length} tokens with the largest weight: {rate / 1e9:.0f} GFLOP/s, float32.")


if __name__ == "__main__":
    main()
