"""A stock model whose layers are told, one by one, which token sees which. It needs eager attention."""

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


@contextlib.contextmanager
def under(layers, masks):
    """A block in which each of `layers` gets its mask, whatever mask the model makes."""

    def put(seen):
        added = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": added})

    hooks = [layer.register_forward_pre_hook(put(seen), with_kwargs=True) for layer, seen in zip(layers, masks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
