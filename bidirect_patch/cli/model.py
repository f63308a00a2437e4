"""The tokenizer and the model to train: loaded, given the MNTP head, given a LoRA adapter."""

import os
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..mntp.collator import MNTPCollator
from ..errors import BackendError, ConfigError, UnsupportedModelError
from ..mntp.head import apply_mntp_head
from ..patch import enable_bidirectional
from ..model.tiny import tiny_like
from . import one_line
from .arguments import DataArguments, MNTPArguments, ModelArguments
from .data import sequence_length

DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def load_tokenizer(model: ModelArguments) -> Any:
    """The tokenizer of the settings. Raises ConfigError if there is none."""
    name = model.tokenizer_name or model.model_name_or_path
    return _loaded(name, AutoTokenizer, model, use_fast=model.use_fast_tokenizer)


def check_model(model: ModelArguments) -> None:
    """Raise what `load_model` would of the model's class or backend, from its config and a small random model alone."""
    config = _loaded(model.model_name_or_path, AutoConfig, model)
    try:
        small = tiny_like(config, model.attn_implementation, model.trust_remote_code)
    except UnsupportedModelError:  # the real one may load all the same, or says more
        return
    apply_mntp_head(enable_bidirectional(small))


def load_model(model: ModelArguments) -> PreTrainedModel:
    """The causal model of the settings, bidirectional and with its MNTP head, its weights as they were.

    Raises:
        BackendError: the attention backend isn't installed.
        ConfigError: there is no such model.
        UnsupportedModelError: it can't be made bidirectional.
    """
    loaded = _loaded(
        model.model_name_or_path,
        AutoModelForCausalLM,
        model,
        **{DTYPE: getattr(torch, model.torch_dtype, model.torch_dtype)},  # "auto" stays a word
        attn_implementation=model.attn_implementation,
        low_cpu_mem_usage=model.low_cpu_mem_usage,
        **_unpacked(model),
    )
    if model.gguf_file and getattr(loaded, "hf_quantizer", None):
        # The weights are plain now; left marked as quantized, they could neither be trained nor saved.
        loaded.hf_quantizer.remove_quantization_config(loaded)
    return apply_mntp_head(loaded, eval_logits="scores")


def add_adapter(model: PreTrainedModel, settings: ModelArguments) -> None:
    """Put LoRA on every linear layer of the backbone, in place; lora_r 0 leaves all weights to train.

    The adapter goes on the backbone, not on the model with its head, as in LLM2Vec: an encoder has no head. The head is
    frozen too: what is saved is all that was trained.
    """
    if settings.lora_r:
        model.requires_grad_(False)
        lora = LoraConfig(
            r=settings.lora_r,
            lora_alpha=2 * settings.lora_r,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear",
        )
        setattr(model, model.base_model_prefix, get_peft_model(model.base_model, lora))


def adapter_of(model: PreTrainedModel) -> PeftModel | None:
    """The backbone with its adapter, if it has one."""
    return model.base_model if isinstance(model.base_model, PeftModel) else None


def collator(
    tokenizer: Any, data: DataArguments, mntp: MNTPArguments, kind: type[MNTPCollator], *, padding_free: bool, seed: int
) -> MNTPCollator:
    """A collator of `kind` as the settings describe it. Raises MaskTokenError if the mask token isn't one id."""
    mask_token = mntp.mask_token
    if mask_token is None and tokenizer.mask_token is None:
        mask_token = {"blank": "_", "eos": tokenizer.eos_token, "mask": "<mask>"}[mntp.mask_token_type]
    always = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0}
    shares: dict[str, Any] = always if mntp.data_collator_type == "all_mask" else {}
    return kind(
        tokenizer,
        mlm_probability=mntp.mlm_probability,
        mask_token=mask_token,
        pad_to_multiple_of=sequence_length(tokenizer, data) if data.pad_to_max_length else None,
        padding_free=padding_free,
        seed=seed,
        **shares,
    )


def _unpacked(model: ModelArguments) -> dict[str, Any]:
    """From transformers 5.17 on a GGUF's weights stay packed unless told otherwise; packed ones can't be trained."""
    kind = getattr(transformers, "GgufConfig", None)
    if kind is None or not model.gguf_file:
        return {}
    return {"quantization_config": kind(gguf_file=model.gguf_file, dequantize=True)}


def _loaded(name: str | None, kind: Any, model: ModelArguments, **how: Any) -> Any:
    how |= {"cache_dir": model.cache_dir, "revision": model.model_revision, "token": model.token}
    how |= {"trust_remote_code": model.trust_remote_code}
    if model.gguf_file:
        how["gguf_file"] = model.gguf_file
    if name and os.path.isabs(name) and not os.path.isdir(name):
        raise ConfigError(f"can't load {name!r}: there is no such folder")
    try:
        return kind.from_pretrained(name, **how)
    except ImportError as error:
        raise BackendError(one_line(error)) from error
    except Exception as error:  # what a missing or broken checkpoint raises depends on which part of it is
        raise ConfigError(f"can't load {name!r}: {one_line(error)}") from error
