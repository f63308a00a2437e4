"""Draw which position sees which, in a causal model and in the same model made bidirectional, as the gradient tells.

One row of tokens holds two packed texts and padding. A cell is filled if the output of its row's token depends on the input of
its column's token. Writes figures/attention.svg; `python -m benchmarks.attention_picture`, two seconds.
"""

import os

import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.report import FIGURES, parser
from bidirect_patch import bidirectional

TOKENS = ["The", "cat", "sat", "down", "It", "rained", "today", "pad", "pad"]
POSITIONS = [[0, 1, 2, 3, 0, 1, 2, 0, 0]]
REAL = [[1, 1, 1, 1, 1, 1, 1, 0, 0]]
CELL, LEFT, TOP, GAP = 26, 62, 84, 250

STYLE = """
text { font: 13px sans-serif; fill: #24292f }
.code { font: 13px monospace }
.title { font: bold 14px sans-serif }
.no { fill: #eaeef2 } .first { fill: #0969da } .second { fill: #1a7f37 } .across { fill: #bc4c00 }
.padding { fill: #d0d7de; opacity: 0.35 }
path { stroke: #57606a; fill: none; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #c9d1d9 } .no { fill: #21262d } .first { fill: #58a6ff } .second { fill: #3fb950 } .across { fill: #f0883e }
  .padding { fill: #484f58 } path { stroke: #8b949e }
}
"""


def seen(model: LlamaModel) -> list[list[bool]]:
    """For each position, which inputs its output depends on."""
    inputs = model.get_input_embeddings()(torch.arange(5, 5 + len(TOKENS))[None]).detach().requires_grad_()
    out = model(inputs_embeds=inputs, attention_mask=torch.tensor(REAL), position_ids=torch.tensor(POSITIONS))[0]
    gradients = [torch.autograd.grad(out[0, at].sum(), inputs, retain_graph=True)[0][0] for at in range(len(TOKENS))]
    return [[bool(each.abs().max() > 1e-9) for each in gradient] for gradient in gradients]


def grid(title: str, cells: list[list[bool]], x: int) -> list[str]:
    """One grid as SVG, `x` pixels from the left."""
    parts = [f'<text class="title" x="{x}" y="20">{title}</text>']
    second = POSITIONS[0].index(0, 1)
    for row, token in enumerate(TOKENS):
        y = TOP + row * CELL
        parts.append(f'<text x="{x - 6}" y="{y + 17}" text-anchor="end">{token}</text>')
        turned = f"translate({x + row * CELL + 17} {TOP - 6}) rotate(-60)"
        parts.append(f'<text transform="{turned}">{token}</text>')
        for column, filled in enumerate(cells[row]):
            kind = "no"
            if not (REAL[0][row] and REAL[0][column]):
                kind = "padding"
            elif filled:
                kind = "across" if (row < second) != (column < second) else "first" if row < second else "second"
            place = f'x="{x + column * CELL}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="3"'
            parts.append(f'<rect class="{kind}" {place}/>')
    return parts


def main() -> None:
    parser(__doc__, 1).parse_args()
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaModel(LlamaConfig(**sizes)).eval()
    before = seen(model)
    with bidirectional(model):
        after = seen(model)
    width = CELL * len(TOKENS)
    right = LEFT + width + GAP
    middle = TOP + width // 2
    parts = grid("causal", before, LEFT) + grid("bidirectional", after, right)
    parts.append(f'<text class="code" x="{LEFT + width + 14}" y="{middle - 14}">enable_bidirectional</text>')
    parts.append(f'<text class="code" x="{LEFT + width + 66}" y="{middle + 24}">(model)</text>')
    end = right - 72
    parts.append(f'<path d="M {LEFT + width + 14} {middle} H {end} m -8 -5 l 8 5 l -8 5"/>')
    size = f'width="{right + width + 40}" height="{TOP + width + 8}"'
    os.makedirs(FIGURES, exist_ok=True)
    with open(os.path.join(FIGURES, "attention.svg"), "w") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n')
        file.write("\n".join(parts) + "\n</svg>\n")
    for name, cells in (("causal", before), ("bidirectional", after)):
        print(name, *("".join("#" if cell else "." for cell in row) for row in cells), sep="\n")


if __name__ == "__main__":
    main()
