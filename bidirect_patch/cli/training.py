"""transformers' Trainer for MNTP: exact resuming, masked-token loss and accuracy, the right files."""

import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from peft import set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerState

from ..mntp.collator import IGNORED, MNTPCollator, seeded
from .data import PASS
from .model import adapter_of
from .saving import save_bidirectional


class ResumableCollator(MNTPCollator):
    """Masks of a text that depend on the seed, the epoch and its tokens alone, on no draw made before.

    So a resumed run masks as the uninterrupted one does, whatever either had fetched ahead; every evaluation scores the
    same tokens; and neither depends on what else is in the batch, or on how many processes share it.
    """

    epoch = 0

    def __call__(self, features: Any) -> dict[str, Any]:
        self._epochs = [f.get(PASS, self.epoch) if isinstance(f, Mapping) else self.epoch for f in features]
        return super().__call__(features)

    def draws(self, rows: list[dict[str, np.ndarray]]) -> torch.Tensor:
        texts = [row["input_ids"] for row in rows]
        generators = (
            seeded(self.seed or 0, epoch, zlib.crc32(ids.tobytes())) for epoch, ids in zip(self._epochs, texts)
        )
        return torch.cat([torch.rand(3, len(ids), generator=g) for ids, g in zip(texts, generators)], 1)


class MNTPTrainer(Trainer):
    """A Trainer whose evaluation is the mean over all masked tokens, and whose checkpoints are bidirectional models."""

    data_collator: Any

    def __init__(self, *, tokenizer: Any, eval_collator: MNTPCollator, stop_after_n_steps: int, **kwargs: Any) -> None:
        super().__init__(compute_metrics=summarize, **kwargs)
        self.label_names = ["labels"]
        self.text_tokenizer = tokenizer
        self.eval_collator = eval_collator
        self.add_callback(Schedule(kwargs["data_collator"], stop_after_n_steps))

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        training = self.data_collator
        self.data_collator = self.eval_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        sums = masked_token_sums(outputs.logits, inputs["labels"])
        # No loss: the Trainer would average it over batches, and a token of a short batch would weigh more.
        return None, sums, sums

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # newer Trainers call this in every process
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
            set_peft_model_state_dict(adapter, load_peft_weights(resume_from_checkpoint, device="cpu"))

    def load_finished(self, checkpoint: str) -> None:
        """Take over a checkpoint of the last step as the result, with nothing left to train."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Older transformers load what they saved, NumPy's state, with torch.load, which refuses it by default now.
        with torch.serialization.safe_globals(_numpy_state_types()):
            super()._load_rng_state(checkpoint)


class Schedule(TrainerCallback):
    """Tells the collator the epoch, and stops after so many steps whatever the learning rate's schedule."""

    def __init__(self, collator: ResumableCollator, stop_after_n_steps: int) -> None:
        self.collator, self.stop_after_n_steps = collator, stop_after_n_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.stop_after_n_steps:
            control.should_training_stop = True


def masked_token_sums(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per row: loss in nats, tokens named right, tokens scored. All that evaluation keeps of a batch.

    Args:
        scores: (batch, length, 2), float32, what the head gives as "scores": of position i, the token that it predicts
            for i + 1, and the loss of that.
        labels: (batch, length), int64, -100 where not scored.

    Returns:
        (batch, 3), float32.
    """
    targets = labels[:, 1:]
    scored = targets != IGNORED
    predicted, losses = scores[:, :-1].unbind(-1)
    right = (predicted == targets) & scored
    return torch.stack([(losses * scored).sum(1), right.sum(1), scored.sum(1)], 1).float()


def summarize(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss and accuracy over all scored tokens, from the sums of every row."""
    loss, right, scored = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    of = scored or math.nan  # of nothing there is no mean
    return {"loss": loss / of, "accuracy": right / of, "masked_tokens": int(scored)}


def _numpy_state_types() -> list[Any]:
    state = np.zeros(1, dtype=np.uint32)
    return [type(state.dtype), np.dtype, np.ndarray, state.__reduce__()[0]]
