"""The parts of the demo, one after another."""

import argparse
import tempfile
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ...patch import bidirectional, disable_bidirectional, enable_bidirectional
from ...verify.report import AttentionReport, attention_report
from ..mntp.collator import RepeatableCollator
from ..mntp.data import Split, tokenize
from ..mntp.model import add_adapter, check_model, load_model, load_tokenizer
from ..mntp.settings import DataArguments, MNTPTrainingArguments, ModelArguments
from ..mntp.trainer import MNTPTrainer
from ..output_folder import make_output_dir
from .progress import ProgressBar
from .texts import SHIPPED, held_out_and_training_topics

LENGTH, BATCH, EVALUATED = 128, 8, 80  # tokens per sequence, sequences per step, sequences to evaluate on


class Materials(NamedTuple):
    """What the parts of the demo have in common."""

    source: ModelArguments
    tokenizer: Any
    training: MNTPTrainingArguments
    sequences: dict[Split, Any]
    train_collator: RepeatableCollator
    eval_collator: RepeatableCollator
    folder: str

    def trainer(self, model: PreTrainedModel) -> MNTPTrainer:
        """Make a trainer of a model, with the demo's own progress bar."""
        trainer = MNTPTrainer(
            model=model,
            args=self.training,
            train_dataset=self.sequences["train"],
            eval_dataset=self.sequences["validation"],
            data_collator=self.train_collator,
            eval_collator=self.eval_collator,
            tokenizer=self.tokenizer,
            stop_after_n_steps=self.training.max_steps,
        )
        for kind in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(kind)
        trainer.add_callback(ProgressBar())
        return trainer


def show(options: argparse.Namespace) -> int:
    """Show every part.

    Args:
        options: The flags of the command.

    Returns:
        0 if the saved model opens again as it was, else 1.
    """
    materials, model = _prepare(options)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{materials.source.model_name_or_path}: {type(model).__name__}, {size:.1f} million parameters")
    _show_attention(model)
    loss = _train(model, materials)
    same = _reopen(materials, loss)
    print("It is what was saved." if same else "That isn't what was saved.")
    return 0 if same else 1


def _prepare(options: argparse.Namespace) -> tuple[Materials, PreTrainedModel]:
    validation, train = held_out_and_training_topics()
    texts: dict[Split, list[str]] = {"validation": validation, "train": train}
    source = ModelArguments(model_name_or_path=options.model or str(SHIPPED), gguf_file=options.gguf_file, lora_r=16)
    if not options.model:
        torch.set_num_threads(1)  # so small a model gains little from more, and on a busy machine waits for them
    tokenizer = load_tokenizer(source)
    how = {"mlm_probability": 0.2, "seed": options.seed, "num_sink_tokens": check_model(source).sinks.num_sink_tokens}
    collator, eval_collator = (RepeatableCollator(tokenizer, **how) for _ in range(2))
    model = load_model(source)
    folder = _make_folder(options.output_dir)
    training = _training_arguments(options, folder)
    # The name of the file is only what errors call the text.
    data = DataArguments(train_file=["pydoc_data.topics"], max_seq_length=LENGTH, max_eval_samples=EVALUATED)
    sequences = {
        split: tokenize(Dataset.from_dict({"text": texts[split]}), split, tokenizer, data, training) for split in texts
    }
    return Materials(source, tokenizer, training, sequences, collator, eval_collator, folder), model


def _make_folder(path: str | None) -> str:
    if path is None:
        return tempfile.mkdtemp(prefix="bidirect-patch-demo-")
    make_output_dir(path)
    return path


def _training_arguments(options: argparse.Namespace, folder: str) -> MNTPTrainingArguments:
    return MNTPTrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        seed=options.seed,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
    )


def _show_attention(model: PreTrainedModel) -> None:
    print("\n1. Which positions does each layer use? Its input is changed at one position")
    print("   after another.\n")
    before = attention_report(disable_bidirectional(model))
    after = attention_report(enable_bidirectional(model))
    print(_side_by_side(before, after))


def _side_by_side(before: AttentionReport, after: AttentionReport) -> str:
    """Make a line for each layer: what it used, and what it uses. -n is n positions back, +n is n positions ahead."""
    rows = [("layer", "as it was loaded", "after enable_bidirectional")]
    for old, new in zip(before.layers, after.layers):
        was, now = (f"{layer.verdict:14}-{layer.backward} .. +{layer.forward}" for layer in (old, new))
        rows.append((old.name, was, now))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _train(model: PreTrainedModel, materials: Materials) -> float:
    """Train and save the model. Returns the loss after training."""
    steps = materials.training.max_steps
    print(f"\n2. Masked next token prediction, {steps} steps of {BATCH} x {LENGTH} tokens of Python's")
    print("   own documentation. Loss (nats) and accuracy are those of masked tokens in")
    print("   chapters held out.\n")
    set_seed(materials.training.seed)  # the weights of a new adapter are random
    add_adapter(model, materials.source)
    trainer = materials.trainer(model)
    print(f"{'':32}{'loss':>8}{'accuracy':>10}")
    with bidirectional(model, enabled=False):
        _evaluate(trainer, "causal, as it was loaded")
    _evaluate(trainer, "bidirectional, untrained")
    trainer.train()
    loss = _evaluate(trainer, f"bidirectional, after {steps} steps")
    trainer.save_model()
    return loss


def _evaluate(trainer: MNTPTrainer, label: str) -> float:
    metrics = trainer.evaluate()
    print(f"{label:32}{metrics['eval_loss']:8.3f}{metrics['eval_accuracy']:10.1%}", flush=True)
    return metrics["eval_loss"]


def _reopen(materials: Materials, loss: float) -> bool:
    """Open what was saved. Returns whether it is bidirectional and has the same loss."""
    print(f"\n3. Saved to {materials.folder}, and opened again.\n")
    model = load_model(materials.source)
    setattr(model, model.base_model_prefix, PeftModel.from_pretrained(model.base_model, materials.folder))
    reopened = _evaluate(materials.trainer(model), "bidirectional, opened again")
    report = attention_report(model)
    print(report.summary)
    return report.is_bidirectional and abs(reopened - loss) < 1e-3
