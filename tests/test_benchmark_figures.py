"""The figures of the benchmarks: what they show is computed rightly, and no word is cut off."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import attention_head, layer_reach, loss_curve, speed_and_memory

FOLDER = Path(speed_and_memory.FIGURES)
TABLE = """
## The collator

| features | stock | ours / stock |
|----------|-------|--------------------|
| lists | 2.28 | 2.00 / 4.00 / 5.00 |
| lists, special | 2.28 | 1.00 / 1.00 / 1.00 |

## Another

| features | ours / stock |
"""
LOG = [{"step": 1, "loss": 6.0}, {"step": 2, "loss": 5.0}, {"step": 2, "eval_loss": 4.5}]


def positions(shape, rule):
    return [[rule(q, k) for k in range(shape)] for q in range(shape)]


def test_the_reach_of_a_layer_is_what_its_title_says():
    shown = {title: cells for title, cells, _ in layer_reach.panels()}
    expected = {
        "causal": lambda q, k: k <= q,
        "bidirectional": lambda q, k: True,
        "the first token a sink": lambda q, k: q > 0 or k == 0,
        "sliding window of 3": lambda q, k: abs(q - k) < 3,
        "two packed texts": lambda q, k: (q < 3) == (k < 3),
    }
    assert shown == {title: positions(7, rule) for title, rule in expected.items()}


def test_the_head_that_loses_its_sink_is_chosen():
    causal = torch.eye(4).repeat(2, 3, 1, 1)
    causal[1, 2] = causal[0, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # all weight on the first token
    opened = causal.clone()
    opened[1, 2, :, 0] = torch.tensor([1.0, 0.25, 0.5, 0.0])
    assert attention_head.most_lost(causal, opened) == (1, 2)
    assert attention_head.on_the_first(opened[1, 2]) == pytest.approx(0.25)


@pytest.mark.parametrize("inverse, share", [(False, (2, 4, 5)), (True, (0.2, 0.25, 0.5))])
def test_a_share_is_read_from_its_row_and_column(inverse, share):
    bar = speed_and_memory.Bar("", "The collator", "lists 2", "ours / stock", inverse)
    assert speed_and_memory.value(speed_and_memory.section(TABLE, "The collator"), bar) == pytest.approx(share)


def test_each_bar_has_its_row_in_the_results():
    results = (FOLDER.parent / "RESULTS.md").read_text()
    for bar in speed_and_memory.BARS:
        low, middle, high = speed_and_memory.value(speed_and_memory.section(results, bar.section), bar)
        assert 0 < low <= middle <= high < 10


def test_lower_losses_are_drawn_lower():
    parts = loss_curve.draw(LOG, {"before_loss": 7.0, "causal_loss": 5.5})
    batches = next(part for part in parts if "line2" in part)
    (x1, y1), (x2, y2) = re.findall(r"([\d.]+) ([\d.]+)", batches)
    assert float(x1) < float(x2) and float(y1) < float(y2)  # y grows downwards
    assert any("bidirectional, untrained: 7.00" in part for part in parts)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.svg")), ids=lambda path: path.stem)
def test_no_word_of_a_figure_is_cut_off(path):
    root = ElementTree.parse(path).getroot()
    width, height = float(root.get("width")), float(root.get("height"))
    for node in root.iter("{http://www.w3.org/2000/svg}text"):
        if node.get("transform"):
            continue
        x, y, size = float(node.get("x")), float(node.get("y")), 8.3 * len(node.text)  # pixels a letter, at most
        left = x - {"start": 0, "middle": size / 2, "end": size}[node.get("text-anchor", "start")]
        assert left >= -10 and left + size <= width + 10 and 12 <= y <= height, node.text
