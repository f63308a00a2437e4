"""What the trainers of all commands share: where they stop, how they resume, and one line for what goes wrong meanwhile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerState

from ..errors import ConfigError
from .callbacks import StopAfter
from .checkpoints import STATE, resuming
from .common_settings import transformers_errors
from .output_folder import writing
from .settings_by_release import allow_numpy_state

# For evaluation and test data, of which every text is read, in its place. What is asked for concerns training alone.
READS_ALL_IN_ORDER = {"dataloader_drop_last": False, "dataloader_in_order": True}


class RunTrainer(Trainer):
    """A Trainer that stops after a number of steps, and raises ConfigError where a checkpoint or a folder can't be used.

    A subclass says how a checkpoint's weights are loaded, by `_load_from_checkpoint`.

    Args:
        stop_after_n_steps: The last step, wherever the schedule of the learning rate is. None means no limit.
        **kwargs: The arguments of the next class.
    """

    def __init__(self, *, stop_after_n_steps: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_callback(StopAfter(stop_after_n_steps))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate. Training is the same without it: the random numbers that this draws are put back."""
        with torch.random.fork_rng(devices=[]):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def evaluate_before(self, prefix: str) -> dict[str, float]:
        """Evaluate before the first step, with this prefix of the metrics' names.

        The weights keep their type, whatever `bf16_full_eval` and `fp16_full_eval` say: transformers casts the model itself,
        which is to be trained after that.
        """
        if self.args.bf16_full_eval or self.args.fp16_full_eval:
            self.model.to(self.args.device)  # where the cast would have moved it
        with self._arguments(bf16_full_eval=False, fp16_full_eval=False):
            metrics = self.evaluate(metric_key_prefix=prefix)
        # accelerate takes a model that it prepared for evaluation for one that is ready to be trained. It would leave that
        # model without DDP, and each rank would train alone, on its own gradients.
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        return metrics

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Read all of the data, in its order."""
        with self._arguments(**READS_ALL_IN_ORDER):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Read all of the data, in its order."""
        with self._arguments(**READS_ALL_IN_ORDER):
            return super().get_test_dataloader(*args, **kwargs)

    def load_finished(self, checkpoint: str) -> None:
        """Take a checkpoint of the last step as the result, or the best one if that is asked for. Nothing is left to train."""
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, STATE))
        best = self.state.best_model_checkpoint
        if best:  # it lies beside the last one, wherever the folder was moved to
            best = os.path.join(os.path.dirname(checkpoint), os.path.basename(best))
            self.state.best_model_checkpoint = best = best if os.path.isdir(best) else None
        if self.args.load_best_model_at_end and best:
            self._load_best_model()
        else:
            self._load_from_checkpoint(checkpoint)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, or raise ConfigError where its package is not installed or its arguments do not fit."""
        with transformers_errors():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule of the learning rate, or raise ConfigError where its arguments do not fit."""
        with transformers_errors():
            return super().create_scheduler(*args, **kwargs)

    def check_weights(self) -> None:
        """Raise ConfigError if training has left a weight that is no number, before the weights are saved."""
        if not all(torch.isfinite(weight).all() for weight in self.model.parameters() if weight.requires_grad):
            raise ConfigError(
                "the weights are no numbers any more after training: give a lower learning_rate; nothing is saved"
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the model card to the run, which writes its own."""

    def save_run(self) -> None:
        """Write the result and the state of the run to output_dir."""
        self.save_model()
        with writing(self.args.output_dir):
            self.save_state()

    @contextmanager
    def _arguments(self, **values: Any) -> Iterator[None]:
        """Other values of some training arguments within the block, of those that this release has."""
        before = {name: getattr(self.args, name) for name in values if hasattr(self.args, name)}
        try:
            for name in before:
                setattr(self.args, name, values[name])
            yield
        finally:
            for name, value in before.items():
                setattr(self.args, name, value)

    # The methods below replace private methods of Trainer.

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:  # transformers' own may group by length
        return SequentialSampler(eval_dataset)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with resuming(checkpoint), allow_numpy_state():
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
