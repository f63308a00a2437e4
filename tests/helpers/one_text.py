"""One text of nine tokens, and the question that tests ask of it: which outputs does one of its tokens move?"""

import torch

IDS = torch.arange(5, 14)[None]
ONES = torch.ones_like(IDS)
PADDED = ONES.clone()
PADDED[0, 7:] = 0
CAUSAL, BOTH = "000000001", "111111111"  # what the last token moves, as `moves` writes it
ONE_SINK, TWO_SINKS = "011111111", "001111111"


def output(model, ids=IDS, **kwargs):
    """The first output of a model, (batch, length, width)."""
    with torch.no_grad():
        return model(input_ids=ids, **kwargs)[0]


def moved_by(model, at, ids=IDS, **kwargs):
    """bool (length,): the positions of a text, (1, length), whose output is another one if the token at `at` is."""
    other = ids.clone()
    other[0, at] = 40
    return (output(model, ids, **kwargs).float() - output(model, other, **kwargs).float()).abs().amax(-1)[0] > 1e-7


def moved_by_last(model, ids=IDS, **kwargs):
    """The same for the last token."""
    return moved_by(model, -1, ids, **kwargs)


def moves(model, at=-1, ids=IDS, **kwargs):
    """The same with a digit per position, 1 where the output moves."""
    return "".join(str(int(moved)) for moved in moved_by(model, at, ids, **kwargs))


def moves_real(model, **kwargs):
    """Which real positions of a padded row the last real token moves."""
    return moves(model, at=6, attention_mask=PADDED, **kwargs)[:7]


def reaches_back(model):
    """Whether the output at the first position depends on the last token of a text of four."""
    first, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    model.eval()
    return not torch.equal(output(model, first)[0, 0], output(model, other)[0, 0])
