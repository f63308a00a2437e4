"""GritLM's step, a generative and an embedding loss with one backward pass: patched, and of a stock twin under explicit masks.

As a script, it is what each of two ranks does for tests/recipes/test_two_losses.py: rank 0 writes the gradients that DDP leaves.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from bidirect_patch import bidirectional, enable_bidirectional

from .explicit_masks import padded_masks, under
from .tiny_models import tiny_model

KINDS = [(checkpoints, sinks) for checkpoints in (False, True) for sinks in ((0, 0), (1, 1))]
WAYS = ["one forward", "two forwards"]  # of what DDP wraps: the module with both losses, or the model itself


def padded(lengths, side, seed):
    """Random texts, (texts, longest), padded with 0 on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths):
        where = slice(0, length) if side == "right" else slice(len(row) - length, None)
        row[where] = torch.randint(3, 61, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


BATCH = {
    "text": padded([9, 6, 7, 9], "right", 0),
    "query": padded([5, 4, 5, 3], "left", 1),
    "passage": padded([6, 8, 5, 8], "left", 2),
}


def half(rank):
    """What one of two ranks gets of the batch."""
    return {name: {key: value[2 * rank : 2 * rank + 2] for key, value in each.items()} for name, each in BATCH.items()}


def labels(texts):
    return texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)


def embed(hidden, texts, sinks):
    """The mean over the real tokens that are no sinks."""
    rank = texts["attention_mask"].cumsum(1)
    weights = (texts["attention_mask"] * (rank > sinks[0]))[..., None]
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def contrastive(queries, passages):
    scores = queries @ passages.T / 0.1
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def embedding_loss(run, batch, sinks):
    """Of a model's last hidden states, as `run` gives them for texts."""
    return contrastive(*(embed(run(batch[name]), batch[name], sinks) for name in ("query", "passage")))


def generative_loss(model, texts):
    with bidirectional(model, enabled=False):
        return model(**texts, labels=labels(texts), use_cache=False).loss


class TwoLosses(nn.Module):
    """A bidirectional model, and both losses of a batch."""

    def __init__(self, model, sinks):
        super().__init__()
        self.model, self.sinks = model, sinks

    def forward(self, batch):
        run = lambda texts: self.model.model(**texts, use_cache=False)[0]  # noqa: E731
        return generative_loss(self.model, batch["text"]) + embedding_loss(run, batch, self.sinks)


def patched(checkpoints, sinks):
    model = tiny_model().train()
    if checkpoints:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    return enable_bidirectional(model, num_sink_tokens=sinks[0], num_sinkless_layers=sinks[1])


def step(checkpoints, sinks, batch, wrap=lambda module: module, way=WAYS[0]):
    """The gradients of both losses of a patched model."""
    model = patched(checkpoints, sinks)
    if way == "one forward":
        wrapped = wrap(TwoLosses(model, sinks))  # kept, since DDP reduces no gradients once its wrapper is gone
        wrapped(batch).backward()
    else:
        wrapped = wrap(model)
        run = lambda texts: wrapped(**texts, use_cache=False, output_hidden_states=True).hidden_states[-1]  # noqa: E731
        (generative_loss(wrapped, batch["text"]) + embedding_loss(run, batch, sinks)).backward()
    return gradients(model)


def expected(sinks, batch, generative="causal", embedding="bidirectional"):
    """The gradients of a stock twin, whose layers are told who sees whom."""
    model = tiny_model().train()
    layers = model.model.layers

    def masks(texts, direction):
        causal = direction == "causal"
        masks = padded_masks(texts["attention_mask"], len(layers), *((0, 0) if causal else sinks))
        return [mask.tril() for mask in masks] if causal else masks

    def run(texts):
        with under(layers, masks(texts, embedding)):
            return model.model(**texts, use_cache=False)[0]

    text = batch["text"]
    with under(layers, masks(text, generative)):
        loss = model(**text, labels=labels(text), use_cache=False).loss
    (loss + embedding_loss(run, batch, sinks)).backward()
    return gradients(model)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def main(folder):
    dist.init_process_group("gloo")
    batch = half(dist.get_rank())
    found = [step(*kind, batch, nn.parallel.DistributedDataParallel, way) for way in WAYS for kind in KINDS]
    if dist.get_rank() == 0:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    os._exit(0)  # gloo's threads abort or hang once in some ten times when a process group is destroyed


if __name__ == "__main__":
    main(sys.argv[1])
