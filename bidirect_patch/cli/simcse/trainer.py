"""sentence-transformers' trainer for contrastive training."""

from typing import Any

from sentence_transformers import SentenceTransformerTrainer

from ..callbacks import StopAfter
from .saving import save_encoder


class SimCSETrainer(SentenceTransformerTrainer):
    """A trainer whose checkpoints are whole models.

    Args:
        saved_max_seq_length: How many tokens of a text a saved model reads.
        stop_after_n_steps: The last step, wherever the schedule of the learning rate is. None means no limit.
        **kwargs: The other arguments of SentenceTransformerTrainer.
    """

    def __init__(self, *, saved_max_seq_length: int, stop_after_n_steps: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.saved_max_seq_length = saved_max_seq_length
        self.add_callback(StopAfter(stop_after_n_steps))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:  # newer releases of transformers call this in every process
            save_encoder(self.model, str(output_dir or self.args.output_dir), self.saved_max_seq_length)
