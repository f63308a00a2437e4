"""transformers' Trainer for masked next token prediction."""

import os
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import EvalPrediction

from ...mntp.collator import MNTPCollator
from ...verify.mode import sinks_in
from ..checkpoints import check_same_sinks, check_same_weights, resuming
from ..lora import WHOLE_MODULES
from ..output_folder import writing
from ..trainer import RunTrainer
from .epochs import CountingSampler
from .evaluation import masked_token_sums, summarize
from .model import adapter_of
from .saving import save_bidirectional
from .sentence_pairs import SentencePairs
from .settings import SPEARMAN


class MNTPTrainer(RunTrainer):
    """A Trainer that evaluates the mean over all masked tokens, resumes exactly, and saves bidirectional models.

    Args:
        tokenizer: Is saved with the model.
        sink_token: The token that it puts before each text because it was asked to, or None.
        eval_collator: Makes the batches of an evaluation.
        sentence_pairs: The encoder's own quality is evaluated on them, next to the masked tokens.
        **kwargs: The other arguments of RunTrainer and Trainer. `data_collator` makes the batches of training.
    """

    data_collator: Any

    def __init__(
        self,
        *,
        tokenizer: Any,
        eval_collator: MNTPCollator,
        sentence_pairs: SentencePairs | None = None,
        sink_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(compute_metrics=self._summarize, **kwargs)
        self.label_names = ["labels"]
        self._counting: CountingSampler | None = None
        self.text_tokenizer = tokenizer
        self.sink_token = sink_token
        self.eval_collator = eval_collator
        self.sentence_pairs = sentence_pairs

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

    def get_train_dataloader(self) -> Any:
        """Return the dataloader of training, whose sampler is told each pass."""
        loader = super().get_train_dataloader()
        batches = getattr(loader, "batch_sampler", None)
        if self._counting is not None and batches is not None and not hasattr(batches, "sampler"):
            # accelerate looks for it here, and splits batches among processes by a class that lacks it.
            batches.sampler = self._counting
        return loader

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return which weights decay: not the rows of an embedding that are kept as they are."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if WHOLE_MODULES not in name]

    def _summarize(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = summarize(prediction)
        if self.sentence_pairs is not None:
            backbone = self.accelerator.unwrap_model(self.model).base_model
            with self.compute_loss_context_manager():
                found = self.sentence_pairs.spearman(self.model, backbone, self.args.eval_batch_size)
            metrics[SPEARMAN] = found
        return metrics

    # The methods below replace private methods of Trainer.

    def _get_train_sampler(self, *args: Any) -> Any:
        order = super()._get_train_sampler(*args)
        if order is not None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self._counting = order = CountingSampler(order, seed)
        return order

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # newer releases call this in every process
            return
        folder = output_dir or self.args.output_dir
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
            save_bidirectional(self.accelerator.unwrap_model(self.model), folder, self.text_tokenizer, state_dict)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapter = adapter_of(self.accelerator.unwrap_model(model or self.model))
        with resuming(resume_from_checkpoint):
            check_same_sinks(resume_from_checkpoint, sinks_in(self.accelerator.unwrap_model(model or self.model)))
            if adapter is None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            saved = load_peft_weights(resume_from_checkpoint, device="cpu")
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # whose weights are parts of the model's
                check_same_weights(get_peft_model_state_dict(adapter, save_embedding_layers=False), saved)
            set_peft_model_state_dict(adapter, saved)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        own = self.model.state_dict()
        loaded = {tensor.data_ptr() for name, tensor in own.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if own[name].data_ptr() not in loaded]  # not a tied weight
        check_same_weights(dict.fromkeys(missing, own[missing[0]]) if missing else {}, {})
        check_same_weights({}, dict.fromkeys(load_result.unexpected_keys, torch.empty(0)))
