"""One training step, for the tests of engines that run on several ranks."""

import torch

LEARNING_RATE = 1e-2
IDS = torch.arange(5, 37).view(4, 8)
MASK = torch.ones_like(IDS)
MASK[0, 6:] = MASK[2, 6:] = 0
LABELS = torch.full_like(IDS, -100)
LABELS[:, 2] = IDS[:, 2]  # each row scores as much, so that the mean of the ranks' means is the mean
LABELS[:, 4] = IDS[:, 4]
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def gradients(model):
    """By name, whole where they are sharded."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in found.items()}


def loss_and_gradients(model, wrapped, batch):
    loss = wrapped(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)
