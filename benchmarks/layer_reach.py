"""Draw which position sees which through one layer, as the gradient tells.

Five grids: causal; bidirectional; the same with a sink token; with a sliding window of 3; with two texts packed into one row.
Writes figures/layer_reach.svg; `python -m benchmarks.layer_reach`, two seconds.
"""

import torch
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel

from benchmarks.attention_picture import SIZES, Cells, Row, grid, print_cells, seen
from benchmarks.report import parser
from benchmarks.svg import save
from bidirect_patch import bidirectional, enable_bidirectional

TOKENS = ["A", "cat", "sat", "on", "the", "mat", "today"]
ONE_TEXT = Row(TOKENS, list(range(7)), [1] * 7)
TWO_TEXTS = Row(["A", "cat", "sat", "It", "rained", "all", "day"], [0, 1, 2, 0, 1, 2, 3], [1] * 7)
SIZE, LEFT, TOP, STEP = 18, 58, 80, 206


def panels() -> list[tuple[str, Cells, Row]]:
    """Title, cells and input of each grid."""
    torch.manual_seed(0)
    llama = LlamaModel(LlamaConfig(**SIZES)).eval()
    mistral = MistralModel(MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=3)).eval()
    causal = ("causal", seen(llama, ONE_TEXT), ONE_TEXT)
    with bidirectional(llama, num_sink_tokens=1):
        sink = ("the first token a sink", seen(llama, ONE_TEXT), ONE_TEXT)
    for model in (llama, mistral):
        enable_bidirectional(model)
    return [
        causal,
        ("bidirectional", seen(llama, ONE_TEXT), ONE_TEXT),
        sink,
        ("sliding window of 3", seen(mistral, ONE_TEXT), ONE_TEXT),
        ("two packed texts", seen(llama, TWO_TEXTS), TWO_TEXTS),
    ]


def main() -> None:
    """Run the models, and draw them side by side."""
    parser(__doc__, 1).parse_args()
    parts: list[str] = []
    made = panels()
    for number, (title, cells, row) in enumerate(made):
        parts += grid(title, cells, row, LEFT + number * STEP, TOP, SIZE)
        print_cells(title, cells)
    save("layer_reach", LEFT + len(made) * STEP - 26, TOP + SIZE * len(TOKENS) + 8, parts)


if __name__ == "__main__":
    main()
