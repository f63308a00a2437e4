"""transformers' Trainer for masked next token prediction."""

import os
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ...mntp.collator import MNTPCollator
from ..callbacks import StopAfter
from ..lora import load_adapter_weights
from ..versions import allow_numpy_state
from .collator import RepeatableCollator
from .evaluation import masked_token_sums, summarize
from .model import adapter_of
from .saving import save_bidirectional


class MNTPTrainer(Trainer):
    """A Trainer that evaluates the mean over all masked tokens, resumes exactly, and saves bidirectional models.

    Args:
        tokenizer: Is saved with the model.
        eval_collator: Makes the batches of an evaluation.
        stop_after_n_steps: The last step, wherever the schedule of the learning rate is.
        **kwargs: The other arguments of Trainer. `data_collator` makes the batches of training.
    """

    data_collator: Any

    def __init__(self, *, tokenizer: Any, eval_collator: MNTPCollator, stop_after_n_steps: int, **kwargs: Any) -> None:
        super().__init__(compute_metrics=summarize, **kwargs)
        self.label_names = ["labels"]
        self.text_tokenizer = tokenizer
        self.eval_collator = eval_collator
        self.add_callback(TellEpoch(kwargs["data_collator"]))
        self.add_callback(StopAfter(stop_after_n_steps))

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the dataloader of an evaluation, with its own collator."""
        training = self.data_collator
        self.data_collator = self.eval_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate one batch.

        Returns:
            No loss, and twice the sums over each row. The Trainer would average a loss over batches, and a token of a
            short batch would weigh more.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        sums = masked_token_sums(outputs.logits, inputs["labels"])
        return None, sums, sums

    # The methods below replace private methods of Trainer.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # newer releases call this in every process
            return
        folder = output_dir or self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        save_bidirectional(self.accelerator.unwrap_model(self.model), folder, self.text_tokenizer, state_dict)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapter = adapter_of(self.accelerator.unwrap_model(model or self.model))
        if adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter_weights(adapter, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with allow_numpy_state():
            super()._load_rng_state(checkpoint)


class TellEpoch(TrainerCallback):
    """Tells a collator which epoch it is."""

    def __init__(self, collator: RepeatableCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch of the collator."""
        self.collator.epoch = int(state.epoch or 0)
