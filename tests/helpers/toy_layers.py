"""Layers that mix positions by a given matrix, so that what depends on what is known by construction."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

LENGTH = 7
FULL = torch.ones(LENGTH, LENGTH)


def band(backward, forward):
    """[q, k] is 1 where -backward <= k - q <= forward."""
    return FULL.tril(forward).triu(-backward)


class Mix(nn.Module):
    """Positions mixed by a given (length, length) matrix [q, k], within each document, padding left out."""

    def __init__(self, weights, sees_padding=False, mixes_documents=False):
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.register_buffer("weights", weights.clone())
        self.sees_padding, self.mixes_documents = sees_padding, mixes_documents

    def forward(self, states, mask=None, documents=1):
        rows = states.reshape(-1, LENGTH, states.shape[-1])  # a document a row
        weights = self.weights[None]
        if mask is not None and not self.sees_padding:
            weights = weights * mask[:, None, :]
        mixed = weights @ self.linear(rows)
        if self.mixes_documents and documents > 1:
            mixed = mixed + mixed.roll(1, 0)
        return mixed.reshape(states.shape)


class Layer(nn.Module):
    def __init__(self, weights, shape="plain", **settings):
        super().__init__()
        self.mix, self.shape = Mix(weights, **settings), shape

    def forward(self, states, mask=None, documents=1):
        new = states + self.mix(states, mask, documents)
        return (new, "weights") if self.shape == "tuple" else new


class Toy(PreTrainedModel):
    """A decoder made of the given layers."""

    config_class = PretrainedConfig

    def __init__(self, *layers, carry=None):
        super().__init__(PretrainedConfig())
        self.embed = nn.Embedding(50, 8)
        self.stack = nn.ModuleList(layers)
        self.carry = carry

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        documents = 1 if position_ids is None else int((position_ids == 0).sum())
        states = self.embed(input_ids)
        for layer in self.stack:
            states = self.call(layer, states, None if attention_mask is None else attention_mask.float(), documents)
        return states

    def call(self, layer, states, mask, documents):
        if self.carry == "keyword":
            return layer(states=states, mask=mask, documents=documents)
        out = layer(states, mask, documents)
        return out[0] if isinstance(out, tuple) else out


def toy(*patterns, carry=None, **settings):
    torch.manual_seed(0)
    return Toy(*(Layer(p, **settings) for p in patterns), carry=carry).eval()
