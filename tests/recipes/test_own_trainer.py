"""The recipe for a Trainer of one's own, of bidirect_patch/README.md.

Evaluation scores the same tokens each time, and counts them right.
"""

import pytest
import torch
import torch.nn.functional as F

from bidirect_patch import MNTPCollator, apply_mntp_head, enable_bidirectional, is_bidirectional, mntp_metrics

from ..helpers.heads import trainer_arguments
from ..helpers.tiny_models import tiny_model
from ..helpers.words import make_tokenizer, texts

pytest.importorskip("accelerate")

TOKENIZER = make_tokenizer(pad_token="</s>")
EVALUATION = MNTPCollator(TOKENIZER, seed=0, repeatable=True)
TEXTS, HELD_OUT = texts(*[12] * 16), texts(5, 9, 3, 14, 7, 11, seed=1)


def fixed_masks(trainer_class):
    """The subclass of the recipe."""

    class FixedMasks(trainer_class):
        def get_eval_dataloader(self, *args, **kwargs):
            training, self.data_collator = self.data_collator, EVALUATION
            try:
                return super().get_eval_dataloader(*args, **kwargs)
            finally:
                self.data_collator = training

    return FixedMasks


@torch.no_grad()
def counted(model):
    """Text by text, by a loop over the tokens: accuracy, mean loss, tokens. The masks are those of each text alone."""
    model.eval()
    hits, losses = [], []
    for text in HELD_OUT:
        batch = EVALUATION([text])
        logits = model(input_ids=batch["input_ids"]).logits[0]
        for i, label in enumerate(batch["labels"][0]):
            if label != -100:
                hits.append(int(logits[i - 1].argmax() == label))
                losses.append(F.cross_entropy(logits[i - 1], label).item())
    return sum(hits) / len(hits), sum(losses) / len(losses), len(hits)


def small():
    return tiny_model(vocab_size=len(TOKENIZER), tie_word_embeddings=True)


def check(trainer, exact_loss):
    """Equal before and after anything random happened; after training, still what a loop over the tokens counts."""
    first = trainer.evaluate()
    torch.rand(5)
    again = trainer.evaluate()
    assert again["eval_loss"] == first["eval_loss"] and again["eval_accuracy"] == first["eval_accuracy"]
    trainer.train()
    trained = trainer.evaluate()
    accuracy, loss, count = counted(trainer.model)
    assert trained["eval_masked_tokens"] == count > 5
    assert trained["eval_accuracy"] == pytest.approx(accuracy)
    assert trained["eval_loss"] != first["eval_loss"]
    if exact_loss:
        assert trained["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert is_bidirectional(trainer.model)


@pytest.mark.parametrize("head", [True, False], ids=["head", "stock"])
def test_trainer(tmp_path, head):
    """As run_clm and run_mlm evaluate: the predicted ids are gathered, and `compute_metrics` counts them."""
    from transformers import Trainer

    if head:
        model, how = apply_mntp_head(small(), eval_logits="scores"), {}
    else:
        model, how = enable_bidirectional(small()), {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    trainer = fixed_masks(Trainer)(
        model=model,
        args=trainer_arguments(tmp_path, max_steps=4, per_device_eval_batch_size=4),
        train_dataset=TEXTS,
        eval_dataset=HELD_OUT,
        data_collator=MNTPCollator(TOKENIZER),
        compute_metrics=mntp_metrics,
        **how,
    )
    check(trainer, exact_loss=head)
    masks = [next(iter(trainer.get_train_dataloader()))["labels"] for _ in range(2)]
    assert masks[0].shape != masks[1].shape or not torch.equal(*masks), "training draws new masks"


def test_trl_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="trl isn't installed")
    datasets = pytest.importorskip("datasets")
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=4,
        learning_rate=0.01,
        per_device_eval_batch_size=4,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = fixed_masks(trl.SFTTrainer)(
        model=enable_bidirectional(small()),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(TEXTS),
        eval_dataset=datasets.Dataset.from_list(HELD_OUT),
        processing_class=TOKENIZER,
        data_collator=MNTPCollator(TOKENIZER),
        compute_metrics=mntp_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    check(trainer, exact_loss=False)
    assert trainer.evaluate()["eval_mean_token_accuracy"] >= 0
