"""Who sees whom: a table of small inputs, and every backend's mask against it.

A matrix is written row by row: one row for each query, 1 where it sees the key. The rules: a real token sees the real tokens
of its own sequence, within the window and the chunk of the layer; a sink token sees none after itself, and others see it unless
the layer is sinkless; padding sees every real token of its row; in a row of padding alone everything sees everything.
"""

from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bidirect_patch.attention.flash import first_tokens, how_to_run, sequence_numbers
from bidirect_patch.attention.padding_and_packing import Sequences, read_sequences
from bidirect_patch.attention.ready_mask import make_mask, pick
from bidirect_patch.errors import AttentionMaskError
from bidirect_patch.model.windows import Span

CPU = torch.device("cpu")


class Case(NamedTuple):
    """Input of one batch, and the matrix of each of its rows."""

    expected: list[str]
    mask: list[str] | None = None
    positions: list[str] | None = None
    boundaries: list[int] | None = None  # cu_seq_lens
    span: Span = Span()


ALL = "1111 1111 1111 1111"
CASES = {
    "no-mask": Case([ALL]),
    "mask-of-ones": Case([ALL], mask=["1111"]),
    "padding-on-the-right": Case(["1110 1110 1110 1110"], mask=["1110"]),
    "padding-on-the-left": Case(["0011 0011 0011 0011"], mask=["0011"]),
    "padding-in-the-middle": Case(["1011 1011 1011 1011"], mask=["1011"]),
    "padding-everywhere": Case(["0110 0110 0110 0110"], mask=["0110"]),
    "one-real-token": Case(["0100 0100 0100 0100"], mask=["0100"]),
    "all-padding": Case([ALL], mask=["0000"]),
    "batch-of-2": Case(["1100 1100 1100 1100", "0111 0111 0111 0111"], mask=["1100", "0111"]),
    "batch-of-2-with-a-row-of-padding": Case([ALL, ALL], mask=["1111", "0000"]),
    # position_ids: a sequence starts where the position isn't beyond the one before
    "packed": Case(["1100 1100 0011 0011"], positions=["0101"]),
    "packed-in-three": Case(["1000 0110 0110 0001"], positions=["0010"]),
    "packed-with-repeated-positions": Case(["1100 1100 0010 0001"], positions=["0111"]),
    "packed-from-late-positions": Case(["1100 1100 0011 0011"], positions=["5634"]),
    "positions-from-0": Case([ALL], positions=["0123"]),
    "positions-that-start-late": Case([ALL], positions=["4567"]),
    "positions-that-skip": Case([ALL], positions=["0247"]),
    "positions-that-skip-in-two-sequences": Case(["1100 1100 0011 0011"], positions=["0537"]),
    "one-row-of-positions-for-all": Case(["1110 1110 1110 0001"] * 2, mask=["1111"] * 2, positions=["0120"]),
    "a-row-packed-and-a-row-not": Case(["1100 1100 0011 0011", ALL], positions=["0101", "0123"]),
    "packed-and-padded-on-the-right": Case(
        ["110000 110000 001100 001100 111100 111100"], mask=["111100"], positions=["010100"]
    ),
    "packed-and-padded-on-the-left": Case(
        ["001111 001111 001100 001100 000011 000011"], mask=["001111"], positions=["110101"]
    ),
    "packed-with-padding-between": Case(["11000 11000 11011 00011 00011"], mask=["11011"], positions=["01001"]),
    "positions-that-generate-gives-left-padding": Case(["0011 0011 0011 0011"], mask=["0011"], positions=["1101"]),
    "positions-count-real-tokens": Case(["1011 1011 1011 1011"], mask=["1011"], positions=["0012"]),
    # cu_seq_lens
    "boundaries": Case(["1000 0110 0110 0001"], boundaries=[0, 1, 3, 4]),
    "boundaries-of-one-sequence": Case([ALL], boundaries=[0, 4]),
    "boundaries-win-over-positions": Case(["1100 1100 0011 0011"], positions=["0123"], boundaries=[0, 2, 4]),
    # windows: distances below the window
    "window-of-1": Case(["1000 0100 0010 0001"], span=Span(window=1)),
    "window-of-2": Case(["1100 1110 0111 0011"], span=Span(window=2)),
    "window-of-4": Case([ALL], span=Span(window=4)),
    "window-and-padding-on-the-right": Case(["11000 11100 01100 11100 11100"], mask=["11100"], span=Span(window=2)),
    "window-and-padding-on-the-left": Case(["00111 00111 00110 00111 00011"], mask=["00111"], span=Span(window=2)),
    "window-and-packed": Case(["110000 111000 011000 000110 000111 000011"], positions=["012012"], span=Span(window=2)),
    "window-and-packed-short": Case(["1100 1100 0011 0011"], positions=["0101"], span=Span(window=3)),
    "window-and-boundaries": Case(["11000 11100 01100 00011 00011"], boundaries=[0, 3, 5], span=Span(window=2)),
    "window-packed-and-padded": Case(
        ["11000 11100 01100 00010 11110"], mask=["11110"], positions=["01200"], span=Span(window=2)
    ),
    # chunks: counted from the start of the sequence, after left padding
    "chunk-of-2": Case(["11000 11000 00110 00110 00001"], span=Span(chunk=2)),
    "chunk-of-5": Case(["11111 11111 11111 11111 11111"], span=Span(chunk=5)),
    "chunk-and-padding-on-the-right": Case(["1100 1100 0010 1110"], mask=["1110"], span=Span(chunk=2)),
    "chunk-and-padding-on-the-left": Case(
        ["011111 011100 011100 011100 000011 000011"], mask=["011111"], span=Span(chunk=3)
    ),
    "chunk-and-packed": Case(["110000 110000 001000 000110 000110 000001"], positions=["012012"], span=Span(chunk=2)),
    "chunk-and-boundaries": Case(["10000 01100 01100 00010 00001"], boundaries=[0, 1, 4, 5], span=Span(chunk=2)),
    "chunk-packed-and-padded-on-the-left": Case(
        ["011111 011000 011000 000100 000011 000011"], mask=["011111"], positions=["101201"], span=Span(chunk=2)
    ),
    "chunk-and-window": Case(["110000 111000 011000 000110 000111 000011"], span=Span(window=2, chunk=3)),
    "chunk-in-one-row-of-2": Case(
        ["1100 1100 0011 0011", "0111 0110 0110 0001"], mask=["1111", "0111"], span=Span(chunk=2)
    ),
    # sink tokens: the first real ones of each sequence
    "sink": Case(["1000 1111 1111 1111"], span=Span(sinks=1)),
    "sinks": Case(["1000 1100 1111 1111"], span=Span(sinks=2)),
    "sinks-alone": Case(["1000 1100 1110 1111"], span=Span(sinks=4)),
    "sinks-beyond-the-text": Case(["1000 1100 1110 1111"], span=Span(sinks=9)),
    "sink-in-a-text-of-one": Case(["1"], span=Span(sinks=1)),
    "unseen-sink": Case(["1000 0111 0111 0111"], span=Span(sinks=1, sees_sinks=False)),
    "unseen-sinks": Case(["1000 1100 0011 0011"], span=Span(sinks=2, sees_sinks=False)),
    "unseen-sinks-alone": Case(["1000 1100 1110 1111"], span=Span(sinks=4, sees_sinks=False)),
    "sink-and-padding-on-the-right": Case(["1000 1110 1110 1110"], mask=["1110"], span=Span(sinks=1)),
    "sink-and-padding-on-the-left": Case(["0011 0011 0010 0011"], mask=["0011"], span=Span(sinks=1)),
    "sinks-and-padding-everywhere": Case(
        ["01011 01000 01011 01010 01011"], mask=["01011"], span=Span(sinks=2)
    ),
    "unseen-sinks-and-padding-everywhere": Case(
        ["01011 01000 01011 01010 00001"], mask=["01011"], span=Span(sinks=2, sees_sinks=False)
    ),
    "sinks-and-all-padding": Case([ALL], mask=["0000"], span=Span(sinks=1)),
    "unseen-sinks-and-one-token-more": Case(
        ["0110 0100 0110 0110"], mask=["0110"], span=Span(sinks=2, sees_sinks=False)
    ),
    "sinks-in-a-batch-of-2": Case(
        ["1000 1100 1110 1110", "0111 0100 0110 0111"], mask=["1110", "0111"], span=Span(sinks=2)
    ),
    "sinks-packed": Case(
        ["100000 010000 011000 000100 000110 000111"], positions=["001012"], span=Span(sinks=2)
    ),
    "unseen-sinks-packed": Case(
        ["100000 010000 011000 000100 000110 000001"], positions=["001012"], span=Span(sinks=2, sees_sinks=False)
    ),
    "sink-and-boundaries": Case(["10000 11100 11100 00010 00011"], boundaries=[0, 3, 5], span=Span(sinks=1)),
    "sinks-packed-and-padded-on-the-right": Case(
        ["100000 110000 001000 001100 111100 111100"], mask=["111100"], positions=["010100"], span=Span(sinks=1)
    ),
    "unseen-sinks-packed-and-padded-on-the-left": Case(
        ["001111 001111 001000 000100 000010 000001"], mask=["001111"], positions=["110101"], span=Span(sinks=1, sees_sinks=False)
    ),
    "sinks-packed-with-padding-between": Case(
        ["1000000 1100000 1101110 0001000 0001100 0001110 1101110"],
        mask=["1101110"], positions=["0100120"], span=Span(sinks=2),
    ),  # fmt: skip
    "sink-and-window": Case(["10000 11100 01110 00111 00011"], span=Span(window=2, sinks=1)),
    "sinks-and-window": Case(["10000 11000 11111 01111 00111"], span=Span(window=3, sinks=2)),
    "sinks-beyond-the-window": Case(["10000 11000 01100 00111 00011"], span=Span(window=2, sinks=3)),
    "unseen-sink-and-window": Case(["10000 01100 01110 00111 00011"], span=Span(window=2, sinks=1, sees_sinks=False)),
    "unseen-sinks-and-window-and-padding-on-the-left": Case(
        ["011111 010000 011000 000110 000111 000011"], mask=["011111"], span=Span(window=2, sinks=2, sees_sinks=False)
    ),
    "sink-and-window-and-packed": Case(
        ["100000 111000 011000 000100 000111 000011"], positions=["012012"], span=Span(window=2, sinks=1)
    ),
    "sink-and-chunk": Case(["10000 11000 00110 00110 00001"], span=Span(chunk=2, sinks=1)),
    "sinks-beyond-the-chunk": Case(["10000 11000 00100 00110 00001"], span=Span(chunk=2, sinks=3)),
    "unseen-sinks-beyond-the-chunk": Case(["10000 11000 00100 00010 00001"], span=Span(chunk=2, sinks=3, sees_sinks=False)),
    "sink-and-chunk-and-padding-on-the-left": Case(
        ["011111 010000 011000 000110 000110 000001"], mask=["011111"], span=Span(chunk=2, sinks=1)
    ),
    "sinks-and-chunk-and-packed": Case(
        ["100000 110000 001000 000100 000110 000001"], positions=["012012"], span=Span(chunk=2, sinks=2)
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def digits(rows):
    """Rows of digits as int64 (rows, length); None stays None."""
    return None if rows is None else torch.tensor([[int(digit) for digit in row] for row in rows])


def matrices(case):
    """The expected matrices, bool (batch, query, key)."""
    return torch.stack([digits(row.split()) for row in case.expected]).bool()


def read(case):
    """The sequences of a case."""
    boundaries = None if case.boundaries is None else torch.tensor(case.boundaries, dtype=torch.int32)
    batch, length, _ = matrices(case).shape
    return read_sequences(digits(case.mask), digits(case.positions), boundaries, batch, length, CPU)


def real_queries(case):
    """bool (batch, query): where a query is no padding."""
    return matrices(case).new_ones(matrices(case).shape[:2]) if case.mask is None else digits(case.mask).bool()


@each_case
def test_the_table_is_well_formed(case):
    """Square matrices, symmetric between real tokens but for sinks, where each real token sees itself."""
    seen, real = matrices(case), real_queries(case)
    assert seen.shape[1] == seen.shape[2] and real.shape == seen.shape[:2]
    between = real[:, :, None] & real[:, None, :]
    assert case.span.sinks or torch.equal(seen & between, (seen & between).mT)
    assert seen.diagonal(dim1=1, dim2=2)[real].all()


@each_case
def test_sequences(case):
    sequences = read(case)
    assert torch.equal(sequences.visible(case.span), matrices(case))
    if sequences.hide_nothing((case.span,)):
        assert matrices(case).all()


@each_case
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dense_masks(case, backend):
    mask = pick(make_mask(read(case), (case.span,), backend, torch.float32), 0, 1, False).as_subclass(torch.Tensor)
    assert mask.shape == matrices(case)[:, None].shape
    if mask.dtype != torch.bool:
        assert mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
        mask = mask == 0
    assert torch.equal(mask[:, 0], matrices(case))


@each_case
def test_masks_of_ones_and_zeros(case):
    mask = make_mask(read(case), (case.span,), "eager", torch.float32, ones_and_zeros=True)
    assert torch.equal(mask[:, 0], matrices(case).float())


@each_case
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_mask_is_left_out_only_where_nothing_is_hidden(case, backend):
    mask = pick(make_mask(read(case), (case.span,), backend, torch.float32), 0, 1, True)
    assert mask is not None or matrices(case).all()


def all_pairs(block_mask, shape):
    """What a BlockMask's function says of each pair: bool (batch, query, key)."""
    batch, length, _ = shape
    b, q, k = (
        torch.arange(batch)[:, None, None],
        torch.arange(length)[None, :, None],
        torch.arange(length)[None, None, :],
    )
    return torch.as_tensor(block_mask.mask_mod(b, torch.zeros((), dtype=torch.int64), q, k)).expand(shape)


@each_case
def test_flex_masks(case):
    """For real queries; padding sees something, but before sinks, where FlexAttention makes zeros of it."""
    from bidirect_patch.attention.flex import block_masks

    block_mask = block_masks(read(case), (case.span,))
    expected, real = matrices(case), real_queries(case)
    seen = all_pairs(block_mask, expected.shape)
    assert block_mask.shape[0] in (1, len(expected)) and block_mask.shape[-2:] == expected.shape[-2:]
    assert torch.equal(seen[real], expected[real])
    assert not seen[real.any(-1)].mT[~real[real.any(-1)]].any(), "padding is seen by nobody"
    if case.span.window is None and not case.span.sinks:
        assert seen.any(-1).all(), "each query sees something"


BLOCK_SPANS = (
    Span(),
    Span(window=100),
    Span(chunk=150),
    Span(sinks=2),
    Span(window=140, sinks=3),
    Span(sinks=1, sees_sinks=False),
)


@pytest.mark.parametrize("span", BLOCK_SPANS, ids=str)
@pytest.mark.parametrize("kind", ["unpadded", "padded left", "padded right", "packed"])
def test_flex_blocks_are_those_of_the_table(kind, span):
    """Which blocks are run, and which without the mask's function, beside torch's own `create_block_mask` on a whole table."""
    from bidirect_patch.attention.flex import block_masks

    real, number = None, None
    if kind.startswith("padded"):
        real = torch.arange(300).expand(2, -1) < torch.tensor([[290], [150]])
        real = real.flip(-1) if kind == "padded left" else real
    if kind == "packed":
        number = torch.searchsorted(torch.tensor([[5, 140, 256], [128, 130, 299]]), torch.arange(300).expand(2, -1).contiguous())
    ours = block_masks(Sequences(2, 300, CPU, real, number), (span,))
    table = all_pairs(ours, (2, 300, 300))
    theirs = create_block_mask(lambda b, h, q, k: table[b, q, k], 2, None, 300, 300, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(theirs, f"{name}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), counts), name
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(ours, f"{name}_indices")[used], indices[used]), name


def by_flash(case):
    """Who sees whom on FlashAttention, for real queries: bool (batch, query, key)."""
    batch, length, _ = matrices(case).shape
    numbers = sequence_numbers(read(case), (case.span,))
    if numbers is None:
        number, real = torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.bool)
    else:
        run = how_to_run(numbers, 0)
        if run.cu_seq_lens is None:  # a 2D mask: the real tokens of a row are one sequence
            number, real = torch.zeros(batch, length, dtype=torch.int64), run.mask.bool()
        else:
            lengths = run.cu_seq_lens.diff()
            assert run.max_length == lengths.max() and run.cu_seq_lens[-1] == batch * length
            number = torch.arange(len(lengths)).repeat_interleave(lengths).view(batch, length)
            real = torch.ones(batch, length, dtype=torch.bool)
            assert torch.equal(run.positions.flatten() == 0, torch.isin(torch.arange(batch * length), run.cu_seq_lens))
    seen = (number[:, :, None] == number[:, None, :]) & real[:, None, :]
    if case.span.window is not None:
        index = torch.arange(length)
        seen &= (index[:, None] - index).abs() < case.span.window
    # Then the sinks are run alone: each as the last token of a row, with the window that the module has.
    for rows in first_tokens(batch, length, case.span.sinks, CPU) if numbers is None else run.sinks:
        for row in rows.tolist():
            keys = [at % length for at in row if case.span.window is None or row[-1] - at < case.span.window]
            seen[row[-1] // length, row[-1] % length] = torch.isin(torch.arange(length), torch.tensor(keys))
    return seen


@each_case
def test_flash_calls(case):
    expected, real = matrices(case), real_queries(case)
    assert torch.equal(by_flash(case)[real], expected[real])


def test_several_spans_travel_in_one_mask():
    spans = (Span(), Span(window=2), Span(chunk=2))
    expected = ["0111 0111 0111 0111", "0111 0110 0111 0011", "0111 0110 0110 0001"]
    cases = [Case([matrix], mask=["0111"], span=span) for matrix, span in zip(expected, spans, strict=True)]
    sequences = read(cases[0])
    for backend in ("eager", "sdpa"):
        mask = make_mask(sequences, spans, backend, torch.float32)
        for i, case in enumerate(cases):
            own = pick(mask, i, 3, False)
            assert torch.equal(own[:, 0] if own.dtype == torch.bool else own[:, 0] == 0, matrices(case)), (backend, i)
    numbers = sequence_numbers(sequences, spans)
    for i, case in enumerate(cases):
        alone = how_to_run(sequence_numbers(sequences, (case.span,)), 0)
        together = how_to_run(numbers, i)
        for a, b in zip(vars(alone).values(), vars(together).values(), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_several_spans_travel_in_one_block_mask():
    from bidirect_patch.attention.flex import block_masks

    spans = (Span(), Span(window=2))
    mask = block_masks(read(CASES["packed"]), spans)
    for i, span in enumerate(spans):
        case = CASES["packed"]._replace(span=span)
        assert torch.equal(all_pairs(pick(mask, i, 2, False), (1, 4, 4)), matrices(case))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_half_precision_hides_with_its_own_minimum(backend):
    mask = make_mask(read(CASES["packed"]), (Span(),), backend, torch.float16, ones_and_zeros=False)
    assert mask.dtype == torch.bool or mask.min() == torch.finfo(torch.float16).min


@pytest.mark.parametrize("mask", ["10110", "01101"])
def test_flash_refuses_a_window_beside_padding_in_the_middle(mask):
    case = Case(["11111"] * 5, mask=[mask], span=Span(window=2))
    sequences = read_sequences(digits(case.mask), None, None, 1, 5, CPU)
    with pytest.raises(AttentionMaskError, match="middle of a row"):
        sequence_numbers(sequences, (case.span,))


def test_flash_refuses_padding_in_the_middle_of_a_packed_sequence():
    sequences = read_sequences(digits(["101111"]), digits(["002010"]), None, 1, 6, CPU)
    with pytest.raises(AttentionMaskError, match="middle of a packed sequence"):
        how_to_run(sequence_numbers(sequences, (Span(),)), 0)


@pytest.mark.parametrize(
    "boundaries", [[0, 2], [1, 4], [0, 2, 2, 4], [0, 3, 2, 4], [0], []], ids=lambda b: "-".join(map(str, b)) or "none"
)
def test_boundaries_that_do_not_cover_the_row_are_refused(boundaries):
    with pytest.raises(AttentionMaskError, match="boundaries that rise from 0 to 4"):
        read_sequences(None, None, torch.tensor(boundaries, dtype=torch.int32), 1, 4, CPU)


def test_boundaries_of_two_rows_are_refused():
    with pytest.raises(AttentionMaskError, match="one row"):
        read_sequences(None, None, torch.tensor([0, 2, 4]), 2, 4, CPU)


@pytest.mark.parametrize(
    "mask, positions, message",
    [
        (torch.ones(1, 3), None, r"shape \(1, 3\)"),
        (torch.ones(4), None, r"shape \(4,\)"),
        ([[1, 1, 1, 1]], None, "must be a tensor"),
        (torch.tensor([[1, 1, 2, 2]]), None, "packed sequences"),
        (torch.tensor([[0.0, -1e9, 0.0, 0.0]]), None, "additive mask"),
        (None, torch.arange(4.0)[None], "tensor of integers"),
        (None, [0, 1, 2, 3], "tensor of integers"),
        (None, torch.arange(5)[None], r"shape \(1, 5\)"),
    ],
)
def test_input_that_means_nothing_is_refused(mask, positions, message):
    with pytest.raises(AttentionMaskError, match=message):
        read_sequences(mask, positions, None, 1, 4, CPU)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16], ids=str
)
def test_a_mask_of_any_dtype_says_the_same(dtype):
    sequences = read_sequences(digits(["0111"]).to(dtype), None, None, 1, 4, CPU)
    assert torch.equal(sequences.visible(Span()), matrices(Case(["0111 0111 0111 0111"])))


def test_positions_without_a_batch_are_taken_for_every_row():
    sequences = read_sequences(None, torch.tensor([0, 1, 0, 1]), None, 2, 4, CPU)
    assert torch.equal(sequences.visible(Span()), matrices(Case(["1100 1100 0011 0011"] * 2)))


def test_multimodal_positions_are_read_where_the_first_are_of_the_text():
    text, other = digits(["0101"]), digits(["0123"])
    four = read_sequences(None, torch.stack([text, other, other, other]), None, 1, 4, CPU)
    assert torch.equal(four.visible(Span()), matrices(CASES["packed"]))
    three = read_sequences(None, torch.stack([text, other, other]), None, 1, 4, CPU)
    assert three.visible(Span()).all(), "three are rotary positions alone"
