"""What bidirectional means: who sees whom, with padding, packed sequences and windows."""

import pytest
import torch
import torch.utils.checkpoint
from packaging.version import Version

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import UnsupportedModelError

from ..helpers.references.plain_decoder import hidden_states, reach
from ..helpers.seeing import CLOSE, IDS, MASK, hidden, reached, sees_all, sees_only_the_past
from ..helpers.tiny_models import each_family
from ..helpers.versions import TRANSFORMERS


@each_family
@pytest.mark.parametrize("head", [True, False], ids=["causal-lm", "bare"])
def test_every_token_reaches_every_token(make_model, family, head):
    model = make_model(family, head=head)
    assert sees_only_the_past(model) and not is_bidirectional(model)
    assert enable_bidirectional(model) is model
    assert sees_all(model) and is_bidirectional(model)
    assert disable_bidirectional(model) is model
    assert sees_only_the_past(model) and not is_bidirectional(model)


def test_every_layer_is_bidirectional(make_model):
    """Each attention is asked alone: its input moves at the last position, its output everywhere."""
    model = enable_bidirectional(make_model(num_hidden_layers=3))
    outputs = []

    def move_last(_, args, kwargs):
        x = kwargs.pop("hidden_states", args[0] if args else None).clone()
        x[:, -1] += 1.0
        return (x, *args[1:]), kwargs

    for layer in model.model.layers:
        watch = layer.self_attn.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        with torch.no_grad():
            model(IDS[:1])
            move = layer.self_attn.register_forward_pre_hook(move_last, with_kwargs=True)
            model(IDS[:1])
        watch.remove(), move.remove()
        assert ((outputs[-1] - outputs[-2]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("kind", [torch.long, torch.int32, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_any_dtype_changes_nothing(make_model, side, kind):
    model = enable_bidirectional(make_model())
    ids, mask = (IDS, MASK) if side == "right" else (IDS.flip(1), MASK.flip(1))
    with torch.no_grad():
        padded = hidden(model, ids, mask.to(kind))
        alone = hidden(model, ids[1:, mask[1].bool()])
        junk = torch.where(mask.bool(), ids, 45)
        with_junk = hidden(model, junk, mask.to(kind))
    torch.testing.assert_close(padded[1, mask[1].bool()], alone[0], **CLOSE)
    torch.testing.assert_close(with_junk[mask.bool()], padded[mask.bool()], **CLOSE)
    with bidirectional(model, enabled=False), torch.no_grad():
        assert not torch.allclose(hidden(model, ids, mask.to(kind))[mask.bool()], padded[mask.bool()])
    assert padded.isfinite().all() and with_junk.isfinite().all()


def test_no_mask_and_a_mask_of_ones_are_the_same(make_model):
    model = enable_bidirectional(make_model())
    with torch.no_grad():
        torch.testing.assert_close(hidden(model), hidden(model, attention_mask=torch.ones_like(IDS)), **CLOSE)
    assert sees_all(model)


def test_a_row_of_padding_alone_is_finite_and_harmless(make_model):
    model = enable_bidirectional(make_model())
    mask = torch.tensor([[1] * 8, [0] * 8])
    with torch.no_grad():
        out = hidden(model, IDS, mask)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:1], hidden(model, IDS[:1]), **CLOSE)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_documents_are_strangers(make_model, rows):
    """Outputs and gradients of packed rows are those of each document alone."""
    model = enable_bidirectional(make_model())
    lengths = [(3, 1, 4), (2, 6, 0)][:rows]
    ids = IDS[:1].expand(rows, -1).clone()
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = hidden(model, ids, position_ids=positions)
    alone = [[hidden(model, doc[None])[0] for doc in row.split([n for n in ns if n])]
             for row, ns in zip(ids, lengths, strict=True)]  # fmt: skip
    alone = torch.stack([torch.cat(row) for row in alone])
    torch.testing.assert_close(packed, alone, **CLOSE)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    parameters = list(model.model.parameters())
    for a, b in zip(torch.autograd.grad((packed * weight).sum(), parameters),
                    torch.autograd.grad((alone * weight).sum(), parameters), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_packed_documents_with_padding_at_the_end(make_model):
    model = enable_bidirectional(make_model())
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 0, 0]])
    with torch.no_grad():
        out = hidden(model, IDS, MASK, position_ids=positions)
        docs = [IDS[0, :3], IDS[0, 3:], IDS[1, :2], IDS[1, 2:5]]
        alone = torch.cat([hidden(model, doc[None])[0] for doc in docs])
    torch.testing.assert_close(out[MASK.bool()], alone, **CLOSE)
    assert out.isfinite().all()


@pytest.mark.parametrize("filler", [0, 1])
def test_the_positions_that_generate_gives_left_padding_are_one_document(make_model, filler):
    model = enable_bidirectional(make_model())
    ids, mask = IDS.flip(1), MASK.flip(1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
    with torch.no_grad():
        out = hidden(model, ids, mask, position_ids=positions)
        torch.testing.assert_close(out[1, 3:], hidden(model, ids[1:, 3:])[0], **CLOSE)
    assert sees_all(model)


def test_positions_that_start_late_are_one_document(make_model):
    model = enable_bidirectional(make_model())
    assert reached(model, position_ids=torch.arange(20, 28)[None]).all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [2, 3, 8, 50])
def test_a_window_reaches_as_far_ahead_as_back(make_model, backend, window):
    model = enable_bidirectional(make_model("mistral", backend, sliding_window=window, num_hidden_layers=1))
    distance = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    assert torch.equal(reached(model), distance < window)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_qwen2_without_use_sliding_window_has_no_window(make_model, backend):
    settings = dict(use_sliding_window=False, sliding_window=3, max_window_layers=0, num_hidden_layers=1)
    assert sees_all(enable_bidirectional(make_model("qwen2", backend, **settings)))


def test_qwen2_has_its_window_above_max_window_layers_on_each_backend(make_model):
    """The first layers see everything. Where a release can't take one mask for each kind of layer, it is refused."""
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "num_hidden_layers": 3}
    seen = {}
    for backend in ("eager", "sdpa", "flash_attention_2"):
        try:
            model = enable_bidirectional(make_model("qwen2", backend, **windows))
        except UnsupportedModelError as error:
            assert TRANSFORMERS < Version("4.42") and "not 2" in str(error)
            continue
        seen[backend] = hidden(model)
        allowed = [reach(MASK | 1, None, window) for window in (None, 3, 3)]
        torch.testing.assert_close(seen[backend], hidden_states(model, IDS, allowed), **CLOSE)
    assert seen


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_skip_are_one_document(make_model, backend, masked):
    """Only a real token whose position isn't beyond the one before it starts a document."""
    model = enable_bidirectional(make_model(backend=backend))
    ids = IDS[:1]
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    seen = ids.shape[1] * [None]
    for at in range(ids.shape[1]):
        other = ids.clone()
        other[0, at] = 60
        positions = torch.arange(0, 2 * ids.shape[1], 2)[None]
        with torch.no_grad():
            moved = hidden(model, ids, position_ids=positions, **mask) - hidden(model, other, position_ids=positions, **mask)
        seen[at] = moved.abs().amax(-1)[0] > 1e-6
    assert torch.stack(seen).all()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
def test_the_usual_positions_around_padding_are_one_document(make_model, backend):
    model = enable_bidirectional(make_model(backend=backend))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        out = hidden(model, IDS, mask, position_ids=positions)
        for row, real in enumerate(mask.bool()):
            torch.testing.assert_close(out[row, real], hidden(model, IDS[row : row + 1, real])[0], **CLOSE)
