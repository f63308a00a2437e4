"""The rows: an attention, and how the model was trained with it."""

import re
from typing import NamedTuple

from bidirect_patch.cli.sweep.setups import CAUSAL, OPEN, SINK, Attention

ATTENTIONS: dict[str, Attention] = {
    "causal": CAUSAL,
    "opened": OPEN,
    "sink": SINK,  # opened, the first token stays causal
    "sinkless": SINK._replace(blind=1),  # and is hidden from the last layer
}
UPPER = "upper layers opened"  # the lower layers causal, the first token hidden in the upper ones; untrained only

# The steps of training, in their order. `halved` takes the mean of the weights before and after, `simcse` pairs a sentence with
# itself, `neighbours` with the next one of its paragraph, and `teacher` distils a finished encoder.
RECIPES: dict[str, tuple[str, ...]] = {
    "untrained": (),
    "SimCSE": ("simcse",),
    "neighbours": ("neighbours",),
    "MNTP": ("mntp",),
    "MNTP halved": ("mntp", "halved"),
    "MNTP + SimCSE": ("mntp", "simcse"),
    "MNTP + neighbours": ("mntp", "neighbours"),
    "teacher": ("teacher",),
}
UNTRAINED, CAUSAL_ROW = "untrained", "causal"
OF_ADAPTERS = ("mntp", "halved")  # the steps that give an adapter alone, and train no causal model


class Row(NamedTuple):
    """One row.

    Attributes:
        recipe: A key of RECIPES.
        attention: A key of ATTENTIONS, or UPPER.
        seed: Of its training.
    """

    recipe: str
    attention: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.recipe}, {self.attention}"

    @property
    def file(self) -> str:
        """Its name as a file has it."""
        return "-".join(re.findall(r"\w+", f"{self} {self.seed}"))

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of its training."""
        return RECIPES[self.recipe]

    @property
    def causal(self) -> "Row":
        """The causal row with the same training, but for MNTP, which trains no causal model."""
        steps = tuple(step for step in self.steps if step not in OF_ADAPTERS)
        recipe = next(name for name, its_steps in RECIPES.items() if its_steps == steps)
        return self._replace(recipe=recipe, attention=CAUSAL_ROW)


def all_rows(seeds: int) -> list[Row]:
    """Every row: the untrained ones first, then one seed after the other."""
    found = [Row(UNTRAINED, attention) for attention in (*ATTENTIONS, UPPER)]
    for seed in range(seeds):
        for recipe, steps in RECIPES.items():
            # MNTP trains no causal model.
            found += [Row(recipe, a, seed) for a in ATTENTIONS if steps and not ("mntp" in steps and a == CAUSAL_ROW)]
    return found
