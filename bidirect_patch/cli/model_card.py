"""The model card of what a training command has written: README.md in its folder."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..attention.mixed import holds_open
from ..model.sinks import NO_SINKS
from ..verify.mode import sinks_in
from .output_folder import writing
from .run_report import Report

TAG = "bidirect-patch"


def write_card(
    trainer: Any,
    report: Report,
    *,
    title: str,
    base: str,
    facts: Mapping[str, str | None],
    use: str,
    library_name: str,
    pipeline_tag: str | None,
) -> None:
    """Write the model card of a run to its folder, in the main process, in the place of the one that a library wrote there.

    Args:
        trainer: The trainer of the run.
        report: Its evaluations.
        title: The first line.
        base: Folder or hub name of the model that was trained.
        facts: What the run was, by name. None: not said.
        use: Python code that opens the folder.
        library_name: The library that opens it, for the hub.
        pipeline_tag: What it is for, for the hub.
    """
    if not trainer.is_world_process_zero():
        return
    is_local = os.path.isdir(base)  # of which the hub knows nothing, and whose place is nobody's concern
    data = ModelCardData(
        base_model=None if is_local else base, library_name=library_name, pipeline_tag=pipeline_tag, tags=[TAG]
    )
    said = {"base model": f"`{public_name(base)}`"} | {name: fact for name, fact in facts.items() if fact}
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        _table(("", ""), list(said.items())),
        f"## Use\n\n```python\n{use}\n```",
    ]
    if report.rows:
        columns = [column.title for column in report.columns]
        parts.append("## Evaluation\n\n" + _table(("", *columns), report.rows))
    folder = str(trainer.args.output_dir)
    with writing(folder):
        ModelCard("\n\n".join(parts) + "\n").save(os.path.join(folder, "README.md"))


def attention_in_words(model: Any, sink_token: str | None) -> str:
    """What attends to what in a model, and the token that its tokenizer puts before each text because it was asked to."""
    if not holds_open(model):
        return "causal"
    sinks = sinks_in(model)
    if sinks == NO_SINKS:
        return "bidirectional" + (f"; `{sink_token}` stands before each text" if sink_token else "")
    which = "first token" if sinks.num_sink_tokens == 1 else f"first {sinks.num_sink_tokens} tokens"
    own = f"`{sink_token}`, a sink" if sink_token else "a sink"
    words = f"bidirectional, but for the {which} of each text ({own}), causal as before"
    if sinks.num_sinkless_layers:
        layers = "layer" if sinks.num_sinkless_layers == 1 else f"{sinks.num_sinkless_layers} layers"
        words += f"; in the last {layers} no other token sees it"
    return f"{words} ({', '.join(f'`{name}={number}`' for name, number in sinks._asdict().items())})"


def steps_in_words(trainer: Any) -> str:
    """How long a run was trained, and how."""
    training = trainer.args
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    best = trainer.state.best_model_checkpoint if training.load_best_model_at_end else None
    of_best = f"; the result is the checkpoint of step {str(best).rpartition('-')[2]}" if best else ""
    done = trainer.state.global_step
    return f"{done} step{'s' * (done != 1)} of {batch}, learning rate {training.learning_rate:g}{of_best}"


def layers_in_words(layers: int | None) -> str | None:
    """How many layers were kept, if not all."""
    return None if layers is None else f"the first {layers}"


def adapter_in_words(lora_r: int, otherwise: str) -> str:
    """What was trained."""
    return f"a LoRA adapter of rank {lora_r}" if lora_r else otherwise


def files_in_words(*names: str | Sequence[str] | None, count: int | None = None, kind: str = "texts") -> str:
    """The names of data sets and files, without their folders, and how many examples there are."""
    each = [name for given in names if given for name in ([given] if isinstance(given, str) else given)]
    listed = ", ".join(f"`{public_name(name)}`" for name in each)
    return listed if count is None else f"{listed}: {count:,} {kind}"


def public_name(name: str) -> str:
    """The name of a folder or file without the folders that it is in; a hub name as it is."""
    return os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").strip() for cell in line) + " |" for line in lines)
