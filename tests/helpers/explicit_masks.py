"""A stock model whose layers are told, one by one, which token sees which: on eager attention or SDPA, without checkpoints."""

import contextlib

import torch


def sink_masks(length, layers, sinks=1, sinkless=0):
    """For each layer (length, length) bool, [query, key]: the first tokens causal, and unseen by others in the last layers."""
    masks = []
    for layer in range(layers):
        seen = torch.ones(length, length, dtype=torch.bool)
        seen[:sinks] = seen.tril()[:sinks]
        seen[sinks:, :sinks] = layer < layers - sinkless
        masks.append(seen)
    return masks


def padded_masks(attention_mask, layers, sinks=0, sinkless=0):
    """The same for texts with padding, each with its own first tokens: for each layer (batch, length, length) bool.

    Args:
        attention_mask: (batch, length), 1 for real tokens.
    """
    real = attention_mask.bool()
    is_sink = real & (real.cumsum(1) <= sinks)
    itself = torch.eye(real.shape[1], dtype=torch.bool)
    seen = real[:, None, :] & (itself.new_ones(itself.shape).tril() | ~is_sink[:, :, None]) | itself
    without = seen & ~(is_sink[:, None, :] & ~is_sink[:, :, None])
    return [seen if layer < layers - sinkless else without for layer in range(layers)]


@contextlib.contextmanager
def under(layers, masks):
    """A block in which each of `layers` gets its mask, (length, length) or one for each text, whatever mask the model makes."""

    def put(seen):
        seen = seen.view(-1, 1, *seen.shape[-2:])
        added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": added.to(dtype_of(module))})

    def dtype_of(module):
        return next(module.parameters()).dtype

    hooks = [layer.register_forward_pre_hook(put(seen), with_kwargs=True) for layer, seen in zip(layers, masks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
