"""`bidirect-patch demo`: the whole way on a small model, with no network.

A causal Llama that comes with the package is shown to be causal, made bidirectional, shown to be that, trained for
masked next token prediction on Python's own documentation, saved, and opened again.
"""

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from ..errors import BackendError, ConfigError
from ..patch import bidirectional, disable_bidirectional, enable_bidirectional
from ..verify.report import AttentionReport, attention_report
from . import Parser

SHIPPED = Path(__file__).parents[1] / "demo_model"
HELD_OUT = ("calls", "comparisons", "execmodel", "import", "naming")  # topics to evaluate on, a tenth of all text
LENGTH, BATCH, EVALUATED = 128, 8, 80  # tokens a sequence, sequences a step, sequences to evaluate on


def run(argv: list[str]) -> int:
    """Show it all; 0 if the saved model opens again as it was, 1 if not.

    Bad input (a flag, a folder, a model that can't be loaded or patched) raises a BidirectPatchError.
    """
    options = _parser().parse_args(argv)
    if options.gguf_file and not options.model:
        raise ConfigError("--gguf-file names a file in a model's folder; give the folder with --model")
    try:
        import accelerate  # noqa: F401  (transformers' Trainer needs it)
        import datasets
        import peft  # noqa: F401
    except ImportError as error:
        raise BackendError(f"the demo trains, and needs {error.name}: pip install 'bidirect-patch[train]'") from error
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries on how they call each other
        return _demo(options)


def held_out_and_training_topics() -> tuple[list[str], list[str]]:
    """Python's language reference, which every Python brings for `help()`: texts to evaluate on, texts to train on.

    No paragraph is in both. Raises ConfigError where this Python came without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(f"the demo reads Python's own documentation, and this Python lacks it: {error}") from error
    held_out = [topics[name] for name in HELD_OUT if name in topics]
    secret = {paragraph for text in held_out for paragraph in paragraphs(text)}
    kept = ((part for part in text.split("\n\n") if part.strip() not in secret) for text in topics.values())
    return held_out, [text for text in map("\n\n".join, kept) if text]


def paragraphs(text: str) -> set[str]:
    """The paragraphs of a text, to tell texts apart by; the shortest, such as a lone "Note:", are left out."""
    return {part for part in map(str.strip, text.split("\n\n")) if len(part) > 40}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="bidirect-patch demo",
        description="Make a causal model bidirectional, prove it, train it for masked next token prediction on "
        "Python's own documentation, save it and open it again. Without --model it takes a tiny Llama that comes with "
        "the package, no network, and less than two minutes on two cores.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="another causal model, from the hub or a folder")
    parser.add_argument("--gguf-file", metavar="FILE", help="load this GGUF file of the model's folder")
    parser.add_argument("--steps", type=_whole(1), default=80, help="training steps (default 80)")
    parser.add_argument(
        "--output-dir", metavar="FOLDER", type=_new_folder, help="where to save (default a temporary folder)"
    )
    parser.add_argument("--seed", type=_whole(0), default=0, help="of masks and training (default 0)")
    return parser


def _whole(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return int(text)

    return number


def _new_folder(path: str) -> str:
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise argparse.ArgumentTypeError(f"{path} is there already and isn't an empty folder; give another")
    return path


def _made(path: str | None) -> str:
    if path is None:
        return tempfile.mkdtemp(prefix="bidirect-patch-demo-")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't make the folder {path}: {error.strerror}") from error
    return path


def _demo(options: argparse.Namespace) -> int:
    from datasets import Dataset
    from peft import PeftModel

    from . import arguments, data, model
    from .training import ResumableCollator

    texts = dict(zip(("validation", "train"), held_out_and_training_topics()))
    source = arguments.ModelArguments(
        model_name_or_path=options.model or str(SHIPPED), gguf_file=options.gguf_file, lora_r=16
    )
    if not options.model:
        torch.set_num_threads(1)  # so small a model gains little from more, and on a busy machine waits for them
    tokenizer = model.load_tokenizer(source)
    collators = [ResumableCollator(tokenizer, mlm_probability=0.2, seed=options.seed) for _ in range(2)]
    model.check_model(source)
    decoder = model.load_model(source)
    folder = _made(options.output_dir)
    settings = _training_arguments(options, folder)
    # The file's name is only what errors call the text.
    shape = arguments.DataArguments(train_file="pydoc_data.topics", max_seq_length=LENGTH, max_eval_samples=EVALUATED)
    sequences = {
        split: data.tokenize(Dataset.from_dict({"text": texts[split]}), split, tokenizer, shape, settings)
        for split in texts
    }
    size = sum(p.numel() for p in decoder.parameters()) / 1e6
    print(f"{source.model_name_or_path}: {type(decoder).__name__}, {size:.1f} million parameters")

    print("\n1. Which positions does each layer use? Seen by changing its input at one position after another.\n")
    before = attention_report(disable_bidirectional(decoder))
    after = attention_report(enable_bidirectional(decoder))
    print(_side_by_side(before, after))

    print(f"\n2. Masked next token prediction, {options.steps} steps of {BATCH} x {LENGTH} tokens of Python's own")
    print("   documentation. Loss (nats) and accuracy are those of masked tokens in chapters held out.\n")
    set_seed(options.seed)  # an adapter starts from a draw
    model.add_adapter(decoder, source)
    trainer = _trainer(decoder, tokenizer, settings, sequences, collators)
    print(f"{'':32}{'loss':>8}{'accuracy':>10}")
    with bidirectional(decoder, enabled=False):
        _evaluate(trainer, "causal, as it was loaded")
    _evaluate(trainer, "bidirectional, untrained")
    trainer.train()
    trained = _evaluate(trainer, f"bidirectional, after {options.steps} steps")
    trainer.save_model()

    print(f"\n3. Saved to {folder}, and opened again.\n")
    again = model.load_model(source)
    setattr(again, again.base_model_prefix, PeftModel.from_pretrained(again.base_model, folder))
    reopened = _evaluate(_trainer(again, tokenizer, settings, sequences, collators), "bidirectional, opened again")
    report = attention_report(again)
    print(report.summary)
    same = report.is_bidirectional and abs(reopened - trained) < 1e-3
    print("It is what was saved." if same else "That isn't what was saved.")
    return 0 if same else 1


def _training_arguments(options: argparse.Namespace, folder: str) -> Any:
    from .arguments import MNTPTrainingArguments

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


def _side_by_side(before: AttentionReport, after: AttentionReport) -> str:
    """A line for each layer: what it used, and what it uses; -n is n positions back, +n is n positions ahead."""
    rows = [("layer", "as it was loaded", "after enable_bidirectional")]
    for old, new in zip(before.layers, after.layers):
        was, now = (f"{layer.verdict:14}-{layer.backward} .. +{layer.forward}" for layer in (old, new))
        rows.append((old.name, was, now))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _trainer(decoder: Any, tokenizer: Any, settings: Any, sequences: dict[str, Any], collators: list[Any]) -> Any:
    from .training import MNTPTrainer

    trainer = MNTPTrainer(
        model=decoder,
        args=settings,
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        data_collator=collators[0],
        eval_collator=collators[1],
        tokenizer=tokenizer,
        stop_after_n_steps=settings.max_steps,
    )
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(_Bar())
    return trainer


def _evaluate(trainer: Any, label: str) -> float:
    metrics = trainer.evaluate()
    print(f"{label:32}{metrics['eval_loss']:8.3f}{metrics['eval_accuracy']:10.1%}", flush=True)
    return metrics["eval_loss"]


class _Bar(TrainerCallback):
    """A progress bar for training, with the last step's loss, and for each evaluation; each goes when it is done."""

    bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._move(0, state.max_steps, "training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._move(1, state.max_steps, "training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.2f}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        self._move(1, len(eval_dataloader), "evaluating")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._close()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._close()

    def _move(self, by: int, total: int, what: str) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=what, leave=False, dynamic_ncols=True)
        self.bar.update(by)

    def _close(self) -> None:
        self.bar.close()
        self.bar = None
