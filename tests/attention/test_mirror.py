"""What a model holds for the past by itself, mirrored: masks, ALiBi, buffers. Matrices row by row, one for each query."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bidirect_patch.attention.mirror import mirrored_bias, mirrored_buffer, mirrored_mask

MINIMUM = torch.finfo(torch.float32).min

# A causal mask, and what it becomes: 1 where a query sees a key.
MASKS = {
    "causal": ("1000 1100 1110 1111", "1111 1111 1111 1111"),
    "window-of-2": ("1000 1100 0110 0011", "1100 1110 0111 0011"),
    "chunks-of-2": ("1000 1100 0010 0011", "1100 1100 0011 0011"),
    "packed": ("1000 1100 0010 0011", "1100 1100 0011 0011"),
    "only-itself": ("1000 0100 0010 0001", "1000 0100 0010 0001"),
    # A key that doesn't see itself is padding. Padded queries see every real key.
    "padding-on-the-left": ("0000 0000 0010 0011", "0011 0011 0011 0011"),
    "padding-on-the-left-that-sees-all": ("1111 1111 0010 0011", "1111 1111 1111 1111"),
    "padding-on-the-right": ("1000 1100 1100 1100", "1100 1100 1100 1100"),
    "padding-in-the-middle": ("1000 1000 1010 1011", "1011 1011 1011 1011"),
    "window-and-padding-on-the-right": ("10000 11000 01100 00110 00010", "11000 11100 01110 00110 11110"),
    "nothing-is-seen": ("0000 0000 0000 0000", "1111 1111 1111 1111"),
    "both-ways-already": ("1100 1110 0111 0011", "1100 1110 0111 0011"),
    "everything": ("1111 1111 1111 1111", "1111 1111 1111 1111"),
    # The keys of an empty cache, or columns that are filled up, come after the queries.
    "more-keys-than-queries": ("10000 11000 11100", "111 111 111"),
}
each_mask = pytest.mark.parametrize("causal, expected", MASKS.values(), ids=MASKS)


def matrix(rows):
    """bool (1, 1, query, key)."""
    return torch.tensor([[int(digit) for digit in row] for row in rows.split()]).bool()[None, None]


def additive(seen, dtype=torch.float32):
    """0 where seen, the minimum of the dtype elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@each_mask
def test_bool_masks(causal, expected):
    found = mirrored_mask(matrix(causal))
    assert found.dtype == torch.bool and torch.equal(found, matrix(expected))


@each_mask
def test_bool_masks_that_say_what_is_hidden(causal, expected):
    assert torch.equal(mirrored_mask(~matrix(causal), true_hides=True), ~matrix(expected))


@pytest.mark.parametrize("true_hides", [False, True])
def test_a_bool_mask_that_is_read_the_wrong_way_round_stays_causal(true_hides):
    """Mirrored, it would hide everything, and a softmax over nothing attends to all tokens alike: Bloom until 4.40."""
    mask = matrix("1000 1100 1110 1111") if true_hides else ~matrix("1000 1100 1110 1111")
    assert torch.equal(mirrored_mask(mask, true_hides), mask)


@each_mask
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_additive_masks(causal, expected, dtype):
    found = mirrored_mask(additive(matrix(causal), dtype))
    assert found.dtype == dtype and torch.equal(found, additive(matrix(expected), dtype))


@each_mask
def test_masks_of_minus_infinity(causal, expected):
    """Where nothing is seen, the answer still is finite."""
    found = mirrored_mask(torch.zeros(matrix(causal).shape).masked_fill(~matrix(causal), -torch.inf))
    assert torch.equal(found, additive(matrix(expected)))


@each_mask
@pytest.mark.parametrize("form", ["bool", "hides", "additive"])
def test_mirroring_twice_is_mirroring_once(causal, expected, form):
    mask = {"bool": matrix(causal), "hides": ~matrix(causal), "additive": additive(matrix(causal))}[form]
    once = mirrored_mask(mask, form == "hides")
    assert torch.equal(mirrored_mask(once, form == "hides"), once)


@each_mask
def test_the_mask_that_was_given_stays_as_it_is(causal, expected):
    for mask in (matrix(causal), additive(matrix(causal))):
        before = mask.clone()
        mirrored_mask(mask)
        assert torch.equal(mask, before)


def test_each_row_and_head_is_mirrored_by_itself():
    pairs = [MASKS["causal"], MASKS["window-of-2"], MASKS["padding-on-the-left"], MASKS["packed"]]
    causal, expected = (torch.cat([matrix(pair[i]) for pair in pairs]).view(2, 2, 4, 4) for i in (0, 1))
    assert torch.equal(mirrored_mask(causal), expected)
    assert torch.equal(mirrored_mask(additive(causal)), additive(expected))


def test_a_mask_of_three_dims():
    causal, expected = MASKS["causal"]
    assert torch.equal(mirrored_mask(matrix(causal)[0]), matrix(expected)[0])


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 1, 4), (1, 1, 4, 3)], ids=str)
def test_masks_for_padding_alone_are_returned_as_they_are(shape):
    mask = torch.ones(shape)
    assert mirrored_mask(mask) is mask


def test_no_mask_is_no_mask():
    assert mirrored_mask(None) is None


def test_masks_by_kind_of_layer():
    kinds = {
        "full_attention": matrix(MASKS["causal"][0]),
        "sliding_attention": matrix(MASKS["window-of-2"][0]),
        "none": None,
    }
    found = mirrored_mask(kinds)
    assert found.keys() == kinds.keys() and found["none"] is None
    assert torch.equal(found["full_attention"], matrix(MASKS["causal"][1]))
    assert torch.equal(found["sliding_attention"], matrix(MASKS["window-of-2"][1]))


def test_an_additive_mask_that_holds_alibi():
    """slope * k under a causal mask becomes -slope * |q - k|, and padding stays hidden."""
    slopes, index = torch.tensor([0.5, 0.25])[:, None, None], torch.arange(4.0)
    alibi = (slopes * index).expand(2, 4, 4)[None]
    causal, expected = (matrix(rows) for rows in MASKS["causal"])
    found = mirrored_mask(alibi.masked_fill(~causal, MINIMUM))
    assert torch.equal(found[0], -slopes * (index[:, None] - index).abs())
    causal, expected = (matrix(rows) for rows in MASKS["padding-on-the-left"])
    found = mirrored_mask(alibi.masked_fill(~causal, MINIMUM))
    between = -slopes * (index[:, None] - index).abs()
    assert torch.equal(found[0, :, 2:], between.masked_fill(~expected[0], MINIMUM)[:, 2:])
    assert (found[..., :2] == MINIMUM).all()


@pytest.mark.parametrize("name", ["causal", "window-of-2", "packed", "padding-on-the-left", "padding-on-the-right"])
def test_block_masks(name):
    causal, expected = (matrix(rows)[0, 0] for rows in MASKS[name])
    mask = create_block_mask(lambda b, h, q, k: causal[q, k], 1, None, 4, 4, device="cpu")
    found = mirrored_mask(mask)
    index, zero = torch.arange(4), torch.zeros((), dtype=torch.int64)
    seen = found.mask_mod(zero, zero, index[:, None], index[None, :])
    assert torch.equal(seen, expected)
    assert mirrored_mask(mask) is found, "the layers of one forward share it"
    again = mirrored_mask(found).mask_mod(zero, zero, index[:, None], index[None, :])
    assert torch.equal(again, expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (6,)], ids=str)
def test_bias(shape):
    """ALiBi of each head: (..., 1, keys), of which the last `length` keys count."""
    slopes = torch.arange(1, 1 + torch.Size(shape).numel()).float().view(*shape, 1)
    bias, index = slopes[..., None] * torch.arange(6.0), torch.arange(4.0)
    assert torch.equal(mirrored_bias(bias, 4), -slopes[..., None] * (index[:, None] - index).abs())


def test_a_bias_of_falling_values_is_the_same():
    """Some releases give slope * (k - last) for slope * k: softmax takes no notice, and neither does the mirror."""
    index = torch.arange(5.0)
    assert torch.equal(mirrored_bias(0.5 * index[None, None], 5), mirrored_bias(0.5 * (index - 4)[None, None], 5))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "window-of-2", "packed", "both-ways-already"])
def test_buffers(name, dtype):
    causal, expected = (matrix(rows).to(dtype) for rows in MASKS[name])
    before = causal.clone()
    with torch.inference_mode():  # in which a model may be enabled that is trained afterwards
        found = mirrored_buffer(causal)
    assert not found.is_inference()
    assert found.dtype == dtype and found.shape == causal.shape and torch.equal(found, expected)
    assert torch.equal(mirrored_buffer(found), found)
    assert torch.equal(causal, before)
