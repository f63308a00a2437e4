"""Draw what one attention head of a real model attends to, before and after `enable_bidirectional`, without training.

The head is the one whose bidirectional attention puts the most weight on later tokens, among all heads of all layers. Both
panels show that head. Writes figures/attention_head.svg:
`python -m benchmarks.attention_head --model FOLDER_OR_NAME [--gguf_file NAME]`, some seconds beside the loading of the model.
"""

from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.report import parser
from benchmarks.svg import cell, save, text
from bidirect_patch import bidirectional

SENTENCE = "The bank of the river was flooded, so we walked home."
CELL, LEFT, TOP, GAP = 24, 84, 96, 120


def attention(model: Any, batch: Any) -> torch.Tensor:
    """Attention weights, (layers, heads, length, length), float32."""
    with torch.no_grad():
        return torch.cat(model(**batch, output_attentions=True).attentions).float()


def most_weight_on_later_tokens(weights: torch.Tensor) -> tuple[int, int, float]:
    """Layer, head, and that head's mean weight on later tokens. The last token has none, and is left out."""
    later = weights.triu(1).sum(-1)[..., :-1].mean(-1)
    layer, head = divmod(int(later.argmax()), weights.shape[1])
    return layer, head, float(later[layer, head])


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
    """Run the model in both modes, and draw one head."""
    options = parser(__doc__, 1)
    options.add_argument("--model", required=True, metavar="FOLDER_OR_NAME")
    options.add_argument("--gguf_file", metavar="NAME", help="load this file of the model's folder")
    options.add_argument("--sentence", default=SENTENCE)
    given = options.parse_args()
    source = {"gguf_file": given.gguf_file} if given.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(given.model, **source)
    model = AutoModel.from_pretrained(given.model, attn_implementation="eager", **source).eval()
    batch = tokenizer(given.sentence, return_tensors="pt")
    tokens = [tokenizer.decode([i]).strip() for i in batch["input_ids"][0]]
    before = attention(model, batch)
    with bidirectional(model):
        after = attention(model, batch)
    layer, head, share = most_weight_on_later_tokens(after)
    width = CELL * len(tokens)
    right = LEFT + width + GAP
    parts = heat("causal", before[layer, head], tokens, LEFT) + heat("bidirectional", after[layer, head], tokens, right)
    note = f"layer {layer}, head {head}: {share:.0%} of its bidirectional attention is on later tokens"
    parts.append(text(LEFT, TOP + width + 24, note))
    save("attention_head", right + width + 40, TOP + width + 36, parts)
    print(note)


if __name__ == "__main__":
    main()
