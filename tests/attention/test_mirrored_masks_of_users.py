"""A mask of the user's own on models whose own mask code is mirrored: followed, or refused; and their traces."""

import pytest
import torch
import transformers
from packaging.version import Version

from bidirect_patch import enable_bidirectional
from bidirect_patch.errors import AttentionMaskError

from ..helpers.one_text import IDS, ONES, PADDED, moves
from ..helpers.versions import TRANSFORMERS

APART = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
APART[..., :4, :4] = APART[..., 4:, 4:] = True
ONE_WAY = APART.clone()
ONE_WAY[..., 4:, :4] = True


def falcon():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return transformers.FalconModel(transformers.FalconConfig(**sizes)).eval()


def opt():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    return transformers.OPTModel(transformers.OPTConfig(**sizes, max_position_embeddings=64)).eval()


def added(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [lambda mask: mask, added], ids=["bool", "added"])
def test_a_mask_that_mirroring_would_change_is_refused(form):
    model = enable_bidirectional(falcon())
    with pytest.raises(AttentionMaskError, match="see each other or neither"):
        model(IDS, attention_mask=form(ONE_WAY))
    if TRANSFORMERS < Version("4.42"):  # it would take none, and say nothing
        with pytest.raises(AttentionMaskError):
            model(IDS, attention_mask=form(APART))
    else:
        assert moves(model, attention_mask=form(APART)) == "000011111"


def test_numbers_that_mirroring_would_lose_are_refused():
    with pytest.raises(AttentionMaskError, match="with 0 added"):
        enable_bidirectional(falcon())(IDS, attention_mask=added(APART) + 0.5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # it compares shapes, which a trace keeps
def test_a_trace_of_a_mirrored_mask():
    model = opt().requires_grad_(False)

    def run(ids, mask):
        return model(input_ids=ids, attention_mask=mask, return_dict=False)[0]

    try:
        torch.jit.trace(run, (IDS, ONES), check_trace=False)
    except Exception as error:  # whatever the tracer raises
        pytest.skip(f"stock OPT can't be traced here: {str(error)[:80]!r}")
    enable_bidirectional(model)
    traced = torch.jit.trace(run, (IDS, ONES), check_trace=False)
    torch.testing.assert_close(traced(IDS, PADDED)[:, :7], run(IDS, PADDED)[:, :7], rtol=1e-5, atol=1e-5)
