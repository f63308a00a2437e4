"""The model card of a trained word-level model."""

from typing import Any

from ..model_card import (
    adapter_in_words,
    attention_in_words,
    files_in_words,
    layers_in_words,
    public_name,
    steps_in_words,
    write_card,
)
from ..run_report import Report
from .saving import is_whole
from .settings import Settings
from .trainer import WordsTrainer


def write_words_card(settings: Settings, trainer: WordsTrainer, report: Report) -> None:
    """Write the card to the folder of the run."""
    model, task, training = settings
    reading, folder = trainer.tagger.reading, public_name(str(training.output_dir))
    train: Any = trainer.train_dataset
    name = str(model.model_name_or_path)
    write_card(
        trainer,
        report,
        title=f"A word-level model over {public_name(name)}",
        base=name,
        facts={
            "attention": attention_in_words(trainer.tagger.model, trainer.sink_token),
            "layers": layers_in_words(model.layers),
            "adapter of the step before": f"`{public_name(a)}`" if (a := model.peft_model_name_or_path) else None,
            "trained": adapter_in_words(model.lora_r, "a linear layer on frozen states") + f" ({reading.in_words})",
            "training data": files_in_words(task.dataset_name or task.train_file, count=len(train), kind="sentences"),
            "training": steps_in_words(trainer),
            "labels": ", ".join(f"`{label}`" for label in trainer.labels),
        },
        use=_use(folder) if is_whole(reading) else _use_of_classifier(name, folder),
        library_name="transformers",
        pipeline_tag="token-classification",
    )


def _use(folder: str) -> str:
    return (
        "import bidirect_patch.auto\nfrom transformers import pipeline\n\n"
        f'tagger = pipeline("token-classification", "{folder}", aggregation_strategy="first")\nprint(tagger("A cat sat down ."))'
    )


def _use_of_classifier(name: str, folder: str) -> str:
    return (
        "# The classifier alone. On the command line, with the flags that the run printed at its end:\n"
        f"# bidirect-patch words --model_name_or_path {public_name(name)} --cls_addr {folder} \\\n"
        "#   --test_file FILE --output_dir TESTED"
    )
