"""Checks of examples, tokens and disk space before the first step. `settings` checks the settings."""

from itertools import islice
from typing import Any

from ...checkpoints.marks import read_json
from ...errors import ConfigError
from ..output_folder import check_space
from .data import Examples

SAMPLE = 1000  # texts that are looked at


def check_batches(examples: Examples, training: Any) -> None:
    """Check that there is a step to take, and that a batch has negatives.

    Raises:
        ConfigError: No batch can be filled, or a batch has one positive and nothing else.
    """
    sets = list(examples.data.values()) if isinstance(examples.data, dict) else [examples.data]
    size = training.train_batch_size
    longest = max(map(len, sets))
    if training.dataloader_drop_last and longest < size * training.world_size:
        raise ConfigError(
            f"dataloader_drop_last leaves nothing to train on: a batch takes {size * training.world_size} examples of a "
            f"file, and there are at most {longest}"
        )
    has_negatives = "negative" in sets[0].column_names
    if not has_negatives and min(size * training.world_size, longest) == 1:
        what = "the file holds" if longest == 1 else "per_device_train_batch_size is"
        raise ConfigError(f"{what} 1: an example alone has no negatives to be told from; give 2 or more, or triplets")


def check_no_adapter(name: str | None) -> None:
    """Raise ConfigError if what is to be the model is an adapter: newer releases of transformers would put it on its base."""
    if name and read_json(name, "adapter_config.json", {}):
        raise ConfigError(f"{name} is an adapter: give its base as model_name_or_path, and this as peft_model_name_or_path")


def check_single(examples: Examples, path: str) -> None:
    """Check that a teacher has single texts to embed.

    Raises:
        ConfigError: They are pairs or triplets.
    """
    if not examples.single:
        raise ConfigError(
            f"{path} holds pairs or triplets, and a teacher embeds single texts: give a file with one text a line, or no teacher"
        )


def check_known_tokens(tokenizer: Any, examples: Examples) -> None:
    """Check that the tokenizer knows a token at least.

    Raises:
        ConfigError: All texts are the unknown token.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    sets = examples.data.values() if isinstance(examples.data, dict) else [examples.data]
    for data in sets:
        texts = [text for row in islice(data, SAMPLE) for text in row.values()]
        if any(set(ids) - {unknown} for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]):
            return
    raise ConfigError(f"every token of the texts is {tokenizer.unk_token}, which the tokenizer has for what it doesn't know")


def check_space_for(training: Any, model: Any) -> None:
    """Check that the encoder, and a checkpoint where one is asked for, fit on the disk.

    Raises:
        ConfigError: There is less space.
    """
    strategy = getattr(training.save_strategy, "value", training.save_strategy)
    encoder = [weight for name, weight in model.named_parameters() if "lora_" not in name]
    check_space(str(training.output_dir), encoder, copies=1)
    if strategy != "no":
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        # The optimizer keeps two numbers for each that is trained.
        check_space(str(training.output_dir), trained, copies=1 if training.save_only_model else 3)
