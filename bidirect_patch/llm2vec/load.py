"""`load_llm2vec`: what LLM2Vec made or would load, as a SentenceTransformer with LLM2Vec's embeddings."""

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..checkpoints.loading import loading, without_peft_warning
from ..checkpoints.marks import HUB_OPTIONS, read_json
from ..errors import ConfigError, extra_needed, warn_user
from ..patch import enable_bidirectional
from .encoder_settings import EncoderSettings, read_settings
from .reading import KNOWN_NAMES, TextFormat, check_tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_HUB = (*HUB_OPTIONS, "local_files_only", "trust_remote_code")  # of model_kwargs, what the config and the tokenizer need too
# Arguments of LLM2Vec.from_pretrained that mean nothing here, and why.
_OF_LLM2VEC = {
    "merge_peft": "the adapter is always merged: leave it out",
    "enable_bidirectional": "the model is always bidirectional: leave it out; disable_bidirectional(encoder) makes it causal",
}

_QWEN2 = (
    "LLM2Vec 0.2.3 leaves Qwen2 causal on eager and SDPA, and makes it bidirectional on FlashAttention alone; this encoder is "
    "bidirectional. For weights that LLM2Vec trained on eager or SDPA, call disable_bidirectional(encoder)"
)


class _Source(NamedTuple):
    """Where the parts of an encoder are."""

    tokenizer: str  # the folder or hub name that was given
    model: str  # the weights under every adapter
    adapters: list[str]  # in the order in which they are merged
    model_name: str  # by which LLM2Vec knows the model, or ""


def load_llm2vec(
    base: "str | os.PathLike[str]",
    peft: "str | os.PathLike[str] | None" = None,
    *,
    pooling_mode: str | None = None,
    max_length: int | None = None,
    doc_max_length: int | None = None,
    skip_instruction: bool | None = None,
    **model_kwargs: Any,
) -> "SentenceTransformer":
    """Load what LLM2Vec made, or a base and an adapter as LLM2Vec would, with LLM2Vec's embeddings.

    `encode(texts)` gives what `LLM2Vec.encode(texts)` gives, and `encode(texts, prompt=instruction)` what it gives for pairs of
    this instruction and a text; such pairs may be given here too. Adapters are merged into the model. What is saved keeps its
    embeddings when it is opened again by `SentenceTransformer(folder)`, in a process that has imported this package, or elsewhere
    with `trust_remote_code=True`.

    LLM2Vec 0.2.3 has a fault in Qwen2, which stays causal unless it runs on FlashAttention. Here it is bidirectional, with a
    warning; `disable_bidirectional(encoder)` gives LLM2Vec's embeddings on the other backends.

    Some results of LLM2Vec depend on what else is in the batch, or have no meaning, and differ here. The mean of an empty text is
    that of its instruction and beginning token, or zeros if there are none; LLM2Vec's takes padding in. So does its mean where a
    text has more tokens alone than its row has. A text with two beginning tokens is pooled by the first.

    Args:
        base: Folder or hub name of the base model and its tokenizer, of a full or merged model that LLM2Vec saved, or of an
            adapter that names its base model.
        peft: Folder or hub name of an adapter over `base`.
        pooling_mode: "mean", "weighted_mean", "eos_token", "last_token" or "bos_token". None here and for the next three: what
            llm2vec_config.json in the folder of `peft`, else of `base`, says, else LLM2Vec's default ("mean").
        max_length: Tokens of an instruction and its text together (512).
        doc_max_length: Tokens of a text alone (400).
        skip_instruction: Whether only the text's own tokens are pooled (True). The beginning token is then left out too.
        **model_kwargs: Arguments of `from_pretrained`, such as dtype (float32 if it isn't given), attn_implementation and
            device_map.

    Returns:
        A bidirectional SentenceTransformer of two modules. Its embeddings are float32.

    Raises:
        ConfigError: There is no such model or adapter, or a setting has no meaning. Where that can be known without weights, none
            are loaded.
        BackendError: sentence-transformers 5.4 or newer, or PEFT, isn't installed.
        UnsupportedModelError: The model can't be made bidirectional.

    Example:
        >>> load_llm2vec("my-decoder", max_length=0)
        Traceback (most recent call last):
        ...
        bidirect_patch.errors.ConfigError: max_length must be a number of tokens, 1 or more; got 0
    """
    given = {
        "pooling_mode": pooling_mode,
        "max_length": max_length,
        "doc_max_length": doc_max_length,
        "skip_instruction": skip_instruction,
    }
    for name, why in _OF_LLM2VEC.items():
        if name in model_kwargs:
            raise ConfigError(f"{name}={model_kwargs[name]!r}: {why}")
    base, peft = _name("base", base), None if peft is None else _name("peft", peft)
    settings = read_settings(peft or base, {name: value for name, value in given.items() if value is not None})
    with extra_needed("llm2vec", subject="load_llm2vec"):
        from sentence_transformers import SentenceTransformer

        from .modules import LLM2VecPooling, LLM2VecTransformer
    model, tokenizer, settings = _load_parts(base, peft, settings, model_kwargs)
    text = LLM2VecTransformer(model, tokenizer, **asdict(settings))
    pooling = LLM2VecPooling(text.get_embedding_dimension(), settings.pooling_mode, tokenizer.bos_token_id)
    device = str(model.device) if model_kwargs.get("device_map") else None
    return SentenceTransformer(modules=[text, pooling], device=device)


def _load_parts(
    base: str, peft: str | None, settings: EncoderSettings, model_kwargs: dict[str, Any]
) -> tuple[Any, Any, EncoderSettings]:
    """The bidirectional model with its adapters merged, the tokenizer, and the settings with the model's name."""
    from transformers import AutoConfig, AutoTokenizer

    hub = {name: model_kwargs[name] for name in _HUB if model_kwargs.get(name)}
    source = _find(base, peft, hub)
    name = settings.model_name or source.model_name
    settings = replace(settings, model_name=name if name in KNOWN_NAMES else "")
    with loading(" under ".join(p for p in (peft, base) if p)):
        config = AutoConfig.from_pretrained(source.model, **hub)
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, **hub)
        form = TextFormat.of(settings.model_name, config.model_type, settings.pooling_mode)
        check_tokenizer(tokenizer, form, settings.pooling_mode)
        model = _load_model(source, _without_windows(config), model_kwargs, hub)
    return model, tokenizer, settings


def _load_model(source: _Source, config: Any, model_kwargs: dict[str, Any], hub: dict[str, Any]) -> Any:
    from .decoder import load_decoder

    if config.model_type == "qwen2":
        warn_user(_QWEN2)
    # float32 is the default of LLM2Vec's release of transformers, whatever the checkpoint's own type is
    dtype = None if model_kwargs.get("quantization_config") else torch.float32
    model = load_decoder(source.model, dtype, config=config, **model_kwargs)
    enable_bidirectional(model)
    if source.adapters:
        from peft import PeftModel

        account = {name: hub[name] for name in ("cache_dir", "token") if name in hub}  # the revision is the base's
        for adapter in source.adapters:
            with without_peft_warning():
                model = PeftModel.from_pretrained(model, adapter, **account).merge_and_unload()
            vars(model).pop("peft_config", None)  # older releases of PEFT leave it there
    return model.eval()


def _find(base: str, peft: str | None, hub: dict[str, Any]) -> _Source:
    """Where the parts are. `base` may be an adapter over another base, whatever else its folder holds, as in LLM2Vec.

    Raises:
        ConfigError: There is no model or no adapter.
    """
    config, adapter = (read_json(base, name, hub) for name in ("config.json", "adapter_config.json"))
    if not config and not adapter:
        raise ConfigError(f"base={base}: no folder or hub name with a config.json or an adapter_config.json that can be read")
    under = base
    if adapter:
        under = adapter.get("base_model_name_or_path") or ""
        if not under or not read_json(under, "config.json", hub):
            raise ConfigError(
                f"base={base} is an adapter, and its base model {under!r} can't be read: give the base model as base and the "
                "adapter as peft"
            )
    account = {name: value for name, value in hub.items() if name != "revision"}
    if peft and not read_json(peft, "adapter_config.json", account):
        raise ConfigError(f"peft={peft}: no folder or hub name with an adapter_config.json that can be read")
    named_by = base if config and os.path.isdir(base) else under
    name = read_json(named_by, "config.json", hub).get("_name_or_path") or "" if os.path.isdir(named_by) else named_by
    return _Source(base, under, [*([base] if adapter else []), *([peft] if peft else [])], name)


def _without_windows(config: Any) -> Any:
    """LLM2Vec's Mistral and Qwen2 have no sliding window (on eager and SDPA)."""
    if config.model_type in ("mistral", "qwen2"):
        config.sliding_window = None
        if hasattr(config, "use_sliding_window"):
            config.use_sliding_window = False
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * len(config.layer_types)
    return config


def _name(argument: str, value: Any) -> str:
    try:
        name = os.fspath(value)
    except TypeError:
        name = None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{argument} must be a folder or hub name; got {value!r:.100}")
    return name
