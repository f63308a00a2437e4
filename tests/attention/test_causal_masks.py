"""A ready mask that makes a bidirectional model causal is followed, and said."""

import warnings

import pytest
import torch
import transformers
from packaging.version import Version

from bidirect_patch import bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.attention.causal_masks import causal_share, warn_if_causal
from bidirect_patch.errors import AttentionMaskError, CausalMaskWarning

from ..helpers.one_text import BOTH, CAUSAL, IDS, moves
from ..helpers.tiny_models import SIZES, llama
from ..helpers.versions import TRANSFORMERS

N = IDS.shape[1]
LOWER = torch.ones(N, N).tril().bool()[None, None]


def additive(visible):
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("mask", [LOWER, additive(LOWER)], ids=["bool", "additive"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_causal_mask_is_followed_and_said_once(backend, mask):
    model = enable_bidirectional(llama(backend=backend))
    with pytest.warns(CausalMaskWarning, match="no token sees a later one"):
        assert moves(model, attention_mask=mask) == CAUSAL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moves(model, attention_mask=mask)


def test_a_causal_mask_after_an_open_one_is_said_too():
    model = enable_bidirectional(llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moves(model, attention_mask=torch.ones(1, 1, N, N).bool()) == BOTH
    with pytest.warns(CausalMaskWarning, match="no token sees a later one"):
        assert moves(model, attention_mask=LOWER) == CAUSAL


@pytest.mark.parametrize(
    "visible",
    [
        torch.ones(1, 1, N, N).bool(),
        torch.eye(N).bool()[None, None],  # nobody sees another
        torch.ones(N, N).triu().bool()[None, None],
        LOWER | (torch.arange(N) < 4),  # a prefix that all see
    ],
    ids=["full", "alone", "upper", "prefix"],
)
def test_other_masks_are_followed_without_a_word(visible):
    model = enable_bidirectional(llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = moves(model, attention_mask=visible)
        assert moved[-1] == "1" and (moved == BOTH) == bool(visible[..., -1].all())
        with bidirectional(model, enabled=False):
            moves(model, attention_mask=LOWER)


needs_gemma3 = pytest.mark.skipif(
    not hasattr(transformers, "Gemma3Config"), reason="Gemma 3 came with transformers 4.50"
)


def gemma3():
    """A tiny Gemma 3 with its image encoder, and the text model inside it, whose mask the model around it makes."""
    text = transformers.Gemma3TextConfig(**SIZES, sliding_window=4).to_dict()
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    outer = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    return outer, next(m for name, m in outer.named_modules() if name.endswith("language_model"))


@needs_gemma3
def test_an_inner_model_whose_mask_is_made_outside():
    outer, inner = gemma3()
    enable_bidirectional(inner)
    assert not is_bidirectional(outer)
    with pytest.warns(CausalMaskWarning, match="enable_bidirectional on that model"):
        assert moves(outer) == CAUSAL
    enable_bidirectional(outer)
    assert is_bidirectional(outer) and moves(outer)[-6:] == BOTH[:6]


@needs_gemma3
def test_a_mask_that_is_given_to_the_inner_model_itself_is_checked():
    """The model around it makes and checks the mask only where it is the one that is called."""
    outer, inner = gemma3()
    enable_bidirectional(outer)
    with pytest.raises(AttentionMaskError, match="int64"):
        inner(input_ids=IDS, attention_mask=LOWER.long())
    with pytest.warns(CausalMaskWarning):
        assert moves(inner, attention_mask=LOWER) == CAUSAL
    assert moves(inner, attention_mask=torch.ones_like(LOWER)) == BOTH


@needs_gemma3
@pytest.mark.skipif(TRANSFORMERS < Version("4.53"), reason="Gemma 3 opens an image's tokens in another way before 4.53")
def test_an_outer_mask_that_opens_an_image_alone_is_said():
    """The tokens of the image see each other; the text around them is causal."""
    outer, inner = gemma3()
    enable_bidirectional(inner)
    kinds = torch.zeros_like(IDS)
    kinds[:, 3:6] = 1
    with pytest.warns(CausalMaskWarning, match="of the tokens see no later one"):
        moved = moves(outer, token_type_ids=kinds)
    assert moved == CAUSAL
    with warnings.catch_warnings():
        warnings.simplefilter("error", CausalMaskWarning)
        moves(enable_bidirectional(outer), token_type_ids=kinds)


def test_only_the_kinds_of_layers_that_are_causal_are_named():
    seen = {"full_attention": torch.ones_like(LOWER), "sliding_attention": LOWER}
    with pytest.warns(CausalMaskWarning, match="in its layers of sliding_attention, so that these are causal"):
        warn_if_causal(torch.nn.Linear(1, 1), seen)


@pytest.mark.parametrize("number", [1, 2])
def test_sink_tokens_are_not_taken_for_a_causal_text(number):
    sinks = torch.ones(N, N).bool()
    sinks[:number] = LOWER[0, 0, :number]
    assert causal_share(sinks[None, None]) == 0 and causal_share(LOWER) == 1
