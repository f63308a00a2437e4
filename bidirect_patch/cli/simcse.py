"""`bidirect-patch simcse`: LLM2Vec's third step, contrastive training, on sentence-transformers' trainer and loss.

Unsupervised, each text is encoded twice under dropout: its other view is its positive, the rest of the batch its
negatives. Pairs and triplets train the same loss. The names and defaults are those of LLM2Vec's run_simcse.py and
run_supervised.py; the result is a sentence-transformers folder that opens bidirectional.
"""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import BackendError, ConfigError
from . import one_line

POOLING = {"mean": "mean", "weighted_mean": "weightedmean", "eos_token": "lasttoken"}  # by sentence-transformers' names
ROLES = ("query", "anchor", "text", "sentence1", "sentence2", "positive", "negative")
DROPOUT = 0.3


@dataclass
class EncoderArguments:
    """The model, the adapter under it, the adapter to train, the loss."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub name of a model."})
    peft_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Its adapter of the step before (MNTP), merged into it first."}
    )
    bidirectional: bool = field(default=True, metadata={"help": "Train with bidirectional attention."})
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="float32", metadata={"help": "The type that the weights are loaded in."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2 or another."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens of a text that are read."})
    pooling_mode: Literal["mean", "weighted_mean", "eos_token"] = field(
        default="mean", metadata={"help": "How token vectors become one."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA adapter; 0 trains all weights instead."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    simcse_dropout: float | None = field(
        default=None, metadata={"help": f"Dropout of attention while training; {DROPOUT} for single texts, else none."}
    )
    loss_class: Literal["HardNegativeNLLLoss"] = field(
        default="HardNegativeNLLLoss", metadata={"help": "Cross-entropy over cosines with the batch's positives."}
    )
    loss_scale: float = field(default=20.0, metadata={"help": "Factor on the cosines."})
    stop_after_n_steps: int | None = field(default=None, metadata={"help": "Stop here, wherever the schedule is."})
    experiment_id: str | None = field(default=None, metadata={"help": "A label of your own."})


@dataclass
class TextArguments:
    """The texts, pairs or triplets."""

    dataset_name: str | None = field(default=None, metadata={"help": "Wiki1M, E5 or a label of your own."})
    dataset_file_path: str | None = field(
        default=None, metadata={"help": "Lines of text (.txt), .jsonl or .csv of columns, or a folder of such files."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many at most."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where the data's cache is kept."})


def run(argv: list[str]) -> int:
    """Train as `[CONFIG.json] [--name value ...]` says; 0 when done."""
    try:
        import peft  # noqa: F401
        from sentence_transformers import SentenceTransformerTrainingArguments
    except ImportError as error:
        raise BackendError(f"simcse needs {error.name}: pip install 'bidirect-patch[simcse]'") from error
    from .arguments import parse_kinds

    @dataclass
    class SimCSETrainingArguments(SentenceTransformerTrainingArguments):
        output_dir: str | None = field(default=None, metadata={"help": "Where the result is written."})
        overwrite_output_dir: bool = field(default=False, metadata={"help": "Write there though it holds something."})

    kinds = (EncoderArguments, TextArguments, SimCSETrainingArguments)
    (encoder, texts, training), output_dir = parse_kinds(kinds, "simcse", argv)
    _check(encoder, texts, training, output_dir)
    return train(encoder, texts, training)


def train(settings: EncoderArguments, texts: TextArguments, training: Any) -> int:
    """Train with settings as `run` parses them."""
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback, set_seed

    class Trainer(SentenceTransformerTrainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if self.args.should_save:  # newer Trainers call this in every process
                save_merged(self.model, output_dir or self.args.output_dir)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == settings.stop_after_n_steps:
                control.should_training_stop = True

    set_seed(training.seed)
    data, single = load_examples(texts)
    if settings.simcse_dropout is None:
        settings.simcse_dropout = DROPOUT if single else 0.0
    model = load_encoder(settings)
    if single:
        check_views_differ(model, _first(data)["anchor"])
        set_seed(training.seed)
    across = training.world_size > 1  # every rank's texts are negatives, as in LLM2Vec
    try:
        loss = MultipleNegativesRankingLoss(model, scale=settings.loss_scale, gather_across_devices=across)
        trainer = Trainer(model=model, args=training, train_dataset=data, loss=loss, callbacks=[Stop()])
    except (ValueError, TypeError, ImportError) as error:  # contradictory settings, or packages that don't fit
        raise ConfigError(one_line(error)) from error
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError("simcse merges the adapter into what it saves, and can't into shards: run it under DDP instead")
    result = trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    return 0


def load_encoder(settings: EncoderArguments) -> Any:
    """The model as a SentenceTransformer: the adapter before merged, bidirectional, under a new LoRA adapter.

    Raises:
        ConfigError: there is no such model or adapter.
        UnsupportedModelError: it can't be made bidirectional.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    from ..patch import disable_bidirectional, enable_bidirectional

    how = {"torch_dtype": settings.torch_dtype, "attn_implementation": settings.attn_implementation}
    try:
        module = Transformer(
            settings.model_name_or_path,
            model_kwargs=how,
            config_kwargs={
                "attention_dropout": settings.simcse_dropout,
                **({} if settings.bidirectional else {"is_causal": True}),  # whatever the checkpoint says
            },
            max_seq_length=settings.max_seq_length,
        )
        decoder = module.model
        enable_bidirectional(decoder)  # an adapter that was trained so is loaded onto it
        if settings.peft_model_name_or_path:
            decoder = PeftModel.from_pretrained(decoder, settings.peft_model_name_or_path).merge_and_unload()
    except ImportError as error:
        raise BackendError(one_line(error)) from error
    except (OSError, ValueError) as error:
        what = " under ".join(p for p in (settings.peft_model_name_or_path, settings.model_name_or_path) if p)
        raise ConfigError(f"can't load {what}: {one_line(error)}") from error
    if not settings.bidirectional:
        disable_bidirectional(decoder)
    if settings.lora_r:
        lora = LoraConfig(
            r=settings.lora_r,
            lora_alpha=2 * settings.lora_r,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear",
        )
        decoder = get_peft_model(decoder, lora)
    module.model = decoder
    if module.tokenizer.pad_token is None:
        module.tokenizer.pad_token = module.tokenizer.eos_token
    pooling = Pooling(decoder.config.hidden_size, pooling_mode=POOLING[settings.pooling_mode])
    return SentenceTransformer(modules=[module, pooling])


def save_merged(model: Any, folder: str) -> None:
    """Write a SentenceTransformer with its adapter merged, so that the folder is whole without the steps before.

    The live model keeps its adapter: a copy of it is merged. Dropout that was only for training isn't written.
    """
    module = model[0]
    trained = module.model
    if hasattr(trained, "peft_config"):
        module.model = copy.deepcopy(trained).merge_and_unload()
    config = module.model.config
    dropout = getattr(config, "attention_dropout", None)
    if dropout is not None:
        config.attention_dropout = 0.0
    try:
        model.save_pretrained(folder)
    finally:
        if dropout is not None:
            config.attention_dropout = dropout
        module.model = trained


def check_views_differ(model: Any, text: str) -> None:
    """Raise ConfigError if two encodings of `text` in training mode are equal: then there is nothing to learn from."""
    import torch

    training = model.training
    model.train()
    try:
        with torch.no_grad():
            features = model.preprocess([text])
            features = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in features.items()}
            one, two = (model(dict(features))["sentence_embedding"] for _ in range(2))
    finally:
        model.train(training)
    if torch.equal(one, two):
        raise ConfigError(
            "with the dropout given, two encodings of one text are equal, and SimCSE has nothing to tell apart: give "
            f"simcse_dropout above 0 ({DROPOUT} in LLM2Vec), or pairs. If it was given, {type(model[0].model).__name__} "
            "takes no attention_dropout from its config"
        )


def load_examples(texts: TextArguments) -> tuple[Any, bool]:
    """The training examples, by name where there are several files, and whether they are single texts.

    Columns are `anchor`, `positive` and, for triplets, `negative`. A single text is its own positive.

    Raises:
        ConfigError: there is no text in it, or the files hold different kinds.
    """
    from datasets import DatasetDict

    path = Path(texts.dataset_file_path or "")
    files = (
        sorted(f for f in path.iterdir() if f.suffix in (".txt", ".jsonl", ".json", ".csv"))
        if path.is_dir()
        else [path]
    )
    if not files:
        raise ConfigError(f"dataset_file_path {path} holds no .txt, .jsonl or .csv file")
    examples = {file.stem: _examples(file, texts) for file in files}
    singles = {single for _, single in examples.values()}
    if len(singles) > 1:
        raise ConfigError(f"{path} mixes single texts with pairs: train on each by itself")
    sets = {name: data for name, (data, _) in examples.items()}
    return (DatasetDict(sets) if len(sets) > 1 else next(iter(sets.values()))), singles.pop()


def _examples(file: Path, texts: TextArguments) -> tuple[Any, bool]:
    from datasets import load_dataset

    from .data import READERS

    if not file.is_file() or file.suffix[1:] not in READERS:
        raise ConfigError(f"no .txt, .jsonl or .csv file {str(file)!r}: give dataset_file_path")
    try:
        reader = READERS[file.suffix[1:]]
        data = load_dataset(reader, data_files=str(file), split="train", cache_dir=texts.cache_dir)
    except Exception as error:  # dozens of kinds come out of `datasets`; all of them mean this
        raise ConfigError(f"can't read {file}: {one_line(error.__cause__ or error)}") from error
    strings = [
        name for name, kind in data.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    columns = [name for name in ROLES if name in strings] or strings
    if not 1 <= len(columns) <= 3:
        raise ConfigError(f"{file} has {len(columns)} columns of text ({', '.join(columns)}); name 1 to 3 of {ROLES}")
    data = data.select_columns(columns).filter(lambda row: all(row[c] and not row[c].isspace() for c in columns))
    if texts.max_train_samples is not None:
        data = data.select(range(min(texts.max_train_samples, len(data))))
    if not len(data):
        raise ConfigError(f"there is no text in {file}")
    if len(columns) == 1:
        data = data.add_column("positive", data[columns[0]])
        columns = [columns[0], "positive"]
        return data.rename_column(columns[0], "anchor") if columns[0] != "anchor" else data, True
    roles = ("anchor", "positive", "negative")
    return data.map(lambda row: {new: row[old] for new, old in zip(roles, columns)}, remove_columns=columns), False


def _first(data: Any) -> dict[str, str]:
    return (next(iter(data.values())) if isinstance(data, dict) else data)[0]


def _check(encoder: EncoderArguments, texts: TextArguments, training: Any, output_dir: str | None) -> None:
    if not encoder.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: a folder or hub name of a model")
    if not output_dir:
        raise ConfigError("output_dir is missing: a folder for the result")
    if not texts.dataset_file_path:
        raise ConfigError("dataset_file_path is missing: a file of texts, pairs or triplets, or a folder of such files")
    if not training.do_train:
        raise ConfigError("nothing to do: give do_train")
    if training.do_eval:
        raise ConfigError("simcse only trains: take do_eval and eval_strategy out, and evaluate what it writes")
    if training.resume_from_checkpoint:
        raise ConfigError("checkpoints of simcse are merged models, to be opened and not resumed from: start anew")
    if os.path.isdir(output_dir) and os.listdir(output_dir) and not training.overwrite_output_dir:
        raise ConfigError(f"output_dir {output_dir} isn't empty: give overwrite_output_dir, or another folder")
    for name in ("simcse_dropout", "lora_dropout"):
        if not 0 <= (getattr(encoder, name) or 0) < 1:
            raise ConfigError(f"{name} must be in [0, 1); got {getattr(encoder, name)}")
    if encoder.lora_r < 0:
        raise ConfigError(f"lora_r must be 0 or more; got {encoder.lora_r}")
    for name, value in {
        "max_seq_length": encoder.max_seq_length,
        "stop_after_n_steps": encoder.stop_after_n_steps,
    }.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    if encoder.loss_scale <= 0:
        raise ConfigError(f"loss_scale must be above 0; got {encoder.loss_scale}")
