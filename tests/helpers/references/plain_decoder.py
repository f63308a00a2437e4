"""Llama, Mistral, Gemma and Qwen2 in plain torch, with every mask written out pair by pair.

It takes nothing from transformers but the weights' names, so it is a yardstick for all of its versions and backends.
"""

import functools

import torch
import torch.nn.functional as F


def reach(real, position_ids=None, window=None, causal=False, sinks=0, sees_sinks=True, chunk=None):
    """Who may look at whom: bool (batch, query, key).

    `real` is (batch, seq), True for tokens and False for padding. With `position_ids`, a document starts at each real
    token whose position doesn't follow from the one before it. The first `sinks` tokens of a document look at none after
    themselves, and the other tokens at them only if `sees_sinks`. A chunk is counted from the document's first token on.
    """
    position_ids = None if position_ids is None else _rows(position_ids)
    return _reach(_rows(real), position_ids, window, causal, sinks, sees_sinks, chunk).clone()


def _rows(tensor):
    return tuple(map(tuple, tensor.tolist()))


@functools.cache  # each backend is asked the same
def _reach(real, position_ids, window, causal, sinks, sees_sinks, chunk):
    batch, seq = len(real), len(real[0])
    allowed = torch.zeros(batch, seq, seq, dtype=torch.bool)
    for b in range(batch):
        document, before = -1, None
        documents, sink, chunks = [], [], []
        for i in range(seq):
            position = i if position_ids is None else position_ids[b][i]
            if real[b][i]:
                if before is None or (position_ids is not None and position != before + 1):
                    document, first, count = document + 1, i, 0
                before, count = position, count + 1
            documents.append(document if real[b][i] else None)
            sink.append(bool(real[b][i]) and count <= sinks)
            chunks.append((i - first) // chunk if chunk and real[b][i] else None)
        for q in range(seq):
            for k in range(seq):
                same = documents[q] is not None and documents[q] == documents[k]
                near = (window is None or abs(q - k) < window) and chunks[q] == chunks[k]
                ahead = k > q and (causal or sink[q])
                unseen = sink[k] and not sink[q] and not sees_sinks
                allowed[b, q, k] = same and near and not ahead and not unseen
    return allowed


def hidden_states(model, input_ids, allowed, position_ids=None, theta=10000.0):
    """The last hidden states, (batch, seq, hidden), of a stock model's weights under these masks.

    `allowed` is bool (batch, query, key), or a list of them, one a layer; a row that may look at nothing means nothing.
    `theta` is the base of the rotary embedding.
    """
    config = model.config
    weights = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    gemma = config.model_type == "gemma"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    batch, seq = input_ids.shape
    if position_ids is None:
        position_ids = torch.arange(seq).expand(batch, seq)
    masks = allowed if isinstance(allowed, list) else [allowed] * config.num_hidden_layers

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        scale = weights[f"{name}.weight"]
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * (scale + 1 if gemma else scale)

    frequencies = theta ** (-torch.arange(0, dim, 2) / dim)
    angles = position_ids[:, None, :, None] * frequencies  # (batch, 1, seq, dim / 2)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    def split(x, n):
        return x.view(batch, seq, n, dim).transpose(1, 2)

    x = F.embedding(input_ids, weights["embed_tokens.weight"])
    if gemma:
        x = x * config.hidden_size**0.5
    activation = (lambda g: F.gelu(g, approximate="tanh")) if gemma else F.silu
    for i, mask in enumerate(masks):
        layer = f"layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        q = rotate(split(linear(y, f"{layer}.self_attn.q_proj"), heads))
        k = rotate(split(linear(y, f"{layer}.self_attn.k_proj"), kv_heads)).repeat_interleave(heads // kv_heads, dim=1)
        v = split(linear(y, f"{layer}.self_attn.v_proj"), kv_heads).repeat_interleave(heads // kv_heads, dim=1)
        scores = (q @ k.transpose(2, 3) / dim**0.5).masked_fill(~mask[:, None], torch.finfo(x.dtype).min)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq, heads * dim)
        x = x + linear(y, f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        y = activation(linear(y, f"{layer}.mlp.gate_proj")) * linear(y, f"{layer}.mlp.up_proj")
        x = x + linear(y, f"{layer}.mlp.down_proj")
    return norm(x, "norm")


def next_token_loss(model, hidden, labels):
    """The stock loss: position i is predicted from i - 1, the mean over labels that aren't -100."""
    weights = model.state_dict()
    head = weights.get("lm_head.weight", weights.get("model.embed_tokens.weight"))
    logits = F.linear(hidden, head)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1), ignore_index=-100)
