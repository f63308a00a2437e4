"""sentence-transformers' trainer for contrastive training."""

import os
from collections.abc import Iterator
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers, DefaultBatchSampler
from torch.utils.data import RandomSampler

from ..output_folder import writing
from ..trainer import RunTrainer
from .saving import load_checkpoint, save_checkpoint, save_encoder


class SimCSETrainer(RunTrainer, SentenceTransformerTrainer):
    """A trainer that resumes exactly, from checkpoints that hold what is trained and nothing else.

    Args:
        saved_max_seq_length: How many tokens of a text the saved model reads.
        **kwargs: The other arguments of RunTrainer and SentenceTransformerTrainer.
    """

    def __init__(self, *, saved_max_seq_length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.saved_max_seq_length = saved_max_seq_length

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the sampler of the batches. A resumed run draws those of its epoch."""
        if isinstance(self.train_dataset, dict) or self.args.batch_sampler != BatchSamplers.BATCH_SAMPLER:
            return super().get_batch_sampler(dataset, *args, **kwargs)  # these draw by the epoch already
        return EpochBatchSampler(RandomSampler(dataset, generator=kwargs["generator"]), *args, **kwargs)

    # The methods below replace private methods of Trainer.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # newer releases of transformers call this in every process
            return
        folder = str(output_dir or self.args.output_dir)
        with writing(folder):
            if os.path.abspath(folder) == os.path.abspath(str(self.args.output_dir)):
                save_encoder(self.model, folder, self.saved_max_seq_length)
            else:
                save_checkpoint(self.model, folder, self.args)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        load_checkpoint(self.model, checkpoint_path)


class EpochBatchSampler(DefaultBatchSampler):
    """Batches in an order that depends on the seed and the epoch alone, and not on the epochs drawn before."""

    def __iter__(self) -> Iterator[list[int]]:
        self.generator.manual_seed(self.seed + self.epoch)
        yield from super().__iter__()
