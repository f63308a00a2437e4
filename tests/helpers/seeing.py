"""Which tokens of a model see which, found by changing one token at a time."""

import torch
import torch.utils.checkpoint

CLOSE = dict(atol=1e-5, rtol=1e-5)
IDS = torch.tensor([[5, 17, 33, 8, 41, 26, 12, 9], [7, 22, 14, 50, 3, 0, 0, 0]])
MASK = (IDS != 0).long()


def hidden(model, input_ids=IDS, attention_mask=None, **kwargs):
    """Last hidden states, (batch, seq, hidden), of a bare model or a *ForCausalLM, however it is wrapped."""
    out = model(input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs)
    return out.hidden_states[-1]


def reached(model, ids=IDS[:1], position_ids=None):
    """bool (query, key): whether changing the token at `key` moves what comes out at `query`."""
    seq = ids.shape[1]
    rows = ids.repeat(1 + seq, 1)
    rows[torch.arange(seq) + 1, torch.arange(seq)] = 60
    positions = {} if position_ids is None else {"position_ids": position_ids.expand(1 + seq, -1)}
    with torch.no_grad():
        out = hidden(model, rows, **positions)
    return ((out[1:] - out[0]).abs().amax(-1) > 1e-6).T


def sees_all(model):
    return bool(reached(model).all())


def sees_only_the_past(model):
    return torch.equal(reached(model), torch.ones(8, 8, dtype=torch.bool).tril())
