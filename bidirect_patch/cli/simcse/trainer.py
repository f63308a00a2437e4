"""sentence-transformers' trainer for contrastive training."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers, DefaultBatchSampler
from torch.utils.data import RandomSampler
from transformers import TrainerState

from ..callbacks import StopAfter
from ..checkpoints import STATE, resuming
from ..output_folder import writing
from ..settings import transformers_errors
from .saving import load_checkpoint, save_checkpoint, save_encoder


class SimCSETrainer(SentenceTransformerTrainer):
    """A trainer that resumes exactly, from checkpoints that hold what is trained and nothing else.

    Args:
        saved_max_seq_length: How many tokens of a text the saved model reads.
        stop_after_n_steps: The last step, wherever the schedule of the learning rate is. None means no limit.
        **kwargs: The other arguments of SentenceTransformerTrainer.
    """

    def __init__(self, *, saved_max_seq_length: int, stop_after_n_steps: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.saved_max_seq_length = saved_max_seq_length
        self.add_callback(StopAfter(stop_after_n_steps))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate. Training is the same without it: the random numbers that this draws are put back."""
        with torch.random.fork_rng(devices=[]):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the sampler of the batches. A resumed run draws those of its epoch."""
        if isinstance(self.train_dataset, dict) or self.args.batch_sampler != BatchSamplers.BATCH_SAMPLER:
            return super().get_batch_sampler(dataset, *args, **kwargs)  # these draw by the epoch already
        return EpochBatchSampler(RandomSampler(dataset, generator=kwargs["generator"]), *args, **kwargs)

    def load_finished(self, checkpoint: str) -> None:
        """Take a checkpoint of the last step as the result. Nothing is left to train."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, STATE))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, or raise ConfigError where its package is not installed or its arguments do not fit."""
        with transformers_errors():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule of the learning rate, or raise ConfigError where its arguments do not fit."""
        with transformers_errors():
            return super().create_scheduler(*args, **kwargs)

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

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        load_checkpoint(self.model, checkpoint_path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with resuming(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class EpochBatchSampler(DefaultBatchSampler):
    """Batches in an order that depends on the seed and the epoch alone, and not on the epochs drawn before."""

    def __iter__(self) -> Iterator[list[int]]:
        self.generator.manual_seed(self.seed + self.epoch)
        yield from super().__iter__()
