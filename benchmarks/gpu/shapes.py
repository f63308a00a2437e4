"""Random weights at the sizes of real models, and the ways in which an MNTP step of them is run."""

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.gpu.progress import Run
from benchmarks.gpu.stand_ins import backend_there
from benchmarks.gpu.timing import Step, Way, synchronized_clock
from benchmarks.head import Setting, make_batch, make_model
from benchmarks.measure import matmul_rate

SMALL = Setting(
    vocab=49_152, hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, batch=32, length=512, tied=True
)
ONE = Setting(
    vocab=128_256, hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, batch=16, length=512, tied=True
)
EIGHT = Setting(vocab=128_256, hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, batch=4, length=512)
SIZES = {"SmolLM2-135M": SMALL, "Llama-3.2-1B": ONE, "Llama-3.1-8B": EIGHT}
TINY = dict(vocab=500, hidden=32, intermediate=48, layers=1, heads=4, kv_heads=2, batch=2, length=12)
RANK = 16  # of the LoRA adapters, LLM2Vec's


def sized(setting: Setting, dry: bool) -> Setting:
    """The setting itself, or a tiny one for a dry run."""
    return replace(setting, **TINY) if dry else setting


@contextlib.contextmanager
def new_tensors(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """New tensors are on the device, and new floating point ones of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def make(setting: Setting, device: torch.device) -> nn.Module:
    """A bfloat16 Llama with random weights in training mode; with LoRA adapters in float32 where the setting says so."""
    with new_tensors(device):
        model = make_model(setting)
    if setting.lora:
        from peft import LoraConfig, get_peft_model

        get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))  # in place
    return model


def masked_batch(setting: Setting, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, all real, on the device; those that are scored are hidden by token 3."""
    batch = make_batch(setting)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["labels"] != -100, 3)
    return on(device, batch)


def on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch there."""
    return {name: x.to(device) for name, x in batch.items()}


def clean(device: torch.device) -> None:
    """Give back a card's memory of models that are gone."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def card_rate(run: Run) -> float:
    """FLOPs a second of a square bfloat16 matmul on the device."""
    with new_tensors(run.device, torch.float32):
        return matmul_rate(64 if run.dry else 8192, torch.bfloat16, synchronized_clock(run.device))


@contextlib.contextmanager
def attention_of(model: Any, backend: str, dry: bool) -> Iterator[None]:
    """`model` is bidirectional on this backend while the block lasts."""
    from bidirect_patch import disable_bidirectional, enable_bidirectional

    with backend_there(backend, dry):
        model.set_attn_implementation(backend)
        enable_bidirectional(model)
        try:
            yield
        finally:
            disable_bidirectional(model)
            model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def loss_of(model: Any, loss: str) -> Iterator[None]:
    """The causal language model's loss is computed so: "stock", "Liger", "ours", or "ours, Liger" with Liger's kernel."""
    from bidirect_patch import apply_mntp_head
    from bidirect_patch.head import remove_mntp_head
    from bidirect_patch.mntp import loss as linear_loss

    with contextlib.ExitStack() as stack:
        if loss == "Liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            others = dict.fromkeys(("rope", "swiglu", "rms_norm", "cross_entropy"), False)
            stack.callback(vars(model).pop, "forward", None)
            apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True, **others)
        elif loss.startswith("ours"):
            if loss == "ours":
                stack.enter_context(mock.patch.object(linear_loss, "_liger", lambda: None))
            elif linear_loss._liger() is None:
                raise ModuleNotFoundError("liger_kernel")
            apply_mntp_head(model)
            stack.callback(remove_mntp_head, model)
        yield


def ways(model: Any, batches: Mapping[str, tuple[str, str, dict[str, torch.Tensor]]], dry: bool) -> dict[str, Way]:
    """Forward and backward of an MNTP step.

    Args:
        model: Of `make`.
        batches: By the name of the way: the attention backend, the loss as in `loss_of`, and the inputs on the device.
        dry: Whether this is a dry run.
    """
    return {name: partial(_way, model, *how, dry) for name, how in batches.items()}


@contextlib.contextmanager
def _way(model: Any, backend: str, loss: str, inputs: dict[str, torch.Tensor], dry: bool) -> Iterator[Step]:
    has_gradients = not (dry and backend == "flex_attention")  # not on a CPU

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(has_gradients):
            found = model(**inputs).loss
            if has_gradients:
                found.backward()

    with attention_of(model, backend, dry), loss_of(model, loss):
        try:
            yield step
        finally:
            model.zero_grad(set_to_none=True)
