"""Forward and backward of eager attention beside torch's SDPA on a CPU, by length and precision.

    python -m benchmarks.cpu_attention [--rounds 5] [--quick]

SmolLM2-135M's heads, and about as many tokens at every length, under a mask of zeros. The training commands take eager attention
by themselves where it is faster here: see `EAGER_UP_TO` in bidirect_patch/cli/common_settings.py.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import paired_times, quartiles, table
from benchmarks.report import paired, parser, single_thread

HEADS, WIDTH, TOKENS = 9, 64, 2048
LENGTHS = (32, 128, 256, 512, 1024)


def steps(length: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A forward and a backward of both ways, on the same values."""
    shape = (max(1, tokens // length), HEADS, length, WIDTH)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.zeros(shape[0], 1, length, length, dtype=dtype)
    gradient = torch.randn(shape, dtype=dtype)

    def eager() -> torch.Tensor:  # as transformers has it
        weights = (q @ k.transpose(2, 3)) * WIDTH**-0.5 + mask
        return weights.softmax(-1, dtype=torch.float32).to(dtype) @ v

    def sdpa() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return {"eager": lambda: eager().backward(gradient), "SDPA": lambda: sdpa().backward(gradient)}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = parser(__doc__, rounds=5).parse_args(arguments)
    single_thread()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for length in LENGTHS[:2] if options.quick else LENGTHS:
            times = paired_times(steps(length, 64 if options.quick else TOKENS, dtype), options.rounds)
            milliseconds = {way: f"{1000 * quartiles(seconds).median:.1f}" for way, seconds in times.items()}
            ratio = quartiles(paired(times, "SDPA", "eager"))
            rows.append(
                {
                    "precision": str(dtype).removeprefix("torch."),
                    "tokens of a text": str(length),
                    **{f"{way}, ms": value for way, value in milliseconds.items()},
                    "SDPA / eager": str(ratio),
                }
            )
    print(table(rows))


if __name__ == "__main__":
    main()
