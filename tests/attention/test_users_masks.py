"""A finished mask of the user's own: which are taken, what each backend gets of it, and which are refused."""

import pytest
import torch
import transformers

from bidirect_patch import enable_bidirectional
from bidirect_patch.attention.ready_mask import is_users_own, pick, users_mask
from bidirect_patch.attention.versions import HAS_MASKING_UTILS, READY_MASKS_ARE_INVERTED
from bidirect_patch.errors import AttentionMaskError

from ..helpers.one_text import IDS, moves, output
from ..helpers.tiny_models import SIZES, llama

BATCH, LENGTH, HEADS = 2, 3, 4
LOWEST = torch.finfo(torch.float32).min
SEEN = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool().expand(BATCH, 1, LENGTH, LENGTH)
ADDED = torch.where(SEEN, 0.0, LOWEST)


def made(mask, spans=1, backend="eager", as_ones=False):
    return users_mask(mask, spans, BATCH, LENGTH, HEADS, backend, torch.float32, as_ones)


def visible(mask):
    """Where a mask in either form lets see."""
    return mask if mask.dtype == torch.bool else mask == 0


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("given", [SEEN, ADDED], ids=["bool", "added"])
def test_it_says_the_same_to_each_backend(given, backend):
    taken = made(given, backend=backend)
    assert torch.equal(visible(taken), SEEN)
    as_bool = given.dtype == torch.bool and backend == "sdpa" and HAS_MASKING_UTILS
    assert taken.dtype == (torch.bool if as_bool else torch.float32)
    assert as_bool or taken.min() == LOWEST


def test_any_numbers_that_are_added_stay():
    bias = torch.linspace(-3, 0, LENGTH).expand(BATCH, HEADS, LENGTH, LENGTH)
    assert torch.equal(made(bias), bias)


@pytest.mark.skipif(READY_MASKS_ARE_INVERTED, reason="there a value above 0 means ones and zeros")
@pytest.mark.parametrize("values", [(0.0, 2.0, 1.0), (0.0, 0.5, 1.0), (-1.0, 0.0, 1.0), (0.0, 0.0, 5.0)], ids=str)
def test_numbers_above_0_are_added_too(values):
    bias = torch.tensor(values).expand(BATCH, 1, LENGTH, LENGTH)
    assert torch.equal(made(bias), bias)


@pytest.mark.parametrize("given", [SEEN, ADDED], ids=["bool", "added"])
def test_a_model_that_inverts_gets_ones_and_zeros(given):
    taken = made(given, as_ones=True)
    assert taken.dtype == torch.float32 and torch.equal(taken, SEEN.float())


@pytest.mark.parametrize("spans", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, HEADS])
def test_each_span_takes_all_of_it(spans, channels):
    """One mask a head too: the heads are not mistaken for spans."""
    bias = -torch.arange(float(BATCH * channels * LENGTH**2)).view(BATCH, channels, LENGTH, LENGTH)
    taken = made(bias, spans)
    assert taken.shape[1] == spans * channels
    for span in range(spans):
        assert torch.equal(pick(taken, span, spans, False), bias)


def test_what_each_span_has_of_a_mask_of_many_channels():
    mask = torch.arange(6.0).view(1, 6, 1, 1)
    assert [pick(mask, span, 3, False).flatten().tolist() for span in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert pick(mask, 0, 1, False) is mask
    assert torch.equal(pick(mask[:, :2], 1, 3, False), mask[:, :2]), "fewer channels than spans: all share them"
    assert torch.equal(pick(mask[:, :2], 1, 2, False), mask[:, 1:2])


def test_a_mask_of_another_form_is_passed_on():
    two = torch.ones(2, 3)
    assert pick(two, 0, 1, True) is two and pick(None, 1, 2, True) is None


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (2, 1, 3, 3), (2, 4, 3, 3), (1, 4, 1, 3), (2, 1, 1, 3)], ids=str)
def test_shapes_that_are_taken(shape):
    assert made(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize(
    "shape", [(3, 1, 3, 3), (2, 2, 3, 3), (2, 1, 2, 3), (2, 1, 3, 1), (2, 1, 3, 4), (2, 1, 4, 3), (0, 1, 3, 3)], ids=str
)
def test_shapes_that_are_refused(shape):
    with pytest.raises(AttentionMaskError, match=r"for input of 2 x 3 tokens: give \(2, 1, 3, 3\)"):
        made(torch.zeros(shape))


def test_an_empty_batch_is_no_error():
    assert users_mask(torch.zeros(0, 1, 3, 3), 1, 0, 3, 4, "eager", torch.float32, False).shape == (0, 1, 3, 3)


def test_weights_on_meta_are_no_error():
    assert made(torch.zeros(2, 1, 3, 3, device="meta")).is_meta


@pytest.mark.parametrize(
    "mask, said",
    [
        (SEEN.long(), "dtype torch.int64: give bool"),
        (ADDED.to(torch.complex64), "dtype torch.complex64: give bool"),
        (torch.full((2, 1, 3, 3), float("nan")), "holds NaN or"),
        (torch.where(SEEN, float("inf"), 0.0), "holds NaN or"),
        (ADDED.to_sparse(), "layout torch.sparse_coo"),
        pytest.param(
            SEEN.float(),
            "holds ones and zeros",
            marks=pytest.mark.skipif(READY_MASKS_ARE_INVERTED, reason="there they are what is taken"),
        ),
    ],
    ids=["integer", "complex", "nan", "inf", "sparse", "ones-and-zeros"],
)
def test_contents_that_are_refused(mask, said):
    with pytest.raises(AttentionMaskError, match=said):
        made(mask)


def test_flash_attention_takes_none():
    with pytest.raises(AttentionMaskError, match="FlashAttention takes no ready 4D"):
        made(ADDED, backend="flash")


class BlockMask:
    """Known by its name: not every release has the class."""


@pytest.mark.parametrize("mask", [{}, {"full_attention": None}, BlockMask(), SEEN], ids=["empty", "dict", "block", "4d"])
def test_what_is_taken_for_a_finished_mask(mask):
    assert is_users_own(mask)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3), torch.ones(2, 3, 3), [[1]], object()], ids=lambda m: type(m).__name__)
def test_what_is_not(mask):
    assert not is_users_own(mask)


def test_a_block_mask_is_for_flex_attention_alone():
    mask = BlockMask()
    assert made(mask, backend="flex") is mask and pick(mask, 1, 2, False) is mask
    with pytest.raises(AttentionMaskError, match="the model runs on sdpa"):
        made(mask, backend="sdpa")


def test_a_dict_has_a_mask_for_each_kind_of_layer():
    taken = made({"full_attention": SEEN, "sliding_attention": ADDED, "none": None})
    assert torch.equal(taken["full_attention"], ADDED) and torch.equal(taken["sliding_attention"], ADDED)
    assert taken["none"] is None and taken.keys() == {"full_attention", "sliding_attention", "none"}
    taken = made({"full_attention": SEEN}, spans=2, as_ones=True)
    assert torch.equal(taken["full_attention"], SEEN.float().repeat(1, 2, 1, 1))
    block = BlockMask()
    assert made({"full_attention": block}, backend="flex")["full_attention"] is block


def test_a_dict_may_hold_what_transformers_makes_for_flash_attention():
    two = torch.ones(2, 3)
    assert made({"full_attention": two}, backend="flash")["full_attention"] is two
    for wrong, backend, said in (
        (two, "sdpa", r"a tensor of shape \(2, 3\) for 'full_attention'"),
        ("text", "flash", "holds str for 'full_attention'"),
        (7, "eager", "holds int for"),
    ):
        with pytest.raises(AttentionMaskError, match=said):
            made({"full_attention": wrong}, backend=backend)


def test_a_dict_is_checked_like_a_single_mask():
    with pytest.raises(AttentionMaskError, match="give bool"):
        made({"full_attention": SEEN.long()})


@pytest.mark.skipif(not hasattr(transformers, "Gemma2Config"), reason="this transformers has no Gemma 2")
def test_a_mask_per_head_is_none_per_window():
    """Two heads and two different windows: the mask's channels are heads all the same."""
    config = transformers.Gemma2Config(**{**SIZES, "num_attention_heads": 2}, sliding_window=4)
    torch.manual_seed(0)
    model = enable_bidirectional(transformers.Gemma2Model._from_config(config, attn_implementation="eager").eval())
    seen = torch.rand(1, 2, 9, 9) > 0.4
    seen |= torch.eye(9, dtype=torch.bool)
    per_head = output(model, attention_mask=seen)
    swapped = output(model, attention_mask=seen.flip(1))
    assert not torch.allclose(per_head, swapped, atol=1e-5)
    additive = torch.zeros(1, 2, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(output(model, attention_mask=additive), per_head, atol=1e-5, rtol=1e-5)
    both = seen[:, :1].expand(-1, 2, -1, -1)
    torch.testing.assert_close(
        output(model, attention_mask=seen[:, :1]), output(model, attention_mask=both), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_bool_mask_means_the_same_on_every_backend(backend):
    model = enable_bidirectional(llama(backend=backend))
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    seen[..., 3] = False
    moved = moves(model, at=3, attention_mask=seen)
    assert moved == "000100000"
    with pytest.raises(AttentionMaskError, match="int64"):
        model(IDS, attention_mask=seen.long())
