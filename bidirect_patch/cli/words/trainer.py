"""transformers' Trainer for word-level tasks."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import EvalPrediction

from ..checkpoints import resuming
from ..output_folder import writing
from ..trainer import RunTrainer
from .evaluation import summarize
from .model import Below
from .saving import is_whole, load_classifier, save_arguments, save_classifier, save_model
from .tagger import WordTagger


class WordsTrainer(RunTrainer):
    """A Trainer that evaluates words, resumes exactly, and saves checkpoints of what is trained and nothing else.

    Args:
        model: The tagger.
        labels: The labels that it tells apart.
        tokenizer: Is saved with the model.
        below: What the classifier is trained over.
        sink_token: The token that it puts before each sentence because it was asked to, or None.
        **kwargs: The other arguments of RunTrainer and Trainer.
    """

    def __init__(
        self,
        *,
        model: WordTagger,
        labels: Sequence[str],
        tokenizer: Any,
        below: Below,
        sink_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, compute_metrics=self._summarize, **kwargs)
        self.label_names = ["labels"]
        self.labels = labels
        self.text_tokenizer = tokenizer
        self.sink_token = sink_token
        self.below = below
        self.tagger = model  # which accelerate may wrap

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate one batch.

        Returns:
            No loss, since the Trainer would average one over batches, and a word of a short batch would weigh more. The numbers
            of the predicted labels and the losses, each (sentences, words). The numbers of the right labels.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        return None, (outputs["logits"].argmax(-1), outputs["losses"].float()), inputs["labels"]

    def _summarize(self, prediction: EvalPrediction) -> dict[str, float]:
        return summarize(prediction, self.labels)

    # The methods below replace private methods of Trainer.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # newer releases of transformers call this in every process
            return
        folder = str(output_dir or self.args.output_dir)
        is_result = os.path.abspath(folder) == os.path.abspath(str(self.args.output_dir))
        with writing(folder):
            if is_result and is_whole(self.tagger.reading):
                save_model(self.tagger, folder)
            else:
                save_classifier(self.tagger, folder, self.below)
            self.text_tokenizer.save_pretrained(folder)
            save_arguments(self.args, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with resuming(resume_from_checkpoint):
            load_classifier(self.tagger, resume_from_checkpoint)
