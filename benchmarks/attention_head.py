"""Draw how an attention head of a real model loses its sink once every token is opened, and keeps it with a sink token.

The head is the one whose weight on the first token falls most when every token is opened, among all heads of all layers. All
three panels show that head, with the first token that the model gets in front of its texts. Writes figures/attention_head.svg:
`python -m benchmarks.attention_head --model FOLDER_OR_NAME [--gguf_file NAME]`, some seconds beside the loading of the model.
"""

from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.report import parser
from benchmarks.svg import cell, save, text
from bidirect_patch import bidirectional
from bidirect_patch.cli.sink_token import choose_sink_token, prepend_sink_token

SENTENCE = "The bank of the river was flooded, so we walked home."
CELL, LEFT, TOP, GAP = 18, 116, 122, 120


def attention(model: Any, batch: Any) -> torch.Tensor:
    """Attention weights, (layers, heads, length, length), float32."""
    with torch.no_grad():
        return torch.cat(model(**batch, output_attentions=True).attentions).float()


def on_the_first(weights: torch.Tensor) -> torch.Tensor:
    """(..., length, length) -> (...): the mean weight that the other tokens put on the first one."""
    return weights[..., 1:, 0].mean(-1)


def most_lost(causal: torch.Tensor, opened: torch.Tensor) -> tuple[int, int]:
    """Layer and head, of (layers, heads, length, length), whose weight on the first token falls most."""
    lost = on_the_first(causal) - on_the_first(opened)
    layer, head = divmod(int(lost.argmax()), lost.shape[1])
    return layer, head


def heat(title: str, weights: torch.Tensor, tokens: list[str], x: float) -> list[str]:
    """One head as a grid, `x` pixels from the left: the stronger the color, the more weight."""
    parts = [text(x, 20, title, "title")]
    for row, token in enumerate(tokens):
        parts.append(text(x - 6, TOP + row * CELL + CELL / 2 + 4, token, anchor="end"))
        parts.append(text(x + row * CELL + CELL / 2 + 4, TOP - 6, token, turned=-60))
        for column, weight in enumerate(weights[row].tolist()):
            place = x + column * CELL, TOP + row * CELL
            parts.append(cell(*place, (CELL - 2, CELL - 2), "no"))
            if weight > 0.005:
                parts.append(cell(*place, (CELL - 2, CELL - 2), "first", weight**0.5))
    return parts


def main() -> None:
    """Run the model in three modes, and draw one head."""
    options = parser(__doc__, 1)
    options.add_argument("--model", required=True, metavar="FOLDER_OR_NAME")
    options.add_argument("--gguf_file", metavar="NAME", help="load this file of the model's folder")
    options.add_argument("--sentence", default=SENTENCE)
    given = options.parse_args()
    source = {"gguf_file": given.gguf_file} if given.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(given.model, **source)
    tokenizer = prepend_sink_token(tokenizer, choose_sink_token(tokenizer, None))
    model = AutoModel.from_pretrained(given.model, attn_implementation="eager", **source).eval()
    batch = tokenizer(given.sentence, return_tensors="pt")
    tokens = [tokenizer.decode([i]).strip() for i in batch["input_ids"][0]]
    panels = {"causal": attention(model, batch)}
    with bidirectional(model):
        panels["every token opened"] = attention(model, batch)
    with bidirectional(model, num_sink_tokens=1):
        panels["opened, the first token a sink"] = attention(model, batch)
    layer, head = most_lost(*list(panels.values())[:2])
    width = CELL * len(tokens)
    parts = []
    for number, (title, weights) in enumerate(panels.items()):
        x = LEFT + number * (width + GAP)
        share = float(on_the_first(weights[layer, head]))
        print(f"{title}: layer {layer}, head {head}: {share:.0%} of the other tokens' attention is on the first one")
        parts += heat(title, weights[layer, head], tokens, x)
        parts.append(text(x, TOP + width + 22, f"{share:.0%} on the first token"))
    save("attention_head", LEFT + 3 * (width + GAP) - GAP + 48, TOP + width + 36, parts)


if __name__ == "__main__":
    main()
