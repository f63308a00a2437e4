"""The figure: each row as a bar, with its interval, for each group of sets."""

from benchmarks.ladder.statistics import interval
from benchmarks.ladder.table import GROUPS, Comparison
from benchmarks.report import pyplot_or_none, save_figure

OURS, CAUSAL, CEILING = "#4c78a8", "#9d9d9d", "#72b7b2"


def draw(comparison: Comparison, name: str) -> None:
    """figures/NAME.png: one panel for each group, bidirectional rows in blue, causal ones in grey."""
    pyplot = pyplot_or_none()
    if pyplot is None:
        return
    rows = list(comparison.results)[::-1]
    figure, panels = pyplot.subplots(1, len(GROUPS), figsize=(11, 1 + 0.35 * len(rows)), sharey=True, squeeze=False)
    for axes, group in zip(panels[0], GROUPS):
        for row in rows:
            found = comparison.value(row, group)
            if found is None:
                axes.barh(row.name, 0)
                continue
            low, high = interval(found[1])
            whisker = [[max(0.0, found[0] - low)], [max(0.0, high - found[0])]]
            colour = CEILING if row.ceiling else OURS if row.bidirectional else CAUSAL
            axes.barh(row.name, found[0], xerr=whisker, color=colour, ecolor="#333", capsize=2)
        axes.set_title(group, fontsize=10)
        axes.set_xlabel("Spearman x 100", fontsize=8)
        axes.tick_params(labelsize=8)
    save_figure(figure, name)
