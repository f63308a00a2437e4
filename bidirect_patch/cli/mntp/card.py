"""The model card of a model or adapter that was trained for masked next token prediction."""

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
from .settings import Settings
from .trainer import MNTPTrainer


def write_mntp_card(settings: Settings, trainer: MNTPTrainer, model: Any, report: Report) -> None:
    """Write the card to the folder of the run."""
    settings_of_model, data, mntp, training = settings
    name = str(settings_of_model.model_name_or_path)
    shares = " to ".join(f"{share:g}" for share in mntp.mlm_probability)
    write_card(
        trainer,
        report,
        title=f"{public_name(name)}, trained for masked next token prediction",
        base=name,
        facts={
            "attention": attention_in_words(model, trainer.sink_token),
            "layers": layers_in_words(settings_of_model.layers),
            "trained": adapter_in_words(settings_of_model.lora_r, "all weights"),
            "training data": files_in_words(data.dataset_name or data.train_file),
            "masking": f"a share of {shares} of the tokens",
            "training": steps_in_words(trainer),
            "pooling": "none: this is the step before contrastive training (`bidirect-patch simcse`)",
        },
        use=_use(settings, model, public_name(name), public_name(str(training.output_dir))),
        library_name="peft" if settings_of_model.lora_r else "transformers",
        pipeline_tag="feature-extraction",
    )


def _use(settings: Settings, model: Any, base: str, folder: str) -> str:
    if not settings.model.lora_r:
        return f'import bidirect_patch.auto\nfrom transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{folder}")'
    sinks = sinks_in(model)
    numbers = "" if sinks == NO_SINKS else f", {sinks.in_words}"
    gguf = f', gguf_file="{settings.model.gguf_file}"' if settings.model.gguf_file else ""
    cut = f"  # its first {settings.model.layers} layers alone" if settings.model.layers else ""
    return (
        "from peft import PeftModel\nfrom transformers import AutoModel\nfrom bidirect_patch import enable_bidirectional\n\n"
        f'model = enable_bidirectional(AutoModel.from_pretrained("{base}"{gguf}){numbers}){cut}\n'
        f'model = PeftModel.from_pretrained(model, "{folder}")'
    )
