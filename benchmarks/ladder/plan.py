"""Which rows the table has, and how each is trained."""

from dataclasses import dataclass, field, replace
from typing import Any

# Settings of the commands, as their flags have them.
Settings = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: As the table has it.
        bidirectional: Whether attention is.
        mntp: Whether it is trained for masked next token prediction first.
        simcse: How many steps it is trained contrastively.
        whole: Whether all layers of the model are kept, where the others are cut.
        echo: Whether each text is read twice, and its second time pooled.
        neighbours: Whether a sentence's positive is the next one of its paragraph, and not the same one under other dropout.
        published: Whether SimCSE has LLM2Vec's published settings, where they differ.
        ceiling: Whether it is a finished encoder of others, for comparison, and nothing else of this holds.
    """

    name: str
    bidirectional: bool
    mntp: bool = False
    simcse: int = 0
    whole: bool = False
    echo: bool = False
    neighbours: bool = False
    published: bool = False
    ceiling: bool = False

    @property
    def trained(self) -> bool:
        """Whether a seed matters."""
        return self.mntp or self.simcse > 0


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Args:
        layers: So many of the model's lower layers are kept. None: all.
        mntp, simcse: Settings of both commands.
        simcse_steps: Steps of SimCSE.
        more_simcse_steps: Steps of SimCSE that read as many tokens as MNTP does, for the causal rows to have the same budget.
        pairs: So many pairs of each set. None: all.
    """

    layers: int | None
    mntp: Settings
    simcse: Settings
    simcse_steps: int
    more_simcse_steps: int
    pairs: int | None = None
    centre: int = 300  # sentences whose mean embedding is taken away
    rows: tuple[Row, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Make the rows."""
        few, more = self.simcse_steps, self.simcse_steps + self.more_simcse_steps
        rows = [
            Row("causal", False),
            Row("causal, echo", False, echo=True),
            Row("bidirectional, untrained", True),
            Row("bidirectional + MNTP", True, mntp=True),
            Row("bidirectional + MNTP + SimCSE", True, mntp=True, simcse=few),
            Row("bidirectional + SimCSE", True, simcse=more),
            Row("causal + SimCSE", False, simcse=more),
            Row("bidirectional + neighbours", True, simcse=more, neighbours=True),
            Row("bidirectional + MNTP + neighbours", True, mntp=True, simcse=few, neighbours=True),
            Row("causal + neighbours", False, simcse=more, neighbours=True),
        ]
        if any(self.simcse.get(name) != value for name, value in PUBLISHED.items()):
            rows.append(Row("bidirectional + SimCSE, LLM2Vec's settings", True, simcse=more, published=True))
        if self.layers is not None:
            rows += [Row("causal, all layers", False, whole=True), Row("bidirectional, all layers, untrained", True, whole=True)]
        rows.append(Row("MiniLM-L6, a finished encoder", True, ceiling=True))
        object.__setattr__(self, "rows", tuple(rows))


# Where LLM2Vec's files for SimCSE differ from what was found better at few steps.
PUBLISHED: Settings = {"learning_rate": 3e-5, "lora_dropout": 0.05}

# Where training on neighbouring sentences differs from SimCSE's.
NEIGHBOURS: Settings = {"loss_scale": 20.0}

_EITHER = {"lr_scheduler_type": "linear", "report_to": "none", "save_strategy": "no"}

CPU = Scale(
    layers=6,
    mntp={"preset": "small", "num_sink_tokens": 0} | _EITHER,
    simcse={"preset": "small", "num_sink_tokens": 0} | _EITHER,
    simcse_steps=60,
    more_simcse_steps=60,
)

_TINY = {"max_steps": 2, "warmup_steps": 0}
QUICK = replace(
    CPU, mntp=CPU.mntp | _TINY, simcse=CPU.simcse | {"warmup_steps": 0}, simcse_steps=2, more_simcse_steps=1, pairs=100, centre=50
)

# LLM2Vec's own sizes, for a GPU.
_LORA = {"lora_r": 16, "lora_dropout": 0.05, "bf16": True}
PAPER = Scale(
    layers=None,
    mntp=_EITHER
    | _LORA
    | {
        "mlm_probability": 0.2,
        "max_seq_length": 512,
        "per_device_train_batch_size": 32,
        "learning_rate": 5e-5,
        "max_steps": 1000,
    },
    simcse=_EITHER
    | _LORA
    | {
        "max_seq_length": 128,
        "per_device_train_batch_size": 128,
        "learning_rate": 3e-5,
        "warmup_steps": 300,
        "gradient_checkpointing": False,
    },
    simcse_steps=1000,
    more_simcse_steps=2000,
)

SCALES = {"cpu": CPU, "quick": QUICK, "paper": PAPER}
