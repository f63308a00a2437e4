"""What a user's arguments are read as, one by one: masks, positions, boundaries, and what is none of these."""

import pytest
import torch

from bidirect_patch import bidirectional, enable_bidirectional
from bidirect_patch.attention.dense import additive, dense_mask, hides_nothing
from bidirect_patch.attention.padding_and_packing import (
    Sequences,
    check_readable,
    in_window,
    read_boundaries,
    read_positions,
    read_sequences,
    run_starts,
    starts,
)
from bidirect_patch.attention.versions import HAS_MASKING_UTILS
from bidirect_patch.errors import ArgumentError, AttentionMaskError
from bidirect_patch.model.windows import Span

from ..helpers import zoo

CPU, META = torch.device("cpu"), torch.device("meta")


def row(digits):
    return torch.tensor([[int(digit) for digit in digits]])


def read(mask=None, positions=None, boundaries=None, batch=1, length=4):
    return read_sequences(mask, positions, boundaries, batch, length, CPU)


@pytest.mark.parametrize(
    "given, said",
    [
        (torch.ones(4, dtype=torch.complex64), "x of dtype torch.complex64"),
        (torch.ones(4).to_sparse(), "x of layout torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2)]), "x of a nested layout"),
        (torch.ones(4, device=META), "x of the meta device"),
    ],
    ids=["complex", "sparse", "nested", "meta"],
)
def test_what_has_no_values_to_compare_is_refused(given, said):
    with pytest.raises(AttentionMaskError, match=said):
        check_readable("x", given, CPU)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16], ids=str)
def test_dense_real_numbers_are_read(dtype):
    check_readable("x", torch.ones(2, dtype=dtype), CPU)
    check_readable("x", torch.ones(2, dtype=dtype, device=META), META)


def test_a_mask_is_checked_for_its_kind_before_its_shape():
    with pytest.raises(AttentionMaskError, match="attention_mask of layout"):
        read(torch.ones(1, 4).to_sparse())


@pytest.mark.parametrize("batch, length", [(1, 4), (3, 2)])
def test_errors_name_the_form_that_is_taken(batch, length):
    for mask in (torch.ones(batch, length + 1), torch.ones(batch + 1, length), torch.ones(batch, length, 1)):
        with pytest.raises(AttentionMaskError, match=rf"give \({batch}, {length}\) with 1 for"):
            read(mask, batch=batch, length=length)


@pytest.mark.parametrize("mask", [row("1111"), row("1111").bool(), row("1111").float()], ids=lambda mask: str(mask.dtype))
def test_a_mask_without_padding_is_no_mask(mask):
    assert read(mask).real is None and read(mask).number is None


@pytest.mark.parametrize("values", [[1, 1, 2, 1], [0, -1, 1, 1], [0.5, 1, 1, 1], [float("nan"), 1, 1, 1]], ids=str)
def test_a_mask_of_other_values_is_refused(values):
    with pytest.raises(AttentionMaskError, match="other values than 1"):
        read(torch.tensor([values]))


@pytest.mark.parametrize("positions", ["0123", "4567"])
def test_positions_that_rise_by_one_are_one_sequence(positions):
    assert read(positions=row(positions)).number is None


def test_positions_of_one_token_start_nothing():
    """In generation, and in rows of one token."""
    assert read(positions=row("5"), length=1).number is None
    assert read(positions=torch.tensor([[5], [3]]), batch=2, length=1).number is None
    assert read(positions=row("51"), length=2).number.tolist() == [[0, 1]]


def test_numbers_count_the_sequences_of_each_row():
    both = torch.cat([row("0101"), row("0123")])
    assert read(positions=both, batch=2).number.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert read(positions=row("0010"), batch=2).number.tolist() == [[0, 1, 1, 2]] * 2


@pytest.mark.parametrize(
    "shape, found",
    [
        ((4,), (1, 4)),
        ((1, 4), (1, 4)),
        ((2, 4), (2, 4)),
        ((3, 2, 4), None),
        ((3, 1, 4), None),
        ((4, 2, 4), (2, 4)),
        ((5, 2, 4), None),
    ],
    ids=str,
)
def test_positions_of_each_shape(shape, found):
    positions = torch.arange(4).expand(shape) if shape[0] != 4 or len(shape) == 1 else torch.arange(32).view(shape)
    read_as = read_positions(positions, 2, 4)
    assert read_as is None if found is None else read_as.shape == found
    if found is not None:
        assert torch.equal(read_as.flatten(), (positions[0] if len(shape) == 3 else positions).flatten())


@pytest.mark.parametrize("shape", [(3,), (5,), (3, 4), (2, 3), (2, 5), (4, 2, 3), (4, 3, 4), (1, 2, 2, 4), ()], ids=str)
def test_positions_of_no_shape(shape):
    with pytest.raises(AttentionMaskError, match=r"for input of 2 x 4 tokens: give \(2, 4\) or \(1, 4\)"):
        read_positions(torch.zeros(shape, dtype=torch.int64), 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_positions_and_boundaries_are_integers(dtype):
    with pytest.raises(AttentionMaskError, match=f"position_ids must be a tensor of integers or None, got {dtype}"):
        read_positions(torch.zeros(1, 4, dtype=dtype), 1, 4)
    with pytest.raises(AttentionMaskError, match=rf"must be a 1D tensor of integers, got {dtype} \(2,\)"):
        read_boundaries(torch.zeros(2, dtype=dtype), 1, 4, CPU)


@pytest.mark.parametrize("given, named", [([0, 4], "list"), (7, "int")])
def test_positions_and_boundaries_are_tensors(given, named):
    with pytest.raises(AttentionMaskError, match=f"got {named}"):
        read_positions(given, 1, 4)
    with pytest.raises(AttentionMaskError, match=f"1D tensor of integers, got {named}"):
        read_boundaries(given, 1, 4, CPU)


def test_boundaries_number_the_sequences():
    for dtype in (torch.int32, torch.int64, torch.int16):
        numbers = read_boundaries(torch.tensor([0, 1, 4], dtype=dtype), 1, 4, CPU)
        assert numbers.tolist() == [[1, 2, 2, 2]] and numbers.dtype == torch.int64


@pytest.mark.parametrize(
    "boundaries", [[[0, 4]], [0, 4, 4], [0, 0, 4], [0, 5], [-1, 4], [0, 3], [4], [0], []], ids=str
)
def test_boundaries_that_are_none(boundaries):
    with pytest.raises(AttentionMaskError, match="boundaries that rise from 0 to 4"):
        read_boundaries(torch.tensor(boundaries, dtype=torch.int32), 1, 4, CPU)


def test_the_only_boundary_of_an_empty_row_is_refused():
    with pytest.raises(AttentionMaskError, match=r"cu_seq_lens_q \[0\]"):
        read_boundaries(torch.tensor([0]), 1, 0, CPU)


def test_boundaries_are_of_one_row():
    with pytest.raises(AttentionMaskError, match="for input of 2 x 4 tokens: give one row"):
        read_boundaries(torch.tensor([0, 4]), 2, 4, CPU)


def test_where_sequences_start():
    """At a real token that isn't beyond the real token before it; never at the first one."""
    assert starts(row("012012")).int().tolist() == [[0, 0, 0, 1, 0, 0]]
    assert starts(row("0011")).int().tolist() == [[0, 1, 0, 1]]
    assert starts(row("9000"), row("0111").bool()).int().tolist() == [[0, 0, 1, 1]]
    assert starts(row("5161"), row("1011").bool()).int().tolist() == [[0, 0, 0, 1]]
    assert starts(row("1101"), row("0000").bool()).int().tolist() == [[0, 0, 0, 0]]
    assert starts(row("0"), row("1").bool()).tolist() == starts(row("0")).tolist() == [[False]]
    assert starts(row("0100"), row("1100").bool()).int().tolist() == [[0, 0, 0, 0]], "padding starts nothing"


def test_where_runs_start():
    assert run_starts(row("1122")).int().tolist() == [[1, 0, 1, 0]]
    assert run_starts(row("0")).tolist() == [[True]]


def test_a_window_is_a_distance_below_it():
    assert [bool(in_window(torch.tensor(5), torch.tensor(key), 2)) for key in (3, 4, 5, 6, 7)] == [False, True, True, True, False]


@pytest.mark.parametrize(
    "real, number, spans, hides",
    [
        (None, None, (Span(),), False),
        (None, None, (Span(window=4), Span(chunk=4)), False),
        (None, None, (Span(), Span(window=3)), True),
        (None, None, (Span(chunk=3),), True),
        ("1110", None, (Span(),), True),
        (None, "0011", (Span(),), True),
    ],
)
def test_whether_anything_is_hidden(real, number, spans, hides):
    sequences = Sequences(1, 4, CPU, None if real is None else row(real).bool(), None if number is None else row(number))
    assert sequences.hide_nothing(spans) is not hides


@pytest.mark.parametrize("span, hides", [(Span(), False), (Span(window=9), True), (Span(chunk=9), True)], ids=str)
def test_a_trace_keeps_every_limit(span, hides):
    """It also runs at other lengths."""

    def traced(x):
        return x + float(Sequences(1, 4, CPU, None, None).hide_nothing((Span(), span)))

    assert torch.jit.trace(traced, torch.zeros(1), check_trace=False)(torch.zeros(1)).item() == (not hides)


@pytest.mark.parametrize("length, chunk", [(6, 2), (5, 2), (6, 3), (4, 4), (4, 7)])
@pytest.mark.parametrize("at", range(1, 4))
def test_chunks_of_two_sequences_have_numbers_of_their_own(length, chunk, at):
    """Two positions have one number exactly where sequence and chunk, counted from its start, are the same."""
    number = (torch.arange(length) >= at).long()[None]
    found = Sequences(1, length, CPU, None, number).chunked(chunk)
    places = [(int(i >= at), (i - at if i >= at else i) // chunk) for i in range(length)]
    same = torch.tensor([[a == b for a in places] for b in places])
    assert torch.equal(found[0][:, None] == found[0][None, :], same)


def test_chunks_begin_after_left_padding():
    found = Sequences(2, 5, CPU, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(), None).chunked(2)
    assert found[0, 2] == found[0, 3] != found[0, 4] and found[1, 0] == found[1, 1] != found[1, 2] == found[1, 3]


@pytest.mark.parametrize("number", [None, "0011"])
def test_without_chunks_the_numbers_are_those_of_the_sequences(number):
    sequences = Sequences(1, 4, CPU, None, None if number is None else row(number))
    found = sequences.chunked(None)
    assert found.tolist() == [[0, 0, 0, 0]] if number is None else found is sequences.number


OPEN, PADDED = Sequences(2, 3, CPU, None, None), Sequences(1, 3, CPU, row("110").bool(), None)
SEEN = torch.tensor([[1, 1, 0]] * 3).bool()


@pytest.mark.parametrize("as_bool, ones, visible", [(False, False, 0.0), (False, True, 1.0), (True, True, 1.0)])
def test_a_mask_that_hides_nothing_takes_no_memory(as_bool, ones, visible):
    mask = dense_mask(OPEN, (Span(), Span(window=3)), torch.float16, as_bool, ones)
    assert mask.shape == (2, 2, 3, 3) and mask.dtype == torch.float16 and (mask == visible).all()
    assert hides_nothing(mask) and hides_nothing(mask[:, 1:]) and mask.untyped_storage().nbytes() == 2


@pytest.mark.skipif(not HAS_MASKING_UTILS, reason="before 4.53 a bool mask is not passed on")
def test_a_bool_mask_is_true_where_visible():
    mask = dense_mask(OPEN, (Span(),), torch.float32, True, False)
    assert mask.dtype == torch.bool and mask.all() and hides_nothing(mask)
    mask = dense_mask(PADDED, (Span(), Span()), torch.float32, True, False)
    assert mask.dtype == torch.bool and torch.equal(mask[0], SEEN.expand(2, 3, 3)) and not hides_nothing(mask)


def test_a_mask_that_hides_is_added_or_ones_and_zeros():
    added = dense_mask(PADDED, (Span(),), torch.float16, False, False)
    lowest = torch.finfo(torch.float16).min
    assert torch.equal(added[0, 0], torch.where(SEEN, 0.0, lowest).half()) and not hides_nothing(added)
    assert torch.equal(additive(SEEN, torch.float16), added[0, 0])
    ones = dense_mask(PADDED, (Span(),), torch.float16, True, True)
    assert ones.dtype == torch.float16 and torch.equal(ones[0, 0], SEEN.half())


@pytest.mark.parametrize("mask", ["1111", "1011"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # it compares shapes, which a trace keeps
def test_a_captured_graph_keeps_what_the_example_lacked(mask):
    """A trace made with a mask of ones and positions that rise runs on others too."""

    def seen(mask, positions):
        return read(mask, positions).visible(Span())

    traced = torch.jit.trace(seen, (row("1111"), row("0123")), check_trace=False)
    for positions in ("0123", "0101"):
        assert torch.equal(traced(row(mask), row(positions)), seen(row(mask), row(positions)))


def test_states_that_a_model_puts_before_the_tokens_are_refused():
    """MusicGen Melody makes one sequence of both, for which a mask of the tokens alone is too short."""
    if "musicgen_melody" not in zoo.buildable_types():
        pytest.skip("not in this transformers")
    model = enable_bidirectional(zoo.build("musicgen_melody"))
    given = dict(**zoo.inputs(model, 2, 6), encoder_hidden_states=torch.randn(2, 3, model.config.hidden_size))
    with pytest.raises(ArgumentError, match="encoder_hidden_states were given to MusicgenMelodyDecoder"):
        model(**given)
    with bidirectional(model, enabled=False):
        assert model(**given).logits.shape[1] == 9
