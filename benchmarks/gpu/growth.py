"""How seconds and memory of an MNTP step grow with the length of a row, up to 32k tokens; always as many tokens in all."""

import statistics
from dataclasses import replace

import torch

from benchmarks.gpu.progress import Run
from benchmarks.gpu.shapes import SMALL, clean, make, masked_batch, sized, ways
from benchmarks.gpu.stand_ins import flash_backends
from benchmarks.gpu.timing import over, take_turns

TOKENS = 32_768
LENGTHS = (512, 2048, 8192, 32_768)
DRY_LENGTHS = (12,)


def part(run: Run) -> None:
    """SmolLM2-135M's shape: stock and our loss on SDPA, ours on each backend, also where a fifth of each row is padding."""
    model = make(sized(SMALL, run.dry), run.device)
    table = run.table("batch", "loss", "attention", "mask", "ms a step", "speed over stock", "growth, MB")
    flash = flash_backends(run.dry)[-1:]
    for length in DRY_LENGTHS if run.dry else LENGTHS:
        batch = 1 if run.dry else TOKENS // length
        if not run.allows(f"{batch}x{length}", 0 if run.dry else 10):
            continue
        real = masked_batch(replace(sized(SMALL, run.dry), batch=batch, length=length), run.device)
        inputs = {"none": real, "padded": real | {"attention_mask": padding(batch, length, run.device)}}
        kinds = [("sdpa", "stock", "none"), ("sdpa", "ours", "none"), ("sdpa", "ours", "padded")]
        kinds += [(b, "ours", mask) for b in (*flash, "flex_attention") for mask in inputs]
        how = {", ".join(kind): (kind[0], kind[1], inputs[kind[2]]) for kind in kinds}
        found = take_turns(run, ways(model, how, run.dry), 1 if run.dry else 2)
        for backend, loss, mask in kinds:
            name = f"{backend}, {loss}, {mask}"
            row = (f"{batch}x{length}", loss, backend, mask)
            one = found[name]
            if one.problem or not one.seconds:
                table.add(*row, one.problem or "no time was left")
                continue
            milliseconds = f"{1e3 * statistics.median(one.seconds):.1f}"
            table.add(*row, milliseconds, over(found, name, "sdpa, stock, none"), f"{one.peak / 1e6:,.0f}")
        clean(run.device)


def padding(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """(batch, length), int64: 0 in the last fifth of each row."""
    return (torch.arange(length, device=device) < length * 4 // 5).long().expand(batch, length).contiguous()
