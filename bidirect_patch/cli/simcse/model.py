"""Loads the encoder that simcse trains: its adapter, pooling and dropout."""

from typing import Any

import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig

from ...checkpoints.guard import opening_sinks
from ...checkpoints.loading import without_peft_warning
from ...checkpoints.marks import saved_sinks, sinks_on_disk
from ...encoder.without_sinks import WithoutSinks
from ...errors import ConfigError
from ...model.config import parts
from ...model.sinks import NO_SINKS, Sinks
from ...patch import disable_bidirectional, enable_bidirectional
from ..layers import check_layers, keep_layers, number_of_layers
from ..load_errors import loading
from ..lora import check_depth, with_lora
from ..settings_by_release import DTYPE_ARGUMENT, plain_gguf_weights, remove_gguf_mark
from ..sink_settings import check_sinkless, choose_sinks
from ..sink_token import token_before, with_sink_token
from .end_token import append_end_token
from .prompt_tokens import with_countable_prompts
from .saved_encoder import POOLING
from .settings import DROPOUT, DROPOUTS, EncoderArguments, PoolingMode

# What sentence-transformers' Transformer reads: texts as they are.
PLAIN_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class PlainCard(SentenceTransformerModelCardData):
    """A model card without a widget, whose texts would be encoded with a progress bar of their own before training."""

    def set_widget_examples(self, dataset: Any) -> None:
        """Choose no texts."""


def load_encoder(settings: EncoderArguments, prompts: dict[str, str]) -> tuple[Any, int]:
    """Load the model as a SentenceTransformer, with a new LoRA adapter.

    The adapter of the step before is merged into the model first. The model is bidirectional unless the settings say
    otherwise.

    Args:
        settings: What is loaded and how.
        prompts: The prompts by name, which the model keeps and leaves out of pooling.

    Returns:
        The model, which cuts texts for training, and how many tokens of a text it is to read once it is trained.

    Raises:
        BackendError: The attention backend is not installed.
        ConfigError: There is no such model or adapter, or it cannot have these settings.
        UnsupportedModelError: The model cannot be made bidirectional.
    """
    pooling_mode = settings.pooling_mode or "mean"
    what = " under ".join(p for p in (settings.peft_model_name_or_path, settings.model_name_or_path) if p)
    with loading(what), opening_sinks():
        module = _load_module(settings)
        model = module.model
        if settings.chat_template and "message" not in module.modality_config:
            raise ConfigError("chat_template is given, and the tokenizer has none")
        if settings.layers is not None:
            keep_layers(model, settings.layers)
        sinks = _choose_sinks(settings, model)
        enable_bidirectional(model, **sinks._asdict())  # an adapter that was trained on such a model is loaded onto one
        if settings.peft_model_name_or_path:
            check_depth(model, settings.peft_model_name_or_path)
            with without_peft_warning():
                model = PeftModel.from_pretrained(model, settings.peft_model_name_or_path).merge_and_unload()
    if not settings.bidirectional:
        disable_bidirectional(model)
    module.model = model = with_lora(model.requires_grad_(True), settings)  # PEFT froze what it was put on
    _fit_tokenizer(module, settings, prompts, sinks.num_sink_tokens, pooling_mode)
    pooling = Pooling(model.config.hidden_size, pooling_mode=POOLING[pooling_mode], include_prompt=not prompts)
    limit = _limit(module, settings)
    longest = max(settings.matryoshka_dims or [0])
    if longest > model.config.hidden_size:
        raise ConfigError(f"matryoshka_dims must be at most {model.config.hidden_size}, the model's; got {longest}")
    if settings.max_seq_length is not None:
        module.max_seq_length = min(settings.max_seq_length, module.max_seq_length)  # a model has no more positions
    _check_room(module, prompts, sinks.num_sink_tokens, "max_seq_length", module.max_seq_length)
    _check_room(module, prompts, sinks.num_sink_tokens, "encode_max_seq_length", limit)
    left_out = [WithoutSinks(sinks.num_sink_tokens)] if sinks.num_sink_tokens else []
    return SentenceTransformer(modules=[module, *left_out, pooling], prompts=prompts, model_card_data=PlainCard()), limit


def check_views_differ(model: Any, text: str) -> None:
    """Encode a text twice in training mode.

    Raises:
        ConfigError: Both encodings are equal, so that there is nothing to learn from.
    """
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


def _load_module(settings: EncoderArguments) -> Any:
    gguf: dict[str, Any] = {"gguf_file": settings.gguf_file} if settings.gguf_file else {}
    own = AutoConfig.from_pretrained(settings.model_name_or_path, **gguf)
    config = dict.fromkeys([name for name in DROPOUTS if hasattr(own, name)] or DROPOUTS[:1], settings.simcse_dropout)
    if not settings.bidirectional:
        config["is_causal"] = True  # whatever the checkpoint says
    # By itself, sentence-transformers takes a chat template wherever the tokenizer has one. The folder keeps this setting.
    plain = {} if settings.chat_template else {"modality_config": PLAIN_TEXT, "module_output_name": "token_embeddings"}
    if settings.layers is not None:
        check_layers(own, settings.layers)
    weights = {DTYPE_ARGUMENT: settings.torch_dtype, "attn_implementation": settings.attn_implementation}
    module = Transformer(
        settings.model_name_or_path,
        model_kwargs=weights | gguf | plain_gguf_weights(settings.gguf_file),
        config_kwargs=config | gguf,
        processor_kwargs=gguf,
        **plain,
    )
    if settings.gguf_file:
        remove_gguf_mark(module.model)
    return module


def _fit_tokenizer(
    module: Any, settings: EncoderArguments, prompts: dict[str, str], num_sink_tokens: int, pooling_mode: PoolingMode
) -> None:
    """Let the tokenizer put what is asked for around each text, and pad where the pooling can do with it, in place."""
    if prompts:
        module.processor = with_countable_prompts(module.tokenizer, prompts.values())
    if module.tokenizer.pad_token is None:
        module.tokenizer.pad_token = module.tokenizer.eos_token
    if not settings.chat_template:  # which begins with tokens of its own
        adapters = [settings.peft_model_name_or_path] if settings.peft_model_name_or_path else []
        asked = settings.sink_token or token_before(module.tokenizer, adapters)
        module.processor, _ = with_sink_token(module.tokenizer, asked, num_sink_tokens)
    if pooling_mode == "eos_token":
        module.processor = append_end_token(module.tokenizer)
    if pooling_mode == "weighted_mean":  # sentence-transformers before 6 counts the padding on the left too
        module.tokenizer.padding_side = module.tokenizer.init_kwargs["padding_side"] = "right"


def _choose_sinks(settings: EncoderArguments, model: Any) -> Sinks:
    """Those of the settings, else those that the model or its adapter was saved with; none for a causal model."""
    if not settings.bidirectional:
        for part in parts(model.config):
            for name in Sinks._fields:  # which a model that had some says of itself
                vars(part).pop(name, None)
        return NO_SINKS
    adapter = settings.peft_model_name_or_path
    sinks = choose_sinks(settings, saved_sinks(model), sinks_on_disk(adapter) if adapter else NO_SINKS)
    check_sinkless(sinks.num_sinkless_layers, number_of_layers(model.config))
    return sinks


def _limit(module: Any, settings: EncoderArguments) -> int:
    own: int = module.max_seq_length  # the tokenizer's limit or the model's, whichever is lower
    wanted = settings.encode_max_seq_length
    if wanted is not None and wanted > own:
        raise ConfigError(f"encode_max_seq_length must be at most {own}, the model's own limit; got {wanted}")
    return wanted or own


def _check_room(module: Any, prompts: dict[str, str], num_sink_tokens: int, setting: str, limit: int) -> None:
    """Raise ConfigError if sink tokens or a prompt leave no token for a text, of which so many are read."""
    if limit <= num_sink_tokens:
        raise ConfigError(f"{setting} must be above num_sink_tokens={num_sink_tokens}; got {limit}")
    for name, prompt in prompts.items():
        length = len(module.tokenizer(prompt)["input_ids"])
        if length >= limit:
            raise ConfigError(
                f"the instruction of {name} has {length} tokens, and {setting}={limit} leaves none for the text"
            )
