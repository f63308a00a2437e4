"""The model card of a trained encoder."""

from typing import Any

from ...model.sinks import NO_SINKS
from ...verify.mode import sinks_in
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
from ..sink_token import first_token
from .settings import Settings
from .trainer import SimCSETrainer


def write_encoder_card(settings: Settings, trainer: SimCSETrainer, report: Report) -> None:
    """Write the card to the folder of the run, whose model is merged by now."""
    encoder, texts, training = settings
    name, model = str(encoder.model_name_or_path), trainer.model
    sinks = sinks_in(model)
    left_out = (
        f", without the {'sink token' if sinks.num_sink_tokens == 1 else 'sink tokens'}" if sinks != NO_SINKS else ""
    )
    prompts = ", ".join(f"`{prompt}`" for prompt, text in model.prompts.items() if text)  # there are empty ones by default
    write_card(
        trainer,
        report,
        title=f"A text encoder from {public_name(name)}",
        base=name,
        facts={
            "attention": attention_in_words(
                model, first_token(model.tokenizer) if left_out or encoder.sink_token else None
            ),
            "layers": layers_in_words(encoder.layers),
            "pooling": f"{encoder.pooling_mode}{left_out}",
            "prompts": prompts or None,
            "adapter of the step before": f"`{public_name(a)}`" if (a := encoder.peft_model_name_or_path) else None,
            "trained": adapter_in_words(encoder.lora_r, "all weights") + (", merged" if encoder.lora_r else ""),
            "training data": _data(texts.dataset_file_path, trainer.train_dataset),
            "training": f"{steps_in_words(trainer)}, {_loss(encoder)}",
            "evaluation": f"cosines on {files_in_words(texts.validation_file)}" if training.do_eval else None,
        },
        use=_use(public_name(str(training.output_dir))),
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
    )


def _loss(encoder: Any) -> str:
    if encoder.teacher:
        return f"towards the embeddings of `{public_name(encoder.teacher)}`"
    return f"contrastive, scale {encoder.loss_scale:g}"


def _data(path: str | None, train: Any) -> str:
    sets = list(train.values()) if isinstance(train, dict) else [train]
    columns, rows = sets[0].column_names, sets[0][:100]
    if "negative" in columns:
        kind = "rows of query, positive and negative"
    elif "positive" not in columns:  # the teacher's embeddings take its place
        kind = "single texts"
    else:
        kind = "single texts, each its own positive" if rows["anchor"] == rows["positive"] else "pairs"
    return files_in_words(path, count=sum(map(len, sets)), kind=kind)


def _use(folder: str) -> str:
    return (
        "import bidirect_patch.auto\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'encoder = SentenceTransformer("{folder}")\nprint(encoder.encode(["A cat sat down."]).shape)'
    )
