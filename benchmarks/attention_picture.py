"""Draw which position sees which, in a causal model and in the same model made bidirectional, as the gradient tells.

One row of tokens holds two packed texts and padding. A cell is filled if the output of its row's token depends on the input of
its column's token. Writes figures/attention.svg; `python -m benchmarks.attention_picture`, two seconds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from benchmarks.report import parser
from benchmarks.svg import cell, save, text
from bidirect_patch import bidirectional

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
CELL, LEFT, TOP, GAP = 26, 62, 84, 250

Cells = list[list[bool]]


class Row(NamedTuple):
    """One row of a batch.

    Attributes:
        tokens: The word of each position.
        positions: Position ids. A new text starts where they fall.
        real: 1 for tokens, 0 for padding.
    """

    tokens: Sequence[str]
    positions: Sequence[int]
    real: Sequence[int]


ROW = Row(
    ["The", "cat", "sat", "down", "It", "rained", "today", "pad", "pad"],
    [0, 1, 2, 3, 0, 1, 2, 0, 0],
    [1, 1, 1, 1, 1, 1, 1, 0, 0],
)


def seen(model: PreTrainedModel, row: Row) -> Cells:
    """For each position, which inputs its output depends on."""
    count = len(row.tokens)
    inputs = model.get_input_embeddings()(torch.arange(5, 5 + count)[None]).detach().requires_grad_()
    given = {"attention_mask": torch.tensor([row.real]), "position_ids": torch.tensor([row.positions])}
    out = model(inputs_embeds=inputs, **given)[0]
    gradients = [torch.autograd.grad(out[0, at].sum(), inputs, retain_graph=True)[0][0] for at in range(count)]
    return [[bool(each.abs().max() > 1e-9) for each in gradient] for gradient in gradients]


def grid(title: str, cells: Cells, row: Row, x: float, y: float, size: float = CELL) -> list[str]:
    """One grid as SVG, whose first cell is at (x, y)."""
    parts = [text(x, y - 64, title, "title")]
    second = next((i for i in range(1, len(row.tokens)) if row.positions[i] == 0), len(row.tokens))
    for at, token in enumerate(row.tokens):
        top = y + at * size
        parts.append(text(x - 6, top + size / 2 + 4, token, anchor="end"))
        parts.append(text(x + at * size + size / 2 + 4, y - 6, token, turned=-60))
        for column, filled in enumerate(cells[at]):
            kind = "no"
            if not (row.real[at] and row.real[column]):
                kind = "padding"
            elif filled:
                kind = "across" if (at < second) != (column < second) else "first" if at < second else "second"
            parts.append(cell(x + column * size, top, (size - 2, size - 2), kind))
    return parts


def print_cells(name: str, cells: Cells) -> None:
    """A grid as text."""
    print(name, *("".join("#" if filled else "." for filled in row) for row in cells), sep="\n")


def main() -> None:
    """Run the model in both modes, and draw it."""
    parser(__doc__, 1).parse_args()
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SIZES)).eval()
    before = seen(model, ROW)
    with bidirectional(model):
        after = seen(model, ROW)
    width = CELL * len(ROW.tokens)
    right = LEFT + width + GAP
    middle = TOP + width // 2
    parts = grid("causal", before, ROW, LEFT, TOP) + grid("bidirectional", after, ROW, right, TOP)
    parts.append(text(LEFT + width + 14, middle - 14, "enable_bidirectional", "code"))
    parts.append(text(LEFT + width + 66, middle + 24, "(model)", "code"))
    parts.append(f'<path d="M {LEFT + width + 14} {middle} H {right - 72} m -8 -5 l 8 5 l -8 5"/>')
    save("attention", right + width + 40, TOP + width + 8, parts)
    print_cells("causal", before)
    print_cells("bidirectional", after)


if __name__ == "__main__":
    main()
