"""The MNTP head and the stock forward of the same model, side by side."""

import copy
import importlib.metadata

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import Trainer, TrainingArguments

from bidirect_patch import apply_mntp_head, enable_bidirectional

from .tiny_models import SIZES
from .versions import TRANSFORMERS

VOCAB, MASK = SIZES["vocab_size"], 2
LOSS_KWARGS = TRANSFORMERS >= Version("4.47")  # forward hands loss arguments on to the loss


def batch(share=0.4, shape=(3, 17), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    scored = torch.rand(shape, generator=generator) < share
    return dict(input_ids=torch.where(scored, MASK, ids), labels=torch.where(scored, ids, -100))


def pair(model, **kwargs):
    """The stock forward of a bidirectional copy of `model`, and `model` with the head."""
    stock = enable_bidirectional(copy.deepcopy(model))
    return stock, apply_mntp_head(model, **kwargs)


def check_step(stock, ours, tolerance=1e-6, **inputs):
    """One training step of each: the same loss, the same gradient as a whole, and close for every parameter."""
    losses = []
    for model in (stock, ours):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    error = norm = 0.0
    for (name, a), b in zip(ours.named_parameters(), stock.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            largest = b.grad.abs().max().clamp(min=1.0)
            assert (a.grad - b.grad).abs().max() <= 5 * tolerance * largest, name
            error, norm = error + (a.grad - b.grad).norm() ** 2, norm + b.grad.norm() ** 2
    assert error**0.5 <= tolerance * norm**0.5
    return losses[1]


def with_routers(output_router_logits=True):
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=4, output_router_logits=output_router_logits, router_aux_loss_coef=0.5
    )
    return transformers.MixtralForCausalLM._from_config(config, attn_implementation="eager").train()


def nothing_scored():
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][:, 0] = 5  # nothing comes before the first token, so it can't be scored
    return inputs


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {k: v[0] for k, v in batch(shape=(1, 17), seed=i).items()}


def trainer_arguments(tmp_path, **kwargs):
    accelerate = Version(importlib.metadata.version("accelerate"))
    if TRANSFORMERS < Version("4.41") and accelerate >= Version("1.0"):
        pytest.skip(f"the Trainer of transformers {TRANSFORMERS} can't be made with accelerate {accelerate}")
    settings = dict(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=0.01,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=True,
    )
    return TrainingArguments(output_dir=str(tmp_path), **settings | kwargs)


def trainer(model, tmp_path, **kwargs):
    metrics = {k: kwargs.pop(k) for k in ("compute_metrics",) if k in kwargs}
    arguments = trainer_arguments(tmp_path, **kwargs)
    return Trainer(model=model, args=arguments, train_dataset=Data(), eval_dataset=Data(), **metrics)
