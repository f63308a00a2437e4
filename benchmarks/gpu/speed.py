"""Tokens a second and peak memory of an MNTP step: by loss, by what is trained, by attention backend and by layout."""

import statistics
from dataclasses import replace

import torch

from benchmarks import padding_free
from benchmarks.gpu.progress import Run
from benchmarks.gpu.shapes import SIZES, card_rate, clean, make, masked_batch, on, sized, ways
from benchmarks.gpu.stand_ins import flash_backends
from benchmarks.gpu.timing import Measured, over, take_turns
from benchmarks.head import Setting, flops

LOSSES = ("stock", "Liger", "ours", "ours, Liger")
LOSS_RUNS = (  # size, LoRA, seconds that it may take
    ("Llama-3.2-1B", False, 15),
    ("Llama-3.2-1B", True, 15),
    ("SmolLM2-135M", False, 15),
    ("SmolLM2-135M", True, 15),
    ("Llama-3.1-8B", True, 20),
    ("Llama-3.1-8B", False, 20),
)
LAYOUT_RUNS = (("Llama-3.2-1B", 40), ("SmolLM2-135M", 40))
SENTENCES = 256


def part(run: Run) -> None:
    """The two tables."""
    rate = card_rate(run)
    run.write(f"\nSquare bf16 matmul: {rate / 1e12:.3f} TFLOP/s. A step is forward and backward, 20% of tokens scored.")
    by_loss(run, rate)
    by_layout(run)


def by_loss(run: Run, rate: float) -> None:
    """All tokens real, SDPA: stock logits, Liger-Kernel and ours."""
    columns = ("size", "trained", "batch", "loss", "tokens / s", "over stock", "growth, MB", "matmul rate's share")
    table = run.table(*columns)
    for size, lora, seconds in LOSS_RUNS[:2] if run.dry else LOSS_RUNS:
        trained = "LoRA" if lora else "full"
        if not run.allows(f"{size}, {trained}", 0 if run.dry else seconds):
            continue
        setting = replace(sized(SIZES[size], run.dry), lora=lora)
        inputs = masked_batch(setting, run.device)
        model = make(setting, run.device)
        how = {loss: ("sdpa", loss, inputs) for loss in LOSSES if has_liger() or "Liger" not in loss}
        found = take_turns(run, ways(model, how, run.dry), 1 if run.dry else 3)
        for loss in LOSSES:
            left = (size, trained, f"{setting.batch}x{setting.length}", loss)
            if loss not in found:
                table.add(*left, "liger-kernel is not installed")
                continue
            # Liger computes every position's logits too, and keeps none of them.
            work = flops(setting, loss.startswith("ours"))
            table.add(*left, *cells(found, loss, "stock", setting.batch * setting.length, work / rate))
        del model, inputs
        clean(run.device)


def by_layout(run: Run) -> None:
    """Attention backends on batches without padding, padded, and padding-free; all weights trained, our head."""
    table = run.table("size", "attention", "layout", "real tokens / s", "over SDPA dense or padded", "growth, MB")
    for size, seconds in LAYOUT_RUNS[:1] if run.dry else LAYOUT_RUNS:
        if not run.allows(f"{size}, attention backends", 0 if run.dry else seconds):
            continue
        setting = sized(SIZES[size], run.dry)
        layouts = {"dense": masked_batch(setting, run.device), **sentence_batches(setting, run.device, run.dry)}
        model = make(setting, run.device)
        how = {
            f"{backend}, {layout}": (backend, "ours", layouts[layout])
            for backend in ("sdpa", *flash_backends(run.dry)[-1 if run.dry else 0 :], "flex_attention")
            for layout in layouts
        }
        found = take_turns(run, ways(model, how, run.dry), 1 if run.dry else 3)
        for name in how:
            backend, layout = name.split(", ")
            count = padding_free.real_tokens([layouts[layout]])
            base = "sdpa, dense" if layout == "dense" else "sdpa, padded"  # which holds the same sentences
            table.add(size, backend, layout, *cells(found, name, base, count))
        del model, layouts
        clean(run.device)


def cells(found: dict[str, Measured], way: str, base: str, count: int, floor: float | None = None) -> list[str]:
    """Tokens a second, their ratio to another way's, MB, and the share of the card's rate; or what went wrong.

    Args:
        found: What was measured.
        way: Which of it.
        base: What it is compared with.
        count: Tokens of a step.
        floor: Seconds that the arithmetic of a step takes at the card's rate; None where nobody asks.
    """
    one = found[way]
    if one.problem or not one.seconds:
        return [one.problem or "no time was left"]
    row = [one.rate(count), over(found, way, base), f"{one.peak / 1e6:,.0f}"]
    return row if floor is None else [*row, f"{floor / statistics.median(one.seconds):.0%}"]


def sentence_batches(setting: Setting, device: torch.device, dry: bool) -> dict[str, dict[str, torch.Tensor]]:
    """The same sentences padded and padding-free."""
    sentences = padding_free.make_batches(1, 2 if dry else SENTENCES, setting.vocab)
    return {name: on(device, sentences[name][0]) for name in ("padded", "padding_free")}


def has_liger() -> bool:
    """Whether Liger-Kernel is installed."""
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError:
        return False
    return True
