"""The patch beside transformers' own `config.is_causal = False`: forward and backward of a bare Llama on SDPA, bfloat16."""

import contextlib
import statistics
from collections.abc import Iterator

from benchmarks import patch_cost
from benchmarks.gpu.progress import Run
from benchmarks.gpu.shapes import clean, new_tensors
from benchmarks.gpu.timing import Step, over, take_turns

SHAPES = {  # name, hidden size, layers, heads, rows, tokens a row
    "16 layers of 2048, 8x512": (2048, 16, 32, 8, 512),
    "30 layers of 576, 32x512": (576, 30, 9, 32, 512),
    "30 layers of 576, 1x32": (576, 30, 9, 1, 32),  # nothing but launches
}
TINY = {"1 layer of 64, 2x16": (64, 1, 8, 2, 16)}


def part(run: Run) -> None:
    """One row for each shape, without a mask and padded; the hidden states are compared before anything is timed."""
    table = run.table("model", "mask", "native, ms", "ours, ms", "speed of ours over native")
    for shape, (hidden, layers, heads, batch, length) in (TINY if run.dry else SHAPES).items():
        for padded in (False, True):
            mask = "padded" if padded else "none"
            if not run.allows(f"{shape}, {mask}", 0 if run.dry else 5):
                continue
            try:
                with new_tensors(run.device):
                    config = patch_cost.config(hidden, layers, num_attention_heads=heads)
                    steps = patch_cost.make_steps(config, batch, length, padded, tolerance=0.1)
            except Exception as error:  # no result is a cell of the table
                table.add(shape, mask, run.failed(f"{shape}, {mask}", error))
                continue
            native = next(iter(steps))
            found = take_turns(run, {name: _as_way(step) for name, step in steps.items()}, 1 if run.dry else 7)
            if found[native].seconds and found["ours"].seconds:
                both = [f"{1e3 * statistics.median(found[way].seconds):.2f}" for way in (native, "ours")]
                table.add(shape, mask, *both, over(found, "ours", native))
            else:
                table.add(shape, mask, found[native].problem or found["ours"].problem or "no time was left")
            del steps, found
            clean(run.device)


def _as_way(step: Step):
    @contextlib.contextmanager
    def way() -> Iterator[Step]:
        yield step

    return way
